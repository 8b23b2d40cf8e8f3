/**
 * The near cache: items in this process, kept right by the invalidation stream. It decides what may be served from
 * here; what cannot be is read from the service, with the floors that are known here as `min_revision`, so that no answer
 * is older than what the stream has shown.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { create } from '@bufbuild/protobuf'
import { toDuration, toMs } from './duration.ts'
import {
  CancelledError,
  DeadlineExceededError,
  NotFoundError,
  OutOfRangeError,
  UnavailableError,
} from './errors.ts'
import { type FollowMessage, follow } from './follow.ts'
import {
  CacheOutcome,
  type CacheStatus,
  CacheStatusSchema,
  type Item,
  StaleReason,
} from './gen/itemcache/v1/item_cache_pb.ts'
import { type LogRow, NearLog } from './near-log.ts'
import { type NearBounds, type NearStats, NearStore } from './near-store.ts'
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

/** What the near cache must know of how a read is made. */
export interface NearRead {
  readonly minRevision?: bigint | undefined
  readonly maxStalenessMs?: number | undefined
  readonly allowStale?: boolean | undefined
  readonly signal?: AbortSignal | undefined
  /** For the whole read, whatever it takes. */
  readonly timeoutMs: number
}

/** An answer of the service, or of the near cache. */
export interface NearAnswer {
  readonly item: Item | undefined
  readonly cache: CacheStatus | undefined
  readonly revision: bigint
}

/** Reads from the service. Rejects as `Client.get` does. */
export type Fetch<A extends NearAnswer> = (minRevision: bigint, timeoutMs: number) => Promise<A>

interface Held {
  /** Frozen, since all readers share it. `undefined`: absent. */
  readonly item: Item | undefined
  readonly cache: CacheStatus
}

