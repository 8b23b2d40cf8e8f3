/** The client: typed calls with defaults that suit most callers. `connect` is the only way to get one. */
import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { create, type MessageInitShape } from '@bufbuild/protobuf'
import type { Duration } from '@bufbuild/protobuf/wkt'
import { type ChannelCredentials, type ChannelOptions, credentials } from '@grpc/grpc-js'
import { toDuration, toMs } from './duration.ts'
import {
  DeadlineExceededError,
  fromItemError,
  InternalError,
  InvalidArgumentError,
  type ItemCacheError,
  NotFoundError,
  UnavailableError,
} from './errors.ts'
import {
  type BatchGetItemsResult,
  CacheOutcome,
  type CacheStatus,
  CacheStatusSchema,
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
  StaleReason,
} from './gen/itemcache/v1/item_cache_pb.ts'
import {
  type Copy,
  NearCache,
  type NearCacheOptions,
  type NearCacheStats,
  type Wanted,
} from './near-cache.ts'
import { type CallOptions, metadataOf, Transport } from './transport.ts'
import { type FollowParts, follow, type WatchMessage, type WatchOptions } from './watch.ts'

export type { CallOptions } from './transport.ts'

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
  /** While calls are under way, a silent connection is probed after this time. Default: 20,000. */
  readonly keepaliveMs?: number | undefined
  /** A probe that is not answered within this time ends the connection. Default: 5,000. */
  readonly keepaliveTimeoutMs?: number | undefined
  /** HTTP/2 window of the connection and of each call. Default: 1 MiB. */
  readonly flowControlWindowBytes?: number | undefined
  /** Keeps copies of items in this process, which the stream of invalidations keeps right. Default: none. */
  readonly nearCache?: NearCacheOptions | undefined
  /** Options of the grpc-js channel; they win over everything above. */
  readonly channelOptions?: ChannelOptions | undefined
}

/**
 * An item to write. Fields that are left out are not set. Those that only the service sets may be present, as in an
 * item that was read; they are ignored, except `etag`.
 */
export type ItemInit = MessageInitShape<typeof ItemSchema> & { readonly id: string }

/** How fresh an answer must be. */
export interface ReadOptions {
  /**
   * - `default`: any current copy.
   * - `cache-only`: memory and Redis; when neither holds a copy, the answer has no item.
   * - `fresh`: the database is asked.
   */
  readonly freshness?: 'default' | 'cache-only' | 'fresh' | undefined
  /** The state at this revision or a later one: to read one's own write, give the revision it returned. */
  readonly minRevision?: bigint | undefined
  /** A copy that was checked against the database longer ago than this is reloaded. */
  readonly maxStalenessMs?: number | undefined
  /** Whether a copy past its freshness may be served while it is reloaded. Default: true. */
  readonly allowStale?: boolean | undefined
  /** The fields of the item to return, as `title`, `price.units`, `imageUri` or `image_uri`. Default: all. */
  readonly fields?: readonly string[] | undefined
}

export interface GetOptions extends CallOptions, ReadOptions {
  /** The etag of the copy that the caller has: when it is current, the answer is `notModified`, without item. */
  readonly ifNoneMatch?: string | undefined
}

export interface GetResult {
  /** `undefined` only when `notModified`, and for a miss with `cache-only`. An absent item is a NotFoundError. */
  readonly item: Item | undefined
  readonly notModified: boolean
  /** The answer came out of the near cache; its `cache` names no tier. */
  readonly near: boolean
  /** Where the answer came from. */
  readonly cache: CacheStatus | undefined
  /** The answer is the tenant's state at this revision. */
  readonly revision: bigint
}

export interface GetManyOptions extends CallOptions, ReadOptions {}

/** The answer for one id: an item, or the error that `get` would have thrown. Neither: a miss with `cache-only`. */
export interface GetManyResult {
  readonly id: string
  readonly item: Item | undefined
  readonly error: ItemCacheError | undefined
  /** The answer came out of the near cache. */
  readonly near: boolean
  /** Where the answer came from; `undefined` with an error that no tier gave. */
  readonly cache: CacheStatus | undefined
}

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

/** The items one after the other, or page by page. Nothing is fetched before it is asked for. */
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

export interface WatchMetricsOptions extends CallOptions {
  /** Milliseconds between two snapshots: 100 to 3,600,000. Default: 1,000. */
  readonly intervalMs?: number | undefined
}

