/**
 * Flights: loads that are shared by all who miss the same key meanwhile.
 *
 * A flight leaves at the end of the tick, together with all others of its tenant and route; when they are several they
 * wait for a burst that is still coming in. It goes on for as long as somebody waits for it: a reader, until its own deadline, or nobody in particular, for a bounded time, when a stale
 * answer has been given already. The last one to leave cancels it, and with the last flight of a group the group.
 */
import { randomUUID } from 'node:crypto'
import { ItemCacheError } from '../errors.ts'
import type { Trace } from '../observe/tracing.ts'
import { Lru } from '../tiers/lru.ts'
import type { Copy, SkipReason, Snapshot, TierName, TierSpan } from '../tiers/tier.ts'

/** A tier that could not be asked. */
export interface Skipped {
  readonly tier: TierName
  readonly reason: SkipReason
}

/** What a flight brings. */
export interface Landed {
  readonly copy: Copy
  readonly tier: TierName
  /** When its SELECT was sent, on the logical clock; 0 for a copy from Redis, which proves nothing. */
  readonly sentAt: number
  readonly skipped: readonly Skipped[]
}

/** Reads what PostgreSQL holds under a key that is not an item's. */
export type Load = (signal: AbortSignal, span?: TierSpan) => Promise<Snapshot>

/** `cached` flights ask Redis first; `direct` ones begin at PostgreSQL. */
export type Route = 'cached' | 'direct'

/** Flights of one tenant and route that walk the tiers together. */
export interface Group {
  readonly tenant: string
  readonly route: Route
  readonly flights: readonly Flight[]
  /** Aborts when nobody waits for any of them. */
  readonly signal: AbortSignal
}

/** What a new flight is to load. */
export interface FlightPlan {
  /** `undefined` for an item, which is loaded together with others. */
  readonly load?: Load | undefined
  /** A copy from Redis that was verified no later than this is not good enough. Default: any may be. */
  readonly verifiedAfterMs?: number | undefined
}

/** One load of one key. */
export class Flight {
  readonly id: string
  readonly load: Load | undefined
  readonly verifiedAfterMs: number
  readonly result: PromiseWithResolvers<Landed> = Promise.withResolvers()
  /** On the logical clock; `undefined` while no SELECT was sent. */
  sentAt: number | undefined
  /** The copy that Redis had and that was not good enough: served, marked, when the tiers below are down. */
  fallback: Copy | undefined
  skipped: readonly Skipped[] = []
  /** What the tiers that it walks show in; `undefined`: nobody traces it. */
  trace: Trace | undefined
  /** Settles when what it brought is in Redis. */
  stored: Promise<unknown> | undefined
  /** Called when the first reader comes to a flight that nobody waited for, and when it is over. */
  wake: (() => void) | undefined
  #readers = 0
  #asked = false
  #whenAsked: PromiseWithResolvers<undefined> | undefined
  #background: NodeJS.Timeout | undefined
  #over = false
  #controller: AbortController | undefined
  #token: string | undefined
  readonly #ended: (abandoned: boolean) => void

  constructor(id: string, { load, verifiedAfterMs }: FlightPlan, ended: (abandoned: boolean) => void) {
    this.id = id
    this.load = load
    this.verifiedAfterMs = verifiedAfterMs ?? Number.NEGATIVE_INFINITY
    this.#ended = ended
  }

