/** Server streams as HTTP/2 shows them: what a gRPC client hides of how they begin, wait and end. */
import { once } from 'node:events'
import { type ClientHttp2Session, type ClientHttp2Stream, connect } from 'node:http2'
import { gzipSync } from 'node:zlib'
import { create, fromBinary, toBinary } from '@bufbuild/protobuf'
import { status } from '@grpc/grpc-js'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { ErrorInfoSchema } from '../../src/gen/google/rpc/error_details_pb.ts'
import { StatusSchema } from '../../src/gen/google/rpc/status_pb.ts'
import {
  WatchInvalidationsRequestSchema,
  WatchInvalidationsResponseSchema,
} from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { grpcMessage } from '../support/http2-frames.ts'
import { startService, type TestService } from '../support/service.ts'

const METHOD = 'itemcache.v1.ItemCacheService/WatchInvalidations'
const REQUEST = toBinary(
  WatchInvalidationsRequestSchema,
  create(WatchInvalidationsRequestSchema, { heartbeatInterval: { seconds: 60n } }),
)

let service: TestService
beforeAll(async () => {
  service = await startService()
})
afterAll(() => service?.[Symbol.asyncDispose]())

/** What has come of a stream. */
class Heard {
  readonly stream: ClientHttp2Stream
  /** Of the headers, when they are all that comes, or of the trailers. */
  status: number | undefined
  reason: string | undefined
  headers = 0
  readonly #chunks: Buffer[] = []

