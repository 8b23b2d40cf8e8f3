/** What a read may ask for, and what it gets. */
import type { ItemCacheError } from './errors.ts'
import type { CacheStatus, Item } from './gen/itemcache/v1/item_cache_pb.ts'
import type { CallOptions } from './transport.ts'

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
  /**
   * `false`: the near cache does not answer, not even when the service does not. Its knowledge still counts: no answer
   * is older. Default: true.
   */
  readonly near?: boolean | undefined
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
  /** Where the answer came from; of one of the near cache: where it once did. */
  readonly cache: CacheStatus | undefined
  /** The near cache answered. Its items are frozen: copy one to change it. */
  readonly near: boolean
  /** The answer is the tenant's state at this revision. */
  readonly revision: bigint
}

export interface GetManyOptions extends CallOptions, ReadOptions {}

/** The answer for one id: an item, or the error that `get` would have thrown. Neither: a miss with `cache-only`. */
export interface GetManyResult {
  readonly id: string
  readonly item: Item | undefined
  readonly error: ItemCacheError | undefined
  /** Where the answer came from; `undefined` with an error that no tier gave. */
  readonly cache: CacheStatus | undefined
  /** The near cache answered. */
  readonly near: boolean
}