  /** Resolves when the caches have been asked: from then on `fallback` is what Redis had. */
  get cachesAsked(): Promise<undefined> {
    this.#whenAsked ??= Promise.withResolvers()
    if (this.#asked) this.#whenAsked.resolve(undefined)
    return this.#whenAsked.promise
  }

  /** The caches have been asked. */
  goBelow(): void {
    this.#asked = true
    this.#whenAsked?.resolve(undefined)
  }

  /** It has landed or failed, or nobody waits any more. */
  get isOver(): boolean {
    return this.#over
  }

  /** A reader waits, who has no answer yet. */
  get isAwaited(): boolean {
    return this.#readers > 0
  }

  /** Aborts when nobody waits any more. */
  get signal(): AbortSignal {
    this.#controller ??= new AbortController()
    if (this.#over) this.#controller.abort(nobodyWaits())
    return this.#controller.signal
  }

  /** What sets this flight's lock apart from those of all others. */
  get token(): string {
    this.#token ??= randomUUID()
    return this.#token
  }

  /** One more reader waits, until it leaves. */
  board(): void {
    this.#readers += 1
    if (this.#readers === 1) this.wake?.()
  }

  /** A reader who has boarded waits no more. */
  leave(): void {
    this.#readers -= 1
    this.#endUnlessAwaited()
  }

  /** Goes on for at most so long although no reader waits. False when it does already, or is over. */
  goOn(forMs: number): boolean {
    if (this.#over || this.#background !== undefined) return false
    this.#background = setTimeout(() => {
      this.#background = undefined
      this.#endUnlessAwaited()
    }, forMs)
    this.#background.unref()
    return true
  }

  land(landed: Landed): void {
    if (this.#end(false)) this.result.resolve(landed)
  }

  fail(error: unknown): void {
    if (this.#end(false)) this.#reject(error)
  }

  #endUnlessAwaited(): void {
    if (this.#readers > 0 || this.#background !== undefined || !this.#end(true)) return
    const reason = nobodyWaits()
    this.#reject(reason)
    this.#controller?.abort(reason)
  }

  #reject(reason: unknown): void {
    // Nobody may be waiting any more.
    this.result.promise.catch(() => {})
    this.result.reject(reason)
  }

  /** False when it was over already. */
  #end(abandoned: boolean): boolean {
    if (this.#over) return false
    this.#over = true
    clearTimeout(this.#background)
    this.#ended(abandoned)
    this.wake?.()
    return true
  }
}

/** Most flights that are under way at once: one more load is refused. Callers who share a flight are no more flights. */
export const MAX_FLIGHTS = 100_000

/** The time to live of an entry that has none. */
const NEVER = Number.POSITIVE_INFINITY

/** A multi-key read never asks a tier for more keys than this at once. */
const MAX_KEYS = 500

/** Flights that have not left yet. */
interface Boarding {
  readonly tenant: string
  readonly route: Route
  readonly flights: Flight[]
  readonly controller: AbortController
  /** Flights that are not over. */
  left: number
  /** How many had boarded when it was looked at last. */
  seen: number
}

/** All flights of one instance. */
export class Flights {
  /**
   * By tenant and id; none is ever evicted. Not in a `Map`: V8 keeps what was in its old tables until the next full collection, and makes an
   * entry in its table of strings for each key (docs/performance.md#what-garbage-collection-costs).
   */
  readonly #under: Readonly<Record<Route, Lru<Flight>>>
  readonly #depart: (group: Group) => void
  readonly #maxFlights: number
  #boarding: Boarding[] = []

  /** `depart` takes the flights of a group through the tiers. */
  constructor(depart: (group: Group) => void, maxFlights = MAX_FLIGHTS) {
    this.#depart = depart
    this.#maxFlights = maxFlights
    const newTable = () => new Lru<Flight>({ maxEntries: maxFlights, now: () => 0 })
    this.#under = { cached: newTable(), direct: newTable() }
  }

  /** Flights that are under way. */
  get size(): number {
    return this.#under.cached.size + this.#under.direct.size
  }

  /** There is room for a flight of a key that has none. */
  get hasRoom(): boolean {
    return this.size < this.#maxFlights
  }

  /**
   * The key's flight of this route, or a new one that leaves soon. Throws `exhausted` when there is
   * none and too many others are under way.
   */
  join(tenant: string, id: string, route: Route, plan: FlightPlan): { flight: Flight; joined: boolean } {
    const flights = this.#under[route]
    const under = flights.get(id, tenant)
    // A direct flight is taken only before it leaves: those who choose it want a SELECT sent after they began.
    if (under !== undefined && (route === 'cached' || under.sentAt === undefined)) {
      return { flight: under, joined: true }
    }
    if (!this.hasRoom) {
      throw new ItemCacheError('exhausted', 'too many loads are under way', {
        reason: 'LOADS_BUSY',
        retryAfterMs: 1000,
      })
    }
    const boarding = this.#boardingOf(tenant, route)
    const flight: Flight = new Flight(id, plan, (abandoned) => {
      if (flights.peek(id, tenant) === flight) flights.delete(id, tenant)
      boarding.left -= 1
      if (abandoned && boarding.left === 0) boarding.controller.abort(nobodyWaits())
    })
    flights.set(id, flight, 0, NEVER, NEVER, tenant)
    boarding.flights.push(flight)
    boarding.left += 1
    return { flight, joined: false }
  }

  #boardingOf(tenant: string, route: Route): Boarding {
    if (this.#boarding.length === 0) setImmediate(this.#look)
    // Whoever has boarded may all have left already, in this very tick: then their group is given up.
    const waiting = this.#boarding.findLast(
      (one) => one.tenant === tenant && one.route === route && !one.controller.signal.aborted,
    )
    if (waiting !== undefined && waiting.flights.length < MAX_KEYS) return waiting
    const boarding: Boarding = {
      tenant,
      route,
      flights: [],
      controller: new AbortController(),
      left: 0,
      seen: 0,
    }
    this.#boarding.push(boarding)
    return boarding
  }

  /** Comes after all that the event loop had to read. Whoever does not leave now is looked at in the next turn. */
  readonly #look = (): void => {
    const { leaving = [], staying = [] } = Object.groupBy(this.#boarding, (boarding) =>
      isSwelling(boarding) ? 'staying' : 'leaving',
    )
    this.#boarding = staying
    for (const boarding of staying) boarding.seen = boarding.flights.length
    if (staying.length > 0) setImmediate(this.#look)
    for (const { tenant, route, flights, controller } of leaving) {
      const wanted = flights.filter((flight) => !flight.isOver)
      if (wanted.length > 0) this.#depart({ tenant, route, flights: wanted, signal: controller.signal })
    }
  }
}

/**
 * Whether the last turn of the event loop has at least doubled the group: then a burst is coming in, and the next turn
 * is waited for, nine times at most. A flight that is alone leaves at once; under steady load a group waits for one turn
 * or two.
 */
function isSwelling({ flights, seen }: Boarding): boolean {
  return flights.length > 1 && flights.length < MAX_KEYS && flights.length >= 2 * seen
}

function nobodyWaits(): ItemCacheError {
  return new ItemCacheError('cancelled', 'nobody waits for the load any more')
}
