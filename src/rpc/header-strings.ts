/**
 * Node makes a string outside of V8's heap of every header of every call. V8 frees these all at once at the end of a
 * full collection, while everything else waits. But a string that is looked up as a property's name becomes a reference to
 * V8's own copy of that name, if it has one, and is freed at once (docs/performance.md#what-garbage-collection-costs).
 */
import type { IncomingHttpHeaders } from 'node:http2'

/** Headers that are the same for many calls, and never credentials. */
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

/** The values of headers that calls have in common. */
export class HeaderStrings {
  /** As names of properties, of which V8 has one string each. */
  #known: Record<string, true> = Object.create(null)
  #size = 0

  get size(): number {
    return this.#size
  }

  /** The look-up is what this is for: a `Set` would find a value, and leave its string as it is. */
  share(headers: IncomingHttpHeaders): void {
    for (const name of NAMES) {
      const value = headers[name]
      if (typeof value !== 'string' || value.length > MAX_CHARACTERS) continue
      if (this.#known[value] !== true) this.#learn(value)
    }
  }

  /** Starts over when it is full: a caller who makes values up displaces those of others for a moment only. */
  #learn(value: string): void {
    if (this.#size === MAX_VALUES) {
      this.#known = Object.create(null)
      this.#size = 0
    }
    this.#known[value] = true
    this.#size++
  }
}
