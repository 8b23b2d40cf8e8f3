/** The composition root: constructs everything, in the order in which it is needed, and disposes it in reverse. */
import { setTimeout as sleep } from 'node:timers/promises'
import { type Config, formatAddress, type HostPort, isLoopback, withoutPasswords } from './config.ts'
import { startCatalogue } from './embedded/catalogue.ts'
import { startPostgres } from './embedded/postgres.ts'
import { startRedis } from './embedded/redis.ts'
import { ItemCacheError } from './errors.ts'
import { Subscriptions } from './invalidation/subscriptions.ts'
import { Tail } from './invalidation/tail.ts'
import { startAdmin } from './observe/admin.ts'
import { Feed } from './observe/feed.ts'
import { History } from './observe/history.ts'
import type { MemoryUse, Part } from './observe/live-message.ts'
import { LivePage } from './observe/live-page.ts'
import { changeLevel, type Logger } from './observe/log.ts'
import { Metrics } from './observe/metrics.ts'
import { prometheusText } from './observe/prometheus.ts'
import { RequestLog } from './observe/request-log.ts'
import type { RunningTracing } from './observe/tracing-sdk.ts'
import { startAuth } from './rpc/auth.ts'
import { inspectJson } from './rpc/inspect-message.ts'
import { RateLimit } from './rpc/rate-limit.ts'
import { RPC_METHODS, startGrpcServer } from './rpc/server.ts'
import { TlsCredentials } from './rpc/tls.ts'
import { Unsent } from './rpc/unsent.ts'
import { MAX_FLIGHTS } from './service/flights.ts'
import type { InspectedParts } from './service/inspect.ts'
import { Probe } from './service/probe.ts'
import { Reader } from './service/read.ts'
import { Writer } from './service/write.ts'
import { type BreakerState, GuardedOrigin, GuardedRedis, GuardedStore } from './tiers/guard.ts'
import { MemoryTier } from './tiers/memory.ts'
import { FakeStoreOrigin } from './tiers/origin.ts'
import { connectPostgres, type PostgresTier } from './tiers/postgres.ts'
import { REDIS_OFF, type RedisServer, RedisTier } from './tiers/redis.ts'
import { describeRedis } from './tiers/redis-url.ts'
import type { LogSource, TierName } from './tiers/tier.ts'

/** A running service. Disposing it drains the calls under way and stops what it started. */
export interface App extends AsyncDisposable {
  /** Where gRPC is served, with the port that was really bound. */
  readonly address: HostPort
  /** Where health, metrics and the live page are served over HTTP; `undefined` when that is off. */
  readonly admin: HostPort | undefined
  /** Whether there is a live page. */
  readonly livePage: boolean
  /** What each tier is, in words for the start banner. */
  readonly tiers: Readonly<Record<TierName, string>>
  /** What callers need, for the examples of the start banner. */
  readonly needs: { readonly tls: boolean; readonly credential: boolean }
  /** What else an operator should know. */
  readonly notes: readonly string[]
  readonly metrics: Metrics
  /**
   * Reads certificates, tokens and keys of issuers again, if there are any. What is wrong with them is logged, and the
   * former stay.
   */
  readonly reload: () => void
}

/** What the outside world gives to a service. */
export interface AppOptions {
  readonly log: Logger
  /** Ends a start that waits for PostgreSQL. */
  readonly signal?: AbortSignal
  /** Told about the steps of a start that may take long. */
  readonly progress?: (line: string) => void
  /** Monotonic, milliseconds. Default: `performance.now`. */
  readonly now?: () => number
  /** Uniform in [0, 1). Default: `Math.random`. */
  readonly random?: () => number
}

