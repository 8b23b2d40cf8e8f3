/** HTTP/2 by hand: frames as bytes, and a connection that sends any of them and notes what comes back. */
import { once } from 'node:events'
import { connect, type Socket } from 'node:net'

/** Types of frames (RFC 9113, section 6). */
export const FRAME = {
  data: 0,
  headers: 1,
  priority: 2,
  resetStream: 3,
  settings: 4,
  pushPromise: 5,
  ping: 6,
  goAway: 7,
  windowUpdate: 8,
  continuation: 9,
} as const

export const FLAG = { endStream: 1, ack: 1, endHeaders: 4, padded: 8, priority: 32 } as const

export const PREFACE = Buffer.from('PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n')

export const NOTHING = Buffer.alloc(0)

/** One frame. `length` lies about the payload's when it is given. */
export function frame(
  type: number,
  flags: number,
  stream: number,
  payload: Uint8Array = NOTHING,
  length = payload.length,
): Buffer {
  const head = Buffer.alloc(9)
  head.writeUIntBE(length, 0, 3)
  head.writeUInt8(type, 3)
  head.writeUInt8(flags, 4)
  head.writeUInt32BE(stream, 5)
  return Buffer.concat([head, payload])
}

export const settings = (values: Readonly<Record<number, number>> = {}) => {
  const payload = Object.entries(values).map(([id, value]) => {
    const one = Buffer.alloc(6)
    one.writeUInt16BE(Number(id), 0)
    one.writeUInt32BE(value, 2)
    return one
  })
  return frame(FRAME.settings, 0, 0, Buffer.concat(payload))
}

/** Header fields as HPACK literals without Huffman codes or indexing (RFC 7541, section 6.2.2). */
export function hpack(fields: Iterable<readonly [name: string, value: string | Uint8Array]>): Buffer {
  const parts: Uint8Array[] = []
  for (const [name, value] of fields) {
    const bytes = typeof value === 'string' ? Buffer.from(value, 'latin1') : value
    parts.push(Buffer.of(0), hpackInteger(name.length, 7), Buffer.from(name, 'latin1'))
    parts.push(hpackInteger(bytes.length, 7), bytes)
  }
  return Buffer.concat(parts)
}

/** An integer with a prefix of so many bits, all other bits of the first byte 0 (RFC 7541, section 5.1). */
export function hpackInteger(value: number, prefixBits: number): Buffer {
  const most = 2 ** prefixBits - 1
  if (value < most) return Buffer.of(value)
  const bytes = [most]
  let rest = value - most
  for (; rest >= 128; rest = Math.floor(rest / 128)) bytes.push((rest % 128) + 128)
  return Buffer.from([...bytes, rest])
}

/** What every gRPC request begins with. */
export const requestFields = (
  method: string,
  more: Readonly<Record<string, string>> = {},
): [string, string][] =>
  Object.entries({
    ':method': 'POST',
    ':scheme': 'http',
    ':path': method.includes('/') ? method : `/itemcache.v1.ItemCacheService/${method}`,
    ':authority': 'localhost',
    'content-type': 'application/grpc',
    te: 'trailers',
    ...more,
  })

/** A message with gRPC's five bytes in front. `length` lies about its size when it is given. */
export function grpcMessage(
  message: Uint8Array,
  { compressed = 0, length = message.length }: { compressed?: number; length?: number } = {},
): Buffer {
  const head = Buffer.alloc(5)
  head.writeUInt8(compressed, 0)
  head.writeUInt32BE(length, 1)
  return Buffer.concat([head, message])
}

/** A frame that came back. */
export interface Received {
  readonly type: number
  readonly flags: number
  readonly stream: number
  readonly payload: Buffer
}

const INITIAL_WINDOW = 65_535
const MAX_FRAME = 16_384

/** A connection to a server, of which nothing is answered unless the test does. */
export class RawConnection implements Disposable {
  readonly socket: Socket
  /** What the server has sent, as frames. */
  readonly frames: Received[] = []
  /** The bytes of it that are not a whole frame yet. */
  rest: Buffer = NOTHING
  /** Whether settings and pings of the server are acknowledged, as they must be. */
  polite = true
  closed = false
  #window = INITIAL_WINDOW
  readonly #windows = new Map<number, number>()
  #waiting: (() => void)[] = []

