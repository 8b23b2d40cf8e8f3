import { describe, expect, test } from 'vitest'
import { FED_ROWS, Feed } from '../../src/observe/feed.ts'
import { COLUMNS, HISTORY_SECONDS, History } from '../../src/observe/history.ts'
import type { Part, Sample } from '../../src/observe/live-message.ts'
import { LatencyHistogram, Metrics } from '../../src/observe/metrics.ts'

const METHOD = 'itemcache.v1.ItemCacheService/GetItem'

function setUp(parts: () => readonly Part[] = () => []) {
  const clock = { nowMs: 1_000_000 }
  const now = () => clock.nowMs
  const metrics = new Metrics({ methods: [METHOD], now })
  const history = new History({ metrics, parts, now })
  const second = () => {
    clock.nowMs += 1000
    history.take()
  }
  return { clock, metrics, history, second }
}

const at = (sample: Sample | undefined, column: string) => sample?.[COLUMNS.indexOf(column)]

describe('the history of the last minutes', () => {
  test('tells rates, hit rates and latencies of each second alone', () => {
    const { clock, metrics, history, second } = setUp()
    const { memory, redis } = metrics.tiers
    memory.reads.HIT = 6
    redis.reads.STALE = 2
    metrics.tiers.postgres.reads.MISS = 1
    metrics.failedReads = 1
    Object.assign(memory, { hits: 6, misses: 4 })
    metrics.invalidationsApplied = 4
    for (let i = 0; i < 100; i++) metrics.cachedReads.record(10)
    clock.nowMs += 1000
    second()
    const first = history.newest
    expect(at(first, 'time')).toBe(1_002_000)
    expect(at(first, 'reads.memory')).toBe(3)
    expect(at(first, 'reads.failed')).toBe(0.5)
    expect(at(first, 'hits.all')).toBe(0.8)
    expect(at(first, 'hits.memory')).toBe(0.6)
    expect(at(first, 'invalidations')).toBe(2)
    expect(at(first, 'p99.all')).toBeCloseTo(10, 0)
    // Nobody has asked Redis, and nothing has come through the log.
    expect(at(first, 'hits.redis')).toBeNull()
    expect(at(first, 'p50.redis')).toBeNull()
    expect(at(first, 'p99.lag')).toBeNull()

    memory.reads.HIT += 1
    metrics.cachedReads.record(2)
    second()
    expect(at(history.newest, 'reads.memory')).toBe(1)
    expect(at(history.newest, 'hits.all')).toBe(1)
    expect(at(history.newest, 'hits.memory')).toBeNull()
    expect(at(history.newest, 'p99.all')).toBeCloseTo(2, 0)
    expect(history.samples()).toHaveLength(2)
  })

  test('holds so many seconds, and no more', () => {
    const { metrics, history, second } = setUp()
    for (let i = 1; i <= HISTORY_SECONDS + 7; i++) {
      metrics.tiers.memory.reads.HIT += i
      second()
    }
    const samples = history.samples()
    expect(samples).toHaveLength(HISTORY_SECONDS)
    expect(samples.map((sample) => at(sample, 'reads.memory'))).toEqual(
      Array.from({ length: HISTORY_SECONDS }, (_, i) => i + 8),
    )
  })

  test('does not begin with what was counted before it', () => {
    const metrics = new Metrics({ methods: [] })
    metrics.tiers.memory.reads.HIT = 1000
    metrics.cachedReads.record(500)
    const history = new History({ metrics, parts: () => [], now: Date.now })
    history.take()
    expect(at(history.newest, 'reads.memory')).toBe(0)
    expect(at(history.newest, 'p99.all')).toBeNull()
  })

  test('a clock that is set back makes no negative rate', () => {
    const { clock, metrics, history } = setUp()
    metrics.tiers.memory.reads.HIT = 1
    clock.nowMs -= 5000
    history.take()
    expect(at(history.newest, 'reads.memory')).toBeGreaterThan(0)
  })

  test('notes when each part was down or failing, and until when', () => {
    const redis: { state: Part['state']; breaker: NonNullable<Part['breaker']> } = {
      state: 'ready',
      breaker: 'CLOSED',
    }
    const { clock, history, second } = setUp(() => [
      { name: 'memory', state: 'off' },
      { name: 'redis', ...redis },
      { name: 'origin', state: 'on', breaker: 'CLOSED' },
    ])
    second()
    expect(history.outages).toEqual([])
    redis.breaker = 'OPEN'
    clock.nowMs += 1000
    history.noteOutages()
    expect(history.outages).toEqual([{ part: 'redis', what: 'failing', sinceMs: 1_002_000 }])
    redis.breaker = 'HALF_OPEN'
    redis.state = 'down'
    second()
    Object.assign(redis, { state: 'ready' })
    second()
    // One outage, which was worst when Redis was down.
    expect(history.outages).toEqual([{ part: 'redis', what: 'down', sinceMs: 1_002_000 }])
    redis.breaker = 'CLOSED'
    second()
    second()
    expect(history.outages).toEqual([{ part: 'redis', what: 'down', sinceMs: 1_002_000, untilMs: 1_005_000 }])
  })

  test('remembers the newest outages only', () => {
    let down = false
    const { history, second } = setUp(() => [{ name: 'redis', state: down ? 'down' : 'ready' }])
    for (let i = 0; i < 100; i++) {
      down = !down
      second()
    }
    expect(history.outages).toHaveLength(20)
    expect(history.outages.at(-1)).toMatchObject({ sinceMs: 1_099_000, untilMs: 1_100_000 })
  })

  test('knows the beginning of an outage that lasts, however many of others come and go', () => {
    let flaps = false
    const { history, second } = setUp(() => [
      { name: 'postgres', state: 'down' },
      { name: 'redis', state: flaps ? 'down' : 'ready' },
    ])
    for (let i = 0; i < 100; i++) {
      flaps = !flaps
      second()
    }
    expect(history.outages).toHaveLength(20)
    expect(history.outages[0]).toEqual({ part: 'postgres', what: 'down', sinceMs: 1_001_000 })
  })

  test('tells the busiest methods of the last 30 to 60 s: calls, failures and latencies', () => {
    const { metrics, history, second } = setUp()
    const rpc = metrics.rpc(METHOD)
    const call = (times: number, ms: number, status: 'OK' | 'NOT_FOUND' = 'OK') => {
      for (let i = 0; i < times; i++) {
        rpc.started++
        rpc.finish(status, ms)
      }
    }
    expect(history.rpcs()).toEqual([])
    call(100, 500)
    for (let i = 0; i < 61; i++) second()
    expect(history.rpcs()).toEqual([])
    call(29, 4)
    call(1, 4, 'NOT_FOUND')
    for (let i = 0; i < 30; i++) second()
    const [row] = history.rpcs()
    expect(row).toMatchObject({ method: 'GetItem', failed: { NOT_FOUND: expect.closeTo(1 / 31, 3) } })
    expect(row?.perSecond).toBeCloseTo(30 / 31, 3)
    // The slow calls are of another time.
    expect(row?.p99Ms).toBeCloseTo(4, 0)
  })
})

