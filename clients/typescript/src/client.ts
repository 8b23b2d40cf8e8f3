/** The client: typed calls with defaults that suit most callers. `connect` is the only way to get one. */
import { randomUUID } from 'node:crypto'
import { create, type MessageInitShape } from '@bufbuild/protobuf'
import type { Duration } from '@bufbuild/protobuf/wkt'
import { type ChannelCredentials, type ChannelOptions, credentials } from '@grpc/grpc-js'
import { toDuration } from './duration.ts'
import {
  CancelledError,
  fromItemError,
  InternalError,
  InvalidArgumentError,
  NotFoundError,
} from './errors.ts'
import { follow, type WatchMessage } from './follow.ts'
import {
  type BatchGetItemsResult,
  type CacheStatus,
  Freshness,
  type InspectItemResponse,
  type InvalidateItemsRequest,
  InvalidationMode,
  type Item,
  ItemCacheService,
  ItemIdsSchema,
  type ItemSchema,
  ItemTagsSchema,
  type MetricsSnapshot,
  type ReadOptionsSchema,
} from './gen/itemcache/v1/item_cache_pb.ts'
import { type FetchMany, NearCache, type NearCacheOptions, rowOf, tagsOf } from './near-cache.ts'
import type { LogRow, NearLog } from './near-log.ts'
import type { NearStats } from './near-store.ts'
import { Pipeline } from './pipeline.ts'
import type { GetManyOptions, GetManyResult, GetOptions, GetResult, ReadOptions } from './reads.ts'
import { isLocal, targetOf } from './target.ts'
import { type CallOptions, checkedTimeout, metadataOf, type Token, Transport } from './transport.ts'

export type { CallOptions, Token } from './transport.ts'

const { method } = ItemCacheService

/** The most ids that one BatchGetItems may name. */
const BATCH_IDS = 500
/** Batches of one `getMany` that are under way at once: enough to keep a connection busy. */
const BATCHES_AT_ONCE = 4
/** The largest answer is a batch of 500 items of 256 KiB. grpc-js's own limit is 4 MiB. */
const MAX_ANSWER_BYTES = 160 * 1024 * 1024
/** With HTTP/2's 64 KiB, a batch of 100 small items costs the service three times the CPU. */
const FLOW_CONTROL_WINDOW_BYTES = 1024 * 1024

/**
 * The gRPC service config of ItemCache: UNAVAILABLE is retried, at most three times within half a second. That is
 * safe for every method as this client calls it: reads change nothing, and its writes carry a `request_id`.
 */
export const SERVICE_CONFIG = {
  loadBalancingConfig: [{ round_robin: {} }],
  methodConfig: [
    {
      name: [{ service: ItemCacheService.typeName }],
      retryPolicy: {
        maxAttempts: 4,
        initialBackoff: '0.05s',
        maxBackoff: '0.2s',
        backoffMultiplier: 2,
        retryableStatusCodes: ['UNAVAILABLE'],
      },
    },
  ],
  // When most calls fail, retries stop: they would only add load.
  retryThrottling: { maxTokens: 100, tokenRatio: 0.1 },
} as const

/** Certificates in PEM. */
export interface TlsOptions {
  /** Whom to trust. Default: what Node trusts. */
  readonly ca?: string | Buffer | undefined
  /** The client's own certificate chain, for mTLS; with `key`. */
  readonly cert?: string | Buffer | undefined
  readonly key?: string | Buffer | undefined
  /** The name that the service's certificate must have. Default: the host of the target, of several the first. */
  readonly serverName?: string | undefined
}

