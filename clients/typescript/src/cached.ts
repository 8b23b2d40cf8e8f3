/** `cached`: any async function of an id, with the near cache's rule and one load at a time for each id. */
import type { Client } from './client.ts'
import { CancelledError, InvalidArgumentError } from './errors.ts'
import { type NearBounds, type NearStats, NearStore } from './near-store.ts'

/** How results are kept. */
export interface CachedOptions<V> extends NearBounds {
  /** A client with a near cache, whose invalidation stream keeps the results right. */
  readonly client: Client
  /** The tags and categories that a result depends on, besides its id: their invalidation concerns it, too. Default: none. */
  readonly tags?: ((value: V) => readonly string[]) | undefined
  /** Milliseconds after which a result is loaded anew in any case. Default: 60,000. */
  readonly ttlMs?: number | undefined
  /** About what a result takes in bytes. Default: 1,024 for each. */
  readonly sizeOf?: ((value: V) => number) | undefined
}

/** The function, with its results kept. What it throws is not kept. */
export interface Cached<V> {
  (id: string): Promise<V>
  /** Counters of this function alone. */
  stats(): NearStats
}

/** As `CachedOptions`; `client` may depend on the object whose method is called. */
export interface CachedMethodOptions<This, V> extends Omit<CachedOptions<V>, 'client'> {
  readonly client: Client | ((self: This) => Client)
}

type Loader<V> = (id: string) => Promise<V>
type Method<This, V> = (this: This, id: string) => Promise<V>

/**
 * Wraps a function that loads something by an item's id. A result is dated by the position of the invalidation stream
 * when its load began, and is served until an event concerns the id or one of its `tags`: so it is never older than
 * what the stream has shown, provided that `load` reads the items through ItemCache or from the database. While the
 * log has not been heard of for 1.5 s, every call loads. Callers of one id share a load, unless an event has overtaken it.
 *
 * With options alone it is a standard decorator for methods: each object has results of its own.
 */
export function cached<V>(load: Loader<V>, options: CachedOptions<V>): Cached<V>
export function cached<This extends object, V>(
  options: CachedMethodOptions<This, V>,
): (method: Method<This, V>, context: ClassMethodDecoratorContext<This, Method<This, V>>) => Method<This, V>
export function cached<This extends object, V>(
  first: Loader<V> | CachedMethodOptions<This, V>,
  options?: CachedOptions<V>,
): unknown {
  if (typeof first === 'function') {
    if (options !== undefined) return wrap(first, options)
    throw new InvalidArgumentError('cached(load, options) needs a client', { reason: 'INVALID_OPTION' })
  }
  return (method: Method<This, V>, context: ClassMethodDecoratorContext<This, Method<This, V>>) => {
    if (context.kind !== 'method') {
      throw new InvalidArgumentError(`cached decorates methods, not a ${context.kind}`, {
        reason: 'INVALID_OPTION',
      })
    }
    const wrapped = new WeakMap<This, Cached<V>>()
    return function (this: This, id: string): Promise<V> {
      let own = wrapped.get(this)
      if (own === undefined) {
        const client = typeof first.client === 'function' ? first.client(this) : first.client
        // Not `this` itself: the log would hold the object for as long as the client lives.
        const self = new WeakRef(this)
        own = wrap(
          (one) => {
            const living = self.deref()
            if (living === undefined) throw new CancelledError('the object is gone')
            return method.call(living, one)
          },
          { ...first, client },
        )
        wrapped.set(this, own)
      }
      return own(id)
    }
  }
}

interface Flight<V> {
  readonly asOf: number
  readonly epoch: number
  readonly result: Promise<V>
}

function wrap<V>(load: Loader<V>, options: CachedOptions<V>): Cached<V> {
  const { client, tags = () => [], ttlMs = 60_000, sizeOf = () => 1024 } = options
  const { log, now } = client.nearLog()
  const store = new NearStore<V>(log, options, now)
  const flights = new Map<string, Flight<V>>()

  const start = (id: string): Promise<V> => {
    const asOf = log.position
    const { epoch } = log
    const run = async () => {
      try {
        const value = await load(id)
        if (epoch === log.epoch && log.state !== 'starting') {
          store.put({ id, asOf, tags: tags(value), value }, sizeOf(value), ttlMs)
        }
        return value
      } finally {
        if (flights.get(id) === flight) flights.delete(id)
      }
    }
    const flight: Flight<V> = { asOf, epoch, result: Promise.resolve().then(run) }
    flights.set(id, flight)
    return flight.result
  }

  const call = async (id: string): Promise<V> => {
    const copy = store.get(id)
    if (copy !== undefined) return copy.value
    const flight = flights.get(id)
    if (flight === undefined || flight.epoch !== log.epoch) return start(id)
    const value = await flight.result
    // Who came after an event must not get what was loaded before it.
    const passes = log.judge({ id, asOf: flight.asOf, tags: tags(value) }) === 'current'
    if (passes && log.isCurrent() && flight.epoch === log.epoch) {
      store.coalesced++
      return value
    }
    return start(id)
  }
  return Object.assign(call, { stats: () => store.stats() })
}
