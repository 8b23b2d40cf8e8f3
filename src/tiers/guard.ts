/**
 * Guards around the tiers: a circuit breaker and a bulkhead each, by cockatiel.
 *
 * The **breaker** opens when more than 2 % of the calls of the last 10 s have failed, of 50 at least. Then calls are refused at
 * once, and every second a probe is let through, or, for the catalogue, one of them; the first that succeeds closes it. While
 * it runs the others are refused: nobody waits for a probe that hangs, and none hangs for as long as a call may.
 *
 * What counts as a failure says something of the tier: that it timed out, cannot be reached, or (Redis) took longer than it
 * may. A conflict, a refusal or a caller who left does not.
 *
 * The **bulkhead** bounds the calls that are under way, those that wait for a connection included; one more is shed,
 * `exhausted`. How long a call may wait, the tier bounds itself.
 */
import {
  BrokenCircuitError,
  BulkheadRejectedError,
  bulkhead,
  CircuitState,
  circuitBreaker,
  handleWhen,
  SamplingBreaker,
} from 'cockatiel'
import { ItemCacheError } from '../errors.ts'
import { afterSilence } from '../silence.ts'
import type {
  CacheAnswer,
  CacheTier,
  Copy,
  Inspection,
  LoadLocks,
  LockClaim,
  LockState,
  OriginTier,
  Shards,
  StoreTier,
} from './tier.ts'

export type BreakerState = 'CLOSED' | 'HALF_OPEN' | 'OPEN'

/** When a breaker opens, and how much a bulkhead lets in. Durations in milliseconds. */
export interface GuardOptions {
  /** The share of calls that must have failed, above 0 and below 1. Default 0.02. */
  readonly failureShare?: number
  /** Over how long calls are counted: whole seconds, 5 at least. Default 10,000. */
  readonly windowMs?: number
  /** With fewer calls in the window the breaker stays closed. Default 50. */
  readonly minimumCalls?: number
  /** From one probe of an open breaker to the next. Default 1,000. */
  readonly probeEveryMs?: number
  /** Most calls under way. */
  readonly maxCalls: number
  /** `shard` is the server of a cluster that the breaker is for; `''` when there is one breaker for all. */
  readonly onStateChange?: (state: BreakerState, shard: string) => void
}

/** How a call ended that was answered, but not well enough. */
class Poor<T> extends Error {
  readonly answer: T

  constructor(answer: T) {
    super('the answer was poor')
    this.answer = answer
  }
}

/** How a probe ended that was given up: it has not shown that all is well. */
class GivenUp extends Error {
  readonly error: unknown

  constructor(error: unknown) {
    super('the probe was given up')
    this.error = error
  }
}

const STATES: Readonly<Record<CircuitState, BreakerState>> = {
  [CircuitState.Closed]: 'CLOSED',
  [CircuitState.HalfOpen]: 'HALF_OPEN',
  [CircuitState.Open]: 'OPEN',
  [CircuitState.Isolated]: 'OPEN',
}

/** Why a guard did not let a call through. */
type Refusal = 'open' | 'full'
class Refused extends Error {
  readonly why: Refusal

  constructor(why: Refusal) {
    super(why)
    this.why = why
  }
}

/** A breaker and a bulkhead for one dependency. */
export class Guard implements Disposable {
  readonly #breaker
  /** Writers that wait for each other must not keep readers out. */
  readonly #bulkheads
  readonly #probeEveryMs: number
  #probing = false
  #timer: NodeJS.Timeout | undefined
  readonly #probe: (() => Promise<unknown>) | undefined

