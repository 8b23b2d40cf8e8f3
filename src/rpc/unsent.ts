/** Answers that callers have not taken yet, of all connections together. */

import { ItemCacheError } from '../errors.ts'
import type { DirectCall } from './direct-call.ts'
import type { Reply } from './service-definition.ts'
import { Framed } from './wire.ts'

/**
 * A smaller answer is neither counted nor refused: there are no more of them than calls, and what the sockets have not taken, of each
 * connection no more than it may have calls at once.
 */
const SMALL_BYTES = 4096

/** What the answer of a call counts; one of many in a stream counts all of it. */
export function weightOf(reply: Reply): number {
  const bytes = reply instanceof Framed ? reply.heldBytes : reply.byteLength
  return bytes > SMALL_BYTES ? bytes : 0
}

/** A tenant may hold this part of all. */
const TENANT_SHARE = 1 / 2

export class Unsent {
  #bytes = 0
  readonly #byTenant = new Map<string, number>()
  readonly maxBytes: number

  /** One answer alone may be larger than `maxBytes`. */
  constructor(maxBytes: number) {
    this.maxBytes = maxBytes
  }

  get bytes(): number {
    return this.#bytes
  }

  hasRoomFor(weight: number, tenant: string): boolean {
    if (weight === 0 || this.#bytes === 0) return true
    if (this.#bytes + weight > this.maxBytes) return false
    const own = this.#byTenant.get(tenant) ?? 0
    return own === 0 || own + weight <= this.maxBytes * TENANT_SHARE
  }

  /** A tenant that takes its answers may write, whatever others do: what a write answers is bounded by what it has sent. */
  mayWrite(tenant: string): boolean {
    return (this.#byTenant.get(tenant) ?? 0) < this.maxBytes * TENANT_SHARE
  }

  add(weight: number, tenant: string): void {
    if (weight === 0) return
    this.#bytes += weight
    this.#byTenant.set(tenant, (this.#byTenant.get(tenant) ?? 0) + weight)
  }

  release(weight: number, tenant: string): void {
    if (weight === 0) return
    this.#bytes -= weight
    const own = (this.#byTenant.get(tenant) ?? 0) - weight
    if (own > 0) this.#byTenant.set(tenant, own)
    else this.#byTenant.delete(tenant)
  }

  /** Counts the answer of a call until the call's HTTP/2 stream is closed. */
  addUntilClosed(weight: number, tenant: string, call: DirectCall): void {
    if (weight > 0 && call.whenClosed(() => this.release(weight, tenant))) this.add(weight, tenant)
  }
}

export const tooMuchUnsent = () =>
  new ItemCacheError('exhausted', 'too many answers are waiting for callers to take them', {
    reason: 'TOO_MUCH_UNSENT',
    retryAfterMs: 1000,
  })
