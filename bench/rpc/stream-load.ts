/**
 * Look-ups on StreamItems streams, by HTTP/2 alone: each stream, on a connection of its own, keeps a window of look-ups under
 * way. Messages are counted, not decoded; the last one is, so that a service that answers errors is found out.
 */
import { connect } from 'node:http2'
import { create, fromBinary, toBinary } from '@bufbuild/protobuf'
import {
  ItemCacheService,
  StreamItemsRequestSchema,
  StreamItemsResponseSchema,
} from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { answer } from '../control.ts'
import { idOf } from './hot.ts'
import { framed } from './unary.ts'

export interface Pipeline {
  readonly address: string
  readonly streams: number
  /** Look-ups under way on each stream. */
  readonly window: number
  /** On all streams together: a multiple of their number. */
  readonly lookups: number
  /** How many ids are asked for, in turn. */
  readonly ids: number
}

answer({
  async run(pipeline: Pipeline) {
    const requests = Array.from({ length: pipeline.ids }, (_, n) =>
      framed(
        toBinary(
          StreamItemsRequestSchema,
          create(StreamItemsRequestSchema, { correlationId: BigInt(n), id: idOf(n) }),
        ),
      ),
    )
    await Promise.all(Array.from({ length: pipeline.streams }, () => runStream(pipeline, requests)))
  },
})

async function runStream({ address, streams, window, lookups }: Pipeline, requests: readonly Buffer[]) {
  const amount = lookups / streams
  const session = connect(`http://${address}`, { settings: { initialWindowSize: 1 << 20 } })
  const stream = session.request({
    ':method': 'POST',
    ':path': `/${ItemCacheService.typeName}/StreamItems`,
    'content-type': 'application/grpc',
    te: 'trailers',
  })
  const { promise, resolve, reject } = Promise.withResolvers<void>()
  session.on('error', reject)
  stream.on('error', reject)
  stream.on('trailers', ({ 'grpc-status': status }) => {
    if (received === amount && status === '0') resolve()
    else reject(new Error(`the stream ended with ${status} after ${received} of ${amount} look-ups`))
  })
  let [sent, received] = [0, 0]
  const send = (count: number) => {
    const messages: Buffer[] = []
    for (; count > 0 && sent < amount; count--) messages.push(requests[sent++ % requests.length] as Buffer)
    if (messages.length > 0) stream.write(Buffer.concat(messages))
    if (sent === amount) stream.end()
  }
  let rest: Buffer = Buffer.alloc(0)
  stream.on('data', (chunk: Buffer) => {
    const bytes = rest.byteLength === 0 ? chunk : Buffer.concat([rest, chunk])
    let [at, count] = [0, 0]
    while (bytes.byteLength - at >= 5 && bytes.byteLength - at >= 5 + bytes.readUInt32BE(at + 1)) {
      const end = at + 5 + bytes.readUInt32BE(at + 1)
      count++
      if (++received === amount) {
        const { result } = fromBinary(StreamItemsResponseSchema, bytes.subarray(at + 5, end))
        if (result.case !== 'item') reject(new Error(`a look-up was answered with ${result.case}`))
      }
      at = end
    }
    rest = bytes.subarray(at)
    if (sent < amount) send(count)
  })
  send(window)
  await promise
  session.close()
}
