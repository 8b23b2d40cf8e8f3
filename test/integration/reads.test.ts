import { once } from 'node:events'
import { constants } from 'node:http2'
import { setTimeout as sleep } from 'node:timers/promises'
import { fromBinary } from '@bufbuild/protobuf'
import { status } from '@grpc/grpc-js'
import pg from 'pg'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import {
  CacheOutcome,
  Freshness,
  ItemCacheService,
  ItemSource,
  SkipReason,
  StaleReason,
  Tier,
} from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { CallerConnection } from '../support/http2-calls.ts'
import { freshDatabase, freshPostgres, freshRedis } from '../support/servers.ts'
import { startService, type TestService } from '../support/service.ts'
import { unlessStalled } from '../support/stalls.ts'
import { connectSql } from './postgres-fixture.ts'

const GET_ITEM = 'itemcache.v1.ItemCacheService/GetItem'
const seconds = (n: number) => ({ seconds: BigInt(n), nanos: 0 })

describe('a read', () => {
  let service: TestService
  const get = (id: string, rest: object = {}) => service.client.call('getItem', { id, ...rest })

  beforeAll(async () => {
    service = await startService()
  })
  afterAll(() => service?.[Symbol.asyncDispose]())

  test('travels from the origin through PostgreSQL and Redis to memory', async () => {
    const first = await get('1')
    expect(first.cache).toMatchObject({ tier: Tier.ORIGIN, outcome: CacheOutcome.MISS })
    expect(first.result.case).toBe('item')
    expect(first.result.value).toMatchObject({ id: '1', source: ItemSource.ORIGIN })
    expect(first.revision).toBeGreaterThan(0n)

    await expect
      .poll(() => get('1'))
      .toMatchObject({ cache: { tier: Tier.MEMORY, outcome: CacheOutcome.HIT }, result: first.result })

    // A second instance on the same PostgreSQL and Redis finds it in Redis.
    await unlessStalled(async () => {
      await using other = await startService({ databaseUrl: service.databaseUrl })
      const third = await other.client.call('getItem', { id: '1' })
      expect(third.cache?.tier).toBe(Tier.REDIS)
      expect(third.result).toEqual(first.result)
    })

    // And one without Redis finds it in PostgreSQL.
    await using lonely = await startService({ databaseUrl: service.databaseUrl, env: { REDIS_URL: 'off' } })
    const fourth = await lonely.client.call('getItem', { id: '1' })
    expect(fourth.cache?.tier).toBe(Tier.POSTGRES)
    expect(fourth.cache?.skippedTiers).toMatchObject([{ tier: Tier.REDIS, reason: SkipReason.OFF }])
    expect(lonely.catalogue.requests.size).toBe(0)
  })

  test('of an absent item is NOT_FOUND, says which tier said so, and is remembered for a short time', async () => {
    let next = 999_900
    await unlessStalled(async () => {
      const id = `${next++}`
      const first = await service.client.failure('getItem', { id })
      expect(first).toMatchObject({
        code: status.NOT_FOUND,
        info: { reason: 'ITEM_NOT_FOUND', domain: 'itemcache.v1' },
      })
      expect(first.cache).toMatchObject({ tier: Tier.ORIGIN, outcome: CacheOutcome.MISS })
      const second = await service.client.failure('getItem', { id })
      expect(second.code).toBe(status.NOT_FOUND)
      expect(second.cache).toMatchObject({ tier: Tier.MEMORY, outcome: CacheOutcome.NEGATIVE_HIT })
      expect(second.cache?.freshFor?.seconds).toBeLessThanOrEqual(10n)
      expect(service.catalogue.requests.get(`/products/${id}`)).toBe(1)
    })
  })

  test('of an id that is no positive integer never reaches the origin', async () => {
    const before = total(service)
    for (const id of ['0', '01', '-1', '1.5', '1e3', 'abc', '../2', '__proto__', '1 ', '٣', '99999999999']) {
      expect((await service.client.failure('getItem', { id })).code).toBe(status.NOT_FOUND)
    }
    expect(total(service)).toBe(before)
  })

  test('returns only the fields of the read mask', async () => {
    const { result } = await get('2', { readMask: { paths: ['title', 'price.units'] } })
    const item = result.value as { title: string; description: string; id: string; price: object }
    expect(item.title).not.toBe('')
    expect(item).toMatchObject({ id: '', description: '', price: { currencyCode: '', nanos: 0 } })
    const wrong = await service.client.failure('getItem', {
      id: '2',
      readMask: { paths: ['colour', 'price.tax'] },
    })
    expect(wrong.code).toBe(status.INVALID_ARGUMENT)
    expect(wrong.badRequest?.fieldViolations).toHaveLength(2)
  })

  test('answers not_modified to the etag that the caller has', async () => {
    const { result } = await get('3')
    const { etag } = result.value as { etag: string }
    expect(etag).not.toBe('')
    expect((await get('3', { ifNoneMatch: etag })).result).toEqual({ case: 'notModified', value: true })
    expect((await get('3', { ifNoneMatch: '"other"' })).result.case).toBe('item')
  })

  test('with FRESH asks PostgreSQL, whatever the caches hold', async () => {
    await get('4')
    await change(service, `UPDATE items SET title = 'changed by hand' WHERE tenant = 'default' AND id = '4'`)
    const fresh = await get('4', { options: { freshness: Freshness.FRESH } })
    expect(fresh.cache).toMatchObject({ tier: Tier.POSTGRES, outcome: CacheOutcome.BYPASS })
    expect(fresh.result.value).toMatchObject({ title: 'changed by hand' })
    // What it has read is now in memory.
    expect((await get('4')).result.value).toMatchObject({ title: 'changed by hand' })
  })

  test('with CACHE_ONLY never leaves the caches', async () => {
    const options = { freshness: Freshness.CACHE_ONLY }
    const before = total(service)
    const miss = await get('5', { options })
    expect(miss.result.case).toBeUndefined()
    expect(miss.cache?.outcome).toBe(CacheOutcome.MISS)
    expect(total(service)).toBe(before)
    await get('5')
    await expect
      .poll(async () => (await get('5', { options })).cache)
      .toMatchObject({ tier: Tier.MEMORY, outcome: CacheOutcome.HIT })
  })

  test('with min_revision is never older, and OUT_OF_RANGE when the log has not got there', async () => {
    const { revision } = await get('6')
    await change(service, `UPDATE items SET title = 'newer' WHERE tenant = 'default' AND id = '6'`)
    const newer = await get('6', { options: { minRevision: revision + 1n } })
    expect(newer.result.value).toMatchObject({ title: 'newer' })
    expect(newer.revision).toBeGreaterThan(revision)
    const ahead = await service.client.failure('getItem', {
      id: '6',
      options: { minRevision: revision + 1000n },
    })
    expect(ahead).toMatchObject({ code: status.OUT_OF_RANGE, info: { reason: 'REVISION_AHEAD_OF_LOG' } })
  })

  test('with max_staleness reloads what was verified longer ago', async () => {
    await get('7')
    expect((await get('7', { options: { maxStaleness: seconds(60) } })).cache?.tier).toBe(Tier.MEMORY)
    const strict = await get('7', { options: { maxStaleness: seconds(0) } })
    expect(strict.cache?.tier).toBe(Tier.POSTGRES)
  })

  test('sees another tenant’s items as if they did not exist', async () => {
    await service.client.call(
      'createItem',
      { item: { id: 'secret', title: 'mine' } },
      { metadata: { 'x-tenant-id': 'a' } },
    )
    const other = await service.client.failure(
      'getItem',
      { id: 'secret' },
      { metadata: { 'x-tenant-id': 'b' } },
    )
    expect(other.code).toBe(status.NOT_FOUND)
    const own = await service.client.call('getItem', { id: 'secret' }, { metadata: { 'x-tenant-id': 'a' } })
    expect(own.result.value).toMatchObject({ title: 'mine' })
  })
})