  /** `isFault` says which errors are the dependency's. `probe`, if there is one, is what closes an open breaker. */
  constructor(options: GuardOptions, isFault: (error: unknown) => boolean, probe?: () => Promise<unknown>) {
    const { failureShare = 0.02, windowMs = 10_000, minimumCalls = 50, probeEveryMs = 1_000 } = options
    this.#probeEveryMs = probeEveryMs
    this.#probe = probe
    const counts = (error: unknown) => error instanceof Poor || error instanceof GivenUp || isFault(error)
    this.#breaker = circuitBreaker(handleWhen(counts), {
      // The backoff ends just before the next probe comes.
      halfOpenAfter: probeEveryMs * 0.9,
      breaker: new SamplingBreaker({
        threshold: failureShare,
        duration: windowMs,
        minimumRps: (minimumCalls * 1000) / windowMs,
      }),
    })
    this.#bulkheads = { read: bulkhead(options.maxCalls, 0), write: bulkhead(options.maxCalls, 0) }
    this.#breaker.onStateChange((state) => {
      options.onStateChange?.(STATES[state], '')
      clearInterval(this.#timer)
      if (state === CircuitState.Closed || probe === undefined) return
      this.#timer = setInterval(() => void this.run(probe).catch(() => {}), probeEveryMs).unref()
    })
  }

  get state(): BreakerState {
    return STATES[this.#breaker.state]
  }

  /** How long a caller who was refused should wait, in milliseconds. */
  get retryAfterMs(): number {
    return this.#probeEveryMs
  }

  /**
   * Makes a call, if the guard lets it through; else throws `Refused`. An answer that `isPoor` is returned and counts as
   * a failure.
   */
  async run<T>(
    call: () => Promise<T>,
    isPoor: (answer: T) => boolean = () => false,
    purpose: 'read' | 'write' = 'read',
  ): Promise<T> {
    try {
      return await this.#bulkheads[purpose].execute(() => this.#break(call, isPoor))
    } catch (error) {
      if (error instanceof Poor) return error.answer as T
      if (error instanceof GivenUp) throw error.error
      if (error instanceof BrokenCircuitError) throw new Refused('open')
      if (error instanceof BulkheadRejectedError) throw new Refused('full')
      throw error
    }
  }

  [Symbol.dispose](): void {
    clearInterval(this.#timer)
  }

  async #break<T>(call: () => Promise<T>, isPoor: (answer: T) => boolean): Promise<T> {
    // cockatiel would let the others wait for the probe.
    if (this.#probing) throw new Refused('open')
    const isOpen = this.#breaker.state !== CircuitState.Closed
    if (isOpen && this.#probe !== undefined && call !== this.#probe) throw new Refused('open')
    const ask = async () => {
      const answer = await call()
      if (isPoor(answer)) throw new Poor(answer)
      return answer
    }
    if (!isOpen) return this.#breaker.execute(ask)
    let isProbe = false
    try {
      return await this.#breaker.execute(() => {
        isProbe = true
        this.#probing = true
        return ask().catch((error: unknown) => {
          throw isGivenUp(error) ? new GivenUp(error) : error
        })
      })
    } finally {
      if (isProbe) this.#probing = false
    }
  }
}

const isGivenUp = (error: unknown): boolean =>
  error instanceof ItemCacheError && (error.code === 'cancelled' || error.code === 'timeout')

/** What Redis is to its guards. */
export type GuardableRedis = CacheTier & LoadLocks & Partial<Shards>

/** From the most to the least worrying. */
const WORST_FIRST: readonly BreakerState[] = ['OPEN', 'HALF_OPEN', 'CLOSED']

/**
 * Redis behind a guard: while it is open, its copies are missing and nobody waits for its locks. The primaries of a
 * cluster have a guard each, so that one which is lost costs only its own keys; the one that takes over has a new one.
 */
export class GuardedRedis implements CacheTier, LoadLocks, Disposable {
  readonly name = 'redis'
  readonly #guards = new Map<string, Guard>()
  readonly #redis: GuardableRedis
  readonly #options: GuardOptions & { readonly slowMs: number }

  /** A call that takes longer than `slowMs` counts as failed. */
  constructor(redis: GuardableRedis, options: GuardOptions & { readonly slowMs: number }) {
    this.#redis = redis
    this.#options = options
  }

  /** The worst of the shards'. */
  get state(): BreakerState {
    const states = new Set(Array.from(this.#guards.values(), ({ state }) => state))
    return WORST_FIRST.find((state) => states.has(state)) ?? 'CLOSED'
  }

  async read(tenant: string, ids: readonly string[]): Promise<CacheAnswer> {
    const answers = await this.#perShard(
      tenant,
      ids,
      (id) => id,
      (own) => this.#redis.read(tenant, own),
      (): CacheAnswer => ({ copies: new Map(), skipped: 'down' }),
      isFailed,
    )
    return answers.length === 1 && answers[0] !== undefined ? answers[0] : merged(answers)
  }

  async store(tenant: string, copies: readonly Copy[]): Promise<void> {
    const store = (own: readonly Copy[]) => this.#redis.store(tenant, own)
    await this.#perShard(tenant, copies, ({ id }) => id, store, nothing)
  }

  /** Not guarded: whoever inspects wants to see for themselves. */
  inspect(tenant: string, id: string): Promise<Inspection> {
    return this.#redis.inspect(tenant, id)
  }

  async acquire(tenant: string, claims: readonly LockClaim[]): Promise<ReadonlyMap<string, LockState>> {
    const answers = await this.#perShard(
      tenant,
      claims,
      ({ id }) => id,
      (own) => this.#redis.acquire(tenant, own),
      (own): ReadonlyMap<string, LockState> => new Map(own.map(({ id }) => [id, 'free'])),
    )
    return answers.length === 1 && answers[0] !== undefined
      ? answers[0]
      : new Map(answers.flatMap((answer) => [...answer]))
  }

