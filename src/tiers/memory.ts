/**
 * The memory tier: dated copies of this process in one LRU. What serves a read is synchronous: a hit takes no lock
 * and waits for nothing. `exclusive` guards what spans an await.
 */
import { Mutex } from 'async-mutex'
import { Lru, type LruStats } from './lru.ts'
import type { CacheAnswer, CacheTier, Copy, Inspection, Revision } from './tier.ts'

export interface MemoryTierOptions {
  readonly maxEntries: number
  /** The most that all copies may take together, keys and bookkeeping included. */
  readonly maxBytes: number
  /** The most that the copies of one tenant may take of either bound, above 0 and up to 1. Default 1. */
  readonly tenantShare?: number
  /** Hard TTL: a copy is dropped this long after its SELECT was sent, in milliseconds. */
  readonly maxStaleMs: number
  /** The share of the hard TTL that chance may take away, 0 to 1, so that copies do not go together. Default 0. */
  readonly jitter?: number
  /** False: nothing is held, and every read is a miss. Default true. */
  readonly enabled?: boolean
  /** Milliseconds of a monotonic clock. */
  readonly now: () => number
  /** 0 up to 1; see `LruOptions`. Default `Math.random`. */
  readonly random?: () => number
}

export interface MemoryStats extends LruStats {
  /** Tenants that someone has, or awaits, an exclusive section of. */
  readonly tenantsInUse: number
}

/**
 * What a copy takes besides the text of its key and tags and its encoded item, in resident bytes as
 * `bench/micro/copy-cost.ts` measured them with Node 26.10.0 on Linux, x64 (411, 287 and 16).
 */
const OVERHEAD = {
  /** The LRU's slot, the copy, its id and the key's string. */
  copyBytes: 416,
  /** What Node and the allocator keep for a byte array: only copies of present items have one. */
  arrayBytes: 288,
  tagBytes: 24,
}

interface TenantLock {
  readonly mutex: Mutex
  /** Sections that run or wait. The lock leaves the map with the last of them, never under one that waits. */
  users: number
}

/** A copy as the tier has it: of nobody else. */
interface HeldCopy extends Copy {
  asOf: Revision
}

export class MemoryTier implements CacheTier {
  readonly name = 'memory'
  /** False: the tier is off. */
  readonly enabled: boolean
  readonly #copies: Lru<HeldCopy>
  readonly #maxStaleMs: number
  readonly #jitter: number
  readonly #random: () => number
  readonly #now: () => number
  readonly #locks = new Map<string, TenantLock>()

  /** Throws a `RangeError` for bounds that are not positive. */
  constructor(options: MemoryTierOptions) {
    this.enabled = options.enabled ?? true
    this.#copies = new Lru<HeldCopy>({ ...options, ownerShare: options.tenantShare ?? 1 })
    this.#jitter = options.jitter ?? 0
    this.#random = options.random ?? Math.random
    this.#maxStaleMs = options.maxStaleMs
    this.#now = options.now
  }

  /** A real read: counts a hit or a miss and touches recency. The copy may be past its `freshUntilMs`. */
  get(tenant: string, id: string, nowMs = this.#now()): Copy | undefined {
    return this.#copies.get(id, tenant, nowMs)
  }

  /** The copy of an id of which all characters are ASCII, from where it lies in `bytes`. As `peek`, until `foundIsHit`. */
  findAscii(tenant: string, bytes: Uint8Array, from: number, to: number, nowMs: number): Copy | undefined {
    return this.#copies.findAscii(bytes, from, to, tenant, nowMs)
  }

  /** What `findAscii` has just found counts as a hit, and as used. */
  foundIsHit(): void {
    this.#copies.foundIsHit()
  }

  /** As `get`, but neither counts nor touches recency. */
  peek(tenant: string, id: string): Copy | undefined {
    return this.#copies.peek(id, tenant)
  }

  /** Stores a copy unless the one that is there has a greater as-of. False when it was not stored, being older or too large. */
  set(tenant: string, copy: Copy): boolean {
    if (!this.enabled) return false
    const stored = this.#copies.peek(copy.id, tenant)
    if (stored !== undefined && isNewer(stored, copy)) return false
    // A copy that is still fresh is kept, however short stale answers are allowed to be.
    const hardMs = this.#maxStaleMs * (1 - this.#jitter * this.#random())
    const hardUntilMs = Math.max(copy.freshUntilMs, copy.verifiedAtMs + hardMs)
    return this.#copies.set(copy.id, held(copy), costOf(tenant, copy), copy.freshUntilMs, hardUntilMs, tenant)
  }