describe('a batch', () => {
  test('answers every id in the order of the request, missing and duplicate ones too', async () => {
    await using service = await startService()
    const ids = ['3', 'nope', '1', '3', '888888']
    const { results } = await service.client.call('batchGetItems', { ids })
    expect(results.map((result) => result.id)).toEqual(ids)
    expect(results.map((result) => result.result.case)).toEqual(['item', 'error', 'item', 'item', 'error'])
    expect(results[1]?.result.value).toMatchObject({ code: status.NOT_FOUND, reason: 'ITEM_NOT_FOUND' })
    expect(results[1]?.cache?.tier).toBe(Tier.POSTGRES)
    expect(results[4]?.cache?.tier).toBe(Tier.ORIGIN)
  })

  test('asks each tier once for all that is missing, not once per key', async () => {
    await using service = await startService({ env: { ORIGIN_URL: 'off' } })
    await change(
      service,
      `INSERT INTO items (tenant, id, title) SELECT 'default', 'k' || n, 't' || n FROM generate_series(1, 500) n`,
    )
    const { results } = await service.client.call('batchGetItems', {
      ids: Array.from({ length: 500 }, (_, i) => `k${i + 1}`),
    })
    expect(results.every((result) => result.result.case === 'item')).toBe(true)
    const { tiers, loads } = service.app.metrics.snapshot()
    expect(tiers.postgres.latency.count).toBe(1)
    expect(tiers.redis.latency.count).toBe(1)
    expect(loads).toBe(500)
  })

  test('that wishes for nothing is answered, and counted, as one that says so', async () => {
    await using service = await startService({
      env: { ITEMCACHE_FRESH_FOR: '1h', ITEMCACHE_NEGATIVE_TTL: '1h', ITEMCACHE_MAX_STALE: '2h' },
    })
    const others = Array.from({ length: 30 }, (_, n) => `other-${n}`)
    for (const id of ['Füße', ...others]) {
      await service.client.call('createItem', { item: { id, description: id.repeat(200) } })
    }
    // Hits alone; hits and what is known to be absent; ids that are not ASCII; each of them twice.
    for (const ids of [['1', '2', ...others], ['1', 'absent', '2'], ['1', 'Füße'], ['absent'], ['2', '2']]) {
      const ask = async (options?: object) => {
        const before = service.app.metrics.snapshot().tiers.memory
        const reads = { ...service.app.metrics.tiers.memory.reads }
        const { results } = await service.client.call('batchGetItems', { ids, ...(options && { options }) })
        const after = service.app.metrics.snapshot().tiers.memory
        return {
          results: results.map(({ id, result, cache }) => ({
            ...{ id, result, tier: cache?.tier, outcome: cache?.outcome, asOf: cache?.asOf },
            ...{ age: cache?.age !== undefined, fresh: cache?.freshFor !== undefined },
          })),
          hits: after.hits - before.hits,
          misses: after.misses - before.misses,
          HIT: service.app.metrics.tiers.memory.reads.HIT - reads.HIT,
          NEGATIVE_HIT: service.app.metrics.tiers.memory.reads.NEGATIVE_HIT - reads.NEGATIVE_HIT,
        }
      }
      await unlessStalled(async () => {
        await service.client.call('batchGetItems', { ids })
        const wished = await ask({})
        expect(wished).toMatchObject({ hits: ids.length, misses: 0 })
        expect(await ask()).toEqual(wished)
      })
    }
  })

  test('has its own items, however many are answered at once, taken slowly, and given up', async () => {
    await using service = await startService({
      env: { ITEMCACHE_FRESH_FOR: '1h', ITEMCACHE_MAX_STALE: '2h' },
    })
    const all = Array.from({ length: 60 }, (_, n) => ({ id: `item-${n}`, title: `${n} `.repeat(1000) }))
    for (const item of all) await service.client.call('createItem', { item })
    const { output } = ItemCacheService.method.batchGetItems
    for (let round = 0; round < 4; round++) {
      using connection = new CallerConnection(service.address)
      // More than a connection's window together, and more than a stream's each.
      const batches = Array.from({ length: 20 }, (_, n) => {
        const items = all.map((_, i) => all[(7 * i + n + round) % all.length] ?? { id: '', title: '' })
        return {
          items,
          stream: connection.open('batchGetItems', { ids: items.map(({ id }) => id) }, 'default'),
        }
      })
      // Some of them have begun to come when they are given up.
      const given = batches.filter((_, n) => n % 4 === 3)
      await Promise.all(
        given.map(async ({ stream }) => {
          await once(stream, 'readable')
          stream.close(constants.NGHTTP2_CANCEL)
        }),
      )
      await Promise.all(
        batches.map(async ({ items, stream }, n) => {
          if (n % 4 === 3) return
          const bytes = Buffer.concat(await stream.toArray())
          const { results } = fromBinary(output, bytes.subarray(5))
          expect(results.map(({ id, result }) => [id, result.value])).toMatchObject(
            items.map((item) => [item.id, item]),
          )
        }),
      )
    }
  })

  test('lets a slow item fail alone, before the caller’s deadline', async () => {
    const held = Promise.withResolvers<void>()
    await using service = await startService({
      catalogue: {
        intercept: (request, response) => {
          if (request.url !== '/products/2') return false
          void held.promise.then(() => response.end('null'))
          return true
        },
      },
    })
    // The deadline is the service's to keep: a client with a timer of its own would give up in a standstill of this machine.
    using connection = new CallerConnection(service.address)
    const stream = connection.open('batchGetItems', { ids: ['1', '2', '3'] }, 'default', {
      'grpc-timeout': '4S',
    })
    const { output } = ItemCacheService.method.batchGetItems
    const { results } = fromBinary(output, Buffer.concat(await stream.toArray()).subarray(5))
    held.resolve()
    expect(results.map((result) => result.result.case)).toEqual(['item', 'error', 'item'])
    expect(results[1]?.result.value).toMatchObject({ code: status.DEADLINE_EXCEEDED })
  })
})

