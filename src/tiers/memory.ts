/**
 * The memory tier: dated copies of this process in one LRU. What serves a read is synchronous: a hit takes no lock
 * and waits for nothing. `exclusive` guards what spans an await.
 *
 * A copy is kept as bytes outside of V8's heap (`records.ts`), so that collections of garbage have next to nothing to do with
 * it; who reads it gets one of their own.
 */
import { Mutex } from 'async-mutex'
import { untabled } from '../untabled.ts'
import { Lru, type LruStats } from './lru.ts'
import { MAX_EMPTY, Records } from './records.ts'
import { TagLists } from './tag-lists.ts'
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

/**
 * What a copy takes besides its record, its key and the text of its tags, in resident bytes as `bench/micro/copy-cost.ts`
 * measured them with Node 26.10.0 on Linux, x64 (295; 211 with one tag, 224 with four).
 */
const OVERHEAD = {
  /** The LRU's slot, the record's handle and the key's string. */
  copyBytes: 304,
  /** A list of tags that no other item has. Its tags' text is in its key, too. */
  tagListBytes: 192,
  tagBytes: 16,
}

export interface MemoryStats extends LruStats {
  /** Tenants that someone has, or awaits, an exclusive section of. */
  readonly tenantsInUse: number
  /** Bytes of the copies' records, without and with what is empty between them. */
  readonly recordBytes: { readonly live: number; readonly allocated: number }
  /** Different lists of tags. */
  readonly tagLists: number
}

interface TenantLock {
  readonly mutex: Mutex
  /** Sections that run or wait. The lock leaves the map with the last of them, never under one that waits. */
  users: number
}

/** What a read gets. */
interface FoundCopy extends Copy {
  asOf: Revision
}

// A copy's record: four floats of 8 bytes, two words of 4, and the item.
const AS_OF = 0
const REVISION = 1
const VERIFIED_AT = 2
const FRESH_UNTIL = 3
const TAGS = 8
const ITEM_LENGTH = 9
const ITEM = 40
/** As an item's length: there is none. */
const ABSENT = 0xffff_ffff

export class MemoryTier implements CacheTier {
  readonly name = 'memory'
  /** False: the tier is off. */
  readonly enabled: boolean
  /** By their records. */
  readonly #copies: Lru<number>
  readonly #records = new Records()
  readonly #tagLists = new TagLists()
  /** What was given out last, while it is held, and its record. */
  #found: FoundCopy | undefined
  #foundRecord = 0
  readonly #maxStaleMs: number
  readonly #jitter: number
  readonly #random: () => number
  readonly #now: () => number
  readonly #locks = new Map<string, TenantLock>()

