/**
 * A least-recently-used map, bounded by entries and by bytes, with a soft and a hard time to live.
 *
 * An entry is a slot number, and what an access needs of it is kept together in few cache lines, since what it waits for
 * is memory:
 *
 * - The index is a hash table with linear probing: a cell is a hash and a slot, so that only a key with the same hash is
 *   looked at. It is our own rather than a `Map` because it measures better (`bench/micro/lru.ts`): a `Map` needs several
 *   times the bytes, each eviction makes it read the evicted key and leave a hole behind, and the holes are removed all at
 *   once, in a pause.
 * - Its hash takes a secret seed and a secret multiplier, so that nobody who chooses keys can choose which of them collide.
 *   To look at a character costs as much as a cell, so of a long key only the end is hashed, where most keys differ. When
 *   more than four keys come that do not, all are hashed anew, whole, and from then on: once, so that nobody can have it
 *   done again.
 * - Key, owner and value of a slot lie side by side, with a second until which no time to live of it is over: as long as
 *   that has not come, nobody needs to look at its times.
 * - The recency list goes through slot 0 as its sentinel, whose `next` is the most recent entry and whose `previous` the
 *   least recent. Its links are alone in their array: a touch needs those of three slots, and they have the best chance
 *   to be in a near cache there.
 *
 * A key belongs to an owner (`''` when nobody says so), and two owners may have the same key. That is cheaper than a key
 * that is put together of both, which would have to be made for every read.
 *
 * Owners may be held to a share of either bound: one that is at its share evicts its own least recent entries, and nobody
 * else's. For that every owner has a recency list of its own, in arrays that only exist when there is such a share.
 *
 * Nothing here awaits, and a hit allocates nothing.
 */

export interface LruOptions<V> {
  /** A whole number from 1 to 30,000,000. Memory is taken as entries come, not in advance. */
  readonly maxEntries: number
  /** The most that the costs of all entries may sum up to; at least 1. Default: no bound. */
  readonly maxBytes?: number
  /** The most that the entries of one owner may take of either bound, above 0 and up to 1. Default 1: no such bound. */
  readonly ownerShare?: number
  /** Milliseconds of a monotonic clock. */
  readonly now: () => number
  /** 0 up to 1; makes the hash secret. Default `Math.random`. */
  readonly random?: () => number
  /** Told of every value that is held no more, but for those that `clear` deletes. It must not change the map. */
  readonly dropped?: (value: V) => void
}

/** Cumulative since construction, but for `entries` and `bytes`. */
export interface LruStats {
  readonly hits: number
  /** Reads that found nothing, or found an entry past its hard TTL. */
  readonly misses: number
  /** Keys that were added. Always `entries` + `evictions` + `expirations` + `deletions`. */
  readonly insertions: number
  /** By the bound that asked for room. An entry that is replaced by one too large to store counts as `bytes`. */
  readonly evictions: { readonly entries: number; readonly bytes: number }
  /** Entries that a read found past their hard TTL. */
  readonly expirations: number
  /** By `delete` and `clear`. */
  readonly deletions: number
  /** Entries held now; those past their hard TTL that nobody has read since are among them. */
  readonly entries: number
  readonly bytes: number
}

/** All that is known of one entry. */
export interface LruEntry<V> {
  readonly value: V
  readonly cost: number
  readonly softUntilMs: number
  readonly hardUntilMs: number
}

/** What one owner holds: a recency list through `#owned`, whose ends are `NONE`. */
interface Owner {
  readonly name: string
  first: number
  last: number
  entries: number
  bytes: number
}

// A slot's links in the recency list, from `slot * LINKS`, and its times, from `slot * TIMES`.
const LINKS = 2
const PREVIOUS = 0
const NEXT = 1
const TIMES = 2
const SOFT_UNTIL = 0
const HARD_UNTIL = 1
// A cell of the index, in words.
const CELL = 2
const SLOT = 0
const HASH = 1

