/**
 * What is told to the native half of an HTTP/2 stream, past the stream's queue.
 *
 * Trailers: nghttp2 asks for them when it takes the end of the message, and wants them then. Node tells us that, but passes on what we
 * answer from an immediate, when the message has left, so that a call that is alone costs a second system call.
 *
 * Messages: what a stream of Node's does to keep its queue and its timers is a sixth of what a delivery to a watcher costs.
 *
 * How Node does both is seen when it first does. A Node that does it differently goes on as it does.
 *
 * https://nghttp2.org/documentation/types.html#c.nghttp2_data_source_read_callback2
 */
import { constants, type ServerHttp2Stream } from 'node:http2'
import { constants as system } from 'node:os'
import { getSystemErrorName } from 'node:util'

const OK_TRAILERS = { 'grpc-status': '0' }

/** What is used of the native half of a stream, which has it until it is destroyed. */
interface Handle {
  /** Takes headers in a form of Node's own. Negative: they were not taken. */
  trailers: (list: unknown) => number
  /** Without a request it makes one, and a number when it is over at once: 0, or a negative one of an error. Of a stream that is gone: nothing. */
  writeBuffer: (request: null, bytes: Buffer) => number | WriteRequest | undefined
}

/** What is under way to the socket. */
interface WriteRequest {
  /** Kept from being collected until it has left. */
  buffer?: Buffer
  callback?: Left
  /** Called when it has left, or will not: then `status` is negative. Never, when the stream had been shut before. */
  oncomplete?: (this: WriteRequest, status: number) => void
  /** Null: it has not completed yet. */
  readonly writeStatus: number | null
}

const GONE = -system.errno.ECANCELED

type Left = (error?: Error | null) => void

let handleKey: symbol | undefined
/** What Node tells a handle of our trailers. */
let okList: unknown
/** Whether Node writes to a handle without a request; `undefined`: it has not been seen yet. */
let makesRequests: boolean | undefined

/** A listener for `wantTrailers`. */
export function sendOkTrailers(this: ServerHttp2Stream): void {
  const handle = handleOf(this)
  if (okList !== undefined && handle !== undefined) {
    if (handle.trailers(okList) < 0) this.close(constants.NGHTTP2_INTERNAL_ERROR)
    return
  }
  if (typeof handle?.trailers === 'function') observeTrailers(handle)
  this.sendTrailers(OK_TRAILERS)
}

/**
 * Writes to a stream that has nothing in its queue, and has neither ended nor been closed; false: not in this way. `left` is called when
 * the socket has taken all of it, or will not; without `left` nobody hears of that.
 */
export function writePastQueue(stream: ServerHttp2Stream, bytes: Buffer, left?: Left): boolean {
  const handle = handleOf(stream)
  if (handle === undefined) return false
  if (makesRequests === undefined && typeof handle.writeBuffer === 'function') observeWrite(handle)
  if (makesRequests !== true) return false
  const request = handle.writeBuffer(null, bytes)
  if (typeof request !== 'object') {
    left?.(failure(request ?? GONE))
    return true
  }
  request.buffer = bytes
  if (left === undefined) return true
  if (request.writeStatus === null) {
    request.callback = left
    request.oncomplete = tell
  } else left(failure(request.writeStatus))
  return true
}

function tell(this: WriteRequest, status: number): void {
  this.callback?.(failure(status))
}

const failure = (status: number) => (status < 0 ? new Error(`write: ${getSystemErrorName(status)}`) : null)

function handleOf(stream: ServerHttp2Stream): Handle | undefined {
  handleKey ??= Object.getOwnPropertySymbols(stream).find(({ description }) => description === 'kHandle')
  return handleKey && (stream as unknown as Record<symbol, Handle>)[handleKey]
}

function observeTrailers(handle: Handle): void {
  const { trailers } = handle
  handle.trailers = (list) => {
    okList = list
    return trailers.call(handle, list)
  }
}

function observeWrite(handle: Handle): void {
  const { writeBuffer } = handle
  handle.writeBuffer = (...args) => {
    handle.writeBuffer = writeBuffer
    const request = writeBuffer.apply(handle, args)
    makesRequests =
      args.length === 2 && args[0] === null && typeof request === 'object' && request.writeStatus === null
    return request
  }
}