  async renew(tenant: string, claims: readonly LockClaim[]): Promise<void> {
    const renew = (own: readonly LockClaim[]) => this.#redis.renew(tenant, own)
    await this.#perShard(tenant, claims, ({ id }) => id, renew, nothing)
  }

  async release(tenant: string, claim: LockClaim, openMs: number): Promise<void> {
    const release = () => this.#redis.release(tenant, claim, openMs)
    await this.#perShard(tenant, [claim], ({ id }) => id, release, nothing)
  }

  [Symbol.dispose](): void {
    for (const guard of this.#guards.values()) guard[Symbol.dispose]()
    this.#guards.clear()
  }

  /** Makes one call for the things of each shard, all at once. `instead` is the answer where the guard lets nobody through. */
  #perShard<E, T>(
    tenant: string,
    things: readonly E[],
    idOf: (thing: E) => string,
    call: (own: readonly E[]) => Promise<T>,
    instead: (own: readonly E[]) => T,
    isPoor?: (answer: T) => boolean,
  ): Promise<readonly T[]> {
    const redis = this.#redis
    const timed = async (shard: string, own: readonly E[]) => {
      const judged = this.#judged(() => call(own), isPoor)
      try {
        return await this.#guardOf(shard).run(judged.call, judged.isPoor)
      } catch (error) {
        if (error instanceof Refused) return instead(own)
        throw error
      }
    }
    if (redis.shardOf === undefined) return Promise.all([timed('', things)])
    const byShard = Map.groupBy(things, (thing) => redis.shardOf?.(tenant, idOf(thing)) ?? '')
    return Promise.all(Array.from(byShard, ([shard, own]) => timed(shard, own)))
  }

  #guardOf(shard: string): Guard {
    const known = this.#guards.get(shard)
    if (known !== undefined) return known
    const { onStateChange, ...options } = this.#options
    // Its methods never throw. A probe asks for a copy that nobody has.
    const probe = async () => {
      const id = this.#redis.idOn === undefined ? '' : this.#redis.idOn(shard)
      if (id === undefined) return this.#guards.delete(shard)
      const { call, isPoor } = this.#judged(() => this.#redis.read('', [id]), isFailed)
      if (isPoor(await call())) throw new Error('the probe found Redis slow or down')
    }
    const guard = new Guard(
      { ...options, ...(onStateChange && { onStateChange: (state) => onStateChange(state, shard) }) },
      () => true,
      probe,
    )
    // A failover leaves the guard of a server behind that has no keys any more.
    for (const [other, { state }] of this.#guards) {
      if (state === 'CLOSED' && this.#redis.idOn?.(other) === undefined) this.#guards.delete(other)
    }
    this.#guards.set(shard, guard)
    return guard
  }

  /** A call whose answer is also poor when it was slow. */
  #judged<T>(call: () => Promise<T>, isPoor: (answer: T) => boolean = () => false) {
    let isSlow = false
    const becomeSlow = () => {
      isSlow = true
    }
    return {
      call: async () => {
        const timer = afterSilence(this.#options.slowMs, becomeSlow)
        try {
          return await call()
        } finally {
          clearTimeout(timer)
        }
      },
      isPoor: (answer: T) => isSlow || isPoor(answer),
    }
  }
}

const nothing = () => undefined

/** What the shards have together: a reason for a miss only when none of them answered. */
function merged(answers: readonly CacheAnswer[]): CacheAnswer {
  const copies = new Map(answers.flatMap((answer) => [...answer.copies]))
  const skipped = answers.map((answer) => answer.skipped)
  if (skipped.length === 0 || skipped.includes(undefined)) return { copies }
  return { copies, skipped: skipped.includes('timeout') ? 'timeout' : 'down' }
}

const isFailed = ({ skipped }: CacheAnswer): boolean => skipped === 'timeout' || skipped === 'down'

/** PostgreSQL behind a guard. What follows the log is not guarded: it must find out when the database is back. */
export class GuardedStore implements StoreTier, Disposable {
  readonly name = 'postgres'
  readonly #guard: Guard
  readonly #store: StoreTier