describe('concurrent readers', () => {
  test('of an item that only the origin has share one request and make one row', async () => {
    await using service = await startService()
    const answers = await Promise.all(
      Array.from({ length: 1000 }, () => service.client.call('getItem', { id: '9' }, { timeoutMs: 50_000 })),
    )
    expect(answers.every((answer) => answer.result.case === 'item')).toBe(true)
    expect(service.catalogue.requests.get('/products/9')).toBe(1)
    expect(await change(service, `SELECT count(*)::int AS n FROM items WHERE id = '9'`)).toEqual([{ n: 1 }])
    expect(service.app.metrics.snapshot()).toMatchObject({ loads: 1 })
    expect(answers.some((answer) => answer.cache?.coalesced)).toBe(true)
  })

  test('keep their own deadlines: one that gives up does not take the others along', async () => {
    const held = Promise.withResolvers<void>()
    const asked = Promise.withResolvers<void>()
    await using service = await startService({
      catalogue: {
        intercept: (_, response) => {
          asked.resolve()
          void held.promise.then(() => response.end(PRODUCT))
          return true
        },
      },
    })
    const patient = service.client.call('getItem', { id: '1' })
    await asked.promise
    const hasty = await service.client.failure('getItem', { id: '1' }, { timeoutMs: 100 })
    expect(hasty.code).toBe(status.DEADLINE_EXCEEDED)
    held.resolve()
    expect((await patient).result.case).toBe('item')
  })

  test('are not bound to a failure: the next read tries again', async () => {
    let broken = true
    await using service = await startService({
      env: { ITEMCACHE_FAILURE_TTL: '0s' },
      catalogue: {
        intercept: (_, response) => {
          if (!broken) return false
          response.writeHead(500).end()
          return true
        },
      },
    })
    const failed = await service.client.failure('getItem', { id: '1' })
    expect(failed).toMatchObject({ code: status.UNAVAILABLE })
    expect(failed.retry?.retryDelay).toBeDefined()
    broken = false
    expect((await service.client.call('getItem', { id: '1' })).result.case).toBe('item')
  })
})

