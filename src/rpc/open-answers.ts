/** Unary calls whose answers have not left yet: what a server that drains must not cut off. */
import type { Http2Server, IncomingHttpHeaders, ServerHttp2Stream } from 'node:http2'
import type { Server } from '@grpc/grpc-js'
import type { Metrics } from '../observe/metrics.ts'

/**
 * Counts the open HTTP/2 streams of these paths from now on; call it before the server is bound. A handler that has
 * answered says nothing of whether the caller, who may be slow, has all of the answer: its stream does. grpc-js keeps its
 * HTTP/2 servers to itself, hence the detour.
 */
export function countOpenAnswers(server: Server, paths: ReadonlySet<string>, metrics: Metrics): void {
  const grpc = server as unknown as { createHttp2Server: (...args: unknown[]) => Http2Server }
  const create = grpc.createHttp2Server.bind(server)
  const closed = () => {
    metrics.openAnswers--
  }
  const count = (stream: ServerHttp2Stream, { ':path': path = '' }: IncomingHttpHeaders) => {
    if (!paths.has(path)) return
    metrics.openAnswers++
    stream.once('close', closed)
  }
  grpc.createHttp2Server = (...args) => create(...args).prependListener('stream', count)
}
