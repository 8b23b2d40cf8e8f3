/**
 * Hostile callers, over real HTTP/2 and with frames made by hand, against the service as a process of its own. Whatever
 * they send, the process lives, a well-behaved client who reads all the time notices nothing, and the offender gets the
 * answer of docs/security.md or is cut off. Bad fields of well-formed calls are in errors.test.ts, credentials in
 * auth.test.ts, page tokens in lists.test.ts.
 */
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { type ClientHttp2Session, type ClientHttp2Stream, connect } from 'node:http2'
import { setTimeout as sleep } from 'node:timers/promises'
import { gzipSync } from 'node:zlib'
import { create, fromBinary, toBinary } from '@bufbuild/protobuf'
import { anyUnpack } from '@bufbuild/protobuf/wkt'
import { status } from '@grpc/grpc-js'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { startCatalogue } from '../../src/embedded/catalogue.ts'
import { ErrorInfoSchema } from '../../src/gen/google/rpc/error_details_pb.ts'
import { StatusSchema } from '../../src/gen/google/rpc/status_pb.ts'
import {
  BatchGetItemsRequestSchema,
  GetItemRequestSchema,
  StreamItemsRequestSchema,
} from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { type Bystander, startBystander } from '../support/bystander.ts'
import {
  FLAG,
  FRAME,
  frame,
  grpcMessage,
  hpack,
  NOTHING,
  PREFACE,
  RawConnection,
  requestFields,
  settings,
} from '../support/http2-frames.ts'
import { type ServiceProcess, startProcess } from '../support/process.ts'
import { freshDatabase, redisUrl } from '../support/servers.ts'
import { startService, type TestService } from '../support/service.ts'

const PATIENCE = { timeout: 40_000, interval: 20 }
/** Most calls at once on a connection, as the service is started here. */
const MAX_STREAMS = 1000
/** Of an instance that does not wait for long. */
const HASTY = {
  ITEMCACHE_MAX_DEADLINE: '2s',
  ITEMCACHE_POSTGRES_CONNECT_TIMEOUT: '1900ms',
  ITEMCACHE_POSTGRES_STATEMENT_TIMEOUT: '1900ms',
  ITEMCACHE_ORIGIN_TIMEOUT: '1900ms',
}

const started = new AsyncDisposableStack()
const log: string[] = []
let service: ServiceProcess
let hasty: ServiceProcess
let catalogue: Awaited<ReturnType<typeof startCatalogue>>
let bystander: Bystander

beforeAll(async () => {
  const database = started.use(await freshDatabase())
  // Item 9 never comes.
  catalogue = started.use(await startCatalogue({ intercept: ({ url }) => url === '/products/9' }))
  service = started.use(
    await startProcess(
      {
        DATABASE_URL: database.url,
        REDIS_URL: redisUrl(),
        ORIGIN_URL: catalogue.url,
        ITEMCACHE_LOG_LEVEL: 'debug',
      },
      { log },
    ),
  )
  const other = started.use(await freshDatabase())
  hasty = started.use(
    await startProcess({
      DATABASE_URL: other.url,
      REDIS_URL: redisUrl(),
      ORIGIN_URL: catalogue.url,
      ...HASTY,
    }),
  )
  bystander = started.use(await startBystander(service.address))
})
afterAll(() => started.disposeAsync())

/** After whatever was done to it, the service goes on for others. */
async function unharmed(): Promise<void> {
  const { reads } = bystander
  await expect.poll(() => bystander.reads, PATIENCE).toBeGreaterThan(reads)
  expect(bystander.errors.splice(0)).toEqual([])
  expect(service.running).toBe(true)
}

/** A test that ends with a look at the others. */
const attack = (title: string, run: () => Promise<void>, timeout = 120_000) =>
  test(title, { timeout }, async () => {
    await run()
    await unharmed()
  })

const getItem = (id: string) => toBinary(GetItemRequestSchema, create(GetItemRequestSchema, { id }))
const one = grpcMessage(getItem('1'))
const path = (method: string) => (method.includes('/') ? method : `/itemcache.v1.ItemCacheService/${method}`)

/** HEADERS that are whole. */
const headers = (
  stream: number,
  fields: Iterable<readonly [string, string | Uint8Array]>,
  flags: number = FLAG.endHeaders,
) => frame(FRAME.headers, flags, stream, hpack(fields))

/** The request of a health check, of a service that nobody has. */
const NOBODY = grpcMessage(Buffer.of(0x0a, 0x01, 0x78))
const streamsOf = ({ app }: TestService) => app.metrics.held()['streams']

