/**
 * The Redis tier: dated copies that instances share. It proves nothing and promises nothing: when Redis is
 * down, slow or wrong, the answer is a miss with a reason, in bounded time. The only file that knows ioredis.
 *
 * What ioredis does by default would break that bound: it queues commands while disconnected, sends them again
 * after a reconnect, and waits for a reply for ever. `connect` turns each of these off.
 */
import {
  type ChainableCommander,
  Cluster,
  type ClusterOptions,
  Command,
  type CommonRedisOptions,
  type DNSLookupFunction,
  Redis,
  type Result,
} from 'ioredis'
import {
  decodeCopy,
  encodeCopy,
  LOCK_IS_OPEN,
  LOCK_IS_OURS,
  LOCK_SCRIPT,
  lockKey,
  MAX_TTL_MS,
  RELEASE_SCRIPT,
  RENEW_SCRIPT,
  redisKey,
  STORE_SCRIPT,
} from './redis-format.ts'
import { parseRedisUrl, type RedisTarget } from './redis-url.ts'
import type {
  CacheAnswer,
  CacheTier,
  Copy,
  Inspection,
  LoadLocks,
  LockClaim,
  LockState,
  Shards,
  SkipReason,
} from './tier.ts'

declare module 'ioredis' {
  interface RedisCommander<Context> {
    storeCopy(key: string, asOf: number, value: Buffer, ttlMs: number): Result<number, Context>
    takeLock(key: string, token: string, ttlMs: number): Result<number, Context>
    renewLock(key: string, token: string, ttlMs: number): Result<number, Context>
    releaseLock(key: string, token: string, openMs: number): Result<number, Context>
  }
}

export interface RedisTierOptions {
  /** See `parseRedisUrl`. */
  readonly url: string
  /** What sets this database's copies apart from others in the same Redis. */
  readonly prefix: string
  /** Milliseconds of a monotonic clock. */
  readonly now: () => number
  /** 0 up to 1. */
  readonly random: () => number
  /** How long Redis holds a copy. Default 300,000 ms. */
  readonly ttlMs?: number
  /** The TTL varies by this share either way, so that copies stored together do not expire together. Default 0.1. */
  readonly jitter?: number
  /** After how long a lock ends that nobody renews. Default 2,000 ms. */
  readonly lockTtlMs?: number
  /** How long one command may take before it counts as a miss. Default 250 ms. */
  readonly commandTimeoutMs?: number
  /** How long a connection attempt may take. Default 2,000 ms. */
  readonly connectTimeoutMs?: number
  /** Called once per change, never while nothing changes, and with a reason that holds no secret. */
  readonly onStateChange?: (state: 'ready' | 'down', reason: string) => void
}

/** Cumulative since construction. Hits and misses count ids; the others count pipelines, `corrupt` values. */
export interface RedisCounters {
  hits: number
  /** Ids that were asked for in vain. While the tier is down nothing is asked and nothing is counted. */
  misses: number
  /** Pipelines in which a command failed other than by a timeout. */
  errors: number
  timeouts: number
  /** Values that were damaged, undatable or of another format. Each was a miss. */
  corrupt: number
  roundTrips: number
}

const COMMANDS_PER_PIPELINE = 50
const TIMED_OUT = 'Command timed out'
const RECONNECT_MAX_MS = 1_000

interface Keyed {
  readonly key: string
}

/** The replies to an entry's commands, or the error of the first that failed. */
type Reply = readonly unknown[] | Error

/** Queues the commands of one entry. */
type Queue<E> = (pipeline: ChainableCommander, entry: E) => void

export class RedisTier implements CacheTier, LoadLocks, Shards, AsyncDisposable {
  readonly name = 'redis'
  /** `undefined` unless there is a cluster. */
  readonly shardOf: Shards['shardOf']
  readonly idOn: Shards['idOn']
  readonly counters: RedisCounters = { hits: 0, misses: 0, errors: 0, timeouts: 0, corrupt: 0, roundTrips: 0 }
  readonly #client: Redis | Cluster
  readonly #prefix: string
  readonly #now: () => number
  readonly #random: () => number
  readonly #ttlMs: number
  readonly #lockTtlMs: number
  readonly #commandTimeoutMs: number
  readonly #jitter: number
  readonly #onStateChange: (state: 'ready' | 'down', reason: string) => void
  readonly #settled = Promise.withResolvers<'ready' | 'down'>()
  #state: 'connecting' | 'ready' | 'down' = 'connecting'
  #lastError = ''
  #closing = false