export class NearCache {
  readonly log: NearLog
  readonly #store: NearStore<Held>
  readonly #now: () => number
  readonly #maxStaleMs: number
  readonly #flights = new Map<string, Promise<unknown>>()

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
  hit(id: string, { minRevision = 0n, maxStalenessMs }: Omit<NearRead, 'timeoutMs'>): NearAnswer | undefined {
    const copy = this.#store.get(id)
    if (copy === undefined) return undefined
    const ageMs = (toMs(copy.value.cache.age) ?? 0) + this.#now() - copy.storedAtMs
    if (copy.asOf < minRevision || (maxStalenessMs !== undefined && ageMs > maxStalenessMs)) {
      this.#store.unsuitable()
      return undefined
    }
    return answerOf(id, copy.value, copy.asOf, ageMs, this.#now() - copy.storedAtMs, undefined)
  }

  /**
   * Reads an item that is not here. Callers who ask for nothing special share one load; who joined one takes its result
   * only if it passes the rule when it comes, else loads for itself.
   */
  async load<A extends NearAnswer>(
    id: string,
    read: NearRead,
    shared: boolean,
    fetch: Fetch<A>,
  ): Promise<A | NearAnswer> {
    const deadlineMs = this.#now() + read.timeoutMs
    const leftMs = () => {
      const ms = deadlineMs - this.#now()
      if (ms > 0) return ms
      throw new DeadlineExceededError('the deadline has passed', { id })
    }
    const loadCurrent = () => this.#loadCurrent(id, read, (atLeast) => fetch(atLeast, leftMs()))
    try {
      if (!shared) return await loadCurrent()
      const flight = this.#flights.get(id)
      if (flight === undefined) {
        const own = loadCurrent()
        const settled = own.then(
          () => this.#flights.delete(id),
          () => this.#flights.delete(id),
        )
        this.#flights.set(id, settled)
        return await patiently(own, read.signal, leftMs())
      }
      await patiently(flight, read.signal, leftMs())
      const hit = this.#store.stale(id, Number.POSITIVE_INFINITY)
      if (hit !== undefined && this.log.isCurrent() && this.log.judge(hit) === 'current') {
        this.#store.coalesced++
        return answerOf(id, hit.value, hit.asOf, toMs(hit.value.cache.age) ?? 0, 0, 'coalesced')
      }
      return await loadCurrent()
    } catch (error) {
      const unanswered = error instanceof UnavailableError || error instanceof DeadlineExceededError
      if (!unanswered || read.allowStale === false || this.#maxStaleMs === 0) throw error
      const copy = this.#store.stale(id, this.#maxStaleMs)
      if (copy?.value.item === undefined || copy.asOf < (read.minRevision ?? 0n)) throw error
      this.#store.staleServed++
      const sinceMs = this.#now() - copy.storedAtMs
      return answerOf(
        id,
        copy.value,
        copy.asOf,
        (toMs(copy.value.cache.age) ?? 0) + sinceMs,
        sinceMs,
        'stale',
      )
    }
  }

  /** An answer that is not older than what is known here, as of its arrival. */
  async #loadCurrent<A extends NearAnswer>(
    id: string,
    read: NearRead,
    fetch: (minRevision: bigint) => Promise<A>,
  ): Promise<A> {
    const wanted = read.minRevision ?? 0n
    const epoch = this.log.epoch
    let floor = BigInt(this.log.floorOf(id))
    for (let attempt = 1; ; attempt++) {
      const minRevision = floor > wanted ? floor : wanted
      try {
        const answer = await fetch(minRevision)
        if (this.admit(id, answer.item, answer.cache, epoch) || attempt === 3) return answer
      } catch (error) {
        if (error instanceof NotFoundError) {
          if (this.admit(id, undefined, error.cache, epoch) || attempt === 3) throw error
        } else if (error instanceof OutOfRangeError && minRevision > wanted) {
          // The log is another one: the stream will find that out, too.
          return await fetch(wanted)
        } else throw error
      }
      // It was overtaken: by the event of its key, or of a tag that was not known before it came.
      floor = this.known([id])
    }
  }

  /**
   * Takes an answer of the service for what it is: shown, and stored iff it passes. False when it is older than what is
   * known here, so that the caller should ask again. What the service itself marks as stale is not stored.
   */
  admit(id: string, item: Item | undefined, cache: CacheStatus | undefined, epoch = this.log.epoch): boolean {
    if (cache === undefined || epoch !== this.log.epoch) return true
    const tags = item === undefined ? [] : tagsOf(item)
    const copy = { id, asOf: Number(cache.asOf), tags, value: { item: freeze(item), cache } }
    if (cache.outcome === CacheOutcome.STALE) return this.log.judge(copy) === 'current'
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

  /** What an answer must reach so that no event that is known here, of whatever tag, has overtaken it. */
  known(ids: readonly string[]): bigint {
    const floor = this.floorOf(ids)
    const position = BigInt(this.log.position)
    return floor > position ? floor : position
  }

  /** The largest floor of these ids: what a batch must reach. */
  floorOf(ids: readonly string[]): bigint {
    return BigInt(ids.reduce((floor, id) => Math.max(floor, this.log.floorOf(id)), 0))
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
        this.log.connected = false
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
        log.connected = true
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
        log.connected = false
        break
      case 'resumed':
        log.connected = true
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

function answerOf(
  id: string,
  { item, cache }: Held,
  asOf: number,
  ageMs: number,
  sinceMs: number,
  how: 'stale' | 'coalesced' | undefined,
): NearAnswer {
  const absent = item === undefined
  const status = create(CacheStatusSchema, {
    tier: cache.tier,
    outcome: how === 'stale' ? CacheOutcome.STALE : absent ? CacheOutcome.NEGATIVE_HIT : CacheOutcome.HIT,
    staleReason: how === 'stale' ? StaleReason.UNVERIFIED : StaleReason.UNSPECIFIED,
    coalesced: how === 'coalesced',
    age: toDuration(ageMs),
    asOf: BigInt(asOf),
    ...(how !== 'stale' && {
      freshFor: toDuration(Math.max(0, (toMs(cache.freshFor) ?? 0) - sinceMs)),
    }),
  })
  if (absent) {
    throw new NotFoundError('the item does not exist', { reason: 'ITEM_NOT_FOUND', id, cache: status })
  }
  return { item, cache: status, revision: BigInt(asOf) }
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
