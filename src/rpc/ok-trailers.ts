/**
 * The trailers of a call that succeeded, in the same system call as the end of its message. nghttp2 asks for trailers when it takes the
 * end of the message, and wants them then. Node tells us that, but passes on what we answer from an immediate, when the message
 * has left, so that a call that is alone costs a second system call. So it is the stream's handle that is told.
 *
 * https://nghttp2.org/documentation/types.html#c.nghttp2_data_source_read_callback2
 */
import { constants, type ServerHttp2Stream } from 'node:http2'

const OK_TRAILERS = { 'grpc-status': '0' }

/** What is used of the native half of a stream. */
interface Handle {
  /** Takes headers in a form of Node's own. Negative: they were not taken. */
  trailers: (list: unknown) => number
}

let handleKey: symbol | undefined
/** What Node tells a handle of our trailers: it is seen when Node first does. A Node that has no such handle goes on as it does. */
let okList: unknown

/** A listener for `wantTrailers`. */
export function sendOkTrailers(this: ServerHttp2Stream): void {
  const handle = handleOf(this)
  if (okList !== undefined && handle !== undefined) {
    if (handle.trailers(okList) < 0) this.close(constants.NGHTTP2_INTERNAL_ERROR)
    return
  }
  if (typeof handle?.trailers === 'function') observe(handle)
  this.sendTrailers(OK_TRAILERS)
}

function handleOf(stream: ServerHttp2Stream): Handle | undefined {
  handleKey ??= Object.getOwnPropertySymbols(stream).find(({ description }) => description === 'kHandle')
  return handleKey && (stream as unknown as Record<symbol, Handle>)[handleKey]
}

function observe(handle: Handle): void {
  const { trailers } = handle
  handle.trailers = (list) => {
    okList = list
    return trailers.call(handle, list)
  }
}
