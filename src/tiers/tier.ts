/**
 * The port behind which the four tiers stand, from near to far: memory, Redis, PostgreSQL, origin.
 *
 * The near two are caches: they hold dated copies and answer "I do not know" by leaving an id out. They never
 * throw: a cache that is off, down or slow is a miss with a reason. The far two are authoritative: they
 * answer definitely or throw an `ItemCacheError`.
 */
import type { LogRow } from '../invalidation/view.ts'
import type { ItemDraft, ItemRecord } from '../item.ts'

/** The tiers, from near to far. */
export type TierName = 'memory' | 'redis' | 'postgres' | 'origin'

/**
 * A tenant's revision, `timeline * 2^40 + n`. A safe integer: timelines up to 8,191 fit (one timeline is one
 * promotion of a PostgreSQL standby); the PostgreSQL tier refuses larger ones rather than rounding them.
 */
export type Revision = number

/**
 * A dated copy of one item: the state at `asOf`. `bytes` is `undefined` when the item was absent then, so a
 * copy may be negative. Times are milliseconds of this process's monotonic clock.
 */
export interface Copy {
  readonly id: string
  /** The tenant revision of the snapshot that the copy was read from. */
  readonly asOf: Revision
  /** The encoded `itemcache.v1.Item`, or `undefined` for an absent item. */
  readonly bytes: Uint8Array | undefined
  /** The revision of the item's last change: its etag derives from it. 0 for an item that never existed. */
  readonly revision: Revision
  /** The tags whose invalidation concerns the copy, the category among them. Empty for an absent item. */
  readonly tags: readonly string[]
  /** When the SELECT that read it was sent. `age` counts from here. */
  readonly verifiedAtMs: number
  /** Until when it is fresh (soft TTL). Past it the copy may only be served as stale. */
  readonly freshUntilMs: number
}

/** The span of one call of a tier: what the tier passes on of it, and may tell it. */
export interface TierSpan {
  /** As W3C's `traceparent`; `undefined` when the trace is not sampled. */
  readonly traceparent: string | undefined
  /** What carries the context to a server that speaks HTTP. */
  headers(): Readonly<Record<string, string>>
  note(attributes: Readonly<Record<string, string | number>>): void
  event(name: string): void
}

/** Why a cache tier was not asked, or did not answer. */
export type SkipReason = 'off' | 'down' | 'timeout'

/** What a cache tier answers: an id without an entry is a miss. `skipped` says why all of them are. */
export interface CacheAnswer {
  readonly copies: ReadonlyMap<string, Copy>
  readonly skipped?: SkipReason
}

/** What a tier holds of one id, for `InspectItem`. Loads nothing and touches no recency. */
export interface Inspection {
  readonly present: boolean
  /** The tier could not be asked. */
  readonly skipped?: SkipReason
  /** A copy is there, and it says that the item is absent. */
  readonly negative?: boolean
  readonly asOf?: Revision
  readonly ageMs?: number
  /** Until the tier drops it by itself. */
  readonly ttlMs?: number
  readonly sizeBytes?: number
  /** The tags whose invalidation concerns the copy. */
  readonly tags?: readonly string[]
}

/** A tier that holds dated copies. Contract: `test/contract/cache-tier.ts`. */
export interface CacheTier {
  readonly name: 'memory' | 'redis'
  /** Copies of `ids` (1 to 500, distinct) that the tier holds, in one round trip or a few. Never throws. */
  read(tenant: string, ids: readonly string[]): Promise<CacheAnswer>
  /** Stores copies; each replaces what is there unless the stored `asOf` is greater. Never throws. */
  store(tenant: string, copies: readonly Copy[]): Promise<void>
  inspect(tenant: string, id: string): Promise<Inspection>
}

/**
 * What asking for the lock of a key gave.
 *
 * - `ours`: everybody else waits until it is released, or its time is over.
 * - `handed-on`: ours likewise, and another one may have had it just now, so that the key may be loaded.
 * - `free`: nobody need wait. The last holder failed just now, or it is not known who holds the lock: the tier does not
 *   answer. It may be ours all the same, so it is renewed and released as if it were.
 * - a number: another one holds it, for so many milliseconds at most unless it is renewed.
 */
export type LockState = 'ours' | 'handed-on' | 'free' | number

/** One who asks for a key's lock. The token is its own: random, and used for nobody else. */
export interface LockClaim {
  readonly id: string
  readonly token: string
}

/**
 * Locks that instances share, so that one of them loads a key and the others wait. They save work and prove nothing:
 * whoever does not get one may load all the same. Never throws.
 */
