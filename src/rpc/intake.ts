/**
 * What is taken in from the network before grpc-js sees it. grpc-js accepts any method and nearly any content type, reads
 * `grpc-timeout` as it likes, waits for ever for a request that does not end and for a reader who does not read, and
 * holds and unpacks as much as there are streams. Here is where each of these has its bound. All of it is decided by
 * stream and connection, without a look at who calls.
 */
import {
  constants,
  type Http2Server,
  type Http2Session,
  type IncomingHttpHeaders,
  type ServerHttp2Stream,
} from 'node:http2'
import {
  ServerInterceptingCall,
  type ServerInterceptingCallInterface,
  type ServerInterceptor,
} from '@grpc/grpc-js'
import { ItemCacheError } from '../errors.ts'
import type { Logger } from '../observe/log.ts'
import type { Metrics } from '../observe/metrics.ts'
import type { RequestLog } from '../observe/request-log.ts'
import { type CallOwner, DirectCall, type DirectMethod } from './direct-call.ts'
import { HeaderStrings } from './header-strings.ts'
import { replaceStreams } from './open-streams.ts'
import { codeName, codeOf, toStatus, trailersOnly } from './status.ts'

/** The kinds of methods, as grpc-js calls them. `undefined`: there is no such method. */
export type MethodKind = 'unary' | 'serverStream' | 'bidi' | undefined

export interface IntakeOptions {
  readonly kindOf: (path: string) => MethodKind
  /** The methods that are called from here, by path. What is not among them is grpc-js'. */
  readonly direct: ReadonlyMap<string, DirectMethod>
  /** How long a request may take to arrive, and, again, how long a unary call may take from then on. */
  readonly maxDeadlineMs: number
  /** What is held of requests that are being received on one connection. */
  readonly maxConnectionBytes: number
  /** The same for all connections together, and what compressed messages may become. */
  readonly maxBytes: number
  /** No message is unpacked further than this. */
  readonly maxMessageBytes: number
  /** Most streams of all connections together, whatever has become of their calls. */
  readonly maxStreams: number
  /** A connection without a stream is closed after this time. */
  readonly maxIdleMs: number
  readonly log: Logger
  readonly requests: RequestLog
  readonly metrics: Metrics
  /** Monotonic, milliseconds. */
  readonly now: () => number
}

type StreamListener = (
  stream: ServerHttp2Stream,
  headers: IncomingHttpHeaders,
  flags: number,
  rawHeaders: readonly string[],
) => void

/**
 * How often the calls under way are looked at. Their age is counted in these looks: while the process is paused or far
 * behind, nobody's time runs out.
 */
const SWEEP_MS = 250
/** What a unary call may take beyond its bounds before its stream is closed. */
const LAST_WORDS_MS = 2000
/** For an answer to leave before its stream is closed. */
const ANSWER_LEAVES_MS = 100
/** The most that DEFLATE can make of a byte. */
const MAX_EXPANSION = 1032
/** What every stream may hold unpacked without being counted, so that small reads never meet a bound. */
const FREE_BYTES = 16 * 1024
/** A timer cannot be set for longer: 24.8 days. A caller that waits longer than that has no deadline. */
const MAX_TIMER_MS = 2 ** 31 - 1

const TIMEOUT_UNITS_MS: Readonly<Record<string, number>> = {
  H: 3_600_000,
  M: 60_000,
  S: 1000,
  m: 1,
  u: 1e-3,
  n: 1e-6,
}

/** Stands between the HTTP/2 servers and grpc-js. */
export class Intake implements Disposable {
  readonly #options: IntakeOptions
  /** In the order in which they came. */
  readonly #calls = new CallList()
  readonly #all: Held
  readonly #byConnection = new WeakMap<object, Held>()
  /** Open streams of each connection that has any, and of all. */
  readonly #streams = new Map<Http2Session, number>()
  #open = 0
  readonly #sessions = new Set<Http2Session>()
  /** Connections without a stream, and the look since which they have none, in that order. */
  readonly #idle = new Map<Http2Session, number>()
  readonly #headerStrings = new HeaderStrings()
  readonly #sweep: NodeJS.Timeout
  #sweeps = 0
  /** The call that grpc-js is just taking over. */
  #current: Call | undefined