/** How a client calls. Everything has a default. */
export interface ConnectOptions {
  /** Milliseconds for a unary call that names no `timeoutMs` itself. Default: 1,000. */
  readonly timeoutMs?: number | undefined
  /** Sent as `x-tenant-id`; 1 to 128 printable ASCII characters. Default: the service's default tenant. */
  readonly tenant?: string | undefined
  /** Names the writer to those who watch; as `tenant`. Default: none. */
  readonly clientId?: string | undefined
  /** `true`: TLS with the certificates that Node trusts. Default: no TLS. */
  readonly tls?: boolean | TlsOptions | undefined
  /**
   * Sent as `authorization: Bearer …` with every call; a function is asked for it each time, so it may renew it. Without
   * TLS only to addresses of this machine: elsewhere everybody could read it.
   */
  readonly token?: Token | undefined
  /** Connections that take turns, 1 to 64. One is enough unless the service is far or its instances are many. Default: 1. */
  readonly connections?: number | undefined
  /** Look-ups of `get` share one stream per connection instead of being calls of their own. Default: false. */
  readonly pipeline?: boolean | undefined
  /** Keeps items in this process, and follows invalidations to keep them right. Default: none. */
  readonly nearCache?: NearCacheOptions | undefined
  /** While calls are under way, a silent connection is probed after this time. Default: 20,000. */
  readonly keepaliveMs?: number | undefined
  /** A probe that is not answered within this time ends the connection. Default: 5,000. */
  readonly keepaliveTimeoutMs?: number | undefined
  /** HTTP/2 window of the connection and of each call. Default: 1 MiB. */
  readonly flowControlWindowBytes?: number | undefined
  /** Options of the grpc-js channel; they win over everything above. */
  readonly channelOptions?: ChannelOptions | undefined
}

/**
 * An item to write. Fields that are left out are not set. Those that only the service sets may be present, as in an
 * item that was read; they are ignored, except `etag`.
 */
export type ItemInit = MessageInitShape<typeof ItemSchema> & { readonly id: string }

export interface ListOptions extends CallOptions {
  /** Only items of this category. */
  readonly category?: string | undefined
  /** Only items with this tag. */
  readonly tag?: string | undefined
  /** Items that one call fetches: 1 to 500. Default: the service's, 50. */
  readonly pageSize?: number | undefined
  /** Where to go on: the `nextPageToken` of a page with the same category and tag. */
  readonly pageToken?: string | undefined
}

export interface Page {
  readonly items: readonly Item[]
  /** Empty: this is the last page. */
  readonly nextPageToken: string
  readonly revision: bigint
  readonly cache: CacheStatus | undefined
}

/**
 * The items one after the other, or, with `pages`, page by page: a page tells its cache status and revision. Nothing is
 * fetched before it is asked for.
 */
export interface ItemList extends AsyncIterable<Item> {
  pages(): AsyncGenerator<Page, void, undefined>
}

export interface WriteOptions extends CallOptions {
  /**
   * A call with the same one within 24 h returns the first outcome instead of writing again. Default: a random one
   * for each call, so that its own retries are safe. Give one to make a retry of yours safe, too.
   */
  readonly requestId?: string | undefined
}

export interface UpdateOptions extends WriteOptions {
  /** The fields to change; one that is not set in the item is cleared; `*`: all. Default: those set in the item. */
  readonly fields?: readonly string[] | undefined
  /** Create the item when it is absent. Default: NotFoundError. */
  readonly allowMissing?: boolean | undefined
}

export interface DeleteOptions extends WriteOptions {
  /** ConflictError when it is not the item's current one. */
  readonly etag?: string | undefined
  /** An absent item is a success. Default: NotFoundError. */
  readonly allowMissing?: boolean | undefined
}

export interface WriteResult {
  /** The item as it was stored. */
  readonly item: Item
  readonly revision: bigint
}

/** What is invalidated, and how. */
export type Invalidation = (
  | {
      /** These items: 1 to 500. */
      readonly ids: readonly string[]
      /** Also fetch them from the origin again: at most 100. */
      readonly refreshOrigin?: boolean | undefined
    }
  | {
      /** Every item with one of these tags or categories: 1 to 32. */
      readonly tags: readonly string[]
    }
  | {
      /** Every item of the tenant. */
      readonly all: true
    }
) & {
  /** `expire`: the old copies may be served as stale while they are reloaded. `remove`: not at all. Default: expire. */
  readonly mode?: 'expire' | 'remove' | undefined
}

