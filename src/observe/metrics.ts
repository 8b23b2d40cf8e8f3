/**
 * What the service counts. Counters are plain number fields that the code in question raises itself
 * (`metrics.tiers.redis.misses += 3`), so that counting costs a hit next to nothing; everything else is computed
 * when somebody asks. All counters are cumulative since `startTimeMs`.
 *
 * A read is one id of GetItem, BatchGetItems or StreamItems, or one page of ListItems. Its outcome is counted once, by the tier that
 * answered (`countRead`); the counters of a tier count every look-up in it, so that one read that PostgreSQL answers
 * is also a miss of memory and of Redis.
 */
import type { ItemCacheError } from '../errors.ts'
import type { BreakerState } from '../tiers/guard.ts'
import type { TierName } from '../tiers/tier.ts'

/** The tiers, from near to far. */
export const TIER_NAMES = ['memory', 'redis', 'postgres', 'origin'] as const satisfies readonly TierName[]

/**
 * How a read was answered. HIT: a current copy. STALE: a copy past its time. NEGATIVE_HIT: a copy that says "absent".
 * MISS: no cache could answer. BYPASS: the
 * caller asked for FRESH, or the key is outside the share that goes through the caches.
 */
export const READ_OUTCOMES = ['HIT', 'STALE', 'NEGATIVE_HIT', 'MISS', 'BYPASS'] as const
export type ReadOutcome = (typeof READ_OUTCOMES)[number]

export const BREAKER_STATES = ['CLOSED', 'HALF_OPEN', 'OPEN'] as const satisfies readonly BreakerState[]

/** The names of the gRPC status codes, by their numbers. */
export const STATUS_NAMES = [
  'OK',
  'CANCELLED',
  'UNKNOWN',
  'INVALID_ARGUMENT',
  'DEADLINE_EXCEEDED',
  'NOT_FOUND',
  'ALREADY_EXISTS',
  'PERMISSION_DENIED',
  'RESOURCE_EXHAUSTED',
  'FAILED_PRECONDITION',
  'ABORTED',
  'OUT_OF_RANGE',
  'UNIMPLEMENTED',
  'INTERNAL',
  'UNAVAILABLE',
  'DATA_LOSS',
  'UNAUTHENTICATED',
] as const
export type StatusName = (typeof STATUS_NAMES)[number]

/** Latencies in milliseconds; 0 when nothing was recorded. Percentiles are right to about 3 %, `maxMs` is exact. */
export interface LatencySnapshot {
  readonly count: number
  readonly p50Ms: number
  readonly p90Ms: number
  readonly p99Ms: number
  readonly maxMs: number
  /** How many lie in each of the ranges that `LATENCY_BOUNDS_MS` ends; without the zeros at the end. Only when asked for. */
  readonly buckets?: readonly number[]
}

/** 2^(i/4) µs, up to 226 s. */
export const LATENCY_BOUNDS_MS: readonly number[] = Array.from({ length: 112 }, (_, i) => 2 ** (i / 4) / 1000)

/** What a tier holds, and what left it since the start. A tier that cannot tell says 0. */
export interface TierGauges {
  readonly entries: number
  readonly bytes: number
  /** Copies that made room for others. */
  readonly evictions: number
  /** Copies whose time was over. */
  readonly expirations: number
}

export interface TierSnapshot extends TierGauges {
  readonly hits: number
  readonly misses: number
  readonly errors: number
  readonly timeouts: number
  /** `undefined`: the tier has no circuit breaker. */
  readonly breaker: BreakerState | undefined
  readonly latency: LatencySnapshot
}

export interface RpcSnapshot {
  /** `package.Service/Method`, or `other`. */
  readonly method: string
  readonly started: number
  /** How many calls ended with each status; a status that never occurred is left out. */
  readonly finished: Readonly<Partial<Record<StatusName, number>>>
  readonly latency: LatencySnapshot
}