  constructor(store: StoreTier, options: GuardOptions) {
    this.#store = store
    this.#guard = new Guard(options, isOfPostgres, () => store.ping(AbortSignal.timeout(PROBE_MS)))
  }

  get state(): BreakerState {
    return this.#guard.state
  }

  readonly read: StoreTier['read'] = (...args) => this.#run('read', () => this.#store.read(...args))
  readonly list: StoreTier['list'] = (...args) => this.#run('read', () => this.#store.list(...args))
  readonly outcomeOf: StoreTier['outcomeOf'] = (...args) =>
    this.#run('read', () => this.#store.outcomeOf(...args))
  readonly insertLoaded: StoreTier['insertLoaded'] = (...args) =>
    this.#run('write', () => this.#store.insertLoaded(...args))
  readonly refetched: StoreTier['refetched'] = (...args) =>
    this.#run('write', () => this.#store.refetched(...args))
  readonly create: StoreTier['create'] = (...args) => this.#run('write', () => this.#store.create(...args))
  readonly update: StoreTier['update'] = (...args) => this.#run('write', () => this.#store.update(...args))
  readonly replaceKnown: StoreTier['replaceKnown'] = (...args) =>
    this.#run('write', () => this.#store.replaceKnown(...args))
  readonly delete: StoreTier['delete'] = (...args) => this.#run('write', () => this.#store.delete(...args))
  readonly invalidate: StoreTier['invalidate'] = (...args) =>
    this.#run('write', () => this.#store.invalidate(...args))

  inspect(tenant: string, id: string): Promise<Inspection> {
    return this.#store.inspect(tenant, id)
  }

  ping(signal?: AbortSignal): Promise<void> {
    return this.#store.ping(signal)
  }

  [Symbol.dispose](): void {
    this.#guard[Symbol.dispose]()
  }

  #run<T>(purpose: 'read' | 'write', call: () => Promise<T>): Promise<T> {
    return this.#guard.run(call, undefined, purpose).catch((error: unknown) => {
      throw translated(error, 'POSTGRES', 'the database', this.#guard.retryAfterMs)
    })
  }
}

/** A probe that takes longer has failed. */
const PROBE_MS = 2_000

/** Writers that were in each other's way. */
const CONTENTION = ['POSTGRES_LOCK_TIMEOUT', 'POSTGRES_QUEUE_TIMEOUT']

function isOfPostgres(error: unknown): boolean {
  if (!(error instanceof ItemCacheError) || error.code !== 'unavailable') return false
  if (CONTENTION.includes(error.reason)) return false
  return error.reason.startsWith('POSTGRES_') || error.reason === 'COMMIT_UNKNOWN'
}

/** The catalogue behind a guard. It bounds its calls itself. */
export class GuardedOrigin implements OriginTier, Disposable {
  readonly name = 'origin'
  readonly #guard: Guard
  readonly #origin: OriginTier

  constructor(origin: OriginTier, options: Omit<GuardOptions, 'maxCalls'>) {
    this.#origin = origin
    // Nobody but those who want an item asks a catalogue that is not ours.
    this.#guard = new Guard({ ...options, maxCalls: Number.MAX_SAFE_INTEGER }, isOfOrigin)
  }

  get state(): BreakerState {
    return this.#guard.state
  }

  serves(id: string): boolean {
    return this.#origin.serves(id)
  }

  readonly fetch: OriginTier['fetch'] = (...args) =>
    this.#guard
      .run(() => this.#origin.fetch(...args))
      .catch((error: unknown) => {
        throw translated(error, 'ORIGIN', 'the catalogue', this.#guard.retryAfterMs)
      });

  [Symbol.dispose](): void {
    this.#guard[Symbol.dispose]()
  }
}

/** An answer that cannot be used is one all the same: the catalogue is there. */
function isOfOrigin(error: unknown): boolean {
  return (
    error instanceof ItemCacheError &&
    error.code === 'unavailable' &&
    ['ORIGIN_TIMEOUT', 'ORIGIN_UNREACHABLE', 'ORIGIN_STATUS'].includes(error.reason)
  )
}

function translated(error: unknown, reason: string, subject: string, retryAfterMs: number): unknown {
  if (!(error instanceof Refused)) return error
  return error.why === 'open'
    ? new ItemCacheError('unavailable', `${subject} has been failing and is given a rest`, {
        reason: `${reason}_UNAVAILABLE`,
        retryAfterMs,
      })
    : new ItemCacheError('exhausted', `too many calls of ${subject} are waiting`, {
        reason: `${reason}_BUSY`,
        retryAfterMs,
      })
}
