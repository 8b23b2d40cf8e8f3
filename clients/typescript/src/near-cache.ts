/**
 * The near cache: items in this process, kept right by the invalidation stream. It decides what may be served from
 * here; what cannot be is read from the service, with the floors that are known here as `min_revision`, so that no answer
 * is older than what the stream has shown.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { create, type MessageInitShape } from '@bufbuild/protobuf'
import { toDuration, toMs } from './duration.ts'
import {
  CancelledError,
  DeadlineExceededError,
  InternalError,
  ItemCacheError,
  NotFoundError,
  OutOfRangeError,
  UnavailableError,
} from './errors.ts'
import { Flights } from './flights.ts'
import { type FollowMessage, follow } from './follow.ts'
import {
  CacheOutcome,
  type CacheStatus,
  CacheStatusSchema,
  type Item,
  StaleReason,
} from './gen/itemcache/v1/item_cache_pb.ts'
import { type LogRow, NearLog } from './near-log.ts'
import { type NearBounds, type NearStats, NearStore, type Stored } from './near-store.ts'
import type { GetManyOptions, GetManyResult, GetOptions, GetResult, ReadOptions } from './reads.ts'
import type { Transport } from './transport.ts'

export interface NearCacheOptions extends NearBounds {
  /**
   * Milliseconds since an item was read for which it may be served, marked STALE, when the service does not answer and the
   * caller allows stale answers. Items that were deleted or removed are never served. Default: 0, not at all.
   */
  readonly maxStaleMs?: number | undefined
}

/** Half of the bound, so that a lost heartbeat costs nothing. */
const HEARTBEAT_MS = 250
const MAX_FLOORS = 10_000
/** Before the stream is tried again after an error that a retry is not likely to help. */
const REFUSED_PAUSE_MS = 5000

/** Asks the service for an item. Rejects as `Client.get` does. */
export type Fetch = (options: GetOptions) => Promise<GetResult>

/** Asks the service for items, and hands over each result. Rejects as `Client.getMany` does. */
export type FetchMany = (
  ids: readonly string[],
  options: GetManyOptions,
  take: (result: GetManyResult) => void,
) => Promise<void>

/** What a load came to. */
interface Loaded {
  readonly epoch: number
  readonly answer: GetResult | undefined
  /** Iff there is no answer. */
  readonly error: unknown
}

interface Held {
  /** Frozen, since all readers share it. `undefined`: absent. */
  readonly item: Item | undefined
  readonly cache: CacheStatus
}

type HeldCopy = Stored<Held>

export class NearCache {
  readonly log: NearLog
  readonly #store: NearStore<Held>
  readonly #now: () => number
  readonly #maxStaleMs: number
  readonly #flights = new Flights<Loaded>()

  constructor(options: NearCacheOptions, now: () => number) {
    this.#now = now
    this.#maxStaleMs = options.maxStaleMs ?? 0
    this.log = new NearLog({ now, maxFloors: MAX_FLOORS })
    this.#store = new NearStore(this.log, options, now)
  }

  stats(): NearStats {
    return this.#store.stats()
  }

  close(): void {
    this.#store.close()
  }

  /** A current copy that does for this read. Throws NotFoundError when it says that the item is absent. */
  hit(id: string, options: GetOptions): GetResult | undefined {
    if (!mayAnswer(options)) return undefined
    const copy = this.#store.get(id)
    if (copy === undefined) return undefined
    if (this.#fits(copy, options)) return this.#answerOf(copy, options, false)
    this.#store.unsuitable()
    return undefined
  }

  /**
   * Reads an item that is not here; `timeoutMs` is for all that it takes. Callers who ask for nothing special share one
   * load; who joined one takes its result only if it passes the rule when it comes, or was begun after they came.
   */
  async load(
    id: string,
    options: GetOptions & { readonly timeoutMs: number },
    fetch: Fetch,
  ): Promise<GetResult> {
    const deadlineMs = this.#now() + options.timeoutMs
    const leftMs = () => {
      const ms = deadlineMs - this.#now()
      if (ms > 0) return ms
      throw new DeadlineExceededError('the deadline has passed', { id })
    }
    try {
      if (!isPlain(options)) {
        return await this.#loadCurrent(id, options, (asked) => fetch({ ...asked, timeoutMs: leftMs() }))
      }
      const forAll = { ...options, signal: undefined }
      const load = async (): Promise<Loaded> => {
        const { epoch } = this.log
        try {
          const answer = await this.#loadCurrent(id, forAll, (asked) =>
            fetch({ ...asked, timeoutMs: leftMs() }),
          )
          return { epoch, answer, error: undefined }
        } catch (error) {
          return { epoch, answer: undefined, error }
        }
      }
      const passes = (loaded: Loaded, isLater: boolean) => this.#passes(id, loaded, isLater)
      const wait = (loaded: Promise<Loaded>) => patiently(loaded, options.signal, leftMs())
      const { result, shared } = await this.#flights.share(id, load, passes, wait)
      if (shared) this.#store.coalesced++
      const { answer, error } = result
      if (answer === undefined) throw error
      return shared && answer.cache ? { ...answer, cache: { ...answer.cache, coalesced: true } } : answer
    } catch (error) {
      const stale = this.#staleInstead(id, options, error)
      if (stale === undefined) throw error
      return stale
    }
  }