  /** Throws a `RangeError` for bounds that are not positive. */
  constructor(options: MemoryTierOptions) {
    this.enabled = options.enabled ?? true
    this.#copies = new Lru<number>({
      ...options,
      ownerShare: options.tenantShare ?? 1,
      dropped: (record) => this.#remove(record),
    })
    this.#jitter = options.jitter ?? 0
    this.#random = options.random ?? Math.random
    this.#maxStaleMs = options.maxStaleMs
    this.#now = options.now
  }

  /** A real read: counts a hit or a miss and touches recency. The copy may be past its `freshUntilMs`. */
  get(tenant: string, id: string, nowMs = this.#now()): Copy | undefined {
    const record = this.#copies.get(id, tenant, nowMs)
    return record === undefined ? undefined : this.#take(record, id)
  }

  /**
   * The copy of an id of which all characters are ASCII, from where it lies in `bytes`. As `peek`, until `foundIsHit`. Its id
   * is memory's own string, which no `Map` should be asked for (`untabled.ts`).
   */
  findAscii(tenant: string, bytes: Uint8Array, from: number, to: number, nowMs: number): Copy | undefined {
    const record = this.#copies.findAscii(bytes, from, to, tenant, nowMs)
    return record === undefined ? undefined : this.#take(record, this.#copies.foundKey)
  }

  /** What `findAscii` has just found counts as a hit, and as used. */
  foundIsHit(): void {
    this.#copies.foundIsHit()
  }

  /** As `get`, but neither counts nor touches recency. */
  peek(tenant: string, id: string): Copy | undefined {
    const record = this.#copies.peek(id, tenant)
    return record === undefined ? undefined : this.#take(record, id)
  }

  /** Stores a copy unless the one that is there has a greater as-of. False when it was not stored, being older or too large. */
  set(tenant: string, copy: Copy): boolean {
    if (!this.enabled) return false
    const stored = this.#copies.peek(copy.id, tenant)
    if (stored !== undefined && this.#isNewer(stored, copy)) return false
    // A copy that is still fresh is kept, however short stale answers are allowed to be.
    const hardMs = this.#maxStaleMs * (1 - this.#jitter * this.#random())
    const hardUntilMs = Math.max(copy.freshUntilMs, copy.verifiedAtMs + hardMs)
    const record = this.#add(copy)
    const isStored = this.#copies.set(
      // Of an entry that is replaced the LRU keeps the key that it has.
      stored === undefined ? untabled(copy.id) : copy.id,
      record,
      costOf(tenant, copy),
      copy.freshUntilMs,
      hardUntilMs,
      tenant,
    )
    if (!isStored) this.#remove(record)
    return isStored
  }

  /**
   * Raises the as-of of the copy that this tier gave out last: it was seen to be the state at `asOf` too. In place, since
   * every hit of a busy tenant does it. Of another copy the tier learns nothing.
   */
  restamp(copy: Copy, asOf: Revision): Copy {
    if (asOf <= copy.asOf) return copy
    const found = this.#found
    if (copy !== found) return { ...copy, asOf }
    const { floats } = this.#records.segment(this.#foundRecord)
    floats[this.#records.at(this.#foundRecord) / 8 + AS_OF] = asOf
    found.asOf = asOf
    return found
  }

  /** Whether there was a copy to delete. One that is gone already is fine. */
  delete(tenant: string, id: string): boolean {
    return this.#copies.delete(id, tenant)
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
    const { value: record, cost, hardUntilMs } = entry
    const copy = this.#take(record, id)
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
    const { live, allocated } = this.#records
    return {
      ...this.#copies.stats(),
      tenantsInUse: this.#locks.size,
      recordBytes: { live, allocated },
      tagLists: this.#tagLists.size,
    }
  }

  /** A record of a copy. */
  #add({ asOf, revision, verifiedAtMs, freshUntilMs, tags, bytes }: Copy): number {
    const record = this.#records.allocate(ITEM + (bytes?.byteLength ?? 0))
    const at = this.#records.at(record)
    const { floats, words, bytes: into } = this.#records.segment(record)
    floats[at / 8 + AS_OF] = asOf
    floats[at / 8 + REVISION] = revision
    floats[at / 8 + VERIFIED_AT] = verifiedAtMs
    floats[at / 8 + FRESH_UNTIL] = freshUntilMs
    words[at / 4 + TAGS] = this.#tagLists.join(tags)
    words[at / 4 + ITEM_LENGTH] = bytes?.byteLength ?? ABSENT
    if (bytes !== undefined) into.set(bytes, at + ITEM)
    return record
  }

  /** The copy of a record. */
  #take(record: number, id: string): Copy {
    const at = this.#records.at(record)
    const { floats, words, bytes } = this.#records.segment(record)
    const length = words[at / 4 + ITEM_LENGTH] as number
    let item: Buffer | undefined
    if (length !== ABSENT) {
      item = Buffer.allocUnsafe(length)
      bytes.copy(item, 0, at + ITEM, at + ITEM + length)
    }
    this.#foundRecord = record
    this.#found = {
      id,
      asOf: floats[at / 8 + AS_OF] as number,
      bytes: item,
      revision: floats[at / 8 + REVISION] as number,
      tags: this.#tagLists.of(words[at / 4 + TAGS] as number),
      verifiedAtMs: floats[at / 8 + VERIFIED_AT] as number,
      freshUntilMs: floats[at / 8 + FRESH_UNTIL] as number,
    }
    return this.#found
  }

  #remove(record: number): void {
    if (record === this.#foundRecord) this.#found = undefined
    const { words } = this.#records.segment(record)
    this.#tagLists.leave(words[this.#records.at(record) / 4 + TAGS] as number)
    this.#records.free(record)
  }

  /** Whether what is held is newer: of two copies of one revision the one that was verified later. */
  #isNewer(record: number, { asOf, verifiedAtMs }: Copy): boolean {
    const at = this.#records.at(record) / 8
    const { floats } = this.#records.segment(record)
    const heldAsOf = floats[at + AS_OF] as number
    return heldAsOf > asOf || (heldAsOf === asOf && (floats[at + VERIFIED_AT] as number) > verifiedAtMs)
  }
}

/** What a copy costs in memory, in bytes: its record with what may be empty besides, its key and tags, and the measured overhead. */
function costOf(tenant: string, { id, bytes, tags }: Copy): number {
  const record = Records.sizeOf(ITEM + (bytes?.byteLength ?? 0))
  let cost = OVERHEAD.copyBytes + Math.ceil(record * (1 + MAX_EMPTY)) + textBytes(tenant) + textBytes(id)
  if (tags.length > 0) cost += OVERHEAD.tagListBytes
  for (const tag of tags) cost += OVERHEAD.tagBytes + 2 * textBytes(tag)
  return cost
}

/** As much as a text takes at most: V8 keeps one with a character of two bytes as such characters altogether. */
function textBytes(text: string): number {
  const bytes = Buffer.byteLength(text)
  return bytes === text.length ? bytes : Math.max(bytes, 2 * text.length)
}