export interface WatchOptions {
  /** Continue exactly after this revision. OutOfRangeError when it is ahead of the log. Default: begin now. */
  readonly resumeAfter?: bigint | undefined
  /** Only events that may concern one of these, at most 500. Default, with no `tags`: all. */
  readonly ids?: readonly string[] | undefined
  /** Only events that may concern one of these tags or categories, at most 32. */
  readonly tags?: readonly string[] | undefined
  /** Events `upserted` carry their items. Default: false. */
  readonly includeItems?: boolean | undefined
  /** Milliseconds between heartbeats, 100 to 60,000. Default: 500. */
  readonly heartbeatMs?: number | undefined
  /** Milliseconds that events may wait to be sent together, up to 1,000. Default: 0. */
  readonly maxBatchDelayMs?: number | undefined
  /** Leave out what clients with this client's `clientId` write. Default: false. */
  readonly excludeOwnWrites?: boolean | undefined
  /** Aborting it ends the watch with CancelledError. */
  readonly signal?: AbortSignal | undefined
  readonly metadata?: Readonly<Record<string, string>> | undefined
}

export interface MetricsOptions extends CallOptions {
  /** Latencies carry their buckets, so that two snapshots tell the percentiles of the time in between. Default: false. */
  readonly buckets?: boolean | undefined
}

export interface WatchMetricsOptions extends MetricsOptions {
  /** Milliseconds between two snapshots: 100 to 3,600,000. Default: 1,000. */
  readonly intervalMs?: number | undefined
}

/**
 * A client of the service at `target`: `host:port`, one of gRPC's address forms (`dns:///…`, `ipv4:…`, `unix:…`), or
 * several of them, which take turns. It connects at the first call, and again whenever it must. Throws
 * InvalidArgumentError for options that cannot be.
 */
export function connect(target: string | readonly string[], options: ConnectOptions = {}): Client {
  return new Client(target, options)
}

const now = () => performance.now()

/** Calls of an ItemCache service. Every method rejects with ItemCacheError only. */
export class Client implements AsyncDisposable {
  readonly #transport: Transport
  readonly #reading: Readonly<Record<string, string>>
  readonly #writing: Readonly<Record<string, string>>
  readonly #clientId: string
  readonly #pipeline: Pipeline | undefined
  readonly #near: NearCache | undefined
  readonly #closed = new AbortController()
  readonly #watching = new Set<Promise<unknown>>()

