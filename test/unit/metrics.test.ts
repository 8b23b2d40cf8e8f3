import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { LatencyHistogram, Metrics, SIZE_BOUNDS, SizeHistogram } from '../../src/observe/metrics.ts'
import { prometheusText } from '../../src/observe/prometheus.ts'

const GET = '/itemcache.v1.ItemCacheService/GetItem'

function metricsAt(clock: { ms: number } = { ms: 1_000 }): Metrics {
  return new Metrics({ methods: [GET, '/itemcache.v1.ItemCacheService/ListItems'], now: () => clock.ms })
}

describe('a snapshot', () => {
  test('of an idle service is all zeros, without breakers, and with the time of the start', () => {
    const clock = { ms: 1_000 }
    const metrics = metricsAt(clock)
    clock.ms = 5_000

    const snapshot = metrics.snapshot()
    expect(snapshot).toMatchObject({ startTimeMs: 1_000, timeMs: 5_000, hits: 0, misses: 0, hitRate: 0 })
    expect(Object.keys(snapshot.tiers)).toEqual(['memory', 'redis', 'postgres', 'origin'])
    for (const tier of Object.values(snapshot.tiers)) {
      expect(tier).toEqual({
        hits: 0,
        misses: 0,
        errors: 0,
        timeouts: 0,
        breaker: undefined,
        latency: { count: 0, p50Ms: 0, p90Ms: 0, p99Ms: 0, maxMs: 0 },
        entries: 0,
        bytes: 0,
        evictions: 0,
        expirations: 0,
      })
    }
  })

  test('counts as hits what memory or Redis answered, stale and negative answers too, out of all reads', () => {
    const metrics = metricsAt()
    metrics.countRead('memory', 'HIT')
    metrics.countRead('memory', 'STALE')
    metrics.countRead('redis', 'HIT')
    metrics.countRead('redis', 'STALE')
    metrics.countRead('memory', 'NEGATIVE_HIT')
    metrics.countRead('redis', 'NEGATIVE_HIT')
    metrics.countRead('postgres', 'MISS')
    metrics.countRead('postgres', 'BYPASS')
    metrics.countRead('origin', 'MISS')
    metrics.failedReads++

    expect(metrics.snapshot()).toMatchObject({
      hits: 6,
      misses: 4,
      hitRate: 0.6,
      staleServed: 2,
      negativeHits: 2,
    })
  })

  test('shows per tier what was counted, and asks for what the tier holds at that moment', () => {
    const metrics = metricsAt()
    const { redis } = metrics.tiers
    redis.hits += 2
    redis.misses += 48
    redis.errors++
    redis.timeouts++
    redis.breaker = () => 'OPEN'
    redis.latency.record(2)
    let entries = 1
    redis.gauges = () => ({ entries, bytes: 10, evictions: 3, expirations: 4 })
    entries = 2

    const near2 = expect.closeTo(2, 1)
    expect(metrics.snapshot().tiers.redis).toEqual({
      hits: 2,
      misses: 48,
      errors: 1,
      timeouts: 1,
      breaker: 'OPEN',
      latency: { count: 1, p50Ms: near2, p90Ms: near2, p99Ms: near2, maxMs: 2 },
      entries: 2,
      bytes: 10,
      evictions: 3,
      expirations: 4,
    })
    expect(metrics.snapshot().tiers.memory.hits).toBe(0)
  })

  test('shows loads, refreshes, invalidations and streams', () => {
    const metrics = metricsAt()
    metrics.loads += 3
    metrics.coalescedLoads += 997
    metrics.refreshesOk += 2
    metrics.refreshesFailed++
    metrics.invalidationsApplied += 5
    metrics.invalidationLag.record(40)
    metrics.subscribers++
    metrics.gapsSent++

    expect(metrics.snapshot()).toMatchObject({
      loads: 3,
      coalescedLoads: 997,
      refreshesOk: 2,
      refreshesFailed: 1,
      invalidationsApplied: 5,
      invalidationLag: { count: 1, maxMs: 40 },
      subscribers: 1,
      gapsSent: 1,
    })
  })

  test('counts calls per method and status, and everything unknown as one other method', () => {
    const metrics = metricsAt()
    const get = metrics.rpc(GET)
    expect(metrics.rpc(GET.slice(1))).toBe(get)
    get.started += 3
    get.finish('OK', 1)
    get.finish('NOT_FOUND', 3)
    for (const forged of ['/forged/A', '/forged/B', '/__proto__', '']) metrics.rpc(forged).started++

    const { rpcs } = metrics.snapshot()
    expect(rpcs.map(({ method, started }) => [method, started])).toEqual([
      ['itemcache.v1.ItemCacheService/GetItem', 3],
      ['itemcache.v1.ItemCacheService/ListItems', 0],
      ['other', 4],
    ])
    expect(rpcs[0]?.finished).toEqual({ OK: 1, NOT_FOUND: 1 })
    expect(rpcs[0]?.latency).toMatchObject({ count: 2, maxMs: 3 })
  })

  test('is a copy that later counting does not change', () => {
    const metrics = metricsAt()
    const before = metrics.snapshot()
    metrics.countRead('memory', 'HIT')
    metrics.rpc(GET).finish('OK', 1)
    expect(before.hits).toBe(0)
    expect(before.rpcs[0]?.finished).toEqual({})
  })
})

