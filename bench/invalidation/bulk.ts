/**
 * One UPDATE of 100,000 rows, as somebody would type it into psql, and what readers of the instance notice: p99 of reads
 * from memory before it, and while it is committed and applied.
 *
 *     node bench/invalidation/bulk.ts [--seconds 10] [--json FILE]
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { fromBinary } from '@bufbuild/protobuf'
import { WatchInvalidationsResponseSchema } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { fill, options, progress, rawStreams, report, round, startBed } from '../bed.ts'
import { percentile } from '../report.ts'

const { seconds = 10 } = options()
const ROWS = 100_000
const READS_PER_S = 50
const WARM = 200
const tenant = 'bulk'
const other = 'bystander'

await using bed = await startBed()
const instance = await bed.instance()
const sql = await bed.sql()
progress('filling')
await fill(sql, tenant, ROWS)
await fill(sql, other, WARM)

let last = performance.now()
const messages: Buffer[] = []
const started = Promise.withResolvers<void>()
const watched = rawStreams(instance.address, tenant)
watched.open({ heartbeatInterval: { seconds: 60n } }, (message) => {
  // Decoded at the end: this process measures the reads.
  messages.push(message)
  last = performance.now()
  started.resolve()
})
await started.promise

interface Read {
  readonly atMs: number
  readonly tookMs: number
}
let reading = true
/** Open loop: reads are sent at their times, however long others take. */
async function readsOf(of: string): Promise<Read[]> {
  const reads: Read[] = []
  const pending: Promise<void>[] = []
  const startedMs = performance.now()
  for (let n = 0; reading; n++) {
    const dueMs = startedMs + (n * 1000) / READS_PER_S
    await sleep(Math.max(0, dueMs - performance.now()))
    const read = instance.call('getItem', { id: `k${1 + (n % WARM)}` }, of).then(() => {
      reads.push({ atMs: dueMs, tookMs: performance.now() - dueMs })
    })
    pending.push(read)
  }
  await Promise.all(pending)
  return reads
}

const reads = Promise.all([readsOf(other), readsOf(tenant)])
progress('warming up')
await sleep(3000)
const fromMs = performance.now()
progress(`reading for ${seconds} s`)
await sleep(seconds * 1000)
const updateMs = performance.now()
progress('updating')
await sql.query(`UPDATE items SET title = title || '!' WHERE tenant = $1`, [tenant])
const committedMs = performance.now()
while (performance.now() - last < 2000 || performance.now() - committedMs < 2000) await sleep(100)
reading = false
const [bystanders, own] = await reads
const between = (all: readonly Read[], from: number, to: number) =>
  all.filter(({ atMs }) => atMs >= from && atMs < to).map(({ tookMs }) => tookMs)
const line = (what: string, all: readonly Read[], from: number, to: number) => ({
  reads: what,
  'p50 ms': round(percentile(between(all, from, to), 0.5)),
  'p99 ms': round(percentile(between(all, from, to), 0.99)),
  'max ms': round(percentile(between(all, from, to), 1)),
})
const events = messages.reduce((sum, message) => {
  const { event } = fromBinary(WatchInvalidationsResponseSchema, message)
  return sum + (event.case === 'batch' ? event.value.events.length : 0)
}, 0)
report('bulk update', bed, [
  {
    reads: `UPDATE of ${ROWS} rows: ${Math.round(committedMs - updateMs)} ms, ${events} events, the last ${Math.round(last - committedMs)} ms after COMMIT`,
  },
  line('another tenant, before', bystanders, fromMs, updateMs),
  line('another tenant, during the UPDATE', bystanders, updateMs, committedMs),
  line('another tenant, while it is applied', bystanders, committedMs, last + 200),
  line('the same tenant, before', own, fromMs, updateMs),
  line('the same tenant, during the UPDATE', own, updateMs, committedMs),
  line('the same tenant, while it is applied', own, committedMs, last + 200),
])
watched.close()
