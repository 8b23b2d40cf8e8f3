/**
 * The last minutes of a service, second by second, for its live page: a row of numbers a second, in a ring of fixed size.
 * It is kept whether anybody looks or not, so that it is there when somebody opens the page after an incident; a second
 * costs some microseconds, and what is counted costs nothing more than before.
 */
import type { Outage, Part, RpcRow, Sample } from './live-message.ts'
import { LatencyHistogram, type Metrics, READ_OUTCOMES, type RpcMetrics, TIER_NAMES } from './metrics.ts'

/** How far back the history goes, in seconds and samples. */
export const HISTORY_SECONDS = 300

/** A look-up in memory takes less than the clock costs, so it is not timed. */
const TIMED_TIERS = ['redis', 'postgres', 'origin'] as const

/** The numbers of a sample, in their order. `live-message.ts` has their units. */
export const COLUMNS: readonly string[] = [
  'time',
  // Reads that each tier answered, and those that nobody did.
  ...TIER_NAMES.map((tier) => `reads.${tier}`),
  'reads.failed',
  // The share of reads that memory or Redis answered.
  'hits.all',
  // The share of look-ups in each tier that found something.
  ...TIER_NAMES.map((tier) => `hits.${tier}`),
  // Rows of the log that were applied.
  'invalidations',
  // Whole reads; round trips to the tiers; from a row of the log being written to its being applied here.
  ...['all', ...TIMED_TIERS, 'lag'].flatMap((what) => [`p50.${what}`, `p99.${what}`]),
]

const MAX_OUTAGES = 20
const MAX_RPCS = 12
/** Two windows of this length follow each other, so that what is told is of the last one to two. */
const RPC_WINDOW_MS = 30_000

/** What the history is made of. */
export interface HistoryOptions {
  readonly metrics: Metrics
  /** The state of what may fail; asked once a second. */
  readonly parts: () => readonly Part[]
  /** The wall clock: milliseconds since 1970. */
  readonly now: () => number
}

export class History {
  readonly #options: HistoryOptions
  readonly #ring = new Float64Array(HISTORY_SECONDS * COLUMNS.length)
  /** Samples that were taken since the start. */
  #taken = 0
  #takenAtMs: number
  #before: readonly number[]
  readonly #latencies: readonly Growth[]
  readonly #outages: Outage[] = []
  #rpcsBefore: RpcMark
  #rpcsLately: RpcMark

