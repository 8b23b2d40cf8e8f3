/**
 * The counters of `Metrics`, what the parts of the service say of themselves, and those of the process, as Prometheus
 * text. docs/metrics.md has the table of all. The one file that knows prom-client.
 */
import { totalmem } from 'node:os'
import { getHeapStatistics } from 'node:v8'
import { Counter, collectDefaultMetrics, Gauge, Registry } from 'prom-client'
import type { PostgresStats } from '../tiers/postgres.ts'
import type { RedisCounters, RedisServer } from '../tiers/redis.ts'
import type { TierName } from '../tiers/tier.ts'
import {
  BREAKER_STATES,
  type LatencyHistogram,
  type Metrics,
  READ_OUTCOMES,
  SIZE_BOUNDS,
  type SizeHistogram,
  TIER_NAMES,
  type TierGauges,
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
/** Cumulative counts, one for each bound, and count and sum of all. */
interface Distribution {
  readonly counts: readonly number[]
  readonly count: number
  readonly sum: number
}

/** What the parts of a service say of themselves. Asked at each scrape. */
export interface Parts {
  /** As `/readyz` says. */
  readonly ready: () => boolean
  /** Whether the servers of tiers answer. Those that are off are left out. */
  readonly up: () => Readonly<Partial<Record<TierName, boolean>>>
  readonly memory: { readonly maxEntries: number; readonly maxBytes: number }
  /** The bounds of what `Metrics.held` tells, where one more is refused. */
  readonly heldMax: Readonly<Record<string, number>>
  /** For how long nothing has been heard of the log that was heard of longest ago. */
  readonly logHeardAgeMs: () => number
  readonly postgres: () => PostgresStats
  /** `undefined`: Redis is off. */
  readonly redis:
    | { readonly counters: RedisCounters; readonly servers: () => Promise<readonly RedisServer[]> }
    | undefined
  /** Milliseconds since 1970; `undefined` without TLS. */
  readonly certificateEndsAtMs: () => number | undefined
}

/**
 * A registry of its own for `metrics`. Labels are bounded: tiers, outcomes, statuses, the methods that `metrics` was made
 * with, and as many tenants as it counts by name; never an id. Observes the event loop and the garbage collector from now
 * on.
 */
export function prometheusText(metrics: Metrics, version: string, parts?: Parts): Exposition {
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
  const gauge = (
    name: string,
    help: string,
    labelNames: string[],
    samples: () => Iterable<Sample> | Promise<Iterable<Sample>>,
  ) => {
    new Gauge({
      name,
      help,
      labelNames,
      registers,
      async collect() {
        const found = await samples()
        this.reset()
        // A gauge without labels is 0 after a reset, also when there is nothing to show.
        if (labelNames.length === 0) this.remove()
        for (const [labels, value] of found) this.set(labels, value)
      },
    })
  }
  const histograms: (() => string)[] = []
  const durations = (name: string, help: string, read: () => Iterable<readonly [Labels, LatencyHistogram]>) =>
    histograms.push(
      histogramText({ name, help, bounds: BOUNDS }, () =>
        Iterator.from(read()).map(([labels, latency]) => [
          labels,
          { counts: latency.countsAtMost(BOUNDS_MS), count: latency.count, sum: latency.sumMs / 1000 },
        ]),
      ),
    )
  const sizes = (name: string, help: string, read: () => Iterable<readonly [Labels, SizeHistogram]>) =>
    histograms.push(
      histogramText({ name, help, bounds: SIZE_BOUNDS }, () =>
        Iterator.from(read()).map(([labels, size]) => [
          labels,
          { counts: size.countsAtMost(), count: size.count, sum: size.sum },
        ]),
      ),
    )
  const perTier = (value: (tier: TierMetrics) => number) => () =>
    TIER_NAMES.map((tier): Sample => [{ tier }, value(metrics.tiers[tier])])
  /** Of the other tiers nobody knows what they hold. */
  const ofMemory = (value: (gauges: TierGauges) => number) => (): Sample[] => [
    [{ tier: 'memory' }, value(metrics.tiers.memory.gauges())],
  ]
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

  durations(
    'itemcache_read_latency_seconds',
    'Reads that were answered: through the caches, or past them as ITEMCACHE_ROLLOUT_PERCENT says.',
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
    ofMemory(({ evictions }) => evictions),
  )
  counter(
    'itemcache_tier_expirations_total',
    'Copies whose time was over.',
    ['tier'],
    ofMemory(({ expirations }) => expirations),
  )
  gauge(
    'itemcache_tier_entries',
    'Copies in the tier.',
    ['tier'],
    ofMemory(({ entries }) => entries),
  )
  gauge(
    'itemcache_tier_bytes',
    'Bytes that they take.',
    ['tier'],
    ofMemory(({ bytes }) => bytes),
  )
  const withBreaker = () => TIER_NAMES.filter((tier) => metrics.tiers[tier].breaker() !== undefined)
  gauge('itemcache_tier_breaker_state', '1 for the state that the breaker is in.', ['tier', 'state'], () =>
    withBreaker().flatMap((tier) =>
      BREAKER_STATES.map(
        (state): Sample => [
          { tier, state: state.toLowerCase() },
          metrics.tiers[tier].breaker() === state ? 1 : 0,
        ],
      ),
    ),
  )
  counter(
    'itemcache_tier_breaker_changes_total',
    'How often the breaker has entered the state.',
    ['tier', 'state'],
    () =>
      withBreaker().flatMap((tier) =>
        BREAKER_STATES.map(
          (state): Sample => [{ tier, state: state.toLowerCase() }, metrics.breakerChanges[tier][state]],
        ),
      ),
  )
  durations('itemcache_tier_latency_seconds', 'Round trips to the tier.', () =>
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
  durations(
    'itemcache_invalidation_lag_seconds',
    'From an invalidation being written to its being applied here.',
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
  const ended = () =>
    metrics.rpcs.flatMap((rpc) =>
      [...rpc.byStatus].map(
        ([grpc_status, calls]) => [{ grpc_method: rpc.method, grpc_status }, calls] as const,
      ),
    )
  durations(
    'grpc_server_call_duration_seconds',
    'Calls that have ended, from their start to their status.',
    () => ended().map(([labels, { latency }]) => [labels, latency]),
  )
  sizes(
    'grpc_server_call_sent_total_compressed_message_size_bytes',
    'Bytes of the messages that were sent in calls that have ended, framing left out.',
    () => ended().map(([labels, { sent }]) => [labels, sent]),
  )
  sizes(
    'grpc_server_call_rcvd_total_compressed_message_size_bytes',
    'Bytes of the messages that were received in calls that have ended, framing left out.',
    () => ended().map(([labels, { received }]) => [labels, received]),
  )

  counter('itemcache_refusals_total', 'Calls that were refused with RESOURCE_EXHAUSTED.', ['reason'], () =>
    [...metrics.refusals].map(([reason, value]): Sample => [{ reason: reason.toLowerCase() }, value]),
  )
  counter(
    'itemcache_internal_errors_total',
    'Calls that ended with INTERNAL: bugs.',
    [],
    total(() => metrics.internalErrors),
  )
  counter('itemcache_stale_reads_total', 'Stale copies that were served, by the reason.', ['reason'], () =>
    Object.entries(metrics.staleReads).map(
      ([reason, value]): Sample => [{ reason: reason.toLowerCase() }, value],
    ),
  )
  counter('itemcache_tenant_calls_total', 'Calls of the tenant, refused ones included.', ['tenant'], () =>
    metrics.tenants.map(([tenant, { calls }]): Sample => [{ tenant }, calls]),
  )
  counter(
    'itemcache_tenant_rate_limited_total',
    'Calls and look-ups that the rate limit refused the tenant.',
    ['tenant'],
    () => metrics.tenants.map(([tenant, { rateLimited }]): Sample => [{ tenant }, rateLimited]),
  )

  const memoryLimit = Math.min(totalmem(), process.constrainedMemory() || Number.POSITIVE_INFINITY)
  gauge(
    'itemcache_process_memory_limit_bytes',
    'What the process may use: the limit of its control group, or the memory of the machine.',
    [],
    total(() => memoryLimit),
  )
  const heapLimit = getHeapStatistics().heap_size_limit
  gauge(
    'itemcache_process_heap_limit_bytes',
    'What the heap of V8 may grow to.',
    [],
    total(() => heapLimit),
  )
  if (parts !== undefined) showParts(parts)

  function showParts({ ready, up, memory, heldMax, logHeardAgeMs, postgres, redis, ...others }: Parts): void {
    gauge(
      'itemcache_ready',
      '1 when the instance can do its work, as /readyz says.',
      [],
      total(() => Number(ready())),
    )
    gauge('itemcache_tier_up', '1 when the server of the tier answers.', ['tier'], () =>
      Object.entries(up()).map(([tier, answers]): Sample => [{ tier }, Number(answers)]),
    )
    gauge('itemcache_tier_entries_max', 'Most copies in the tier.', ['tier'], () => [
      [{ tier: 'memory' }, memory.maxEntries],
    ])
    gauge('itemcache_tier_bytes_max', 'Most bytes that they may take.', ['tier'], () => [
      [{ tier: 'memory' }, memory.maxBytes],
    ])
    gauge('itemcache_held_max', 'At how many one more is refused.', ['what'], () =>
      Object.entries(heldMax).map(([what, value]): Sample => [{ what }, value]),
    )
    gauge(
      'itemcache_log_heard_age_seconds',
      'For how long nothing was heard of the log, of the tenant that was heard of longest ago.',
      [],
      total(() => logHeardAgeMs() / 1000),
    )

    const pools = () => Object.entries(postgres().connections)
    gauge('itemcache_postgres_connections', 'Connections to PostgreSQL.', ['pool', 'state'], () =>
      pools().flatMap(([pool, { total, idle }]): Sample[] => [
        [{ pool, state: 'idle' }, idle],
        [{ pool, state: 'busy' }, total - idle],
      ]),
    )
    gauge('itemcache_postgres_connections_max', 'Most connections of the pool.', ['pool'], () =>
      pools().map(([pool, { max }]): Sample => [{ pool }, max]),
    )
    counter('itemcache_postgres_statements_total', 'Statements sent to PostgreSQL.', ['purpose'], () =>
      Object.entries(postgres().statements).map(([purpose, value]): Sample => [{ purpose }, value]),
    )
    counter(
      'itemcache_postgres_retries_total',
      'Transactions repeated after a deadlock or a serialisation failure.',
      [],
      total(() => postgres().retries),
    )

    if (redis !== undefined) showRedis(redis)
    gauge(
      'itemcache_tls_certificate_expiry_timestamp_seconds',
      'When the certificate of the gRPC server ends, in seconds since 1970.',
      [],
      () => {
        const endsAtMs = others.certificateEndsAtMs()
        return endsAtMs === undefined ? [] : [[{}, endsAtMs / 1000]]
      },
    )
  }

  function showRedis({ counters, servers }: NonNullable<Parts['redis']>): void {
    counter(
      'itemcache_redis_round_trips_total',
      'Pipelines sent to Redis.',
      [],
      total(() => counters.roundTrips),
    )
    counter(
      'itemcache_redis_corrupt_total',
      'Values in Redis that were damaged: each was a miss.',
      [],
      total(() => counters.corrupt),
    )
    // All metrics of a scrape are collected at once: so they share what the servers are asked.
    let asking: Promise<readonly RedisServer[]> | undefined
    const ask = () => {
      asking ??= servers().finally(() => {
        asking = undefined
      })
      return asking
    }
    const perServer = (value: (server: RedisServer) => number | undefined) => async () =>
      (await ask()).flatMap((server): Sample[] => {
        const shown = value(server)
        return shown === undefined ? [] : [[{ node: server.node }, shown]]
      })
    gauge(
      'itemcache_redis_connected_clients',
      'Connections of all clients to Redis.',
      ['node'],
      perServer((server) => server.connectedClients),
    )
    gauge(
      'itemcache_redis_max_clients',
      'Connections that Redis allows.',
      ['node'],
      perServer((server) => server.maxClients),
    )
    gauge(
      'itemcache_redis_memory_used_bytes',
      'Memory that Redis uses.',
      ['node'],
      perServer((server) => server.usedBytes),
    )
    gauge(
      'itemcache_redis_memory_max_bytes',
      'Its maxmemory, if it has one.',
      ['node'],
      perServer((server) => server.maxBytes),
    )
    gauge(
      'itemcache_redis_evicts',
      '1 when Redis makes room for new copies, 0 when it refuses them at its maxmemory.',
      ['node'],
      perServer((server) => Number(server.evicts)),
    )
  }

  return {
    contentType: registry.contentType,
    text: async () => (await registry.metrics()) + histograms.map((text) => text()).join(''),
  }
}

/** What a histogram is. `bounds` are ascending upper bounds. */
interface HistogramShape {
  readonly name: string
  readonly help: string
  readonly bounds: readonly number[]
}

/**
 * Writes a histogram that is read from those of `Metrics` when Prometheus asks. There may be thousands of buckets, and
 * whoever is to be served meanwhile waits; prom-client, which makes each line anew, takes three times as long. Labels are
 * constants, and need no escaping.
 */
function histogramText(
  { name, help, bounds }: HistogramShape,
  read: () => Iterable<readonly [Labels, Distribution]>,
): () => string {
  const beginnings = new Map<string, readonly string[]>()
  const beginningsOf = (labels: string) => {
    let found = beginnings.get(labels)
    if (found === undefined) {
      const rest = labels === '' ? '' : `,${labels}`
      found = [...bounds, '+Inf'].map((le) => `${name}_bucket{le="${le}"${rest}} `)
      beginnings.set(labels, found)
    }
    return found
  }
  return () => {
    let text = `# HELP ${name} ${help}\n# TYPE ${name} histogram\n`
    for (const [labels, { counts, count, sum }] of read()) {
      const all = Object.entries(labels)
        .map(([label, value]) => `${label}="${value}"`)
        .join(',')
      for (const [i, beginning] of beginningsOf(all).entries()) text += `${beginning}${counts[i] ?? count}\n`
      const braces = all === '' ? '' : `{${all}}`
      text += `${name}_sum${braces} ${sum}\n${name}_count${braces} ${count}\n`
    }
    return text
  }
}