const reset = (stream: number) => frame(FRAME.resetStream, 0, stream, Buffer.of(0, 0, 0, 8))
const data = (stream: number, bytes: Uint8Array, flags: number = FLAG.endStream) =>
  frame(FRAME.data, flags, stream, bytes)
const u32 = (value: number) => {
  const bytes = Buffer.alloc(4)
  bytes.writeUInt32BE(value)
  return bytes
}

const cutOff = (connection: RawConnection) =>
  expect.poll(() => connection.closed || connection.got(FRAME.goAway).length > 0, PATIENCE).toBe(true)

/** How a call ended. */
interface Outcome {
  readonly http: number | undefined
  /** The gRPC status; `undefined` when there is none: the stream was reset, or it is no answer of gRPC. */
  readonly code: number | undefined
  readonly reason: string | undefined
  readonly message: string | undefined
}

const CALL = {
  ':method': 'POST',
  ':path': path('GetItem'),
  'content-type': 'application/grpc',
  te: 'trailers',
}

function open(session: ClientHttp2Session, more: Readonly<Record<string, string>> = {}): ClientHttp2Stream {
  const stream = session.request({ ...CALL, ...more })
  stream.on('error', () => {})
  stream.resume()
  return stream
}

async function outcomeOf(stream: ClientHttp2Stream): Promise<Outcome> {
  const fields: Record<string, unknown> = {}
  stream.on('response', (answer) => Object.assign(fields, answer))
  stream.on('trailers', (answer) => Object.assign(fields, answer))
  await new Promise((closed) => stream.once('close', closed))
  const code = fields['grpc-status']
  const details = fields['grpc-status-details-bin']
  const info =
    details === undefined
      ? undefined
      : fromBinary(StatusSchema, Buffer.from(String(details), 'base64'))
          .details.map((any) => anyUnpack(any, ErrorInfoSchema))
          .find(Boolean)
  return {
    http: fields[':status'] as number | undefined,
    code: code === undefined ? undefined : Number(code),
    reason: info?.reason,
    message: fields['grpc-message'] as string | undefined,
  }
}

async function withSession<T>(
  use: (session: ClientHttp2Session) => Promise<T>,
  address = service.address,
): Promise<T> {
  // Node's own client would give up at 10 MB.
  const session = connect(`http://${address}`, { maxSessionMemory: 1000 })
  session.on('error', () => {})
  try {
    return await use(session)
  } finally {
    session.destroy()
  }
}

const answerTo = (
  body: Uint8Array,
  more: Readonly<Record<string, string>> = {},
  address = service.address,
): Promise<Outcome> =>
  withSession((session) => {
    const stream = open(session, more)
    stream.end(body)
    return outcomeOf(stream)
  }, address)

describe('what is not HTTP/2 is cut off', () => {
  test.each<[string, Buffer]>([
    ['an HTTP/1.1 request', Buffer.from('GET / HTTP/1.1\r\nHost: localhost\r\n\r\n')],
    [
      'an HTTP/1.1 upgrade',
      Buffer.from('GET / HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n'),
    ],
    ['a TLS handshake', Buffer.from(`16030100c8010000c40303${'5a'.repeat(192)}`, 'hex')],
    ['a preface that goes wrong', Buffer.concat([PREFACE.subarray(0, 20), Buffer.alloc(64, 0x41)])],
    ['random bytes', Buffer.from(Array.from({ length: 4096 }, (_, i) => (i * 7919 + 13) % 251))],
    ['random bytes behind the preface', Buffer.concat([PREFACE, Buffer.alloc(4096, 0xff)])],
  ])('%s', async (_, bytes) => {
    using connection = await RawConnection.open(service.address)
    connection.send(bytes)
    await cutOff(connection)
    await unharmed()
  })
})