/**
 * A client of the service at `target`: `host:port`, or one of gRPC's address forms (`dns:///…`, `ipv4:…`, `unix:…`).
 * It connects at the first call, and again whenever it must. Throws InvalidArgumentError for options that cannot be.
 */
export function connect(target: string, options: ConnectOptions = {}): Client {
  return new Client(target, options)
}

/** Calls of an ItemCache service. Every method rejects with ItemCacheError only. */
export class Client implements AsyncDisposable {
  readonly #transport: Transport
  readonly #reading: Readonly<Record<string, string>>
  readonly #writing: Readonly<Record<string, string>>
  readonly #timeoutMs: number
  readonly #follow: FollowParts
  readonly #near: NearCache | undefined
  /** Loads for the near cache, by id. */
  readonly #flights = new Map<string, Promise<GetResult>>()

  constructor(target: string, options: ConnectOptions) {
    const { tenant, clientId, timeoutMs = 1000 } = options
    this.#reading = tenant === undefined ? {} : { 'x-tenant-id': tenant }
    this.#writing = clientId === undefined ? this.#reading : { ...this.#reading, 'x-client-id': clientId }
    metadataOf(this.#writing)
    this.#transport = new Transport(
      target,
      credentialsOf(options.tls),
      channelOptions(target, options),
      timeoutMs,
    )
    this.#timeoutMs = timeoutMs
    this.#follow = {
      transport: this.#transport,
      metadata: this.#reading,
      now: () => performance.now(),
      random: Math.random,
      sleep: (ms, signal) => sleep(ms, undefined, { ...(signal && { signal }) }).catch(() => {}),
    }
    if (options.nearCache !== undefined) {
      try {
        this.#near = new NearCache(options.nearCache, this.#follow)
      } catch (cause) {
        throw new InvalidArgumentError((cause as Error).message, { reason: 'INVALID_NEAR_CACHE', cause })
      }
    }
  }

  /** What the near cache has done, and how it is; `undefined` without one. */
  get nearCache(): NearCacheStats | undefined {
    return this.#near?.stats
  }

  /** One item. NotFoundError when it is absent. */
  get(id: string, options: GetOptions = {}): Promise<GetResult> {
    return this.#near === undefined ? this.#get(id, options) : this.#getNear(this.#near, id, options)
  }

  async #get(id: string, options: GetOptions): Promise<GetResult> {
    const { result, cache, revision } = await this.#transport.unary(
      method.getItem,
      {
        id,
        options: readOptions(options),
        readMask: fieldMask(options.fields),
        ifNoneMatch: options.ifNoneMatch ?? '',
      },
      this.#toRead(options),
    )
    return {
      item: result.case === 'item' ? result.value : undefined,
      notModified: result.case === 'notModified' && result.value,
      near: false,
      cache,
      revision,
    }
  }

  /** From the near cache, or from the service; those who miss the same item at the same time share a call. */
  async #getNear(near: NearCache, id: string, options: GetOptions): Promise<GetResult> {
    const wanted = wantedOf(options)
    if (!mayBeNear(options)) return this.#load(near, id, options, wanted)
    const copy = near.get(id, wanted)
    if (copy !== undefined) return nearResult(copy, undefined)
    if (!isOrdinary(options)) return this.#load(near, id, options, wanted)
    const flight = this.#flights.get(id)
    if (flight !== undefined) {
      await flight.catch(() => {})
      // What was asked for before this reader came must pass the rule now.
      const landed = near.get(id, wanted)
      return landed === undefined ? this.#load(near, id, options, wanted) : nearResult(landed, undefined)
    }
    const load = this.#load(near, id, options, wanted).finally(() => this.#flights.delete(id))
    this.#flights.set(id, load)
    return load
  }

  /** From the service, and nothing older than what is known here. */
  async #load(near: NearCache, id: string, options: GetOptions, wanted: Wanted): Promise<GetResult> {
    const { timeoutMs = this.#timeoutMs } = options
    const beganMs = performance.now()
    let minRevision = Math.max(wanted.minRevision, near.least(id))
    for (let attempt = 1; ; attempt++) {
      const sentAtMs = performance.now()
      const left = attempt === 1 ? timeoutMs : timeoutMs - (sentAtMs - beganMs)
      let answer: GetResult | NotFoundError
      try {
        if (!(left > 0))
          throw new DeadlineExceededError('the service did not catch up with the stream in time')
        answer = await this.#get(id, { ...options, timeoutMs: left, minRevision: BigInt(minRevision) })
      } catch (error) {
        if (!(error instanceof NotFoundError)) return staleInstead(near, id, options, wanted, error)
        answer = error
      }
      if (takes(near, id, answer, sentAtMs, options)) {
        if (answer instanceof NotFoundError) throw answer
        return answer
      }
      if (attempt === MAX_ATTEMPTS) {
        throw new UnavailableError('the service is behind what its stream has shown', {
          reason: 'BEHIND_STREAM',
        })
      }
      minRevision = Math.max(minRevision, near.least(id), near.position)
    }
  }

  /**
   * Any number of items, by their ids. An item that is missing or slow fails alone, with an `error` in its result.
   * Asked for in batches of 500, each with its own deadline; rejects when a batch as a whole fails.
   */
  async getMany(ids: Iterable<string>, options: GetManyOptions = {}): Promise<Map<string, GetManyResult>> {
    const all = [...new Set(ids)]
    const results = new Map<string, GetManyResult>(all.map((id) => [id, unanswered(id)]))
    const near = this.#near
    const wanted = wantedOf(options)
    const copies = near !== undefined && mayBeNear(options) ? all.map((id) => near.get(id, wanted)) : []
    for (const copy of copies) if (copy !== undefined) results.set(copy.id, nearManyResult(copy))
    const distinct = all.filter((_, i) => copies[i] === undefined)
    const failed = new AbortController()
    const signal = options.signal ? AbortSignal.any([options.signal, failed.signal]) : failed.signal
    const common = { options: readOptions(options), readMask: fieldMask(options.fields) }
    let next = 0
    const work = async () => {
      while (next < distinct.length) {
        const batch = distinct.slice(next, next + BATCH_IDS)
        next += BATCH_IDS
        const least = near === undefined ? 0 : Math.max(...batch.map((id) => near.least(id)))
        const request = { ...common, ids: batch }
        if (least > wanted.minRevision) request.options = { ...common.options, minRevision: BigInt(least) }
        const sentAtMs = performance.now()
        const answer = await this.#transport.unary(
          method.batchGetItems,
          request,
          this.#toRead({ ...options, signal }),
        )
        const late: string[] = []
        for (const [i, id] of batch.entries()) {
          const result = manyResult(id, answer.results[i])
          results.set(id, result)
          const { error = result } = result
          if (near === undefined || (error !== result && !(error instanceof NotFoundError))) continue
          const answered = error instanceof NotFoundError ? error : { ...result, notModified: false }
          if (!takes(near, id, answered, sentAtMs, options)) late.push(id)
        }
        // Older than what is known here by now: each is asked for again.
        await Promise.all(
          late.map(async (id) => results.set(id, await this.#again(id, { ...options, signal }))),
        )
      }
    }
    try {
      await Promise.all(Array.from({ length: BATCHES_AT_ONCE }, work))
    } finally {
      // When one batch fails, the others are of no use any more.
      failed.abort()
    }
    return results
  }

  async #again(id: string, options: GetManyOptions): Promise<GetManyResult> {
    try {
      const { item, cache, near } = await this.get(id, options)
      return { id, item, error: undefined, near, cache }
    } catch (error) {
      const { cache } = error as ItemCacheError
      return { id, item: undefined, error: error as ItemCacheError, near: false, cache }
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

  #written(answer: { item?: Item | undefined; revision: bigint }): WriteResult {
    const item = present(answer.item, 'a write')
    this.#near?.wrote(item.id, 'EXPIRE', Number(answer.revision))
    return { item, revision: answer.revision }
  }

  /** Deletes an item. It stays deleted, whatever the origin says. NotFoundError when it is absent. */
  async delete(id: string, options: DeleteOptions = {}): Promise<{ readonly revision: bigint }> {
    const { etag = '', allowMissing = false } = options
    const request = { id, etag, allowMissing, requestId: requestId(options) }
    const { revision } = await this.#transport.unary(method.deleteItem, request, this.#toWrite(options))
    this.#near?.wrote(id, 'REMOVE', Number(revision))
    return { revision }
  }

  /** Makes every cache distrust the copies that it holds of the named items. */
  async invalidate(what: Invalidation, options: WriteOptions = {}): Promise<{ readonly revision: bigint }> {
    const request = {
      target: targetOf(what),
      mode: what.mode === 'remove' ? InvalidationMode.REMOVE : InvalidationMode.EXPIRE,
      refreshOrigin: 'ids' in what && (what.refreshOrigin ?? false),
      requestId: requestId(options),
    }
    const { revision } = await this.#transport.unary(method.invalidateItems, request, this.#toWrite(options))
    this.#near?.invalidated(invalidationOf(what), Number(revision))
    return { revision }
  }

  /** What each tier holds of an item. Loads nothing. */
  inspect(id: string, options: CallOptions = {}): Promise<InspectItemResponse> {
    return this.#transport.unary(method.inspectItem, { id }, this.#toRead(options))
  }

  /** The counters and latencies of the instance that answers. */
  async metrics(options: CallOptions = {}): Promise<MetricsSnapshot> {
    const { snapshot } = await this.#transport.unary(method.getMetrics, {}, this.#toRead(options))
    return present(snapshot, 'GetMetrics')
  }

  /** The counters and latencies of one instance at once, and then once per interval, until the caller breaks off. */
  async *watchMetrics(options: WatchMetricsOptions = {}): AsyncGenerator<MetricsSnapshot, void, undefined> {
    const { intervalMs } = options
    const request = { interval: duration('intervalMs', intervalMs) }
    const frames = this.#transport.serverStream(method.watchMetrics, request, this.#toRead(options))
    for await (const { snapshot } of frames) yield present(snapshot, 'WatchMetrics')
  }

  /**
   * The tenant's invalidations, in the order of revisions, each once, until the caller breaks off. It goes on by itself after
   * any disconnect, on whichever instance; what nobody can tell any more comes as a `gap`. OutOfRangeError: `resumeAfter` is
   * ahead of the log, which is another one than it was.
   */
  watch(options: WatchOptions = {}): AsyncGenerator<WatchMessage, void, undefined> {
    return follow(this.#follow, options)
  }

  /** Takes no more calls, ends streams with CancelledError, and resolves when the calls under way are over. */
  async close(): Promise<void> {
    const closing = this.#transport.close()
    await this.#near?.close()
    await closing
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

function channelOptions(target: string, options: ConnectOptions): ChannelOptions {
  return {
    'grpc.service_config': JSON.stringify(SERVICE_CONFIG),
    'grpc.keepalive_time_ms': options.keepaliveMs ?? 20_000,
    'grpc.keepalive_timeout_ms': options.keepaliveTimeoutMs ?? 5_000,
    'grpc.max_receive_message_length': MAX_ANSWER_BYTES,
    'grpc-node.flow_control_window': options.flowControlWindowBytes ?? FLOW_CONTROL_WINDOW_BYTES,
    // A proxy of the environment cannot reach this machine's own addresses; grpc-js would ask it nonetheless.
    ...(isLoopback(target) && { 'grpc.enable_http_proxy': 0 }),
    ...options.channelOptions,
  }
}

function isLoopback(target: string): boolean {
  return /^(?:dns:(?:\/\/\/)?|ipv4:|ipv6:)?(?:localhost|127\.[\d.]+|\[::1\])(?::\d+)?$/.test(target)
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
  return { id, item: undefined, error, near: false, cache: undefined }
}

function manyResult(id: string, answer: BatchGetItemsResult | undefined): GetManyResult {
  if (answer === undefined) return unanswered(id)
  const { result, cache } = answer
  return {
    id,
    item: result.case === 'item' ? result.value : undefined,
    error: result.case === 'error' ? fromItemError(id, result.value, cache) : undefined,
    near: false,
    cache,
  }
}

function targetOf(what: Invalidation): InvalidateItemsRequest['target'] {
  if ('ids' in what) return { case: 'ids', value: create(ItemIdsSchema, { ids: [...what.ids] }) }
  if ('tags' in what) return { case: 'tags', value: create(ItemTagsSchema, { tags: [...what.tags] }) }
  return { case: 'all', value: true }
}

function invalidationOf(what: Invalidation): Parameters<NearCache['invalidated']>[0] {
  const mode = what.mode === 'remove' ? 'REMOVE' : 'EXPIRE'
  if ('ids' in what) return { kind: 'KEYS_INVALIDATED', mode, ids: what.ids, tags: [] }
  if ('tags' in what) return { kind: 'TAGS_INVALIDATED', mode, ids: [], tags: what.tags }
  return { kind: 'TENANT_INVALIDATED', mode, ids: [], tags: [] }
}

const requestId = (options: WriteOptions): string => options.requestId ?? randomUUID()

/** Times that the service is asked for an answer that is not older than what the near cache knows. */
const MAX_ATTEMPTS = 3

function wantedOf({ minRevision = 0n, maxStalenessMs = Number.POSITIVE_INFINITY }: ReadOptions): Wanted {
  return { minRevision: Number(minRevision), maxStalenessMs }
}

/** Whether a whole copy will do. */
function mayBeNear({ freshness, fields, ifNoneMatch }: GetOptions): boolean {
  return freshness !== 'fresh' && fields === undefined && ifNoneMatch === undefined
}

/** Whether a call asks for nothing in particular, so that it can be shared. */
function isOrdinary(options: GetOptions): boolean {
  return Object.values(options).every((value) => value === undefined)
}

/** Shows an answer to the near cache. False: it is older than what is known there. */
function takes(
  near: NearCache,
  id: string,
  answer: Pick<GetResult, 'item' | 'cache' | 'notModified'> | NotFoundError,
  sentAtMs: number,
  { fields }: ReadOptions,
): boolean {
  const { cache } = answer
  const item = answer instanceof NotFoundError ? undefined : answer.item
  const isAbsent = answer instanceof NotFoundError
  // A miss with cache-only says nothing; an answer that is undated can neither be judged nor kept.
  if (cache === undefined || (item === undefined && !isAbsent && !answer.notModified)) return true
  const copy: Copy = {
    id,
    asOf: Number(cache.asOf),
    item: item && deepFreeze(item),
    tags: item === undefined ? [] : item.category === '' ? item.tags : [...item.tags, item.category],
    verifiedAtMs: sentAtMs - (toMs(cache.age) ?? 0),
    freshUntilMs: sentAtMs + (toMs(cache.freshFor) ?? 0),
  }
  const isWhole = fields === undefined && (item !== undefined || isAbsent)
  return near.arrived(copy, isWhole && cache.outcome !== CacheOutcome.STALE)
}

/** A copy that the service cannot replace now, marked; or the error. */
function staleInstead(
  near: NearCache,
  id: string,
  options: GetOptions,
  wanted: Wanted,
  error: unknown,
): GetResult {
  const isDown = error instanceof UnavailableError || error instanceof DeadlineExceededError
  const may = isDown && options.allowStale !== false && mayBeNear(options)
  const copy = may ? near.staleInstead(id, wanted) : undefined
  if (copy === undefined) throw error
  return nearResult(copy, StaleReason.TIER_DOWN)
}

/** Throws NotFoundError for a copy that says that the item is absent. */
function nearResult(copy: Copy, stale: StaleReason | undefined): GetResult {
  const cache = nearStatus(copy, stale)
  if (copy.item === undefined) {
    throw new NotFoundError('the item does not exist', { reason: 'ITEM_NOT_FOUND', id: copy.id, cache })
  }
  return { item: copy.item, notModified: false, near: true, cache, revision: cache.asOf }
}

function nearManyResult(copy: Copy): GetManyResult {
  const { id, item } = copy
  const cache = nearStatus(copy, undefined)
  const error =
    item === undefined
      ? new NotFoundError('the item does not exist', { reason: 'ITEM_NOT_FOUND', id, cache })
      : undefined
  return { id, item, error, near: true, cache }
}

function nearStatus(
  { asOf, item, verifiedAtMs, freshUntilMs }: Copy,
  stale: StaleReason | undefined,
): CacheStatus {
  const now = performance.now()
  return create(CacheStatusSchema, {
    outcome:
      stale !== undefined
        ? CacheOutcome.STALE
        : item === undefined
          ? CacheOutcome.NEGATIVE_HIT
          : CacheOutcome.HIT,
    ...(stale !== undefined && { staleReason: stale }),
    age: toDuration(now - verifiedAtMs),
    freshFor: toDuration(Math.max(0, freshUntilMs - now)),
    asOf: BigInt(asOf),
  })
}

/** Copies are shared by all who read them: whoever changes one gets a TypeError. */
function deepFreeze<T extends object>(value: T): T {
  for (const part of Object.values(value)) {
    // Bytes (of fields that only a newer service knows) cannot be frozen.
    if (typeof part === 'object' && part !== null && !ArrayBuffer.isView(part)) deepFreeze(part)
  }
  return Object.freeze(value)
}

function present<T>(value: T | undefined, where: string): T {
  if (value === undefined) throw new InternalError(`the answer of ${where} is empty`)
  return value
}
