/**
 * Calls with one request message, from their HTTP/2 streams on: unary calls and server streams. grpc-js makes a writable
 * stream, a deadline timer, metadata in a map and a dozen closures for each, which a hot read would spend more on than on
 * being read, and copies each message of a stream for each of its readers (docs/performance.md). HTTP/2 itself,
 * connections, TLS, keepalive and streams of requests are grpc-js' own.
 *
 * The protocol: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
 */
import { constants, type IncomingHttpHeaders, type ServerHttp2Stream } from 'node:http2'
import { gunzip, inflate } from 'node:zlib'
import { ItemCacheError } from '../errors.ts'
import type { Reply } from './service-definition.ts'
import { ACCEPTED_ENCODINGS, type Status, trailers, trailersOnly } from './status.ts'
import { sendOkTrailers, writePastQueue } from './stream-handle.ts'
import { weightOf } from './unsent.ts'
import { Framed, framed, PREFIX_BYTES } from './wire.ts'

/** A method that is called with one message. */
export interface DirectMethod {
  readonly maxRequestBytes: number
  readonly decode: (message: Buffer) => unknown
  readonly handle: (call: DirectCall) => void
}

/** Who has taken the call in. */
export interface CallOwner {
  /** The request is not one. Must answer the call. */
  reject(error: ItemCacheError): void
  /** The handler has the request, or nobody needs it any more. */
  delivered(): void
}

/** Name after name with its value, which Node takes as it is: of an object it makes a copy for each call. */
const RESPONSE_HEADERS = Object.freeze([
  ':status',
  `${constants.HTTP_STATUS_OK}`,
  'content-type',
  'application/grpc+proto',
  'grpc-accept-encoding',
  ACCEPTED_ENCODINGS,
])
/** gRPC has no use for a date, and Node would append it to the headers. */
const WITH_TRAILERS = { waitForTrailers: true, sendDate: false }

/** One call. It is answered once, by `reply` or by any number of `write` and `refuse`: what comes afterwards is ignored. */
export class DirectCall {
  readonly metadata: CallHeaders
  /** The decoded message. */
  request: unknown
  /** The caller went away before it was answered. */
  cancelled = false
  readonly #stream: ServerHttp2Stream
  readonly #method: DirectMethod
  readonly #owner: CallOwner
  readonly #deadlineMs: number
  /** A message is being unpacked, which nobody can stop. */
  unpacking = false
  /** What has come of the request: the first chunk as it came, or a buffer that has room for more. */
  #received: Buffer = NOTHING
  #receivedBytes = 0
  /** Of the message; -1: not known yet. */
  #length = -1
  #answered = false
  /** Its headers have been sent, and messages may follow. */
  #begun = false
  #whenCancelled: (() => void)[] | undefined
  #whenClosed: (() => void)[] | undefined

  /** `deadlineMs`: milliseconds since 1970, or `Infinity`. */
  constructor(
    stream: ServerHttp2Stream,
    headers: IncomingHttpHeaders,
    method: DirectMethod,
    owner: CallOwner,
    deadlineMs: number,
  ) {
    this.#stream = stream
    this.#method = method
    this.#owner = owner
    this.#deadlineMs = deadlineMs
    this.metadata = new CallHeaders(headers)
  }

  /** Of the message as it came, maybe compressed. */
  get messageBytes(): number {
    return this.#receivedBytes - PREFIX_BYTES
  }

  getDeadline(): number {
    return this.#deadlineMs
  }

  /** The caller's end of the connection: its address and port. */
  getPeer(): string {
    const { remoteAddress, remotePort } = this.#stream.session?.socket ?? {}
    return remoteAddress === undefined ? 'unknown' : `${remoteAddress}:${remotePort}`
  }

  /** Told when the caller goes away before it is answered; not when it has gone already. */
  on(_event: 'cancelled', tell: () => void): this {
    this.#whenCancelled ??= []
    this.#whenCancelled.push(tell)
    return this
  }