/** The sentinel of the list; in a cell it means "none". */
const NONE = 0
// The links of a slot in its owner's list, in words from `slot * OWNED_WORDS`.
const OWNED_WORDS = 2
const OWNED_PREVIOUS = 0
const OWNED_NEXT = 1

// What a look-up needs of a slot, from `slot * PARTS`.
const PARTS = 4
const KEY = 0
const OWNER = 1
const VALUE = 2
/** Neither time to live is over before so many seconds, which are a small integer. */
const FRESH_UNTIL_S = 3
/** The largest. */
const FAR_S = 2 ** 31 - 1

/** Of the index, at least, for each slot: a cell costs 8 bytes, and a full one makes a search longer. */
const CELLS = 2
/** So many characters at the end of a key are hashed, */
const TAIL = 8
/** until more keys than this have one hash: then all are. */
const MAX_ALIKE = 4
const ALL = 2 ** 30
const FIRST_CAPACITY = 16
/** V8 has no array with more than 2^27 parts. */
const MAX_ENTRIES = 30_000_000
/** What a cell of the typed array of costs can hold. */
const MAX_COST = 0xffff_ffff

// Slots come from the index and from links, which hold valid slots only: reads of the typed arrays are in bounds,
// which is what `as number` says below.
export class Lru<V> {
  readonly maxEntries: number
  readonly maxBytes: number
  /** Whether what was found last was past its soft TTL. Look before the next call. */
  stale = false

  readonly #now: () => number
  readonly #seed: number
  readonly #multiplier: number
  readonly #maxOwnerEntries: number
  readonly #maxOwnerBytes: number
  readonly #hasShares: boolean
  readonly #dropped: ((value: V) => void) | undefined

  #capacity = 0
  #links = new Uint32Array()
  #times = new Float64Array()
  #costs = new Uint32Array()
  #hashes = new Uint32Array()
  /** Its length is a power of two. */
  #index = new Uint32Array()
  #parts: (string | number | V | undefined)[] = []
  /** Those that hold something, and by slot. */
  readonly #owners = new Map<string, Owner>()
  #ownerOf: (Owner | undefined)[] = []
  #owned = new Uint32Array()
  /** What was looked for and not found last: it is often what is set next. */
  #missedKey = ''
  #missedOwner = ''
  #missedHash = 0
  /** By `findAscii`. */
  #found = NONE
  /** The first of the slots that were given back, linked through `next`. */
  #free = NONE

  /** Of the call before: many in a row are of one owner. */
  #lastOwner = ''
  #ownerHash: number
  /** How many of a key's last characters are hashed. */
  #reach = TAIL

  #size = 0
  #bytes = 0
  #hits = 0
  #misses = 0
  #insertions = 0
  #evictedForEntries = 0
  #evictedForBytes = 0
  #expirations = 0
  #deletions = 0

  /** Throws a `RangeError` for bounds that are not positive. */
  constructor(options: LruOptions<V>) {
    const {
      maxEntries,
      maxBytes = Number.POSITIVE_INFINITY,
      ownerShare = 1,
      now,
      random = Math.random,
      dropped,
    } = options
    if (!Number.isInteger(maxEntries) || maxEntries < 1 || maxEntries > MAX_ENTRIES) {
      throw new RangeError(`maxEntries should be a whole number from 1 to ${MAX_ENTRIES}, got ${maxEntries}`)
    }
    if (!(maxBytes >= 1)) throw new RangeError(`maxBytes should be at least 1, got ${maxBytes}`)
    if (!(ownerShare > 0 && ownerShare <= 1)) {
      throw new RangeError(`ownerShare should be above 0 and at most 1, got ${ownerShare}`)
    }
    this.#hasShares = ownerShare < 1
    this.#maxOwnerEntries = Math.max(1, Math.floor(maxEntries * ownerShare))
    this.#maxOwnerBytes = Math.max(1, Math.floor(maxBytes * ownerShare))
    this.maxEntries = maxEntries
    this.maxBytes = maxBytes
    this.#now = now
    this.#dropped = dropped
    this.#seed = Math.floor(random() * 2 ** 30)
    // Odd, so that multiplying loses nothing.
    this.#multiplier = Math.floor(random() * 2 ** 30) * 2 + 1
    this.#ownerHash = this.#mix(this.#seed, this.#lastOwner, ALL)
    this.#missedHash = this.#hash(this.#missedKey, this.#missedOwner)
    this.#reset()
  }

