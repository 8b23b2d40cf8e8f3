/** The counters of `Metrics` and of the process as Prometheus text. The one file that knows prom-client. */
import {
  Counter,
  collectDefaultMetrics,
  Gauge,
  Histogram,
  type MetricObjectWithValues,
  type MetricValueWithName,
  Registry,
} from 'prom-client'
import {
  BREAKER_STATES,
  type LatencyHistogram,
  type Metrics,
  READ_OUTCOMES,
  TIER_NAMES,
  type TierMetrics,
} from './metrics.ts'

/** What `/metrics` answers. */
export interface Exposition {
  readonly contentType: string
  text(): Promise<string>
}

/**
 * Upper bounds in seconds, of the latency histograms of gRPC's OpenTelemetry metrics:
 * https://github.com/grpc/proposal/blob/master/A66-otel-stats.md
 */
const BOUNDS = [
  0, 0.00001, 0.00005, 0.0001, 0.0003, 0.0006, 0.0008, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01,
  0.013, 0.016, 0.02, 0.025, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65,
  0.8, 1, 2, 5, 10, 20, 50, 100,
]

const BOUNDS_MS = BOUNDS.map((seconds) => seconds * 1000)

type Labels = Readonly<Record<string, string>>
type Sample = readonly [Labels, number]

/**
 * A registry of its own for `metrics`. Labels are bounded: tiers, outcomes, statuses and the methods that `metrics` was
 * made with; never an id or a tenant. Observes the event loop and the garbage collector from now on.
 */
export function prometheusText(metrics: Metrics, version: string): Exposition {
  const registry = new Registry()
  const registers = [registry]
  collectDefaultMetrics({ register: registry })

  const counter = (name: string, help: string, labelNames: string[], samples: () => Iterable<Sample>) => {
    new Counter({
      name,
      help,
      labelNames,
      registers,
      collect() {
        this.reset()
        for (const [labels, value] of samples()) this.inc(labels, value)
      },
    })
  }
  const gauge = (name: string, help: string, labelNames: string[], samples: () => Iterable<Sample>) => {
    new Gauge({
      name,
      help,
      labelNames,
      registers,
      collect() {
        this.reset()
        for (const [labels, value] of samples()) this.set(labels, value)
      },
    })
  }
  const perTier = (value: (tier: TierMetrics) => number) => () =>
    TIER_NAMES.map((tier): Sample => [{ tier }, value(metrics.tiers[tier])])
  const total = (value: () => number) => (): Sample[] => [[{}, value()]]

  gauge('itemcache_build_info', 'Always 1; the label names the version.', ['version'], () => [
    [{ version }, 1],
  ])

  counter('itemcache_reads_total', 'Reads by outcome and answering tier.', ['outcome', 'tier'], () => [
    ...TIER_NAMES.flatMap((tier) =>
      READ_OUTCOMES.map(
        (outcome): Sample => [{ outcome: outcome.toLowerCase(), tier }, metrics.tiers[tier].reads[outcome]],
      ),
    ),
    [{ outcome: 'failed', tier: 'none' }, metrics.failedReads],
  ])

  new PulledHistogram(
    registry,
    'itemcache_read_latency_seconds',
    'Reads that were answered: through the caches, or past them as ITEMCACHE_ROLLOUT_PERCENT says.',
    ['path'],
    () => [
      [{ path: 'cached' }, metrics.cachedReads],
      [{ path: 'bypassed' }, metrics.bypassedReads],
    ],
  )

  counter(
    'itemcache_tier_hits_total',
    'Ids found in the tier.',
    ['tier'],
    perTier((tier) => tier.hits),
  )
  counter(
    'itemcache_tier_misses_total',
    'Ids not found in the tier.',
    ['tier'],
    perTier((tier) => tier.misses),
  )
  counter(
    'itemcache_tier_errors_total',
    'Failed calls of the tier.',
    ['tier'],
    perTier((tier) => tier.errors),
  )
  counter(
    'itemcache_tier_timeouts_total',
    'Calls of the tier that took too long.',
    ['tier'],
    perTier((tier) => tier.timeouts),
  )
  counter(
    'itemcache_tier_evictions_total',
    'Copies that made room for others.',
    ['tier'],
    perTier((tier) => tier.gauges().evictions),
  )
  counter(
    'itemcache_tier_expirations_total',
    'Copies whose time was over.',
    ['tier'],
    perTier((tier) => tier.gauges().expirations),
  )
  gauge(
    'itemcache_tier_entries',
    'Copies in the tier.',
    ['tier'],
    perTier((tier) => tier.gauges().entries),
  )
  gauge(
    'itemcache_tier_bytes',
    'Bytes that they take.',
    ['tier'],
    perTier((tier) => tier.gauges().bytes),
  )
  gauge('itemcache_tier_breaker_state', '1 for the state that the breaker is in.', ['tier', 'state'], () =>
    TIER_NAMES.flatMap((tier) =>
      BREAKER_STATES.map(
        (state): Sample => [
          { tier, state: state.toLowerCase() },
          metrics.tiers[tier].breaker() === state ? 1 : 0,
        ],
      ),
    ),
  )
  new PulledHistogram(registry, 'itemcache_tier_latency_seconds', 'Round trips to the tier.', ['tier'], () =>
    TIER_NAMES.map((tier) => [{ tier }, metrics.tiers[tier].latency]),
  )

  counter(
    'itemcache_loads_total',
    'Flights that were started.',
    [],
    total(() => metrics.loads),
  )
  counter(
    'itemcache_coalesced_loads_total',
    'Reads that joined a flight.',
    [],
    total(() => metrics.coalescedLoads),
  )
  counter('itemcache_refreshes_total', 'Reloads that no reader waited for, by result.', ['result'], () => [
    [{ result: 'ok' }, metrics.refreshesOk],
    [{ result: 'failed' }, metrics.refreshesFailed],
  ])
  counter(
    'itemcache_invalidations_applied_total',
    'Rows of the log that were applied.',
    [],
    total(() => metrics.invalidationsApplied),
  )
  new PulledHistogram(
    registry,
    'itemcache_invalidation_lag_seconds',
    'From an invalidation being written to its being applied here.',
    [],
    () => [[{}, metrics.invalidationLag]],
  )
  gauge(
    'itemcache_subscribers',
    'Invalidation streams that are open.',
    [],
    total(() => metrics.subscribers),
  )
  gauge('itemcache_held', 'How many there are now of what can grow: docs/limits.md.', ['what'], () =>
    Object.entries({ calls: metrics.openCalls, open_answers: metrics.openAnswers, ...metrics.held() }).map(
      ([what, value]): Sample => [{ what }, value],
    ),
  )
  counter(
    'itemcache_gaps_sent_total',
    'Gaps sent to subscribers.',
    [],
    total(() => metrics.gapsSent),
  )

  counter(
    'itemcache_redis_copies_refused_total',
    'Copies from Redis that were older than a known invalidation.',
    [],
    () => [[{}, metrics.refusedRedisCopies]],
  )
  counter(
    'itemcache_consistency_probes_total',
    'Cache hits that were compared with PostgreSQL, by result; violation should stay 0.',
    ['result'],
    () => [
      [{ result: 'consistent' }, metrics.probes.consistent],
      [{ result: 'within_bound' }, metrics.probes.withinBound],
      [{ result: 'violation' }, metrics.probes.violation],
    ],
  )
  counter('grpc_server_call_started_total', 'Calls that were started.', ['grpc_method'], () =>
    metrics.rpcs.map((rpc): Sample => [{ grpc_method: rpc.method }, rpc.started]),
  )
  new PulledHistogram(
    registry,
    'grpc_server_call_duration_seconds',
    'Calls that have ended, from their start to their status.',
    ['grpc_method', 'grpc_status'],
    () =>
      metrics.rpcs.flatMap((rpc) =>
        [...rpc.byStatus].map(
          ([grpc_status, latency]) => [{ grpc_method: rpc.method, grpc_status }, latency] as const,
        ),
      ),
  )

  return { contentType: registry.contentType, text: () => registry.metrics() }
}

