/**
 * Loads: how flights walk the tiers, from Redis through PostgreSQL to the origin, and what becomes of what they bring.
 *
 * All flights of a group make one multi-key read in Redis, then one in PostgreSQL for what is left. What PostgreSQL has
 * never seen is asked of the origin, one by one, inserted into PostgreSQL unless somebody was faster, and read back from
 * there, so that every copy has an as-of. Each flight lands as soon as its own fate is known.
 *
 * Two things are done by one instance for all (`stampede.ts`): asking the origin, and refreshing behind a stale answer.
 * A load that PostgreSQL answers takes no lock: that would be a round trip more, for a statement that finds one row by
 * its key, and an item that is in PostgreSQL and nowhere else is rare. Nor do direct flights, whose readers want a
 * SELECT of their own.
 *
 * A result is **stored iff it passes on arrival**, so that a slow load that began before a write cannot bring the old
 * value back. What passes is stamped with the position; what is newer than the position raises its key's floor.
 */
import { ItemCacheError } from '../errors.ts'
import type { Tail } from '../invalidation/tail.ts'
import type { View } from '../invalidation/view.ts'
import type { ItemDraft } from '../item.ts'
import type { Metrics } from '../observe/metrics.ts'
import type { TierOperation } from '../observe/tracing.ts'
import type { MemoryTier } from '../tiers/memory.ts'
import type {
  CacheAnswer,
  CacheTier,
  Copy,
  LoadLocks,
  OriginTier,
  SkipReason,
  Snapshot,
  StoreTier,
  TierName,
} from '../tiers/tier.ts'
import { RecentFailures } from './failures.ts'
import type { Flight, Group, Load, Skipped } from './flights.ts'
import { OriginRequests } from './origin-requests.ts'
import { isInShare } from './rollout.ts'
import { Stampede } from './stampede.ts'
import { Turns } from './turns.ts'
import { type Traced, type Walk, walk } from './walk.ts'

/** The tiers and what watches them. `origin` is `undefined` when it is off; so are `locks` without Redis. */
export interface LoaderParts {
  readonly memory: MemoryTier
  readonly redis: CacheTier
  readonly postgres: StoreTier
  readonly origin: OriginTier | undefined
  readonly locks: LoadLocks | undefined
  readonly tail: Tail
  readonly metrics: Metrics
}

/** Settings of loads; durations in milliseconds. */
export interface LoaderOptions {
  /** Soft TTL of an item. */
  readonly freshForMs: number
  /** TTL of the knowledge that an item is absent. */
  readonly negativeTtlMs: number
  /** The share of each TTL that chance may take away, 0 to 1, so that copies do not expire together. */
  readonly jitter: number
  /** How long a failure of the origin is remembered for the key; 0: not at all. */
  readonly failureTtlMs: number
  /** After how long the lock of an instance that is gone ends. */
  readonly lockTtlMs: number
  /** Most SELECTs of many items that are under way at once. */
  readonly largeReads: number
  /** The share of keys that go through the caches, 0 to 100. */
  readonly rolloutPercent: number
  /** Monotonic clock. */
  readonly now: () => number
  /** Uniform in [0, 1). */
  readonly random: () => number
}

/** A flight whose item PostgreSQL has never seen: so it said in a SELECT that was sent at `readAtMs`. */
interface Unknown {
  readonly flight: Flight
  readonly snapshot: Snapshot
  readonly readAtMs: number
}

/** A flight and what it brings. */
interface Landing {
  readonly flight: Flight
  readonly copy: Copy
}

/** A SELECT of more items than this takes its turn, so that there is always a connection for smaller ones. */
const LARGE_READ = 50
/** How long it waits for its turn. */
const TURN_PATIENCE_MS = 1_000
/** A larger copy (a page of large items) is not worth its room. */
const MAX_KEPT_BYTES = 1024 * 1024
/** How much the newest load counts in the mean. */
const NEWEST_SHARE = 1 / 8

