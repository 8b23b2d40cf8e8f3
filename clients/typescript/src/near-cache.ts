/**
 * The near cache: copies of items in the memory of the caller's process, kept right by the stream of invalidations.
 *
 * It is one more reader of the tenant's log. Every copy carries the revision of the state that it was read from; the `View`,
 * which is the service's own, decides whether a copy may be served as current. What an instance of the service may say
 * it may say, with the same bound: a copy is served as current only for 1.5 s after a moment until which the
 * stream is known to be complete. That moment comes from the heartbeats (`heardMs`), so neither a stream that is
 * interrupted nor one that is held up on its way makes an old copy look current.
 *
 * - An event raises the floors of what it names, and then the position; a gap distrusts what is older than its end.
 * - What this client has written, and whatever it has been shown, counts at once: it never goes back behind it. The
 *   service is asked for at least that revision.
 * - An answer is kept iff it passes when it arrives.
 * - After a disconnect the stream goes on after the position. When that is ahead of the log, the log is another one,
 *   and everything is forgotten.
 */

import { type LogRow, View } from '../../../src/invalidation/view.ts'
import { Lru } from '../../../src/tiers/lru.ts'
import { ItemCacheError, OutOfRangeError } from './errors.ts'
import {
  type InvalidationEvent,
  InvalidationKind,
  InvalidationMode,
  type Item,
} from './gen/itemcache/v1/item_cache_pb.ts'
import { type FollowParts, follow } from './watch.ts'

/** Bounds of a near cache. */
export interface NearCacheOptions {
  /** The most items that are kept. */
  readonly maxEntries: number
  /** About the most bytes that they may take. Default: no bound but `maxEntries`. */
  readonly maxBytes?: number | undefined
  /** Milliseconds between two heartbeats of the stream: 100 to 750. Default: 250. */
  readonly heartbeatMs?: number | undefined
  /**
   * For how long, in milliseconds since it was verified, a copy that is no longer current may be served, marked, while
   * the service does not answer. Default: 0, never.
   */
  readonly maxStaleMs?: number | undefined
}

/**
 * - `starting`: the stream has not begun yet; every read goes to the service.
 * - `current`: copies are served.
 * - `unverified`: the stream is interrupted, or brings no proof; every read goes to the service.
 * - `closed`
 */
export type NearCacheState = 'starting' | 'current' | 'unverified' | 'closed'

/** What a near cache has done so far, and how it is. */
export interface NearCacheStats {
  readonly state: NearCacheState
  readonly hits: number
  readonly misses: number
  readonly entries: number
  readonly bytes: number
  readonly evictions: number
  /** Events that were applied. */
  readonly events: number
  readonly gaps: number
  readonly disconnects: number
  /** The revision up to which the log has been applied. */
  readonly position: bigint
  /** Milliseconds since the moment until which the stream is known to be complete; `undefined`: never. */
  readonly lagMs: number | undefined
}

/** A state of an item at a revision. `item` is `undefined` when it is absent. */
export interface Copy {
  readonly id: string
  readonly asOf: number
  readonly item: Item | undefined
  /** A category counts as a tag. */
  readonly tags: readonly string[]
  /** When the service had verified it at the latest, and until when it is fresh, by the near cache's clock. */
  readonly verifiedAtMs: number
  readonly freshUntilMs: number
}

/** How new a copy must be. */
export interface Wanted {
  readonly minRevision: number
  readonly maxStalenessMs: number
}

/** Per copy, besides its text: what decoded items were measured to take. */
const COPY_BYTES = 1_800
const TEXT_FACTOR = 2
/** Floors are kept for more keys than copies: a reader may be loading others. */
const MIN_FLOORS = 10_000
/** After an error that trying again at once would not mend. */
const RETRY_MS = 5_000

export class NearCache {
  readonly #options: NearCacheOptions
  readonly #parts: FollowParts
  readonly #copies: Lru<Copy>
  readonly #closing = new AbortController()
  readonly #running: Promise<void>
  #view: View
  #active = false
  #hits = 0
  #misses = 0
  #events = 0
  #gaps = 0
  #disconnects = 0