  /**
   * Calls back when the socket has taken the answer, or never will; of one that weighs nothing, when it has been passed on to the
   * socket, so that nobody waits for a caller who does not read. False when that is so already.
   */
  whenClosed(then: () => void): boolean {
    if (this.#stream.destroyed) return false
    this.#whenClosed ??= []
    this.#whenClosed.push(then)
    return true
  }

  /** A part of the request. */
  receive(chunk: Buffer): void {
    if (this.#answered) return
    if (this.#receivedBytes === 0) this.#received = chunk
    else this.#append(chunk)
    this.#receivedBytes += chunk.byteLength
    if (this.#length === -1 && this.#receivedBytes >= PREFIX_BYTES) {
      this.#length = this.#received.readUInt32BE(1)
      if (this.#length > this.#method.maxRequestBytes) {
        this.#owner.reject(tooLarge(this.#length, this.#method.maxRequestBytes))
        return
      }
    }
    if (this.#length !== -1 && this.#receivedBytes > PREFIX_BYTES + this.#length) {
      this.#owner.reject(notOneMessage('more than one message'))
    }
  }

  /** The request is complete, or was broken off: the end of both looks the same. */
  end(): void {
    if (this.#answered || this.#stream.aborted) return
    if (this.#receivedBytes < PREFIX_BYTES + Math.max(0, this.#length)) {
      this.#owner.reject(notOneMessage(this.#receivedBytes === 0 ? 'no message' : 'a part of a message'))
      return
    }
    const bytes = this.#received.subarray(0, this.#receivedBytes)
    this.#received = NOTHING
    const message = bytes.subarray(PREFIX_BYTES)
    if (bytes[0] === 0) this.#deliver(message)
    else this.#unpack(bytes[0] ?? 0, message)
  }

  /** The stream is closed. */
  closed(): void {
    if (!this.#answered) {
      this.#answered = true
      this.cancelled = true
      for (const tell of this.#whenCancelled ?? []) tell()
    }
    for (const tell of this.#whenClosed ?? []) tell()
    this.#whenCancelled = undefined
    this.#whenClosed = undefined
    shed(this.#stream)
  }

  reply(reply: Reply): void {
    if (!this.#mayAnswer()) return
    const stream = this.#stream
    stream.respond(RESPONSE_HEADERS, WITH_TRAILERS)
    stream.on('wantTrailers', sendOkTrailers)
    if (weightOf(reply) === 0) {
      // Past the stream's queue, so that the end goes with it. The stream may be closed before the socket has taken anything: whoever
      // wants to know that counts larger answers.
      const bytes = frameOf(reply)
      if (!writePastQueue(stream, bytes)) stream._write(bytes, 'buffer' as BufferEncoding, nobodyAsks)
    } else if (reply instanceof Framed && reply.isLent) {
      stream.write(reply.bytes, (error) => {
        // The socket has taken all of it, unless the stream was destroyed: then Node calls back, without an error, although
        // a part may still be on its way.
        if (!stream.destroyed) reply.sent(error)
      })
    } else stream.write(frameOf(reply))
    stream.end()
  }

  /**
   * One of many messages, as it is when it is framed: many calls may be sent the same bytes. `left` is called when the network
   * has taken them, or with why it will not; not always when the caller goes away. The next one comes after that.
   */
  write(reply: Reply, left: (error?: Error | null) => void): void {
    const stream = this.#stream
    if (this.#answered || stream.closed || stream.destroyed) return
    if (!this.#begun) {
      this.#begun = true
      stream.respond(RESPONSE_HEADERS, WITH_TRAILERS)
    }
    const bytes = frameOf(reply)
    if (!writePastQueue(stream, bytes, left)) stream.write(bytes, left)
  }

  /** Ends the call, after what has been written. */
  refuse(status: Status): void {
    if (!this.#mayAnswer()) return
    const stream = this.#stream
    if (this.#begun) {
      stream.once('wantTrailers', () => stream.sendTrailers(trailers(status)))
      stream.end()
    } else stream.respond(trailersOnly(status), { endStream: true })
  }

  #mayAnswer(): boolean {
    if (this.#answered) return false
    this.#answered = true
    return !this.#stream.destroyed && !this.#stream.closed
  }

  /** Into one buffer: a chunk of a byte that is kept by itself takes a hundred. */
  #append(chunk: Buffer): void {
    const bytes = this.#receivedBytes + chunk.byteLength
    if (bytes > this.#received.byteLength) {
      const larger = Buffer.allocUnsafe(Math.max(bytes, 2 * this.#received.byteLength))
      this.#received.copy(larger, 0, 0, this.#receivedBytes)
      this.#received = larger
    }
    chunk.copy(this.#received, this.#receivedBytes)
  }

  #deliver(message: Buffer): void {
    this.request = this.#method.decode(message)
    this.#owner.delivered()
    this.#method.handle(this)
  }

  #unpack(flag: number, message: Buffer): void {
    const [encoding = 'identity'] = this.metadata.get('grpc-encoding')
    const unpack = UNPACKERS.get(encoding)
    if (flag !== 1 || encoding === 'identity') this.#owner.reject(badFlag())
    else if (unpack === undefined) this.#owner.reject(unknownEncoding())
    else {
      const options = { maxOutputLength: this.#method.maxRequestBytes }
      this.unpacking = true
      unpack(message, options, (error, unpacked) => this.#unpacked(error, unpacked))
    }
  }

  #unpacked(error: Error | null, message: Buffer): void {
    this.unpacking = false
    if (this.#answered) {
      this.#owner.delivered()
      return
    }
    const { maxRequestBytes } = this.#method
    if (error === null) this.#deliver(message)
    else if ('code' in error && error.code === 'ERR_BUFFER_TOO_LARGE') {
      this.#owner.reject(tooLarge(`more than ${maxRequestBytes}`, maxRequestBytes))
    } else this.#owner.reject(notPacked(error))
  }
}

/** What `EventEmitter`, `Readable` and `Writable` keep in a stream. */
interface Kept {
  _events: object
  _eventsCount: number
  _readableState: unknown
  _writableState: unknown
}

/** Of the first stream that was over, and had no error: they say ended, finished and destroyed, as those of every other one do. */
let over: Pick<Kept, '_readableState' | '_writableState'> | undefined

/**
 * Takes from a stream that is over what it keeps for itself, its listeners with all that they know of the call: V8 takes most
 * such streams for alive until the next full collection of garbage (docs/performance.md#what-garbage-collection-costs). One whose
 * queue was not emptied, because its answer was broken off, is left as it is: something may still come back to it.
 */
function shed(stream: ServerHttp2Stream): void {
  if (!stream.readableEnded || !stream.writableFinished || !stream.destroyed) return
  const kept = stream as unknown as Kept
  if (over === undefined && (stream.rstCode !== constants.NGHTTP2_NO_ERROR || stream.errored)) return
  over ??= { _readableState: kept._readableState, _writableState: kept._writableState }
  kept._events = Object.create(null)
  kept._eventsCount = 0
  kept._readableState = over._readableState
  kept._writableState = over._writableState
}

const UNPACKERS = new Map([
  ['gzip', gunzip],
  ['deflate', inflate],
])

const frameOf = (reply: Reply): Buffer => (reply instanceof Framed ? reply : framed(reply)).bytes

const nobodyAsks = () => {}

/** The metadata of a call, as far as anybody here asks for it: the values of one key. */
export class CallHeaders {
  readonly #headers: IncomingHttpHeaders

  constructor(headers: IncomingHttpHeaders) {
    this.#headers = headers
  }

  /** `key` in small letters. */
  get(key: string): readonly string[] {
    const value = this.#headers[key]
    return value === undefined ? NO_VALUES : typeof value === 'string' ? [value] : value
  }
}

const NO_VALUES: readonly string[] = []
const NOTHING = Buffer.alloc(0)

const notOneMessage = (what: string) =>
  new ItemCacheError('unimplemented', `the request holds ${what}, where the method takes one`, {
    reason: 'NOT_ONE_MESSAGE',
  })

const tooLarge = (bytes: number | string, maxBytes: number) =>
  new ItemCacheError('exhausted', `the message has ${bytes} bytes, of at most ${maxBytes}`, {
    reason: 'MESSAGE_TOO_LARGE',
  })

const badFlag = () =>
  new ItemCacheError('internal', 'the message says that it is compressed, and the call that it is not', {
    reason: 'MALFORMED_MESSAGE',
  })

const unknownEncoding = () =>
  new ItemCacheError('unimplemented', 'grpc-encoding: must be identity, gzip or deflate', {
    reason: 'ENCODING_UNSUPPORTED',
  })

const notPacked = (cause: unknown) =>
  new ItemCacheError('internal', 'the message could not be decompressed', {
    reason: 'MALFORMED_MESSAGE',
    cause,
  })
