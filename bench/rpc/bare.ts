/**
 * What gRPC itself costs: a grpc-js server without options whose handlers answer the same bytes every time, and whose
 * (de)serialisers pass bytes on as they are. A process of its own; the end of this file says what it can be asked.
 */
import { Server, ServerCredentials, type ServerWritableStream } from '@grpc/grpc-js'
import { ItemCacheService } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { answer } from '../control.ts'

let reply = Buffer.alloc(0)
const streams = new Set<ServerWritableStream<Buffer, Buffer>>()
const identity = (bytes: Buffer) => bytes
const method = (path: string, responseStream: boolean) => ({
  path,
  requestStream: false,
  responseStream,
  requestSerialize: identity,
  requestDeserialize: identity,
  responseSerialize: identity,
  responseDeserialize: identity,
})

const server = new Server()
server.addService(
  {
    unary: method(`/${ItemCacheService.typeName}/GetItem`, false),
    stream: method('/bare.Bare/Stream', true),
  },
  {
    unary: (_call: unknown, callback: (error: null, bytes: Buffer) => void) => callback(null, reply),
    stream: (call: ServerWritableStream<Buffer, Buffer>) => {
      streams.add(call)
      call.on('cancelled', () => streams.delete(call))
    },
  },
)

answer({
  listen: (bytes: Uint8Array) => {
    reply = Buffer.from(bytes)
    const { promise, resolve, reject } = Promise.withResolvers<string>()
    server.bindAsync('127.0.0.1:0', ServerCredentials.createInsecure(), (error, port) =>
      error === null ? resolve(`127.0.0.1:${port}`) : reject(error),
    )
    return promise
  },
  streams: () => streams.size,
  deliver: (bytes: Uint8Array) => {
    const message = Buffer.from(bytes)
    for (const stream of streams) stream.write(message)
  },
})
