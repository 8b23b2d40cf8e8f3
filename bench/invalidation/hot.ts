/**
 * A hot tenant under writes: 100,000 keys, 1 % of them written per second with SQL, floors for 100,000 keys, and a memory
 * so small that most reads go to Redis. How many of the copies that Redis has does the rule refuse?
 *
 * A copy of a key that was written since is refused rightly, until somebody has read the key again: that share is
 * writes / (writes + reads), both of keys per second. What is refused beyond it would be floors that were forgotten.
 *
 *     node bench/invalidation/hot.ts [--seconds 60] [--json FILE]
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { fill, options, progress, report, round, startBed } from '../bed.ts'

const { seconds = 60 } = options()
const KEYS = 100_000
const WRITTEN_PER_S = KEYS / 100
/** Keys of one statement: they share a revision. */
const KEYS_PER_STATEMENT = 20
const READERS = 4
const KEYS_PER_READ = 500
const tenant = 'hot'

await using bed = await startBed()
const instance = await bed.instance({
  ITEMCACHE_MEMORY_MAX_ENTRIES: '1000',
  ITEMCACHE_MAX_FLOORS: `${KEYS}`,
})
const sql = await bed.sql()
progress('filling')
await fill(sql, tenant, KEYS)

const anyKey = () => `k${1 + Math.floor(Math.random() * KEYS)}`
const batch = (ids: readonly string[]) => instance.batchGet(ids, tenant)

progress('loading every key into Redis')
for (let n = 0; n < KEYS; n += 500) {
  await batch(Array.from({ length: 500 }, (_, i) => `k${1 + n + i}`))
}

const counters = async () => ({
  refused: await instance.sample('itemcache_redis_copies_refused_total'),
  hits: await instance.sample('itemcache_tier_hits_total', 'tier="redis"'),
  misses: await instance.sample('itemcache_tier_misses_total', 'tier="redis"'),
})
const startedMs = performance.now()
const untilMs = startedMs + seconds * 1000
let written = 0
const writing = (async () => {
  while (performance.now() < untilMs) {
    await sleep(Math.max(0, startedMs + (written / WRITTEN_PER_S) * 1000 - performance.now()))
    const ids = Array.from({ length: KEYS_PER_STATEMENT }, anyKey)
    await sql.query('UPDATE items SET title = $3 WHERE tenant = $1 AND id = ANY ($2)', [
      tenant,
      ids,
      `${Math.random()}`,
    ])
    written += KEYS_PER_STATEMENT
  }
})()
const reading = Array.from({ length: READERS }, async () => {
  while (performance.now() < untilMs) await batch(Array.from({ length: KEYS_PER_READ }, anyKey))
})
const rows: Record<string, string | number>[] = []
let before = await counters()
const steps = 6
for (let step = 1; step <= steps; step++) {
  await sleep(Math.max(0, startedMs + (step * seconds * 1000) / steps - performance.now()))
  const now = await counters()
  const refused = now.refused - before.refused
  const hits = now.hits - before.hits
  const row = {
    'after s': Math.round((performance.now() - startedMs) / 1000),
    'keys written/s': Math.round(written / ((performance.now() - startedMs) / 1000)),
    'keys read/s': Math.round((now.hits + now.misses - before.hits - before.misses) / (seconds / steps)),
    'redis hits': hits,
    refused,
    'not there': now.misses - before.misses - refused,
    'refused %': round((100 * refused) / Math.max(1, refused + hits)),
    'rightly %': round((100 * WRITTEN_PER_S) / (WRITTEN_PER_S + (refused + hits) / (seconds / steps))),
  }
  progress(JSON.stringify(row))
  rows.push(row)
  before = now
}
await Promise.all([writing, ...reading])
report('hot tenant', bed, rows)