  get size(): number {
    return this.#size
  }

  /**
   * The value, which becomes the most recent one; `stale` says whether its soft TTL is over. `undefined` is a miss.
   * An entry past its hard TTL is removed, and is a miss.
   */
  get(key: string, owner = '', nowMs = this.#now()): V | undefined {
    const hash = this.#hash(key, owner)
    const slot = this.#find(key, owner, hash)
    if (slot === NONE) {
      this.#misses += 1
      this.#missedKey = key
      this.#missedOwner = owner
      this.#missedHash = hash
      return undefined
    }
    if (this.#isOver(slot, nowMs)) {
      this.#remove(slot)
      this.#expirations += 1
      this.#misses += 1
      return undefined
    }
    this.#hits += 1
    this.#touch(slot)
    return this.#parts[slot * PARTS + VALUE] as V
  }

  /**
   * The living value of a key of which all characters are ASCII, from where it lies in `bytes`: no string is made of it. As
   * `peek`, until `foundIsHit` says otherwise.
   */
  findAscii(bytes: Uint8Array, from: number, to: number, owner: string, nowMs: number): V | undefined {
    const slot = this.#findAscii(bytes, from, to, owner)
    if (slot === NONE || this.#isOver(slot, nowMs)) return undefined
    this.#found = slot
    return this.#parts[slot * PARTS + VALUE] as V
  }

  /** The key of what `findAscii` has just found. */
  get foundKey(): string {
    return this.#parts[this.#found * PARTS + KEY] as string
  }

  /** What `findAscii` has just found becomes the most recent entry, and counts as a hit. */
  foundIsHit(): void {
    this.#hits += 1
    this.#touch(this.#found)
  }

  /** As `get`, but changes neither the order nor the statistics, and removes nothing. */
  peek(key: string, owner = ''): V | undefined {
    const slot = this.#findLiving(key, owner)
    if (slot === NONE) return undefined
    return this.#parts[slot * PARTS + VALUE] as V
  }

  /** As `peek`: touches nothing. */
  has(key: string, owner = ''): boolean {
    return this.#findLiving(key, owner) !== NONE
  }

  /** As `peek`: touches nothing. */
  inspect(key: string, owner = ''): LruEntry<V> | undefined {
    const slot = this.#findLiving(key, owner)
    if (slot === NONE) return undefined
    return {
      value: this.#parts[slot * PARTS + VALUE] as V,
      cost: this.#costs[slot] as number,
      softUntilMs: this.#times[slot * TIMES + SOFT_UNTIL] as number,
      hardUntilMs: this.#times[slot * TIMES + HARD_UNTIL] as number,
    }
  }

  /**
   * Stores a value (not `undefined`) as the most recent one, in place of an older one, and evicts from the least recent
   * end until both bounds hold: first what is the owner's, until it is within its share. A value that costs more than there
   * may be is not stored, the older one goes, and the answer is false. The times are of the injected clock; without them an entry does not age.
   * Throws a `RangeError` for a cost that is not a whole number of bytes.
   */
  set(
    key: string,
    value: V,
    cost: number,
    softUntilMs = Number.POSITIVE_INFINITY,
    hardUntilMs = Number.POSITIVE_INFINITY,
    ownerName = '',
  ): boolean {
    const hash =
      key === this.#missedKey && ownerName === this.#missedOwner
        ? this.#missedHash
        : this.#hash(key, ownerName)
    let slot = this.#find(key, ownerName, hash)
    if (cost > this.#maxOwnerBytes || cost > MAX_COST) {
      if (slot !== NONE) {
        this.#remove(slot)
        this.#evictedForBytes += 1
      }
      return false
    }
    if (cost !== cost >>> 0) throw new RangeError(`cost should be a whole number of bytes, got ${cost}`)

    if (slot === NONE) {
      const owner = this.#hasShares ? this.#owners.get(ownerName) : undefined
      if (owner?.entries === this.#maxOwnerEntries) {
        this.#remove(owner.last)
        this.#evictedForEntries += 1
      }
      let free = NONE
      if (this.#size === this.maxEntries) {
        free = this.#links[PREVIOUS] as number
        this.#detach(free)
        this.#evictedForEntries += 1
      }
      slot = this.#insert(key, ownerName, hash, free)
      if (this.#hasShares) this.#adopt(slot, ownerName)
      this.#insertions += 1
    } else {
      this.#dropped?.(this.#parts[slot * PARTS + VALUE] as V)
      this.#addCost(slot, -(this.#costs[slot] as number))
      this.#touch(slot)
    }
    // The entry itself is the most recent one and fits alone, so the evictions never reach it.
    this.#costs[slot] = 0
    const owner = this.#hasShares ? this.#ownerOf[slot] : undefined
    while (owner !== undefined && owner.bytes + cost > this.#maxOwnerBytes) {
      this.#remove(owner.last)
      this.#evictedForBytes += 1
    }
    while (this.#bytes + cost > this.maxBytes && this.#evict()) this.#evictedForBytes += 1
    this.#addCost(slot, cost)
    this.#costs[slot] = cost
    this.#parts[slot * PARTS + VALUE] = value
    this.#parts[slot * PARTS + FRESH_UNTIL_S] = wholeSeconds(Math.min(softUntilMs, hardUntilMs))
    this.#times[slot * TIMES + SOFT_UNTIL] = softUntilMs
    this.#times[slot * TIMES + HARD_UNTIL] = hardUntilMs
    return true
  }

  /** Whether there was an entry to delete. One that is gone already is fine. */
  delete(key: string, owner = ''): boolean {
    const slot = this.#find(key, owner, this.#hash(key, owner))
    if (slot === NONE) return false
    this.#remove(slot)
    this.#deletions += 1
    return true
  }

  /** Deletes every entry and gives the memory back. */
  clear(): void {
    this.#deletions += this.#size
    this.#reset()
  }

  /** What is held now, from most to least recent, without entries past their hard TTL. A copy; touches nothing. */
  entries(): [key: string, value: V][] {
    const nowMs = this.#now()
    const entries: [string, V][] = []
    for (
      let slot = this.#links[NEXT] as number;
      slot !== NONE;
      slot = this.#links[slot * LINKS + NEXT] as number
    ) {
      if (nowMs >= (this.#times[slot * TIMES + HARD_UNTIL] as number)) continue
      entries.push([this.#parts[slot * PARTS + KEY] as string, this.#parts[slot * PARTS + VALUE] as V])
    }
    return entries
  }

  stats(): LruStats {
    return {
      hits: this.#hits,
      misses: this.#misses,
      insertions: this.#insertions,
      evictions: { entries: this.#evictedForEntries, bytes: this.#evictedForBytes },
      expirations: this.#expirations,
      deletions: this.#deletions,
      entries: this.#size,
      bytes: this.#bytes,
    }
  }

  /** 30 bits are a small integer in every engine. */
  #hash(key: string, owner: string): number {
    return this.#mix(this.#hashOfOwner(owner), key, this.#reach) & 0x3fff_ffff
  }

  #hashOfOwner(owner: string): number {
    if (owner !== this.#lastOwner) {
      this.#lastOwner = owner
      this.#ownerHash = this.#mix(this.#seed, owner, ALL)
    }
    return this.#ownerHash
  }

  #mix(from: number, text: string, reach: number): number {
    const multiplier = this.#multiplier
    const { length } = text
    let hash = mixed(from, length, multiplier)
    for (let at = length > reach ? length - reach : 0; at < length; at += 1) {
      hash = mixed(hash, text.charCodeAt(at), multiplier)
    }
    return hash
  }

  /** As `#hash` of the text of these characters. */
  #hashAscii(bytes: Uint8Array, from: number, to: number, owner: string): number {
    const multiplier = this.#multiplier
    const length = to - from
    const reach = this.#reach
    let hash = mixed(this.#hashOfOwner(owner), length, multiplier)
    for (let at = length > reach ? to - reach : from; at < to; at += 1) {
      hash = mixed(hash, bytes[at] as number, multiplier)
    }
    return hash & 0x3fff_ffff
  }

  #find(key: string, owner: string, hash: number): number {
    const index = this.#index
    const parts = this.#parts
    const mask = index.length - 1
    let cell = (hash * CELL) & mask
    let slot = index[cell + SLOT] as number
    while (
      slot !== NONE &&
      (index[cell + HASH] !== hash ||
        parts[slot * PARTS + KEY] !== key ||
        parts[slot * PARTS + OWNER] !== owner)
    ) {
      cell = (cell + CELL) & mask
      slot = index[cell + SLOT] as number
    }
    return slot
  }

  /** As `#find` for the text of these characters. */
  #findAscii(bytes: Uint8Array, from: number, to: number, owner: string): number {
    const hash = this.#hashAscii(bytes, from, to, owner)
    const index = this.#index
    const parts = this.#parts
    const mask = index.length - 1
    let cell = (hash * CELL) & mask
    let slot = index[cell + SLOT] as number
    while (
      slot !== NONE &&
      (index[cell + HASH] !== hash ||
        !isText(parts[slot * PARTS + KEY] as string, bytes, from, to) ||
        parts[slot * PARTS + OWNER] !== owner)
    ) {
      cell = (cell + CELL) & mask
      slot = index[cell + SLOT] as number
    }
    return slot
  }

  #findLiving(key: string, owner: string): number {
    const slot = this.#find(key, owner, this.#hash(key, owner))
    return slot === NONE || this.#isOver(slot, this.#now()) ? NONE : slot
  }

  /** Whether a slot is past its hard TTL. `stale` says whether it is past its soft one. */
  #isOver(slot: number, nowMs: number): boolean {
    if (nowMs < (this.#parts[slot * PARTS + FRESH_UNTIL_S] as number) * 1000) {
      this.stale = false
      return false
    }
    this.stale = nowMs >= (this.#times[slot * TIMES + SOFT_UNTIL] as number)
    return nowMs >= (this.#times[slot * TIMES + HARD_UNTIL] as number)
  }

  /** Makes a slot the most recent one. */
  #touch(slot: number): void {
    if (this.#links[NEXT] === slot) return
    this.#unlink(slot)
    this.#linkFirst(slot)
    const owner = this.#hasShares ? this.#ownerOf[slot] : undefined
    if (owner === undefined || owner.first === slot) return
    this.#unlinkOwned(slot, owner)
    this.#linkOwnedFirst(slot, owner)
  }

  #addCost(slot: number, cost: number): void {
    this.#bytes += cost
    const owner = this.#hasShares ? this.#ownerOf[slot] : undefined
    if (owner !== undefined) owner.bytes += cost
  }

  #adopt(slot: number, name: string): void {
    let owner = this.#owners.get(name)
    if (owner === undefined) {
      owner = { name, first: NONE, last: NONE, entries: 0, bytes: 0 }
      this.#owners.set(name, owner)
    }
    owner.entries += 1
    this.#ownerOf[slot] = owner
    this.#linkOwnedFirst(slot, owner)
  }

  #disown(slot: number, owner: Owner): void {
    this.#unlinkOwned(slot, owner)
    this.#ownerOf[slot] = undefined
    owner.entries -= 1
    owner.bytes -= this.#costs[slot] as number
    if (owner.entries === 0) this.#owners.delete(owner.name)
  }

  #unlinkOwned(slot: number, owner: Owner): void {
    const owned = this.#owned
    const previous = owned[slot * OWNED_WORDS + OWNED_PREVIOUS] as number
    const next = owned[slot * OWNED_WORDS + OWNED_NEXT] as number
    if (previous === NONE) owner.first = next
    else owned[previous * OWNED_WORDS + OWNED_NEXT] = next
    if (next === NONE) owner.last = previous
    else owned[next * OWNED_WORDS + OWNED_PREVIOUS] = previous
  }