describe('a latency histogram', () => {
  test('has the percentiles of what was recorded, to 3.2 % or 0.05 µs', () => {
    fc.assert(
      fc.property(fc.array(fc.double({ min: 0, max: 200_000, noNaN: true }), { minLength: 1 }), (values) => {
        const histogram = new LatencyHistogram()
        for (const value of values) histogram.record(value)
        const sorted = values.toSorted((a, b) => a - b)
        const snapshot = histogram.snapshot()
        for (const [share, found] of [
          [0.5, snapshot.p50Ms],
          [0.9, snapshot.p90Ms],
          [0.99, snapshot.p99Ms],
        ] as const) {
          const exact = sorted[Math.ceil(values.length * share) - 1] ?? Number.NaN
          expect(Math.abs(found - exact)).toBeLessThanOrEqual(Math.max(exact * 0.032, 0.00011))
        }
        expect(snapshot.maxMs).toBe(sorted.at(-1))
        expect(snapshot.count).toBe(values.length)
      }),
    )
  })

  test('survives clocks that go backwards, nonsense and calls that last for days', () => {
    const histogram = new LatencyHistogram()
    for (const ms of [-5, Number.NaN, 0, 3 * 86_400_000, 3 * 86_400_000]) histogram.record(ms)
    expect(histogram.snapshot()).toEqual({
      count: 5,
      p50Ms: expect.closeTo(0, 3),
      p90Ms: 3 * 86_400_000,
      p99Ms: 3 * 86_400_000,
      maxMs: 3 * 86_400_000,
    })
    expect(histogram.sumMs).toBe(6 * 86_400_000)
  })

  test('tells its buckets when asked: the difference of two is what happened in between', () => {
    const histogram = new LatencyHistogram()
    expect(histogram.snapshot(true).buckets).toEqual([])
    expect(histogram.snapshot()).not.toHaveProperty('buckets')
    for (const ms of [0, 0.0005, 0.0015]) histogram.record(ms)
    // 2^(2/4) µs < 1.5 µs <= 2^(3/4) µs
    expect(histogram.snapshot(true).buckets).toEqual([2, 0, 0, 1])
    for (const ms of [100, 9_000_000]) histogram.record(ms)
    const { buckets = [] } = histogram.snapshot(true)
    expect(buckets).toHaveLength(112)
    expect(buckets.reduce((sum, count) => sum + count)).toBe(5)
    expect(buckets[Math.ceil(4 * Math.log2(100_000))]).toBe(1)
    expect(buckets[111]).toBe(1)
  })

  test('counts for ascending bounds how many values were below each', () => {
    const histogram = new LatencyHistogram()
    for (const ms of [0.0004, 0.2, 0.2, 7, 500, 400_000]) histogram.record(ms)
    expect(histogram.countsAtMost([0, 0.01, 0.3, 10, 1_000, 1_000_000])).toEqual([0, 1, 3, 4, 5, 6])
  })
})

