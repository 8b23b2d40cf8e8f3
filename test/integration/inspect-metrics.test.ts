import { connect } from 'node:http2'
import { setTimeout as sleep } from 'node:timers/promises'
import { create, toBinary } from '@bufbuild/protobuf'
import { type Duration, timestampMs } from '@bufbuild/protobuf/wkt'
import { type ServiceError, status } from '@grpc/grpc-js'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import {
  BreakerState,
  Freshness,
  InvalidationMode,
  type Latency,
  type MetricsSnapshot,
  SkipReason,
  Tier,
  type TierMetrics,
  WatchMetricsRequestSchema,
} from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { newCaller } from '../support/caller.ts'
import { freshRedis } from '../support/servers.ts'
import { failureOf, startService, type TestService } from '../support/service.ts'
import { connectSql } from './postgres-fixture.ts'

const TIERS = [Tier.MEMORY, Tier.REDIS, Tier.POSTGRES, Tier.ORIGIN]
const cacheOnly = { freshness: Freshness.CACHE_ONLY }
/** With fractions, unlike the library's. */
const ms = (duration: Duration | undefined) =>
  duration === undefined ? undefined : Number(duration.seconds) * 1000 + duration.nanos / 1e6

/** What GetMetrics says, but for the time and the RPCs, in which the question itself shows. */
async function metricsOf({ client }: TestService): Promise<MetricsSnapshot> {
  const { snapshot } = await client.call('getMetrics', {})
  if (snapshot === undefined) throw new Error('GetMetrics answered without a snapshot')
  return snapshot
}

const tierOf = (snapshot: MetricsSnapshot, tier: Tier): TierMetrics => {
  const found = snapshot.tiers.find((one) => one.tier === tier)
  if (found === undefined) throw new Error(`no metrics of tier ${tier}`)
  return found
}