describe('frames that break the protocol end the stream or the connection', () => {
  test.each<[string, (connection: RawConnection) => void]>([
    ['a frame above the size limit', (c) => c.send(data(1, NOTHING), Buffer.alloc(100_000))],
    ['DATA on stream 0', (c) => c.send(data(0, one))],
    ['DATA on a stream that is not open', (c) => c.send(data(7, one))],
    ['HEADERS on a stream of the server', (c) => c.send(headers(2, requestFields('GetItem')))],
    [
      'a header block that is no HPACK',
      (c) => c.send(frame(FRAME.headers, FLAG.endHeaders, 1, Buffer.alloc(64, 0xff))),
    ],
    [
      'an index beyond the table',
      (c) => c.send(frame(FRAME.headers, FLAG.endHeaders, 1, Buffer.of(0xff, 0xff, 0x7f))),
    ],
    ['SETTINGS of five bytes', (c) => c.send(frame(FRAME.settings, 0, 0, Buffer.alloc(5)))],
    ['a window above 2^31', (c) => c.send(settings({ 4: 0xffff_ffff }))],
    ['a window that grows beyond 2^31', (c) => c.send(frame(FRAME.windowUpdate, 0, 0, u32(0x7fff_ffff)))],
    ['a window that grows by nothing', (c) => c.send(frame(FRAME.windowUpdate, 0, 0, u32(0)))],
    ['a pushed stream', (c) => c.send(frame(FRAME.pushPromise, FLAG.endHeaders, 1, u32(2)))],
    ['CONTINUATION of nothing', (c) => c.send(frame(FRAME.continuation, FLAG.endHeaders, 1, NOTHING))],
    ['DATA in the middle of headers', (c) => c.send(headers(1, requestFields('GetItem'), 0), data(1, one))],
    [
      'padding longer than its frame',
      (c) => c.send(headers(1, requestFields('GetItem')), data(1, Buffer.of(200, 1), FLAG.padded)),
    ],
    ['PING of seven bytes', (c) => c.send(frame(FRAME.ping, 0, 0, Buffer.alloc(7)))],
  ])('%s', async (_, send) => {
    using connection = await RawConnection.greet(service.address)
    send(connection)
    await expect
      .poll(
        () =>
          connection.closed ||
          connection.got(FRAME.goAway).length + connection.got(FRAME.resetStream).length > 0,
        PATIENCE,
      )
      .toBe(true)
    await unharmed()
  })

  test.each<[string, [string, string | Uint8Array][]]>([
    ['no path', requestFields('GetItem').filter(([name]) => name !== ':path')],
    ['two paths', [[':path', '/x'], ...requestFields('GetItem')]],
    ['a name in capitals', [...requestFields('GetItem'), ['X-Upper', 'v']]],
    ['a header of HTTP/1.1', [...requestFields('GetItem'), ['connection', 'upgrade']]],
    ['a pseudo-header at the end', [...requestFields('GetItem'), [':late', 'x']]],
    [
      '300 headers',
      [
        ...requestFields('GetItem'),
        ...Array.from({ length: 300 }, (_, i) => [`x-${i}`, 'v'] as [string, string]),
      ],
    ],
  ])('headers with %s', async (_, fields) => {
    using connection = await RawConnection.greet(service.address)
    connection.send(headers(1, fields), data(1, one))
    await expect.poll(() => connection.refused(1), PATIENCE).toBe(true)
    expect(connection.got(FRAME.data)).toEqual([])
    await unharmed()
  })
})

attack('line breaks and NULs in headers are dropped with the header', async () => {
  using connection = await RawConnection.greet(service.address)
  const forged = [
    ['x-forged', 'a\r\n{"level":"fatal"}'],
    ['x-nul', 'a\0b'],
    ['x-tenant-id', 'a\nb'],
  ] as const
  connection.send(headers(1, [...requestFields('GetItem'), ...forged]), data(1, one))
  await expect.poll(() => connection.got(FRAME.data, 1).length, PATIENCE).toBe(1)
})