describe('the Prometheus text', () => {
  /** Checks what `promtool check metrics` would refuse, and returns the samples by name and labels. */
  function parsed(text: string): Map<string, number> {
    expect(text.endsWith('\n')).toBe(true)
    const types = new Map<string, string>()
    const samples = new Map<string, number>()
    let help = ''
    for (const line of text.split('\n').filter((each) => each !== '')) {
      const [, keyword, subject = '', rest = ''] = /^# (HELP|TYPE) (\S+) (.+)$/.exec(line) ?? []
      if (keyword === 'HELP') help = subject
      else if (keyword === 'TYPE') {
        expect(subject, 'TYPE follows HELP').toBe(help)
        expect(types.has(subject), `${subject} is described once`).toBe(false)
        if (rest === 'counter' && subject.startsWith('itemcache_')) expect(subject).toMatch(/_total$/)
        types.set(subject, rest)
      } else {
        const [, name = '', labels = '', value = ''] =
          /^([a-z_][a-z0-9_]*)(\{(?:[a-z_]+="[^"\n]*",?)*\})? (\S+)$/i.exec(line) ?? []
        expect(name, line).not.toBe('')
        expect(
          types.has(name) || types.get(name.replace(/_(bucket|sum|count)$/, '')) === 'histogram',
          line,
        ).toBe(true)
        expect(samples.has(name + labels), `${name}${labels} comes once`).toBe(false)
        // Go's parser of numbers, which Prometheus uses, takes NaN in any case.
        expect(Number.isNaN(Number(value)), line).toBe(/^nan$/i.test(value))
        samples.set(name + labels, Number(value))
      }
    }
    return samples
  }

  test('holds every counter, pulled when it is asked for', async () => {
    const metrics = metricsAt()
    const exposition = prometheusText(metrics, '1.2.3')
    expect(exposition.contentType).toBe('text/plain; version=0.0.4; charset=utf-8')

    metrics.tiers.memory.hits = 7
    metrics.tiers.redis.breaker = () => 'HALF_OPEN'
    metrics.tiers.memory.gauges = () => ({ entries: 5, bytes: 6, evictions: 8, expirations: 9 })
    metrics.countRead('memory', 'STALE')
    metrics.failedReads = 2
    metrics.refreshesFailed = 3
    const samples = parsed(await exposition.text())
    for (const [name, value] of [
      ['itemcache_build_info{version="1.2.3"}', 1],
      ['itemcache_tier_hits_total{tier="memory"}', 7],
      ['itemcache_tier_misses_total{tier="origin"}', 0],
      ['itemcache_tier_entries{tier="memory"}', 5],
      ['itemcache_tier_bytes{tier="memory"}', 6],
      ['itemcache_tier_evictions_total{tier="memory"}', 8],
      ['itemcache_tier_expirations_total{tier="memory"}', 9],
      ['itemcache_tier_breaker_state{tier="redis",state="half_open"}', 1],
      ['itemcache_tier_breaker_state{tier="redis",state="closed"}', 0],
      ['itemcache_reads_total{outcome="stale",tier="memory"}', 1],
      ['itemcache_reads_total{outcome="failed",tier="none"}', 2],
      ['itemcache_refreshes_total{result="failed"}', 3],
      ['itemcache_loads_total', 0],
      ['itemcache_subscribers', 0],
      ['grpc_server_call_started_total{grpc_method="other"}', 0],
    ] as const) {
      expect(samples.get(name), name).toBe(value)
    }
    expect(samples.has('nodejs_eventloop_lag_p99_seconds')).toBe(true)

    metrics.tiers.memory.hits++
    expect(parsed(await exposition.text()).get('itemcache_tier_hits_total{tier="memory"}')).toBe(8)
  })

  test('holds latencies as cumulative buckets in seconds', async () => {
    const metrics = metricsAt()
    const get = metrics.rpc(GET)
    for (const ms of [0.04, 2.5, 2.5, 700]) get.finish('OK', ms)
    metrics.tiers.postgres.latency.record(1.5)
    const samples = parsed(await prometheusText(metrics, '1').text())

    const labels = 'grpc_method="itemcache.v1.ItemCacheService/GetItem",grpc_status="OK"'
    const bucket = (le: string) =>
      samples.get(`grpc_server_call_duration_seconds_bucket{le="${le}",${labels}}`)
    expect(['0', '0.00005', '0.0001', '0.001', '0.003', '0.5', '0.8', '100', '+Inf'].map(bucket)).toEqual([
      0, 1, 1, 1, 3, 3, 4, 4, 4,
    ])
    expect(samples.get(`grpc_server_call_duration_seconds_sum{${labels}}`)).toBeCloseTo(0.70504)
    expect(samples.get(`grpc_server_call_duration_seconds_count{${labels}}`)).toBe(4)
    expect(samples.get('itemcache_tier_latency_seconds_count{tier="postgres"}')).toBe(1)
  })
})

describe('sizes', () => {
  test('lie in the bucket of the first bound that they do not exceed', () => {
    fc.assert(
      fc.property(fc.array(fc.nat({ max: 2 ** 34 })), (sizes) => {
        const histogram = new SizeHistogram()
        for (const bytes of sizes) histogram.record(bytes)
        expect(histogram.countsAtMost()).toEqual(
          SIZE_BOUNDS.map((bound) => sizes.filter((bytes) => bytes <= bound).length),
        )
        expect(histogram.count).toBe(sizes.length)
        expect(histogram.sum).toBe(sizes.reduce((sum, bytes) => sum + bytes, 0))
      }),
    )
  })
})

describe('tenants', () => {
  test('are counted by name up to the number that was set, and the others together', () => {
    const metrics = new Metrics({ methods: [], maxTenants: 2 })
    for (const tenant of ['a', 'b', 'c', 'other', 'a']) metrics.tenant(tenant).calls++
    expect(metrics.tenants.map(([name, { calls }]) => [name, calls])).toEqual([
      ['a', 2],
      ['b', 1],
      ['other', 2],
    ])
  })

  test('are all counted together when none is to be named', () => {
    const metrics = new Metrics({ methods: [] })
    for (const tenant of ['a', 'b']) metrics.tenant(tenant).calls++
    expect(metrics.tenants.map(([name, { calls }]) => [name, calls])).toEqual([['other', 2]])
  })
})
