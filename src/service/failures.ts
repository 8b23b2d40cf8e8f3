/** Failures that are remembered for a moment, so that an origin which is down is not asked for a key again and again. */
import { ItemCacheError } from '../errors.ts'
import { Lru } from '../tiers/lru.ts'

export interface RecentFailuresOptions {
  /** How long a failure is remembered, in milliseconds; 0: not at all. */
  readonly ttlMs: number
  /** The share of it that chance may take away, 0 to 1, so that the next attempts do not come together. */
  readonly jitter: number
  /** Milliseconds of a monotonic clock. */
  readonly now: () => number
  /** Uniform in [0, 1). */
  readonly random: () => number
}

/** One more makes the least recently used one be forgotten, which costs a request that fails again. */
const MAX_FAILURES = 10_000

export class RecentFailures {
  readonly #options: RecentFailuresOptions
  readonly #failures: Lru<{ readonly error: ItemCacheError; readonly untilMs: number }>

  constructor(options: RecentFailuresOptions) {
    this.#options = options
    this.#failures = new Lru({ maxEntries: MAX_FAILURES, now: options.now, random: options.random })
  }

  /** Remembers that a tier did not answer. Anything else is no failure of the tier, and forgotten. */
  remember(tenant: string, id: string, error: unknown): void {
    const { ttlMs, jitter, now, random } = this.#options
    if (ttlMs === 0 || !(error instanceof ItemCacheError) || error.code !== 'unavailable') return
    const untilMs = now() + ttlMs * (1 - jitter * random())
    this.#failures.set(id, { error, untilMs }, 0, untilMs, untilMs, tenant)
  }

  /** The same failure again, with the time after which a retry makes sense; `undefined`: try. */
  recent(tenant: string, id: string): ItemCacheError | undefined {
    const failure = this.#failures.get(id, tenant)
    if (failure === undefined) return undefined
    const { error, untilMs } = failure
    return new ItemCacheError(error.code, error.message, {
      reason: error.reason,
      retryAfterMs: Math.max(untilMs - this.#options.now(), error.retryAfterMs ?? 0),
      cause: error,
      ...(error.id === undefined ? {} : { id: error.id }),
    })
  }

  get size(): number {
    return this.#failures.size
  }
}
