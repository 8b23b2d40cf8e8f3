/**
 * Node makes a string outside of V8's heap of every header of every call, and V8 lets go of these all at once, while
 * everything else waits, at the end of a full collection. But a string that is looked up as a property's name becomes a reference to
 * V8's own copy of that name, if it has one, and is let go of at once (docs/performance.md#what-garbage-collection-costs).
 */
import type { IncomingHttpHeaders } from 'node:http2'

/** Headers that are the same for all calls of a client, and no secrets. */
const NAMES = [
  ':authority',
  ':path',
  'content-type',
  'te',
  'user-agent',
  'accept-encoding',
  'grpc-accept-encoding',
] as const

const MAX_VALUES = 1_000
const MAX_CHARACTERS = 200

/** The values of headers that calls have in common, of which there is one string each. */
export class HeaderStrings {
  /** As names of properties. Those that came first stay: no caller can make it grow, or change for ever. */
  readonly #known: Record<string, true> = Object.create(null)
  #size = 0

  get size(): number {
    return this.#size
  }

  share(headers: IncomingHttpHeaders): void {
    for (const name of NAMES) {
      const value = headers[name]
      if (typeof value !== 'string' || value.length > MAX_CHARACTERS) continue
      if (this.#known[value] === true || this.#size === MAX_VALUES) continue
      this.#known[value] = true
      this.#size++
    }
  }
}