describe('InspectItem', () => {
  let service: TestService

  beforeAll(async () => {
    service = await startService()
  })
  afterAll(() => service?.[Symbol.asyncDispose]())

  test('tells that no tier holds an item yet, whether the origin may know it, and loads nothing', async () => {
    const { call } = newCaller(service)
    for (const [id, servedByOrigin] of [
      ['1', true],
      ['abc', false],
      ['0', false],
    ] as const) {
      const { tiers, floors } = await call('inspectItem', { id })
      expect(tiers.map(({ tier }) => tier)).toEqual(TIERS)
      expect(tiers.map(({ present, current }) => present || current)).toEqual([false, false, false, false])
      expect(tiers.map((tier) => tier.servedByOrigin)).toEqual([false, false, false, servedByOrigin])
      expect(tiers.map(({ skipped }) => skipped)).toEqual(Array(4).fill(SkipReason.UNSPECIFIED))
      expect(floors).toMatchObject({ tenantFloor: 0n, keyFloor: 0n, tagFloors: [], removedFloor: 0n })
    }
    expect(service.catalogue.requests.size).toBe(0)
    expect((await call('getItem', { id: '1', options: cacheOnly })).result.case).toBeUndefined()
  })

  test('tells what each tier holds: its as-of, age, time to live and size', async () => {
    const { call } = newCaller(service)
    const { revision } = await call('getItem', { id: '1' })
    await expect.poll(async () => (await call('inspectItem', { id: '1' })).tiers[1]?.present).toBe(true)
    const { tiers } = await call('inspectItem', { id: '1' })
    const [memory, redis, postgres, origin] = tiers
    const held = { present: true, negative: false, current: true, asOf: revision }
    expect([memory, redis, postgres]).toMatchObject([held, held, held])
    expect(origin).toMatchObject({ present: false, servedByOrigin: true })
    // Chance adds to Redis's five minutes, or takes from them, a tenth.
    for (const [found, ttlMs] of [
      [memory, 3_600_000],
      [redis, 330_000],
    ] as const) {
      expect(ms(found?.age)).toBeGreaterThanOrEqual(0)
      expect(ms(found?.age)).toBeLessThan(30_000)
      expect(ms(found?.remainingTtl)).toBeLessThanOrEqual(ttlMs)
      expect(ms(found?.remainingTtl)).toBeGreaterThan(ttlMs * 0.75)
    }
    expect(postgres?.remainingTtl).toBeUndefined()
    for (const found of [memory, redis, postgres]) expect(found?.sizeBytes).toBeGreaterThan(100n)
  })

  test('tells that what is held is the absence of the item', async () => {
    const { call, failure } = newCaller(service)
    await failure('getItem', { id: 'nothing' })
    const { tiers } = await call('inspectItem', { id: 'nothing' })
    expect(tiers[0]).toMatchObject({ present: true, negative: true, current: true })
    expect(tiers[2]).toMatchObject({ present: false })
    await call('createItem', { item: { id: 'a' } })
    await call('deleteItem', { id: 'a' })
    const deleted = await call('inspectItem', { id: 'a' })
    expect(deleted.tiers[0]).toMatchObject({ present: true, negative: true })
    expect(deleted.tiers[2]).toMatchObject({ present: true, negative: true })
  })

  test('tells the floors that an invalidation raised, and that older copies are not current', async () => {
    const { call } = newCaller(service)
    const item = { id: 'a', tags: ['t', 'u'], category: 'c' }
    // Nothing is known of what came before the log was followed.
    const before = 2n ** 40n
    const { revision: written } = await call('createItem', { item })
    const invalidate = (request: object) => call('invalidateItems', request)
    expect((await call('inspectItem', { id: 'a' })).floors).toMatchObject({ keyFloor: written })

    const keys = await invalidate({ target: { case: 'ids', value: { ids: ['a'] } } })
    const first = await call('inspectItem', { id: 'a' })
    expect(first.tiers[0]).toMatchObject({ present: true, current: false, asOf: written })
    // The database is asked now, so what it says is current.
    expect(first.tiers[2]).toMatchObject({ present: true, current: true, asOf: keys.revision })
    expect(first.floors).toMatchObject({ keyFloor: keys.revision, tagFloors: [], removedFloor: before })

    const tags = await invalidate({ target: { case: 'tags', value: { tags: ['u', 'c', 'x'] } } })
    const second = await call('inspectItem', { id: 'a' })
    expect(second.floors?.tagFloors.toSorted((a, b) => (a.tag < b.tag ? -1 : 1))).toMatchObject([
      { tag: 'c', floor: tags.revision },
      { tag: 'u', floor: tags.revision },
    ])

    const all = await invalidate({ target: { case: 'all', value: true }, mode: InvalidationMode.REMOVE })
    const third = await call('inspectItem', { id: 'a' })
    expect(third.floors).toMatchObject({ tenantFloor: all.revision, removedFloor: all.revision })
    await call('getItem', { id: 'a' })
    expect((await call('inspectItem', { id: 'a' })).tiers[0]).toMatchObject({ present: true, current: true })
  })

  test('is not seen in the metrics', async () => {
    const { call } = newCaller(service)
    await call('getItem', { id: '2' })
    // What the log brings meanwhile is not the inspections' doing.
    const counted = async () => {
      const { rpcs, time, invalidationsApplied, invalidationLag, ...rest } = await metricsOf(service)
      return rest
    }
    const before = await counted()
    for (const id of ['1', '2', 'abc']) await call('inspectItem', { id })
    expect(await counted()).toEqual(before)
  })

  test('touches no recency: the item that nobody reads is the one that goes', async () => {
    await using small = await startService({ env: { ITEMCACHE_MEMORY_MAX_ENTRIES: '2', REDIS_URL: 'off' } })
    const { call } = newCaller(small)
    for (const id of ['1', '2']) await call('getItem', { id })
    for (let i = 0; i < 5; i++) await call('inspectItem', { id: '1' })
    await call('getItem', { id: '3' })
    const { results } = await call('batchGetItems', { ids: ['1', '2', '3'], options: cacheOnly })
    expect(results.map(({ result }) => result.case)).toEqual([undefined, 'item', 'item'])
    const { tiers } = await call('inspectItem', { id: '2' })
    expect(tiers[1]).toMatchObject({ present: false, skipped: SkipReason.OFF })
  })
})

