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

const NOTHING = Buffer.alloc(0)

/** An encoded message with what gRPC puts before it, so that it is not copied once more. */
export class Framed {
  readonly bytes: Buffer
  readonly #lent: Buffer | undefined

  /** `lent`: the buffer of `FRAMES` that `bytes` is a part of, if it is. */
  constructor(bytes: Buffer, lent?: Buffer) {
    this.bytes = bytes
    this.#lent = lent
  }

  /** Whether `sent` is to be called. */
  get isLent(): boolean {
    return this.#lent !== undefined
  }

  /** The bytes have been sent, or could not be: then they may still be on their way. */
  sent(error: Error | null | undefined): void {
    if (this.#lent !== undefined && !error) FRAMES.giveBack(this.#lent)
  }

  /** Of the message. */
  get byteLength(): number {
    return this.bytes.byteLength - PREFIX_BYTES
  }

  /** What is kept from others for as long as the answer has not been sent. */
  get heldBytes(): number {
    return this.#lent?.byteLength ?? this.byteLength
  }

  get message(): Buffer {
    return this.bytes.subarray(PREFIX_BYTES)
  }
}

/** Smaller frames cost little to make. */
export const MIN_LENT_BYTES = 16 * 1024
/** The sizes of buffers that are used again are multiples of this. */
const LENT_STEP = 8 * 1024
/** Larger ones are not used again, and no more are kept than take this together. */
const MAX_LENT_BYTES = 256 * 1024
const MAX_KEPT_BYTES = 4 * 1024 * 1024

/**
 * Buffers for large frames, used again once HTTP/2 has handed them to the socket. To have a new one of 35 KB from the system,
 * page by page, costs more than to fill it (docs/performance.md). One that is not given back is garbage as any.
 */
class Frames {
  /** By their sizes, in steps. */
  readonly #free: Buffer[][] = Array.from({ length: MAX_LENT_BYTES / LENT_STEP + 1 }, () => [])
  #keptBytes = 0

  /** A buffer of at least so many bytes, and hardly more. */
  lend(bytes: number): Buffer {
    const steps = Math.ceil(bytes / LENT_STEP)
    const free = this.#free[steps]?.pop()
    if (free === undefined) return Buffer.allocUnsafeSlow(steps * LENT_STEP)
    this.#keptBytes -= free.byteLength
    return free
  }

  giveBack(buffer: Buffer): void {
    if (this.#keptBytes + buffer.byteLength > MAX_KEPT_BYTES) return
    const free = this.#free[buffer.byteLength / LENT_STEP]
    if (free === undefined) return
    free.push(buffer)
    this.#keptBytes += buffer.byteLength
  }
}

const FRAMES = new Frames()

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
  #bytes: Buffer = NOTHING
  #at = 0

  /** Begins a message that takes so many bytes at most. */
  start(maxBytes: number): this {
    if (maxBytes > this.#bytes.byteLength) this.#bytes = Buffer.allocUnsafeSlow(maxBytes)
    this.#at = 0
    return this
  }

  /** Begins a frame of a message that takes so many bytes at most, in a buffer that is lent. `finishLent` ends it. */
  startLent(maxBytes: number): this {
    this.#bytes = FRAMES.lend(PREFIX_BYTES + maxBytes)
    this.#at = PREFIX_BYTES
    return this
  }

  /** The frame. The writer has no buffer any more. */
  finishLent(): Framed {
    const lent = this.#bytes
    lent[0] = 0
    lent.writeUInt32BE(this.#at - PREFIX_BYTES, 1)
    this.#bytes = NOTHING
    return new Framed(lent.subarray(0, this.#at), lent)
  }

  /** Takes back what was written after the first so many bytes. */
  rewind(length: number): this {
    this.#at = length
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
    return this.header(field, other.length).rawPart(other.#bytes, 0, other.length)
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

  /** Short fields that are encoded already, from `from` up to `to`. */
  rawPart(fields: Uint8Array, from: number, to: number): this {
    const bytes = this.#bytes
    let at = this.#at
    for (let i = from; i < to; i++) bytes[at++] = fields[i] as number
    this.#at = at
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
    if (this.#bytes.byteLength > KEPT_BYTES) this.#bytes = NOTHING
  }

  #varint(value: number): void {
    const bytes = this.#bytes
    let at = this.#at
    let rest = value
    if (value > 0x7fff_ffff) {
      // Four groups at once, of what bit operations can hold.
      rest = Math.floor(value / 2 ** 28)
      const low = value - rest * 2 ** 28
      for (let shift = 0; shift < 28; shift += 7) bytes[at++] = (low >>> shift) | 0x80
    }
    while (rest > 0x7f) {
      bytes[at++] = (rest & 0x7f) | 0x80
      rest >>>= 7
    }
    bytes[at++] = rest
    this.#at = at
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
