/**
 * How fast one tenant and ten can be written, through the service and with SQL; and whether writers of different tenants
 * wait for each other. To show what NOTIFY would cost, the SQL runs are repeated with a trigger that
 * notifies in every transaction: PostgreSQL lets transactions that notify commit only one after the other.
 *
 *     node bench/invalidation/writes.ts [--seconds 8] [--json FILE]
 */
import { type Bed, fill, type Instance, options, progress, report, round, startBed } from '../bed.ts'
import { percentile } from '../report.ts'

const { seconds = 8 } = options()
const ITEMS = 1000
const CONNECTIONS = 10
const tenants = Array.from({ length: 10 }, (_, n) => `t${n}`)

const ALWAYS_NOTIFY = `
  CREATE FUNCTION notify_always() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN PERFORM pg_notify('other', NEW.revision::text); RETURN NULL; END $$;
  CREATE TRIGGER notify_always AFTER INSERT ON invalidations FOR EACH ROW EXECUTE FUNCTION notify_always()`

await using bed = await startBed()
const instance = await bed.instance({ ITEMCACHE_POSTGRES_POOL: '24' })
const admin = await bed.sql()
progress('filling')
for (const tenant of tenants) await fill(admin, tenant, ITEMS)

const rows = []
rows.push(await measure('SQL', 1, sqlWriters(bed)))
rows.push(await measure('SQL', 10, sqlWriters(bed)))
rows.push(await measure('UpdateItem', 1, serviceWriters(instance)))
rows.push(await measure('UpdateItem', 10, serviceWriters(instance)))
await admin.query(ALWAYS_NOTIFY)
rows.push(await measure('SQL, every commit notifies', 10, sqlWriters(bed)))
await admin.query('DROP TRIGGER notify_always ON invalidations')
report('write rates', bed, rows)

type Write = (tenant: string) => Promise<void>

function sqlWriters(bed: Bed): () => Promise<Write> {
  return async () => {
    const client = await bed.sql()
    return async (tenant) => {
      await client.query({
        name: 'write',
        text: 'UPDATE items SET title = $3 WHERE tenant = $1 AND id = $2',
        values: [tenant, `k${1 + Math.floor(Math.random() * ITEMS)}`, `${Math.random()}`],
      })
    }
  }
}

function serviceWriters(instance: Instance): () => Promise<Write> {
  return async () => async (tenant) => {
    const item = { id: `k${1 + Math.floor(Math.random() * ITEMS)}`, title: `${Math.random()}` }
    await instance.call('updateItem', { item, updateMask: { paths: ['title'] } }, tenant)
  }
}

/** Ten writers, each waiting for its commit, spread over the tenants. */
async function measure(by: string, amount: number, newWriter: () => Promise<Write>) {
  progress(`${by}, ${amount} tenants, ${seconds} s`)
  const writers = await Promise.all(Array.from({ length: CONNECTIONS }, newWriter))
  const latencies: number[] = []
  const run = async (untilMs: number, keep: boolean) =>
    Promise.all(
      writers.map(async (write, n) => {
        while (performance.now() < untilMs) {
          const startedMs = performance.now()
          await write(tenants[n % amount] ?? '')
          if (keep) latencies.push(performance.now() - startedMs)
        }
      }),
    )
  await run(performance.now() + 1000, false)
  const startedMs = performance.now()
  await run(startedMs + seconds * 1000, true)
  const took = (performance.now() - startedMs) / 1000
  return {
    'written by': by,
    tenants: amount,
    writers: CONNECTIONS,
    'writes/s': Math.round(latencies.length / took),
    'p50 ms': round(percentile(latencies, 0.5)),
    'p99 ms': round(percentile(latencies, 0.99)),
  }
}