describe('GetMetrics', () => {
  const counts = (tier: TierMetrics) => ({
    hits: Number(tier.hits),
    misses: Number(tier.misses),
    errors: Number(tier.errors),
    timeouts: Number(tier.timeouts),
    calls: Number(tier.latency?.count),
  })

  function expectDistribution(latency: Latency | undefined): void {
    const [p50 = -1, p90 = -1, p99 = -1, max = -1] = [
      latency?.p50,
      latency?.p90,
      latency?.p99,
      latency?.max,
    ].map(ms)
    expect(p50).toBeGreaterThan(0)
    expect(p90).toBeGreaterThanOrEqual(p50)
    expect(p99).toBeGreaterThanOrEqual(p90)
    expect(max).toBeGreaterThanOrEqual(p99)
    expect(max).toBeLessThan(60_000)
  }

  test('starts at zero', async () => {
    const beforeMs = Date.now()
    await using service = await startService()
    const snapshot = await metricsOf(service)
    expect(snapshot).toMatchObject({ hits: 0n, misses: 0n, hitRate: 0, loads: 0n, coalescedLoads: 0n })
    expect(snapshot).toMatchObject({ staleServed: 0n, negativeHits: 0n, subscribers: 0n, gapsSent: 0n })
    expect(snapshot.tiers.map(({ tier }) => tier)).toEqual(TIERS)
    for (const tier of snapshot.tiers) {
      expect(tier).toMatchObject({ hits: 0n, misses: 0n, errors: 0n, timeouts: 0n, entries: 0n, bytes: 0n })
    }
    if (snapshot.startTime === undefined || snapshot.time === undefined) throw new Error('a time is missing')
    expect(timestampMs(snapshot.startTime)).toBeGreaterThanOrEqual(beforeMs)
    expect(timestampMs(snapshot.time)).toBeGreaterThan(timestampMs(snapshot.startTime))
    expect(timestampMs(snapshot.time)).toBeLessThanOrEqual(Date.now())
  })

  test('tells how every read was answered', async () => {
    await using service = await startService()
    const { client } = service
    const get = (id: string, options = {}) => client.call('getItem', { id, options })
    await get('1') // a miss that the origin answers
    await get('1') // a hit
    await client.failure('getItem', { id: '999' }) // a miss: the origin does not know it
    await client.failure('getItem', { id: '999' }) // a negative hit
    await client.call('invalidateItems', { target: { case: 'ids', value: { ids: ['1'] } } })
    await get('1') // a stale hit, with a reload behind it
    await expect.poll(async () => (await metricsOf(service)).backgroundRefreshesOk).toBe(1n)
    await Promise.all(Array.from({ length: 5 }, () => get('2'))) // five misses with one load
    await get('1', { freshness: Freshness.FRESH }) // bypasses the caches
    await get('3', cacheOnly) // a miss that nobody answers
    await client.call('batchGetItems', { ids: ['1', '2'] }) // two hits

    const snapshot = await metricsOf(service)
    expect(snapshot).toMatchObject({
      hits: 5n,
      misses: 9n,
      hitRate: 5 / 14,
      loads: 5n,
      coalescedLoads: 4n,
      staleServed: 1n,
      backgroundRefreshesOk: 1n,
      backgroundRefreshesFailed: 0n,
      negativeHits: 1n,
    })
    const [memory, redis, postgres, origin] = TIERS.map((tier) => tierOf(snapshot, tier))
    if (!memory || !redis || !postgres || !origin) throw new Error('a tier is missing')
    const well = { errors: 0, timeouts: 0 }
    expect(counts(memory)).toEqual({ hits: 5, misses: 8, ...well, calls: 0 })
    // Redis had the expired copy at the reload, which was no answer.
    expect(counts(redis)).toEqual({ hits: 0, misses: 5, ...well, calls: 5 })
    // Five reads, and two inserts of what the origin knew.
    expect(counts(postgres)).toEqual({ hits: 2, misses: 3, ...well, calls: 7 })
    expect(counts(origin)).toEqual({ hits: 2, misses: 1, ...well, calls: 3 })
    for (const tier of [redis, postgres, origin]) {
      expectDistribution(tier.latency)
      expect(tier.breaker).toBe(BreakerState.CLOSED)
    }
    expect(memory.breaker).toBe(BreakerState.UNSPECIFIED)
    expect(memory).toMatchObject({ entries: 3n, evictions: 0n, expirations: 0n })
    expect(memory.bytes).toBeGreaterThan(500n)

    const rpcs = Object.fromEntries(snapshot.rpcs.map((rpc) => [rpc.method.split('/')[1], rpc]))
    expect(Object.keys(rpcs).sort()).toEqual(['BatchGetItems', 'GetItem', 'GetMetrics', 'InvalidateItems'])
    expect(rpcs['GetItem']).toMatchObject({
      method: 'itemcache.v1.ItemCacheService/GetItem',
      started: 12n,
      finished: { OK: 10n, NOT_FOUND: 2n },
      latency: { count: 12n },
    })
    expectDistribution(rpcs['GetItem']?.latency)
    // The call that asks has started and not finished yet.
    const { started = 0n, finished = {} } = rpcs['GetMetrics'] ?? {}
    expect(started).toBe((finished['OK'] ?? 0n) + 1n)
  })

  test('tells which copies made room, and which had served their time', async () => {
    let nowMs = 1000
    await using service = await startService({
      app: { now: () => nowMs, random: () => 0 },
      env: { ITEMCACHE_MEMORY_MAX_ENTRIES: '2', REDIS_URL: 'off' },
    })
    for (const id of ['1', '2', '3']) await service.client.call('getItem', { id })
    const memory = async () => tierOf(await metricsOf(service), Tier.MEMORY)
    expect(await memory()).toMatchObject({ entries: 2n, evictions: 1n, expirations: 0n })
    nowMs += 3_600_000
    await service.client.call('getItem', { id: '3' })
    expect(await memory()).toMatchObject({ entries: 2n, evictions: 1n, expirations: 1n })
  })

  test('tells errors and timeouts of each tier apart', async () => {
    let catalogueWorks = false
    await using redis = await freshRedis()
    await using service = await startService({
      env: { REDIS_URL: redis.url, ITEMCACHE_REDIS_TIMEOUT: '200ms', ITEMCACHE_FAILURE_TTL: '0s' },
      catalogue: {
        intercept: (_, response) => {
          if (!catalogueWorks) response.writeHead(500).end()
          return !catalogueWorks
        },
      },
    })
    const { client } = service
    expect((await client.failure('getItem', { id: '1' })).code).toBe(status.UNAVAILABLE)
    catalogueWorks = true
    redis.pause()
    await client.call('getItem', { id: '1' })
    redis.resume()
    const slow = await metricsOf(service)
    expect(counts(tierOf(slow, Tier.ORIGIN))).toMatchObject({ hits: 1, errors: 1, timeouts: 0 })
    expect(counts(tierOf(slow, Tier.REDIS))).toMatchObject({ timeouts: 1, errors: 0 })
    await redis.kill()
    await client.call('getItem', { id: '2' })
    await using sql = await connectSql(service.databaseUrl)
    await sql('ALTER TABLE items RENAME TO misplaced')
    expect((await client.failure('getItem', { id: '3' })).code).toBe(status.INTERNAL)
    const broken = await metricsOf(service)
    expect(counts(tierOf(broken, Tier.REDIS))).toMatchObject({ timeouts: 1, errors: 2 })
    expect(counts(tierOf(broken, Tier.POSTGRES))).toMatchObject({ errors: 1, timeouts: 0 })
    // A read that fails is a miss of the whole.
    expect(broken).toMatchObject({ hits: 0n, misses: 4n })
  })
})

