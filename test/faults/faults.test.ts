/** The most telling cells of the fault matrix; `npm run faults` runs all of them, for longer and with the defaults. */
import { afterAll, beforeAll, describe, expect, inject, test } from 'vitest'
import { makeRunDirectory } from '../support/run-directory.ts'
import { flapRedis } from './flapping.ts'
import { type CellName, endOfLog, Matrix } from './matrix.ts'
import { startWorld, type World } from './world.ts'

/** A machine that is busy with other tests is not broken: its Redis may be slow, and everything may take its time. */
const ENV = {
  ITEMCACHE_REDIS_TIMEOUT: '1s',
  ITEMCACHE_REDIS_SLOW: '1s',
  ITEMCACHE_POSTGRES_STATEMENT_TIMEOUT: '5s',
  ITEMCACHE_POSTGRES_CONNECT_TIMEOUT: '5s',
}
/** Faults last for longer than copies are current without the log: what is warm is then served as stale, or not at all. */
const BOUNDS = { faultMs: 2500, convergesWithinMs: 30_000, watchedMs: 0, slackMs: 10_000 }

const CELLS: readonly CellName[] = [
  { dependency: 'redis', fault: 'killed', crowd: 'busy' },
  { dependency: 'postgres', fault: 'killed', crowd: 'busy' },
  { dependency: 'postgres', fault: 'stopped', crowd: 'idle' },
  { dependency: 'origin', fault: 'connections reset', crowd: 'busy' },
  // The last: connections that died without a word are noticed for some time after.
  { dependency: 'postgres', fault: 'reply lost', crowd: 'idle' },
]

describe('callers of a service of which a dependency breaks', () => {
  const started = new AsyncDisposableStack()
  let world: World
  let matrix: Matrix

  beforeAll(async () => {
    const directory = started.use(makeRunDirectory())
    const places = { directory, postgresCache: inject('postgresCache'), redisCache: inject('redisCache') }
    world = started.use(await startWorld(places, { env: ENV }))
    matrix = started.use(await Matrix.start(world, BOUNDS, 5000))
  })
  afterAll(() => started.disposeAsync())

  test.each(CELLS)(
    'see what they may see, and nothing is lost, when $dependency is out of order ($fault, $crowd)',
    { timeout: 120_000 },
    async (name) => {
      const { violations } = await matrix.run(name)
      expect(violations, endOfLog(world)).toEqual([])
    },
  )

  test('never fail to read what is warm while Redis is killed and started again', {
    timeout: 60_000,
  }, async () => {
    const options = { callers: 50, seconds: 2, everySeconds: 1, pauseMs: 100 }
    const { failed, reads, kills } = await flapRedis(world, options)
    expect(Object.fromEntries(failed)).toEqual({})
    expect(kills).toBeGreaterThan(0)
    expect(reads).toBeGreaterThanOrEqual(options.callers)
  })
})