/** What a database that is still starting looks like. */
const STARTING: ReadonlySet<string> = new Set([
  'POSTGRES_UNAVAILABLE',
  'POSTGRES_TIMEOUT',
  'POSTGRES_LOCK_TIMEOUT',
])
/** How long a start waits for a PostgreSQL that does not answer yet. */
const POSTGRES_PATIENCE_MS = 30_000
/** The heartbeat and safety net of the tail: well within the 1.5 s that a view may go without news. */
const POLL_MS = 500
/** A tenant that nobody reads for this long is no longer followed. */
const TENANT_IDLE_MS = 300_000
/** How long a start waits for Redis. */
const REDIS_PATIENCE_MS = 1_000
/** Pipelines that are under way at once; each has a timeout. More are not sent: PostgreSQL is asked. */
const MAX_REDIS_CALLS = 1_000
/** How long a stop waits for loads and stores that no caller waits for any more: an origin may take its time. */
const SETTLE_PATIENCE_MS = 500
const TRIM_STEP_ROWS = 1_000
const TRIM_BUSY_MS = 100
const TRIM_IDLE_MS = 60_000
const HEALTH_INTERVAL_MS = 1_000
const HEALTH_PATIENCE_MS = 2_000
/** How often Redis is asked what it takes, while somebody looks. */
const REDIS_MEMORY_MS = 5_000
/** How often the files of TLS are looked at. */
const TLS_INTERVAL_MS = 5_000