  #linkOwnedFirst(slot: number, owner: Owner): void {
    const owned = this.#owned
    owned[slot * OWNED_WORDS + OWNED_PREVIOUS] = NONE
    owned[slot * OWNED_WORDS + OWNED_NEXT] = owner.first
    if (owner.first === NONE) owner.last = slot
    else owned[owner.first * OWNED_WORDS + OWNED_PREVIOUS] = slot
    owner.first = slot
  }

  #unlink(slot: number): void {
    const links = this.#links
    const previous = links[slot * LINKS + PREVIOUS] as number
    const next = links[slot * LINKS + NEXT] as number
    links[previous * LINKS + NEXT] = next
    links[next * LINKS + PREVIOUS] = previous
  }

  #linkFirst(slot: number): void {
    const links = this.#links
    const first = links[NEXT] as number
    links[slot * LINKS + NEXT] = first
    links[slot * LINKS + PREVIOUS] = NONE
    links[first * LINKS + PREVIOUS] = slot
    links[NEXT] = slot
  }

  /**
   * Links a slot for a key that has none: the one that has just been detached, if any. There is room: fewer than
   * `maxEntries` are held.
   */
  #insert(key: string, owner: string, hash: number, detached: number): number {
    let slot = detached === NONE ? this.#free : detached
    if (slot !== NONE) {
      if (detached === NONE) this.#free = this.#links[slot * LINKS + NEXT] as number
      this.#parts[slot * PARTS + KEY] = key
      this.#parts[slot * PARTS + OWNER] = owner
    } else {
      if (this.#size === this.#capacity) this.#grow()
      slot = this.#parts.push(key, owner, undefined, 0) / PARTS - 1
    }
    this.#hashes[slot] = hash
    this.#linkFirst(slot)
    this.#size += 1
    if (this.#enter(slot, hash) > MAX_ALIKE && this.#reach !== ALL) this.#hashAll()
    return slot
  }

  /** Removes the least recent entry; false if there is none. */
  #evict(): boolean {
    const last = this.#links[PREVIOUS] as number
    if (last === NONE) return false
    this.#remove(last)
    return true
  }

  #remove(slot: number): void {
    this.#detach(slot)
    this.#parts[slot * PARTS + KEY] = ''
    this.#parts[slot * PARTS + OWNER] = ''
    this.#parts[slot * PARTS + VALUE] = undefined
    this.#links[slot * LINKS + NEXT] = this.#free
    this.#free = slot
  }

  /** Takes an entry out of the index and the lists. Its slot is to be used again, or given back. */
  #detach(slot: number): void {
    this.#dropped?.(this.#parts[slot * PARTS + VALUE] as V)
    this.#leave(slot)
    this.#unlink(slot)
    const owner = this.#hasShares ? this.#ownerOf[slot] : undefined
    if (owner !== undefined) this.#disown(slot, owner)
    this.#bytes -= this.#costs[slot] as number
    this.#size -= 1
  }

  /** Puts a slot into the index. The number of slots with its hash. */
  #enter(slot: number, hash: number): number {
    const index = this.#index
    const mask = index.length - 1
    let alike = 1
    let cell = (hash * CELL) & mask
    while (index[cell + SLOT] !== NONE) {
      if (index[cell + HASH] === hash) alike += 1
      cell = (cell + CELL) & mask
    }
    index[cell + SLOT] = slot
    index[cell + HASH] = hash
    return alike
  }

  /** From now on hashes are those of whole keys. */
  #hashAll(): void {
    this.#reach = ALL
    this.#missedHash = this.#hash(this.#missedKey, this.#missedOwner)
    this.#index.fill(NONE)
    for (
      let slot = this.#links[NEXT] as number;
      slot !== NONE;
      slot = this.#links[slot * LINKS + NEXT] as number
    ) {
      const key = this.#parts[slot * PARTS + KEY] as string
      const hash = this.#hash(key, this.#parts[slot * PARTS + OWNER] as string)
      this.#hashes[slot] = hash
      this.#enter(slot, hash)
    }
  }

  /** Takes a slot out of the index, and moves up what its cell had kept from a place nearer to where it is looked for first. */
  #leave(slot: number): void {
    const index = this.#index
    const mask = index.length - 1
    let empty = ((this.#hashes[slot] as number) * CELL) & mask
    while (index[empty + SLOT] !== slot) empty = (empty + CELL) & mask
    for (let cell = (empty + CELL) & mask; index[cell + SLOT] !== NONE; cell = (cell + CELL) & mask) {
      const hash = index[cell + HASH] as number
      const first = (hash * CELL) & mask
      if (((cell - first) & mask) < ((cell - empty) & mask)) continue
      index[empty + SLOT] = index[cell + SLOT] as number
      index[empty + HASH] = hash
      empty = cell
    }
    index[empty + SLOT] = NONE
  }

  /** Doubles the slots. Every slot is in use, so all enter the new index. */
  #grow(): void {
    const { links, times, costs, hashes, owned } = {
      links: this.#links,
      times: this.#times,
      costs: this.#costs,
      hashes: this.#hashes,
      owned: this.#owned,
    }
    this.#allocate(Math.min(this.#capacity * 2, this.maxEntries))
    this.#links.set(links)
    this.#times.set(times)
    this.#costs.set(costs)
    this.#hashes.set(hashes)
    this.#owned.set(owned)
    for (let slot = 1; slot <= this.#size; slot += 1) this.#enter(slot, hashes[slot] as number)
  }

  #reset(): void {
    this.#allocate(Math.min(FIRST_CAPACITY, this.maxEntries))
    this.#parts = ['', '', undefined, 0]
    this.#ownerOf = [undefined]
    this.#owners.clear()
    this.#free = NONE
    this.#size = 0
    this.#bytes = 0
  }

  #allocate(capacity: number): void {
    this.#capacity = capacity
    this.#links = new Uint32Array((capacity + 1) * LINKS)
    this.#times = new Float64Array((capacity + 1) * TIMES)
    this.#costs = new Uint32Array(capacity + 1)
    this.#hashes = new Uint32Array(capacity + 1)
    if (this.#hasShares) this.#owned = new Uint32Array((capacity + 1) * OWNED_WORDS)
    this.#index = new Uint32Array(CELLS * CELL * 2 ** Math.ceil(Math.log2(capacity)))
  }
}

/** The whole seconds of a time, or fewer. */
function wholeSeconds(ms: number): number {
  const seconds = ms / 1000
  if (seconds >= FAR_S) return FAR_S
  return seconds > -FAR_S ? Math.floor(seconds) | 0 : Number.NEGATIVE_INFINITY
}

/** A hash with one more unit, a UTF-16 code unit or a length. Of one with more than 17 bits the highest would be mixed with nothing. */
function mixed(hash: number, unit: number, multiplier: number): number {
  const product = Math.imul(hash ^ unit, multiplier)
  return product ^ (product >>> 15)
}

function isText(text: string, bytes: Uint8Array, from: number, to: number): boolean {
  if (text.length !== to - from) return false
  for (let at = 0; at < text.length; at += 1) if (text.charCodeAt(at) !== bytes[from + at]) return false
  return true
}