export interface MetricsSnapshot {
  /** Milliseconds since 1970. */
  readonly startTimeMs: number
  readonly timeMs: number
  readonly tiers: Readonly<Record<TierName, TierSnapshot>>
  /** Reads that memory or Redis answered, stale and negative answers included. */
  readonly hits: number
  /** All other reads, failed and bypassing ones included. */
  readonly misses: number
  /** `hits / (hits + misses)`, 0 to 1; 0 before the first read. */
  readonly hitRate: number
  readonly loads: number
  readonly coalescedLoads: number
  readonly staleServed: number
  readonly refreshesOk: number
  readonly refreshesFailed: number
  readonly negativeHits: number
  readonly invalidationsApplied: number
  readonly invalidationLag: LatencySnapshot
  readonly subscribers: number
  readonly gapsSent: number
  /** In the order of construction; `other` last. */
  readonly rpcs: readonly RpcSnapshot[]
}

const UNITS_PER_MS = 10_000
const SUB_BUCKET_BITS = 4
const SUB_BUCKETS = 1 << SUB_BUCKET_BITS
/** Values are kept below 2^31 units: 214 s. */
const CEILING = 2 ** 31 - 1
const BUCKETS = (31 - SUB_BUCKET_BITS) * SUB_BUCKETS + SUB_BUCKETS

/**
 * Durations in buckets whose width is a sixteenth of the power of two they lie in: 3.5 KB for everything from 0.1 µs to
 * 214 s. `record` costs about 15 ns; the histogram of node:perf_hooks costs 55 ns, refuses 0, and does not tell its
 * buckets, which Prometheus wants.
 */
export class LatencyHistogram {
  readonly #buckets = new Float64Array(BUCKETS)
  #count = 0
  #sumMs = 0
  #maxMs = 0

  get count(): number {
    return this.#count
  }

  get sumMs(): number {
    return this.#sumMs
  }

  /** `times` durations of `ms`. A clock that went backwards, or a value that is not a number, counts as 0. */
  record(ms: number, times = 1): void {
    const duration = Number.isNaN(ms) ? 0 : Math.max(ms, 0)
    const index = bucketOf(duration)
    this.#buckets[index] = (this.#buckets[index] ?? 0) + times
    this.#count += times
    this.#sumMs += duration * times
    if (times > 0 && duration > this.#maxMs) this.#maxMs = duration
  }

  /**
   * For each bound (ascending, in milliseconds) how many values were at most that, except that those in the bucket of
   * a bound all count as at most the bound.
   */
  countsAtMost(boundsMs: readonly number[]): number[] {
    let sum = 0
    let next = 0
    return boundsMs.map((bound) => {
      // The first bucket holds everything below one unit, which is more than 0.
      if (bound <= 0) return 0
      if (bound * UNITS_PER_MS > CEILING) return this.#count
      for (const last = bucketOf(bound); next <= last; next++) sum += this.#buckets[next] ?? 0
      return sum
    })
  }

  snapshot(withBuckets = false): LatencySnapshot {
    return {
      ...(withBuckets && { buckets: this.#coarse() }),
      count: this.#count,
      p50Ms: this.#percentile(0.5),
      p90Ms: this.#percentile(0.9),
      p99Ms: this.#percentile(0.99),
      maxMs: this.#maxMs,
    }
  }

  add(other: LatencyHistogram): void {
    for (let index = 0; index < BUCKETS; index++) {
      this.#buckets[index] = (this.#buckets[index] ?? 0) + (other.#buckets[index] ?? 0)
    }
    this.#count += other.#count
    this.#sumMs += other.#sumMs
    this.#maxMs = Math.max(this.#maxMs, other.#maxMs)
  }

  /** What was recorded here and not yet in `earlier`, a former copy of this one. Its `maxMs` is that of all. */
  since(earlier: LatencyHistogram): LatencyHistogram {
    const grown = new LatencyHistogram()
    for (let index = 0; index < BUCKETS; index++) {
      grown.#buckets[index] = (this.#buckets[index] ?? 0) - (earlier.#buckets[index] ?? 0)
    }
    grown.#count = this.#count - earlier.#count
    grown.#sumMs = this.#sumMs - earlier.#sumMs
    grown.#maxMs = this.#maxMs
    return grown
  }

  #coarse(): number[] {
    const sums = this.countsAtMost(LATENCY_BOUNDS_MS.with(-1, Number.POSITIVE_INFINITY))
    const counts = sums.map((sum, i) => sum - (sums[i - 1] ?? 0))
    return counts.slice(0, counts.findLastIndex((count) => count > 0) + 1)
  }

  /** The middle of the bucket in which the value of that rank lies, never more than the greatest value. */
  #percentile(share: number): number {
    const rank = Math.ceil(this.#count * share)
    if (rank === 0) return 0
    let sum = 0
    let index = 0
    for (; index < BUCKETS - 1; index++) {
      sum += this.#buckets[index] ?? 0
      if (sum >= rank) break
    }
    return index === BUCKETS - 1 ? this.#maxMs : Math.min(this.#maxMs, middleOf(index))
  }
}

/** Upper bounds in bytes, of the size histograms of gRPC's OpenTelemetry metrics. */
export const SIZE_BOUNDS: readonly number[] = [
  0,
  ...[0, 1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22].map((i) => 1024 * 2 ** i),
]

/** Sizes in bytes, in the buckets that `SIZE_BOUNDS` ends and one for all that is larger. */
export class SizeHistogram {
  readonly #buckets = new Float64Array(SIZE_BOUNDS.length + 1)
  #count = 0
  #sum = 0

