/**
 * 500 GetItems of different ids that only PostgreSQL has, sent in one tick on one connection: what goes over the wire. A
 * round trip to Redis is all that is sent while no reply is owed. Polls of the log and probes do not count, nor does the
 * first read of the tenant, with which the instance begins to follow its log.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { wayToPostgres, wayToRedis } from '../../test/support/wire.ts'
import { fill, startBed } from '../bed.ts'
import { type Measured, median } from '../report.ts'
import type { Run } from '../rows.ts'

const CALLS = 500

export async function run({ full, progress }: Run): Promise<readonly Measured[]> {
  await using bed = await startBed()
  await using postgres = await wayToPostgres(bed.databaseUrl)
  await using redis = await wayToRedis(bed.redisUrl)
  const instance = await bed.instance({ DATABASE_URL: postgres.url, REDIS_URL: redis.url })
  const sql = await bed.sql()
  const counts: { sql: number; trips: number; commands: number; ms: number }[] = []
  for (let round = 0; round < (full ? 50 : 15); round++) {
    const tenant = `misses-${round}`
    await fill(sql, tenant, CALLS + 1)
    await instance.call('getItem', { id: `k${CALLS + 1}` }, tenant)
    // Nothing happens meanwhile but polls: until the copy is in Redis, and the tail has caught up.
    await sleep(500)
    const from = { sql: postgres.statements.length, trips: redis.roundTrips, redis: redis.commands.length }
    const startedMs = performance.now()
    await Promise.all(
      Array.from({ length: CALLS }, (_, i) => instance.call('getItem', { id: `k${i + 1}` }, tenant)),
    )
    const ms = performance.now() - startedMs
    await sleep(500)
    const statements = postgres.statements.slice(from.sql)
    counts.push({
      sql: statements.filter(({ text, values }) => /\bitems\b|set_config/.test(text) && values[0] === tenant)
        .length,
      trips: redis.roundTrips - from.trips,
      commands: redis.commands.length - from.redis,
      ms,
    })
  }
  const most = (of: 'sql' | 'trips' | 'commands') => Math.max(...counts.map((count) => count[of]))
  progress(
    `median of ${counts.length}: ${median(counts.map(({ ms }) => ms)).toFixed(0)} ms until all are answered`,
  )
  return [
    { row: 'misses-sql', ours: most('sql'), note: `the most of ${counts.length} runs` },
    { row: 'misses-redis', ours: most('trips'), note: `${most('commands')} commands` },
  ]
}