describe('a load', () => {
  test('is cancelled in the origin when nobody waits for it any more, and only then', async () => {
    const asked: PromiseWithResolvers<() => boolean>[] = [Promise.withResolvers(), Promise.withResolvers()]
    let requests = 0
    await using service = await startService({
      catalogue: {
        intercept: (_, response) => {
          asked[requests++]?.resolve(() => response.destroyed)
          return true
        },
      },
    })
    const cancelled = { code: status.CANCELLED }
    const [first, second] = [new AbortController(), new AbortController()]
    const reading = [first, second].map(({ signal }) =>
      service.client.failure('getItem', { id: '1' }, { signal }),
    )
    const isGone = await asked[0]?.promise
    await expect.poll(() => service.app.metrics.rpc(GET_ITEM).started).toBe(2)
    first.abort()
    expect(await reading[0]).toMatchObject(cancelled)
    expect(isGone?.()).toBe(false)
    second.abort()
    expect(await reading[1]).toMatchObject(cancelled)
    await expect.poll(() => isGone?.()).toBe(true)
    // The next reader starts another one, and is not told of a failure.
    const third = service.client.failure('getItem', { id: '1' }, { timeoutMs: 500 })
    await asked[1]?.promise
    expect(await third).toMatchObject({ code: status.DEADLINE_EXCEEDED })
    expect(service.app.metrics.snapshot().tiers.origin.errors).toBe(0)
  })
})