  get count(): number {
    return this.#count
  }

  get sum(): number {
    return this.#sum
  }

  record(bytes: number): void {
    let index = 0
    while (bytes > (SIZE_BOUNDS[index] ?? Number.POSITIVE_INFINITY)) index++
    this.#buckets[index] = (this.#buckets[index] ?? 0) + 1
    this.#count++
    this.#sum += bytes
  }

  /** For each of `SIZE_BOUNDS` how many values were at most that. */
  countsAtMost(): number[] {
    let sum = 0
    return SIZE_BOUNDS.map((_, index) => {
      sum += this.#buckets[index] ?? 0
      return sum
    })
  }
}

/** The first 16 buckets are one unit wide, every following 16 twice as wide as the 16 before. */
function bucketOf(ms: number): number {
  const scaled = ms * UNITS_PER_MS
  const units = scaled > CEILING ? CEILING : scaled | 0
  if (units < SUB_BUCKETS) return units
  const shift = 31 - Math.clz32(units) - SUB_BUCKET_BITS
  return ((shift + 1) << SUB_BUCKET_BITS) + ((units >>> shift) & (SUB_BUCKETS - 1))
}

function middleOf(index: number): number {
  if (index < SUB_BUCKETS) return (index + 0.5) / UNITS_PER_MS
  const width = 2 ** ((index >>> SUB_BUCKET_BITS) - 1)
  return (width * (SUB_BUCKETS + (index & (SUB_BUCKETS - 1)) + 0.5)) / UNITS_PER_MS
}

/** What is counted of one tier. `hits` and `misses` count ids, `latency` records round trips. */
export class TierMetrics {
  hits = 0
  misses = 0
  errors = 0
  timeouts = 0
  /** Asked at each snapshot. Set by whoever constructs the tier; `undefined`: it has no circuit breaker. */
  breaker: () => BreakerState | undefined = () => undefined
  readonly latency = new LatencyHistogram()
  /** How many reads this tier answered, by outcome. Raised by `Metrics.countRead`. */
  readonly reads: Record<ReadOutcome, number> = { HIT: 0, STALE: 0, NEGATIVE_HIT: 0, MISS: 0, BYPASS: 0 }
  /** Asked at each snapshot. Set by whoever constructs the tier. */
  gauges: () => TierGauges = () => ({ entries: 0, bytes: 0, evictions: 0, expirations: 0 })

  snapshot(withBuckets = false): TierSnapshot {
    const { entries, bytes, evictions, expirations } = this.gauges()
    return {
      hits: this.hits,
      misses: this.misses,
      errors: this.errors,
      timeouts: this.timeouts,
      breaker: this.breaker(),
      latency: this.latency.snapshot(withBuckets),
      entries,
      bytes,
      evictions,
      expirations,
    }
  }
}

/** What is counted of the calls of one method that ended with one status. */
export class EndedCalls {
  readonly latency = new LatencyHistogram()
  /** Bytes of all messages of a call, without the framing of gRPC. */
  readonly sent = new SizeHistogram()
  readonly received = new SizeHistogram()
}

/** What is counted of one gRPC method. A handler asks for it once (`Metrics.rpc`) and keeps it. */
export class RpcMetrics {
  readonly method: string
  started = 0
  readonly #byStatus = new Map<StatusName, EndedCalls>()

  constructor(method: string) {
    this.method = method
  }