export class Loader {
  /** How long loads from PostgreSQL have been taking: a moving average. */
  meanLoadMs = 0
  readonly #parts: LoaderParts
  readonly #options: LoaderOptions
  readonly #stampede: Stampede | undefined
  readonly #failures: RecentFailures
  readonly #requests: OriginRequests | undefined
  readonly #turns: Turns
  /** The logical clock that orders readers and SELECTs. */
  #tick = 0
  readonly #background = new Set<Promise<unknown>>()

  constructor(parts: LoaderParts, options: LoaderOptions) {
    this.#parts = parts
    this.#options = options
    const { failureTtlMs: openMs, lockTtlMs: ttlMs, random } = options
    this.#turns = new Turns({ most: options.largeReads, patienceMs: TURN_PATIENCE_MS })
    this.#failures = new RecentFailures({ ...options, ttlMs: openMs })
    const { origin } = parts
    this.#requests =
      origin &&
      new OriginRequests(async (id, signal, trace) => {
        using asking = walk('origin.fetch', [{ trace }], 1)
        const draft = await this.#timed('origin', () => origin.fetch(id, signal, asking?.span), asking)
        asking?.found(draft === undefined ? 0 : 1, draft === undefined ? 1 : 0)
        this.#asked('origin', draft === undefined ? 0 : 1, draft === undefined ? 1 : 0)
        return draft
      })
    if (parts.locks !== undefined && ttlMs > 0) {
      this.#stampede = new Stampede({ locks: parts.locks, ttlMs, openMs, random })
    }
  }

  /** The next time of the logical clock. */
  tick(): number {
    this.#tick += 1
    return this.#tick
  }

  /** Whether every key goes through the caches. */
  get cachesAll(): boolean {
    return this.#options.rolloutPercent >= 100
  }