describe('WatchMetrics', () => {
  let service: TestService

  beforeAll(async () => {
    service = await startService()
  })
  afterAll(() => service?.[Symbol.asyncDispose]())

  const interval = (milliseconds: number) => ({
    seconds: BigInt(Math.trunc(milliseconds / 1000)),
    nanos: Math.round((milliseconds % 1000) * 1e6),
  })
  const finished = () =>
    service.app.metrics.snapshot().rpcs.find(({ method }) => method.endsWith('/WatchMetrics'))?.finished

  test('sends the first frame at once, however long the interval is', async () => {
    const stream = service.client.stream('watchMetrics', { interval: interval(3_600_000) })
    const { value } = await stream.next()
    expect(value?.snapshot?.tiers).toHaveLength(4)
    await stream.return(undefined)
  })

  test('sends a frame per interval, with what happened in between', async () => {
    const times: number[] = []
    let reads = 0
    let last: MetricsSnapshot | undefined
    for await (const { snapshot } of service.client.stream('watchMetrics', { interval: interval(100) })) {
      last = snapshot
      times.push(snapshot?.time === undefined ? 0 : timestampMs(snapshot.time))
      // A frame may have been made while a read was still under way. A read that no load came back for in time may be a miss.
      if (Number(last?.hits) + Number(last?.misses) >= 9) break
      if (reads++ < 9) await service.client.call('getItem', { id: '1' })
    }
    expect(Number(last?.hits) + Number(last?.misses)).toBe(9)
    expect((times.at(-1) ?? 0) - (times[0] ?? 0)).toBeGreaterThanOrEqual(850)
  })

  test('takes a second when no interval is given', async () => {
    const startedMs = performance.now()
    const stream = service.client.stream('watchMetrics', {})
    await stream.next()
    await stream.next()
    expect(performance.now() - startedMs).toBeGreaterThan(950)
    await stream.return(undefined)
  })

  test.each([
    ['99 ms', interval(99)],
    ['0', interval(0)],
    ['more than an hour', { seconds: 3600n, nanos: 1_000_000 }],
    ['a negative one', { seconds: -1n, nanos: 0 }],
    ['no valid duration', { seconds: 1n, nanos: -1_000_000_000 }],
  ])('refuses an interval that is %s', async (_, request) => {
    const stream = service.client.stream('watchMetrics', { interval: request })
    const failure = failureOf(
      await stream.next().then(
        () => {
          throw new Error('it was not refused')
        },
        (error: ServiceError) => error,
      ),
    )
    expect(failure.code).toBe(status.INVALID_ARGUMENT)
    expect(failure.badRequest?.fieldViolations[0]?.field).toBe('interval')
  })

  test('ends when the caller goes away', async () => {
    const before = finished()?.CANCELLED ?? 0
    const stream = service.client.stream('watchMetrics', { interval: interval(3_600_000) })
    await stream.next()
    await stream.return(undefined)
    await expect.poll(() => finished()?.CANCELLED).toBe(before + 1)
  })

  test('makes no frames for a reader who does not read, and goes on when it does', async () => {
    let frames = 0
    const { memory } = service.app.metrics.tiers
    const { gauges } = memory
    memory.gauges = () => {
      frames++
      return gauges()
    }
    // A client whose window has no room: not a byte of the answer can be sent.
    const session = connect(`http://${service.address}`, { settings: { initialWindowSize: 0 } })
    const request = session.request({
      ':method': 'POST',
      ':path': '/itemcache.v1.ItemCacheService/WatchMetrics',
      'content-type': 'application/grpc',
      te: 'trailers',
    })
    const message = toBinary(
      WatchMetricsRequestSchema,
      create(WatchMetricsRequestSchema, { interval: interval(100) }),
    )
    request.end(Buffer.concat([Buffer.from([0, 0, 0, 0, message.length]), message]))
    let received = 0
    request.on('data', (chunk: Buffer) => {
      received += chunk.length
    })
    // One frame is on its way, and none waits behind it.
    await expect.poll(() => frames, { timeout: 20_000 }).toBeGreaterThan(0)
    let before = 0
    while (before !== frames) {
      before = frames
      await sleep(500)
    }
    expect(frames).toBeLessThan(3)
    expect(received).toBe(0)

    session.settings({ initialWindowSize: 1024 * 1024 })
    await expect.poll(() => frames, { timeout: 20_000 }).toBeGreaterThan(before + 3)
    expect(received).toBeGreaterThan(1000)
    session.destroy()
    memory.gauges = gauges
  })
})
