/** How often each tenant may call: a token bucket per tenant. */
import { ItemCacheError } from '../errors.ts'

export interface RateLimitOptions {
  /** Calls a second that a tenant may make in the long run; more than 0. */
  readonly perSecond: number
  /** Calls that a tenant who was quiet may make at once; at least 1. */
  readonly burst: number
  /** Most tenants that are remembered. */
  readonly maxTenants: number
  /** Milliseconds of a monotonic clock. */
  readonly now: () => number
  /** Told of each call that is refused. */
  readonly onRefused?: (tenant: string) => void
}

const ROUNDING = 1e-9

interface Bucket {
  /** What was left of the burst at `atMs`. */
  left: number
  atMs: number
}

export class RateLimit {
  readonly #options: RateLimitOptions
  /** In the order in which they were made. */
  readonly #buckets = new Map<string, Bucket>()

  constructor(options: RateLimitOptions) {
    this.#options = options
  }

  get tenants(): number {
    return this.#buckets.size
  }

  /** Takes one call from the tenant's bucket. Throws `exhausted`, with the time until there is one, when it is empty. */
  take(tenant: string): void {
    const { perSecond, burst, now } = this.#options
    const nowMs = now()
    const bucket = this.#buckets.get(tenant) ?? this.#make(tenant, nowMs)
    bucket.left = Math.min(burst, bucket.left + ((nowMs - bucket.atMs) * perSecond) / 1000)
    bucket.atMs = nowMs
    // What is missing of a call by rounding is not missing.
    if (bucket.left < 1 - ROUNDING) {
      this.#options.onRefused?.(tenant)
      throw new ItemCacheError('exhausted', 'the tenant calls too often', {
        reason: 'RATE_LIMITED',
        retryAfterMs: Math.ceil(((1 - bucket.left - ROUNDING) * 1000) / perSecond),
      })
    }
    bucket.left -= 1
  }

  /** A full bucket. When there are too many, the oldest goes, which gives its tenant at most one more burst. */
  #make(tenant: string, nowMs: number): Bucket {
    if (this.#buckets.size >= this.#options.maxTenants) {
      for (const oldest of this.#buckets.keys()) {
        this.#buckets.delete(oldest)
        break
      }
    }
    const bucket = { left: this.#options.burst, atMs: nowMs }
    this.#buckets.set(tenant, bucket)
    return bucket
  }
}
