/**
 * How far instances are behind the log, and how soon a write at one instance is seen by readers of another. Writes arrive
 * at a fixed rate, whether or not earlier ones have been answered.
 *
 *     node bench/invalidation/lag.ts [--seconds 15] [--json FILE]
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { fill, options, progress, report, round, startBed } from '../bed.ts'
import { percentile } from '../report.ts'

const { seconds = 15 } = options()
const ITEMS = 1000
const tenant = 'lag'
const itemOf = (n: number) => `k${1 + (n % ITEMS)}`
/** A title that no item has: a write that changes nothing takes no revision. */
const newTitle = () => `${Math.random()}`

await using bed = await startBed()
const a = await bed.instance()
const sql = await bed.sql()
await fill(sql, tenant, ITEMS)

type Write = (n: number) => Promise<bigint>
const byService: Write = async (n) =>
  (
    await a.call(
      'updateItem',
      { item: { id: itemOf(n), title: newTitle() }, updateMask: { paths: ['title'] } },
      tenant,
    )
  ).revision
let turn: Promise<unknown> = Promise.resolve()
const bySql: Write = (n) => {
  const written = turn.then(async () => {
    await sql.query('UPDATE items SET title = $3 WHERE tenant = $1 AND id = $2', [
      tenant,
      itemOf(n),
      newTitle(),
    ])
    const { rows } = await sql.query('SELECT revision FROM items WHERE tenant = $1 AND id = $2', [
      tenant,
      itemOf(n),
    ])
    return BigInt(rows[0].revision)
  })
  turn = written
  return written
}

const rows = []
for (const [by, rate, write] of [
  ['UpdateItem', 2, byService],
  ['UpdateItem', 20, byService],
  ['UpdateItem', 50, byService],
  ['SQL', 20, bySql],
  ['SQL', 50, bySql],
] as const) {
  // A new instance for each run, so that its histogram holds nothing else.
  const b = await bed.instance()
  await b.call('getItem', { id: 'k1' }, tenant)
  progress(`${by}, ${rate} writes/s, ${seconds} s`)
  const seen: number[] = []
  const waiting: Promise<void>[] = []
  const startedMs = performance.now()
  for (let n = 0; n < rate * seconds; n++) {
    await sleep(Math.max(0, startedMs + (n * 1000) / rate - performance.now()))
    const visible = async () => {
      const revision = await write(n)
      const writtenMs = performance.now()
      const id = itemOf(n)
      for (;;) {
        const answer = (await b.call('getItem', { id }, tenant)) as unknown as {
          result: { value: { revision: bigint } }
        }
        if (answer.result.value.revision >= revision) break
        await sleep(1)
      }
      seen.push(performance.now() - writtenMs)
    }
    // Every fifth write is watched: watching all would measure the watching.
    if (n % 5 === 0 || rate < 10) waiting.push(visible())
    else waiting.push(write(n).then(() => {}))
  }
  await Promise.all(waiting)
  const { invalidationLag, invalidationsApplied } = await b.metrics()
  rows.push({
    'written by': by,
    'writes/s': rate,
    applied: Number(invalidationsApplied),
    'lag p50 ms': round(toMs(invalidationLag?.p50)),
    'lag p99 ms': round(toMs(invalidationLag?.p99)),
    'lag max ms': round(toMs(invalidationLag?.max)),
    'seen elsewhere p50 ms': round(percentile(seen, 0.5)),
    'p99 ms': round(percentile(seen, 0.99)),
  })
}
report('lag', bed, rows)

function toMs(duration: { readonly seconds: bigint; readonly nanos: number } | undefined): number {
  return duration === undefined ? Number.NaN : Number(duration.seconds) * 1000 + duration.nanos / 1e6
}