/** Starts the service. Throws an `ItemCacheError` whose message tells the operator what is wrong. */
export async function startApp(config: Config, options: AppOptions): Promise<App> {
  const { log, progress = () => {}, now = () => performance.now(), random = Math.random } = options
  const { ttl, timeouts, pools, bounds } = config
  await using started = new AsyncDisposableStack()
  const metrics = new Metrics({ methods: RPC_METHODS, maxTenants: config.metricsTenants })
  // First, since these are mistakes of the operator's that need no server to be found.
  const auth = startAuth(config.auth, { log })
  const tls = config.tls && new TlsCredentials(config.tls, log)

  const servers = await startServers(config, started, progress)
  const postgres = started.use(
    await patiently(options.signal, progress, () =>
      connectPostgres({
        url: servers.postgres.url,
        maxConnections: pools.postgres,
        connectTimeoutMs: timeouts.postgresConnectMs,
        statementTimeoutMs: timeouts.postgresStatementMs,
        maxWaiting: pools.postgresQueue,
        random,
        onConnectionError: (error) => log.warn({ err: error }, 'a PostgreSQL connection broke'),
      }),
    ),
  )

  const sdk = config.tracing && (await startTracing(config, config.tracing, servers, log))
  const tracing = sdk?.tracing

  const notes = [...servers.notes]
  const note = (text: string) => {
    notes.push(text)
    log.warn(text)
  }
  const role = await postgres.rolePastRowSecurity()
  if (role !== undefined) {
    note(
      `Row level security does not hold the role ${role} of DATABASE_URL: use one without SUPERUSER and BYPASSRLS.`,
    )
  }

  const memory = new MemoryTier({
    enabled: config.memory.enabled,
    maxEntries: config.memory.maxEntries,
    maxBytes: config.memory.maxBytes,
    tenantShare: config.memory.tenantShare,
    maxStaleMs: ttl.maxStaleMs,
    jitter: ttl.jitter,
    now,
    random,
  })
  // There is no page yet.
  let tellPage = () => {}
  const guard = (tier: 'redis' | 'postgres' | 'origin') => ({
    ...config.breaker,
    onStateChange: (state: BreakerState, shard: string) => {
      metrics.breakerChanges[tier][state]++
      const which = { tier, breaker: state, ...(shard !== '' && { shard }) }
      if (state === 'CLOSED') log.info(which, 'the circuit breaker is closed')
      else log.warn(which, 'the circuit breaker is not closed')
      tellPage()
    },
  })
  const connected =
    servers.redis.url === undefined
      ? undefined
      : started.use(
          new RedisTier({
            url: servers.redis.url,
            prefix: `${await postgres.systemId()}-${config.redisEpoch}`,
            now,
            random,
            ttlMs: ttl.redisMs,
            jitter: ttl.jitter,
            lockTtlMs: timeouts.lockMs,
            commandTimeoutMs: timeouts.redisMs,
            onStateChange: (state, reason) => {
              if (state === 'ready') log.info({ tier: 'redis' }, 'Redis is ready')
              else log.warn({ tier: 'redis', reason }, 'Redis is down: the service goes on without it')
              tellPage()
            },
          }),
        )
  // So that the banner can tell its state; a Redis that is slow to answer holds nobody up for long.
  if (connected !== undefined) await Promise.race([connected.settled(), sleep(REDIS_PATIENCE_MS)])
  const redis =
    connected &&
    started.use(
      new GuardedRedis(connected, {
        ...guard('redis'),
        maxCalls: MAX_REDIS_CALLS,
        slowMs: config.breaker.redisSlowMs,
      }),
    )
  const store = started.use(
    new GuardedStore(postgres, {
      ...guard('postgres'),
      maxCalls: Math.ceil(pools.postgres / 2) + pools.postgresQueue,
    }),
  )
  const origin =
    servers.origin.url === undefined
      ? undefined
      : started.use(
          new GuardedOrigin(
            new FakeStoreOrigin({
              url: servers.origin.url,
              timeoutMs: timeouts.originMs,
              overallMs: 2 * timeouts.originMs,
              maxConcurrent: pools.originConcurrency,
              random,
            }),
            guard('origin'),
          ),
        )
  const tail = started.use(
    new Tail({
      source: postgres,
      metrics,
      log,
      tracing,
      now,
      pollMs: POLL_MS,
      maxTenants: bounds.tenants,
      maxFloors: bounds.floorsPerTenant,
      maxTotalFloors: 10 * bounds.floorsPerTenant,
      idleMs: TENANT_IDLE_MS,
      exclusive: (tenant, section) => memory.exclusive(tenant, section),
    }),
  )
  const subscriptions = new Subscriptions({
    tail,
    source: postgres,
    metrics,
    limits: { ...config.subscriptions, tenants: bounds.tenants },
  })
  await tail.start()
  started.use(keepTrimmed(postgres, config.retention, log))
  observe(metrics, memory)
  metrics.tiers.redis.breaker = () => redis?.state
  metrics.tiers.postgres.breaker = () => store.state
  metrics.tiers.origin.breaker = () => origin?.state

  const rateLimit =
    config.rateLimit &&
    new RateLimit({
      ...config.rateLimit,
      maxTenants: bounds.tenants,
      now,
      onRefused: (tenant) => metrics.tenant(tenant).rateLimited++,
    })
  const probe = new Probe({ postgres, metrics, log, now, random, oneIn: config.probeOneIn })
  const caches = { memory, redis: redis ?? REDIS_OFF, locks: redis }
  const parts = { probe, ...caches, postgres: store, origin, tail, metrics, tracing }
  const reader = new Reader(parts, {
    freshForMs: ttl.freshForMs,
    negativeTtlMs: ttl.negativeMs,
    jitter: ttl.jitter,
    maxStaleMs: ttl.maxStaleMs,
    softTimeoutMs: timeouts.softMs,
    refreshTimeoutMs: timeouts.refreshMs,
    failureTtlMs: ttl.failureMs,
    lockTtlMs: timeouts.lockMs,
    earlyRefresh: ttl.earlyRefresh,
    // Of the connections for reads two are left for others.
    largeReads: Math.max(1, Math.ceil(pools.postgres / 2) - 2),
    rolloutPercent: config.rolloutPercent,
    now,
    random,
  })
  // Its last spans are sent when what goes on behind answers has settled.
  if (sdk !== undefined) started.use(sdk)
  started.defer(() => Promise.race([reader.settled(), sleep(SETTLE_PATIENCE_MS, undefined, { ref: false })]))
  const writer = new Writer({ reader, postgres: store, origin, tail })

  let draining = false
  let postgresAnswers = true
  const isServing = () => postgresAnswers || connected?.state === 'ready' || memory.stats().entries > 0
  const unsent = new Unsent(config.grpc.maxAnswerMemoryBytes)
  const page =
    config.admin === undefined || config.livePage.to === 'nobody'
      ? undefined
      : started.use(
          livePage(config, log, {
            metrics,
            memory,
            connected,
            redis,
            store,
            origin,
            tail,
            subscriptions,
            unsent,
            inspected: parts,
            health: () => ({ ready: isServing() && !draining, draining, postgresAnswers }),
          }),
        )
  if (page !== undefined) tellPage = () => page.changed()
  const admin =
    config.admin &&
    started.use(
      await startAdmin({
        ...config.admin,
        metrics: prometheusText(metrics, config.version, {
          ready: () => isServing() && !draining,
          up: () => ({ ...(connected && { redis: connected.state === 'ready' }), postgres: postgresAnswers }),
          memory: config.memory,
          heldMax: {
            calls: config.grpc.maxCalls,
            open_answers: config.grpc.maxCalls,
            streams: 2 * config.grpc.maxCalls,
            unsent_bytes: config.grpc.maxAnswerMemoryBytes,
            flights: MAX_FLIGHTS,
            waiting_reads: pools.postgresQueue,
            waiting_writes: pools.postgresQueue,
            rings: bounds.tenants,
          },
          logHeardAgeMs: () => tail.heardAgeMs(),
          postgres: () => postgres.stats,
          redis: connected && { counters: connected.counters, servers: () => connected.servers() },
          certificateEndsAtMs: () => tls?.endsAtMs,
        }),
        page,
        ready: async () => ({
          ready: isServing() && !draining,
          detail: {
            draining,
            memory: { entries: memory.stats().entries },
            redis: connected?.state ?? 'off',
            postgres: postgresAnswers ? 'ready' : 'down',
            origin: origin === undefined ? 'off' : 'on',
            breakers: { redis: redis?.state, postgres: store.state, origin: origin?.state },
          },
        }),
        logLevel: { get: () => log.level, set: (level) => changeLevel(log, level) },
        onError: (error) => log.error({ err: error }, 'the admin server failed'),
      }),
    )
  const grpc = await startGrpcServer(
    {
      listen: config.listen,
      grpc: config.grpc,
      reflection: config.reflection,
      tls,
      frame: {
        log,
        requests: new RequestLog({ log, ...config.requestLog, now, random }),
        tracing,
        metrics,
        auth,
        rateLimit,
        now,
        maxDeadlineMs: timeouts.maxDeadlineMs,
        maxCalls: config.grpc.maxCalls,
        unsent,
      },
    },
    { reader, writer, postgres: store, subscriptions, inspected: parts },
  )
  tracing?.serves(grpc.address)
  metrics.held = () => ({
    unsent_bytes: unsent.bytes,
    streams: grpc.streams(),
    health_names: grpc.watchedNames(),
    ...reader.held(),
    ...tail.held(),
    ...subscriptions.held(),
    tenant_locks: memory.stats().tenantsInUse,
    waiting_reads: postgres.stats.connections.read.waiting,
    waiting_writes: postgres.stats.connections.write.waiting,
    rate_limit_tenants: rateLimit?.tenants ?? 0,
    live_pages: page?.listeners ?? 0,
  })
  started.defer(async () => {
    log.info('draining')
    draining = true
    await grpc.drain(timeouts.drainMs)
  })
  started.use(
    watchPostgres(postgres, (answers) => {
      const changed = answers !== postgresAnswers
      if (changed) {
        if (answers) log.info({ tier: 'postgres' }, 'PostgreSQL answers again')
        else log.warn({ tier: 'postgres' }, 'PostgreSQL does not answer: warm items are still served')
      }
      postgresAnswers = answers
      if (changed) tellPage()
      grpc.setServing(isServing())
    }),
  )

  if (tls !== undefined) started.use(every(TLS_INTERVAL_MS, () => tls.reload()))
  const exposed = [config.listen, ...(config.admin ? [config.admin] : [])].some(
    ({ host }) => !isLoopback(host),
  )
  if (exposed && config.insecure) note(OPEN)

  const running = started.move()
  return {
    address: grpc.address,
    admin: admin?.address,
    livePage: page !== undefined,
    tiers: {
      memory: config.memory.enabled ? `up to ${config.memory.maxEntries} items` : 'off',
      redis: redis === undefined ? 'off' : `${servers.redis.description}, ${connected?.state}`,
      postgres: servers.postgres.description,
      origin: servers.origin.description,
    },
    needs: { tls: tls !== undefined, credential: config.auth.kind !== 'none' },
    notes,
    metrics,
    reload: () => {
      tls?.reload()
      auth.reload()
    },
    [Symbol.asyncDispose]: () => running.disposeAsync(),
  }
}