  constructor(target: string | readonly string[], options: ConnectOptions) {
    const { tenant, clientId, timeoutMs = 1000, token, connections = 1 } = options
    this.#reading = tenant === undefined ? {} : { 'x-tenant-id': tenant }
    this.#writing = clientId === undefined ? this.#reading : { ...this.#reading, 'x-client-id': clientId }
    this.#clientId = clientId ?? ''
    metadataOf(this.#writing)
    if (!Number.isInteger(connections) || connections < 1 || connections > 64) {
      throw invalidOption(`connections must be a whole number from 1 to 64, got ${connections}`)
    }
    if (token !== undefined && (options.tls ?? false) === false && !isLocal(target)) {
      throw invalidOption('a token is sent to other machines with TLS only')
    }
    this.#transport = new Transport({
      target: targetOf(target),
      credentials: credentialsOf(options.tls),
      channel: channelOptions(target, options),
      timeoutMs: checkedTimeout(timeoutMs),
      connections,
      token,
    })
    if (options.pipeline) this.#pipeline = new Pipeline(this.#transport, this.#reading)
    if (options.nearCache !== undefined) {
      try {
        this.#near = new NearCache(options.nearCache, now)
      } catch (cause) {
        throw invalidOption(cause instanceof Error ? cause.message : 'nearCache is not valid')
      }
      this.#watching.add(this.#near.run(this.#transport, this.#reading, this.#closed.signal))
    }
  }

  /** One item. NotFoundError when it is absent. */
  async get(id: string, options: GetOptions = {}): Promise<GetResult> {
    const near = this.#near
    if (near === undefined) return this.#get(id, options)
    const hit = near.hit(id, options)
    if (hit !== undefined) return hit
    const timeoutMs = checkedTimeout(options.timeoutMs ?? this.#transport.timeoutMs)
    return near.load(id, { ...options, timeoutMs }, (asked) => this.#get(id, asked))
  }

  /** Asks the service. */
  async #get(id: string, options: GetOptions): Promise<GetResult> {
    const request = {
      id,
      options: readOptions(options),
      readMask: fieldMask(options.fields),
      ifNoneMatch: options.ifNoneMatch ?? '',
    }
    const pipeline = options.metadata === undefined ? this.#pipeline : undefined
    const { result, cache, revision } =
      pipeline === undefined
        ? await this.#transport.unary(method.getItem, request, this.#toRead(options))
        : await pipeline.lookUp(request, options)
    if (result.case === 'error') throw fromItemError(id, result.value, cache)
    return {
      item: result.case === 'item' ? result.value : undefined,
      notModified: result.case === 'notModified' && result.value,
      cache,
      near: false,
      revision,
    }
  }

  /**
   * Any number of items, by their ids. An item that is missing or slow fails alone, with an `error` in its result.
   * Asked for in batches of 500, each with its own deadline; rejects when a batch as a whole fails. (With `maxStaleMs`, ids
   * that the near cache holds get its copies then, and the others the error; it rejects when it holds none.)
   */
  async getMany(ids: Iterable<string>, options: GetManyOptions = {}): Promise<Map<string, GetManyResult>> {
    const distinct = [...new Set(ids)]
    const results = new Map<string, GetManyResult>(distinct.map((id) => [id, unanswered(id)]))
    const near = this.#near
    const fetch: FetchMany = (some, asked, take) => this.#getBatches(some, asked, take)
    if (near === undefined) {
      await fetch(distinct, options, (result) => results.set(result.id, result))
      return results
    }
    const rest = distinct.filter((id) => {
      const held = nearResult(near, id, options)
      if (held !== undefined) results.set(id, held)
      return held === undefined
    })
    await near.loadMany(results, rest, options, fetch)
    return results
  }

  async #getBatches(
    ids: readonly string[],
    options: GetManyOptions,
    take: (result: GetManyResult) => void,
  ): Promise<void> {
    const failed = new AbortController()
    const signal = options.signal ? AbortSignal.any([options.signal, failed.signal]) : failed.signal
    const common = { options: readOptions(options), readMask: fieldMask(options.fields) }
    let next = 0
    const work = async () => {
      while (next < ids.length) {
        const batch = ids.slice(next, next + BATCH_IDS)
        next += BATCH_IDS
        const request = { ...common, ids: batch }
        const answer = await this.#transport.unary(
          method.batchGetItems,
          request,
          this.#toRead({ ...options, signal }),
        )
        for (const [i, id] of batch.entries()) take(manyResult(id, answer.results[i]))
      }
    }
    try {
      await Promise.all(Array.from({ length: BATCHES_AT_ONCE }, work))
    } finally {
      // When one batch fails, the others are of no use any more.
      failed.abort()
    }
  }

  /** The items that the database holds, in the order of their ids (by bytes). */
  list(options: ListOptions = {}): ItemList {
    const pages = () => this.#pages(options)
    return {
      pages,
      async *[Symbol.asyncIterator]() {
        for await (const page of pages()) yield* page.items
      },
    }
  }

  async *#pages(options: ListOptions): AsyncGenerator<Page, void, undefined> {
    const { category = '', tag = '', pageSize = 0 } = options
    let { pageToken = '' } = options
    do {
      const request = { category, tag, pageSize, pageToken }
      const page = await this.#transport.unary(method.listItems, request, this.#toRead(options))
      const { items, nextPageToken, revision, cache } = page
      for (const item of items) this.#near?.listed(item, revision)
      yield { items, nextPageToken, revision, cache }
      pageToken = nextPageToken
    } while (pageToken !== '')
  }

  /** Creates an item. AlreadyExistsError when the id is taken, also by an item of the origin. */
  async create(item: ItemInit, options: WriteOptions = {}): Promise<WriteResult> {
    const request = { item, requestId: requestId(options) }
    return this.#written(await this.#transport.unary(method.createItem, request, this.#toWrite(options)))
  }

  /**
   * Changes an item, or the part of it that `fields` names. When the item carries an etag, as one that was read
   * does, and somebody has changed it since: ConflictError.
   */
  async update(item: ItemInit, options: UpdateOptions = {}): Promise<WriteResult> {
    const request = {
      item,
      updateMask: fieldMask(options.fields),
      allowMissing: options.allowMissing ?? false,
      requestId: requestId(options),
    }
    return this.#written(await this.#transport.unary(method.updateItem, request, this.#toWrite(options)))
  }

  /** Deletes an item. It stays deleted, whatever the origin says. NotFoundError when it is absent. */
  async delete(id: string, options: DeleteOptions = {}): Promise<{ readonly revision: bigint }> {
    const { etag = '', allowMissing = false } = options
    const request = { id, etag, allowMissing, requestId: requestId(options) }
    const { revision } = await this.#transport.unary(method.deleteItem, request, this.#toWrite(options))
    this.#told({ revision: Number(revision), kind: 'DELETED', mode: 'REMOVE', ids: [id], tags: [] })
    return { revision }
  }

  /** Makes every cache distrust the copies that it holds of the named items. */
  async invalidate(what: Invalidation, options: WriteOptions = {}): Promise<{ readonly revision: bigint }> {
    const request = {
      target: invalidated(what),
      mode: what.mode === 'remove' ? InvalidationMode.REMOVE : InvalidationMode.EXPIRE,
      refreshOrigin: 'ids' in what && (what.refreshOrigin ?? false),
      requestId: requestId(options),
    }
    const { revision } = await this.#transport.unary(method.invalidateItems, request, this.#toWrite(options))
    this.#told(invalidationRow(what, Number(revision)))
    return { revision }
  }

  /** What each tier holds of an item. Loads nothing. */
  inspect(id: string, options: CallOptions = {}): Promise<InspectItemResponse> {
    return this.#transport.unary(method.inspectItem, { id }, this.#toRead(options))
  }

  /** The counters and latencies of the instance that answers. */
  async metrics(options: MetricsOptions = {}): Promise<MetricsSnapshot> {
    const request = { includeBuckets: options.buckets ?? false }
    const { snapshot } = await this.#transport.unary(method.getMetrics, request, this.#toRead(options))
    return present(snapshot, 'GetMetrics')
  }

  /** The counters and latencies of one instance at once, and then once per interval, until the caller breaks off. */
  async *watchMetrics(options: WatchMetricsOptions = {}): AsyncGenerator<MetricsSnapshot, void, undefined> {
    const { intervalMs, buckets: includeBuckets = false } = options
    const request = { interval: duration('intervalMs', intervalMs), includeBuckets }
    const frames = this.#transport.serverStream(method.watchMetrics, request, this.#toRead(options))
    for await (const { snapshot } of frames) yield present(snapshot, 'WatchMetrics')
  }

  /**
   * The tenant's invalidations, in order, each once. It resumes by itself after whatever breaks the connection, on any
   * instance: see `disconnected` and `resumed`. What the service no longer holds is a `gap`. A consumer that is slow
   * slows the stream down and loses nothing within the service's retention. Ends when the caller breaks off.
   */
  async *watch(options: WatchOptions = {}): AsyncGenerator<WatchMessage, void, undefined> {
    const { resumeAfter, ids = [], tags = [], includeItems = false, excludeOwnWrites = false } = options
    const request = {
      ...(resumeAfter !== undefined && { resumeAfter }),
      ids: [...ids],
      tags: [...tags],
      heartbeatInterval: duration('heartbeatMs', options.heartbeatMs),
      maxBatchDelay: duration('maxBatchDelayMs', options.maxBatchDelayMs),
      includeItems,
      excludeOwnWrites,
      clientId: this.#clientId,
    }
    const signal = options.signal
      ? AbortSignal.any([options.signal, this.#closed.signal])
      : this.#closed.signal
    const metadata = { ...options.metadata, ...this.#reading }
    for await (const message of follow(this.#transport, { request, metadata, signal, now })) {
      // What a caller was shown counts: the near cache's own stream may be behind this one.
      if (message.kind === 'event') this.#told(rowOf(message))
      yield message
    }
  }

  /** Hits, misses, lag and state of the near cache; `undefined` when there is none. */
  nearStats(): NearStats | undefined {
    return this.#near?.stats()
  }

  /** @internal What `cached` needs of the near cache. Throws InvalidArgumentError when there is none. */
  nearLog(): { readonly log: NearLog; readonly now: () => number } {
    if (this.#near !== undefined) return { log: this.#near.log, now }
    throw invalidOption('cached needs a client that was connected with nearCache')
  }

  /** Takes no more calls, ends streams with CancelledError, and resolves when the calls under way are over. */
  async close(): Promise<void> {
    if (!this.#closed.signal.aborted) {
      this.#closed.abort(new CancelledError('the client is closed'))
    }
    await this.#transport.close(this.#pipeline?.close())
    await Promise.allSettled(this.#watching)
    this.#near?.close()
  }

  #told(row: LogRow): void {
    this.#near?.log.acknowledge(row)
  }

  #written(answer: { item?: Item | undefined; revision: bigint }): WriteResult {
    const result = written(answer)
    const { item } = result
    const revision = Number(result.revision)
    this.#told({ revision, kind: 'UPSERTED', mode: 'EXPIRE', ids: [item.id], tags: tagsOf(item) })
    return result
  }

  /** As `close`, for `await using`. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  #toRead({ timeoutMs, signal, metadata }: CallOptions): CallOptions {
    return { timeoutMs, signal, metadata: { ...metadata, ...this.#reading } }
  }

  #toWrite({ timeoutMs, signal, metadata }: CallOptions): CallOptions {
    return { timeoutMs, signal, metadata: { ...metadata, ...this.#writing } }
  }
}

function credentialsOf(tls: ConnectOptions['tls'] = false): ChannelCredentials {
  if (tls === false) return credentials.createInsecure()
  const { ca, cert, key } = tls === true ? {} : tls
  const pem = (text: string | Buffer | undefined) => (text === undefined ? null : Buffer.from(text))
  return credentials.createSsl(pem(ca), pem(key), pem(cert))
}

function channelOptions(target: string | readonly string[], options: ConnectOptions): ChannelOptions {
  const serverName = typeof options.tls === 'object' ? options.tls.serverName : undefined
  return {
    'grpc.service_config': JSON.stringify(SERVICE_CONFIG),
    'grpc.keepalive_time_ms': options.keepaliveMs ?? 20_000,
    'grpc.keepalive_timeout_ms': options.keepaliveTimeoutMs ?? 5_000,
    'grpc.max_receive_message_length': MAX_ANSWER_BYTES,
    'grpc-node.flow_control_window': options.flowControlWindowBytes ?? FLOW_CONTROL_WINDOW_BYTES,
    // A proxy of the environment cannot reach this machine's own addresses; grpc-js would ask it nonetheless.
    ...(isLocal(target) && { 'grpc.enable_http_proxy': 0 }),
    // grpc-js would wait up to two minutes before it tries an instance again that was restarted.
    'grpc.initial_reconnect_backoff_ms': 100,
    'grpc.max_reconnect_backoff_ms': 500,
    ...(serverName !== undefined && {
      'grpc.ssl_target_name_override': serverName,
      'grpc.default_authority': serverName,
    }),
    ...options.channelOptions,
  }
}

function invalidOption(message: string): InvalidArgumentError {
  return new InvalidArgumentError(message, { reason: 'INVALID_OPTION' })
}

const FRESHNESS = {
  default: Freshness.DEFAULT,
  'cache-only': Freshness.CACHE_ONLY,
  fresh: Freshness.FRESH,
} as const

function readOptions(options: ReadOptions): MessageInitShape<typeof ReadOptionsSchema> {
  const { freshness = 'default', minRevision = 0n, maxStalenessMs, allowStale } = options
  return {
    freshness: FRESHNESS[freshness],
    minRevision,
    maxStaleness: duration('maxStalenessMs', maxStalenessMs),
    allowStale,
  }
}

function duration(name: string, ms: number | undefined): Duration | undefined {
  if (ms === undefined) return undefined
  if (Number.isFinite(ms)) return toDuration(ms)
  throw new InvalidArgumentError(`${name} must be a finite number, got ${ms}`, { reason: 'INVALID_DURATION' })
}

/** Masks name fields as the proto does: `image_uri`, where TypeScript says `imageUri`. */
function fieldMask(fields: readonly string[] | undefined) {
  return (
    fields && { paths: fields.map((path) => path.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`)) }
  )
}

function unanswered(id: string): GetManyResult {
  const error = new InternalError('the service did not answer for this id', { id })
  return { id, item: undefined, error, cache: undefined, near: false }
}

function manyResult(id: string, answer: BatchGetItemsResult | undefined): GetManyResult {
  if (answer === undefined) return unanswered(id)
  const { result, cache } = answer
  return {
    id,
    item: result.case === 'item' ? result.value : undefined,
    error: result.case === 'error' ? fromItemError(id, result.value, cache) : undefined,
    cache,
    near: false,
  }
}

function nearResult(near: NearCache, id: string, options: GetManyOptions): GetManyResult | undefined {
  try {
    const hit = near.hit(id, options)
    return hit && { id, item: hit.item, error: undefined, cache: hit.cache, near: true }
  } catch (error) {
    if (!(error instanceof NotFoundError)) throw error
    return { id, item: undefined, error, cache: error.cache, near: true }
  }
}

function invalidationRow(what: Invalidation, revision: number): LogRow {
  const row = { revision, mode: what.mode === 'remove' ? 'REMOVE' : 'EXPIRE', ids: [], tags: [] } as const
  if ('ids' in what) return { ...row, kind: 'KEYS_INVALIDATED', ids: what.ids }
  if ('tags' in what) return { ...row, kind: 'TAGS_INVALIDATED', tags: what.tags }
  return { ...row, kind: 'TENANT_INVALIDATED' }
}

function invalidated(what: Invalidation): InvalidateItemsRequest['target'] {
  if ('ids' in what) return { case: 'ids', value: create(ItemIdsSchema, { ids: [...what.ids] }) }
  if ('tags' in what) return { case: 'tags', value: create(ItemTagsSchema, { tags: [...what.tags] }) }
  return { case: 'all', value: true }
}

const requestId = (options: WriteOptions): string => options.requestId ?? randomUUID()

function written({ item, revision }: { item?: Item | undefined; revision: bigint }): WriteResult {
  return { item: present(item, 'a write'), revision }
}

function present<T>(value: T | undefined, where: string): T {
  if (value === undefined) throw new InternalError(`the answer of ${where} is empty`)
  return value
}
