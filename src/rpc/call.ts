/** One call: who asks, until when, and the frame in which every handler runs. */
import { randomUUID } from 'node:crypto'
import type { handleBidiStreamingCall } from '@grpc/grpc-js'
import { status } from '@grpc/grpc-js'
import { ItemCacheError } from '../errors.ts'
import type { Ending } from '../invalidation/tail.ts'
import type { Logger } from '../observe/log.ts'
import type { Metrics, RpcMetrics } from '../observe/metrics.ts'
import type { RequestLog } from '../observe/request-log.ts'
import type { Trace, Tracing } from '../observe/tracing.ts'
import type { ReadOptions } from '../service/read.ts'
import {
  type Authenticator,
  authorize,
  type CallMetadata,
  isWrite,
  single,
  whenCredentialEnds,
} from './auth.ts'
import type { DirectMethod } from './direct-call.ts'
import type { Identity } from './identity.ts'
import type { RateLimit } from './rate-limit.ts'
import { Malformed, type Reply, wireBytes } from './service-definition.ts'
import { codeName, toItemCacheError, toStatus } from './status.ts'
import { tooMuchUnsent, type Unsent, weightOf } from './unsent.ts'

/** What the frame of every call needs. */
export interface CallFrame {
  readonly log: Logger
  readonly requests: RequestLog
  /** `undefined`: tracing is off. */
  readonly tracing?: Tracing | undefined
  readonly metrics: Metrics
  readonly auth: Authenticator
  /** `undefined`: tenants may call as often as they like. */
  readonly rateLimit?: RateLimit | undefined
  /** Monotonic, milliseconds. */
  readonly now: () => number
  /** Longest time that a unary call may take, whatever its deadline says. */
  readonly maxDeadlineMs: number
  /** Most calls that are open at once, streams included; and most that are answered, of which the callers lack a part. */
  readonly maxCalls: number
  readonly unsent: Unsent
  /** Aborts when the server begins to drain. */
  readonly draining: AbortSignal
  /** Aborts a moment later: messages of streams that have not left by then are given up. */
  readonly hurrying: AbortSignal
}

/** What the frame needs of a call, whoever has made it of the stream. */
interface AnyCall {
  readonly metadata: CallMetadata
  readonly cancelled: boolean
  getDeadline(): Date | number
  getPeer(): string
  on(event: 'cancelled', listener: () => void): unknown
}

/** What a handler knows of its call besides the request. */
export class CallContext {
  readonly tenant: string
  /** `undefined`: tracing is off. */
  readonly trace: Trace | undefined
  readonly #call: AnyCall
  readonly #maxDeadlineMs: number
  #ending: Ended | undefined
  #controller: AbortController | undefined
  #timer: NodeJS.Timeout | undefined
  #traceId: string | undefined

  /** For the log line: what the handler found out. */
  id: string | undefined
  tier: string | undefined
  outcome: string | undefined
  /** An encoded `CacheStatus`. Goes into the details of an error, so that a NOT_FOUND tells which tier said so. */
  cache: Uint8Array | undefined

  constructor(call: AnyCall, tenant: string, maxDeadlineMs: number, trace: Trace | undefined) {
    this.#call = call
    this.#maxDeadlineMs = maxDeadlineMs
    this.tenant = tenant
    this.trace = trace
  }

  /** Who writes, as the caller says; `''` when it does not. */
  get clientId(): string {
    return single(this.#call.metadata, 'x-client-id') ?? ''
  }

  /** The trace's id: the 32 hex digits of the W3C trace context, or a new one. */
  get traceId(): string {
    if (this.trace !== undefined) return this.trace.traceId
    this.#traceId ??= this.#givenTraceId()
    return this.#traceId
  }

  #givenTraceId(): string {
    const given = this.#call.metadata.get('traceparent')[0]?.toString() ?? ''
    return (
      /^[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}$/.exec(given)?.[1] ??
      // Far cheaper than asking for random bytes: Node keeps some at hand for these.
      randomUUID().replaceAll('-', '')
    )
  }

  /** The options of a read that shows in the call's trace, if it has one. */
  traced(options: ReadOptions): ReadOptions {
    return this.trace === undefined ? options : { ...options, trace: this.trace }
  }