describe('floods are cut off', () => {
  attack('of CONTINUATION frames', async () => {
    using connection = await RawConnection.greet(service.address)
    await connection.sendOn(headers(1, requestFields('GetItem'), 0))
    for (let i = 0; i < 5000 && !connection.refused(1); i++) {
      await connection.sendOn(frame(FRAME.continuation, 0, 1, hpack([[`x-${i}`, 'v'.repeat(100)]])))
    }
    await cutOff(connection)
  })

  attack('of 70 KB in one header', async () => {
    using connection = await RawConnection.greet(service.address)
    const block = hpack([...requestFields('GetItem'), ['x-large', 'v'.repeat(70_000)]])
    for (let at = 0; at < block.length; at += 16_384) {
      const part = block.subarray(at, at + 16_384)
      const flags = at + 16_384 >= block.length ? FLAG.endHeaders : 0
      connection.send(frame(at === 0 ? FRAME.headers : FRAME.continuation, flags, 1, part))
    }
    connection.send(data(1, one))
    await expect.poll(() => connection.refused(1), PATIENCE).toBe(true)
  })

  attack('of one long header that is repeated by its index (HPACK bomb)', async () => {
    using connection = await RawConnection.greet(service.address)
    const long = hpack([['x-bomb', 'v'.repeat(3900)]])
    // Taken into the dynamic table (RFC 7541, 6.2.1) it is entry 62.
    long[0] = 0x40
    const block = Buffer.concat([hpack(requestFields('GetItem')), long, Buffer.alloc(10_000, 0x80 + 62)])
    connection.send(frame(FRAME.headers, FLAG.endHeaders, 1, block), data(1, one))
    await expect.poll(() => connection.refused(1), PATIENCE).toBe(true)
  })

  attack('of calls that are reset as soon as they are made', async () => {
    using connection = await RawConnection.greet(service.address)
    // A thousand at once is what the service bears.
    for (let id = 1; id < 8000; id += 2) {
      await connection.sendOn(headers(id, requestFields('GetItem')), data(id, one), reset(id))
    }
    await cutOff(connection)
  })

  test.each<[string, Buffer, boolean]>([
    ['PING frames', frame(FRAME.ping, 0, 0, Buffer.alloc(8)), true],
    ['SETTINGS frames', settings({ 4: 65_535 }), true],
    ['PING frames whose answers are not read', frame(FRAME.ping, 0, 0, Buffer.alloc(8)), false],
    ['SETTINGS frames whose answers are not read', settings({ 4: 65_535 }), false],
  ])('of %s', { timeout: 120_000 }, async (_, frame, reads) => {
    using connection = await RawConnection.greet(service.address)
    if (!reads) connection.socket.pause()
    const many = Buffer.concat(Array(5000).fill(frame))
    for (let i = 0; i < 400 && !connection.closed; i++) {
      // A socket that nobody reads does not tell that it was closed, but takes nothing more.
      await Promise.race([connection.sendOn(many), sleep(1000)])
      connection.frames.length = 0
      if (!reads && !connection.socket.writable) break
    }
    if (!reads) connection.socket.resume()
    await expect.poll(() => connection.closed, PATIENCE).toBe(true)
    await unharmed()
  })

  test.each<[string, Buffer]>([
    ['empty DATA frames', data(1, NOTHING, 0)],
    ['WINDOW_UPDATE frames', frame(FRAME.windowUpdate, 0, 1, u32(1))],
    ['PRIORITY frames', frame(FRAME.priority, 0, 1, Buffer.alloc(5))],
    ['frames of an unknown type', frame(0xfa, 0, 1, Buffer.alloc(8))],
  ])('of %s, or borne', { timeout: 120_000 }, async (_, frame) => {
    using connection = await RawConnection.greet(service.address)
    connection.send(headers(1, requestFields('GetItem')))
    const many = Buffer.concat(Array(1000).fill(frame))
    for (let i = 0; i < 50 && !connection.closed; i++) await connection.sendOn(many)
    await unharmed()
  })

  attack('but not the pings of a client that measures its bandwidth', async () => {
    using connection = await RawConnection.greet(service.address)
    const pings = Buffer.concat(Array(500).fill(frame(FRAME.ping, 0, 0, Buffer.alloc(8))))
    const answered = () => connection.frames.filter(({ type }) => type === FRAME.ping).length
    for (let sent = 500; sent <= 50_000; sent += 500) {
      connection.send(pings)
      await expect.poll(answered, { ...PATIENCE, interval: 1 }).toBe(sent)
    }
    expect(connection.refused(1)).toBe(false)
  })
})

describe('what takes long', () => {
  attack(
    'a body that never ends, without a deadline, is DEADLINE_EXCEEDED at the server’s maximum',
    async () => {
      const outcomes = await withSession(
        (session) =>
          Promise.all(
            [
              'GetItem',
              'BatchGetItems',
              'ListItems',
              'WatchInvalidations',
              '/grpc.health.v1.Health/Check',
            ].map(async (method) => {
              const stream = open(session, { ':path': path(method) })
              stream.write(grpcMessage(NOTHING, { length: 100_000 }))
              const dribble = setInterval(() => stream.writable && stream.write('a'), 100)
              const outcome = await outcomeOf(stream)
              clearInterval(dribble)
              return outcome
            }),
          ),
        hasty.address,
      )
      for (const outcome of outcomes) {
        expect(outcome).toMatchObject({ code: status.DEADLINE_EXCEEDED, reason: 'REQUEST_INCOMPLETE' })
      }
    },
  )

  attack('so is a call whose message is whole, but which is not ended', async () => {
    const outcome = await withSession((session) => {
      const stream = open(session)
      stream.write(one)
      return outcomeOf(stream)
    }, hasty.address)
    expect(outcome).toMatchObject({ code: status.DEADLINE_EXCEEDED })
  })

  attack('an answer that is never taken (window 0) is dropped, and the stream reset', async () => {
    const title = 'x'.repeat(100_000)
    for (const id of ['big-1', 'big-2']) {
      const isThere = () =>
        hasty.client.call('createItem', { item: { id, title } }).then(
          () => true,
          ({ code }) => code === status.ALREADY_EXISTS,
        )
      await expect.poll(isThere, PATIENCE).toBe(true)
    }
    using connection = await RawConnection.greet(hasty.address, { 4: 0 })
    const ids = Array.from({ length: 500 }, (_, i) => `big-${(i % 2) + 1}`)
    const request = toBinary(BatchGetItemsRequestSchema, create(BatchGetItemsRequestSchema, { ids }))
    connection.send(headers(1, requestFields('BatchGetItems')), data(1, grpcMessage(request)))
    await expect.poll(() => connection.got(FRAME.resetStream, 1).length, PATIENCE).toBe(1)
    expect(connection.got(FRAME.headers, 1)).toHaveLength(1)
    expect(connection.got(FRAME.data)).toEqual([])
  })
})

