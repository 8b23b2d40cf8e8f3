/** Answers that callers have not taken yet, of all connections together. */

import type { Http2Stream } from 'node:http2'
import type { ServerUnaryCall } from '@grpc/grpc-js'
import { ItemCacheError } from '../errors.ts'

/** A smaller answer is neither counted nor refused: there are no more of them than calls. */
const SMALL_BYTES = 4096

/** What an answer counts. */
export function weightOf(reply: unknown): number {
  return reply instanceof Uint8Array && reply.byteLength > SMALL_BYTES ? reply.byteLength : 0
}

export class Unsent {
  #bytes = 0
  readonly maxBytes: number

  /** One answer alone may be larger than `maxBytes`. */
  constructor(maxBytes: number) {
    this.maxBytes = maxBytes
  }

  get bytes(): number {
    return this.#bytes
  }

  hasRoomFor(weight: number): boolean {
    return weight === 0 || this.#bytes === 0 || this.#bytes + weight <= this.maxBytes
  }

  add(weight: number): void {
    this.#bytes += weight
  }

  release(weight: number): void {
    this.#bytes -= weight
  }

  /** Counts the answer of a call until the call's HTTP/2 stream is closed, which grpc-js keeps to itself. */
  addUntilClosed(weight: number, call: ServerUnaryCall<unknown, unknown>): void {
    if (weight === 0) return
    const { stream } = (call as unknown as { readonly call: { readonly stream: Http2Stream } }).call
    if (stream.destroyed) return
    this.add(weight)
    stream.once('close', () => this.release(weight))
  }
}

export const tooMuchUnsent = () =>
  new ItemCacheError('exhausted', 'too many answers are waiting for callers to take them', {
    reason: 'TOO_MUCH_UNSENT',
    retryAfterMs: 1000,
  })