const OPEN =
  'ITEMCACHE_INSECURE is set: whoever reaches the addresses above may read and write without TLS or a credential, where these are not configured.'

/** Traces, as `OTEL_*` say. Loads what makes them, which nobody else does. */
async function startTracing(
  config: Config,
  env: Readonly<Record<string, string>>,
  servers: { readonly postgres: Server; readonly redis: Server; readonly origin: Server },
  log: Logger,
): Promise<RunningTracing> {
  const sdk = await import('./observe/tracing-sdk.ts')
  return sdk.startTracing({
    env,
    version: config.version,
    log,
    tiers: {
      redis: { 'db.system.name': 'redis', ...sdk.serverOf(servers.redis.url) },
      postgres: { 'db.system.name': 'postgresql', ...sdk.serverOf(servers.postgres.url) },
      origin: sdk.serverOf(servers.origin.url),
    },
  })
}

function every(ms: number, action: () => void): Disposable {
  const timer = setInterval(action, ms)
  timer.unref()
  return { [Symbol.dispose]: () => clearInterval(timer) }
}

/** Where a tier's server is, and in words. */
interface Server {
  /** `undefined`: the tier is off. */
  readonly url: string | undefined
  readonly description: string
}

/** The servers that the configuration names; the embedded ones are started. */
async function startServers(
  { database, redis, origin, dataDir }: Config,
  started: AsyncDisposableStack,
  progress: (line: string) => void,
) {
  const notes: string[] = []
  const startDatabase = async (): Promise<Server & { url: string }> => {
    if (database.kind === 'url') return { url: database.url, description: withoutPasswords(database.url) }
    const server = started.use(await startPostgres({ dataDir, log: progress }))
    notes.push(...server.notes)
    return { url: server.serviceUrl, description: `private PostgreSQL ${server.version} in ${dataDir}` }
  }
  const startCache = async (): Promise<Server> => {
    if (redis.kind === 'off') return { url: undefined, description: 'off' }
    if (redis.kind !== 'embedded') {
      return { url: redis.url, description: describeRedis(redis.url) }
    }
    const server = await startRedis({ dataDir, log: progress })
    if ('unavailable' in server) {
      notes.push(server.unavailable)
      return { url: undefined, description: 'off' }
    }
    started.use(server)
    return { url: server.url, description: `private ${server.version}` }
  }
  const startOrigin = async (): Promise<Server> => {
    if (origin.kind === 'off') return { url: undefined, description: 'off' }
    if (origin.kind === 'url') return { url: origin.url, description: withoutPasswords(origin.url) }
    const server = started.use(await startCatalogue())
    return { url: server.url, description: 'bundled catalogue of 20 products' }
  }
  // All are awaited, so that what has started is disposed when another one fails.
  const [postgresServer, redisServer, originServer] = await Promise.allSettled([
    startDatabase(),
    startCache(),
    startOrigin(),
  ])
  for (const result of [postgresServer, redisServer, originServer]) {
    if (result.status === 'rejected') throw result.reason
  }
  if (
    postgresServer.status === 'rejected' ||
    redisServer.status === 'rejected' ||
    originServer.status === 'rejected'
  ) {
    throw new ItemCacheError('internal', 'unreachable: a rejected start has been thrown')
  }
  return {
    postgres: postgresServer.value,
    redis: redisServer.value,
    origin: originServer.value,
    notes,
  }
}