  /** When the caller stops waiting, in milliseconds from now; at most the server's maximum. */
  get remainingMs(): number {
    return Math.max(0, Math.min(leftMs(this.#call), this.#maxDeadlineMs))
  }

  /** Aborts with an `ItemCacheError` when the caller cancels or the deadline passes. Made when first asked for. */
  get ending(): Ending {
    if (this.#ending === undefined) {
      const ending = new Ended()
      this.#ending = ending
      const cancel = () => ending.abort(whyGone(this.#call))
      this.#call.on('cancelled', cancel)
      // It may have happened while the credential was checked.
      if (this.#call.cancelled) cancel()
      this.#timer = setTimeout(() => ending.abort(deadlinePassed()), this.remainingMs)
    }
    return this.#ending
  }

  /** As `ending`, for those who want an `AbortSignal`. */
  get signal(): AbortSignal {
    if (this.#controller === undefined) {
      const controller = new AbortController()
      this.#controller = controller
      const { ending } = this
      const abort = () => controller.abort(ending.reason)
      if (ending.aborted) abort()
      else ending.addEventListener('abort', abort)
    }
    return this.#controller.signal
  }

  /** The caller's end of the connection: its address and port. */
  get peer(): string {
    return this.#call.getPeer()
  }

  /** Releases the timer. */
  end(): void {
    clearTimeout(this.#timer)
  }
}

/** Most misses end before their caller's time does: for these an `AbortController` costs more than what it is there for. */
class Ended implements Ending {
  aborted = false
  reason: unknown
  readonly #listeners = new Set<() => void>()

  abort(reason: unknown): void {
    if (this.aborted) return
    this.aborted = true
    this.reason = reason
    for (const listener of this.#listeners) listener()
    this.#listeners.clear()
  }

  throwIfAborted(): void {
    if (this.aborted) throw this.reason
  }

  addEventListener(_type: 'abort', listener: () => void): void {
    this.#listeners.add(listener)
  }

  removeEventListener(_type: 'abort', listener: () => void): void {
    this.#listeners.delete(listener)
  }
}

/** Until the caller's deadline; negative when it has passed. */
function leftMs(call: AnyCall): number {
  const deadline = call.getDeadline()
  return (deadline instanceof Date ? deadline.getTime() : deadline) - Date.now()
}

export const deadlinePassed = () => new ItemCacheError('timeout', 'the deadline has passed')

/** grpc-js reports a deadline that has passed as a cancellation, too. Its timer may be a millisecond early. */
function whyGone(call: AnyCall): ItemCacheError {
  return leftMs(call) <= 1 ? deadlinePassed() : new ItemCacheError('cancelled', 'the caller cancelled')
}

/** Decides who calls and whether they may, before anything of the request is looked at. At once, or later for a JWT. */
export function admitted(frame: CallFrame, method: string, call: AnyCall): Identity | Promise<Identity> {
  const { openCalls, openAnswers } = frame.metrics
  if (openCalls > frame.maxCalls || openAnswers > frame.maxCalls) {
    throw new ItemCacheError('exhausted', 'too many calls are open on this instance', {
      reason: 'TOO_MANY_CALLS',
      retryAfterMs: 1000,
    })
  }
  const admit = (identity: Identity): Identity => {
    authorize(method, identity)
    frame.metrics.tenant(identity.tenant).calls++
    frame.rateLimit?.take(identity.tenant)
    return identity
  }
  const identity = frame.auth.identify(call.metadata)
  return identity instanceof Promise ? identity.then(admit) : admit(identity)
}

/** A handler of a unary call: answers at once or later, or throws. */
export type UnaryHandler<Request> = (request: Request, context: CallContext) => Reply | Promise<Reply>

/**
 * The frame of every unary call: whatever the handler does, the caller gets exactly one answer, and the call is
 * counted and logged.
 */
export function unary<Request>(
  frame: CallFrame,
  method: string,
  handler: UnaryHandler<Request>,
): DirectMethod['handle'] {
  const rpc = frame.metrics.rpc(method)
  const writes = isWrite(method)
  const answerLeft = () => {
    frame.metrics.openAnswers--
  }
  return (call) => {
    const account = new Account(frame, rpc, method, call)
    account.receivedBytes = call.messageBytes
    let context: CallContext | undefined
    const refuse = (error: unknown) => call.refuse(account.fail(context, error))
    const send = (reply: Reply) => {
      const weight = weightOf(reply)
      const tenant = context?.tenant ?? ''
      // What has been written is acknowledged in any case.
      if (!writes && !frame.unsent.hasRoomFor(weight, tenant)) return refuse(tooMuchUnsent())
      frame.unsent.addUntilClosed(weight, tenant, call)
      account.sentBytes = reply.byteLength
      account.finish(context, status.OK)
      call.reply(reply)
    }
    const answer = ({ tenant }: Identity) => {
      // A handler that has answered says nothing of whether the caller, who may be slow, has all of the answer.
      if (call.whenClosed(answerLeft)) frame.metrics.openAnswers++
      if (writes && !frame.unsent.mayWrite(tenant)) throw tooMuchUnsent()
      context = new CallContext(call, tenant, frame.maxDeadlineMs, account.trace)
      const reply = handler(wellFormed(call.request as Request | Malformed), context)
      if (reply instanceof Promise) reply.then(send, refuse)
      else send(reply)
    }
    try {
      const identity = admitted(frame, method, call)
      if (identity instanceof Promise) identity.then(answer).catch(refuse)
      else answer(identity)
    } catch (error) {
      refuse(error)
    }
  }
}

/** What a server stream sends. Disposed of when the stream is over. */
export interface Messages extends Disposable {
  /** The next message, or `undefined`: there is none, and it wakes when there may be. Throws what ends the stream. */
  next(): Reply | undefined
  /** True: there is none after the one just given; it wakes when there may be. Who does not say so is asked. */
  readonly isWaiting?: boolean
}

export interface StreamSignals {
  /** Aborts when the stream is over, whoever has ended it. */
  readonly gone: AbortSignal
  /** Aborts when the server is about to drain: then messages end with the signal's reason. */
  readonly draining: AbortSignal
  /** Asks for a message where there was none before. */
  readonly wake: () => void
}

/** A handler of a server stream: says at once or later what is sent, or throws. */
export type StreamHandler<Request> = (
  request: Request,
  context: CallContext,
  signals: StreamSignals,
) => Messages | Promise<Messages>

/**
 * The frame of every server stream. A message is asked for when the one before has left for the network, unless it was the last for now:
 * nothing is queued for a slow reader. What is there when the handler wakes is written at once.
 */
export function serverStream<Request>(
  frame: CallFrame,
  method: string,
  handler: StreamHandler<Request>,
): DirectMethod['handle'] {
  const rpc = frame.metrics.rpc(method)
  return (call) => {
    const account = new Account(frame, rpc, method, call, true)
    account.receivedBytes = call.messageBytes
    const gone = new AbortController()
    let context: CallContext | undefined
    let messages: Messages | undefined
    let leaving = false
    /** It has woken while a message was leaving. */
    let awake = false
    let weight = 0
    let over = false
    let deadline: NodeJS.Timeout | undefined
    let forgetCredential: (() => void) | undefined

    const fail = (error: unknown) => {
      if (over) return
      over = true
      clearTimeout(deadline)
      frame.draining.removeEventListener('abort', pump)
      frame.hurrying.removeEventListener('abort', hurry)
      forgetCredential?.()
      messages?.[Symbol.dispose]()
      gone.abort(error)
      call.refuse(account.fail(context, error))
    }
    const reserve = () => {
      const tenant = context?.tenant ?? ''
      if (!frame.unsent.hasRoomFor(weight, tenant)) {
        weight = 0
        throw tooMuchUnsent()
      }
      frame.unsent.add(weight, tenant)
    }
    const release = () => {
      if (weight === 0) return
      frame.unsent.release(weight, context?.tenant ?? '')
      weight = 0
    }
    const pump = () => {
      awake = leaving
      if (over || leaving || messages === undefined) return
      try {
        const reply = messages.next()
        if (reply !== undefined) write(reply)
      } catch (error) {
        fail(error)
      }
    }
    const write = (reply: Reply) => {
      weight = weightOf(reply)
      if (weight > 0) reserve()
      account.sentBytes += reply.byteLength
      leaving = true
      call.write(reply, left)
    }
    const left = (error?: Error | null) => {
      release()
      if (error) return
      leaving = false
      if (awake || messages?.isWaiting !== true) pump()
    }
    const leave = () => {
      release()
      fail(whyGone(call))
    }
    const hurry = () => fail(frame.hurrying.reason)
    const begin = (begun: Messages) => {
      messages = begun
      if (over) begun[Symbol.dispose]()
      else pump()
    }
    const run = (identity: Identity) => {
      if (over) return
      context = new CallContext(call, identity.tenant, Number.POSITIVE_INFINITY, account.trace)
      forgetCredential = whenCredentialEnds(identity, fail)
      if (over) return forgetCredential()
      const request = wellFormed(call.request as Request | Malformed)
      const begun = handler(request, context, { gone: gone.signal, draining: frame.draining, wake: pump })
      if (begun instanceof Promise) begun.then(begin, fail)
      else begin(begun)
    }

    call.on('cancelled', leave)
    call.whenClosed(release)
    const leftNowMs = leftMs(call)
    if (leftNowMs !== Number.POSITIVE_INFINITY) {
      deadline = setTimeout(() => fail(deadlinePassed()), Math.max(0, leftNowMs))
    }
    // A message that has not left by then is given up.
    frame.hurrying.addEventListener('abort', hurry, { once: true })
    frame.draining.addEventListener('abort', pump, { once: true })
    try {
      frame.hurrying.throwIfAborted()
      const identity = admitted(frame, method, call)
      if (identity instanceof Promise) identity.then(run).catch(fail)
      else run(identity)
    } catch (error) {
      fail(error)
    }
  }
}

/**
 * A handler of one look-up of a stream. It answers at once or later, failures among the answers: what it throws ends
 * the stream. `ending` makes one that aborts when the caller went away or the server's own maximum has passed.
 */
export type LookUpHandler<Request> = (
  request: Request,
  context: CallContext,
  ending: () => Ending,
) => Reply | Promise<Reply>

/** Look-ups of one stream that are being loaded at once. While there are so many, no further one is read. */
const MAX_LOADING = 500

/**
 * The frame of a stream of look-ups. Answers are written as they are ready; a look-up that is answered at once is
 * answered in the tick in which it came. Reading stops while the caller does not take its answers, or while
 * `MAX_LOADING` look-ups are under way: so a stream holds so many answers at most.
 */
export function lookUpStream<Request>(
  frame: CallFrame,
  method: string,
  handler: LookUpHandler<Request>,
): handleBidiStreamingCall<Request | Malformed, Reply> {
  const rpc = frame.metrics.rpc(method)
  return (call) => {
    const account = new Account(frame, rpc, method, call, true)
    const gone = new Ended()
    let context: CallContext | undefined
    let loading = 0
    let unsent = 0
    let unsentBytes = 0
    let full = false
    let ending: 'half-closed' | 'draining' | undefined
    let over = false
    let forgetCredential: (() => void) | undefined

    const finish = () => {
      over = true
      frame.unsent.release(unsentBytes, context?.tenant ?? '')
      frame.draining.removeEventListener('abort', drain)
      forgetCredential?.()
    }
    const fail = (error: unknown) => {
      if (over) return
      finish()
      gone.abort(error)
      call.emit('error', account.fail(context, error))
    }
    const leave = () => fail(whyGone(call))
    const endIfDone = () => {
      if (over || ending === undefined || loading > 0 || unsent > 0) return
      if (ending === 'draining') return fail(frame.draining.reason)
      finish()
      account.finish(context, status.OK)
      call.end()
    }
    const drain = () => {
      ending = 'draining'
      call.pause()
      endIfDone()
    }
    const readOn = () => {
      if (!full && loading + unsent < MAX_LOADING && ending !== 'draining') call.resume()
    }
    const answer = (reply: Reply) => {
      if (over) return
      const weight = reply.byteLength
      const tenant = context?.tenant ?? ''
      if (!frame.unsent.hasRoomFor(weight, tenant)) return fail(tooMuchUnsent())
      frame.unsent.add(weight, tenant)
      unsentBytes += weight
      unsent++
      account.sentBytes += reply.byteLength
      full = !call.write(reply, () => {
        unsent--
        if (over) return
        unsentBytes -= weight
        frame.unsent.release(weight, tenant)
        endIfDone()
      })
      if (full) call.pause()
    }
    const load = async (late: Promise<Reply>, timer: { stop(): void }) => {
      loading++
      if (loading + unsent >= MAX_LOADING) call.pause()
      try {
        answer(await late)
      } catch (error) {
        fail(error)
      } finally {
        timer.stop()
        loading--
        readOn()
        endIfDone()
      }
    }

    call.on('cancelled', leave)
    call.on('close', leave)
    call.on('error', leave)
    call.on('drain', () => {
      full = false
      readOn()
    })
    call.on('end', () => {
      ending ??= 'half-closed'
      endIfDone()
    })
    // Nothing is read before it is known who calls.
    const begin = (identity: Identity) => {
      if (over) return
      const known = new CallContext(call, identity.tenant, Number.POSITIVE_INFINITY, account.trace)
      context = known
      forgetCredential = whenCredentialEnds(identity, fail)
      if (over) return forgetCredential()
      call.on('data', (message: Request | Malformed) => {
        if (over) return
        account.receivedBytes += wireBytes(message)
        const patience = new LookUpTime(gone, frame.maxDeadlineMs)
        try {
          const reply = handler(wellFormed(message), known, () => patience.ending)
          if (reply instanceof Promise) void load(reply, patience)
          else answer(reply)
        } catch (error) {
          patience.stop()
          fail(error)
        }
      })
      if (frame.draining.aborted) drain()
      else frame.draining.addEventListener('abort', drain, { once: true })
    }
    try {
      const identity = admitted(frame, method, call)
      if (identity instanceof Promise) identity.then(begin).catch(fail)
      else begin(identity)
    } catch (error) {
      fail(error)
    }
  }
}

/** How long one look-up of a stream may take. Costs nothing until its ending is asked for. */
class LookUpTime {
  readonly #gone: Ending
  readonly #maxMs: number
  #timer: NodeJS.Timeout | undefined
  #ending: Ended | undefined
  readonly #leave = () => this.#ending?.abort(this.#gone.reason)

  constructor(gone: Ending, maxMs: number) {
    this.#gone = gone
    this.#maxMs = maxMs
  }

  get ending(): Ending {
    if (this.#ending === undefined) {
      const ending = new Ended()
      this.#ending = ending
      this.#gone.addEventListener('abort', this.#leave)
      this.#timer = setTimeout(() => ending.abort(deadlinePassed()), this.#maxMs)
    }
    return this.#ending
  }

  stop(): void {
    clearTimeout(this.#timer)
    this.#gone.removeEventListener('abort', this.#leave)
  }
}

/** The request. Throws `invalid` when there is none. */
export function wellFormed<Request>(request: Request | Malformed): Request {
  if (!(request instanceof Malformed)) return request
  throw new ItemCacheError('invalid', 'the message could not be decoded', {
    reason: 'MALFORMED_MESSAGE',
    cause: request.cause,
  })
}

/** Counts, traces and logs one call. */
class Account {
  readonly trace: Trace | undefined
  readonly #frame: CallFrame
  readonly #rpc: RpcMetrics
  readonly #method: string
  readonly #startedMs: number
  readonly #isStream: boolean
  /** Of messages, the framing left out. */
  sentBytes = 0
  receivedBytes = 0

  constructor(frame: CallFrame, rpc: RpcMetrics, method: string, call: AnyCall, isStream = false) {
    this.trace = frame.tracing?.call(method, call)
    this.#isStream = isStream
    this.#frame = frame
    this.#rpc = rpc
    this.#method = method
    this.#startedMs = frame.now()
    rpc.started++
    frame.metrics.openCalls++
  }

  fail(context: CallContext | undefined, error: unknown) {
    const known = toItemCacheError(error, (reference, cause) => {
      const trace_id = context?.traceId
      this.#frame.log.error({ reference, method: this.#method, trace_id, err: cause }, 'internal error')
    })
    this.#frame.metrics.countFailure(known)
    const failure = toStatus(known, context?.cache)
    this.finish(context, failure.code, known)
    return failure
  }

  finish(context: CallContext | undefined, code: status, error?: ItemCacheError): void {
    context?.end()
    const durationMs = this.#frame.now() - this.#startedMs
    this.#rpc.finish(codeName(code), durationMs, this.sentBytes, this.receivedBytes)
    this.#frame.metrics.openCalls--
    this.#end(context, codeName(code), durationMs, error?.reason)
  }

  /** The span and the line of a call that is over. */
  #end(context: CallContext | undefined, code: string, durationMs: number, reason: string | undefined): void {
    const isHit =
      context?.tier === 'memory' && (context.outcome === 'HIT' || context.outcome === 'NEGATIVE_HIT')
    if (isHit && this.trace === undefined && !this.#frame.requests.wantsHit(durationMs)) return
    const { tenant, id, tier, outcome } = context ?? {}
    if (this.trace !== undefined) {
      this.trace.answered({ code, tenant, id, tier, outcome, reason })
      if (isHit && !this.#frame.requests.wantsHit(durationMs)) return
    }
    if (!this.#frame.requests.wants(code, durationMs, this.#isStream)) return
    const line = {
      method: this.#method,
      code,
      trace_id: context?.traceId ?? this.trace?.traceId,
      span_id: this.trace?.spanId,
      tenant,
      id,
      cache_hit: tier === undefined ? undefined : tier === 'memory' || tier === 'redis',
      tier,
      outcome,
      duration_ms: Math.round(durationMs * 1000) / 1000,
      reason,
    }
    this.#frame.requests.write(line, isHit, this.#isStream)
  }
}
