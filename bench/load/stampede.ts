/**
 * 10,000 callers of three instances want an item that only the origin has: what reaches PostgreSQL and the origin. The
 * instances count their statements themselves: SELECTs, and the insert, which reads back what it has inserted. (With the
 * callers in this process, whatever else it did would be slow.)
 */
import { startCatalogue } from '../../src/embedded/catalogue.ts'
import { Tier } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { type Instance, startBed } from '../bed.ts'
import { type Measured, median } from '../report.ts'
import type { Run } from '../rows.ts'

const CALLERS = 10_000
const INSTANCES = 3

/** What all instances have sent to PostgreSQL for items. */
async function statementsOf(instances: readonly Instance[]): Promise<number> {
  const snapshots = await Promise.all(instances.map((instance) => instance.metrics()))
  return snapshots
    .flatMap(({ tiers }) => tiers.filter(({ tier }) => tier === Tier.POSTGRES))
    .reduce((sum, { latency }) => sum + Number(latency?.count ?? 0), 0)
}

export async function run({ full, progress }: Run): Promise<readonly Measured[]> {
  await using bed = await startBed()
  await using catalogue = await startCatalogue()
  const instances = await Promise.all(
    Array.from({ length: INSTANCES }, () =>
      bed.instance({
        ORIGIN_URL: catalogue.url,
        ITEMCACHE_MAX_CONCURRENT_STREAMS: `${CALLERS}`,
      }),
    ),
  )
  const sql = await bed.sql()
  const found: { origin: number; reads: number; rows: number; ms: number }[] = []
  for (let round = 1; round <= (full ? 20 : 5); round++) {
    const id = `${round}`
    const tenant = `stampede-${round}`
    const before = await statementsOf(instances)
    const asked = catalogue.requests.get(`/products/${id}`) ?? 0
    const startedMs = performance.now()
    await Promise.all(
      Array.from({ length: CALLERS }, (_, i) => instances[i % INSTANCES]?.call('getItem', { id }, tenant)),
    )
    const ms = performance.now() - startedMs
    const { rows } = await sql.query<{ n: number }>(
      'SELECT count(*)::int AS n FROM items WHERE tenant = $1',
      [tenant],
    )
    const inserted = rows[0]?.n ?? 0
    const one = {
      origin: (catalogue.requests.get(`/products/${id}`) ?? 0) - asked,
      reads: (await statementsOf(instances)) - before - inserted,
      rows: inserted,
      ms,
    }
    found.push(one)
    progress(
      `item ${id}: ${one.origin} requests to the origin, ${one.reads} reads, ${one.rows} rows, ${ms.toFixed(0)} ms`,
    )
  }
  const most = (of: 'origin' | 'reads' | 'rows') => Math.max(...found.map((one) => one[of]))
  const note = `the most of ${found.length} runs, ${median(found.map(({ ms }) => ms)).toFixed(0)} ms each`
  return [
    { row: 'stampede-origin', ours: most('origin'), note },
    { row: 'stampede-sql', ours: most('reads') },
    { row: 'stampede-rows', ours: most('rows') },
  ]
}