describe('an origin that fails', () => {
  test('is not asked again for the same item for a moment, and the others are', async () => {
    let broken = true
    await using service = await startService({
      env: { ITEMCACHE_FAILURE_TTL: '4s' },
      catalogue: {
        intercept: (_, response) => {
          if (broken) response.writeHead(403).end()
          return broken
        },
      },
    })
    const failed = await service.client.failure('getItem', { id: '1' })
    expect(failed).toMatchObject({ code: status.UNAVAILABLE, info: { reason: 'ORIGIN_STATUS' } })
    const again = await service.client.failure('getItem', { id: '1' })
    expect(again).toMatchObject({ code: status.UNAVAILABLE, info: { reason: 'ORIGIN_STATUS' } })
    expect(again.retry?.retryDelay?.seconds).toBeLessThan(4n)
    expect(service.catalogue.requests.get('/products/1')).toBe(1)
    broken = false
    expect((await service.client.call('getItem', { id: '2' })).result.case).toBe('item')
    await expect
      .poll(() => service.client.call('getItem', { id: '1' }).catch(() => undefined), { timeout: 20_000 })
      .toMatchObject({ result: { case: 'item' } })
    expect(service.catalogue.requests.get('/products/1')).toBe(2)
  })

  test('keeps nobody from an item that another instance has loaded meanwhile', async () => {
    await using broken = await startService({
      env: { ITEMCACHE_FAILURE_TTL: '60s', REDIS_URL: 'off' },
      catalogue: { intercept: (_, response) => response.writeHead(403).end() !== undefined },
    })
    expect((await broken.client.failure('getItem', { id: '1' })).code).toBe(status.UNAVAILABLE)
    await using other = await startService({ databaseUrl: broken.databaseUrl, env: { REDIS_URL: 'off' } })
    await other.client.call('getItem', { id: '1' })
    expect((await broken.client.call('getItem', { id: '1' })).cache?.tier).toBe(Tier.POSTGRES)
  })
})

