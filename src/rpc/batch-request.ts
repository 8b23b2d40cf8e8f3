/**
 * A `BatchGetItemsRequest` as it came. Most name ids of ASCII characters and wish for nothing: their ids are used where they lie in
 * the message. To decode them, and to look at the strings again, would cost as much as to answer.
 */
import type { BatchGetItemsRequest } from '../gen/itemcache/v1/item_cache_pb.ts'
import { LIMITS } from '../item.ts'
import type { AsciiIds } from '../service/read.ts'
import type { Malformed } from './service-definition.ts'

/** What comes before an id, and its length: field 1 is length-delimited. A `BatchGetItemsResult` begins with the same. */
const ID_TAG = 0x0a
/** A length of one byte is not larger. Longer ids are valid, and decoded. */
const MAX_ID_BYTES = 127

/** Of the request that was looked at last. */
const BOUNDS = new Uint32Array(2 * LIMITS.batchIds)

export class BatchRequest {
  readonly #message: Buffer
  readonly #decode: (message: Buffer) => BatchGetItemsRequest | Malformed

  /** `decode`: that of the generated code. */
  constructor(message: Buffer, decode: (message: Buffer) => BatchGetItemsRequest | Malformed) {
    this.#message = message
    this.#decode = decode
  }

  decoded(): BatchGetItemsRequest | Malformed {
    return this.#decode(this.#message)
  }

  /**
   * The ids of a request that has nothing else, and as many as it may have, of printable ASCII characters; `undefined` for
   * every other request, valid or not. Good until the next call for any request.
   */
  asciiIds(): AsciiIds | undefined {
    const bytes = this.#message
    let length = 0
    for (let at = 0; at < bytes.byteLength; length++) {
      const idBytes = bytes[at + 1] ?? 0
      const from = at + 2
      const to = from + idBytes
      if (bytes[at] !== ID_TAG || idBytes === 0 || idBytes > MAX_ID_BYTES) return undefined
      if (to > bytes.byteLength || length === LIMITS.batchIds) return undefined
      // Negative as soon as one character is below the first or above the last that is printed.
      let signs = 0
      for (let i = from; i < to; i++) {
        const byte = bytes[i] as number
        signs |= (byte - 0x20) | (0x7e - byte)
      }
      if (signs < 0) return undefined
      BOUNDS[2 * length] = from
      BOUNDS[2 * length + 1] = to
      at = to
    }
    return length === 0 ? undefined : { bytes, bounds: BOUNDS, length }
  }
}