  /**
   * Raises the as-of of a copy that this tier gave out: it was found to be the state at `asOf` too. In place, since every
   * hit of a busy tenant does it; whoever else holds the copy holds what is true of it.
   */
  restamp(copy: Copy, asOf: Revision): Copy {
    if (asOf > copy.asOf) (copy as HeldCopy).asOf = asOf
    return copy
  }

  /** Whether there was a copy to delete. One that is gone already is fine. */
  delete(tenant: string, id: string): boolean {
    return this.#copies.delete(id, tenant)
  }

  /** Drops the copies of all tenants. */
  clear(): void {
    this.#copies.clear()
  }

  /**
   * Runs a section while no other section of the tenant runs, in the order of the calls, and answers or throws what
   * it does. Sections of different tenants run side by side. A section must not wait for another of the same tenant:
   * inside, use `set`, not `store`.
   */
  async exclusive<T>(tenant: string, section: () => Promise<T> | T): Promise<T> {
    if (this.#locks.has(tenant)) return this.#locked(tenant, section)
    // Nobody is inside or waits, and a section that does not wait itself is over before anybody else can begin.
    const result = section()
    return result instanceof Promise ? this.#locked(tenant, () => result) : result
  }

  async #locked<T>(tenant: string, section: () => Promise<T> | T): Promise<T> {
    let lock = this.#locks.get(tenant)
    if (lock === undefined) {
      lock = { mutex: new Mutex(), users: 0 }
      this.#locks.set(tenant, lock)
    }
    lock.users += 1
    try {
      return await lock.mutex.runExclusive(section)
    } finally {
      lock.users -= 1
      if (lock.users === 0) this.#locks.delete(tenant)
    }
  }

  async read(tenant: string, ids: readonly string[]): Promise<CacheAnswer> {
    const copies = new Map<string, Copy>()
    for (const id of ids) {
      const copy = this.get(tenant, id)
      if (copy !== undefined) copies.set(id, copy)
    }
    return this.enabled ? { copies } : { copies, skipped: 'off' }
  }

  async store(tenant: string, copies: readonly Copy[]): Promise<void> {
    await this.exclusive(tenant, () => {
      for (const copy of copies) this.set(tenant, copy)
    })
  }

  async inspect(tenant: string, id: string): Promise<Inspection> {
    if (!this.enabled) return { present: false, skipped: 'off' }
    const entry = this.#copies.inspect(id, tenant)
    if (entry === undefined) return { present: false }
    const { value: copy, cost, hardUntilMs } = entry
    const nowMs = this.#now()
    return {
      present: true,
      negative: copy.bytes === undefined,
      asOf: copy.asOf,
      ageMs: nowMs - copy.verifiedAtMs,
      ttlMs: hardUntilMs - nowMs,
      sizeBytes: cost,
      tags: copy.tags,
    }
  }

  stats(): MemoryStats {
    return { ...this.#copies.stats(), tenantsInUse: this.#locks.size }
  }
}

/** Of two copies of one revision the one that was verified later. */
function isNewer(stored: Copy, copy: Copy): boolean {
  return stored.asOf > copy.asOf || (stored.asOf === copy.asOf && stored.verifiedAtMs > copy.verifiedAtMs)
}

/** What a copy costs in memory, in bytes: its encoded item, key and tags, and the measured overhead. */
function costOf(tenant: string, { id, bytes, tags }: Copy): number {
  let cost = OVERHEAD.copyBytes + Buffer.byteLength(tenant) + Buffer.byteLength(id)
  if (bytes !== undefined) cost += OVERHEAD.arrayBytes + bytes.byteLength
  for (const tag of tags) cost += OVERHEAD.tagBytes + Buffer.byteLength(tag)
  return cost
}

/** A copy that nobody else has, with bytes that are not a window into a larger buffer (a driver's), which they would keep alive. */
function held(copy: Copy): HeldCopy {
  const { bytes } = copy
  const isWhole = bytes === undefined || bytes.byteLength === bytes.buffer.byteLength
  return { ...copy, bytes: isWhole ? bytes : new Uint8Array(bytes) }
}