describe('grpc-timeout', () => {
  const slow = grpcMessage(getItem('9'))
  const fail = { code: status.INVALID_ARGUMENT, reason: 'INVALID_METADATA' }

  test.each(['x5Sfoo', '5', '-5S', '1.5S', '5X', '123456789S', 'NaNS', '5S, 5S'])(
    '"%s" is INVALID_ARGUMENT',
    async (timeout) => {
      expect(await answerTo(one, { 'grpc-timeout': timeout })).toMatchObject(fail)
      await unharmed()
    },
  )

  attack('beyond what a timer can hold is no deadline: the server’s maximum applies', async () => {
    const outcomes = await Promise.all(
      ['597H', '99999999H', '99999999S', '36000000m'].map(async (timeout) => ({
        read: await answerTo(one, { 'grpc-timeout': timeout }),
        slow: await answerTo(slow, { 'grpc-timeout': timeout }, hasty.address),
      })),
    )
    for (const { read, slow } of outcomes) {
      expect(read.code).toBe(status.OK)
      // The catalogue's own timeout is shorter.
      expect(slow.code).toBeOneOf([status.DEADLINE_EXCEEDED, status.UNAVAILABLE])
    }
  })

  attack(
    'of zero, and of a nanosecond, is DEADLINE_EXCEEDED, unless the answer was there at once',
    async () => {
      for (const timeout of ['0S', '1n', '00000000H']) {
        expect((await answerTo(slow, { 'grpc-timeout': timeout })).code).toBe(status.DEADLINE_EXCEEDED)
        expect((await answerTo(one, { 'grpc-timeout': timeout })).code).toBeOneOf([
          status.OK,
          status.DEADLINE_EXCEEDED,
        ])
      }
    },
  )
})

describe('what is no call of this service is refused', () => {
  attack('a method or service that does not exist is UNIMPLEMENTED', async () => {
    for (const method of [
      'NoSuchMethod',
      '/no.such.Service/Method',
      '/',
      '//',
      '/__proto__/constructor',
      '/constructor',
      '/%0d%0a',
      `/${'a'.repeat(10_000)}`,
    ]) {
      expect((await answerTo(one, { ':path': path(method) })).code, method).toBe(status.UNIMPLEMENTED)
    }
  })

  attack('what is sent to a method that does not exist is not taken in, however much it is', async () => {
    const bomb = grpcMessage(gzipSync(Buffer.alloc(4 * 1024 * 1024 - 16)), { compressed: 1 })
    const large = Buffer.alloc(1024 * 1024)
    for (const [more, chunk, times] of [
      [{ 'grpc-encoding': 'gzip' }, bomb, 300],
      [{}, large, 100],
    ] as const) {
      await withSession(async (session) => {
        const stream = open(session, { ...more, ':path': '/no.such.Service/Method' })
        const outcome = outcomeOf(stream)
        for (let i = 0; i < times && !stream.destroyed; i++) stream.write(chunk)
        expect((await outcome).code).toBe(status.UNIMPLEMENTED)
      })
    }
  })

  attack('another content type is 415, another method is 405', async () => {
    for (const type of ['text/html', 'application/json', 'application/grpc-web', 'application/grpcx', '']) {
      expect(await answerTo(one, { 'content-type': type }), type).toMatchObject({
        http: 415,
        code: undefined,
      })
    }
    for (const method of ['GET', 'PUT', 'HEAD', 'OPTIONS', 'DELETE', '__proto__']) {
      expect(await answerTo(NOTHING, { ':method': method }), method).toMatchObject({
        http: 405,
        code: undefined,
      })
    }
    for (const type of ['application/grpc', 'application/grpc+proto', 'application/grpc;charset=utf-8']) {
      expect((await answerTo(one, { 'content-type': type })).code, type).toBe(status.OK)
    }
  })

  attack('a message that comes byte by byte is put together', async () => {
    const outcome = await withSession(async (session) => {
      const stream = open(session)
      for (const byte of one) await new Promise((resolve) => stream.write(Buffer.of(byte), resolve))
      stream.end()
      return outcomeOf(stream)
    })
    expect(outcome.code).toBe(status.OK)
  })

  attack('two messages, or none, for one answer are UNIMPLEMENTED', async () => {
    expect((await answerTo(Buffer.concat(Array(500).fill(one)))).code).toBe(status.UNIMPLEMENTED)
    expect((await answerTo(NOTHING)).code).toBe(status.UNIMPLEMENTED)
  })

  attack('calls that are gone before they are looked at leave nothing behind', async () => {
    using connection = await RawConnection.greet(service.address)
    const methods = ['GetItem', 'NoSuch', 'WatchInvalidations', 'StreamItems', '/grpc.health.v1.Health/Watch']
    for (const [i, method] of [...methods, ...methods].entries()) {
      const type = i < methods.length ? 'application/grpc' : 'text/html'
      const id = 1 + 2 * i
      connection.send(headers(id, requestFields(method, { 'content-type': type })), data(id, one), reset(id))
    }
    connection.send(frame(FRAME.ping, 0, 0, Buffer.alloc(8, 7)))
    await expect
      .poll(() => connection.got(FRAME.ping).some(({ flags }) => flags === FLAG.ack), PATIENCE)
      .toBe(true)
  })

  attack('more calls at once than the limit end the connection', async () => {
    using connection = await RawConnection.greet(service.address)
    await expect.poll(() => connection.got(FRAME.settings).length, PATIENCE).toBeGreaterThan(1)
    // SETTINGS_MAX_CONCURRENT_STREAMS, so that honest clients know it.
    const limit = Buffer.concat([Buffer.of(0, 3), u32(MAX_STREAMS)])
    expect(connection.got(FRAME.settings).some(({ payload }) => payload.includes(limit))).toBe(true)
    const watch = requestFields('WatchInvalidations')
    for (let i = 0; i < MAX_STREAMS + 50; i++) await connection.sendOn(headers(1 + 2 * i, watch))
    await cutOff(connection)
  })
})

