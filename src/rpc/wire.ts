/** The protobuf wire format, as far as answers are put together by hand: https://protobuf.dev/programming-guides/encoding */

const VARINT = 0
const LENGTH_DELIMITED = 2

/** What an integer takes at most, with its tag. */
export const NUMBER_BYTES = 1 + 10
/** What comes before anything else takes at most. */
export const HEADER_BYTES = 1 + 5
/** What a UTF-16 code unit takes at most. */
export const MAX_UTF8_BYTES = 3

/** What gRPC puts before a message: a flag and the message's length. */
export const PREFIX_BYTES = 5

/** An encoded message with what gRPC puts before it, so that it is not copied once more. */
export class Framed {
  readonly bytes: Buffer

  constructor(bytes: Buffer) {
    this.bytes = bytes
  }

  /** Of the message. */
  get byteLength(): number {
    return this.bytes.byteLength - PREFIX_BYTES
  }

  get message(): Buffer {
    return this.bytes.subarray(PREFIX_BYTES)
  }
}

/** A copy of an encoded message with what gRPC puts before it. */
export function framed(message: Uint8Array): Framed {
  const frame = Buffer.allocUnsafe(PREFIX_BYTES + message.byteLength)
  frame[0] = 0
  frame.writeUInt32BE(message.byteLength, 1)
  frame.set(message, PREFIX_BYTES)
  return new Framed(frame)
}

/** What a writer keeps for the next message. */
const KEPT_BYTES = 256 * 1024

/**
 * Writes fields, 1 to 15 of a message, into a buffer that is used for one message after the other and is large enough for
 * each: it costs a sixth of what a writer costs that begins small and grows. Values are not left out when they are zero.
 */
export class FieldWriter {
  #bytes = Buffer.alloc(0)
  #at = 0

  /** Begins a message that takes so many bytes at most. */
  start(maxBytes: number): this {
    if (maxBytes > this.#bytes.byteLength) this.#bytes = Buffer.allocUnsafeSlow(maxBytes)
    this.#at = 0
    return this
  }

  /** An integer, 0 to 2^53 - 1, an enum or a bool. */
  number(field: number, value: number): this {
    this.#bytes[this.#at++] = (field << 3) | VARINT
    this.#varint(value)
    return this
  }

  uint64(field: number, value: bigint): this {
    if (value <= Number.MAX_SAFE_INTEGER) return this.number(field, Number(value))
    this.#bytes[this.#at++] = (field << 3) | VARINT
    let rest = value
    for (; rest > 0x7fn; rest >>= 7n) this.#bytes[this.#at++] = Number(rest & 0x7fn) | 0x80
    this.#bytes[this.#at++] = Number(rest)
    return this
  }

  bytes(field: number, value: Uint8Array): this {
    this.header(field, value.byteLength)
    this.#bytes.set(value, this.#at)
    this.#at += value.byteLength
    return this
  }

  /** `length`: of the value in bytes. */
  string(field: number, value: string, length = utf8Bytes(value)): this {
    this.header(field, length)
    if (length !== value.length) this.#bytes.write(value, this.#at)
    else for (let i = 0; i < length; i++) this.#bytes[this.#at + i] = value.charCodeAt(i)
    this.#at += length
    return this
  }

  /** What another writer has written, as a message. */
  message(field: number, other: FieldWriter): this {
    const { length } = other
    this.header(field, length)
    for (let i = 0; i < length; i++) this.#bytes[this.#at + i] = other.#bytes[i] ?? 0
    this.#at += length
    return this
  }

  /** Begins a message that will be shorter than 128 bytes. */
  begin(field: number): number {
    this.#bytes[this.#at++] = (field << 3) | LENGTH_DELIMITED
    return this.#at++
  }

  /** Ends the message of that `begin`. */
  end(begun: number): void {
    this.#bytes[begun] = this.#at - begun - 1
  }

  /** What comes before a message of so many bytes. */
  header(field: number, length: number): this {
    this.#bytes[this.#at++] = (field << 3) | LENGTH_DELIMITED
    this.#varint(length)
    return this
  }

  /** Fields that are encoded already. */
  raw(fields: Uint8Array): this {
    this.#bytes.set(fields, this.#at)
    this.#at += fields.byteLength
    return this
  }

  get length(): number {
    return this.#at
  }

  /** What has been written. */
  finish(): Buffer {
    const message = Buffer.allocUnsafe(this.#at)
    this.#bytes.copy(message, 0, 0, this.#at)
    this.#shrink()
    return message
  }

  /** What has been written, as it goes over the wire. */
  finishFramed(): Framed {
    const frame = Buffer.allocUnsafe(PREFIX_BYTES + this.#at)
    frame[0] = 0
    frame.writeUInt32BE(this.#at, 1)
    this.#bytes.copy(frame, PREFIX_BYTES, 0, this.#at)
    this.#shrink()
    return new Framed(frame)
  }

  #shrink(): void {
    if (this.#bytes.byteLength > KEPT_BYTES) this.#bytes = Buffer.alloc(0)
  }

  #varint(value: number): void {
    let rest = value
    if (value > 0x7fff_ffff) {
      // Four groups at once, of what bit operations can hold.
      rest = Math.floor(value / 2 ** 28)
      const low = value - rest * 2 ** 28
      for (let shift = 0; shift < 28; shift += 7) this.#bytes[this.#at++] = (low >>> shift) | 0x80
    }
    while (rest > 0x7f) {
      this.#bytes[this.#at++] = (rest & 0x7f) | 0x80
      rest >>>= 7
    }
    this.#bytes[this.#at++] = rest
  }
}

/** What a field of so many bytes takes, with its tag and length. */
export function fieldBytes(length: number): number {
  return 1 + varintBytes(length) + length
}

/** How many bytes a text takes. Texts are short here, and mostly ASCII: that is seen sooner than anybody is asked. */
export function utf8Bytes(text: string): number {
  for (let i = 0; i < text.length; i++) if (text.charCodeAt(i) > 0x7f) return Buffer.byteLength(text)
  return text.length
}

/** How many bytes an integer below 2^35 takes. */
export function varintBytes(value: number): number {
  return value < 2 ** 7 ? 1 : value < 2 ** 14 ? 2 : value < 2 ** 21 ? 3 : value < 2 ** 28 ? 4 : 5
}