/** Connects, waiting for a database that is still starting. */
async function patiently<T>(
  signal: AbortSignal | undefined,
  progress: (line: string) => void,
  connect: () => Promise<T>,
): Promise<T> {
  const until = performance.now() + POSTGRES_PATIENCE_MS
  for (;;) {
    try {
      return await connect()
    } catch (error) {
      const mayHelp = error instanceof ItemCacheError && STARTING.has(error.reason)
      if (!mayHelp || performance.now() > until) throw withCause(error)
      progress(`Waiting for PostgreSQL (${withCause(error).message})`)
      await sleep(1_000, undefined, { ...(signal && { signal }) }).catch(() => {
        throw new ItemCacheError('cancelled', 'stopped before PostgreSQL answered')
      })
    }
  }
}

/** For the operator, whom the driver's own words help; callers never see them. */
function withCause(error: unknown): Error {
  if (!(error instanceof ItemCacheError) || !(error.cause instanceof Error)) return error as Error
  const { message, code } = error.cause as Error & { code?: string }
  const detail = withoutPasswords(message || (code ?? ''))
  return new ItemCacheError(error.code, `${error.message}: ${detail}`, {
    reason: error.reason,
    cause: error.cause,
  })
}

/** Asks the database now and then, for health and for the log. */
function watchPostgres(postgres: PostgresTier, tell: (answers: boolean) => void): Disposable {
  let asking = false
  const timer = setInterval(() => {
    if (asking) return
    asking = true
    postgres
      .ping(AbortSignal.timeout(HEALTH_PATIENCE_MS))
      .then(
        () => tell(true),
        () => tell(false),
      )
      .finally(() => {
        asking = false
      })
  }, HEALTH_INTERVAL_MS)
  timer.unref()
  return { [Symbol.dispose]: () => clearInterval(timer) }
}