describe('too much is RESOURCE_EXHAUSTED', () => {
  attack('a message of 5 MiB, a length of 4 GiB, and a small message that unpacks to 64 MiB', async () => {
    const gzip = { 'grpc-encoding': 'gzip' }
    const bomb = gzipSync(Buffer.alloc(64 * 1024 * 1024))
    const outcomes = [
      await answerTo(grpcMessage(Buffer.alloc(5 * 1024 * 1024))),
      await answerTo(grpcMessage(getItem('1'), { length: 2 ** 32 - 1 })),
      await answerTo(grpcMessage(bomb, { compressed: 1 }), gzip),
      await answerTo(grpcMessage(bomb, { compressed: 1 }), { ...gzip, ':path': path('StreamItems') }),
    ]
    expect(outcomes.map(({ code }) => code)).toEqual(Array(4).fill(status.RESOURCE_EXHAUSTED))
  })

  test('requests that are begun and not ended, beyond what one connection may hold', async () => {
    await using small = await startService({ env: { ITEMCACHE_MAX_SESSION_MEMORY: '8MiB' } })
    const begun = grpcMessage(Buffer.alloc(3 * 1024 * 1024), { length: 4 * 1024 * 1024 })
    const reasons: unknown[] = []
    await withSession(async (session) => {
      for (let i = 0; i < 4; i++) {
        const stream = open(session)
        stream.write(begun)
        void outcomeOf(stream).then(({ reason }) => reasons.push(reason))
      }
      await expect.poll(() => reasons, PATIENCE).toContain('TOO_MUCH_IN_FLIGHT')
    }, small.address)
    expect((await small.client.call('getItem', { id: '1' })).result.case).toBe('item')
  })

  test('calls that are begun and not ended keep nobody out, and far too many end the connection that has most', async () => {
    await using small = await startService({ env: { ITEMCACHE_MAX_CALLS: '100' } })
    const served = async () => (await small.client.call('getItem', { id: '1' })).result.case
    await withSession(async (first) => {
      for (let i = 0; i < 70; i++) open(first)
      await withSession(async (second) => {
        for (let i = 0; i < 80; i++) open(second)
        await expect.poll(() => streamsOf(small), PATIENCE).toBe(150)
        expect(await served()).toBe('item')
        for (let i = 0; i < 60; i++) open(second, { ':path': '/grpc.health.v1.Health/Watch' }).write(NOBODY)
        await expect.poll(() => second.destroyed, PATIENCE).toBe(true)
      }, small.address)
      expect(first.destroyed).toBe(false)
      expect(await served()).toBe('item')
    }, small.address)
  })

  attack('reflection is as slow as its callers take the answers', async () => {
    const listServices = grpcMessage(Buffer.of(0x3a, 0x01, 0x2a))
    const many = Buffer.concat(Array(50_000).fill(listServices))
    await withSession(async (session) => {
      const method = '/grpc.reflection.v1.ServerReflection/ServerReflectionInfo'
      // Nothing of it is read.
      const stream = session.request({ ...CALL, ':path': method }).on('error', () => {})
      for (let i = 0; i < 25; i++) stream.write(many)
      let before = 0
      const stands = () => {
        const [then, now] = [before, stream.writableLength]
        before = now
        return now > 1_000_000 && now === then
      }
      await expect.poll(stands, { ...PATIENCE, interval: 1000 }).toBe(true)
    })
  })

  attack('messages of 4 KB that unpack to 4 MiB each, but not compressed batches in a burst', async () => {
    const gzip = { 'grpc-encoding': 'gzip' }

    const ids = Array.from({ length: 100 }, (_, i) => `${1 + (i % 20)}`)
    const request = toBinary(BatchGetItemsRequestSchema, create(BatchGetItemsRequestSchema, { ids }))
    // By their size alone each of them might become 400 KB.
    const batch = grpcMessage(gzipSync(request, { level: 0 }), { compressed: 1 })
    const outcomes = await withSession(
      (session) =>
        Promise.all(
          Array.from({ length: 200 }, () => {
            const stream = open(session, { ...gzip, ':path': path('BatchGetItems') })
            stream.end(batch)
            return outcomeOf(stream)
          }),
        ),
      service.address,
    )
    expect(outcomes.filter(({ code }) => code !== status.OK)).toEqual([])

    const bomb = grpcMessage(gzipSync(Buffer.alloc(4 * 1024 * 1024 - 16)), { compressed: 1 })
    let refused = 0
    await withSession(async (session) => {
      for (let i = 0; i < 300; i++) {
        const stream = open(session, gzip)
        // It is not ended, so that the service must hold it.
        stream.write(bomb)
        void outcomeOf(stream).then(({ code, reason }) => {
          if (code === status.RESOURCE_EXHAUSTED && reason === 'TOO_MUCH_IN_FLIGHT') refused++
        })
      }
      // 32 of them fit.
      await expect.poll(() => refused, PATIENCE).toBeGreaterThan(200)
    }, service.address)
    expect(residentMb(service)).toBeLessThan(1000)
  })

  attack(
    'compressed look-ups that were answered are held no longer, also when their streams stay',
    async () => {
      const id = 'x'.repeat(128)
      const lookUp = create(StreamItemsRequestSchema, { correlationId: 1n, id })
      const compressed = gzipSync(toBinary(StreamItemsRequestSchema, lookUp), { level: 0 })
      // By their size alone ten of them might become 1.5 MB.
      const ten = Buffer.concat(Array(10).fill(grpcMessage(compressed, { compressed: 1 })))
      await withSession(async (session) => {
        for (let i = 0; i < 250; i++) {
          const stream = open(session, { ':path': path('StreamItems'), 'grpc-encoding': 'gzip' })
          const { promise, resolve } = Promise.withResolvers<string>()
          stream.once('data', () => resolve('answered')).once('close', () => resolve('closed'))
          stream.write(ten)
          expect(await promise).toBe('answered')
        }
      })
    },
  )

  attack('a stream of compressed look-ups is not too much, however long', async () => {
    const lookUp = create(StreamItemsRequestSchema, { correlationId: 1n, id: '1' })
    const message = grpcMessage(gzipSync(toBinary(StreamItemsRequestSchema, lookUp)), { compressed: 1 })
    const { code } = await withSession(async (session) => {
      const stream = open(session, { ':path': path('StreamItems'), 'grpc-encoding': 'gzip' })
      const outcome = outcomeOf(stream)
      // 5,000 messages of 22 bytes could become 114 MB, if they were there all at once.
      for (let i = 0; i < 50; i++) {
        if (!stream.write(Buffer.concat(Array(100).fill(message)))) await once(stream, 'drain')
      }
      stream.end()
      return outcome
    })
    expect(code).toBe(status.OK)
  })
})