describe('the catalogue', () => {
  test('is asked once for an item that many want at the same time, in whatever way', async () => {
    const held = Promise.withResolvers<void>()
    let asked = 0
    await using service = await startService({
      catalogue: {
        intercept: (_, response) => {
          asked++
          void held.promise.then(() => response.end(PRODUCT))
          return true
        },
      },
    })
    const { client } = service
    const fresh = { options: { freshness: Freshness.FRESH } }
    const reads = [client.call('getItem', { id: '1' })]
    await expect.poll(() => asked).toBe(1)
    // One after the other, so that each has a SELECT of its own, which has been answered before the catalogue is.
    const selects = () => service.app.metrics.snapshot().tiers.postgres.latency.count
    for (let i = 0; i < 5; i++) {
      const before = selects()
      reads.push(client.call('getItem', { id: '1', ...fresh }))
      await expect.poll(selects, { timeout: 20_000 }).toBeGreaterThan(before)
    }
    const before = selects()
    const write = client.call('updateItem', {
      item: { id: '1', title: 'written' },
      updateMask: { paths: ['title'] },
    })
    await expect.poll(selects, { timeout: 20_000 }).toBeGreaterThan(before)
    held.resolve()
    expect((await write).item).toMatchObject({ title: 'written', category: 'held' })
    for (const read of reads) expect((await read).result.case).toBe('item')
    expect(asked).toBe(1)
  })
})

describe('a copy that is read often', () => {
  test('is refreshed before its time is over, so that nobody finds it stale', async () => {
    await unlessStalled(async () => {
      await using service = await startService({
        // So eager, with such draws, that a hit in the last quarter of its life refreshes it.
        env: { ITEMCACHE_FRESH_FOR: '8s', ITEMCACHE_EARLY_REFRESH: '1000' },
        app: { random: () => 1 - 1e-6 },
      })
      const get = async () => (await service.client.call('getItem', { id: '1' })).cache
      await get()
      const outcomes = new Set<CacheOutcome | undefined>()
      while (service.app.metrics.refreshesOk < 1) outcomes.add((await get())?.outcome)
      expect([...outcomes]).toEqual([CacheOutcome.HIT])
    })
  })
})

describe('a copy past its freshness', () => {
  test('is served at once, marked, and reloaded behind the answer', async () => {
    await using service = await startService({ env: { ITEMCACHE_FRESH_FOR: '300ms' } })
    const get = async () => (await service.client.call('getItem', { id: '1' })).cache
    await get()
    await expect.poll(get).toMatchObject({
      outcome: CacheOutcome.STALE,
      staleReason: StaleReason.REVALIDATING,
      tier: Tier.MEMORY,
    })
    await expect.poll(() => service.app.metrics.snapshot().refreshesOk).toBeGreaterThan(0)
    await expect.poll(get).toMatchObject({ outcome: CacheOutcome.HIT, tier: Tier.MEMORY })
  })

  test('is not served to a caller who does not allow it', async () => {
    await using service = await startService({ env: { ITEMCACHE_FRESH_FOR: '300ms' } })
    const outcomes = new Set<CacheOutcome | undefined>()
    const get = async () => {
      const { cache } = await service.client.call('getItem', { id: '1', options: { allowStale: false } })
      outcomes.add(cache?.outcome)
      return cache
    }
    await get()
    await expect.poll(get).toMatchObject({ outcome: CacheOutcome.HIT })
    await expect.poll(get).toMatchObject({ outcome: CacheOutcome.MISS, tier: Tier.POSTGRES })
    expect(outcomes).not.toContain(CacheOutcome.STALE)
  })
})