export interface LoadLocks {
  /** A state for every claim. Asking again with the same token is harmless. */
  acquire(tenant: string, claims: readonly LockClaim[]): Promise<ReadonlyMap<string, LockState>>
  /** Makes the locks last for their full time again, where they are still the claims' own. */
  renew(tenant: string, claims: readonly LockClaim[]): Promise<void>
  /**
   * Gives up a lock that is still the claim's own: whoever takes it soon is told. For `openMs` after a failure, nobody
   * waits for the next one.
   */
  release(tenant: string, claim: LockClaim, openMs: number): Promise<void>
}

/** Where the keys of a cache lie that has several servers, each of which may fail alone. */
export interface Shards {
  /** The server that holds an id's copy and lock, by its address. */
  readonly shardOf: ((tenant: string, id: string) => string) | undefined
  /** An id of the tenant `''` that lies there; `undefined`: none does any more. */
  readonly idOn: ((shard: string) => string | undefined) | undefined
}

/** What PostgreSQL knows of an id at `asOf`. */
export interface Snapshot {
  readonly id: string
  readonly asOf: Revision
  /**
   * `present`: `bytes` is the item. `deleted`: a marker row, an authoritative "absent". `unknown`: no row; the
   * origin may know the item.
   */
  readonly state: 'present' | 'deleted' | 'unknown'
  /** The encoded `itemcache.v1.Item`; `undefined` unless `present`. */
  readonly bytes: Uint8Array | undefined
  /** The revision of the row's last change; 0 when `unknown`. */
  readonly revision: Revision
  readonly tags: readonly string[]
}

/** What a write says of itself. */
export interface WriteContext {
  readonly tenant: string
  /** `''`: none. A retry with the same id returns the first outcome and changes nothing. */
  readonly requestId: string
  /**
   * A digest of the request's content. A `requestId` that comes back with another one is refused as `invalid`
   * with reason `REQUEST_ID_REUSED`.
   */
  readonly fingerprint: string
  /** Who writes, for the log; `''` when the caller did not say. */
  readonly clientId: string
  readonly signal?: AbortSignal
  readonly span?: TierSpan | undefined
}

/** New content for an item that most likely is at the revision that is known of it. */
export interface KnownWrite {
  readonly write: WriteContext
  readonly known: ItemRecord
  readonly draft: ItemDraft
}

/** The outcome of a write that has been committed. */
export interface Written {
  /** The item after the write, as of `revision`; a deleted one after a delete. */
  readonly snapshot: Snapshot
  /** The tenant revision of the commit. */
  readonly revision: Revision
  /** The outcome is that of an earlier call with the same `requestId`. */
  readonly replayed: boolean
  /** Tags of the item before the write, whose list pages changed too. */
  readonly formerTags: readonly string[]
}

/** Which items one page of a list holds: keyset pagination in the order of ids. */
export interface ListQuery {
  readonly category: string
  readonly tag: string
  /** The last id of the page before; `''` for the first page. */
  readonly afterId: string
  readonly limit: number
}

/** What is invalidated. `all` is the whole tenant. */
export type InvalidationTarget =
  | { readonly kind: 'ids'; readonly ids: readonly string[] }
  | { readonly kind: 'tags'; readonly tags: readonly string[] }
  | { readonly kind: 'all' }

/** EXPIRE: the copy may be served as stale while it reloads. REMOVE: it may not be served at all. */
export type InvalidationMode = 'EXPIRE' | 'REMOVE'