/** The most that it ever was. */
function residentMb({ pid }: ServiceProcess): number {
  if (process.platform !== 'linux') return 0
  return Number(/VmHWM:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1]) / 1024
}

describe('messages that cannot be unpacked', () => {
  attack('are INVALID_ARGUMENT, UNIMPLEMENTED or INTERNAL, as gRPC has it', async () => {
    const garbage = grpcMessage(Buffer.from('no gzip'), { compressed: 1 })
    expect((await answerTo(garbage, { 'grpc-encoding': 'gzip' })).code).toBe(status.INTERNAL)
    expect((await answerTo(garbage, { 'grpc-encoding': 'br' })).code).toBe(status.UNIMPLEMENTED)
    const twice = gzipSync(gzipSync(getItem('1')))
    expect((await answerTo(grpcMessage(twice, { compressed: 1 }), { 'grpc-encoding': 'gzip' })).code).toBe(
      status.INVALID_ARGUMENT,
    )
  })
})

test('what callers send forges no line of the log, and reaches the catalogue only as the number of a product', async () => {
  const texts = [
    '__proto__',
    '*',
    '{x}',
    '../..',
    '@host',
    'a\r\n{"level":"fatal"}',
    '💡',
    '?a=b',
    '#',
    '%2e%2e',
  ]
  for (const id of texts) {
    await service.client.call('getItem', { id }).catch(() => {})
    await service.client.call('getItem', { id: `1${id}` }).catch(() => {})
    await service.client.call('listItems', { tag: id }).catch(() => {})
  }
  for (const [name, value] of [
    ['x!y', '{"level":"fatal"}'],
    ['x-latin', 'caf\xe9 {"level":"fatal"}'],
    ['x-tenant-id', 'caf\xe9'],
    ['traceparent', '{"level":"fatal"}'],
    ['grpc-timeout', '{"level":"fatal"}'],
    ['x-bytes-bin', '{"level":"fatal"}'],
  ] as const) {
    using connection = await RawConnection.greet(service.address)
    connection.send(headers(1, [...requestFields('GetItem'), [name, value]]), data(1, one))
    await expect
      .poll(() => connection.closed || connection.frames.some(({ stream }) => stream === 1), PATIENCE)
      .toBe(true)
  }
  await unharmed()
  const lines = log.filter((line) => line.includes('service'))
  expect(lines.length).toBeGreaterThan(0)
  for (const line of lines) {
    expect(JSON.parse(line).level, line).toBeOneOf(['debug', 'info', 'warn'])
  }
  expect(log.filter((line) => line.includes('fatal') && !line.startsWith('{'))).toEqual([])
  expect([...catalogue.requests.keys()].filter((path) => !/^\/products\/[1-9]\d*$/.test(path))).toEqual([])
})