  constructor(options: HistoryOptions) {
    const { metrics, now } = options
    this.#options = options
    this.#takenAtMs = now()
    this.#before = countersOf(metrics)
    this.#latencies = [
      metrics.cachedReads,
      ...TIMED_TIERS.map((tier) => metrics.tiers[tier].latency),
      metrics.invalidationLag,
    ].map((histogram) => new Growth(histogram))
    this.#rpcsBefore = new RpcMark(metrics, this.#takenAtMs)
    this.#rpcsLately = this.#rpcsBefore
  }

  /** Takes the sample of the time since the last one. To be called once a second. */
  take(): void {
    const { metrics, now } = this.#options
    const timeMs = now()
    const counters = countersOf(metrics)
    const grown = counters.map((value, i) => value - (this.#before[i] ?? 0))
    // A clock that was set back must not make rates negative.
    const seconds = Math.max(timeMs - this.#takenAtMs, 1) / 1000
    const rate = (count = 0) => count / seconds
    const [memory, redis, postgres, origin, failed, hits = 0, invalidations, ...lookUps] = grown
    const answered = [memory, redis, postgres, origin, failed]
    const reads = answered.reduce<number>((sum, count = 0) => sum + count, 0)
    const row = [
      timeMs,
      ...answered.map(rate),
      share(hits, reads),
      ...TIER_NAMES.map((_, i) => share(lookUps[2 * i], lookUps[2 * i + 1])),
      rate(invalidations),
      ...this.#latencies.flatMap((latency) => latency.take()),
    ]
    this.#ring.set(row, (this.#taken % HISTORY_SECONDS) * COLUMNS.length)
    this.#taken++
    this.#takenAtMs = timeMs
    this.#before = counters
    this.noteOutages()
    if (timeMs - this.#rpcsLately.timeMs >= RPC_WINDOW_MS) {
      this.#rpcsBefore = this.#rpcsLately
      this.#rpcsLately = new RpcMark(metrics, timeMs)
    }
  }

  /** The oldest first. */
  samples(): Sample[] {
    const count = Math.min(this.#taken, HISTORY_SECONDS)
    return Array.from({ length: count }, (_, i) => this.#sample(this.#taken - count + i))
  }

  /** The newest sample; `undefined` before the first. */
  get newest(): Sample | undefined {
    return this.#taken === 0 ? undefined : this.#sample(this.#taken - 1)
  }

  /** The oldest first. */
  get outages(): readonly Outage[] {
    return this.#outages
  }

  /** Looks at the parts now, rather than with the next sample. */
  noteOutages(): void {
    const timeMs = this.#options.now()
    for (const { name, state, breaker = 'CLOSED' } of this.#options.parts()) {
      const what = state === 'down' ? 'down' : breaker === 'CLOSED' ? undefined : 'failing'
      const at = this.#outages.findLastIndex(({ part }) => part === name)
      const last = this.#outages[at]
      const lasts = last !== undefined && last.untilMs === undefined
      if (what === undefined) {
        if (lasts) this.#outages[at] = { ...last, untilMs: timeMs }
      } else if (!lasts) {
        this.#outages.push({ part: name, what, sinceMs: timeMs })
        if (this.#outages.length > MAX_OUTAGES) this.#forgetOne()
      } else if (last.what !== what && what === 'down') {
        this.#outages[at] = { ...last, what }
      }
    }
  }

  /** The oldest that is over, so that one that lasts keeps its beginning. */
  #forgetOne(): void {
    const over = this.#outages.findIndex(({ untilMs }) => untilMs !== undefined)
    this.#outages.splice(Math.max(0, over), 1)
  }

  /** The methods that were called most in the last 30 to 60 s. */
  rpcs(): RpcRow[] {
    const { metrics, now } = this.#options
    return this.#rpcsBefore.rowsSince(metrics, now()).slice(0, MAX_RPCS)
  }

  #sample(index: number): Sample {
    const from = (index % HISTORY_SECONDS) * COLUMNS.length
    const [timeMs = 0, ...numbers] = this.#ring.subarray(from, from + COLUMNS.length)
    return [timeMs, ...numbers.map((value) => (Number.isNaN(value) ? null : Number(value.toPrecision(4))))]
  }
}

/** Reads by answering tier, failed ones, hits, rows applied; then look-ups that found something and all, tier by tier. */
function countersOf(metrics: Metrics): number[] {
  const { memory, redis } = metrics.tiers
  const hits = [memory, redis].flatMap(({ reads }) => [reads.HIT, reads.STALE, reads.NEGATIVE_HIT])
  return [
    ...TIER_NAMES.map((tier) =>
      READ_OUTCOMES.reduce((sum, outcome) => sum + metrics.tiers[tier].reads[outcome], 0),
    ),
    metrics.failedReads,
    hits.reduce((sum, count) => sum + count, 0),
    metrics.invalidationsApplied,
    ...TIER_NAMES.flatMap((tier) => {
      const { hits, misses } = metrics.tiers[tier]
      return [hits, hits + misses]
    }),
  ]
}

function share(part = 0, whole = 0): number {
  return whole === 0 ? Number.NaN : part / whole
}

/** What has been recorded in a histogram since it was last looked at. */
class Growth {
  readonly #histogram: LatencyHistogram
  readonly #known = new LatencyHistogram()

  constructor(histogram: LatencyHistogram) {
    this.#histogram = histogram
    this.#known.add(histogram)
  }

  /** p50 and p99 in milliseconds; not a number when nothing was recorded. */
  take(): [p50Ms: number, p99Ms: number] {
    if (this.#histogram.count === this.#known.count) return [Number.NaN, Number.NaN]
    const grown = this.#histogram.since(this.#known)
    this.#known.add(grown)
    const { p50Ms, p99Ms } = grown.snapshot()
    return [p50Ms, p99Ms]
  }
}

/** What all methods had counted at one moment. */
class RpcMark {
  readonly timeMs: number
  readonly #methods = new Map<
    string,
    { readonly started: number; readonly ended: LatencyHistogram; readonly failed: Record<string, number> }
  >()

  constructor(metrics: Metrics, timeMs: number) {
    this.timeMs = timeMs
    for (const rpc of metrics.rpcs) {
      if (rpc.started > 0) this.#methods.set(rpc.method, { started: rpc.started, ...endedOf(rpc) })
    }
  }

  rowsSince(metrics: Metrics, timeMs: number): RpcRow[] {
    const seconds = Math.max(timeMs - this.timeMs, 1000) / 1000
    const rows: RpcRow[] = []
    for (const rpc of metrics.rpcs) {
      const before = this.#methods.get(rpc.method)
      const { ended, failed } = endedOf(rpc)
      const { count, p50Ms, p99Ms } =
        before === undefined ? ended.snapshot() : ended.since(before.ended).snapshot()
      const started = rpc.started - (before?.started ?? 0)
      if (started === 0 && count === 0) continue
      const rates = Object.entries(failed).map(
        ([name, sum]) => [name, (sum - (before?.failed[name] ?? 0)) / seconds] as const,
      )
      rows.push({
        method: rpc.method.slice(rpc.method.lastIndexOf('/') + 1),
        perSecond: started / seconds,
        failed: Object.fromEntries(rates.filter(([, perSecond]) => perSecond > 0)),
        ...(count > 0 && { p50Ms, p99Ms }),
      })
    }
    return rows.sort((a, b) => b.perSecond - a.perSecond)
  }
}

function endedOf(rpc: RpcMetrics) {
  const ended = new LatencyHistogram()
  const failed: Record<string, number> = {}
  for (const [name, { latency }] of rpc.byStatus) {
    ended.add(latency)
    if (name !== 'OK') failed[name] = latency.count
  }
  return { ended, failed }
}