/** The PostgreSQL tier: the truth about every item that was ever loaded or written. Throws `ItemCacheError`. */
export interface StoreTier {
  readonly name: 'postgres'
  /** One statement for all `ids` (1 to 500, distinct); an entry for every id. */
  read(
    tenant: string,
    ids: readonly string[],
    signal?: AbortSignal,
    span?: TierSpan,
  ): Promise<ReadonlyMap<string, Snapshot>>
  /** One page in the order of ids, all of one snapshot; at most `limit` present items. */
  list(
    tenant: string,
    query: ListQuery,
    signal?: AbortSignal,
    span?: TierSpan,
  ): Promise<{ readonly asOf: Revision; readonly items: readonly Snapshot[] }>
  /** Inserts what the origin knows unless a row exists by now, and reads the rows back from a new snapshot. */
  insertLoaded(
    tenant: string,
    loaded: ReadonlyMap<string, ItemDraft>,
    signal?: AbortSignal,
    span?: TierSpan,
  ): Promise<ReadonlyMap<string, Snapshot>>
  /**
   * Replaces the content of a row with what the origin says now (`undefined`: it knows no such item, which marks
   * the row deleted), only while the row is still at `fromRevision` (0: no row) and was not written locally; revives a marker row.
   * Reads the row back.
   */
  refetched(
    tenant: string,
    id: string,
    draft: ItemDraft | undefined,
    fromRevision: Revision,
    signal?: AbortSignal,
  ): Promise<Snapshot>
  /** `already-exists` when the item is present; revives a marker row. */
  create(write: WriteContext, id: string, draft: ItemDraft): Promise<Written>
  /**
   * `not-found` when absent and not `allowMissing`; `conflict` when `etag` is set and is not the current one.
   * `change` gets the current content (`undefined` when absent) and returns the new one; it may throw.
   */
  update(
    write: WriteContext,
    id: string,
    options: { readonly etag: string; readonly allowMissing: boolean },
    change: (current: ItemDraft | undefined) => ItemDraft,
  ): Promise<Written>
  /**
   * Replaces items that are still what the writer knows, by one statement and in one commit; of different items and request
   * ids. Those that are missing in the answer are not, or their request id was used before: nothing was written of them.
   */
  replaceKnown(
    tenant: string,
    writes: readonly KnownWrite[],
    span?: TierSpan,
  ): Promise<ReadonlyMap<string, Written>>
  /** Leaves a marker row. `not-found` when absent and not `allowMissing`; `conflict` as in `update`. */
  delete(
    write: WriteContext,
    id: string,
    options: { readonly etag: string; readonly allowMissing: boolean },
  ): Promise<Written>
  /** The revision of an earlier write with the same request id, whose retry this is; `undefined`: there was none. */
  outcomeOf(write: WriteContext): Promise<Revision | undefined>
  /** Appends an explicit invalidation to the log and returns its (last) revision. */
  invalidate(write: WriteContext, target: InvalidationTarget, mode: InvalidationMode): Promise<Revision>
  inspect(tenant: string, id: string): Promise<Inspection>
  /** Resolves when the database answers; throws `unavailable` otherwise. */
  ping(signal?: AbortSignal): Promise<void>
}

/** The external catalogue. Throws `ItemCacheError`. */
export interface OriginTier {
  readonly name: 'origin'
  /** Whether the catalogue can know the id at all: `^[1-9][0-9]{0,9}$`. Others are never sent to it. */
  serves(id: string): boolean
  /** `undefined`: the catalogue definitely has no such item. A signal that aborts ends the request. */
  fetch(id: string, signal?: AbortSignal, span?: TierSpan): Promise<ItemDraft | undefined>
}

/** One row of the ordered log. */
export interface LogEntry extends LogRow {
  /** By the database's clock, milliseconds since 1970. */
  readonly committedAtMs: number
  /** How long ago that was when the row was read, by the same clock. */
  readonly ageMs: number
  /** Who wrote, as the write said; `''` when it did not. */
  readonly writer: string
}

/** Rows of one tenant's log and the log's end, of one snapshot. */
export interface LogPage {
  /** The tenant's newest revision; the start of the timeline for a tenant without a row. */
  readonly revision: Revision
  /** In the order of revisions. */
  readonly rows: readonly LogEntry[]
  /** There are no rows after the last of `rows`. */
  readonly complete: boolean
}

/** What a listener is told. */
export interface LogListener {
  /** Something of the tenant was committed. */
  changed(tenant: string): void
  /** Changes are not told for now. Called once until `connected`. */
  lost(error: unknown): void
  /** From now on changes are told; there may have been some before. */
  connected(): void
}

/** Bounds of a page: it ends after `rows` rows, or after the row with which it has `names` ids and tags. */
export interface PageLimit {
  readonly rows: number
  readonly names: number
}

/** The ordered log, as PostgreSQL holds it. Throws `ItemCacheError`. */
export interface LogSource {
  /** The newest rows. */
  newest(tenant: string, limit: PageLimit): Promise<LogPage>
  /** For each tenant the next rows after a position, within the limit each, all in one statement. */
  after(
    positions: ReadonlyMap<string, Revision>,
    limit: PageLimit,
    signal?: AbortSignal,
  ): Promise<ReadonlyMap<string, LogPage>>
  /** The log's newest revision, and the oldest one that it still holds (`revision + 1` when it holds none). */
  bounds(tenant: string, signal?: AbortSignal): Promise<{ revision: Revision; oldest: Revision }>
  /** Tells of commits until disposed; reconnects by itself. */
  listen(listener: LogListener): Promise<AsyncDisposable>
  /**
   * Deletes the oldest rows of logs beyond `maxAgeMs` or `maxRows`, and requests beyond `maxAgeMs`, at most about
   * `step` rows of each tenant. Returns how many were deleted.
   */
  trim(options: { maxAgeMs: number; maxRows: number; step: number }, signal?: AbortSignal): Promise<number>
  /** A revision of this timeline exists: answers of older ones are dropped from now on. */
  seen(revision: Revision): void
}
