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
import { afterSilence } from '../silence.ts'
import {
  decodeCopy,
  encodeCopy,
  LOCK_IS_HANDED_ON,
  LOCK_IS_OPEN,
  LOCK_IS_OURS,
  LOCK_SCRIPT,
  lockKey,
  MAX_TTL_MS,
  READ_SCRIPT,
  RELEASE_SCRIPT,
  RENEW_SCRIPT,
  redisKey,
  redisKeyStart,
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
    readCopiesBuffer(count: number, ...keys: string[]): Result<unknown[], Context>
    storeCopies(count: number, ...keysAndValues: (string | number | Buffer)[]): Result<number, Context>
    takeLock(key: string, token: string, ttlMs: number): Result<number, Context>
    renewLock(key: string, token: string, ttlMs: number): Result<number, Context>
    releaseLock(key: string, token: string, openMs: number, handedOnMs: number): Result<number, Context>
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

/** Cumulative since construction. Hits and misses count ids; the others count round trips, `corrupt` values. */
export interface RedisCounters {
  hits: number
  /** Ids that were asked for in vain. While the tier is down nothing is asked and nothing is counted. */
  misses: number
  /** Round trips in which a command failed other than by a timeout. */
  errors: number
  timeouts: number
  /** Values that were damaged, undatable or of another format. Each was a miss. */
  corrupt: number
  /** Commands that were sent together, without waiting in between. */
  roundTrips: number
}

/** What a Redis server says of itself. What it does not tell is `undefined`. */
export interface RedisServer {
  /** `host:port`, or the path of its socket. */
  readonly node: string
  /** Connections of all clients. */
  readonly connectedClients: number | undefined
  readonly maxClients: number | undefined
  readonly usedBytes: number | undefined
  /** `undefined`, too, when there is no bound. */
  readonly maxBytes: number | undefined
  /** Whether it makes room for new copies when it is full. */
  readonly evicts: boolean
}

/** One command keeps Redis from all others for as long as it takes: half a millisecond for so many copies. */
const KEYS_PER_COMMAND = 100
const TIMED_OUT = 'Command timed out'
/** ioredis takes silence for shorter than this for no failure: this process may be too busy to read what is there. */
const SILENCE_MS = 1_000
const RECONNECT_MAX_MS = 1_000

interface Keyed {
  readonly key: string
}

/** What Redis said of one entry, or why it did not. */
type Reply = readonly unknown[] | Error

/** One kind of command, for one entry or for several at once. */
interface Order<E> {
  /** The most entries of one command. In a cluster it is one, since their keys are in different slots. */
  readonly most: number
  /** Parts of the command's reply for each of its entries. */
  readonly width: number
  readonly give: (to: ChainableCommander | Redis | Cluster, entries: readonly E[]) => unknown
}

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
    const start = redisKeyStart(this.#prefix, tenant)
    const entries = ids.map((id) => ({ id, key: start + encodeURIComponent(id) }))
    const replies = await this.#run(entries, READ)
    for (const [n, { id }] of entries.entries()) {
      const copy = this.#copyOf(id, replies[n], sentAtMs)
      if (copy !== undefined) copies.set(id, copy)
    }
    this.counters.hits += copies.size
    this.counters.misses += ids.length - copies.size
    const skipped = skipReason(replies)
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
    await this.#run(entries, STORE)
  }

  /**
   * As in the port. What has failed is asked once more, with the same token: a busy process may give a command up whose
   * reply has come, and would then load for itself what others are waiting for it to load. What that reply said is lost.
   */
  async acquire(tenant: string, claims: readonly LockClaim[]): Promise<ReadonlyMap<string, LockState>> {
    const ask = (asking: readonly LockClaim[]) =>
      this.#runLocks(tenant, asking, (to, key, token) => to.takeLock(key, token, this.#lockTtlMs))
    const first = await ask(claims)
    const states = new Map(claims.map(({ id }, n) => [id, lockState(first[n])]))
    const failed = claims.filter((_, n) => first[n] instanceof Error)
    const second = failed.length > 0 ? await ask(failed) : []
    for (const [n, { id }] of failed.entries()) {
      const state = lockState(second[n])
      states.set(id, state === 'ours' ? 'handed-on' : state)
    }
    return states
  }

  async renew(tenant: string, claims: readonly LockClaim[]): Promise<void> {
    await this.#runLocks(tenant, claims, (to, key, token) => to.renewLock(key, token, this.#lockTtlMs))
  }

  async release(tenant: string, claim: LockClaim, openMs: number): Promise<void> {
    await this.#runLocks(tenant, [claim], (to, key, token) =>
      to.releaseLock(key, token, Math.round(openMs), this.#lockTtlMs),
    )
  }

  /** As in the port. Reading the value is the only way to its as-of, and Redis's own recency sees it. */
  async inspect(tenant: string, id: string): Promise<Inspection> {
    if (this.#client.status !== 'ready') return { present: false, skipped: 'down' }
    const sentAtMs = this.#now()
    const key = redisKey(this.#prefix, tenant, id)
    const [reply] = await this.#run([{ key }], READ)
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

  /** The servers that answer, of a cluster the primaries. Never throws: a user who may not ask learns nothing. */
  async servers(): Promise<readonly RedisServer[]> {
    const client = this.#client
    if (client.status !== 'ready') return []
    const nodes = client instanceof Cluster ? client.nodes('master') : [client]
    const asked = nodes.map(async (node) => {
      const { path, host, port } = node.options
      return serverOf(path ?? `${host}:${port}`, await this.#inTime(node.info()))
    })
    const answers = await Promise.allSettled(asked)
    return answers.flatMap((answer) => (answer.status === 'fulfilled' ? [answer.value] : []))
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
    give: (to: ChainableCommander | Redis | Cluster, key: string, token: string) => unknown,
  ): Promise<readonly (Reply | undefined)[]> {
    if (this.#client.status !== 'ready') return Promise.resolve([])
    const entries = claims.map(({ id, token }) => ({ token, key: lockKey(this.#prefix, tenant, id) }))
    return this.#run(entries, {
      most: 1,
      width: 1,
      give: (to, [entry]) => entry && give(to, entry.key, entry.token),
    })
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

  /** Sends all entries at once; in a cluster once to each node that has any. What was said of each. Never throws. */
  async #run<E extends Keyed>(
    entries: readonly E[],
    order: Order<E>,
  ): Promise<readonly (Reply | undefined)[]> {
    if (!(this.#client instanceof Cluster)) return this.#send(entries, order)
    const replies = new Map<E, Reply | undefined>()
    const alone = { ...order, most: 1 }
    const send = async (some: readonly E[]) => {
      const said = await this.#send(some, alone)
      for (const [n, entry] of some.entries()) replies.set(entry, said[n])
    }
    await Promise.all(byNode(this.#client, entries).map(send))
    // ioredis follows a redirection (slots that moved) only when all of a pipeline is redirected alike, which
    // holds for one key. Reads and the scripts may all be repeated.
    const failed = entries.filter((entry) => {
      const reply = replies.get(entry)
      return reply instanceof Error && reply.message !== TIMED_OUT && !isWrongType(reply)
    })
    await Promise.all(failed.map((entry) => send([entry])))
    return entries.map((entry) => replies.get(entry))
  }

  /** One round trip: a command, or a pipeline of them. */
  async #send<E extends Keyed>(
    entries: readonly E[],
    { most, width, give }: Order<E>,
  ): Promise<readonly Reply[]> {
    if (entries.length === 0) return []
    this.counters.roundTrips += 1
    let results: readonly (readonly [Error | null, unknown])[]
    try {
      if (entries.length <= most) {
        results = [[null, await this.#inTime(Promise.resolve(give(this.#client, entries)))]]
      } else {
        const pipeline = this.#client.pipeline()
        for (let at = 0; at < entries.length; at += most) give(pipeline, entries.slice(at, at + most))
        results = (await this.#inTime(pipeline.exec())) ?? []
      }
    } catch (error) {
      results = Array.from({ length: Math.ceil(entries.length / most) }, () => [error as Error, undefined])
    }
    const errors = results.flatMap(([error]) => error ?? [])
    if (errors.some(({ message }) => message === TIMED_OUT)) this.counters.timeouts += 1
    else if (errors.length > 0) this.counters.errors += 1
    return entries.map((_, n) => {
      const [error = null, result] = results[Math.floor(n / most)] ?? []
      const parts = Array.isArray(result) ? result : [result]
      const at = (n % most) * width
      return error ?? parts.slice(at, at + width)
    })
  }

  /** A reply that has come counts, although this process was too busy to look in time. */
  async #inTime<T>(reply: Promise<T>): Promise<T> {
    const { promise: late, reject } = Promise.withResolvers<never>()
    const timer = afterSilence(this.#commandTimeoutMs, () => reject(new Error(TIMED_OUT)))
    try {
      return await Promise.race([reply, late])
    } finally {
      clearTimeout(timer)
    }
  }
}

/** What the answer to INFO says. */
function serverOf(node: string, info: string): RedisServer {
  const fields = new Map(
    [...info.matchAll(/^(\w+):(.*?)\r?$/gm)].map(([, name = '', value = '']) => [name, value]),
  )
  const number = (name: string) => {
    const value = Number.parseInt(fields.get(name) ?? '', 10)
    return Number.isNaN(value) ? undefined : value
  }
  return {
    node,
    connectedClients: number('connected_clients'),
    maxClients: number('maxclients'),
    usedBytes: number('used_memory'),
    maxBytes: number('maxmemory') || undefined,
    evicts: fields.get('maxmemory_policy') !== 'noeviction',
  }
}

/** What `REDIS_URL=off` puts in the tier's place: every read is a miss with the reason `off`. */
export const REDIS_OFF: CacheTier = {
  name: 'redis',
  read: async () => ({ copies: new Map(), skipped: 'off' }),
  store: async () => {},
  inspect: async () => ({ present: false, skipped: 'off' }),
}

/** The time that is left and the value, of each key. */
const READ: Order<Keyed> = {
  most: KEYS_PER_COMMAND,
  width: 2,
  give: (to, entries) => to.readCopiesBuffer(entries.length, ...entries.map(({ key }) => key)),
}

interface Stored extends Keyed {
  readonly asOf: number
  readonly value: Buffer
  readonly ttlMs: number
}

const STORE: Order<Stored> = {
  most: KEYS_PER_COMMAND,
  width: 0,
  give: (to, entries) =>
    to.storeCopies(
      entries.length,
      ...entries.map(({ key }) => key),
      ...entries.flatMap(({ asOf, value, ttlMs }) => [asOf, value, ttlMs]),
    ),
}

/** The slot of a cluster that a key is in. */
export function slotOf(key: string): number {
  return new Command('get', [key]).getSlot()
}

/** The entries of each node: a pipeline with keys of several would be refused. */
function byNode<E extends Keyed>(cluster: Cluster, entries: readonly E[]): readonly (readonly E[])[] {
  return [...Map.groupBy(entries, ({ key }) => cluster.slots[slotOf(key)]?.join() ?? '').values()]
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
  if (answer === LOCK_IS_HANDED_ON) return 'handed-on'
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
    commandTimeout: Math.max(3 * commandTimeoutMs, SILENCE_MS),
    // Gives up a connection that owes replies and is silent, so that its queue does not grow without bound.
    socketTimeout: Math.max(4 * commandTimeoutMs, SILENCE_MS),
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
    readCopies: { lua: READ_SCRIPT },
    storeCopies: { lua: STORE_SCRIPT },
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