  /**
   * Reads many items, and puts the results where there is none yet. What the service does not answer is answered from
   * here if stale answers are allowed; rejects when a batch fails and nothing can be answered from here.
   */
  async loadMany(
    results: Map<string, GetManyResult>,
    ids: readonly string[],
    options: GetManyOptions,
    fetch: FetchMany,
  ): Promise<void> {
    const missing = new Set(ids)
    let failure: ItemCacheError | undefined
    try {
      await this.#loadAllCurrent(ids, options, fetch, (result, isGood) => {
        results.set(result.id, result)
        if (isGood) missing.delete(result.id)
      })
    } catch (error) {
      if (!(error instanceof ItemCacheError)) throw error
      failure = error
      for (const id of missing) results.set(id, { id, item: undefined, error, cache: undefined, near: false })
    }
    for (const id of ids) {
      const stale = this.#staleInstead(id, options, results.get(id)?.error)
      if (stale === undefined) continue
      results.set(id, { id, item: stale.item, error: undefined, cache: stale.cache, near: true })
      if (missing.has(id)) failure = undefined
    }
    if (failure !== undefined) throw failure
  }

  /** An answer that is not older than what is known here, as of its arrival. */
  async #loadCurrent(id: string, options: GetOptions, ask: Fetch): Promise<GetResult> {
    const { minRevision: wanted = 0n } = options
    const isWhole = bringsWhole(options)
    const { epoch } = this.log
    let floor = isWhole ? this.#floorOf([id]) : this.#known([id])
    for (let attempt = 1; ; attempt++) {
      const minRevision = floor > wanted ? floor : wanted
      try {
        const answer = await ask({ ...options, minRevision })
        if (this.#admit(id, answer.item, answer.cache, epoch, isWhole) || attempt === 3) return answer
      } catch (error) {
        if (error instanceof NotFoundError) {
          if (this.#admit(id, undefined, error.cache, epoch, isWhole) || attempt === 3) throw error
        } else if (error instanceof OutOfRangeError && minRevision > wanted) {
          // The log is another one: the stream will find that out, too.
          return await ask({ ...options, minRevision: wanted })
        } else throw error
      }
      // It was overtaken: by the event of its key, or of a tag that was not known before it came.
      floor = this.#known([id])
    }
  }

  /** As `#loadCurrent`, for many. What is not good is asked for again. */
  async #loadAllCurrent(
    ids: readonly string[],
    options: GetManyOptions,
    fetch: FetchMany,
    take: (result: GetManyResult, isGood: boolean) => void,
  ): Promise<void> {
    const { minRevision: wanted = 0n } = options
    const isWhole = bringsWhole(options)
    const { epoch } = this.log
    let floor = isWhole ? this.#floorOf(ids) : this.#known(ids)
    let rest = ids
    for (let attempt = 1; rest.length > 0; attempt++) {
      const minRevision = floor > wanted ? floor : wanted
      const overtaken: string[] = []
      const ofAnotherLog: string[] = []
      await fetch(rest, { ...options, minRevision }, (result) => {
        const { id, item, error, cache } = result
        const isAnswer = item !== undefined || error instanceof NotFoundError
        if (error instanceof OutOfRangeError && minRevision > wanted) ofAnotherLog.push(id)
        else if (isAnswer && !this.#admit(id, item, cache, epoch, isWhole) && attempt < 3) overtaken.push(id)
        else return take(result, true)
        take(result, false)
      })
      await fetch(ofAnotherLog, options, (result) => take(result, true))
      rest = overtaken
      floor = this.#known(rest)
    }
  }

  /** Whether who joined a load may take what it came to. */
  #passes(id: string, { epoch, answer, error }: Loaded, isLater: boolean): boolean {
    // Another's time was up, not this one's.
    if (error instanceof DeadlineExceededError) return false
    if (isLater || (answer === undefined && !(error instanceof NotFoundError))) return true
    const cache = answer?.cache ?? (error instanceof NotFoundError ? error.cache : undefined)
    if (cache === undefined || epoch !== this.log.epoch || !this.log.isCurrent()) return false
    const tags = answer?.item === undefined ? [] : tagsOf(answer.item)
    return this.log.judge({ id, asOf: Number(cache.asOf), tags }) === 'current'
  }

  /** Whether a copy does for a read's own bounds. */
  #fits(copy: HeldCopy, { minRevision = 0n, maxStalenessMs }: ReadOptions): boolean {
    return copy.asOf >= minRevision && (maxStalenessMs === undefined || this.#ageMs(copy) < maxStalenessMs)
  }

  #ageMs({ value, storedAtMs }: HeldCopy): number {
    return (toMs(value.cache.age) ?? 0) + this.#now() - storedAtMs
  }

  /** An item to show, marked, for a read that failed with `error`: iff the service did not answer, and the read allows it. */
  #staleInstead(id: string, options: GetOptions, error: unknown): GetResult | undefined {
    if (!(error instanceof UnavailableError || error instanceof DeadlineExceededError)) return undefined
    if (this.#maxStaleMs === 0 || options.allowStale === false || !mayAnswer(options)) return undefined
    const copy = this.#store.stale(id, this.#maxStaleMs)
    if (copy?.value.item === undefined || !this.#fits(copy, options)) return undefined
    this.#store.staleServed++
    return this.#answerOf(copy, options, true)
  }

  #answerOf(copy: HeldCopy, { ifNoneMatch }: GetOptions, isStale: boolean): GetResult {
    const { id, asOf, storedAtMs } = copy
    const { item, cache } = copy.value
    const cacheFor = (outcome: CacheOutcome, rest: MessageInitShape<typeof CacheStatusSchema>) =>
      create(CacheStatusSchema, {
        tier: cache.tier,
        outcome,
        age: toDuration(this.#ageMs(copy)),
        asOf: BigInt(asOf),
        ...rest,
      })
    const freshMs = Math.max(0, (toMs(cache.freshFor) ?? 0) - (this.#now() - storedAtMs))
    if (item === undefined) {
      const status = cacheFor(CacheOutcome.NEGATIVE_HIT, { freshFor: toDuration(freshMs) })
      throw new NotFoundError('the item does not exist', { reason: 'ITEM_NOT_FOUND', id, cache: status })
    }
    const notModified = ifNoneMatch !== undefined && item.etag === ifNoneMatch
    return {
      item: notModified ? undefined : item,
      notModified,
      cache: isStale
        ? cacheFor(CacheOutcome.STALE, { staleReason: StaleReason.UNVERIFIED })
        : cacheFor(CacheOutcome.HIT, { freshFor: toDuration(freshMs) }),
      near: true,
      revision: BigInt(asOf),
    }
  }

  /**
   * Takes an answer of the service for what it is: shown, and stored iff it is whole and passes. False when it is older
   * than what is known here, so that the caller should ask again. What the service itself marks as stale is not stored.
   */
  #admit(
    id: string,
    item: Item | undefined,
    cache: CacheStatus | undefined,
    epoch: number,
    isWhole: boolean,
  ): boolean {
    if (isWhole) freeze(item)
    freeze(cache)
    if (cache === undefined || epoch !== this.log.epoch) return true
    const tags = item === undefined ? [] : tagsOf(item)
    const copy = { id, asOf: Number(cache.asOf), tags, value: { item, cache } }
    if (!isWhole || cache.outcome === CacheOutcome.STALE) {
      this.log.shown(copy)
      return !isWhole || this.log.judge(copy) === 'current'
    }
    return this.#store.put(
      copy,
      item === undefined ? 256 + id.length : sizeOf(item),
      toMs(cache.freshFor) ?? 0,
    )
  }

  /** An item was shown in a list. What is held already is not put in doubt by it. */
  listed(item: Item, revision: bigint): void {
    if (this.#store.peek(item.id)?.value.item?.revision === item.revision) return
    this.log.shown({ id: item.id, asOf: Number(revision), tags: [] })
  }

  /** The largest floor of these ids: what whole items must reach. Their tags are looked at when they come. */
  #floorOf(ids: readonly string[]): bigint {
    return BigInt(ids.reduce((floor, id) => Math.max(floor, this.log.floorOf(id)), 0))
  }

  /** What an answer must reach so that no event that is known here, of whatever tag, has overtaken it. */
  #known(ids: readonly string[]): bigint {
    const floor = this.#floorOf(ids)
    const position = BigInt(this.log.position)
    return floor > position ? floor : position
  }

  /** Follows the log until the signal aborts; never throws. */
  async run(
    transport: Transport,
    metadata: Readonly<Record<string, string>>,
    signal: AbortSignal,
  ): Promise<void> {
    const request = { heartbeatInterval: toDuration(HEARTBEAT_MS) }
    while (!signal.aborted) {
      try {
        for await (const message of follow(transport, { request, metadata, signal, now: this.#now })) {
          this.follow(message)
        }
      } catch (error) {
        this.log.fell(asItemCacheError(error))
        if (error instanceof OutOfRangeError) this.log.reset()
        else await sleep(REFUSED_PAUSE_MS, undefined, { signal, ref: false }).catch(() => {})
      }
    }
  }

  /** Applies one message of the stream. */
  follow(message: FollowMessage): void {
    const { log } = this
    switch (message.kind) {
      case 'started':
        log.stands()
        log.started(Number(message.position))
        break
      case 'event':
        log.event(rowOf(message))
        break
      case 'gap':
        log.gap(Number(message.through))
        break
      case 'heartbeat':
        log.heartbeat(Number(message.revision), message.heardAtMs)
        break
      case 'disconnected':
        log.fell(message.error)
        break
      case 'resumed':
        log.stands()
        break
    }
  }
}

const KINDS = {
  upserted: 'UPSERTED',
  deleted: 'DELETED',
  'keys-invalidated': 'KEYS_INVALIDATED',
  'tags-invalidated': 'TAGS_INVALIDATED',
  'tenant-invalidated': 'TENANT_INVALIDATED',
} as const

/** An event as the rule wants it. */
export function rowOf(event: Extract<FollowMessage, { kind: 'event' }>): LogRow {
  return {
    revision: Number(event.revision),
    kind: KINDS[event.event],
    mode: event.mode === 'expire' ? 'EXPIRE' : 'REMOVE',
    ids: event.ids,
    tags: event.tags,
  }
}

/** The tags by which an item is invalidated: its category is one. */
export function tagsOf({ tags, category }: Item): readonly string[] {
  return category === '' ? tags : [...tags, category]
}

/** Whether the near cache may answer, rather than only what the service says now. */
function mayAnswer({ near, freshness, fields, metadata }: GetOptions): boolean {
  return near !== false && freshness !== 'fresh' && fields === undefined && metadata === undefined
}

/** Whether the answer is the item, or that it is absent: something to keep. */
function bringsWhole({ freshness, fields, ifNoneMatch }: GetOptions): boolean {
  return freshness !== 'cache-only' && fields === undefined && ifNoneMatch === undefined
}

/** Whether a read asks for what any other would ask for. */
function isPlain(options: GetOptions): boolean {
  const { allowStale, minRevision, maxStalenessMs } = options
  if (!mayAnswer(options) || !bringsWhole(options)) return false
  return allowStale !== false && minRevision === undefined && maxStalenessMs === undefined
}

/** Waits as long as the caller does. What is waited for goes on for the others. */
async function patiently<T>(
  promise: Promise<T>,
  signal: AbortSignal | undefined,
  timeoutMs: number,
): Promise<T> {
  const given = Promise.withResolvers<never>()
  const cancel = () => given.reject(new CancelledError('the call was cancelled', { cause: signal?.reason }))
  const late = () => given.reject(new DeadlineExceededError('the deadline has passed'))
  const timer = setTimeout(late, timeoutMs)
  if (signal?.aborted) cancel()
  signal?.addEventListener('abort', cancel, { once: true })
  try {
    return await Promise.race([promise, given.promise])
  } finally {
    clearTimeout(timer)
    signal?.removeEventListener('abort', cancel)
  }
}

function freeze<T>(value: T): T {
  // Bytes (of unknown fields) cannot be frozen.
  if (typeof value !== 'object' || value === null || ArrayBuffer.isView(value) || Object.isFrozen(value)) {
    return value
  }
  for (const part of Object.values(value)) freeze(part)
  return Object.freeze(value)
}

function asItemCacheError(error: unknown): ItemCacheError {
  if (error instanceof ItemCacheError) return error
  return new InternalError('the stream of invalidations has failed', { cause: error })
}

/** About what an item takes in memory: two bytes a character, and something for each object. */
function sizeOf(value: unknown): number {
  switch (typeof value) {
    case 'string':
      return 24 + value.length * 2
    case 'object':
      if (value === null) return 8
      return Object.entries(value).reduce((sum, [key, part]) => sum + key.length + 16 + sizeOf(part), 64)
    default:
      return 16
  }
}
