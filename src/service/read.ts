/**
 * Reads: from the nearest tier that holds a current copy.
 *
 * 1. `hit` looks into memory, synchronously: no promise, no lock.
 * 2. On a miss, `read` joins the key's **flight** or starts one. Flights that start in one tick walk the tiers
 *    together: one multi-key read in Redis, then one in PostgreSQL for what is left, then the origin for what
 *    PostgreSQL has never seen. The first tier that answers refills the ones above it.
 * 3. What the origin knew is inserted into PostgreSQL unless somebody was faster, and read back from there, so
 *    that every copy has an as-of.
 *
 * Which answers a reader may accept (the **rule of flights**; for "the rule" see `invalidation/view.ts`):
 * - a SELECT that was sent after the reader began is current by itself;
 * - anything else (memory, Redis, a flight that had sent its SELECT before) must pass the rule and the reader's own
 *   options *now*; else the reader starts a flight that skips Redis, once.
 *
 * A result is **stored iff it passes on arrival**, so that a slow load that began before a write cannot bring the old
 * value back. What passes is stamped with the position; what is newer than the position raises its key's floor. A
 * failed flight is not cached. Each caller keeps its own deadline: it stops waiting, and the flight goes on for the
 * others.
 *
 * **Stale answers**, always marked, and never a copy that was removed: a copy past its freshness or expired, while it
 * reloads; and, when the tiers below do not answer in time, the copy with the greatest as-of of either cache.
 */
import { ItemCacheError } from '../errors.ts'
import { aheadOfLog, type Tail, untilAborted } from '../invalidation/tail.ts'
import type { Verdict, View } from '../invalidation/view.ts'
import type { ItemDraft } from '../item.ts'
import type { Metrics } from '../observe/metrics.ts'
import type { MemoryTier } from '../tiers/memory.ts'
import type {
  CacheAnswer,
  CacheTier,
  Copy,
  OriginTier,
  Revision,
  SkipReason,
  Snapshot,
  StoreTier,
  TierName,
} from '../tiers/tier.ts'
import type { Probe } from './probe.ts'

/** How fresh an answer must be. */
export interface ReadOptions {
  /** CACHE_ONLY never leaves memory and Redis; FRESH always asks PostgreSQL. */
  readonly freshness: 'DEFAULT' | 'CACHE_ONLY' | 'FRESH'
  /** The answer must be the state at this revision or later; 0: no lower bound. */
  readonly minRevision: Revision
  /** A copy that was verified longer ago is reloaded; Infinity: no bound. */
  readonly maxStalenessMs: number
  /** Whether a copy past its freshness may be served while it reloads, or while the tiers below are down. */
  readonly allowStale: boolean
}

/** What a caller gets that asks for nothing in particular. */
export const DEFAULT_READ: ReadOptions = {
  freshness: 'DEFAULT',
  minRevision: 0,
  maxStalenessMs: Number.POSITIVE_INFINITY,
  allowStale: true,
}

/** How the caches took part in an answer. */
export type Outcome = 'HIT' | 'MISS' | 'STALE' | 'NEGATIVE_HIT' | 'BYPASS'
/** Why a stale copy was served. */
export type StaleReason = 'REVALIDATING' | 'SOFT_TIMEOUT' | 'TIER_DOWN' | 'UNVERIFIED'
/** A tier that could not be asked. */
export interface Skipped {
  readonly tier: TierName
  readonly reason: SkipReason
}

/** An answer and where it came from. */
export interface Answer {
  /** `undefined` only for a miss with CACHE_ONLY. A copy without bytes says that the item is absent. */
  readonly copy: Copy | undefined
  /** The tier that answered; `undefined` when none did. */
  readonly tier: TierName | undefined
  readonly outcome: Outcome
  readonly staleReason: StaleReason | undefined
  /** The answer came from a load that another caller had started. */
  readonly coalesced: boolean
  readonly skipped: readonly Skipped[]
}

