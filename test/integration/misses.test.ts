/** What misses cost the tiers below when they come together: counted on the wire. */
import { status as Code } from '@grpc/grpc-js'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { Freshness, Tier } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { type Caller, callerAs, newCaller } from '../support/caller.ts'
import { type FreshDatabase, freshDatabase, redisUrl } from '../support/servers.ts'
import { startService, type TestService } from '../support/service.ts'
import { unlessStalled } from '../support/stalls.ts'
import { type RedisWay, type SqlWay, wayToPostgres, wayToRedis } from '../support/wire.ts'
import { connectSql, type Sql } from './postgres-fixture.ts'

const started = new AsyncDisposableStack()
let database: FreshDatabase
let sql: Sql
let postgres: SqlWay
let redis: RedisWay
let service: TestService

beforeAll(async () => {
  database = started.use(await freshDatabase())
  sql = started.use(await connectSql(database.superuserUrl))
  postgres = started.use(await wayToPostgres(database.url))
  redis = started.use(await wayToRedis(redisUrl()))
  service = started.use(
    await startService({ databaseUrl: postgres.url, env: { REDIS_URL: redis.url, ORIGIN_URL: 'off' } }),
  )
})
afterAll(() => started.disposeAsync())

/** A caller whose tenant has items i1, i2, …, in PostgreSQL only, and whose log the service follows. */
async function callerWithItems(count: number): Promise<Caller> {
  const caller = newCaller(service)
  await sql(
    `INSERT INTO items (tenant, id, title) SELECT $1, 'i' || n, 't' || n FROM generate_series(0, $2::int) n`,
    [caller.tenant, count],
  )
  const sent = since()
  await caller.call('getItem', { id: 'i0' })
  await sent.untilStored(1)
  return caller
}

const idsUpTo = (count: number) => Array.from({ length: count }, (_, i) => `i${i + 1}`)

const getAll = (caller: Caller, ids: readonly string[]) =>
  Promise.all(ids.map((id) => caller.call('getItem', { id }, { timeoutMs: 30_000 })))

/** What goes over the wire from now on. Polls of the log and probes, which run all the time, do not count. */
function since() {
  const from = { sql: postgres.statements.length, redis: redis.commands.length, trips: redis.roundTrips }
  const commands = () => redis.commands.slice(from.redis)
  return {
    /** About the items of a tenant, or telling a connection its name. */
    statementsOf: ({ tenant }: Caller) =>
      postgres.statements
        .slice(from.sql)
        .filter(({ text, values }) => /\bitems\b|set_config/.test(text) && values[0] === tenant),
    commands,
    roundTrips: () => redis.roundTrips - from.trips,
    /** So many copies have been put into Redis. */
    untilStored: (copies: number) =>
      expect
        .poll(() => commands().reduce((sum, { keys, values }) => sum + (values > 0 ? keys : 0), 0), {
          timeout: 20_000,
        })
        .toBe(copies),
  }
}

test('500 gets of different items that only PostgreSQL has are two SQL statements and two round trips to Redis at most', async () => {
  await unlessStalled(async () => {
    const caller = await callerWithItems(500)
    const sent = since()
    const answers = await getAll(caller, idsUpTo(500))
    expect(answers.every(({ cache }) => cache?.tier === Tier.POSTGRES)).toBe(true)
    await sent.untilStored(500)
    expect(sent.statementsOf(caller).length).toBeLessThanOrEqual(2)
    expect(sent.roundTrips()).toBeLessThanOrEqual(2)
    // A hundred copies in each, read and stored.
    expect(sent.commands()).toHaveLength(10)
  })
})

