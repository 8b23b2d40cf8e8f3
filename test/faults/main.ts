/**
 * `npm run faults`: all cells of the fault matrix, one after the other on one instance of the service, and then the table
 * of docs/resilience.md. `--only 'postgres, stopped'` runs the cells whose name begins so. `--redis-flapping` runs
 * callers against a Redis that is killed and started again all the time instead. Exits with 1 when something was seen
 * that must not be.
 */
import { join, resolve } from 'node:path'
import { parseArgs } from 'node:util'
import { makeRunDirectory } from '../support/run-directory.ts'
import { flapRedis } from './flapping.ts'
import {
  type Cell,
  type CellName,
  type CrowdName,
  DEPENDENCIES,
  describeCell,
  endOfLog,
  FAULT_NAMES,
  Matrix,
} from './matrix.ts'
import { tableOf } from './table.ts'
import { startWorld } from './world.ts'

const { values } = parseArgs({
  options: {
    only: { type: 'string', default: '' },
    seconds: { type: 'string', default: '8' },
    'redis-flapping': { type: 'boolean', default: false },
  },
})
const bounds = {
  faultMs: Number(values.seconds) * 1000,
  convergesWithinMs: 5000,
  watchedMs: 7000,
  slackMs: 1000,
}

const CELLS: readonly CellName[] = DEPENDENCIES.flatMap((dependency) =>
  FAULT_NAMES.flatMap((fault) =>
    (['idle', 'busy'] satisfies CrowdName[]).map((crowd) => ({ dependency, fault, crowd })),
  ),
)
const chosen = CELLS.filter(({ dependency, fault, crowd }) =>
  `${dependency}, ${fault}, ${crowd}`.startsWith(values.only),
)

await using directory = makeRunDirectory()
const places = {
  directory,
  postgresCache: join(directory.path, 'cache'),
  redisCache: resolve(import.meta.dirname, '../../.itemcache/cache'),
}
process.exitCode = (values['redis-flapping'] ? await flap() : await runCells()) ? 0 : 1

async function runCells(): Promise<boolean> {
  await using world = await startWorld(places)
  using matrix = await Matrix.start(world, bounds)
  const cells: Cell[] = []
  for (const name of chosen) {
    const cell = await matrix.run(name)
    cells.push(cell)
    console.log(`${cells.length}/${chosen.length} ${describeCell(cell)}`)
    if (cell.violations.length > 0) console.log(endOfLog(world))
  }
  console.log(`\n${tableOf(cells)}`)
  const violated = cells.filter(({ violations }) => violations.length > 0)
  console.log(`\n${cells.length} cells, ${violated.length} with violations`)
  return violated.length === 0
}

/** 200 callers, 60 s, Redis killed every 10 s; copies that are fresh for 2 s, so that Redis is asked all the time. */
async function flap(): Promise<boolean> {
  await using world = await startWorld(places, { env: { ITEMCACHE_FRESH_FOR: '2s' }, directly: true })
  const options = { callers: 200, seconds: 60, everySeconds: 10, pauseMs: 200 }
  const { reads, kills, failed, p50Ms, p99Ms, maxMs } = await flapRedis(world, options)
  const codes = Array.from(failed, ([code, times]) => `${times} ${code}`).join(', ')
  console.log(
    `${options.callers} callers, ${options.seconds} s, Redis killed ${kills} times: ${reads} warm reads, ` +
      `failed: ${codes || 'none'}; p50 ${p50Ms.toFixed(1)}, p99 ${p99Ms.toFixed(1)}, max ${Math.round(maxMs)} ms`,
  )
  return failed.size === 0
}