/** What a flight brings. */
interface Landed {
  readonly copy: Copy
  readonly tier: TierName
  /** When its SELECT was sent, on the reader's logical clock; 0 for a copy from Redis, which proves nothing. */
  readonly sentAt: number
  readonly skipped: readonly Skipped[]
}

/** Reads what PostgreSQL holds under a key that is not an item's. */
export type Load = () => Promise<Snapshot>

/** One load of one key, shared by all who miss it meanwhile. */
interface Flight {
  readonly id: string
  /** `undefined` for an item, which is loaded together with others. */
  readonly load: Load | undefined
  readonly result: PromiseWithResolvers<Landed>
  /** On the reader's logical clock; `undefined` while no SELECT was sent. */
  sentAt: number | undefined
  /** Resolves when the caches have been asked: from then on `fallback` is what Redis had. */
  readonly cachesAsked: PromiseWithResolvers<undefined>
  /** The copy that Redis had and that was not good enough: served, marked, when the tiers below are down. */
  fallback: Copy | undefined
  skipped: readonly Skipped[]
}

/** A flight whose item PostgreSQL has never seen: so it said in a SELECT that was sent at `readAtMs`. */
interface Unknown {
  readonly flight: Flight
  readonly snapshot: Snapshot
  readonly readAtMs: number
}

/** `cached` flights ask Redis first; `direct` ones begin at PostgreSQL. */
type Route = 'cached' | 'direct'

/** Flights of one tenant and route that have not left yet. */
interface Boarding {
  readonly tenant: string
  readonly route: Route
  readonly flights: Flight[]
}

/** Settings of the read path; durations in milliseconds. */
export interface ReaderOptions {
  /** Soft TTL of an item. */
  readonly freshForMs: number
  /** TTL of the knowledge that an item is absent. */
  readonly negativeTtlMs: number
  /** The share of each TTL that chance may take away, 0 to 1, so that copies do not expire together. */
  readonly jitter: number
  /** A stale answer is at most so old. */
  readonly maxStaleMs: number
  /** A reader who has a stale copy to fall back on waits this long for a better one. */
  readonly softTimeoutMs: number
  /** Monotonic clock. */
  readonly now: () => number
  /** Uniform in [0, 1). */
  readonly random: () => number
}

/** The tiers and what watches them. `origin` is `undefined` when it is off. */
export interface ReaderParts {
  readonly memory: MemoryTier
  readonly redis: CacheTier
  readonly postgres: StoreTier
  readonly origin: OriginTier | undefined
  readonly tail: Tail
  readonly probe: Probe
  readonly metrics: Metrics
}

/** A larger copy (a page of large items) is not worth its room. */
const MAX_KEPT_BYTES = 1024 * 1024

const NOTHING_SKIPPED: readonly Skipped[] = []

/** A multi-key read never asks a tier for more keys than this at once. */
const MAX_KEYS = 500

/** A reader of items for all tenants of one instance. */
export class Reader {
  readonly #parts: ReaderParts
  readonly #options: ReaderOptions
  readonly #flights = { cached: new Map<string, Flight>(), direct: new Map<string, Flight>() }
  #boarding: Boarding[] = []
  /** The logical clock that orders readers and SELECTs. */
  #tick = 0
  readonly #background = new Set<Promise<unknown>>()

  constructor(parts: ReaderParts, options: ReaderOptions) {
    this.#parts = parts
    this.#options = options
  }

  /** Milliseconds of the clock that `Copy` uses. */
  now(): number {
    return this.#options.now()
  }

  /** The answer that memory can give, or `undefined`. Synchronous. */
  hit(tenant: string, id: string, options: ReadOptions, load?: Load): Answer | undefined {
    if (options.freshness === 'FRESH') return undefined
    const view = this.#parts.tail.view(tenant)
    if (view === undefined) return undefined
    const copy = this.#parts.memory.get(tenant, id)
    const answer = copy && this.#serve(tenant, view, copy, 'memory', options, false, NOTHING_SKIPPED, load)
    if (answer === undefined) this.#asked('memory', 0, 1)
    else this.#asked('memory', 1, 0)
    return answer
  }

