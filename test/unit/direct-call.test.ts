import { once } from 'node:events'
import {
  type ClientHttp2Stream,
  connect,
  createServer,
  type IncomingHttpHeaders,
  type ServerHttp2Stream,
  type Settings,
} from 'node:http2'
import type { AddressInfo } from 'node:net'
import { duplexPair } from 'node:stream'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { Metadata } from '@grpc/grpc-js'
import { expect, test, vi } from 'vitest'
import { DirectCall } from '../../src/rpc/direct-call.ts'
import { Framed } from '../../src/rpc/wire.ts'

/** An answer in a buffer that is lent, and how often that was given back. */
class Lent extends Framed {
  givenBack = 0

  constructor(bytes: Buffer) {
    super(bytes, bytes)
  }

  override sent(error: Error | null | undefined): void {
    if (!error) this.givenBack++
  }
}

function directCall(stream: ServerHttp2Stream, headers: IncomingHttpHeaders): DirectCall {
  const method = { maxRequestBytes: 1000, decode: () => undefined, handle: () => undefined }
  const owner = { reject: () => undefined, delivered: () => undefined }
  return new DirectCall(stream, headers, method, owner, Number.POSITIVE_INFINITY)
}

/** One call over a window of `windowBytes`, which is answered at once. */
async function answered(answer: Framed, windowBytes: number) {
  await using started = new AsyncDisposableStack()
  const server = createServer()
  const taken = Promise.withResolvers<ServerHttp2Stream>()
  server.on('stream', (stream: ServerHttp2Stream, headers: IncomingHttpHeaders) => {
    const direct = directCall(stream, headers)
    direct.reply(answer)
    stream.on('error', () => undefined).on('data', () => undefined)
    stream.once('close', () => direct.closed())
    taken.resolve(stream)
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  started.defer(() => void server.close())
  const { port } = server.address() as AddressInfo
  const session = connect(`http://127.0.0.1:${port}`, { settings: { initialWindowSize: windowBytes } })
  session.on('error', () => undefined)
  started.defer(() => session.destroy())
  const call: ClientHttp2Stream = session.request({ ':method': 'POST', ':path': '/' })
  call.on('error', () => undefined)
  const stream = await taken.promise
  const running = started.move()
  return { call, stream, [Symbol.asyncDispose]: () => running.disposeAsync() }
}

/** A session over a socket that is at hand, with a server that answers each call when its request is there. */
async function session(answer: Framed, whenClosed: () => void = () => undefined, settings: Settings = {}) {
  const [near, far] = duplexPair()
  const server = createServer()
  server.on('stream', (stream: ServerHttp2Stream, headers: IncomingHttpHeaders) => {
    const direct = directCall(stream, headers)
    stream.on('data', () => undefined).once('end', () => direct.reply(answer))
    direct.whenClosed(whenClosed)
    stream.once('close', () => direct.closed())
  })
  server.emit('connection', far)
  const caller = connect('http://here', { createConnection: () => near, settings })
  await once(caller, 'remoteSettings')
  return { caller, socket: far, [Symbol.dispose]: () => caller.destroy() }
}

test('a lent buffer is given back when the caller has all of the answer', async () => {
  const answer = new Lent(Buffer.alloc(100_000))
  await using exchange = await answered(answer, 16_384)
  const { call, stream } = exchange
  const closed = once(stream, 'close')
  call.end()
  call.resume()
  await closed
  expect(answer.givenBack).toBe(1)
})

test.each(['the caller resets the stream', 'the server destroys the stream'])(
  'a lent buffer is not given back when %s: a part may still be on its way',
  async (how) => {
    const answer = new Lent(Buffer.alloc(100_000))
    await using exchange = await answered(answer, 16_384)
    const { call, stream } = exchange
    // The window is full, and nothing is read.
    await once(call, 'response')
    const closed = once(stream, 'close')
    if (how.startsWith('the caller')) call.close(8)
    else stream.destroy()
    await closed
    expect(answer.givenBack).toBe(0)
  },
)

test('a call that is over leaves nothing of itself in its stream, which still says what has become of it', async () => {
  for (const bytes of [10, 100_000]) {
    await using exchange = await answered(new Framed(Buffer.alloc(bytes)), 16_384)
    const { call, stream } = exchange
    const closed = once(stream, 'close')
    call.end('a request')
    let received = 0
    for await (const chunk of call) received += chunk.length
    await closed
    expect(received).toBe(bytes)
    expect(stream.eventNames()).toEqual([])
    const { readableEnded, writableFinished, destroyed, rstCode } = stream
    expect({ readableEnded, writableFinished, destroyed, rstCode, closed: stream.closed }).toEqual({
      readableEnded: true,
      writableFinished: true,
      destroyed: true,
      rstCode: 0,
      closed: true,
    })
    // What comes too late is nobody's.
    stream.destroy()
    stream.end()
  }
})

test('a call whose lent answer was broken off still has what may come back to its stream', async () => {
  await using exchange = await answered(new Lent(Buffer.alloc(100_000)), 16_384)
  const { call, stream } = exchange
  await once(call, 'response')
  const closed = once(stream, 'close')
  call.close(8)
  await closed
  expect(stream.eventNames()).toContain('error')
  expect([stream.writableFinished, stream.destroyed]).toEqual([false, true])
})

test('an answer, its end and its trailers leave in one write', async () => {
  using open = await session(new Framed(Buffer.from('an answer')))
  const { caller, socket } = open
  const writes: number[] = []
  for (let n = 0; n < 3; n++) {
    // Node corks a stream that is not a socket for what would be one write of several buffers.
    const writev = vi.spyOn(socket, 'cork')
    const call = caller.request({ ':method': 'POST', ':path': '/' })
    const trailers = once(call, 'trailers')
    call.end('a request')
    expect(Buffer.concat(await call.toArray()).toString()).toBe('an answer')
    const [{ 'grpc-status': status }] = await trailers
    expect(status).toBe('0')
    writes.push(writev.mock.calls.length)
    writev.mockRestore()
  }
  // The first call shows what Node makes of the trailers, and the settings of both sides are under way.
  expect(writes.slice(1)).toEqual([1, 1])
})

/** A call that is answered with messages, each when the test says so. */
async function streamed(settings: Settings = {}) {
  const [near, far] = duplexPair()
  const server = createServer()
  const taken = Promise.withResolvers<{ direct: DirectCall; stream: ServerHttp2Stream }>()
  server.on('stream', (stream: ServerHttp2Stream, headers: IncomingHttpHeaders) => {
    const direct = directCall(stream, headers)
    stream.on('data', () => undefined).on('error', () => undefined)
    stream.once('close', () => direct.closed())
    taken.resolve({ direct, stream })
  })
  server.emit('connection', far)
  const caller = connect('http://here', { createConnection: () => near, settings })
  await once(caller, 'remoteSettings')
  const call = caller.request({ ':method': 'POST', ':path': '/' })
  call.on('error', () => undefined).end('a request')
  const { direct, stream } = await taken.promise
  const write = (text: string) => {
    const left = vi.fn()
    direct.write(new Framed(Buffer.from(text)), left)
    return left
  }
  return { call, direct, stream, write, [Symbol.dispose]: () => caller.destroy() }
}

test('messages of a stream go past its queue in their order, tell when they have left, and the end comes behind them', async () => {
  // The first one of the process shows what Node makes of it.
  for (const written of [undefined, 0]) {
    using open = await streamed()
    const { call, direct, stream, write } = open
    const queue = vi.spyOn(stream, '_write')
    const [text, trailers] = [call.toArray(), once(call, 'trailers')]
    for (const word of ['one ', 'two ', 'three ']) {
      const left = write(word)
      expect(left).not.toHaveBeenCalled()
      await expect.poll(() => left.mock.calls).toHaveLength(1)
      expect(left.mock.calls[0]?.[0] ?? null).toBe(null)
    }
    const last = write('four')
    direct.refuse({ code: 0, details: 'that was all', metadata: new Metadata() })
    expect(Buffer.concat(await text).toString()).toBe('one two three four')
    expect((await trailers)[0]).toMatchObject({ 'grpc-status': '0' })
    expect(last).toHaveBeenCalledOnce()
    if (written !== undefined) expect(queue).toHaveBeenCalledTimes(written)
  }
})

test('a message for which the reader has no room has not left until there is room', async () => {
  using open = await streamed({ initialWindowSize: 5 })
  const { call, write } = open
  const first = write('12345')
  await expect.poll(() => first.mock.calls).toHaveLength(1)
  const second = write('67890')
  for (let turns = 0; turns < 20; turns++) await new Promise((resolve) => setImmediate(resolve))
  expect(second).not.toHaveBeenCalled()
  call.resume()
  await expect.poll(() => second.mock.calls).toHaveLength(1)
})

test('a message that nobody else holds any more arrives as it was written, however long its reader waits', async () => {
  setFlagsFromString('--expose-gc')
  const collect = runInNewContext('gc') as () => void
  using open = await streamed({ initialWindowSize: 5000 })
  const { call, direct } = open
  const BYTES = 200_000
  const others: Buffer[] = []
  let written = 0
  const next = () => {
    if (written === 3) return direct.refuse({ code: 0, details: '', metadata: new Metadata() })
    written++
    direct.write(new Framed(Buffer.allocUnsafeSlow(BYTES).fill(written)), next)
    setImmediate(() => {
      collect()
      for (let n = 0; n < 50; n++) others.push(Buffer.allocUnsafeSlow(BYTES).fill(0))
    })
  }
  next()
  const received = new Map<number, number>()
  for await (const chunk of call) {
    for (const byte of chunk as Buffer) received.set(byte, (received.get(byte) ?? 0) + 1)
    await new Promise((resolve) => setImmediate(resolve))
  }
  expect([...received]).toEqual([1, 2, 3].map((byte) => [byte, BYTES]))
})

test.each(['the caller resets the stream', 'the server destroys the stream'])(
  'a message under way fails when %s, and those after it break nothing',
  async (how) => {
    using open = await streamed({ initialWindowSize: 5 })
    const { call, stream, write } = open
    const first = write('12345')
    await expect.poll(() => first.mock.calls).toHaveLength(1)
    const underWay = write('67890')
    const closed = once(stream, 'close')
    if (how.startsWith('the caller')) call.close(8)
    else {
      stream.destroy()
      write('too late')
    }
    await closed
    write('later still')
    await expect.poll(() => underWay.mock.calls).toEqual([[expect.any(Error)]])
  },
)

test.each([
  { bytes: 100_000, isOver: 'not' },
  { bytes: 100, isOver: 'already' },
])(
  'while the socket has not taken an answer of $bytes bytes its call is $isOver over',
  async ({ bytes, isOver }) => {
    const closed = vi.fn()
    const wide = { initialWindowSize: 2 ** 31 - 1 }
    using open = await session(new Framed(Buffer.alloc(bytes)), closed, wide)
    const { caller, socket } = open
    caller.setLocalWindowSize(2 ** 31 - 1)
    await new Promise<void>((resolve) => caller.ping(() => resolve()))

    // What the server writes from now on its socket does not take.
    const write = socket._write.bind(socket)
    const untaken: (() => void)[] = []
    const stuck = vi.spyOn(socket, '_write').mockImplementation((...args) => {
      untaken.push(() => write(...args))
    })
    const call = caller.request({ ':method': 'POST', ':path': '/' })
    call.end('a request')
    while (untaken.length === 0) await new Promise((resolve) => setImmediate(resolve))
    for (let turns = 0; turns < 10; turns++) await new Promise((resolve) => setImmediate(resolve))
    expect(closed).toHaveBeenCalledTimes(isOver === 'not' ? 0 : 1)

    stuck.mockRestore()
    for (const take of untaken) take()
    expect((await call.toArray()).reduce((sum, chunk) => sum + chunk.length, 0)).toBe(bytes)
    await expect.poll(() => closed.mock.calls.length).toBe(1)
  },
)