test('500 gets of items that Redis has are one round trip and no SQL', async () => {
  await unlessStalled(async () => {
    const caller = await callerWithItems(500)
    const before = since()
    await getAll(caller, idsUpTo(500))
    await before.untilStored(500)
    await using other = await startService({
      databaseUrl: postgres.url,
      env: { REDIS_URL: redis.url, ORIGIN_URL: 'off' },
    })
    const there = callerAs(other, caller.tenant)
    await there.call('getItem', { id: 'i0' })
    const sent = since()
    const answers = await getAll(there, idsUpTo(500))
    expect(answers.every(({ cache }) => cache?.tier === Tier.REDIS)).toBe(true)
    expect(sent.statementsOf(there)).toEqual([])
    expect(sent.roundTrips()).toBe(1)
  })
})

test('a lone get of an item that only PostgreSQL has is a statement, and a command of Redis before and after it', async () => {
  await unlessStalled(async () => {
    const caller = await callerWithItems(1)
    const sent = since()
    await caller.call('getItem', { id: 'i1' })
    await sent.untilStored(1)
    // The second would be the tenant's name, told to a connection that another tenant has had.
    expect(sent.statementsOf(caller).length).toBeLessThanOrEqual(2)
    expect(sent.commands().map(({ keys }) => keys)).toEqual([1, 1])
  })
})

test('gets of several tenants at the same time are a statement for each tenant, and each gets its own', async () => {
  const callers = [await callerWithItems(50), await callerWithItems(50), await callerWithItems(50)]
  for (const [i, { tenant }] of callers.entries())
    await sql(`UPDATE items SET title = $2 WHERE tenant = $1`, [tenant, `of tenant ${i}`])
  const sent = since()
  const answers = await Promise.all(callers.map((caller) => getAll(caller, idsUpTo(50))))
  for (const [i, ofOne] of answers.entries()) {
    const titles = ofOne.map(({ result }) => (result.case === 'item' ? result.value.title : ''))
    expect(new Set(titles)).toEqual(new Set([`of tenant ${i}`]))
  }
  for (const caller of callers) {
    const reads = sent.statementsOf(caller).filter(({ text }) => /\bitems\b/.test(text))
    expect(reads.length).toBeGreaterThanOrEqual(1)
    expect(reads.length).toBeLessThan(50)
  }
})

test('a row that cannot be read fails alone, whoever reads it together with others', async () => {
  const caller = await callerWithItems(100)
  // As a disk might do it.
  await sql('ALTER TABLE items DROP CONSTRAINT items_create_time_check')
  await sql(`UPDATE items SET create_time = 'infinity' WHERE tenant = $1 AND id = 'i37'`, [caller.tenant])
  const gets = await Promise.allSettled(idsUpTo(100).map((id) => caller.call('getItem', { id })))
  expect(gets.flatMap(({ status }, i) => (status === 'rejected' ? [`i${i + 1}`] : []))).toEqual(['i37'])
  expect(gets[36]).toMatchObject({ reason: { code: Code.INTERNAL } })
  const { results } = await caller.call('batchGetItems', {
    ids: idsUpTo(100),
    options: { freshness: Freshness.FRESH },
  })
  const failed = results.filter(({ result }) => result.case !== 'item')
  expect(failed).toMatchObject([{ id: 'i37', result: { case: 'error', value: { code: Code.INTERNAL } } }])
})

test('a caller who gives up does not take along those whose items are in the same statement', async () => {
  const caller = await callerWithItems(20)
  await using lock = await connectSql(database.superuserUrl)
  await lock('BEGIN; LOCK TABLE items IN ACCESS EXCLUSIVE MODE')
  const sent = since()
  const leaver = new AbortController()
  const left = caller.failure('getItem', { id: 'i1' }, { signal: leaver.signal })
  const others = getAll(caller, idsUpTo(20).slice(1))
  await expect.poll(() => sent.statementsOf(caller).length, { timeout: 20_000 }).toBeGreaterThan(0)
  leaver.abort()
  expect((await left).code).toBe(Code.CANCELLED)
  await lock('ROLLBACK')
  expect((await others).every(({ result }) => result.case === 'item')).toBe(true)
})