  /** The answer for one item, from whichever tier has it. Throws `ItemCacheError`. */
  async read(tenant: string, id: string, options: ReadOptions, signal: AbortSignal): Promise<Answer> {
    return this.hit(tenant, id, options) ?? this.load(tenant, id, options, signal)
  }

  /**
   * The answer for a list page, which is a copy like an item's: `id` and `tags` must not be those of items (see
   * `LISTED`), and `load` reads the page. Throws `ItemCacheError`.
   */
  async page(tenant: string, id: string, load: Load, signal: AbortSignal): Promise<Answer> {
    return this.hit(tenant, id, DEFAULT_READ, load) ?? this.load(tenant, id, DEFAULT_READ, signal, load)
  }

  /** The answer for an item that `hit` could not give. Throws `ItemCacheError`. */
  async load(
    tenant: string,
    id: string,
    options: ReadOptions,
    signal: AbortSignal,
    load?: Load,
  ): Promise<Answer> {
    try {
      if (this.#parts.tail.view(tenant) === undefined) {
        // Nothing that is cached may be served before the tenant's log is known.
        await this.#parts.tail.activated(tenant, signal)
        const hit = this.hit(tenant, id, options, load)
        if (hit !== undefined) return hit
      }
      if (options.freshness === 'CACHE_ONLY') return await this.#fromRedisOnly(tenant, id, options, signal)
      return await this.#fromFlight(tenant, id, options, signal, load)
    } catch (error) {
      this.#parts.metrics.failedReads++
      throw error
    }
  }

