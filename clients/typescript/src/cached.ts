/** `cached`: any async function of an id, with the near cache's rule and one load at a time for each id. */
import type { Client } from './client.ts'
import { InvalidArgumentError } from './errors.ts'
import { Flights } from './flights.ts'
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
 * what the stream has shown, provided that `load` reads the items with `get` or `getMany` of this client, or from the
 * database. (What `list` or another client answers may be older, and would be kept.) While the log has not been heard of
 * for 1.5 s, nothing that is kept is served. Callers of one id share a load, unless an event has overtaken it.
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
        own = wrap((one) => method.call(this, one), { ...first, client })
        wrapped.set(this, own)
      }
      return own(id)
    }
  }
}

/** A result, dated by when its load began. */
interface Loaded<V> {
  readonly value: V
  readonly asOf: number
  readonly epoch: number
}

function wrap<V>(load: Loader<V>, options: CachedOptions<V>): Cached<V> {
  const { client, tags = () => [], ttlMs = 60_000, sizeOf = () => 1024 } = options
  const { log, now } = client.nearLog()
  const store = new NearStore<V>(log, options, now)
  const flights = new Flights<Loaded<V>>()

  const loaded = async (id: string): Promise<Loaded<V>> => {
    const { position: asOf, epoch } = log
    const value = await load(id)
    if (epoch === log.epoch && log.state !== 'starting') {
      store.put({ id, asOf, tags: tags(value), value }, sizeOf(value), ttlMs)
    }
    return { value, asOf, epoch }
  }

  const call = async (id: string): Promise<V> => {
    const copy = store.get(id)
    if (copy !== undefined) return copy.value
    // Who came after an event must not get what was loaded before it.
    const passes = ({ value, asOf, epoch }: Loaded<V>, isLater: boolean) =>
      isLater ||
      (epoch === log.epoch && log.isCurrent() && log.judge({ id, asOf, tags: tags(value) }) === 'current')
    const { result, shared } = await flights.share(id, () => loaded(id), passes)
    if (shared) store.coalesced++
    return result.value
  }
  return Object.assign(call, { stats: () => store.stats() })
}