  constructor(stream: ClientHttp2Stream) {
    this.stream = stream
    const look = (headers: NodeJS.Dict<string | string[]>) => {
      this.headers++
      if (headers['grpc-status'] === undefined) return
      this.status = Number(headers['grpc-status'])
      const { details } = fromBinary(
        StatusSchema,
        Buffer.from(String(headers['grpc-status-details-bin']), 'base64'),
      )
      this.reason = fromBinary(ErrorInfoSchema, details[0]?.value ?? new Uint8Array()).reason
    }
    stream.on('response', look as never).on('trailers', look as never)
    stream.on('data', (chunk: Buffer) => this.#chunks.push(chunk))
    stream.on('error', () => {})
  }

  /** The kinds of messages so far. */
  get kinds() {
    return [...this.#messages()].map(({ event }) => event.case)
  }

  /** Of the events in them. */
  get revisions() {
    return [...this.#messages()].flatMap(({ event }) =>
      event.case === 'batch' ? event.value.events.map(({ revision }) => revision) : [],
    )
  }

  *#messages() {
    let rest = Buffer.concat(this.#chunks)
    while (rest.length >= 5 && rest.length >= 5 + rest.readUInt32BE(1)) {
      const end = 5 + rest.readUInt32BE(1)
      yield fromBinary(WatchInvalidationsResponseSchema, rest.subarray(5, end))
      rest = rest.subarray(end)
    }
  }
}

function open(
  session: ClientHttp2Session,
  headers: Readonly<Record<string, string>> = {},
  body: Uint8Array = grpcMessage(REQUEST),
): Heard {
  session.on('error', () => {})
  const stream = session.request({
    ':method': 'POST',
    ':path': `/${METHOD}`,
    'content-type': 'application/grpc',
    te: 'trailers',
    ...headers,
  })
  stream.end(body)
  return new Heard(stream)
}

const ended = (code: 'CANCELLED' | 'DEADLINE_EXCEEDED') =>
  service.app.metrics.rpc(METHOD).byStatus.get(code)?.latency.count ?? 0
const PATIENT = { timeout: 20_000 }

test('a stream ends at its deadline, and says why after what it has said before', async () => {
  const session = connect(`http://${service.address}`)
  const before = ended('DEADLINE_EXCEEDED')
  const heard = open(session, { 'grpc-timeout': '2S' })
  await once(heard.stream, 'close')
  expect(heard).toMatchObject({ status: status.DEADLINE_EXCEEDED, reason: 'TIMEOUT' })
  // A machine on which it takes two seconds to begin sends nothing but the status.
  expect(heard.kinds).toEqual(heard.headers === 2 ? ['started'] : [])
  expect(ended('DEADLINE_EXCEEDED')).toBe(before + 1)
  expect(service.app.metrics.subscribers).toBe(0)
  session.close()
})

test('a stream whose reader takes nothing is over for the server at its deadline; a reader who wakes up is told', async () => {
  const session = connect(`http://${service.address}`, { settings: { initialWindowSize: 0 } })
  const before = ended('DEADLINE_EXCEEDED')
  const heard = open(session, { 'grpc-timeout': '1S' })
  await expect.poll(() => ended('DEADLINE_EXCEEDED'), PATIENT).toBe(before + 1)
  expect(service.app.metrics.subscribers).toBe(0)
  expect(heard.kinds).toEqual([])
  session.settings({ initialWindowSize: 65_535 })
  await once(heard.stream, 'close')
  expect(heard.status).toBe(status.DEADLINE_EXCEEDED)
  session.close()
})

test('a stream whose reader takes nothing, and leaves, leaves nothing behind', async () => {
  const session = connect(`http://${service.address}`, { settings: { initialWindowSize: 0 } })
  const before = ended('CANCELLED')
  const { stream } = open(session)
  await expect.poll(() => service.app.metrics.subscribers, PATIENT).toBe(1)
  for (let n = 0; n < 3; n++) {
    await service.client.call('updateItem', { item: { id: 'x', title: `${n}` }, allowMissing: true })
  }
  stream.close()
  await expect.poll(() => ended('CANCELLED'), PATIENT).toBe(before + 1)
  expect(service.app.metrics).toMatchObject({ subscribers: 0, openCalls: 0 })
  session.close()
})

test('a reader who stands still gets every revision once and in order when it goes on', async () => {
  const session = connect(`http://${service.address}`, { settings: { initialWindowSize: 0 } })
  const other = connect(`http://${service.address}`)
  const [heard, reading] = [open(session), open(other)]
  await expect.poll(() => service.app.metrics.subscribers, PATIENT).toBe(2)
  for (let n = 0; n < 10; n++) {
    await service.client.call('updateItem', { item: { id: 'x', title: `${n}` }, allowMissing: true })
  }
  await expect.poll(() => reading.revisions, PATIENT).toHaveLength(10)
  expect(heard.kinds).toEqual([])
  session.settings({ initialWindowSize: 65_535 })
  await expect.poll(() => heard.revisions, PATIENT).toEqual(reading.revisions)
  expect(new Set(heard.revisions).size).toBe(10)
  for (const { stream } of [heard, reading]) stream.close()
  await expect.poll(() => service.app.metrics.subscribers, PATIENT).toBe(0)
  for (const each of [session, other]) each.close()
})

test('a stream may ask with a compressed message', async () => {
  const session = connect(`http://${service.address}`)
  const packed = grpcMessage(gzipSync(REQUEST))
  packed[0] = 1
  const heard = open(session, { 'grpc-encoding': 'gzip' }, packed)
  await expect.poll(() => heard.kinds, PATIENT).toEqual(['started'])
  heard.stream.close()
  await expect.poll(() => service.app.metrics.subscribers, PATIENT).toBe(0)
  session.close()
})

test('a stream asks with exactly one message', async () => {
  const session = connect(`http://${service.address}`)
  for (const body of [new Uint8Array(), Buffer.concat([grpcMessage(REQUEST), grpcMessage(REQUEST)])]) {
    const heard = open(session, {}, body)
    await once(heard.stream, 'close')
    expect(heard).toMatchObject({ status: status.UNIMPLEMENTED, reason: 'NOT_ONE_MESSAGE', kinds: [] })
  }
  session.close()
})