  /** Begins to follow at once. Throws RangeError for bounds that are not positive. */
  constructor(options: NearCacheOptions, parts: FollowParts) {
    const { maxEntries, maxBytes, heartbeatMs = 250 } = options
    if (!(heartbeatMs >= 100 && heartbeatMs <= 750)) {
      throw new RangeError(`heartbeatMs should be 100 to 750, got ${heartbeatMs}`)
    }
    this.#options = options
    this.#parts = parts
    this.#copies = new Lru({ maxEntries, ...(maxBytes !== undefined && { maxBytes }), now: parts.now })
    this.#view = this.#newView()
    this.#running = this.#run(heartbeatMs)
  }

  get stats(): NearCacheStats {
    const { entries, bytes, evictions } = this.#copies.stats()
    const { heardMs, position } = this.#view
    return {
      state: this.#state(),
      hits: this.#hits,
      misses: this.#misses,
      entries,
      bytes,
      evictions: evictions.entries + evictions.bytes,
      events: this.#events,
      gaps: this.#gaps,
      disconnects: this.#disconnects,
      position: BigInt(position),
      lagMs: Number.isFinite(heardMs) ? this.#parts.now() - heardMs : undefined,
    }
  }

  /** The current copy, if there is one that is new enough. Counts as a read. */
  get(id: string, wanted: Wanted): Copy | undefined {
    const found = this.#copies.get(id)
    const copy = found && this.#current(found, wanted)
    if (copy === undefined) this.#misses++
    else this.#hits++
    return copy
  }

  /** The least revision that the service must be asked for, so that its answer is not older than what is known here. */
  least(id: string): number {
    const { keyFloor, tenantFloor } = this.#view.describe(id, [])
    return Math.max(keyFloor, tenantFloor)
  }