  /** The finished calls by status; statuses that never occurred are absent. */
  get byStatus(): ReadonlyMap<StatusName, EndedCalls> {
    return this.#byStatus
  }

  /** A call that was `started` has ended after `ms` milliseconds, and so many bytes of messages. */
  finish(status: StatusName, ms: number, sentBytes = 0, receivedBytes = 0): void {
    let ended = this.#byStatus.get(status)
    if (ended === undefined) {
      ended = new EndedCalls()
      this.#byStatus.set(status, ended)
    }
    ended.latency.record(ms)
    ended.sent.record(sentBytes)
    ended.received.record(receivedBytes)
  }

  snapshot(withBuckets = false): RpcSnapshot {
    const all = new LatencyHistogram()
    const finished: Partial<Record<StatusName, number>> = {}
    for (const [status, { latency }] of this.#byStatus) {
      finished[status] = latency.count
      all.add(latency)
    }
    const latency = all.snapshot(withBuckets)
    return { method: this.method, started: this.started, finished, latency }
  }
}

/** What `Metrics` needs. */
export interface MetricsOptions {
  /** Full method names, with or without the leading slash. Calls of other methods are counted as `other`. */
  readonly methods: readonly string[]
  /** The wall clock: milliseconds since 1970. Default: `Date.now`. */
  readonly now?: () => number
  /** Tenants that are counted by name, the first that call; all others count as `other`. Default: 0. */
  readonly maxTenants?: number
}

/** Why calls are refused with RESOURCE_EXHAUSTED. */
export const REFUSAL_REASONS = [
  'RATE_LIMITED',
  'TOO_MANY_CALLS',
  'TOO_MUCH_UNSENT',
  'TOO_MUCH_IN_FLIGHT',
  'TOO_MANY_WATCHERS',
  'LOADS_BUSY',
  'POSTGRES_BUSY',
  'ORIGIN_BUSY',
  'ITEM_TOO_LARGE',
  'MESSAGE_TOO_LARGE',
] as const

/** What is counted of one tenant. */
export class TenantMetrics {
  /** Calls, those that were refused and look-ups of streams included. */
  calls = 0
  rateLimited = 0
}

const OTHER = 'other'

/** All counters of one running service. */
export class Metrics {
  readonly startTimeMs: number
  readonly tiers: Readonly<Record<TierName, TierMetrics>> = {
    memory: new TierMetrics(),
    redis: new TierMetrics(),
    postgres: new TierMetrics(),
    origin: new TierMetrics(),
  }
  /** Reads that ended without an answer. */
  failedReads = 0
  /** Flights that were started. */
  loads = 0
  /** Reads that joined a flight of another reader. */
  coalescedLoads = 0
  refreshesOk = 0
  refreshesFailed = 0
  invalidationsApplied = 0
  /** Calls and look-ups of streams that ended with INTERNAL: bugs. */
  internalErrors = 0
  /** Why stale copies were served. */
  readonly staleReads = { REVALIDATING: 0, SOFT_TIMEOUT: 0, TIER_DOWN: 0, UNVERIFIED: 0 }
  /** How often a tier's breaker has entered a state. */
  readonly breakerChanges: Readonly<Record<TierName, Record<BreakerState, number>>> = {
    memory: { CLOSED: 0, HALF_OPEN: 0, OPEN: 0 },
    redis: { CLOSED: 0, HALF_OPEN: 0, OPEN: 0 },
    postgres: { CLOSED: 0, HALF_OPEN: 0, OPEN: 0 },
    origin: { CLOSED: 0, HALF_OPEN: 0, OPEN: 0 },
  }
  /** Copies from Redis that the rule refused. */
  refusedRedisCopies = 0
  /** How long reads took that went through the caches, and those of keys that ITEMCACHE_ROLLOUT_PERCENT leaves out. */
  readonly cachedReads = new LatencyHistogram()
  readonly bypassedReads = new LatencyHistogram()
  /** What the consistency probe has found. */
  readonly probes = { consistent: 0, withinBound: 0, violation: 0 }
  /** From an invalidation being written, a moment before its commit, to its being applied here. */
  readonly invalidationLag = new LatencyHistogram()
  /** Invalidation streams that are open now. */
  subscribers = 0
  /** Calls that are open now, streams included. */
  openCalls = 0
  /** Unary calls of which a part of the answer has not left, or that have only begun. */
  openAnswers = 0
  /** How many there are now of what can grow; docs/limits.md has the bounds. Set by whoever constructs the service. */
  held: () => Readonly<Record<string, number>> = () => ({})
  gapsSent = 0