  /** Whether a key goes through the caches. */
  isCached(tenant: string, id: string): boolean {
    return isInShare(tenant, id, this.#options.rolloutPercent)
  }

  /** A copy of what a statement has just read, good for its TTL from `sentAtMs` on. */
  copyOf(snapshot: Snapshot, sentAtMs: number): Copy {
    const { freshForMs, negativeTtlMs, jitter, random } = this.#options
    const ttl = snapshot.bytes === undefined ? negativeTtlMs : freshForMs
    return {
      id: snapshot.id,
      asOf: snapshot.asOf,
      bytes: snapshot.bytes,
      revision: snapshot.state === 'present' ? snapshot.revision : 0,
      tags: snapshot.tags,
      verifiedAtMs: sentAtMs,
      freshUntilMs: sentAtMs + ttl * (1 - jitter * random()),
    }
  }

  /**
   * Stored iff it passes: puts copies, stamped, into memory, and into Redis without waiting for it. `kept` are the
   * copies as they were stored; those that did not pass as they were. `stored` settles when Redis has them.
   */
  async keep(
    tenant: string,
    copies: readonly Copy[],
    traced: readonly Traced[],
  ): Promise<{ kept: readonly Copy[]; stored: Promise<unknown> | undefined }> {
    const { memory, redis, tail } = this.#parts
    const passing: Copy[] = []
    const kept = await memory.exclusive(tenant, () => {
      // Known before applied: whatever becomes of a copy, somebody is shown it. Also while the view is being activated.
      for (const copy of copies) {
        tail.seen(copy.asOf)
        tail.raising(tenant)?.ahead(copy)
      }
      const view = tail.view(tenant)
      if (view === undefined) return copies
      return copies.map((copy) => {
        if (view.judge(copy) !== 'current' || (copy.bytes?.byteLength ?? 0) > MAX_KEPT_BYTES) return copy
        if (!this.isCached(tenant, copy.id)) return copy
        const stamped = stamp(view, copy)
        memory.set(tenant, stamped)
        passing.push(stamped)
        return stamped
      })
    })
    if (passing.length === 0) return { kept, stored: undefined }
    for (const { trace } of traced) trace?.event('refill', { 'itemcache.tier': 'memory' })
    const storing = this.walkOfRedis('redis.store', traced, passing.length)
    const stored = redis.store(tenant, passing).finally(() => storing?.[Symbol.dispose]())
    this.inBackground(stored)
    return { kept, stored }
  }

  /** Takes flights through the tiers; each lands, or fails, as soon as its fate is known. */
  depart(group: Group): void {
    this.inBackground(
      this.#walk(group).catch((error: unknown) => {
        for (const flight of group.flights) flight.fail(error)
      }),
    )
  }

  /** What Redis has of one item, for a caller who wants no other tier. */
  async readRedis(tenant: string, ids: readonly string[]): Promise<CacheAnswer> {
    const { redis, metrics } = this.#parts
    const answer = await this.#timed('redis', () => redis.read(tenant, ids))
    if (answer.skipped === 'timeout') metrics.tiers.redis.timeouts++
    else if (answer.skipped === 'down') metrics.tiers.redis.errors++
    return answer
  }

  /** A copy that Redis had and that was not good enough is a miss. A Redis that is off was not asked. */
  askedRedis(answer: CacheAnswer, hits: number, ids: number, walk: Walk | undefined): void {
    if (answer.skipped !== 'off') this.#asked('redis', hits, ids - hits)
    walk?.found(hits, ids - hits, answer.skipped)
  }

  /** A call of Redis begins; `undefined`: it is off, or nobody traces the call. */
  walkOfRedis(operation: TierOperation, traced: readonly Traced[], keys: number): Walk | undefined {
    return this.#parts.locks === undefined ? undefined : walk(operation, traced, keys)
  }

  /** The cache tiers that are off, or did not answer. */
  skipped(redis: SkipReason | undefined): readonly Skipped[] {
    const memory: readonly Skipped[] = this.#parts.memory.enabled ? [] : [{ tier: 'memory', reason: 'off' }]
    return redis === undefined ? memory : [...memory, { tier: 'redis', reason: redis }]
  }

  /** Remembers work that no caller waits for until it is done. */
  inBackground(work: Promise<unknown>): void {
    this.#background.add(work)
    const forget = () => {
      this.#background.delete(work)
    }
    work.then(forget, forget)
  }

  /** Work that is under way with nobody waiting for it, and failures that are remembered. */
  held(): { readonly background: number; readonly failures: number } {
    return { background: this.#background.size, failures: this.#failures.size }
  }

  /** Waits for all that no caller waits for. */
  async settled(): Promise<void> {
    while (this.#background.size > 0) await Promise.allSettled(this.#background)
  }

  async #walk(group: Group): Promise<void> {
    const { tenant, route, flights } = group
    if (route === 'direct') return this.#walkStore(group, flights)
    if (this.#stampede === undefined) return this.#walkAll(group, flights)
    const { awaited = [], behind = [] } = Object.groupBy(flights, (flight) =>
      flight.isAwaited ? 'awaited' : 'behind',
    )
    // Refreshes, once across instances. A reader who comes meanwhile does not wait for another instance's refresh.
    const waiting = this.#waiting(tenant, (flight) => flight.isAwaited)
    await Promise.all([
      this.#walkAll(group, awaited),
      this.#stampede.guard(tenant, behind, waiting, (turn) => this.#walkAll(group, turn)),
    ])
  }

  async #walkAll(group: Group, flights: readonly Flight[]): Promise<void> {
    if (flights.length === 0) return
    const { left } = await this.#walkRedis(group.tenant, flights)
    await this.#walkStore(group, left)
  }

  /** Lands what the authoritative tiers know, which is everything. */
  async #walkStore(group: Group, flights: readonly Flight[]): Promise<void> {
    const items = flights.filter((flight) => flight.load === undefined)
    await Promise.all([
      ...flights.map((flight) => flight.load && this.#walkAlone(group, flight, flight.load)),
      this.#walkItems(group, items),
    ])
  }

  async #walkItems(group: Group, flights: readonly Flight[]): Promise<void> {
    try {
      const unknown = await this.#walkPostgres(group, flights, false)
      await this.#walkOrigin(group, unknown)
    } catch (error) {
      for (const flight of flights) flight.fail(error)
    }
  }

  /** Lands a flight that brings its own statement. */
  async #walkAlone({ tenant, signal }: Group, flight: Flight, load: Load): Promise<void> {
    const sentAt = this.tick()
    const sentAtMs = this.#options.now()
    flight.sentAt = sentAt
    flight.goBelow()
    this.#parts.metrics.loads++
    try {
      using asking = walk('postgres.read', [flight], 1)
      const either = AbortSignal.any([signal, flight.signal])
      const snapshot = await this.#timed('postgres', () => load(either, asking?.span), asking)
      asking?.[Symbol.dispose]()
      this.#loaded(sentAtMs)
      this.#asked('postgres', 1, 0)
      await this.#arrive(tenant, [{ flight, copy: this.copyOf(snapshot, sentAtMs) }], 'postgres', sentAt)
    } catch (error) {
      flight.fail(error)
    }
  }

  /** Lands what Redis holds a good copy of. `answered`: Redis was asked and answered. */
  async #walkRedis(
    tenant: string,
    flights: readonly Flight[],
    again = false,
  ): Promise<{ left: readonly Flight[]; answered: boolean }> {
    const { tail, memory, metrics } = this.#parts
    using asking = this.walkOfRedis('redis.read', flights, flights.length)
    const answer = await this.readRedis(
      tenant,
      flights.map((flight) => flight.id),
    )
    const skipped = this.skipped(answer.skipped)
    const landing: Landing[] = []
    const left = await memory.exclusive(tenant, () => {
      const view = tail.view(tenant)
      const now = this.#options.now()
      return flights.filter((flight) => {
        flight.skipped = skipped
        const copy = answer.copies.get(flight.id)
        flight.fallback = copy ?? flight.fallback
        if (copy === undefined || view === undefined) return true
        // Redis proves nothing: its copies are under the same rule, and may bring the first news of a failover.
        tail.seen(copy.asOf)
        const passes = view.hasHeard(now) && view.judge(copy) === 'current'
        if (!passes && !again) metrics.refusedRedisCopies++
        if (!passes || now >= copy.freshUntilMs) return true
        if (copy.verifiedAtMs <= flight.verifiedAfterMs) return true
        const stamped = stamp(view, copy)
        view.ahead(stamped)
        memory.set(tenant, stamped)
        landing.push({ flight, copy: stamped })
        return false
      })
    })
    this.askedRedis(answer, landing.length, again ? landing.length : flights.length, asking)
    asking?.[Symbol.dispose]()
    for (const { flight, copy } of landing) flight.land({ copy, tier: 'redis', sentAt: 0, skipped })
    return { left: left.filter((flight) => !flight.isOver), answered: answer.skipped === undefined }
  }

  /** What flights do while another instance loads their keys. */
  #waiting(tenant: string, hurries: (flight: Flight) => boolean) {
    return {
      hurries,
      look: async (flights: readonly Flight[]) => {
        const { left, answered } = await this.#walkRedis(tenant, flights, true)
        return answered ? left : undefined
      },
    }
  }

  /** Lands what PostgreSQL knows, and returns the flights whose items only the origin may know. */
  async #walkPostgres(group: Group, flights: readonly Flight[], again: boolean): Promise<readonly Unknown[]> {
    const { origin, metrics } = this.#parts
    if (flights.length === 0) return []
    const { tenant, signal } = group
    const sentAt = this.tick()
    const sentAtMs = this.#options.now()
    for (const flight of flights) {
      flight.sentAt = sentAt
      flight.goBelow()
    }
    if (!again) metrics.loads += flights.length
    using asking = walk('postgres.read', flights, flights.length)
    const snapshots = await this.#select(tenant, flights, signal, asking)
    this.#loaded(sentAtMs)
    const known: Landing[] = []
    const unknown: Unknown[] = []
    for (const flight of flights) {
      const snapshot = snapshots.get(flight.id)
      if (snapshot === undefined) continue
      if (snapshot.state === 'unknown' && origin?.serves(flight.id))
        unknown.push({ flight, snapshot, readAtMs: sentAtMs })
      else known.push({ flight, copy: this.copyOf(snapshot, sentAtMs) })
    }
    this.#asked('postgres', known.length, again ? 0 : unknown.length)
    asking?.found(known.length, unknown.length)
    asking?.[Symbol.dispose]()
    await this.#arrive(tenant, known, 'postgres', sentAt)
    return unknown
  }

  /**
   * What PostgreSQL holds, by one statement. When that fails for what it reads (a row that is damaged, or is no item),
   * by one for each half, so that only those flights fail whose rows are the reason.
   */
  async #select(
    tenant: string,
    flights: readonly Flight[],
    signal: AbortSignal,
    asking: Walk | undefined,
  ): Promise<ReadonlyMap<string, Snapshot>> {
    const { postgres } = this.#parts
    const ids = flights.map((flight) => flight.id)
    const read = () => this.#timed('postgres', () => postgres.read(tenant, ids, signal, asking?.span), asking)
    try {
      return await (ids.length > LARGE_READ ? this.#turns.take(tenant, signal, read) : read())
    } catch (error) {
      if (error instanceof ItemCacheError && error.code !== 'internal') throw error
      if (flights.length === 1) {
        flights[0]?.fail(error)
        return new Map()
      }
      const middle = Math.ceil(flights.length / 2)
      const halves = [flights.slice(0, middle), flights.slice(middle)]
      const found = await Promise.all(halves.map((half) => this.#select(tenant, half, signal, asking)))
      return new Map(found.flatMap((some) => [...some]))
    }
  }

  /** Asks the origin, for each key on one instance, and not for one that has failed just now. */
  async #walkOrigin(group: Group, unknown: readonly Unknown[]): Promise<void> {
    const { tenant, route } = group
    const asking: Unknown[] = []
    for (const one of unknown) {
      const failure = this.#failures.recent(tenant, one.flight.id)
      if (failure !== undefined) one.flight.fail(failure)
      else if (!one.flight.isOver) asking.push(one)
    }
    // Redis that has only been slow may still have the lock; without Redis each instance asks for itself.
    const withoutRedis = asking[0]?.flight.skipped.some(
      ({ tier, reason }) => tier === 'redis' && reason !== 'timeout',
    )
    if (route === 'direct' || withoutRedis || this.#stampede === undefined) {
      return this.#fetch(tenant, asking)
    }
    const byFlight = new Map(asking.map((one) => [one.flight, one]))
    const waiting = this.#waiting(tenant, () => false)
    await this.#stampede.guard(tenant, [...byFlight.keys()], waiting, async (turn, first) => {
      // PostgreSQL is asked again where another one held the lock: it may have inserted the item since.
      const still = first
        ? turn.flatMap((flight) => byFlight.get(flight) ?? [])
        : await this.#walkPostgres(group, turn, true)
      await this.#fetch(tenant, still)
    })
  }

  /**
   * Asks the origin for each item by itself, so that a slow one delays no other. Items that arrive while an insert is
   * under way go together into the next one. What has arrived is inserted even if nobody waits for it any more: else
   * the origin would be asked again.
   */
  async #fetch(tenant: string, unknown: readonly Unknown[]): Promise<void> {
    const { postgres } = this.#parts
    const arrived = new Map<string, { flight: Flight; draft: ItemDraft }>()
    let inserting: Promise<void> | undefined
    const insert = async (batch: readonly { flight: Flight; draft: ItemDraft }[]): Promise<void> => {
      try {
        const sentAt = this.tick()
        const sentAtMs = this.#options.now()
        const drafts = new Map(batch.map(({ flight, draft }) => [flight.id, draft]))
        using inserting = walk(
          'postgres.insert',
          batch.map(({ flight }) => flight),
          drafts.size,
        )
        const insertion = () => postgres.insertLoaded(tenant, drafts, undefined, inserting?.span)
        const snapshots = await this.#timed('postgres', insertion, inserting)
        inserting?.[Symbol.dispose]()
        const landed = batch.map(({ flight }) => {
          const snapshot = snapshots.get(flight.id)
          if (snapshot === undefined) throw new ItemCacheError('internal', 'PostgreSQL left an id out')
          return { flight, copy: this.copyOf(snapshot, sentAtMs) }
        })
        await this.#arrive(tenant, landed, 'origin', sentAt)
      } catch (error) {
        if (batch.length > 1 && isRefusal(error)) {
          // One item that PostgreSQL does not take must not take the others along.
          for (const one of batch) await insert([one])
        } else {
          for (const { flight } of batch) {
            if (isRefusal(error)) this.#failures.remember(tenant, flight.id, asUnavailable(error))
            flight.fail(asUnavailable(error))
          }
        }
      }
    }
    const insertArrived = async () => {
      while (arrived.size > 0) {
        const batch = [...arrived.values()]
        arrived.clear()
        await insert(batch)
      }
      inserting = undefined
    }
    const fetchOne = async ({ flight, snapshot, readAtMs }: Unknown): Promise<void> => {
      let draft: ItemDraft | undefined
      try {
        draft = await this.#requests?.fetch(flight.id, flight.signal, flight.trace)
      } catch (error) {
        this.#failures.remember(tenant, flight.id, error)
        throw error
      }
      if (draft === undefined) {
        const absent = { flight, copy: this.copyOf(snapshot, readAtMs) }
        return this.#arrive(tenant, [absent], 'origin', flight.sentAt ?? 0)
      }
      arrived.set(flight.id, { flight, draft })
      inserting ??= insertArrived()
      return inserting
    }
    await Promise.all(unknown.map((one) => fetchOne(one).catch((error: unknown) => one.flight.fail(error))))
  }

  /** A result is stored iff it passes on arrival; then its readers are told. */
  async #arrive(tenant: string, landed: readonly Landing[], tier: TierName, sentAt: number): Promise<void> {
    if (landed.length === 0) return
    const { kept, stored } = await this.keep(
      tenant,
      landed.map(({ copy }) => copy),
      landed.map(({ flight }) => flight),
    )
    for (const [i, { flight, copy }] of landed.entries()) {
      flight.stored = stored
      flight.land({ copy: kept[i] ?? copy, tier, sentAt, skipped: flight.skipped })
    }
  }

  #loaded(sentAtMs: number): void {
    this.meanLoadMs += (this.#options.now() - sentAtMs - this.meanLoadMs) * NEWEST_SHARE
  }

  #asked(tier: TierName, hits: number, misses: number): void {
    const counters = this.#parts.metrics.tiers[tier]
    counters.hits += hits
    counters.misses += misses
  }

  /** Runs one call of a tier and records how long it took and whether it failed. One that nobody waits for does not count. */
  async #timed<T>(tier: TierName, call: () => Promise<T>, walk?: Walk): Promise<T> {
    const counters = this.#parts.metrics.tiers[tier]
    const startedMs = this.#options.now()
    try {
      return await call()
    } catch (error) {
      walk?.fail(error)
      if (error instanceof ItemCacheError && error.reason.endsWith('_TIMEOUT')) counters.timeouts++
      else if (!(error instanceof ItemCacheError && error.code === 'cancelled')) counters.errors++
      throw error
    } finally {
      counters.latency.record(this.#options.now() - startedMs)
    }
  }
}

/** PostgreSQL does not take the content. */
function isRefusal(error: unknown): error is ItemCacheError {
  return error instanceof ItemCacheError && (error.code === 'invalid' || error.reason === 'ITEM_TOO_LARGE')
}

/** What the origin sent is not the reader's fault. */
function asUnavailable(error: unknown): unknown {
  if (!isRefusal(error)) return error
  return new ItemCacheError('unavailable', 'the origin sent an item that cannot be stored', {
    reason: 'ORIGIN_INVALID',
    cause: error,
  })
}

/** Stamping: a copy that has just passed is the state at the position too. */
export function stamp(view: View, copy: Copy): Copy {
  const asOf = view.stamp(copy.asOf)
  return asOf === copy.asOf ? copy : { ...copy, asOf }
}
