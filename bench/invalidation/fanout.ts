/**
 * What it costs to deliver an event to one subscriber: CPU of the server with 1,000 subscribers and writes at a fixed rate,
 * less what the same writes cost without subscribers.
 *
 *     node bench/invalidation/fanout.ts [--seconds 15] [--json FILE]
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { fill, type Instance, options, progress, rawStreams, report, round, startBed } from '../bed.ts'

const { seconds = 15 } = options()
const SUBSCRIBERS = 1000
const STREAMS_PER_CONNECTION = 50
const RATE = 20
const ITEMS = 1000
const tenant = 'fanout'

await using bed = await startBed()
const instance = await bed.instance()
const sql = await bed.sql()
await fill(sql, tenant, ITEMS)

async function cpuOf(instance: Instance, s: number): Promise<number> {
  const cpuUs = await instance.cpuUs()
  const startedMs = performance.now()
  for (let n = 0; n < RATE * s; n++) {
    await sleep(Math.max(0, startedMs + (n * 1000) / RATE - performance.now()))
    await sql.query('UPDATE items SET title = $3 WHERE tenant = $1 AND id = $2', [
      tenant,
      `k${1 + (n % ITEMS)}`,
      `${Math.random()}`,
    ])
  }
  await sleep(500)
  return ((await instance.cpuUs()) - cpuUs) / 1000
}

const alone = rawStreams(instance.address, tenant)
alone.open({ heartbeatInterval: { seconds: 60n } }, () => {})
await sleep(500)
progress('writes with 1 subscriber')
await cpuOf(instance, 3)
const base = await cpuOf(instance, seconds)

let messages = 0
const connections = Array.from({ length: SUBSCRIBERS / STREAMS_PER_CONNECTION }, () =>
  rawStreams(instance.address, tenant),
)
for (const connection of connections) {
  for (let n = 0; n < STREAMS_PER_CONNECTION; n++) {
    connection.open({ heartbeatInterval: { seconds: 60n } }, () => void messages++)
  }
}
while (Number((await instance.metrics()).subscribers) < SUBSCRIBERS + 1) await sleep(100)
progress(`writes with ${SUBSCRIBERS} subscribers`)
await cpuOf(instance, 3)
const warmed = messages
const loaded = await cpuOf(instance, seconds)
const delivered = messages - warmed
report('fan-out', bed, [
  {
    subscribers: SUBSCRIBERS,
    'writes/s': RATE,
    deliveries: delivered,
    'deliveries/s': Math.round(delivered / seconds),
    'CPU ms without': Math.round(base),
    'CPU ms with': Math.round(loaded),
    'CPU µs per delivery': round(((loaded - base) * 1000) / delivered, 2),
  },
])
alone.close()
for (const connection of connections) connection.close()