test('a histogram tells what was recorded since a copy of it was made', () => {
  const histogram = new LatencyHistogram()
  histogram.record(1)
  const copy = new LatencyHistogram()
  copy.add(histogram)
  for (const ms of [20, 20, 20, 80]) histogram.record(ms)
  const grown = histogram.since(copy)
  expect(grown.count).toBe(4)
  expect(grown.sumMs).toBe(140)
  expect(grown.snapshot().p50Ms).toBeCloseTo(20, 0)
  copy.add(grown)
  expect(copy.countsAtMost([1, 50, 100])).toEqual(histogram.countsAtMost([1, 50, 100]))
})

describe('the feed of invalidations', () => {
  const row = (revision: number, names: number) => ({
    revision,
    kind: 'KEYS_INVALIDATED' as const,
    mode: 'EXPIRE' as const,
    ids: Array.from({ length: names }, (_, i) => `id-${i}`),
    tags: [],
    committedAtMs: 0,
    ageMs: 7,
    writer: '',
  })

  test('holds the newest rows and some names of each, however many there are', () => {
    const feed = new Feed(() => 5)
    for (let revision = 1; revision <= 1000; revision++) feed.applied('t', row(revision, 1000))
    const rows = feed.after(0)
    expect(rows).toHaveLength(FED_ROWS)
    expect(rows.at(-1)).toEqual({
      seq: 1000,
      tenant: 't',
      revision: 1000,
      reason: 'KEYS_INVALIDATED',
      mode: 'EXPIRE',
      ids: ['id-0', 'id-1', 'id-2', 'id-3', 'id-4'],
      moreIds: 995,
      tags: [],
      moreTags: 0,
      appliedMs: 5,
      lagMs: 7,
    })
    expect(feed.after(998).map(({ seq }) => seq)).toEqual([999, 1000])
    expect(feed.after(feed.seq)).toEqual([])
  })

  test('tells of rows that were skipped, and keeps no tenant from being dropped', () => {
    const feed = new Feed(() => 5)
    feed.jumped('t', 9)
    expect(feed.after(0)).toMatchObject([{ reason: 'GAP', revision: 9, tenant: 't' }])
    expect(feed.needs()).toBe(false)
  })
})