  /**
   * Takes an answer of the service. False: it is older than what is known here, so it must not be served. `keep`: whether
   * it is the whole state of the item, unmarked.
   */
  arrived(copy: Copy, keep: boolean): boolean {
    this.#view.seen(copy.asOf)
    if (this.#view.judge(copy) !== 'current') return false
    this.#view.ahead(copy)
    if (keep) this.#set(copy)
    return true
  }

  /** The revision up to which the log has been applied. */
  get position(): number {
    return this.#view.position
  }

  /** An item that this client has written, or deleted, is acknowledged: nothing older is served from now on. */
  wrote(id: string, mode: LogRow['mode'], revision: number): void {
    this.#acknowledge({
      revision,
      kind: mode === 'REMOVE' ? 'DELETED' : 'UPSERTED',
      mode,
      ids: [id],
      tags: [],
    })
  }

  /** An invalidation by this client is acknowledged. */
  invalidated(row: Omit<LogRow, 'revision'>, revision: number): void {
    this.#acknowledge({ ...row, revision })
  }

  /** A copy that may be served, marked, because the service does not answer: never one that was removed. */
  staleInstead(id: string, { minRevision }: Wanted): Copy | undefined {
    const { maxStaleMs = 0 } = this.#options
    const copy = this.#copies.peek(id)
    if (copy?.item === undefined || this.#view.judge(copy) === 'removed') return undefined
    if (copy.asOf < minRevision || this.#parts.now() - copy.verifiedAtMs > maxStaleMs) return undefined
    return copy
  }

  /** Stops following, and forgets everything. */
  async close(): Promise<void> {
    this.#closing.abort()
    this.#copies.clear()
    await this.#running
  }

  #acknowledge(row: LogRow): void {
    this.#view.seen(row.revision)
    this.#view.acknowledge(row)
  }

  #current(found: Copy, { minRevision, maxStalenessMs }: Wanted): Copy | undefined {
    const now = this.#parts.now()
    const view = this.#view
    if (!this.#active || !view.hasHeard(now) || view.judge(found) !== 'current') return undefined
    const asOf = view.stamp(found.asOf)
    const copy = asOf === found.asOf ? found : { ...found, asOf }
    if (copy !== found) this.#copies.replace(copy.id, copy)
    view.ahead(copy)
    const fits =
      copy.asOf >= minRevision && now - copy.verifiedAtMs < maxStalenessMs && now < copy.freshUntilMs
    return fits ? copy : undefined
  }

  #set(copy: Copy): void {
    const stored = this.#copies.peek(copy.id)
    if (stored !== undefined && stored.asOf > copy.asOf) return
    const { maxStaleMs = 0 } = this.#options
    const untilMs = Math.max(copy.freshUntilMs, copy.verifiedAtMs + maxStaleMs)
    const stamped = { ...copy, asOf: this.#view.stamp(copy.asOf) }
    this.#copies.set(copy.id, stamped, costOf(copy), copy.freshUntilMs, untilMs)
  }

  #state(): NearCacheState {
    if (this.#closing.signal.aborted) return 'closed'
    if (!this.#active) return 'starting'
    return this.#view.hasHeard(this.#parts.now()) ? 'current' : 'unverified'
  }

  #newView(): View {
    return new View(Math.max(this.#options.maxEntries, MIN_FLOORS))
  }

  async #run(heartbeatMs: number): Promise<void> {
    const { signal } = this.#closing
    while (!signal.aborted) {
      try {
        const resumeAfter = this.#active ? BigInt(this.#view.position) : undefined
        for await (const message of follow(this.#parts, { heartbeatMs, resumeAfter, signal })) {
          switch (message.kind) {
            case 'started':
              this.#started(Number(message.position))
              break
            case 'event':
              this.#apply(message.event)
              break
            case 'heartbeat':
              this.#reach(Number(message.revision))
              if (message.heardMs !== undefined) this.#view.heard(message.heardMs)
              break
            case 'gap':
              this.#gaps++
              this.#reach(Number(message.through))
              break
            case 'disconnected':
              this.#disconnects++
          }
        }
      } catch (error) {
        if (signal.aborted) return
        if (error instanceof OutOfRangeError) this.#forget()
        else if (error instanceof ItemCacheError) await this.#parts.sleep(RETRY_MS, signal)
        else throw error
      }
    }
  }

  #started(position: number): void {
    if (this.#active) return
    // What was read before is not covered by the stream; nothing is heard of yet.
    this.#view.activate(position, [], Number.NEGATIVE_INFINITY)
    this.#active = true
  }

  /** The floors of an event, then the position. Revisions that were passed over are a gap that nobody has named. */
  #apply(event: InvalidationEvent): void {
    const row = rowOf(event)
    if (row.revision <= this.#view.position) return
    this.#view.seen(row.revision)
    this.#reach(row.revision - 1)
    this.#view.apply(row)
    this.#events++
  }

  #reach(revision: number): void {
    if (revision <= this.#view.position) return
    this.#view.seen(revision)
    this.#view.jump(revision)
  }

  #forget(): void {
    this.#copies.clear()
    this.#view = this.#newView()
    this.#active = false
  }
}

const KINDS: ReadonlyMap<InvalidationKind, LogRow['kind']> = new Map([
  [InvalidationKind.UPSERTED, 'UPSERTED'],
  [InvalidationKind.DELETED, 'DELETED'],
  [InvalidationKind.KEYS_INVALIDATED, 'KEYS_INVALIDATED'],
  [InvalidationKind.TAGS_INVALIDATED, 'TAGS_INVALIDATED'],
])

/** An event as the view takes it. Kinds of a newer service concern the whole tenant. */
function rowOf({ revision, kind, mode, ids, tags }: InvalidationEvent): LogRow {
  return {
    revision: Number(revision),
    kind: KINDS.get(kind) ?? 'TENANT_INVALIDATED',
    mode: mode === InvalidationMode.EXPIRE ? 'EXPIRE' : 'REMOVE',
    ids,
    tags,
  }
}

function costOf({ id, item }: Copy): number {
  if (item === undefined) return COPY_BYTES / 4 + TEXT_FACTOR * id.length
  const { title, description, category, imageUri, tags, attributes, etag } = item
  let text = id.length + title.length + description.length + category.length + imageUri.length + etag.length
  for (const tag of tags) text += 8 + tag.length
  if (attributes !== undefined) text += 4 * JSON.stringify(attributes).length
  return COPY_BYTES + TEXT_FACTOR * text
}
