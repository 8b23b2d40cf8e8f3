/**
 * The origin tier: a gateway to a FakeStore-compatible catalogue over HTTP. What comes from there is foreign: it
 * is bounded in time, number and size, and checked field by field before it becomes an item.
 */
import { ItemCacheError } from '../errors.ts'
import { type ItemDraft, LIMITS, type Money, type Rating } from '../item.ts'
import type { OriginTier, TierSpan } from './tier.ts'

export interface FakeStoreOptions {
  /** The catalogue's base, `http:` or `https:`, without credentials. Products are at `<url>/products/<id>`. */
  readonly url: string
  /** How long one attempt may take, body included. Default 3,000 ms. */
  readonly timeoutMs?: number
  /** How long a fetch may take in all: waiting for its turn, attempts and pauses. Default 10,000 ms. */
  readonly overallMs?: number
  /** Fetches under way at a time. Default 16. */
  readonly maxConcurrent?: number
  /** Fetches that may wait for their turn; the next is refused as `exhausted`. Default 2,000. */
  readonly maxQueued?: number
  /** Further attempts after a network error, a timeout, a 5xx or a 429. Default 2. */
  readonly retries?: number
  /** The first pause is random up to this, each further one up to twice the one before. Default 100 ms. */
  readonly backoffMs?: number
  /** The largest body that is read, decompressed. Default 1 MiB. */
  readonly maxBytes?: number
  /** Milliseconds of a monotonic clock. */
  readonly now?: () => number
  /** 0 up to 1. */
  readonly random?: () => number
  /** Resolves after `ms`, or rejects when the signal aborts. */
  readonly sleep?: (ms: number, signal: AbortSignal) => Promise<void>
}

/** The longest pause between two attempts that the catalogue may ask for, in milliseconds. */
const MAX_PAUSE_MS = 5_000
const MAX_REDIRECTS = 3

/** A failed attempt. `again` says whether the same request may succeed later. */
class Failure extends Error {
  readonly reason: string
  readonly again: boolean
  readonly retryAfterMs: number | undefined

  constructor(reason: string, again: boolean, extras: { retryAfterMs?: number; cause?: unknown } = {}) {
    super(reason, { cause: extras.cause })
    this.reason = reason
    this.again = again
    this.retryAfterMs = extras.retryAfterMs
  }
}

export class FakeStoreOrigin implements OriginTier {
  readonly name = 'origin'
  readonly #base: URL
  readonly #timeoutMs: number
  readonly #overallMs: number
  readonly #retries: number
  readonly #backoffMs: number
  readonly #maxBytes: number
  readonly #now: () => number
  readonly #random: () => number
  readonly #sleep: (ms: number, signal: AbortSignal) => Promise<void>
  readonly #turns: Turns

  /** Throws an `Error` that states the rule which `url` breaks. */
  constructor(options: FakeStoreOptions) {
    this.#base = parseOriginUrl(options.url)
    this.#timeoutMs = options.timeoutMs ?? 3_000
    this.#overallMs = options.overallMs ?? 10_000
    this.#retries = options.retries ?? 2
    this.#backoffMs = options.backoffMs ?? 100
    this.#maxBytes = options.maxBytes ?? 1024 * 1024
    this.#now = options.now ?? (() => performance.now())
    this.#random = options.random ?? Math.random
    this.#sleep = options.sleep ?? sleep
    this.#turns = new Turns(options.maxConcurrent ?? 16, options.maxQueued ?? 2_000)
  }

  serves(id: string): boolean {
    return /^[1-9][0-9]{0,9}$/.test(id)
  }