  constructor(options: IntakeOptions) {
    this.#options = options
    this.#all = new Held(options.maxBytes)
    // What has come in meanwhile is read first.
    const look = () => {
      this.#sweeps++
      this.#endOverdue()
      this.#closeIdle()
    }
    this.#sweep = setInterval(() => setImmediate(look), SWEEP_MS).unref()
  }

  /** Lets a call be ended here in a way that grpc-js knows of. */
  readonly interceptor: ServerInterceptor = (_, taken) => {
    const call = this.#current
    if (call !== undefined) call.taken = taken
    // What the type wants is a wrapper around it, which would cost every message something.
    if (call === undefined || !call.weight.compressed) return taken as ServerInterceptingCall
    const { weight, kind } = call
    return new ServerInterceptingCall(taken, {
      start: (next) =>
        next({
          onReceiveMessage(message, next) {
            if (kind === 'bidi') weight.passedOn()
            next(message)
          },
          // Only now does the handler get the one message of any other kind.
          onReceiveHalfClose(next) {
            weight.release()
            next()
          },
        }),
    })
  }

  /** Comes before those who listen to the server's streams now. */
  guard(http2: Http2Server): void {
    const behind = http2.listeners('stream') as unknown as StreamListener[]
    http2.removeAllListeners('stream')
    const listener: StreamListener = (stream, headers, flags, raw) => {
      const call = this.#admit(stream, headers, raw)
      if (call === undefined || call.direct !== undefined) return
      this.#current = call
      for (const listener of behind) listener.call(http2, stream, headers, flags, raw)
      this.#current = undefined
    }
    http2.on('stream', listener as never)
    http2.on('session', (session) => {
      replaceStreams(session)
      this.#sessions.add(session)
      this.#idle.set(session, this.#sweeps)
      session.once('close', () => {
        this.#sessions.delete(session)
        this.#idle.delete(session)
      })
    })
  }

