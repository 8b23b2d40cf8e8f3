/**
 * Reads: from the nearest tier that holds a current copy.
 *
 * 1. `hit` looks into memory, synchronously: no promise, no lock.
 * 2. On a miss, `read` joins the key's flight or starts one (`flights.ts`), which takes it through the other tiers
 *    (`load.ts`). The first tier that answers refills the ones above it.
 *
 * Which answers a reader may accept (the **rule of flights**; for "the rule" see `invalidation/view.ts`):
 * - a SELECT that was sent after the reader began is current by itself;
 * - anything else (memory, Redis, a flight that had sent its SELECT before) must pass the rule and the reader's own
 *   options *now*; else the reader starts a flight that skips Redis, once.
 *
 * Each caller keeps its own deadline: it stops waiting, and the flight goes on for the others.
 *
 * **Stale answers**, always marked, and never a copy that was removed: a copy past its freshness or expired, while it
 * reloads; and, when the tiers below do not answer in time, the copy with the greatest as-of of either cache.
 *
 * **Early refreshes** (probabilistic early expiration, XFetch): a hit whose copy has little time left may start a refresh
 * behind its answer, the likelier the less is left, so that a key that is read often is never found past its time.
 * Vattani, Chierichetti, Lowenstein: Optimal Probabilistic Cache Stampede Prevention, VLDB 2015.
 */
import { ItemCacheError } from '../errors.ts'
import { aheadOfLog, type Ending, untilAborted } from '../invalidation/tail.ts'
import type { Verdict, View } from '../invalidation/view.ts'
import type { Trace, Tracing } from '../observe/tracing.ts'
import { afterSilence } from '../silence.ts'
import type { Copy, Revision, Snapshot, TierName } from '../tiers/tier.ts'
import { untabled } from '../untabled.ts'
import {
  type Flight,
  type FlightPlan,
  Flights,
  type Landed,
  type Load,
  type Route,
  type Skipped,
} from './flights.ts'
import { Loader, type LoaderOptions, type LoaderParts, stamp } from './load.ts'
import type { Probe } from './probe.ts'
import { type Traced, walked } from './walk.ts'

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
  /** `undefined`: nobody traces the read. */
  readonly trace?: Trace | undefined
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

/**
 * Ids of which all characters are ASCII, where they lie in an encoded message: the n-th from `bounds[2 * n]` up to
 * `bounds[2 * n + 1]`.
 */
export interface AsciiIds {
  readonly bytes: Uint8Array
  readonly bounds: Uint32Array
  readonly length: number
}

/** Settings of the read path; durations in milliseconds. */
export interface ReaderOptions extends LoaderOptions {
  /** A stale answer is at most so old. */
  readonly maxStaleMs: number
  /** A reader who has a stale copy to fall back on waits this long for a better one. */
  readonly softTimeoutMs: number
  /** A load behind a stale answer is cancelled after this time unless a reader waits for it. */
  readonly refreshTimeoutMs: number
  /** How eagerly copies are refreshed before their time is over: the beta of XFetch. 0: not at all. */
  readonly earlyRefresh: number
}

/** The tiers and what watches them. */
export interface ReaderParts extends LoaderParts {
  readonly probe: Probe
  /** `undefined`: tracing is off. */
  readonly tracing?: Tracing | undefined
}

/** A read that memory could not answer, or was not asked for. */
interface Reading {
  readonly tenant: string
  readonly id: string
  readonly options: ReadOptions
  readonly signal: Ending
  /** `undefined` for an item. */
  readonly load: Load | undefined
  /** While it has a stale copy to fall back on it waits this long for a better one. */
  softMs: number
}

const NOTHING_SKIPPED: readonly Skipped[] = []

