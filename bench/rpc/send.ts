/** One unary call by HTTP/2 alone: the answer is not decoded. */
import type { ClientHttp2Session } from 'node:http2'
import { create, toBinary } from '@bufbuild/protobuf'
import {
  GetItemRequestSchema,
  ItemCacheService,
  UpdateItemRequestSchema,
} from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { framed } from './unary.ts'

/** Whether the call succeeded. `title`: what UpdateItem writes. */
export function sendItemCall(
  session: ClientHttp2Session,
  method: 'GetItem' | 'UpdateItem',
  { id, title = '' }: { readonly id: string; readonly title?: string },
): Promise<boolean> {
  const message =
    method === 'GetItem'
      ? toBinary(GetItemRequestSchema, create(GetItemRequestSchema, { id }))
      : toBinary(
          UpdateItemRequestSchema,
          create(UpdateItemRequestSchema, { item: { id, title }, updateMask: { paths: ['title'] } }),
        )
  const { promise, resolve } = Promise.withResolvers<boolean>()
  const stream = session.request({
    ':method': 'POST',
    ':path': `/${ItemCacheService.typeName}/${method}`,
    'content-type': 'application/grpc',
    te: 'trailers',
  })
  let status: unknown
  // A call that fails at once has no trailers: its status is among its headers.
  stream.on('response', (headers) => {
    status = headers['grpc-status']
  })
  stream.on('trailers', (trailers) => {
    status = trailers['grpc-status']
  })
  stream.on('error', () => {})
  stream.on('close', () => resolve(status === '0'))
  stream.resume()
  stream.end(framed(message))
  return promise
}