describe('a connection that says nothing', () => {
  test('is closed, whether it never greets, only greets, dribbles its headers, or has grown old', {
    timeout: 120_000,
  }, async () => {
    await using impatient = await startService({
      env: { ITEMCACHE_KEEPALIVE_TIME: '1s', ITEMCACHE_KEEPALIVE_TIMEOUT: '1s' },
    })
    await using restless = await startService({
      env: { ITEMCACHE_MAX_CONNECTION_IDLE: '1s' },
    })
    await using ageing = await startService({
      env: { ITEMCACHE_MAX_CONNECTION_AGE: '1s', ITEMCACHE_MAX_CONNECTION_AGE_GRACE: '100ms' },
    })
    using silent = await RawConnection.open(impatient.address)
    using greeted = await RawConnection.greet(impatient.address)
    using loris = await RawConnection.greet(impatient.address)
    using idle = await RawConnection.greet(restless.address)
    using old = await RawConnection.greet(ageing.address)
    for (const connection of [silent, greeted, loris]) connection.polite = false
    old.send(headers(1, requestFields('WatchInvalidations')), data(1, grpcMessage(NOTHING)))
    const block = headers(1, requestFields('GetItem'))
    let at = 0
    const dribble = setInterval(() => loris.send(block.subarray(at, ++at)), 50)
    try {
      for (const connection of [silent, greeted, loris, idle, old]) {
        await expect
          .poll(() => connection.closed || connection.got(FRAME.goAway).length > 0, PATIENCE)
          .toBe(true)
      }
      await expect.poll(() => old.closed, PATIENCE).toBe(true)
    } finally {
      clearInterval(dribble)
    }
  })

  test('more of them than the limit are closed at once', async () => {
    await using small = await startService({ env: { ITEMCACHE_MAX_CONNECTIONS: '3' } })
    const connections: RawConnection[] = []
    for (let i = 0; i < 5; i++) connections.push(await RawConnection.greet(small.address))
    await expect.poll(() => connections.filter(({ closed }) => closed).length, PATIENCE).toBe(2)
    for (const connection of connections) connection[Symbol.dispose]()
    await expect
      .poll(
        () =>
          small.client.call('getItem', { id: '1' }).then(
            ({ result }) => result.case,
            () => 'refused',
          ),
        PATIENCE,
      )
      .toBe('item')
  })
})