  /** Ends all connections, whatever is under way on them. grpc-js knows of them only while it counts for channelz. */
  cut(): void {
    // A code alone makes it an error to all who wait, which the types do not know of.
    for (const session of this.#sessions) session.destroy(constants.NGHTTP2_CANCEL as unknown as Error)
  }

  #admit(stream: ServerHttp2Stream, headers: IncomingHttpHeaders, raw: readonly string[]): Call | undefined {
    const { session } = stream
    // It may have been reset already.
    if (session === undefined || stream.destroyed || stream.closed) return undefined
    const path = headers[':path'] ?? ''
    const kind = this.#options.kindOf(path)
    const call = new Call(this, stream, path, kind, this.#weigh(session, headers, kind))
    const { weight } = call
    this.#opened(session)
    if (stream.destroyed) {
      stream.once('close', () => this.#closed(session))
      return undefined
    }
    const httpStatus = refusedAs(headers)
    const timeoutMs = takeTimeout(headers)
    if (httpStatus !== undefined || kind === undefined || timeoutMs === undefined) {
      stream.on('error', () => {}).once('close', () => this.#closed(session))
      if (httpStatus !== undefined) stream.respond({ ':status': httpStatus }, { endStream: true })
      else this.refuse(call, kind === undefined ? noSuchMethod(path) : malformedTimeout())
      return undefined
    }
    showRepeatedCredentials(headers, raw)
    this.#headerStrings.share(headers)

    this.#calls.add(call)
    const method = this.#options.direct.get(path)
    const direct =
      method &&
      new DirectCall(
        stream,
        headers,
        method,
        call,
        timeoutMs === Number.POSITIVE_INFINITY ? timeoutMs : Date.now() + timeoutMs,
      )
    call.direct = direct
    stream.on('data', (chunk: Buffer) => {
      if (call.refused) return
      if (weight.add(chunk)) direct?.receive(chunk)
      else this.refuse(call, tooMuch())
    })
    if (direct !== undefined) stream.on('error', ignore).on('end', () => direct.end())
    stream.once('close', () => {
      // What is being unpacked is held whoever has left.
      if (direct?.unpacking !== true) weight.release()
      this.#calls.delete(call)
      direct?.closed()
      this.#closed(session)
    })
    return call
  }

  /** One stream too many costs the connection that has the most of them all that it has. */
  #opened(session: Http2Session): void {
    this.#open++
    const before = this.#streams.get(session) ?? 0
    if (before === 0) this.#idle.delete(session)
    this.#streams.set(session, before + 1)
    if (this.#open <= this.#options.maxStreams) return
    const [most] = [...this.#streams].reduce((a, b) => (b[1] > a[1] ? b : a))
    this.#options.log.warn({ streams: this.#streams.get(most) }, 'too many streams: a connection is cut off')
    most.destroy(undefined, constants.NGHTTP2_ENHANCE_YOUR_CALM)
  }

  #closed(session: Http2Session): void {
    this.#open--
    const left = (this.#streams.get(session) ?? 0) - 1
    if (left > 0) this.#streams.set(session, left)
    else {
      this.#streams.delete(session)
      if (!session.closed && !session.destroyed) this.#idle.set(session, this.#sweeps)
    }
  }

  /** Whether requests of unary calls are on their way. */
  get receiving(): boolean {
    for (const { kind, stream } of this.#calls) if (kind === 'unary' && !stream.readableEnded) return true
    return false
  }

  get nowMs(): number {
    return this.#options.now()
  }

  get sweeps(): number {
    return this.#sweeps
  }

  /** Streams that are open, whatever has become of their calls. */
  get streams(): number {
    return this.#open
  }

  #weigh(session: Http2Session, headers: IncomingHttpHeaders, kind: MethodKind): Weight {
    const { maxConnectionBytes, maxMessageBytes } = this.#options
    // Honest clients may have a hundred of them on one connection at once, of which each might be a bomb.
    if (isCompressed(headers)) return new Weight([this.#all], kind === 'bidi', maxMessageBytes)
    let connection = this.#byConnection.get(session)
    if (connection === undefined) {
      connection = new Held(maxConnectionBytes)
      this.#byConnection.set(session, connection)
    }
    return new Weight([connection, this.#all], kind === 'bidi', 0)
  }

  #closeIdle(): void {
    for (const [session, since] of this.#idle) {
      if ((this.#sweeps - since) * SWEEP_MS < this.#options.maxIdleMs) break
      this.#idle.delete(session)
      session.close()
    }
  }

  #endOverdue(): void {
    const { maxDeadlineMs } = this.#options
    for (const call of this.#calls) {
      const ageMs = (this.#sweeps - call.sinceSweep) * SWEEP_MS
      if (ageMs <= maxDeadlineMs) break
      const { stream, kind } = call
      const arrived = stream.readableEnded
      if (kind === 'bidi' || (kind === 'serverStream' && arrived)) this.#calls.delete(call)
      else if (!arrived && !stream.headersSent) {
        this.#calls.delete(call)
        this.refuse(call, requestDidNotEnd())
      } else if (ageMs > 2 * maxDeadlineMs + LAST_WORDS_MS) {
        // It has been answered, and the caller does not take the answer.
        this.#calls.delete(call)
        stream.close(constants.NGHTTP2_CANCEL)
      }
    }
  }

  /** Answers a call of which no handler knows yet. */
  refuse(call: Call, error: ItemCacheError): void {
    if (call.refused) return
    call.refused = true
    call.weight.release()
    const { stream, path, kind, sinceMs, taken, direct } = call
    const { metrics, requests, now } = this.#options
    const failure = toStatus(error)
    // The handler of any other kind has not been called yet, and so the call not been counted.
    if (kind !== 'bidi') {
      const method = path.slice(1)
      const code = codeName(codeOf(error))
      const rpc = metrics.rpc(method)
      rpc.started++
      const durationMs = now() - sinceMs
      rpc.finish(code, durationMs)
      const duration_ms = Math.round(durationMs * 1000) / 1000
      requests.write({ method, code, duration_ms, reason: error.reason }, false, true)
      metrics.countFailure(error)
    }
    // The caller may go on sending. Closed at once, the stream would take the answer with it.
    setTimeout(() => stream.close(constants.NGHTTP2_NO_ERROR), ANSWER_LEAVES_MS).unref()
    if (direct !== undefined) direct.refuse(failure)
    else if (taken !== undefined) taken.sendStatus(failure)
    else if (!stream.destroyed && !stream.closed && !stream.headersSent) {
      stream.respond(trailersOnly(failure), { endStream: true })
    }
  }

  [Symbol.dispose](): void {
    clearInterval(this.#sweep)
  }
}

/**
 * Calls in the order in which they came. Not a `Set`: V8 replaces its table every so many additions, and an old table
 * refers to the one after it, so that from the first one that has become old garbage all later ones, and the calls in them,
 * outlive the collections of young garbage.
 */
class CallList {
  #first: Call | undefined
  #last: Call | undefined

  add(call: Call): void {
    call.before = this.#last
    if (this.#last === undefined) this.#first = call
    else this.#last.after = call
    this.#last = call
    call.listed = true
  }

  delete(call: Call): void {
    if (!call.listed) return
    call.listed = false
    const { before, after } = call
    if (before === undefined) this.#first = after
    else before.after = after
    if (after === undefined) this.#last = before
    else after.before = before
    // One that is garbage must not keep others.
    call.before = undefined
    call.after = undefined
  }

  /** The one that is just looked at may be deleted. */
  *[Symbol.iterator](): Iterator<Call> {
    for (let call = this.#first; call !== undefined; ) {
      const { after } = call
      yield call
      call = after
    }
  }
}

/** A call that has been let in. */
class Call implements CallOwner {
  readonly stream: ServerHttp2Stream
  readonly path: string
  readonly kind: MethodKind
  readonly sinceMs: number
  readonly sinceSweep: number
  readonly weight: Weight
  readonly #intake: Intake
  /** What grpc-js made of it; `undefined` while it has not. */
  taken: ServerInterceptingCallInterface | undefined
  /** What was made of it here: a unary call, or a server stream. */
  direct: DirectCall | undefined
  /** It has been answered without its handler, and what still comes is dropped. */
  refused = false
  /** Its place in the list of those that are open. */
  listed = false
  before: Call | undefined
  after: Call | undefined

  constructor(intake: Intake, stream: ServerHttp2Stream, path: string, kind: MethodKind, weight: Weight) {
    this.#intake = intake
    this.stream = stream
    this.path = path
    this.kind = kind
    this.weight = weight
    this.sinceMs = intake.nowMs
    this.sinceSweep = intake.sweeps
  }

  reject(error: ItemCacheError): void {
    this.#intake.refuse(this, error)
  }

  delivered(): void {
    if (this.weight.compressed) this.weight.release()
  }
}

const ignore = () => {}

/** The HTTP status of a request that is none of gRPC's. */
function refusedAs(headers: IncomingHttpHeaders): number | undefined {
  if (headers[':method'] !== 'POST') return constants.HTTP_STATUS_METHOD_NOT_ALLOWED
  // `application/grpc-web` is another protocol.
  if (!/^application\/grpc(?:$|[+;])/.test(headers['content-type'] ?? ''))
    return constants.HTTP_STATUS_UNSUPPORTED_MEDIA_TYPE
  return undefined
}

/** How long the caller waits, in milliseconds, or `undefined` when it does not say so properly. One that is longer than any timer is taken away. */
function takeTimeout(headers: IncomingHttpHeaders): number | undefined {
  const timeout = headers['grpc-timeout']
  if (timeout === undefined) return Number.POSITIVE_INFINITY
  const [, digits, unit = ''] = /^(\d{1,8})([HMSmun])$/.exec(String(timeout)) ?? []
  const ms = Number(digits) * (TIMEOUT_UNITS_MS[unit] ?? Number.NaN)
  if (Number.isNaN(ms)) return undefined
  if (ms <= MAX_TIMER_MS) return ms
  delete headers['grpc-timeout']
  return Number.POSITIVE_INFINITY
}

/**
 * Node drops every `authorization` of a request but the first, so that nobody could tell that there were several. This
 * joins them, which is no valid credential.
 */
function showRepeatedCredentials(headers: IncomingHttpHeaders, raw: readonly string[]): void {
  if (raw.indexOf('authorization') === raw.lastIndexOf('authorization')) return
  // Names and values in turn.
  headers.authorization = raw.filter((_, i) => i % 2 === 1 && raw[i - 1] === 'authorization').join(', ')
}

const isCompressed = (headers: IncomingHttpHeaders) => (headers['grpc-encoding'] ?? 'identity') !== 'identity'

/** Bytes that are held, up to a bound. */
class Held {
  #free: number
  constructor(max: number) {
    this.#free = max
  }
  take(bytes: number): boolean {
    this.#free -= bytes
    return this.#free >= 0
  }
  give(bytes: number): void {
    this.#free += bytes
  }
}

/**
 * What the messages of one request may weigh unpacked, told by their headers as they pass: five bytes, which are a flag
 * and a length.
 */
class Weight {
  readonly #accounts: readonly Held[]
  readonly #streaming: boolean
  readonly #maxUnpacked: number
  #held = 0
  #counted = 0
  #headerBytes = 0
  #compressed = false
  #length = 0
  #left = 0
  #extra = 0
  /** Messages that have begun and were not passed on. */
  #waiting = 0

  /**
   * `streaming`: whether messages are passed on one by one, and not when the request has ended. `maxUnpacked`: what a
   * compressed message may become; 0: none is compressed.
   */
  constructor(accounts: readonly Held[], streaming: boolean, maxUnpacked: number) {
    this.#accounts = accounts
    this.#streaming = streaming
    this.#maxUnpacked = maxUnpacked
  }

  get compressed(): boolean {
    return this.#maxUnpacked > 0
  }

  /** A message of a stream has been unpacked and handed over. */
  passedOn(): void {
    if (--this.#waiting === 0) this.release()
  }

  /** Whether it is still within the bounds. */
  add(chunk: Buffer): boolean {
    // Nothing more of a stream is read before all of its whole messages have been passed on.
    if (this.#streaming) this.#held = this.#left > 0 ? this.#length - this.#left + this.#extra : 0
    this.#held += chunk.length
    if (this.#streaming || this.#maxUnpacked > 0) this.#held += this.#unpacked(chunk)
    return this.#count()
  }

  /** What the messages that begin in the chunk may become beyond their own size. */
  #unpacked(chunk: Buffer): number {
    let sum = 0
    for (let at = 0; at < chunk.length; ) {
      if (this.#left > 0) {
        const part = Math.min(this.#left, chunk.length - at)
        this.#left -= part
        at += part
        continue
      }
      const byte = chunk[at++] ?? 0
      if (this.#headerBytes === 0) {
        this.#compressed = byte === 1
        this.#length = 0
      } else this.#length = this.#length * 256 + byte
      if (++this.#headerBytes < 5) continue
      this.#headerBytes = 0
      this.#left = this.#length
      this.#waiting++
      // Twice: grpc-js holds what it has unpacked in pieces, and then joined.
      this.#extra = this.#compressed ? 2 * Math.min(this.#length * MAX_EXPANSION, this.#maxUnpacked) : 0
      sum += this.#extra
    }
    return sum
  }

  #count(): boolean {
    const counted = Math.max(0, this.#held - FREE_BYTES)
    const more = counted - this.#counted
    this.#counted = counted
    if (more < 0) for (const account of this.#accounts) account.give(-more)
    if (more <= 0) return true
    // Not `every`: what is taken from one is given back to all.
    return this.#accounts.map((account) => account.take(more)).every(Boolean)
  }

  release(): void {
    this.#held = 0
    this.#count()
  }
}

const noSuchMethod = (path: string) =>
  new ItemCacheError('unimplemented', `there is no method ${path.slice(0, 256)}`, {
    reason: 'NO_SUCH_METHOD',
  })

const malformedTimeout = () => {
  const rule = 'must be 1 to 8 digits and a unit: H, M, S, m, u, n'
  return new ItemCacheError('invalid', `grpc-timeout: ${rule}`, {
    reason: 'INVALID_METADATA',
    violations: [{ field: 'grpc-timeout', description: rule }],
  })
}

const requestDidNotEnd = () =>
  new ItemCacheError('timeout', 'the request did not end in time', { reason: 'REQUEST_INCOMPLETE' })

const tooMuch = () =>
  new ItemCacheError('exhausted', 'too much is being received at once', {
    reason: 'TOO_MUCH_IN_FLIGHT',
    retryAfterMs: 1000,
  })