  /** Makes sure that PostgreSQL holds what the origin knows of an item, and says what it holds. */
  async loaded(tenant: string, id: string, signal: AbortSignal): Promise<Copy> {
    const { flight } = this.#join(tenant, id, 'direct')
    return (await untilAborted(flight.result.promise, signal)).copy
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
   * Stored iff it passes: puts copies, stamped, into memory, and into Redis without waiting for it.
   * Returns the copies as they were stored; those that did not pass as they were.
   */
  async keep(tenant: string, copies: readonly Copy[]): Promise<readonly Copy[]> {
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
        const stamped = stamp(view, copy)
        memory.set(tenant, stamped)
        passing.push(stamped)
        return stamped
      })
    })
    if (passing.length > 0) this.#inBackground(redis.store(tenant, passing))
    return kept
  }

  /** Waits for refreshes and stores that no caller waits for. Used before the tiers are closed. */
  async settled(): Promise<void> {
    while (this.#background.size > 0) await Promise.allSettled(this.#background)
  }

  /** The answer that a copy allows, or `undefined` when it is not good enough for the reader. */
  #serve(
    tenant: string,
    view: View,
    found: Copy,
    tier: 'memory' | 'redis',
    options: ReadOptions,
    coalesced: boolean,
    skipped: readonly Skipped[],
    load?: Load,
  ): Answer | undefined {
    const now = this.#options.now()
    if (!view.hasHeard(now)) return undefined
    const verdict = view.judge(found)
    let copy = found
    if (verdict === 'current') {
      copy = stamp(view, found)
      if (copy !== found && tier === 'memory') this.#parts.memory.restamp(tenant, copy.id, copy.asOf)
      view.ahead(copy)
    } else if (verdict !== 'expired') return undefined
    if (!fits(copy, options, now)) return undefined
    if (verdict === 'current' && now < copy.freshUntilMs) {
      const outcome = copy.bytes === undefined ? 'NEGATIVE_HIT' : 'HIT'
      this.#count(tier, outcome, coalesced)
      this.#parts.probe.served(tenant, copy)
      return { copy, tier, outcome, staleReason: undefined, coalesced, skipped }
    }
    if (!options.allowStale || copy.bytes === undefined) return undefined
    if (now - copy.verifiedAtMs > this.#options.maxStaleMs) return undefined
    if (options.freshness !== 'CACHE_ONLY') this.#refresh(tenant, copy.id, load)
    this.#count(tier, 'STALE', coalesced)
    return { copy, tier, outcome: 'STALE', staleReason: 'REVALIDATING', coalesced, skipped }
  }

  async #fromRedisOnly(
    tenant: string,
    id: string,
    options: ReadOptions,
    signal: AbortSignal,
  ): Promise<Answer> {
    const answer = await untilAborted(this.#readRedis(tenant, [id]), signal)
    const skipped = skippedRedis(answer.skipped)
    const copy = answer.copies.get(id)
    const view = this.#parts.tail.view(tenant)
    const served = copy && view && this.#serve(tenant, view, copy, 'redis', options, false, skipped)
    this.#askedRedis(answer, served === undefined ? 0 : 1, 1)
    if (copy !== undefined && served !== undefined) {
      // Stored iff it passes: what is served as stale may have failed the rule.
      if (served.outcome !== 'STALE') this.#parts.memory.set(tenant, served.copy ?? copy)
      return served
    }
    const stale = this.#staleInstead(tenant, id, options, { fallback: copy, skipped }, 'SOFT_TIMEOUT', false)
    if (stale !== undefined) return stale
    this.#count(undefined, 'MISS', false)
    return {
      copy: undefined,
      tier: undefined,
      outcome: 'MISS',
      staleReason: undefined,
      coalesced: false,
      skipped,
    }
  }

  async #fromFlight(
    tenant: string,
    id: string,
    options: ReadOptions,
    signal: AbortSignal,
    load: Load | undefined,
  ): Promise<Answer> {
    const began = ++this.#tick
    const fresh = options.freshness === 'FRESH' || options.maxStalenessMs === 0
    let route: Route = fresh ? 'direct' : 'cached'
    for (;;) {
      const { flight, joined } = this.#join(tenant, id, route, load)
      const landed = await this.#patiently(tenant, flight, options, signal, joined)
      if ('outcome' in landed) return landed
      const { copy, tier, skipped, sentAt } = landed
      const answer = (outcome: Outcome): Answer => {
        this.#count(tier, outcome, joined)
        return { copy, tier, outcome, staleReason: undefined, coalesced: joined, skipped }
      }
      if (sentAt > began) {
        if (copy.asOf < options.minRevision) {
          throw aheadOfLog('min_revision', options.minRevision, copy.asOf)
        }
        return answer(fresh ? 'BYPASS' : 'MISS')
      }
      const view = this.#parts.tail.view(tenant)
      if (!fresh && view !== undefined) {
        if (tier === 'redis') {
          const served = this.#serve(tenant, view, copy, tier, options, joined, skipped, load)
          if (served !== undefined) return served
        } else {
          // An older flight's SELECT: as good as any copy that passes.
          const now = this.#options.now()
          const stamped = stamp(view, copy)
          if (view.hasHeard(now) && view.judge(copy) === 'current' && fits(stamped, options, now)) {
            return { ...answer('MISS'), copy: stamped }
          }
        }
      }
      if (route === 'direct') {
        throw new ItemCacheError('internal', 'a direct load was sent before its reader began')
      }
      route = 'direct'
    }
  }

  /**
   * Waits for a flight until the signal aborts. A stale answer comes instead when there is one and the flight fails, or
   * takes longer than the soft timeout; then it goes on for the others.
   */
  async #patiently(
    tenant: string,
    flight: Flight,
    options: ReadOptions,
    signal: AbortSignal,
    joined: boolean,
  ): Promise<Landed | Answer> {
    const { promise } = flight.result
    const instead = (reason: StaleReason, tier: TierName = 'postgres') =>
      this.#staleInstead(tenant, flight.id, options, flight, reason, joined, tier)
    if (!options.allowStale || options.freshness === 'FRESH') return untilAborted(promise, signal)
    const { promise: late, resolve: isLate } = Promise.withResolvers<undefined>()
    const timer = setTimeout(isLate, this.#options.softTimeoutMs, undefined)
    // While PostgreSQL is known not to answer, there is nothing to wait for once the caches have been asked.
    const down = this.#parts.tail.failing
    try {
      const first = await untilAborted(
        Promise.race([promise, down ? flight.cachesAsked.promise : late]),
        signal,
      )
      return first ?? instead(down ? 'TIER_DOWN' : 'SOFT_TIMEOUT') ?? (await untilAborted(promise, signal))
    } catch (error) {
      const down = error instanceof ItemCacheError && error.code === 'unavailable' ? error.reason : undefined
      const stale =
        down === undefined
          ? undefined
          : instead('TIER_DOWN', down.startsWith('ORIGIN') ? 'origin' : 'postgres')
      if (stale !== undefined) return stale
      throw error
    } finally {
      clearTimeout(timer)
    }
  }

  /**
   * The stale copy with the greatest as-of of either cache, if the reader allows it: never one that was removed, and one
   * whose content is known to have changed only when the tiers below are down.
   */
  #staleInstead(
    tenant: string,
    id: string,
    options: ReadOptions,
    { fallback, skipped }: Pick<Flight, 'fallback' | 'skipped'>,
    reason: StaleReason,
    coalesced: boolean,
    /** The tier that kept a better answer back. */
    tierDown: TierName = 'postgres',
  ): Answer | undefined {
    const { tail, memory } = this.#parts
    const view = tail.view(tenant)
    if (view === undefined || !options.allowStale || options.freshness === 'FRESH') return undefined
    const now = this.#options.now()
    let best: { copy: Copy; tier: 'memory' | 'redis'; verdict: Verdict } | undefined
    for (const [tier, found] of [
      ['memory', memory.peek(tenant, id)],
      ['redis', fallback],
    ] as const) {
      if (found?.bytes === undefined) continue
      const verdict = view.judge(found)
      if (verdict === 'removed' || (verdict === 'superseded' && reason !== 'TIER_DOWN')) continue
      const copy = verdict === 'current' ? stamp(view, found) : found
      if (!fits(copy, options, now) || now - copy.verifiedAtMs > this.#options.maxStaleMs) continue
      if (best === undefined || copy.asOf > best.copy.asOf) best = { copy, tier, verdict }
    }
    if (best === undefined) return undefined
    const { copy, tier, verdict } = best
    // A fresh copy that only the silence of the log keeps from being current is not known to be old.
    const unverified = verdict === 'current' && now < copy.freshUntilMs && !view.hasHeard(now)
    this.#count(tier, 'STALE', coalesced)
    const missed = { tier: tierDown, reason: reason === 'TIER_DOWN' ? 'down' : 'timeout' } as const
    return {
      copy,
      tier,
      outcome: 'STALE',
      staleReason: unverified ? 'UNVERIFIED' : reason,
      coalesced,
      skipped: options.freshness === 'CACHE_ONLY' ? skipped : [...skipped, missed],
    }
  }

  /** Reloads behind a stale answer; one reload per key, whoever asks. */
  #refresh(tenant: string, id: string, load: Load | undefined): void {
    const { flight, joined } = this.#join(tenant, id, 'cached', load)
    if (joined) return
    const { metrics } = this.#parts
    this.#inBackground(
      flight.result.promise.then(
        () => metrics.refreshesOk++,
        () => metrics.refreshesFailed++,
      ),
    )
  }

  /** The key's flight of this route, or a new one that leaves at the end of the tick. */
  #join(tenant: string, id: string, route: Route, load?: Load): { flight: Flight; joined: boolean } {
    const flights = this.#flights[route]
    const key = flightKey(tenant, id)
    const under = flights.get(key)
    // A direct flight is taken only before it leaves: those who choose it want a SELECT sent after they began.
    if (under !== undefined && (route === 'cached' || under.sentAt === undefined)) {
      return { flight: under, joined: true }
    }
    const flight: Flight = {
      id,
      load,
      result: Promise.withResolvers(),
      sentAt: undefined,
      cachesAsked: Promise.withResolvers(),
      fallback: undefined,
      skipped: [],
    }
    // Nobody may be waiting any more when it fails.
    flight.result.promise.catch(() => {})
    flights.set(key, flight)
    this.#board(tenant, route, flight)
    return { flight, joined: false }
  }

  #board(tenant: string, route: Route, flight: Flight): void {
    if (this.#boarding.length === 0) setImmediate(() => this.#depart())
    const waiting = this.#boarding.findLast((one) => one.tenant === tenant && one.route === route)
    if (waiting !== undefined && waiting.flights.length < MAX_KEYS) waiting.flights.push(flight)
    else this.#boarding.push({ tenant, route, flights: [flight] })
  }

  #depart(): void {
    const leaving = this.#boarding
    this.#boarding = []
    for (const { tenant, route, flights } of leaving) {
      this.#inBackground(
        this.#walk(tenant, route, flights).catch((error: unknown) => {
          for (const flight of flights) this.#fail(tenant, route, flight, error)
        }),
      )
    }
  }

  /** Takes flights of one tenant through the tiers; each lands, or fails, as soon as its fate is known. */
  async #walk(tenant: string, route: Route, flights: readonly Flight[]): Promise<void> {
    const left = route === 'cached' ? await this.#walkRedis(tenant, flights) : flights
    const items = left.filter((flight) => flight.load === undefined)
    await Promise.all([
      ...left.map((flight) => flight.load && this.#walkAlone(tenant, route, flight, flight.load)),
      items.length > 0 && this.#walkItems(tenant, route, items),
    ])
  }

  async #walkItems(tenant: string, route: Route, flights: readonly Flight[]): Promise<void> {
    const unknown = await this.#walkPostgres(tenant, route, flights)
    if (unknown.length > 0) await this.#walkOrigin(tenant, route, unknown)
  }

  /** Lands a flight that brings its own statement. */
  async #walkAlone(tenant: string, route: Route, flight: Flight, load: Load): Promise<void> {
    const sentAt = ++this.#tick
    const sentAtMs = this.#options.now()
    flight.sentAt = sentAt
    flight.cachesAsked.resolve(undefined)
    this.#parts.metrics.loads++
    try {
      const copy = this.copyOf(await this.#timed('postgres', load), sentAtMs)
      this.#asked('postgres', 1, 0)
      await this.#arrive(tenant, route, [{ flight, copy }], 'postgres', sentAt)
    } catch (error) {
      this.#fail(tenant, route, flight, error)
    }
  }

  /** Lands what Redis holds a good copy of, and returns the rest. */
  async #walkRedis(tenant: string, flights: readonly Flight[]): Promise<readonly Flight[]> {
    const { tail, memory, metrics } = this.#parts
    const answer = await this.#readRedis(
      tenant,
      flights.map((flight) => flight.id),
    )
    const skipped = skippedRedis(answer.skipped)
    const landing: { flight: Flight; copy: Copy }[] = []
    const left = await memory.exclusive(tenant, () => {
      const view = tail.view(tenant)
      const now = this.#options.now()
      return flights.filter((flight) => {
        flight.skipped = skipped
        const copy = answer.copies.get(flight.id)
        flight.fallback = copy
        if (copy === undefined || view === undefined) return true
        // Redis proves nothing: its copies are under the same rule, and may bring the first news of a failover.
        tail.seen(copy.asOf)
        const passes = view.hasHeard(now) && view.judge(copy) === 'current'
        if (!passes) metrics.refusedRedisCopies++
        if (!passes || now >= copy.freshUntilMs) return true
        const stamped = stamp(view, copy)
        view.ahead(stamped)
        memory.set(tenant, stamped)
        landing.push({ flight, copy: stamped })
        return false
      })
    })
    this.#askedRedis(answer, landing.length, flights.length)
    for (const { flight, copy } of landing) this.#land(tenant, 'cached', flight, copy, 'redis', 0)
    return left
  }

  /** Lands what PostgreSQL knows, and returns the flights whose items only the origin may know. */
  async #walkPostgres(tenant: string, route: Route, flights: readonly Flight[]): Promise<readonly Unknown[]> {
    const { postgres, origin, metrics } = this.#parts
    const sentAt = ++this.#tick
    const sentAtMs = this.#options.now()
    for (const flight of flights) {
      flight.sentAt = sentAt
      flight.cachesAsked.resolve(undefined)
    }
    metrics.loads += flights.length
    const snapshots = await this.#timed('postgres', () =>
      postgres.read(
        tenant,
        flights.map((flight) => flight.id),
      ),
    )
    const known: { flight: Flight; copy: Copy }[] = []
    const unknown: Unknown[] = []
    for (const flight of flights) {
      const snapshot = snapshots.get(flight.id)
      if (snapshot === undefined) throw new ItemCacheError('internal', 'PostgreSQL left an id out')
      if (snapshot.state === 'unknown' && origin?.serves(flight.id))
        unknown.push({ flight, snapshot, readAtMs: sentAtMs })
      else known.push({ flight, copy: this.copyOf(snapshot, sentAtMs) })
    }
    this.#asked('postgres', known.length, unknown.length)
    await this.#arrive(tenant, route, known, 'postgres', sentAt)
    return unknown
  }

  /**
   * Asks the origin for each item by itself, so that a slow one delays no other. Items that arrive while an
   * insert is under way go together into the next one.
   */
  async #walkOrigin(tenant: string, route: Route, unknown: readonly Unknown[]): Promise<void> {
    const { postgres, origin } = this.#parts
    if (origin === undefined) return
    const arrived = new Map<string, { flight: Flight; draft: ItemDraft }>()
    let inserting: Promise<void> | undefined
    const insert = async (batch: readonly { flight: Flight; draft: ItemDraft }[]): Promise<void> => {
      try {
        const sentAt = ++this.#tick
        const sentAtMs = this.#options.now()
        const drafts = new Map(batch.map(({ flight, draft }) => [flight.id, draft]))
        const snapshots = await this.#timed('postgres', () => postgres.insertLoaded(tenant, drafts))
        const landed = batch.map(({ flight }) => {
          const snapshot = snapshots.get(flight.id)
          if (snapshot === undefined) throw new ItemCacheError('internal', 'PostgreSQL left an id out')
          return { flight, copy: this.copyOf(snapshot, sentAtMs) }
        })
        await this.#arrive(tenant, route, landed, 'origin', sentAt)
      } catch (error) {
        if (batch.length > 1 && isRefusal(error)) {
          // One item that PostgreSQL does not take must not take the others along.
          for (const one of batch) await insert([one])
        } else {
          for (const { flight } of batch) this.#fail(tenant, route, flight, asUnavailable(error))
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
    await Promise.all(
      unknown.map(async ({ flight, snapshot, readAtMs }) => {
        try {
          const draft = await this.#timed('origin', () => origin.fetch(flight.id))
          this.#asked('origin', draft === undefined ? 0 : 1, draft === undefined ? 1 : 0)
          if (draft === undefined) {
            const absent = { flight, copy: this.copyOf(snapshot, readAtMs) }
            await this.#arrive(tenant, route, [absent], 'origin', flight.sentAt ?? 0)
            return
          }
          arrived.set(flight.id, { flight, draft })
          inserting ??= insertArrived()
          await inserting
        } catch (error) {
          this.#fail(tenant, route, flight, error)
        }
      }),
    )
  }

  /** A result is stored iff it passes on arrival; then its readers are told. */
  async #arrive(
    tenant: string,
    route: Route,
    landed: readonly { flight: Flight; copy: Copy }[],
    tier: TierName,
    sentAt: number,
  ): Promise<void> {
    const kept = await this.keep(
      tenant,
      landed.map(({ copy }) => copy),
    )
    for (const [i, { flight, copy }] of landed.entries()) {
      this.#land(tenant, route, flight, kept[i] ?? copy, tier, sentAt)
    }
  }

  #land(tenant: string, route: Route, flight: Flight, copy: Copy, tier: TierName, sentAt: number): void {
    this.#leave(tenant, route, flight)
    flight.result.resolve({ copy, tier, sentAt, skipped: flight.skipped })
  }

  #fail(tenant: string, route: Route, flight: Flight, error: unknown): void {
    this.#leave(tenant, route, flight)
    flight.result.reject(error)
  }

  #leave(tenant: string, route: Route, flight: Flight): void {
    const key = flightKey(tenant, flight.id)
    if (this.#flights[route].get(key) === flight) this.#flights[route].delete(key)
  }

  async #readRedis(tenant: string, ids: readonly string[]): Promise<CacheAnswer> {
    const { redis, metrics } = this.#parts
    const answer = await this.#timed('redis', () => redis.read(tenant, ids))
    if (answer.skipped === 'timeout') metrics.tiers.redis.timeouts++
    else if (answer.skipped === 'down') metrics.tiers.redis.errors++
    return answer
  }

  /** One read was answered by a tier; by none, when no cache had a copy and the caller wanted no other tier. */
  #count(tier: TierName | undefined, outcome: Outcome, coalesced: boolean): void {
    const { metrics } = this.#parts
    if (coalesced) metrics.coalescedLoads++
    if (tier === undefined) metrics.failedReads++
    else metrics.countRead(tier, outcome)
  }

  #asked(tier: TierName, hits: number, misses: number): void {
    const counters = this.#parts.metrics.tiers[tier]
    counters.hits += hits
    counters.misses += misses
  }

  /** A copy that Redis had and that was not good enough is a miss. A Redis that is off was not asked. */
  #askedRedis(answer: CacheAnswer, hits: number, ids: number): void {
    if (answer.skipped !== 'off') this.#asked('redis', hits, ids - hits)
  }

  /** Runs one call of a tier and records how long it took and whether it failed. */
  async #timed<T>(tier: TierName, call: () => Promise<T>): Promise<T> {
    const counters = this.#parts.metrics.tiers[tier]
    const startedMs = this.#options.now()
    try {
      return await call()
    } catch (error) {
      if (error instanceof ItemCacheError && error.reason.endsWith('_TIMEOUT')) counters.timeouts++
      else counters.errors++
      throw error
    } finally {
      counters.latency.record(this.#options.now() - startedMs)
    }
  }

  #inBackground(work: Promise<unknown>): void {
    this.#background.add(work)
    const forget = () => {
      this.#background.delete(work)
    }
    work.then(forget, forget)
  }
}

/** PostgreSQL does not take the content. */
function isRefusal(error: unknown): error is ItemCacheError {
  return error instanceof ItemCacheError && (error.code === 'invalid' || error.code === 'exhausted')
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
function stamp(view: View, copy: Copy): Copy {
  const asOf = view.stamp(copy.asOf)
  return asOf === copy.asOf ? copy : { ...copy, asOf }
}

/** The caller's own bounds on revision and age, which hold for stale answers too. No copy is younger than 0. */
function fits(copy: Copy, options: ReadOptions, now: number): boolean {
  return copy.asOf >= options.minRevision && now - copy.verifiedAtMs < options.maxStalenessMs
}

const flightKey = (tenant: string, id: string): string => `${tenant.length}:${tenant}${id}`

function skippedRedis(reason: SkipReason | undefined): readonly Skipped[] {
  return reason === undefined ? [] : [{ tier: 'redis', reason }]
}