  /**
   * As in the port. `unavailable` with reason `ORIGIN_TIMEOUT`, `ORIGIN_UNREACHABLE`, `ORIGIN_STATUS`,
   * `ORIGIN_REDIRECT` or `ORIGIN_INVALID`; `exhausted` with reason `ORIGIN_BUSY`; `cancelled`, or the signal's
   * own `ItemCacheError`, when it aborts.
   */
  async fetch(id: string, signal?: AbortSignal, span?: TierSpan): Promise<ItemDraft | undefined> {
    if (!this.serves(id)) return undefined
    const deadlineMs = this.#now() + this.#overallMs
    const overall = AbortSignal.timeout(this.#overallMs)
    const bound = signal === undefined ? overall : AbortSignal.any([signal, overall])
    try {
      bound.throwIfAborted()
      const done = await this.#turns.take(bound)
      try {
        return await this.#attempts(id, bound, deadlineMs, span)
      } finally {
        done()
      }
    } catch (error) {
      throw translated(error, id, signal)
    }
  }

  async #attempts(
    id: string,
    signal: AbortSignal,
    deadlineMs: number,
    span: TierSpan | undefined,
  ): Promise<ItemDraft | undefined> {
    for (let attempt = 0; ; attempt += 1) {
      try {
        return await this.#attempt(id, signal, span)
      } catch (error) {
        signal.throwIfAborted()
        if (!(error instanceof Failure) || !error.again || attempt >= this.#retries) throw error
        const jitterMs = this.#random() * this.#backoffMs * 2 ** attempt
        const pauseMs = Math.max(Math.min(jitterMs, MAX_PAUSE_MS), error.retryAfterMs ?? 0)
        if (pauseMs > MAX_PAUSE_MS || this.#now() + pauseMs >= deadlineMs) throw error
        await this.#sleep(pauseMs, signal)
        span?.event('retry')
        span?.note({ 'http.request.resend_count': attempt + 1 })
      }
    }
  }

  async #attempt(
    id: string,
    signal: AbortSignal,
    span: TierSpan | undefined,
  ): Promise<ItemDraft | undefined> {
    const text = await this.#text(new URL(`products/${id}`, this.#base), signal, span)
    return text === '' || text === 'null' ? undefined : draftOf(id, text)
  }

  /** The body of a 200, trimmed; `''` for a 404. */
  async #text(url: URL, signal: AbortSignal, span: TierSpan | undefined): Promise<string> {
    const bound = AbortSignal.any([signal, AbortSignal.timeout(this.#timeoutMs)])
    try {
      const response = await this.#request(url, bound, span)
      span?.note({ 'url.full': response.url, 'http.response.status_code': response.status })
      if (response.status === 200) return (await this.#body(response)).trim()
      await response.body?.cancel()
      if (response.status === 404) return ''
      throw statusFailure(response)
    } catch (error) {
      if (error instanceof Failure) throw error
      throw new Failure(bound.aborted ? 'ORIGIN_TIMEOUT' : 'ORIGIN_UNREACHABLE', true, { cause: error })
    }
  }

  /** Follows redirections only within the catalogue's host, and never from https to http. */
  async #request(start: URL, signal: AbortSignal, span: TierSpan | undefined): Promise<Response> {
    let url = start
    for (let hops = 0; ; hops += 1) {
      const headers = { ...span?.headers(), accept: 'application/json', 'user-agent': 'itemcache' }
      const response = await fetch(url, { headers, signal, redirect: 'manual' })
      const location = response.headers.get('location')
      if (response.status < 300 || response.status > 399 || location === null) return response
      await response.body?.cancel()
      const next = URL.parse(location, url)
      const safe = next !== null && [url.protocol, 'https:'].includes(next.protocol) && next.host === url.host
      if (!safe || hops >= MAX_REDIRECTS) throw new Failure('ORIGIN_REDIRECT', false)
      url = next
    }
  }

  async #body(response: Response): Promise<string> {
    const chunks: Uint8Array[] = []
    let bytes = 0
    // Leaving the loop cancels the rest of the body.
    for await (const chunk of response.body ?? []) {
      bytes += chunk.byteLength
      if (bytes > this.#maxBytes) throw invalid()
      chunks.push(chunk)
    }
    return decodeUtf8(Buffer.concat(chunks))
  }
}

/** The catalogue's base with a final slash. Throws an `Error` whose message states the rule. */
export function parseOriginUrl(text: string): URL {
  const url = URL.parse(text)
  if (url === null || !['http:', 'https:'].includes(url.protocol))
    throw new Error('must be an http or https URL')
  if (url.username !== '' || url.password !== '') throw new Error('must not hold credentials')
  if (url.search !== '' || url.hash !== '') throw new Error('must not have a query or fragment')
  if (!url.pathname.endsWith('/')) url.pathname += '/'
  return url
}

/**
 * Lets `size` holders in at a time, in the order of asking. Unlike a library's semaphore it forgets a waiter
 * that gave up, and it refuses one too many.
 */
class Turns {
  #free: number
  readonly #maxQueued: number
  readonly #waiting = new Set<() => void>()

  constructor(size: number, maxQueued: number) {
    this.#free = size
    this.#maxQueued = maxQueued
  }

  /** Resolves to the function that ends the turn; rejects with the signal's reason, or `exhausted`. */
  async take(signal: AbortSignal): Promise<() => void> {
    if (this.#free > 0) {
      this.#free -= 1
      return this.#end
    }
    if (this.#waiting.size >= this.#maxQueued) {
      throw new ItemCacheError('exhausted', 'too many loads from the catalogue are waiting', {
        reason: 'ORIGIN_BUSY',
        retryAfterMs: 1_000,
      })
    }
    const { promise, resolve, reject } = Promise.withResolvers<void>()
    const giveUp = (): void => reject(signal.reason)
    this.#waiting.add(resolve)
    signal.addEventListener('abort', giveUp, { once: true })
    try {
      await promise
    } finally {
      // A turn that was handed over in the same tick as the abort is still ours: the promise is resolved.
      this.#waiting.delete(resolve)
      signal.removeEventListener('abort', giveUp)
    }
    return this.#end
  }

  readonly #end = (): void => {
    const [next] = this.#waiting
    if (next === undefined) {
      this.#free += 1
      return
    }
    this.#waiting.delete(next)
    next()
  }
}

/** What the caller gets to see of a failure; an error that nobody expected stays as it is. */
function translated(error: unknown, id: string, signal: AbortSignal | undefined): unknown {
  if (signal?.aborted) {
    if (signal.reason instanceof ItemCacheError) return signal.reason
    return new ItemCacheError('cancelled', 'the load was cancelled', { id, cause: signal.reason })
  }
  const timedOut = error instanceof DOMException && error.name === 'TimeoutError'
  const failure = timedOut ? new Failure('ORIGIN_TIMEOUT', true, { cause: error }) : error
  if (!(failure instanceof Failure)) return error
  return new ItemCacheError('unavailable', 'the catalogue did not give a usable answer', {
    reason: failure.reason,
    id,
    cause: failure.cause ?? failure,
    ...(failure.retryAfterMs === undefined ? {} : { retryAfterMs: failure.retryAfterMs }),
  })
}

/** A `Retry-After` in seconds counts; a date does not, as it would need a clock that both share. */
function statusFailure(response: Response): Failure {
  const again = response.status >= 500 || response.status === 429
  const seconds = response.headers.get('retry-after') ?? ''
  const cause = new Error(`status ${response.status}`)
  return /^\d{1,6}$/.test(seconds)
    ? new Failure('ORIGIN_STATUS', again, { cause, retryAfterMs: Number(seconds) * 1_000 })
    : new Failure('ORIGIN_STATUS', again, { cause })
}

function invalid(cause?: unknown): Failure {
  return new Failure('ORIGIN_INVALID', false, { cause })
}

function decodeUtf8(bytes: Uint8Array): string {
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes)
  } catch (cause) {
    throw invalid(cause)
  }
}