  private constructor(socket: Socket) {
    this.socket = socket
    socket.on('error', () => {})
    socket.on('close', () => {
      this.closed = true
      this.#wake()
    })
    socket.on('data', (bytes: Buffer) => this.#take(bytes))
  }

  static async open(address: string): Promise<RawConnection> {
    const [, host = '', port] = /^(.*):(\d+)$/.exec(address) ?? []
    const socket = connect(Number(port), host)
    await once(socket, 'connect')
    return new RawConnection(socket)
  }

  /** As `open`, with the preface and these settings sent. */
  static async greet(address: string, values: Readonly<Record<number, number>> = {}): Promise<RawConnection> {
    const connection = await RawConnection.open(address)
    connection.send(PREFACE, settings(values))
    return connection
  }

  /** Whether the socket takes more. */
  send(...parts: readonly Uint8Array[]): boolean {
    return !this.closed && this.socket.writable && this.socket.write(Buffer.concat(parts))
  }

  /** As `send`; resolves when the socket takes more, or is closed. */
  async sendOn(...parts: readonly Uint8Array[]): Promise<void> {
    if (this.send(...parts) || this.closed) return
    const { promise, resolve } = Promise.withResolvers<void>()
    this.socket.once('drain', resolve).once('close', resolve)
    await promise
  }

  /** Sends DATA frames as far as the server's flow control lets it; stops when the stream is refused. */
  async sendData(stream: number, bytes: Uint8Array, { end = false } = {}): Promise<void> {
    for (let at = 0; at < bytes.length; ) {
      const room = Math.min(this.#window, this.#windows.get(stream) ?? INITIAL_WINDOW, MAX_FRAME)
      if (this.refused(stream)) return
      if (room <= 0) {
        const { promise, resolve } = Promise.withResolvers<void>()
        this.#waiting.push(resolve)
        await promise
        continue
      }
      const part = bytes.subarray(at, at + room)
      at += part.length
      this.#window -= part.length
      this.#windows.set(stream, (this.#windows.get(stream) ?? INITIAL_WINDOW) - part.length)
      await this.sendOn(frame(FRAME.data, end && at === bytes.length ? FLAG.endStream : 0, stream, part))
    }
  }

  /** The frames of a type, of one stream or of all. */
  got(type: number, stream?: number): Received[] {
    return this.frames.filter((one) => one.type === type && (stream === undefined || one.stream === stream))
  }

  /** Whether the stream was reset, or the connection ended, by the server. */
  refused(stream: number): boolean {
    return this.closed || this.got(FRAME.resetStream, stream).length > 0 || this.got(FRAME.goAway).length > 0
  }

  #take(bytes: Buffer): void {
    this.rest = Buffer.concat([this.rest, bytes])
    for (;;) {
      if (this.rest.length < 9) return
      const end = 9 + this.rest.readUIntBE(0, 3)
      if (this.rest.length < end) return
      const one: Received = {
        type: this.rest.readUInt8(3),
        flags: this.rest.readUInt8(4),
        stream: this.rest.readUInt32BE(5),
        payload: Buffer.from(this.rest.subarray(9, end)),
      }
      this.rest = this.rest.subarray(end)
      this.frames.push(one)
      this.#heed(one)
      if (!this.polite || (one.flags & FLAG.ack) !== 0) continue
      if (one.type === FRAME.settings) this.send(frame(FRAME.settings, FLAG.ack, 0))
      if (one.type === FRAME.ping) this.send(frame(FRAME.ping, FLAG.ack, 0, one.payload))
    }
  }

  #heed({ type, stream, payload }: Received): void {
    if (type === FRAME.windowUpdate) {
      const more = payload.readUInt32BE(0)
      if (stream === 0) this.#window += more
      else this.#windows.set(stream, (this.#windows.get(stream) ?? INITIAL_WINDOW) + more)
    } else if (type !== FRAME.resetStream && type !== FRAME.goAway) return
    this.#wake()
  }

  #wake(): void {
    for (const resolve of this.#waiting.splice(0)) resolve()
  }

  [Symbol.dispose](): void {
    this.socket.destroy()
  }
}
