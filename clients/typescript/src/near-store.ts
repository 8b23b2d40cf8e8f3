/** Dated copies in the server's LRU, judged by a near log whenever one is looked up. */
import { Lru } from '../../../src/tiers/lru.ts'
import type { ItemCacheError } from './errors.ts'
import type { NearLog, NearState } from './near-log.ts'

/** The bounds of a near cache. */
export interface NearBounds {
  /** 1 to 30,000,000. Default: 10,000. */
  readonly maxEntries?: number | undefined
  /** About what all entries together may take. Default: 32 MiB. */
  readonly maxBytes?: number | undefined
}

/** Counters since the start, and what is now. */
export interface NearStats {
  /** Reads that were answered from here. */
  readonly hits: number
  /** Reads that were not. */
  readonly misses: number
  /** Of the misses: answered from here after all, marked STALE, since the service did not answer. */
  readonly staleServed: number
  /** Reads that shared a load that another had started. */
  readonly coalesced: number
  /** Loads whose answer was overtaken by an invalidation: not stored. */
  readonly refused: number
  readonly evictions: number
  readonly entries: number
  readonly bytes: number
  readonly state: NearState
  /** Whether the invalidation stream stands now. */
  readonly connected: boolean
  /** Why it does not: the last error; `undefined` while it stands. */
  readonly error: ItemCacheError | undefined
  /** The revision up to which invalidations have been applied. */
  readonly position: bigint
  /** Milliseconds since the log was heard of for certain: what is served is at most so far behind. */
  readonly lagMs: number
}

/** `undefined`: known to be absent. */
export interface Copy<V> {
  readonly id: string
  readonly value: V
  readonly tags: readonly string[]
  asOf: number
}

/** A copy, and when it came, by the store's clock. */
export interface Stored<V> extends Copy<V> {
  readonly storedAtMs: number
}

export class NearStore<V> {
  readonly log: NearLog
  readonly #now: () => number
  readonly #lru: Lru<Stored<V>>
  #epoch: number
  #hits = 0
  #misses = 0
  #refused = 0
  staleServed = 0
  coalesced = 0

  constructor(log: NearLog, bounds: NearBounds, now: () => number) {
    const { maxEntries = 10_000, maxBytes = 32 * 1024 * 1024 } = bounds
    this.log = log
    this.#now = now
    this.#lru = new Lru({ maxEntries, maxBytes, now })
    this.#epoch = log.epoch
  }

  /** What is held of the history that the log is of. */
  get #held(): Lru<Stored<V>> {
    if (this.#epoch !== this.log.epoch) {
      this.#lru.clear()
      this.#epoch = this.log.epoch
    }
    return this.#lru
  }

  /** A copy that is current and fresh, stamped; counted. */
  get(id: string): Stored<V> | undefined {
    const held = this.#held
    const stored = held.get(id)
    if (stored === undefined || held.stale || !this.log.isCurrent() || this.log.judge(stored) !== 'current') {
      this.#misses++
      return undefined
    }
    stored.asOf = this.log.stamp(stored.asOf)
    this.#hits++
    return stored
  }

  /** A read found that the copy does not do for it. */
  unsuitable(): void {
    this.#hits--
    this.#misses++
  }

  /** A copy to show, marked, when there is nothing else: stored at most `maxStaleMs` ago and not removed since. */
  stale(id: string, maxStaleMs: number): Stored<V> | undefined {
    const stored = this.#held.peek(id)
    if (stored === undefined || this.#now() - stored.storedAtMs > maxStaleMs) return undefined
    return this.log.judge(stored) === 'removed' ? undefined : stored
  }

  /** Stores a copy iff it passes now; false if it does not. `freshForMs`: until it is looked up anew all the same. */
  put(copy: Copy<V>, cost: number, freshForMs: number): boolean {
    this.log.shown(copy)
    if (this.log.judge(copy) !== 'current') {
      this.#refused++
      return false
    }
    // A load that took long must not replace what a later one has brought.
    const held = this.#held.peek(copy.id)
    if (held !== undefined && held.asOf > copy.asOf) return true
    const nowMs = this.#now()
    this.#held.set(copy.id, { ...copy, storedAtMs: nowMs }, Math.ceil(cost), nowMs + freshForMs)
    return true
  }

  /** The revision of the content held, judged or not; for tests of whether a copy is known already. */
  peek(id: string): Copy<V> | undefined {
    return this.#held.peek(id)
  }

  stats(): NearStats {
    const { evictions, entries, bytes } = this.#held.stats()
    const { state, connected, error, position, lagMs } = this.log
    return {
      hits: this.#hits,
      misses: this.#misses,
      staleServed: this.staleServed,
      coalesced: this.coalesced,
      refused: this.#refused,
      evictions: evictions.entries + evictions.bytes,
      entries,
      bytes,
      state,
      connected,
      error,
      position: BigInt(position),
      lagMs,
    }
  }

  close(): void {
    this.#lru.clear()
  }
}