  /** Connects in the background, now and after every loss. Throws only for a URL that `parseRedisUrl` refuses. */
  constructor(options: RedisTierOptions) {
    this.#prefix = options.prefix
    this.#now = options.now
    this.#random = options.random
    this.#ttlMs = options.ttlMs ?? 300_000
    this.#lockTtlMs = options.lockTtlMs ?? 2_000
    this.#commandTimeoutMs = options.commandTimeoutMs ?? 250
    this.#jitter = options.jitter ?? 0.1
    this.#onStateChange = options.onStateChange ?? (() => {})
    this.#client = connect(
      parseRedisUrl(options.url),
      this.#commandTimeoutMs,
      options.connectTimeoutMs ?? 2_000,
      options.random,
    )
    const client = this.#client
    if (client instanceof Cluster) {
      this.shardOf = (tenant, id) => client.slots[slotOf(redisKey(this.#prefix, tenant, id))]?.[0] ?? ''
      this.idOn = (shard) => this.#idOn(client, shard)
    }
    this.#client.on('ready', () => {
      this.#lastError = ''
      this.#changed('ready', '')
    })
    // A listener for errors keeps ioredis from printing them; the close that follows is the change of state.
    this.#client.on('error', (error: Error & { code?: string; lastNodeError?: Error }) => {
      this.#lastError = error.lastNodeError?.message || error.message || (error.code ?? '')
    })
    this.#client.on('close', () => {
      this.#changed('down', this.#lastError || 'connection closed')
      this.#lastError = ''
    })
  }

  get state(): 'connecting' | 'ready' | 'down' {
    return this.#state
  }

  /** The first state that is known: `ready`, or `down` after the first attempt failed. */
  settled(): Promise<'ready' | 'down'> {
    return this.#settled.promise
  }

  async read(tenant: string, ids: readonly string[]): Promise<CacheAnswer> {
    const copies = new Map<string, Copy>()
    if (this.#client.status !== 'ready') return { copies, skipped: 'down' }
    const sentAtMs = this.#now()
    const entries = ids.map((id) => ({ id, key: redisKey(this.#prefix, tenant, id) }))
    const replies = await this.#run(entries, 2, queueRead)
    for (const { id, key } of entries) {
      const copy = this.#copyOf(id, replies.get(key), sentAtMs)
      if (copy !== undefined) copies.set(id, copy)
    }
    this.counters.hits += copies.size
    this.counters.misses += ids.length - copies.size
    const skipped = skipReason([...replies.values()])
    return skipped === undefined ? { copies } : { copies, skipped }
  }

  async store(tenant: string, copies: readonly Copy[]): Promise<void> {
    if (this.#client.status !== 'ready') return
    const nowMs = this.#now()
    const entries = copies.map((copy) => {
      const ttlMs = this.#nextTtlMs()
      const key = redisKey(this.#prefix, tenant, copy.id)
      return { key, asOf: copy.asOf, value: encodeCopy(copy, nowMs, ttlMs), ttlMs }
    })
    await this.#run(entries, 1, (pipeline, { key, asOf, value, ttlMs }) => {
      pipeline.storeCopy(key, asOf, value, ttlMs)
    })
  }

  /**
   * As in the port. What has failed is asked once more, with the same token: a busy process may give a command up whose
   * reply has come, and would then load for itself what others are waiting for it to load.
   */
  async acquire(tenant: string, claims: readonly LockClaim[]): Promise<ReadonlyMap<string, LockState>> {
    const ask = (asking: readonly LockClaim[]) =>
      this.#runLocks(tenant, asking, (pipeline, { key, token }) => {
        pipeline.takeLock(key, token, this.#lockTtlMs)
      })
    const replyTo = (replies: ReadonlyMap<string, Reply>, { id }: LockClaim) =>
      replies.get(lockKey(this.#prefix, tenant, id))
    const first = await ask(claims)
    const failed = claims.filter((claim) => replyTo(first, claim) instanceof Error)
    const second = failed.length > 0 ? await ask(failed) : first
    return new Map(
      claims.map((claim) => [claim.id, lockState(replyTo(second, claim) ?? replyTo(first, claim))]),
    )
  }

  async renew(tenant: string, claims: readonly LockClaim[]): Promise<void> {
    await this.#runLocks(tenant, claims, (pipeline, { key, token }) => {
      pipeline.renewLock(key, token, this.#lockTtlMs)
    })
  }

  async release(tenant: string, claim: LockClaim, openMs: number): Promise<void> {
    await this.#runLocks(tenant, [claim], (pipeline, { key, token }) => {
      pipeline.releaseLock(key, token, Math.round(openMs))
    })
  }

  /** As in the port. Reading the value is the only way to its as-of, and Redis's own recency sees it. */
  async inspect(tenant: string, id: string): Promise<Inspection> {
    if (this.#client.status !== 'ready') return { present: false, skipped: 'down' }
    const sentAtMs = this.#now()
    const key = redisKey(this.#prefix, tenant, id)
    const reply = (await this.#run([{ key }], 2, queueRead)).get(key)
    const skipped = skipReason([reply])
    if (skipped !== undefined) return { present: false, skipped }
    const copy = this.#copyOf(id, reply, sentAtMs)
    if (copy === undefined || reply === undefined || reply instanceof Error) return { present: false }
    const [leftMs, value] = reply as readonly [number, Buffer]
    return {
      present: true,
      negative: copy.bytes === undefined,
      asOf: copy.asOf,
      tags: copy.tags,
      ageMs: sentAtMs - copy.verifiedAtMs,
      ttlMs: Math.max(0, leftMs),
      sizeBytes: value.length,
    }
  }

  /** Lets running commands finish, within the command timeout, and disconnects. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#closing = true
    if (this.#client.status === 'ready') await this.#inTime(this.#client.quit()).catch(() => {})
    if (this.#client.status !== 'end') this.#client.disconnect()
    this.#state = 'down'
    this.#settled.resolve('down')
  }

  #changed(state: 'ready' | 'down', reason: string): void {
    if (this.#closing || this.#state === state) return
    this.#state = state
    this.#settled.resolve(state)
    this.#onStateChange(state, reason)
  }

  #runLocks(
    tenant: string,
    claims: readonly LockClaim[],
    queue: Queue<Keyed & Pick<LockClaim, 'token'>>,
  ): Promise<ReadonlyMap<string, Reply>> {
    if (this.#client.status !== 'ready') return Promise.resolve(new Map())
    const entries = claims.map(({ id, token }) => ({ token, key: lockKey(this.#prefix, tenant, id) }))
    return this.#run(entries, 1, queue)
  }

  /** While the cluster is out of reach nobody knows what lies where, and any id will do. */
  #idOn(client: Cluster, shard: string): string | undefined {
    if (client.status !== 'ready') return ''
    if (!client.slots.some(([primary]) => primary === shard)) return undefined
    for (let i = 0; ; i += 1) if (this.shardOf?.('', `${i}`) === shard) return `${i}`
  }

  #nextTtlMs(): number {
    const ttlMs = this.#ttlMs * (1 + this.#jitter * (2 * this.#random() - 1))
    return Math.min(Math.max(Math.round(ttlMs), 1), MAX_TTL_MS)
  }

  #copyOf(id: string, reply: Reply | undefined, sentAtMs: number): Copy | undefined {
    if (reply === undefined) return undefined
    if (reply instanceof Error) {
      if (isWrongType(reply)) this.counters.corrupt += 1
      return undefined
    }
    const [leftMs, value] = reply
    if (typeof leftMs !== 'number' || !Buffer.isBuffer(value)) return undefined
    const copy = decodeCopy(id, value, leftMs, sentAtMs)
    if (copy === undefined) this.counters.corrupt += 1
    return copy
  }

  /** Sends `width` commands for every entry, in pipelines that run side by side. Never throws. */
  async #run<E extends Keyed>(
    entries: readonly E[],
    width: number,
    queue: Queue<E>,
  ): Promise<ReadonlyMap<string, Reply>> {
    const replies = new Map<string, Reply>()
    const batches = this.#batches(entries, Math.floor(COMMANDS_PER_PIPELINE / width))
    await Promise.all(batches.map((batch) => this.#pipeline(batch, width, queue, replies)))
    if (this.#client.isCluster) {
      // ioredis follows a redirection (slots that moved) only when all of a pipeline is redirected alike, which
      // holds for one key. Reads and the scripts may all be repeated.
      const failed = entries.filter(({ key }) => {
        const reply = replies.get(key)
        return reply instanceof Error && reply.message !== TIMED_OUT && !isWrongType(reply)
      })
      await Promise.all(failed.map((entry) => this.#pipeline([entry], width, queue, replies)))
    }
    return replies
  }

  /** Cuts entries into batches; in a cluster each holds the keys of one node, or ioredis refuses the pipeline. */
  #batches<E extends Keyed>(entries: readonly E[], size: number): E[][] {
    const client = this.#client
    const byNode = Map.groupBy(entries, ({ key }) =>
      client instanceof Cluster ? (client.slots[slotOf(key)]?.join() ?? '') : '',
    )
    const batches: E[][] = []
    for (const group of byNode.values()) {
      for (let at = 0; at < group.length; at += size) batches.push(group.slice(at, at + size))
    }
    return batches
  }

  async #pipeline<E extends Keyed>(
    batch: readonly E[],
    width: number,
    queue: Queue<E>,
    replies: Map<string, Reply>,
  ): Promise<void> {
    this.counters.roundTrips += 1
    const pipeline = this.#client.pipeline()
    for (const entry of batch) queue(pipeline, entry)
    let results: readonly [Error | null, unknown][]
    try {
      results = (await this.#inTime(pipeline.exec())) ?? []
    } catch (error) {
      results = batch.flatMap(() => Array<[Error, unknown]>(width).fill([error as Error, undefined]))
    }
    let [failed, timedOut] = [false, false]
    for (const [index, { key }] of batch.entries()) {
      const own = results.slice(index * width, (index + 1) * width)
      const error = own.find(([failure]) => failure !== null)?.[0]
      replies.set(key, error ?? own.map(([, result]) => result))
      if (error?.message === TIMED_OUT) timedOut = true
      else if (error) failed = true
    }
    if (timedOut) this.counters.timeouts += 1
    else if (failed) this.counters.errors += 1
  }

  /**
   * A reply that has come counts, although this process was too busy to look in time: when the time is over, what has
   * arrived is read before the command is given up.
   */
  async #inTime<T>(reply: Promise<T>): Promise<T> {
    const { promise: late, reject } = Promise.withResolvers<never>()
    const timer = setTimeout(() => setImmediate(() => reject(new Error(TIMED_OUT))), this.#commandTimeoutMs)
    try {
      return await Promise.race([reply, late])
    } finally {
      clearTimeout(timer)
    }
  }
}

/** The slot of a cluster that a key is in. */
export function slotOf(key: string): number {
  return new Command('get', [key]).getSlot()
}

/** What `REDIS_URL=off` puts in the tier's place: every read is a miss with the reason `off`. */
export const REDIS_OFF: CacheTier = {
  name: 'redis',
  read: async () => ({ copies: new Map(), skipped: 'off' }),
  store: async () => {},
  inspect: async () => ({ present: false, skipped: 'off' }),
}

/**
 * PTTL goes before GET, so that a value which replaces another between the two seems older than it is, never
 * younger.
 */
function queueRead(pipeline: ChainableCommander, { key }: Keyed): void {
  pipeline.pttl(key)
  pipeline.getBuffer(key)
}

/** Why there is no reply at all; `undefined` as soon as Redis answered for one key. */
function skipReason(replies: readonly (Reply | undefined)[]): SkipReason | undefined {
  const errors = replies.filter((reply) => reply instanceof Error && !isWrongType(reply))
  if (errors.length === 0 || errors.length < replies.length) return undefined
  return errors.some((error) => error instanceof Error && error.message === TIMED_OUT) ? 'timeout' : 'down'
}

/** Whether the key holds something that is not a string, which is a damaged value and no failure of Redis. */
function isWrongType(error: Error): boolean {
  return error.message.startsWith('WRONGTYPE')
}

/** Whatever is no answer keeps nobody from loading. */
function lockState(reply: Reply | undefined): LockState {
  const answer = reply instanceof Error ? undefined : reply?.[0]
  if (typeof answer !== 'number' || answer === LOCK_IS_OPEN) return 'free'
  return answer === LOCK_IS_OURS ? 'ours' : answer
}

/**
 * Connects as the tier does, for those who examine a Redis: resolves when it answers, and rejects with the reason
 * why it does not. Disposing it closes the connection.
 */
export async function dialRedis(
  target: RedisTarget,
  timeoutMs: number,
): Promise<(Redis | Cluster) & AsyncDisposable> {
  const client = connect(target, timeoutMs, timeoutMs, Math.random)
  const { promise, resolve, reject } = Promise.withResolvers<void>()
  let lastError = new Error('no answer in time')
  client.on('ready', resolve)
  client.on('error', (error: Error & { lastNodeError?: Error }) => {
    lastError = error.lastNodeError ?? error
    // Another node of a cluster may answer.
    if (!client.isCluster) reject(lastError)
  })
  const timer = setTimeout(() => reject(lastError), 2 * timeoutMs)
  try {
    await promise
  } catch (error) {
    client.disconnect()
    throw error
  } finally {
    clearTimeout(timer)
  }
  return Object.assign(client, { [Symbol.asyncDispose]: async () => client.disconnect() })
}

const keepName: DNSLookupFunction = (host, done) => done(null, host)

function connect(
  target: RedisTarget,
  commandTimeoutMs: number,
  connectTimeoutMs: number,
  random: () => number,
): Redis | Cluster {
  const retryDelay = (attempt: number): number =>
    Math.min(50 * 2 ** Math.min(attempt, 10), RECONNECT_MAX_MS) * (0.5 + random() / 2)
  const connection = {
    ...(target.username === '' ? {} : { username: target.username }),
    ...(target.password === '' ? {} : { password: target.password }),
    ...(target.tls === undefined ? {} : { tls: target.tls }),
    connectionName: 'itemcache',
    connectTimeout: connectTimeoutMs,
    // For the commands that ioredis sends by itself; ours are given up before. A stopped Redis raises no event of its own.
    commandTimeout: 3 * commandTimeoutMs,
    // Gives up a connection that owes replies and is silent, so that its queue does not grow without bound.
    socketTimeout: 4 * commandTimeoutMs,
    // How long a closing socket may linger.
    disconnectTimeout: commandTimeoutMs,
    // Commands that were under way when the connection broke fail at once.
    maxRetriesPerRequest: 0,
    autoResendUnfulfilledCommands: false,
    // After a failover the old primary refuses writes: reconnecting finds the new one.
    reconnectOnError: (error: Error) => /\bREADONLY\b/.test(error.message),
    // RESP2 says all that is needed here, and every server and proxy speaks it.
    protocol: 2,
  } satisfies CommonRedisOptions & { disconnectTimeout: number }
  const scripts = {
    storeCopy: { lua: STORE_SCRIPT, numberOfKeys: 1 },
    takeLock: { lua: LOCK_SCRIPT, numberOfKeys: 1 },
    renewLock: { lua: RENEW_SCRIPT, numberOfKeys: 1 },
    releaseLock: { lua: RELEASE_SCRIPT, numberOfKeys: 1 },
  }

  if (target.sentinel !== undefined) {
    const { name, username, password } = target.sentinel
    return new Redis({
      ...connection,
      sentinels: [...target.nodes],
      name,
      db: target.db,
      ...(username === '' ? {} : { sentinelUsername: username }),
      ...(password === '' ? {} : { sentinelPassword: password }),
      ...(target.tls === undefined ? {} : { sentinelTLS: target.tls, enableTLSForSentinelMode: true }),
      sentinelCommandTimeout: connectTimeoutMs,
      sentinelRetryStrategy: retryDelay,
      scripts,
      enableOfflineQueue: false,
      retryStrategy: retryDelay,
    })
  }
  if (target.nodes.length > 1) {
    const cluster = {
      redisOptions: connection,
      scripts,
      enableOfflineQueue: false,
      clusterRetryStrategy: retryDelay,
      // A redirection is followed a few times; a failed command is not tried again.
      maxRedirections: 4,
      retryDelayOnFailover: 0,
      retryDelayOnClusterDown: 0,
      slotsRefreshInterval: 5_000,
      slotsRefreshTimeout: connectTimeoutMs,
      // A certificate names hosts, not the addresses that they resolve to.
      ...(target.tls === undefined ? {} : { dnsLookup: keepName }),
    } satisfies ClusterOptions
    return new Cluster([...target.nodes], cluster)
  }
  const [node] = target.nodes
  return new Redis({
    ...connection,
    ...(node ?? {}),
    ...(target.path === undefined ? {} : { path: target.path }),
    db: target.db,
    scripts,
    enableOfflineQueue: false,
    retryStrategy: retryDelay,
  })
}
