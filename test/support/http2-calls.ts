/** gRPC at the level of HTTP/2: callers who hardly read, never read, never finish, or are gone without a word. */
import {
  type ClientHttp2Session,
  type ClientHttp2Stream,
  connect,
  type OutgoingHttpHeaders,
} from 'node:http2'
import { create, type MessageInitShape, toBinary } from '@bufbuild/protobuf'
import { ItemCacheService } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { grpcMessage } from './http2-frames.ts'

const { method } = ItemCacheService

/** One HTTP/2 connection. Closing it is sudden. */
export class CallerConnection implements Disposable {
  readonly #session: ClientHttp2Session
  /** Resolves when the connection is gone, whoever ended it. */
  readonly closed: Promise<void>

  constructor(address: string) {
    this.#session = connect(`http://${address}`)
    const { promise, resolve } = Promise.withResolvers<void>()
    this.closed = promise
    this.#session.on('error', () => {})
    this.#session.on('close', resolve)
  }

  /** Opens a call and sends its request. Nothing of the answer is read until somebody reads the stream. */
  open<Name extends keyof typeof method>(
    name: Name,
    request: MessageInitShape<(typeof method)[Name]['input']>,
    tenant: string,
    headers: OutgoingHttpHeaders = {},
  ): ClientHttp2Stream {
    const stream = this.begin(name, tenant, headers)
    stream.end(
      grpcMessage(toBinary(method[name].input, create(method[name].input, request as never) as never)),
    )
    return stream
  }

  /** Opens a call and sends nothing of its request. */
  begin(name: keyof typeof method, tenant: string, headers: OutgoingHttpHeaders = {}): ClientHttp2Stream {
    const stream = this.#session.request(
      {
        ':method': 'POST',
        ':path': `/${ItemCacheService.typeName}/${method[name].name}`,
        'content-type': 'application/grpc',
        te: 'trailers',
        'x-tenant-id': tenant,
        ...headers,
      },
      { endStream: false },
    )
    stream.on('error', () => {})
    return stream
  }

  [Symbol.dispose](): void {
    this.#session.destroy()
  }
}