/** The fields of a product that are read. */
type ProductField = 'id' | 'title' | 'description' | 'category' | 'image' | 'price' | 'rating'

/** The product in `text`, which must be the one that was asked for. Unknown fields are ignored. */
function draftOf(id: string, text: string): ItemDraft {
  let body: unknown
  try {
    body = JSON.parse(text)
  } catch (cause) {
    throw invalid(cause)
  }
  if (typeof body !== 'object' || body === null) throw invalid()
  const product = body as Readonly<Partial<Record<ProductField, unknown>>>
  const asked = (typeof product.id === 'number' || typeof product.id === 'string') && String(product.id)
  const draft: ItemDraft = {
    title: textOf(product.title),
    description: textOf(product.description ?? ''),
    category: textOf(product.category ?? ''),
    imageUri: textOf(product.image ?? ''),
    price: usd(product.price),
    rating: ratingOf(product.rating),
    tags: [],
    attributes: undefined,
  }
  const bytes = Buffer.byteLength(draft.title + draft.description + draft.category + draft.imageUri)
  // The rest of an encoded item is small and bounded: id, price, rating, times.
  const fits = bytes <= LIMITS.itemBytes - 1_024 && Buffer.byteLength(draft.category) <= LIMITS.tagBytes
  if (asked !== id || draft.title === '' || !fits) throw invalid()
  return draft
}

/** A string that PostgreSQL and Protobuf can hold. */
function textOf(value: unknown): string {
  if (typeof value !== 'string' || !value.isWellFormed() || value.includes('\0')) throw invalid()
  return value
}

/** Dollars, exactly as the shortest decimal of the number says (109.95 is 109 units and 950,000,000 nanos). */
function usd(value: unknown): Money {
  if (typeof value !== 'number' || !(value >= 0) || value > Number.MAX_SAFE_INTEGER) throw invalid()
  // Below 10^-6 a number prints with an exponent; there, rounding to nanos has digits to spare.
  const decimal = value < 1e-6 ? value.toFixed(10) : String(value)
  const [whole = '0', fraction = ''] = decimal.split('.')
  const digits = fraction.padEnd(10, '0')
  const nanos = BigInt(whole + digits.slice(0, 9)) + (digits.charAt(9) >= '5' ? 1n : 0n)
  return { currencyCode: 'USD', units: nanos / 1_000_000_000n, nanos: Number(nanos % 1_000_000_000n) }
}

function ratingOf(value: unknown): Rating | undefined {
  if (value === undefined || value === null) return undefined
  if (typeof value !== 'object') throw invalid()
  const { rate, count } = value as Readonly<Record<'rate' | 'count', unknown>>
  if (typeof rate !== 'number' || !(rate >= 0 && rate <= 5)) throw invalid()
  if (typeof count !== 'number' || !Number.isSafeInteger(count) || count < 0) throw invalid()
  return { rate, count: BigInt(count) }
}

async function sleep(ms: number, signal: AbortSignal): Promise<void> {
  const { promise, resolve, reject } = Promise.withResolvers<void>()
  const giveUp = (): void => reject(signal.reason)
  const timer = setTimeout(resolve, ms)
  signal.addEventListener('abort', giveUp, { once: true })
  try {
    signal.throwIfAborted()
    await promise
  } finally {
    clearTimeout(timer)
    signal.removeEventListener('abort', giveUp)
  }
}
