import { once } from 'node:events'
import {
  type ClientHttp2Session,
  type ClientHttp2Stream,
  connect,
  createServer,
  type Http2Server,
  type Http2Stream,
  type IncomingHttpHeaders,
  type ServerHttp2Session,
  type ServerHttp2Stream,
} from 'node:http2'
import type { AddressInfo } from 'node:net'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { Intake, type IntakeOptions } from '../../src/rpc/intake.ts'
import { OpenStreams, PendingStreams, replaceStreams } from '../../src/rpc/open-streams.ts'

/** What the table holds of a stream, which it never looks into. */
const streamOf = (id: number) => ({ name: `stream ${id}` }) as unknown as Http2Stream

const steps = fc.array(
  fc.record({
    // Ids that lie close together, and some that share a place with them however large the table is.
    id: fc.tuple(fc.nat(60), fc.constantFrom(0, 0, 0, 1, 2)).map(([n, far]) => 1 + n + far * 2 ** 30),
    does: fc.constantFrom('open', 'open', 'close'),
  }),
  { maxLength: 300 },
)

test('open streams are found by their ids as in a Map, whichever come, go and stay', () => {
  fc.assert(
    fc.property(steps, (taken) => {
      const streams = new OpenStreams()
      const model = new Map<number, Http2Stream>()
      for (const { id, does } of taken) {
        const stream = streamOf(id)
        if (does === 'open') {
          streams.set(id, stream)
          model.set(id, stream)
        } else expect(streams.delete(id)).toBe(model.delete(id))
        expect(streams.size).toBe(model.size)
        for (const { id } of taken) expect(streams.get(id)).toBe(model.get(id))
      }
      const told: Http2Stream[] = []
      streams.forEach((stream) => {
        told.push(stream)
      })
      expect(new Set(told)).toEqual(new Set(model.values()))
      expect(told).toHaveLength(model.size)
    }),
    { numRuns: 200 },
  )
})

test('streams that come and go, two hundred at a time, each have a place: none is in a Map', () => {
  const streams = new OpenStreams()
  for (let id = 1; id < 20_000; id += 2) {
    streams.set(id, streamOf(id))
    if (id > 400) streams.delete(id - 400)
    expect(streams.displaced).toBe(0)
  }
})

test('streams without an id are those of a Set', () => {
  const steps = fc.array(fc.record({ n: fc.nat(5), adds: fc.boolean() }), { maxLength: 50 })
  const all = Array.from({ length: 6 }, (_, n) => streamOf(n))
  fc.assert(
    fc.property(steps, (taken) => {
      const streams = new PendingStreams()
      const model = new Set<Http2Stream>()
      for (const { n, adds } of taken) {
        const stream = all[n] as Http2Stream
        if (adds) {
          streams.add(stream)
          model.add(stream)
        } else expect(streams.delete(stream)).toBe(model.delete(stream))
        expect(streams.size).toBe(model.size)
      }
      const told: Http2Stream[] = []
      streams.forEach((stream) => {
        told.push(stream)
        streams.delete(stream)
      })
      expect(told).toEqual([...model])
      expect(streams.size).toBe(0)
    }),
  )
})

test('streams that stay open are found through a million short ones, which have places all the same', () => {
  const streams = new OpenStreams()
  const staying = Array.from({ length: 15 }, (_, n) => streamOf(2 * n + 1))
  for (const [n, stream] of staying.entries()) streams.set(2 * n + 1, stream)
  for (let id = 31; id < 2_000_000; id += 2) {
    streams.set(id, streamOf(id))
    streams.delete(id)
  }
  expect(staying.map((_, n) => streams.get(2 * n + 1))).toEqual(staying)
  expect([streams.size, streams.displaced]).toEqual([15, 15])
})

test('a session whose streams are kept here answers many at once, and those that are left when it ends are ended', async () => {
  await using started = new AsyncDisposableStack()
  const server = createServer()
  const sessions: ServerHttp2Session[] = []
  const replaced: boolean[] = []
  const left: ServerHttp2Stream[] = []
  server.on('session', (session) => {
    replaced.push(replaceStreams(session))
    sessions.push(session)
  })
  server.on('stream', (stream: ServerHttp2Stream, headers: IncomingHttpHeaders) => {
    stream.on('error', () => undefined)
    if (headers[':path'] === '/left') {
      stream.respond()
      left.push(stream)
    } else {
      stream.respond({}, { waitForTrailers: true })
      stream.on('wantTrailers', () => stream.sendTrailers({ path: headers[':path'] }))
      stream.end('x'.repeat(1000))
    }
  })
  const client = await connected(server, started)

  const open = Array.from({ length: 20 }, () => client.request({ ':path': '/left' }))
  const ends = open.map((stream) =>
    once(
      stream.on('error', () => undefined),
      'close',
    ),
  )
  await Promise.all(open.map((stream) => once(stream, 'response')))
  for (let round = 0; round < 5; round++) {
    const paths = Array.from({ length: 200 }, (_, n) => `/${round}-${n}`)
    expect(await Promise.all(paths.map((path) => trailerOf(client, path)))).toEqual(paths)
  }
  expect(replaced).toEqual([true])
  sessions[0]?.destroy()
  await Promise.all(ends)
  expect(left.map(({ destroyed }) => destroyed)).toEqual(open.map(() => true))
})

test('a server keeps the streams of its sessions in such a table', async () => {
  await using started = new AsyncDisposableStack()
  const server = createServer()
  new Intake({ maxIdleMs: 1_000 } as IntakeOptions).guard(server)
  const opened = once(server, 'session')
  await connected(server, started)
  const [session] = (await opened) as [ServerHttp2Session]
  const values = Object.getOwnPropertySymbols(session).map((symbol) => Reflect.get(session, symbol))
  expect(values.filter((value) => value?.streams instanceof OpenStreams)).toHaveLength(1)
})

test('a session that has streams already keeps the table that they are in', async () => {
  await using started = new AsyncDisposableStack()
  const server = createServer()
  const client = await connected(server, started)
  client.request({ ':path': '/' }).on('error', () => undefined)
  const [stream] = (await once(server, 'stream')) as [ServerHttp2Stream]
  expect(stream.session && replaceStreams(stream.session)).toBe(false)
  stream.destroy()
})

/** A client of a server that starts now; both end with what is started. */
async function connected(server: Http2Server, started: AsyncDisposableStack): Promise<ClientHttp2Session> {
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  started.defer(() => void server.close())
  const client = connect(`http://127.0.0.1:${(server.address() as AddressInfo).port}`)
  client.on('error', () => undefined)
  started.defer(() => client.destroy())
  return client
}

/** The trailer of an answer that came whole. */
async function trailerOf(client: ClientHttp2Session, path: string): Promise<unknown> {
  const stream: ClientHttp2Stream = client.request({ ':path': path })
  const trailers = once(stream, 'trailers')
  let bytes = 0
  for await (const chunk of stream) bytes += chunk.length
  expect(bytes).toBe(1000)
  const [{ path: told }] = await trailers
  return told
}