/** Trims the log and the remembered requests in small steps, for as long as a step finds something to do. */
function keepTrimmed(source: LogSource, retention: Config['retention'], log: Logger): AsyncDisposable {
  const closing = new AbortController()
  const { signal } = closing
  const trim = async () => {
    while (!signal.aborted) {
      const trimmed = await source
        .trim({ ...retention, step: TRIM_STEP_ROWS }, signal)
        .catch((error: unknown) => {
          if (signal.aborted) return 0
          log.warn({ err: error }, 'the log could not be trimmed')
          return 0
        })
      const pauseMs = trimmed > 0 ? TRIM_BUSY_MS : TRIM_IDLE_MS
      await sleep(pauseMs, undefined, { signal, ref: false }).catch(() => {})
    }
  }
  const trimming = trim()
  return {
    async [Symbol.asyncDispose]() {
      closing.abort()
      await trimming
    },
  }
}

/** What the live page shows. */
interface Shown {
  readonly metrics: Metrics
  readonly memory: MemoryTier
  readonly connected: RedisTier | undefined
  readonly redis: GuardedRedis | undefined
  readonly store: GuardedStore
  readonly origin: GuardedOrigin | undefined
  readonly tail: Tail
  readonly subscriptions: Subscriptions
  readonly unsent: Unsent
  readonly inspected: InspectedParts
  readonly health: () => {
    readonly ready: boolean
    readonly draining: boolean
    readonly postgresAnswers: boolean
  }
}