/** A read does not wait longer for the log to be heard of again. */
const HEARING_MS = 50
/** A write has a way without the caches: it does not wait longer for Redis, or for readers of the database. */
const RECALL_MS = 50
/** Loads are never taken to be shorter than this: that of a busy event loop. */
const MIN_LOAD_MS = 20
/** The mean of the draws is at most this share of a copy's life, however long loads take. */
const MAX_EARLY_SHARE = 0.02
/** One draw in nine million is larger than so many means: with more time left nothing is drawn. */
const MAX_DRAW = 16

/** A reader of items for all tenants of one instance. */
export class Reader {
  readonly #parts: ReaderParts
  readonly #options: ReaderOptions
  readonly #loader: Loader
  readonly #flights: Flights

  constructor(parts: ReaderParts, options: ReaderOptions) {
    this.#parts = parts
    this.#options = options
    this.#loader = new Loader(parts, options)
    this.#flights = new Flights((group) => this.#loader.depart(group))
  }

  /** Milliseconds of the clock that `Copy` uses. */
  now(): number {
    return this.#options.now()
  }

  /** The answer that memory can give, or `undefined`. Synchronous. */
  hit(tenant: string, id: string, options: ReadOptions, load?: Load): Answer | undefined {
    const { metrics, tail } = this.#parts
    const startedMs = this.#options.now()
    const answer = this.#hit(tenant, id, options, tail.view(tenant), startedMs, load)
    if (answer !== undefined) metrics.cachedReads.record(this.#options.now() - startedMs)
    return answer
  }

  /**
   * What memory holds of the ids from the first one on, up to the first that is anything but a fresh copy of an item that
   * exists: `hits` has the rest. For readers of `DEFAULT_READ`. Synchronous, and makes nothing for an id.
   */
  plainHits(tenant: string, ids: AsciiIds): readonly Copy[] {
    const { memory, metrics, tail } = this.#parts
    const copies: Copy[] = []
    const view = tail.view(tenant)
    const startedMs = this.#options.now()
    const { bytes, bounds, length } = ids
    if (view === undefined || !memory.enabled || !this.#loader.cachesAll || !view.hasHeard(startedMs))
      return copies
    while (copies.length < length) {
      const at = 2 * copies.length
      const found = memory.findAscii(tenant, bytes, bounds[at] as number, bounds[at + 1] as number, startedMs)
      if (found?.bytes === undefined || startedMs >= found.freshUntilMs) break
      if (view.judge(found) !== 'current') break
      memory.foundIsHit()
      const copy = this.#passed(view, found, 'memory')
      this.#parts.probe.served(tenant, copy, view)
      if (this.#isDue(copy, startedMs)) {
        this.#refreshEarly(tenant, { ...copy, id: untabled(copy.id) }, undefined, undefined)
      }
      copies.push(copy)
    }
    metrics.tiers.memory.hits += copies.length
    metrics.tiers.memory.reads.HIT += copies.length
    metrics.cachedReads.record((this.#options.now() - startedMs) / length, copies.length)
    return copies
  }

  /** The answers that memory can give, in the order of the ids; those of the first are the plain hits. Synchronous. */
  hits(
    tenant: string,
    ids: readonly string[],
    options: ReadOptions,
    plain: readonly Copy[] = [],
  ): readonly (Answer | undefined)[] {
    const { metrics, tail } = this.#parts
    const view = tail.view(tenant)
    const startedMs = this.#options.now()
    let found = 0
    const answers = ids.map((id, n) => {
      const copy = plain[n]
      if (copy !== undefined) return plainAnswer(copy)
      const answer = this.#hit(tenant, id, options, view, startedMs, undefined)
      if (answer !== undefined) found++
      return answer
    })
    metrics.cachedReads.record((this.#options.now() - startedMs) / ids.length, found)
    return answers
  }

  /**
   * Brings an item into memory, from wherever it is, if that does not take long. Counts as no read; throws only what ends
   * the signal.
   */
  async recall(tenant: string, id: string, signal: Ending, trace?: Trace): Promise<void> {
    if (!this.#parts.memory.enabled || !this.#loader.isCached(tenant, id)) return
    const { promise: late, resolve: isLate } = Promise.withResolvers<void>()
    const timer = afterSilence(RECALL_MS, isLate)
    let flight: Flight | undefined
    try {
      const { flight: shared, joined } = this.#flights.join(tenant, id, 'cached', {})
      if (trace !== undefined) show(trace, shared, 'cached', joined)
      shared.board()
      flight = shared
      await untilAborted(Promise.race([shared.result.promise, late]), signal)
    } catch {
      // Whoever wants the item finds out why there is none.
      signal.throwIfAborted()
    } finally {
      clearTimeout(timer)
      flight?.leave()
    }
  }

  /** An item's bytes as memory has them, if that is what is current. Counts as no read. */
  known(tenant: string, id: string): Uint8Array | undefined {
    const copy = this.#parts.memory.peek(tenant, id)
    const isCurrent = copy !== undefined && this.#parts.tail.view(tenant)?.judge(copy) === 'current'
    return isCurrent ? copy.bytes : undefined
  }

  /** The answer for one item, from whichever tier has it. Throws `ItemCacheError`. */
  async read(tenant: string, id: string, options: ReadOptions, signal: Ending): Promise<Answer> {
    return this.hit(tenant, id, options) ?? this.load(tenant, id, options, signal)
  }

  /**
   * The answer for a list page, which is a copy like an item's: `id` and `tags` must not be those of items (see
   * `LISTED`), and `load` reads the page. Throws `ItemCacheError`.
   */
  async page(tenant: string, id: string, load: Load, signal: Ending, trace?: Trace): Promise<Answer> {
    const options = trace === undefined ? DEFAULT_READ : { ...DEFAULT_READ, trace }
    return this.hit(tenant, id, options, load) ?? this.load(tenant, id, options, signal, load)
  }

  /** The answer for an item that `hit` could not give. Throws `ItemCacheError`. */
  async load(tenant: string, id: string, options: ReadOptions, signal: Ending, load?: Load): Promise<Answer> {
    const { metrics } = this.#parts
    const startedMs = this.#options.now()
    const isCached = this.#loader.isCached(tenant, id)
    const reading: Reading = { tenant, id, options, signal, load, softMs: this.#options.softTimeoutMs }
    try {
      let hit: Answer | undefined
      const view = isCached ? this.#parts.tail.view(tenant) : undefined
      if (isCached && view === undefined) {
        await this.#activated(tenant, options, signal)
        // Another caller may have waited for the same, and memory have the item since.
        hit = this.#hit(tenant, id, options, this.#parts.tail.view(tenant), this.#options.now(), load)
      } else if (view !== undefined && this.#isUnheard(tenant, id, options, view)) {
        const waitMs = Math.min(reading.softMs / 2, HEARING_MS)
        const heard = this.#parts.tail.heardAgain(tenant, waitMs)
        if (heard !== undefined) {
          await walked('postgres.log', options, () => untilAborted(heard, signal))
          // Not `#hit`: the look-up before has counted as a miss of memory.
          const heardView = this.#parts.tail.view(tenant)
          hit = heardView && this.#look(tenant, id, options, heardView, this.#options.now(), load)
          // However long it was: nobody is to blame for what kept this process from running.
          reading.softMs -= Math.min(waitMs, this.#options.now() - startedMs)
        }
      }
      const answer = hit ?? (await this.#fromBelow(reading, isCached))
      const latency = isCached ? metrics.cachedReads : metrics.bypassedReads
      latency.record(this.#options.now() - startedMs)
      return answer
    } catch (error) {
      metrics.failedReads++
      throw error
    }
  }

  /** Makes sure that PostgreSQL holds what the origin knows of an item, and says what it holds. */
  async loaded(tenant: string, id: string, signal: Ending, trace?: Trace): Promise<Copy> {
    const { flight, joined } = this.#flights.join(tenant, id, 'direct', {})
    if (trace !== undefined) show(trace, flight, 'direct', joined)
    flight.board()
    try {
      return (await untilAborted(flight.result.promise, signal)).copy
    } finally {
      flight.leave()
    }
  }

  /** A copy of what a statement has just read, good for its TTL from `sentAtMs` on. */
  copyOf(snapshot: Snapshot, sentAtMs: number): Copy {
    return this.#loader.copyOf(snapshot, sentAtMs)
  }

  /**
   * Stored iff it passes: puts copies, stamped, into memory, and into Redis without waiting for it.
   * Returns the copies as they were stored; those that did not pass as they were.
   */
  async keep(tenant: string, copies: readonly Copy[], traced: readonly Traced[]): Promise<readonly Copy[]> {
    return (await this.#loader.keep(tenant, copies, traced)).kept
  }

  /** How much of what can grow there is now. */
  held(): { readonly flights: number; readonly background: number; readonly failures: number } {
    return { flights: this.#flights.size, ...this.#loader.held() }
  }

  /** Waits for refreshes and stores that no caller waits for. Used before the tiers are closed. */
  settled(): Promise<void> {
    return this.#loader.settled()
  }

  #hit(
    tenant: string,
    id: string,
    options: ReadOptions,
    view: View | undefined,
    nowMs: number,
    load: Load | undefined,
  ): Answer | undefined {
    const { memory, metrics } = this.#parts
    if (options.freshness === 'FRESH' || !memory.enabled || !this.#loader.isCached(tenant, id)) {
      return undefined
    }
    if (view === undefined) return undefined
    const answer = this.#look(tenant, id, options, view, nowMs, load)
    options.trace?.looked(answer?.outcome)
    if (answer === undefined) metrics.tiers.memory.misses++
    else metrics.tiers.memory.hits++
    return answer
  }

  /** Memory's answer. Whether it is a hit of the tier or a miss, the caller counts. */
  #look(
    tenant: string,
    id: string,
    options: ReadOptions,
    view: View,
    now: number,
    load: Load | undefined,
  ): Answer | undefined {
    const copy = this.#parts.memory.get(tenant, id, now)
    return copy && this.#serve(tenant, view, copy, 'memory', options, false, NOTHING_SKIPPED, now, load)
  }

  /** Nothing that is cached may be served before the tenant's log is known. If that fails, a SELECT may still succeed. */
  async #activated(tenant: string, options: ReadOptions, signal: Ending): Promise<void> {
    const activated = walked('postgres.log', options, () => this.#parts.tail.activated(tenant, signal)).catch(
      (error: unknown) => {
        if (whyNoAnswer(error) === undefined) throw error
      },
    )
    if (options.freshness === 'FRESH') activated.catch(() => {})
    else await activated
  }

  /**
   * Whether memory has an answer that only the silence of the log forbids. One poll ends that for all copies, so that after a
   * standstill hot reads need not be loaded.
   */
  #isUnheard(tenant: string, id: string, options: ReadOptions, view: View): boolean {
    const now = this.#options.now()
    const { tail, memory } = this.#parts
    if (options.freshness !== 'DEFAULT' || tail.failing || view.hasHeard(now)) return false
    const copy = memory.peek(tenant, id)
    if (copy === undefined) return false
    const verdict = view.judge(copy)
    const judged = verdict === 'current' ? stamp(view, copy) : copy
    return this.#servable(judged, verdict, options, now) !== undefined
  }

  /** The answer of the tiers below memory; for a key outside the share that goes through the caches PostgreSQL's own. */
  #fromBelow(reading: Reading, isCached: boolean): Promise<Answer> {
    const { options } = reading
    if (options.freshness === 'CACHE_ONLY') {
      return isCached ? this.#fromRedisOnly(reading) : Promise.resolve(this.#nothing(NOTHING_SKIPPED))
    }
    return this.#fromFlight(isCached ? reading : { ...reading, options: { ...options, freshness: 'FRESH' } })
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
    now: number,
    load: Load | undefined,
  ): Answer | undefined {
    if (!view.hasHeard(now)) return undefined
    const verdict = view.judge(found)
    let copy = found
    if (verdict === 'current') copy = this.#passed(view, found, tier)
    else if (verdict !== 'expired') return undefined
    const serves = this.#servable(copy, verdict, options, now)
    if (serves === 'fresh') {
      const outcome = copy.bytes === undefined ? 'NEGATIVE_HIT' : 'HIT'
      this.#count(tier, outcome, coalesced)
      this.#parts.probe.served(tenant, copy, view)
      if (tier === 'memory' && options.freshness !== 'CACHE_ONLY' && this.#isDue(copy, now)) {
        this.#refreshEarly(tenant, copy, load, options.trace)
      }
      return { copy, tier, outcome, staleReason: undefined, coalesced, skipped }
    }
    if (serves === undefined) return undefined
    if (options.freshness !== 'CACHE_ONLY') this.#refresh(tenant, copy.id, { load }, options.trace)
    this.#count(tier, 'STALE', coalesced)
    this.#parts.metrics.staleReads.REVALIDATING++
    options.trace?.event('stale', { 'itemcache.stale_reason': 'REVALIDATING' })
    return { copy, tier, outcome: 'STALE', staleReason: 'REVALIDATING', coalesced, skipped }
  }

  /** As what a copy may be served of which the floors say so much, if the log has been heard of. */
  #servable(copy: Copy, verdict: Verdict, options: ReadOptions, now: number): 'fresh' | 'stale' | undefined {
    if ((verdict !== 'current' && verdict !== 'expired') || !fits(copy, options, now)) return undefined
    if (verdict === 'current' && now < copy.freshUntilMs) return 'fresh'
    if (!options.allowStale || copy.bytes === undefined) return undefined
    return now - copy.verifiedAtMs > this.#options.maxStaleMs ? undefined : 'stale'
  }

  /** A copy that has passed the rule, stamped. */
  #passed(view: View, found: Copy, tier: 'memory' | 'redis'): Copy {
    const copy = tier === 'memory' ? this.#parts.memory.restamp(found, view.position) : stamp(view, found)
    view.ahead(copy)
    return copy
  }

  async #fromRedisOnly({ tenant, id, options, signal }: Reading): Promise<Answer> {
    using asking = this.#loader.walkOfRedis('redis.read', [options], 1)
    const answer = await untilAborted(this.#loader.readRedis(tenant, [id]), signal)
    const skipped = this.#loader.skipped(answer.skipped)
    const copy = answer.copies.get(id)
    if (copy !== undefined) this.#parts.tail.seen(copy.asOf)
    const view = this.#parts.tail.view(tenant)
    const now = this.#options.now()
    const served =
      copy && view && this.#serve(tenant, view, copy, 'redis', options, false, skipped, now, undefined)
    this.#loader.askedRedis(answer, served === undefined ? 0 : 1, 1, asking)
    if (copy !== undefined && served !== undefined) {
      // Stored iff it passes: what is served as stale may have failed the rule.
      if (served.outcome !== 'STALE') this.#parts.memory.set(tenant, served.copy ?? copy)
      return served
    }
    const stale = this.#staleInstead(
      tenant,
      id,
      options,
      { fallback: copy, skipped },
      { reason: 'SOFT_TIMEOUT' },
    )
    if (stale !== undefined) return stale
    return this.#nothing(skipped)
  }

  /** The answer of caches that have nothing. */
  #nothing(skipped: readonly Skipped[]): Answer {
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

  async #fromFlight(reading: Reading): Promise<Answer> {
    const { tenant, id, options, load } = reading
    const began = this.#loader.tick()
    const fresh = options.freshness === 'FRESH' || options.maxStalenessMs === 0
    let route: Route = fresh ? 'direct' : 'cached'
    for (;;) {
      const { flight, joined } = this.#flights.join(tenant, id, route, { load })
      if (options.trace !== undefined) show(options.trace, flight, route, joined)
      const landed = await this.#patiently(reading, flight, joined)
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
          const now = this.#options.now()
          const served = this.#serve(tenant, view, copy, tier, options, joined, skipped, now, load)
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
   * takes longer than `softMs`; then it goes on for the others.
   */
  async #patiently(
    { tenant, options, signal, softMs }: Reading,
    flight: Flight,
    joined: boolean,
  ): Promise<Landed | Answer> {
    const { promise } = flight.result
    const mayBeStale = options.allowStale && options.freshness !== 'FRESH'
    const instead = (why: Why) =>
      this.#staleInstead(tenant, flight.id, options, flight, { ...why, coalesced: joined })
    // What comes first: the flight's end, the soft timeout (`undefined`), or the signal's.
    const { promise: first, resolve, reject } = Promise.withResolvers<Landed | undefined>()
    const timer = mayBeStale ? afterSilence(softMs, () => resolve(undefined)) : undefined
    const leave = () => reject(signal.reason)
    flight.board()
    signal.addEventListener('abort', leave, { once: true })
    if (signal.aborted) leave()
    promise.then(resolve, reject)
    // While polls fail there is little to wait for once the caches have been asked. But PostgreSQL may answer all the
    // same: a copy whose content is known to have changed is served only when it has not in time.
    const down = mayBeStale && this.#parts.tail.failing
    try {
      if (down) {
        const landed = await Promise.race([first, flight.cachesAsked])
        if (landed !== undefined) return landed
        const stale = instead({ reason: 'TIER_DOWN' })
        if (stale !== undefined) {
          this.#goOn(flight)
          return stale
        }
      }
      const landed = await first
      if (landed !== undefined) return landed
      const stale = instead({ reason: down ? 'TIER_DOWN' : 'SOFT_TIMEOUT', supersededToo: down })
      if (stale === undefined) return await untilAborted(promise, signal)
      this.#goOn(flight)
      return stale
    } catch (error) {
      const down = whyNoAnswer(error)
      const tierDown = down?.startsWith('ORIGIN') ? 'origin' : 'postgres'
      const stale =
        down === undefined ? undefined : instead({ reason: 'TIER_DOWN', supersededToo: true, tierDown })
      if (stale !== undefined) return stale
      throw error
    } finally {
      clearTimeout(timer)
      signal.removeEventListener('abort', leave)
      flight.leave()
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
    { reason, supersededToo = false, coalesced = false, tierDown = 'postgres' }: Why,
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
      if (verdict === 'removed' || (verdict === 'superseded' && !supersededToo)) continue
      const copy = verdict === 'current' ? stamp(view, found) : found
      if (!fits(copy, options, now) || now - copy.verifiedAtMs > this.#options.maxStaleMs) continue
      if (best === undefined || copy.asOf > best.copy.asOf) best = { copy, tier, verdict }
    }
    if (best === undefined) return undefined
    const { copy, tier, verdict } = best
    // Marked or not, what was shown is known.
    if (verdict === 'current') view.ahead(copy)
    // A fresh copy that only the silence of the log keeps from being current is not known to be old.
    const unverified = verdict === 'current' && now < copy.freshUntilMs && !view.hasHeard(now)
    const staleReason = unverified ? 'UNVERIFIED' : reason
    this.#count(tier, 'STALE', coalesced)
    this.#parts.metrics.staleReads[staleReason]++
    options.trace?.event('stale', { 'itemcache.stale_reason': staleReason })
    const missed = { tier: tierDown, reason: reason === 'TIER_DOWN' ? 'down' : 'timeout' } as const
    return {
      copy,
      tier,
      outcome: 'STALE',
      staleReason,
      coalesced,
      skipped: options.freshness === 'CACHE_ONLY' ? skipped : [...skipped, missed],
    }
  }

  /** Reloads behind an answer; one reload per key, whoever asks. While there is no room for it the answer does without. */
  #refresh(tenant: string, id: string, plan: FlightPlan, cause: Trace | undefined): void {
    if (!this.#flights.hasRoom) return
    const { flight, joined } = this.#flights.join(tenant, id, 'cached', plan)
    if (!joined && this.#parts.tracing !== undefined) {
      follow(flight, this.#parts.tracing.refresh(tenant, id, cause))
    }
    this.#goOn(flight)
  }

  /** Refreshes a copy that is fresh still. One in Redis that is hardly younger is not good enough. */
  #refreshEarly(tenant: string, copy: Copy, load: Load | undefined, cause: Trace | undefined): void {
    const verifiedAfterMs = (copy.verifiedAtMs + copy.freshUntilMs) / 2
    this.#refresh(tenant, copy.id, { load, verifiedAfterMs }, cause)
  }

  /** XFetch: whether this hit is the one that refreshes. Draws only for a copy whose time is nearly over. */
  #isDue(copy: Copy, now: number): boolean {
    const leftMs = copy.freshUntilMs - now
    const lifeMs = copy.freshUntilMs - copy.verifiedAtMs
    const meanMs = Math.min(
      Math.max(this.#loader.meanLoadMs, MIN_LOAD_MS) * this.#options.earlyRefresh,
      lifeMs * MAX_EARLY_SHARE,
    )
    if (leftMs > meanMs * MAX_DRAW) return false
    return -meanMs * Math.log(1 - this.#options.random()) >= leftMs
  }

  /** A flight whose reader has been answered goes on behind the answer. */
  #goOn(flight: Flight): void {
    if (!flight.goOn(this.#options.refreshTimeoutMs)) return
    const { metrics } = this.#parts
    this.#loader.inBackground(
      flight.result.promise.then(
        () => metrics.refreshesOk++,
        () => metrics.refreshesFailed++,
      ),
    )
  }

  /** One read was answered by a tier; by none, when no cache had a copy and the caller wanted no other tier. */
  #count(tier: TierName | undefined, outcome: Outcome, coalesced: boolean): void {
    const { metrics } = this.#parts
    if (coalesced) metrics.coalescedLoads++
    if (tier === undefined) metrics.failedReads++
    else metrics.countRead(tier, outcome)
  }
}

/** The answer of memory that a current and fresh copy is. */
function plainAnswer(copy: Copy): Answer {
  return {
    copy,
    tier: 'memory',
    outcome: 'HIT',
    staleReason: undefined,
    coalesced: false,
    skipped: NOTHING_SKIPPED,
  }
}

/** A caller who is traced waits for a flight: the tiers that it has yet to walk show in some trace. */
function show(trace: Trace, flight: Flight, route: Route, joined: boolean): void {
  if (joined) trace.coalesced(flight.trace)
  if (!flight.trace?.recorded && !flight.isOver) follow(flight, trace.load(route))
}

/** What a flight does shows in the trace, which ends with it. */
function follow(flight: Flight, trace: Trace): void {
  flight.trace = trace
  flight.result.promise.then(
    () => trace.end(),
    (error: unknown) => {
      trace.fail(error)
      trace.end()
    },
  )
}

/** Why a reader gets a stale copy instead of a better answer. */
interface Why {
  readonly reason: StaleReason
  /** Whether a copy will do whose content is known to have changed. Default: false. */
  readonly supersededToo?: boolean
  readonly coalesced?: boolean
  /** The tier that kept a better answer back. Default: PostgreSQL. */
  readonly tierDown?: TierName
}

/** The reason of a tier below that is down, or has too much to do; `undefined` for all other errors. */
function whyNoAnswer(error: unknown): string | undefined {
  if (!(error instanceof ItemCacheError)) return undefined
  const { code, reason } = error
  return code === 'unavailable' || (code === 'exhausted' && reason.endsWith('_BUSY')) ? reason : undefined
}

/** The caller's own bounds on revision and age, which hold for stale answers too. No copy is younger than 0. */
function fits(copy: Copy, options: ReadOptions, now: number): boolean {
  return copy.asOf >= options.minRevision && now - copy.verifiedAtMs < options.maxStalenessMs
}
