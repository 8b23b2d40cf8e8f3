/**
 * What subscribers that never read cost: 500 streams whose client takes nothing from its connection, 60 s of writes, and
 * beside them one subscriber that reads, which must get every revision once and in order. A statement writes as many items
 * as `--rows` says, which share a revision and an event.
 *
 *     node bench/invalidation/stuck.ts [--seconds 60] [--stuck 500] [--rows 2] [--json FILE]
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { fromBinary } from '@bufbuild/protobuf'
import { WatchInvalidationsResponseSchema } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { fill, options, progress, rawStreams, report, round, startBed } from '../bed.ts'

const { seconds = 60, stuck: STUCK = 500, rows: ROWS = 2 } = options()
const ITEMS = 10_000
const STREAMS_PER_CONNECTION = 50
const WRITERS = 8
const RATE = 1000
/** Statements that a writer sends as one transaction: a disk can only do so many commits. */
const STATEMENTS = 25
const tenant = 'stuck'

await using bed = await startBed()
// V8 would rather let the heap grow than collect: in a small one the resident memory shows what is really held.
const instance = await bed.instance({ NODE_OPTIONS: '--max-old-space-size=128' })
const admin = await bed.sql()
await fill(admin, tenant, ITEMS)

let events = 0
let first = 0n
let next = 0n
let wrong = 0
let gaps = 0
const watched = rawStreams(instance.address, tenant)
const started = Promise.withResolvers<void>()
watched.open({}, (message) => {
  const { event } = fromBinary(WatchInvalidationsResponseSchema, message)
  if (event.case === 'started') {
    first = event.value.position
    next = first + 1n
    started.resolve()
  } else if (event.case === 'gap') gaps++
  else if (event.case === 'batch') {
    for (const { revision } of event.value.events) {
      if (revision !== next) wrong++
      next = revision + 1n
      events++
    }
  }
})
await started.promise
const before = round(instance.residentMb())
const connections = Array.from({ length: STUCK / STREAMS_PER_CONNECTION }, () =>
  rawStreams(instance.address, tenant),
)
for (const connection of connections) {
  for (let n = 0; n < STREAMS_PER_CONNECTION; n++) connection.open({})
}
while (Number((await instance.metrics()).subscribers) < STUCK + 1) await sleep(100)
progress(`${STUCK} streams are open and not read`)

let written = 0
const startedMs = performance.now()
const write = async (_: unknown, writer: number) => {
  const client = await bed.sql()
  while (performance.now() < startedMs + seconds * 1000) {
    const dueMs = startedMs + (written / RATE) * 1000
    await sleep(Math.max(0, dueMs - performance.now()))
    written += STATEMENTS * ROWS
    // Each writer has items of its own: transactions of several statements would deadlock over shared ones.
    const share = Math.floor(ITEMS / WRITERS)
    const id = () => `'k${1 + writer * share + Math.floor(Math.random() * share)}'`
    const statements = Array.from({ length: STATEMENTS }, () => {
      const ids = Array.from({ length: ROWS }, id)
      return `UPDATE items SET title = '${Math.random()}' WHERE tenant = '${tenant}' AND id IN (${ids});`
    })
    await client.query(statements.join(''))
  }
}
const memory: { readonly atS: number; readonly mb: number }[] = []
const writing = Promise.all(Array.from({ length: WRITERS }, write))
let running = true
const sampling = (async () => {
  while (running) {
    memory.push({ atS: Math.round((performance.now() - startedMs) / 1000), mb: round(instance.residentMb()) })
    progress(`${memory.at(-1)?.atS} s: ${memory.at(-1)?.mb} MB, ${written} written, ${events} received`)
    await sleep(5000)
  }
})()
await writing
running = false
const took = (performance.now() - startedMs) / 1000
const { rows } = await admin.query('SELECT revision FROM tenants WHERE name = $1', [tenant])
const last = BigInt(rows[0].revision)
for (let tries = 0; next <= last && tries < 50; tries++) await sleep(100)
await sampling
const at = (s: number) => memory.find(({ atS }) => atS >= s)?.mb ?? Number.NaN
const { subscribers } = await instance.metrics()
report('stuck subscribers', bed, [
  {
    'stuck streams': Number(subscribers) - 1,
    seconds: Math.round(took),
    'items written/s': Math.round(written / took),
    'log rows/s': Math.round(Number(last - first) / took),
    'MB before streams': before,
    'MB at start': at(0),
    'MB at a third': at(seconds / 3),
    'MB at two thirds': at((seconds * 2) / 3),
    'MB at end': memory.at(-1)?.mb ?? Number.NaN,
    'healthy: events': events,
    missing: Number(last + 1n - next),
    'out of order': wrong,
    gaps,
  },
])
watched.close()
for (const connection of connections) connection.close()