function livePage(config: Config, log: Logger, shown: Shown): LivePage {
  const { metrics, memory, connected, redis, store, origin, tail, health } = shown
  const now = Date.now
  const feed = new Feed(now)
  tail.follow(feed)
  const states = (): Part[] => [
    { name: 'memory', state: memory.enabled ? 'ready' : 'off' },
    { name: 'redis', state: connected?.state ?? 'off', ...(redis && { breaker: redis.state }) },
    { name: 'postgres', state: health().postgresAnswers ? 'ready' : 'down', breaker: store.state },
    { name: 'origin', state: origin ? 'on' : 'off', ...(origin && { breaker: origin.state }) },
    { name: 'log', state: tail.failing ? 'down' : 'ready' },
  ]
  const redisServers = remembered(REDIS_MEMORY_MS, async () => connected?.servers())
  const memoryUse = (): MemoryUse => {
    const { entries, bytes, evictions } = memory.stats()
    const { maxEntries, maxBytes } = config.memory
    const inRedis = inAll(redisServers() ?? [])
    const { rss, heapUsed } = process.memoryUsage()
    return {
      memory: {
        on: memory.enabled,
        entries,
        maxEntries,
        bytes,
        maxBytes,
        evictions: evictions.entries + evictions.bytes,
      },
      ...(inRedis && { redis: inRedis }),
      process: { residentBytes: rss, heapBytes: heapUsed },
      unsentBytes: shown.unsent.bytes,
      ringBytes: shown.subscriptions.held().ring_bytes,
    }
  }
  return new LivePage({
    version: config.version,
    access: config.livePage,
    history: new History({ metrics, parts: states, now }),
    feed,
    now: () => {
      const { ready, draining } = health()
      return {
        timeMs: now(),
        startMs: metrics.startTimeMs,
        ready,
        draining,
        parts: states(),
        violations: metrics.probes.violation,
        openCalls: metrics.openCalls,
        subscribers: metrics.subscribers,
        memory: memoryUse(),
      }
    },
    inspect: (tenant, id) => inspectJson(shown.inspected, metrics, tenant, id),
    onError: (error) => log.error({ err: error }, 'the live page failed'),
  })
}

/** What the servers of a Redis take together; `undefined` when one does not tell, or there is none. */
function inAll(servers: readonly RedisServer[]): MemoryUse['redis'] {
  const used = servers.map(({ usedBytes }) => usedBytes ?? Number.NaN)
  const most = servers.map(({ maxBytes }) => maxBytes ?? Number.NaN)
  const [usedBytes, maxBytes] = [used, most].map((sizes) => sizes.reduce((sum, size) => sum + size, 0))
  if (servers.length === 0 || usedBytes === undefined || Number.isNaN(usedBytes)) return undefined
  return { usedBytes, ...(maxBytes !== undefined && !Number.isNaN(maxBytes) && { maxBytes }) }
}

/** The last answer; the next one is asked for when somebody wants to know and the last is older than `ms`. */
function remembered<T>(ms: number, ask: () => Promise<T>): () => T | undefined {
  let answer: T | undefined
  let askedAtMs = Number.NEGATIVE_INFINITY
  return () => {
    if (performance.now() - askedAtMs >= ms) {
      askedAtMs = performance.now()
      ask().then(
        (found) => {
          answer = found
        },
        () => {
          answer = undefined
        },
      )
    }
    return answer
  }
}

function observe(metrics: Metrics, memory: MemoryTier): void {
  metrics.tiers.memory.gauges = () => {
    const { entries, bytes, evictions, expirations } = memory.stats()
    return { entries, bytes, evictions: evictions.entries + evictions.bytes, expirations }
  }
}

/** The lines that a successful start prints; the last one is for machines. */
export function banner(app: App): string {
  const address = formatAddress(app.address)
  const { memory, redis, postgres, origin } = app.tiers
  const { tls, credential } = app.needs
  const flags = `${tls ? '-cacert ca.pem' : '-plaintext'}${credential ? ' -H "authorization: Bearer $TOKEN"' : ''}`
  return [
    `ItemCache serves gRPC on ${address}${app.admin ? `, ${app.livePage ? 'health, metrics and a live page' : 'health and metrics'} on http://${formatAddress(app.admin)}` : ''}`,
    '',
    `  memory     ${memory}`,
    `  Redis      ${redis}`,
    `  PostgreSQL ${postgres}`,
    `  origin     ${origin}`,
    ...app.notes.map((note) => `  note       ${note}`),
    '',
    'Try it:',
    `  grpcurl ${flags} -d '{"id": "1"}' ${address} itemcache.v1.ItemCacheService/GetItem`,
    ...(tls || credential ? [] : ['  npm run itemcache -- get 1']),
    '',
    JSON.stringify({
      ready: true,
      grpc: address,
      admin: app.admin === undefined ? 'off' : formatAddress(app.admin),
      tiers: app.tiers,
    }),
    '',
  ].join('\n')
}