/** A histogram that is not observed but read from `LatencyHistogram`s, at the moment when Prometheus asks. */
class PulledHistogram extends Histogram {
  readonly #describe: { readonly name: string; readonly help: string }
  readonly #read: () => Iterable<readonly [Labels, LatencyHistogram]>

  constructor(
    registry: Registry,
    name: string,
    help: string,
    labelNames: string[],
    read: () => Iterable<readonly [Labels, LatencyHistogram]>,
  ) {
    super({ name, help, labelNames, buckets: BOUNDS, registers: [registry] })
    this.#describe = { name, help }
    this.#read = read
  }

  override async get(): Promise<MetricObjectWithValues<MetricValueWithName<string>>> {
    const { name } = this.#describe
    const values: MetricValueWithName<string>[] = []
    for (const [labels, histogram] of this.#read()) {
      const counts = histogram.countsAtMost(BOUNDS_MS)
      for (const [index, le] of BOUNDS.entries()) {
        values.push({ metricName: `${name}_bucket`, labels: { le, ...labels }, value: counts[index] ?? 0 })
      }
      values.push(
        { metricName: `${name}_bucket`, labels: { le: '+Inf', ...labels }, value: histogram.count },
        { metricName: `${name}_sum`, labels, value: histogram.sumMs / 1000 },
        { metricName: `${name}_count`, labels, value: histogram.count },
      )
    }
    // The types have an enum of numbers where the library itself says 'histogram'.
    return { ...this.#describe, type: 'histogram' as never, values, aggregator: 'sum', collect: () => {} }
  }

  /** The registry prefers this method of `Histogram`, which the types do not name, to `get`. */
  getForPromString(): Promise<MetricObjectWithValues<MetricValueWithName<string>>> {
    return this.get()
  }
}