  readonly #rpcs = new Map<string, RpcMetrics>()
  readonly #otherRpcs = new RpcMetrics(OTHER)
  readonly #tenants = new Map<string, TenantMetrics>()
  readonly #otherTenants = new TenantMetrics()
  readonly #maxTenants: number
  readonly #refusals = new Map<string, number>(REFUSAL_REASONS.map((reason) => [reason, 0]))
  readonly #now: () => number

  constructor({ methods, now = Date.now, maxTenants = 0 }: MetricsOptions) {
    this.#now = now
    this.#maxTenants = maxTenants
    this.startTimeMs = now()
    for (const method of methods) this.#rpcs.set(bare(method), new RpcMetrics(bare(method)))
  }

  /** Every method of the construction, then `other`. */
  get rpcs(): readonly RpcMetrics[] {
    return [...this.#rpcs.values(), this.#otherRpcs]
  }

  /** The counters of a method by its full name, with or without the leading slash. */
  rpc(method: string): RpcMetrics {
    return this.#rpcs.get(bare(method)) ?? this.#otherRpcs
  }

  /** The counters of a tenant by its name, while there are not too many of them. */
  tenant(name: string): TenantMetrics {
    if (this.#maxTenants === 0) return this.#otherTenants
    const known = this.#tenants.get(name)
    if (known !== undefined) return known
    if (this.#tenants.size >= this.#maxTenants || name === OTHER) return this.#otherTenants
    const added = new TenantMetrics()
    this.#tenants.set(name, added)
    return added
  }

  /** The tenants that are counted by name, then `other`. */
  get tenants(): readonly (readonly [string, TenantMetrics])[] {
    return [...this.#tenants, [OTHER, this.#otherTenants]]
  }

  /** A call, or a look-up of a stream, has failed: counts the failures that operators want to know about. */
  countFailure({ code, reason }: ItemCacheError): void {
    if (code === 'internal') this.internalErrors++
    else if (code === 'exhausted') this.#refusals.set(reason, (this.#refusals.get(reason) ?? 0) + 1)
  }

  /** Calls that were refused with RESOURCE_EXHAUSTED, by reason. */
  get refusals(): ReadonlyMap<string, number> {
    return this.#refusals
  }

  /** One read was answered by `tier`. */
  countRead(tier: TierName, outcome: ReadOutcome): void {
    this.tiers[tier].reads[outcome]++
  }

  snapshot(withBuckets = false): MetricsSnapshot {
    const { memory, redis, postgres, origin } = this.tiers
    let reads = this.failedReads
    for (const tier of TIER_NAMES) {
      for (const outcome of READ_OUTCOMES) reads += this.tiers[tier].reads[outcome]
    }
    const staleServed = memory.reads.STALE + redis.reads.STALE
    const negativeHits = memory.reads.NEGATIVE_HIT + redis.reads.NEGATIVE_HIT
    const hits = memory.reads.HIT + redis.reads.HIT + staleServed + negativeHits
    return {
      startTimeMs: this.startTimeMs,
      timeMs: this.#now(),
      tiers: {
        memory: memory.snapshot(withBuckets),
        redis: redis.snapshot(withBuckets),
        postgres: postgres.snapshot(withBuckets),
        origin: origin.snapshot(withBuckets),
      },
      hits,
      misses: reads - hits,
      hitRate: reads === 0 ? 0 : hits / reads,
      loads: this.loads,
      coalescedLoads: this.coalescedLoads,
      staleServed,
      refreshesOk: this.refreshesOk,
      refreshesFailed: this.refreshesFailed,
      negativeHits,
      invalidationsApplied: this.invalidationsApplied,
      invalidationLag: this.invalidationLag.snapshot(withBuckets),
      subscribers: this.subscribers,
      gapsSent: this.gapsSent,
      rpcs: this.rpcs.map((rpc) => rpc.snapshot(withBuckets)),
    }
  }
}

function bare(method: string): string {
  return method.startsWith('/') ? method.slice(1) : method
}