describe('when a dependency fails', () => {
  test('a Redis that is killed or stopped costs no read', async () => {
    await using redis = await freshRedis()
    await using service = await startService({
      env: { REDIS_URL: redis.url, ITEMCACHE_REDIS_TIMEOUT: '200ms' },
    })
    const read = async (from: number, to: number) => {
      const ids = Array.from({ length: to - from }, (_, i) => `${from + i}`)
      return Promise.all(ids.map((id) => service.client.call('getItem', { id })))
    }
    await read(1, 5)
    await redis.kill()
    const without = await read(3, 10)
    expect(without.at(-1)?.cache?.skippedTiers).toMatchObject([{ tier: Tier.REDIS }])
    await redis.restart()
    await expect
      .poll(async () => (await service.client.call('inspectItem', { id: '1' })).tiers[1]?.skipped)
      .toBe(SkipReason.UNSPECIFIED)
    await redis.pause()
    const [paused] = await read(11, 12)
    expect(paused?.cache?.skippedTiers).toMatchObject([{ reason: SkipReason.TIMEOUT }])
    await redis.resume()
  })

  test('a Redis that is stopped, killed and started again under load costs no read', async () => {
    await using redis = await freshRedis()
    await using service = await startService({
      env: {
        REDIS_URL: redis.url,
        ITEMCACHE_REDIS_TIMEOUT: '150ms',
        ITEMCACHE_MEMORY_MAX_ENTRIES: '5',
        ITEMCACHE_FRESH_FOR: '200ms',
      },
    })
    let running = true
    let reads = 0
    const reader = async (first: number) => {
      for (let n = first; running; n++) {
        const { result } = await service.client.call('getItem', { id: `${1 + (n % 20)}` })
        expect(result.case).toBe('item')
        reads++
      }
    }
    const readers = Array.from({ length: 20 }, (_, n) => reader(n))
    const more = async (count: number) => {
      const enough = reads + count
      await Promise.race([expect.poll(() => reads, { timeout: 20_000 }).toBeGreaterThan(enough), ...readers])
    }
    await more(200)
    await redis.pause()
    await more(200)
    await redis.resume()
    await more(200)
    await redis.kill()
    await more(200)
    await redis.restart()
    await more(200)
    running = false
    await Promise.all(readers)
  })

  test('warm reads go on without PostgreSQL, cold ones are UNAVAILABLE, and all is well afterwards', async () => {
    await using postgres = await freshPostgres()
    await using service = await startService({ databaseUrl: postgres.url, env: { REDIS_URL: 'off' } })
    const get = () => service.client.call('getItem', { id: '1' })
    await get()
    await postgres.stop()
    expect((await get()).result.case).toBe('item')
    const cold = await service.client.failure('getItem', { id: '2' })
    expect(cold.code).toBe(status.UNAVAILABLE)
    expect(cold.retry).toBeDefined()
    expect(cold.message).not.toMatch(/ECONN|socket|postgres:/i)

    // Once nothing is heard of the log, the answer says that nobody can vouch for it.
    await expect
      .poll(async () => (await get()).cache, { timeout: 20_000 })
      .toMatchObject({ outcome: CacheOutcome.STALE, staleReason: StaleReason.UNVERIFIED })
    // One who accepts no stale copy gets an error instead.
    const options = { allowStale: false }
    expect((await service.client.failure('getItem', { id: '1', options })).code).toBe(status.UNAVAILABLE)

    await postgres.restart()
    await expect
      .poll(
        async () => (await service.client.call('getItem', { id: '2' }).catch(() => undefined))?.result.case,
      )
      .toBe('item')
    await expect.poll(async () => (await get()).cache?.outcome, { timeout: 20_000 }).toBe(CacheOutcome.HIT)
  })

  test('a silent PostgreSQL keeps no reader from what Redis holds', async () => {
    await using postgres = await freshPostgres()
    await using service = await startService({
      databaseUrl: postgres.url,
      // No copy stays fresh, so none goes from Redis into memory.
      env: {
        ITEMCACHE_MEMORY_MAX_ENTRIES: '1',
        ITEMCACHE_FRESH_FOR: '1ms',
        ITEMCACHE_SOFT_TIMEOUT: '100ms',
      },
    })
    const get = (id: string) => service.client.call('getItem', { id }, { timeoutMs: 30_000 })
    await get('1')
    await get('2')
    await expect
      .poll(async () => (await service.client.call('inspectItem', { id: '1' })).tiers[1]?.present)
      .toBe(true)
    await postgres.pause()
    const reasons = new Set<StaleReason | undefined>()
    // From the time when nobody knows of the silence until everybody does.
    while (!reasons.has(StaleReason.TIER_DOWN)) {
      const { cache } = await get('1')
      expect(cache).toMatchObject({ outcome: CacheOutcome.STALE, tier: Tier.REDIS })
      reasons.add(cache?.staleReason)
    }
    expect(reasons).toContain(StaleReason.SOFT_TIMEOUT)
    expect(reasons).not.toContain(StaleReason.UNSPECIFIED)
    await postgres.resume()
    await expect.poll(async () => (await get('1')).cache?.skippedTiers, { timeout: 20_000 }).toEqual([])
  })

  test('a PostgreSQL that has too much to do keeps no reader from what Redis holds', async () => {
    await using database = await freshDatabase()
    await using service = await startService({
      databaseUrl: database.url,
      env: {
        ITEMCACHE_MEMORY: 'off',
        ITEMCACHE_FRESH_FOR: '1ms',
        ITEMCACHE_POSTGRES_POOL: '2',
        ITEMCACHE_POSTGRES_QUEUE: '1',
        ORIGIN_URL: 'off',
      },
    })
    const { client } = service
    await client.call('createItem', { item: { id: 'a', title: 'x' } })
    await client.call('getItem', { id: 'a' })
    const held = async () => (await client.call('inspectItem', { id: 'a' })).tiers[1]?.present
    await expect.poll(held).toBe(true)
    await using sql = await connectSql(database.url)
    await sql('BEGIN; LOCK TABLE items IN ACCESS EXCLUSIVE MODE')
    // Two wait in PostgreSQL or for a connection, and so does a third; all others are one too many.
    const cold = Array.from({ length: 12 }, (_, i) =>
      client.call('getItem', { id: 'cold' }, { metadata: { 'x-tenant-id': `busy-${i}` } }).then(
        () => status.OK,
        ({ code }: { code: number }) => code,
      ),
    )
    await Promise.any(cold.map(async (code) => expect(await code).toBe(status.RESOURCE_EXHAUSTED)))
    const read = async () => {
      const { result, cache } = await client.call('getItem', { id: 'a' })
      expect(result.value).toMatchObject({ title: 'x' })
      return { outcome: cache?.outcome, tier: cache?.tier }
    }
    await expect.poll(read).toEqual({ outcome: CacheOutcome.STALE, tier: Tier.REDIS })
    await sql('ROLLBACK')
    await Promise.all(cold)
  })

  test('two instances that start on one empty database at once both come up', async () => {
    await using database = await freshDatabase()
    const [one, two] = await Promise.all([
      startService({ databaseUrl: database.url }),
      startService({ databaseUrl: database.url }),
    ])
    await using _one = one
    await using _two = two
    expect((await one.client.call('getItem', { id: '1' })).result.case).toBe('item')
    expect((await two.client.call('getItem', { id: '1' })).result.case).toBe('item')
  })

  test('a draining server finishes the calls under way', async () => {
    const held = Promise.withResolvers<void>()
    const asked = Promise.withResolvers<void>()
    const service = await startService({
      catalogue: {
        intercept: (_, response) => {
          asked.resolve()
          void held.promise.then(() => response.end(PRODUCT))
          return true
        },
      },
    })
    const under = service.client.call('getItem', { id: '1' })
    await asked.promise
    const stopped = service.app[Symbol.asyncDispose]()
    await sleep(0)
    held.resolve()
    expect((await under).result.case).toBe('item')
    await stopped
    await service[Symbol.asyncDispose]()
  })
})

const PRODUCT = JSON.stringify({
  id: 1,
  title: 'A held product',
  price: 1.5,
  description: '',
  category: 'held',
  image: '',
  rating: { rate: 1, count: 1 },
})

const total = (service: TestService) =>
  [...service.catalogue.requests.values()].reduce((sum, count) => sum + count, 0)

/** Somebody else at the database, as with psql. */
async function change(service: TestService, sql: string): Promise<unknown[]> {
  const client = new pg.Client(service.databaseUrl)
  await client.connect()
  try {
    return (await client.query(sql)).rows
  } finally {
    await client.end()
  }
}
