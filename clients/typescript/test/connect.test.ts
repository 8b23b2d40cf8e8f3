/** Where and how a client connects, and what it sends besides the request. */
import { AsyncLocalStorage } from 'node:async_hooks'
import { once } from 'node:events'
import { mkdtempDisposable, readFile } from 'node:fs/promises'
import { connect as connectTcp, createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { status } from '@grpc/grpc-js'
import { context, propagation, ROOT_CONTEXT } from '@opentelemetry/api'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { FRAME, PREFACE } from '../../../test/support/http2-frames.ts'
import { startService, type TestService } from '../../../test/support/service.ts'
import {
  CacheOutcome,
  CancelledError,
  connect,
  DeadlineExceededError,
  InvalidArgumentError,
  NotFoundError,
  SERVICE_CONFIG,
  UnauthenticatedError,
} from '../src/index.ts'
import { refusal, startScriptedServer } from './scripted-server.ts'

/** For what is not about time: the servers share this process, which may be slow. */
const PATIENT = { timeoutMs: 20_000 }

/** What stands between a client and a port, and can be made to let nothing through. Listens on a port or a Unix socket. */
async function startRelay(port: number, socket?: string) {
  let connections = 0
  let isCut = false
  const relay = createServer((near) => {
    connections++
    const far = connectTcp(port, '127.0.0.1')
    for (const [from, to] of [
      [near, far],
      [far, near],
    ] as const) {
      from.on('data', (bytes) => !isCut && to.write(bytes))
      from.on('error', () => {})
      from.on('close', () => to.destroy())
    }
  })
  if (socket === undefined) relay.listen(0, '127.0.0.1')
  else relay.listen(socket)
  await once(relay, 'listening')
  const address = relay.address()
  return {
    target: typeof address === 'string' ? `unix:${address}` : `127.0.0.1:${address?.port}`,
    get connections() {
      return connections
    },
    cut() {
      isCut = true
    },
    [Symbol.dispose]: () => void relay.close(),
  }
}

/** A server that answers with the value of a metadata key. */
const echo = (key: string, seen: string[]) =>
  startScriptedServer({
    getItem: ({ metadata, request }) => {
      seen.push(metadata.get(key).join('|'))
      return { result: { case: 'item', value: { id: request.id } } }
    },
  })

describe('targets', () => {
  test.each(['127.0.0.1:PORT', 'dns:///localhost:PORT', 'ipv4:127.0.0.1:PORT'])('%s', async (form) => {
    await using server = await echo('none', [])
    await using client = connect(form.replace('PORT', `${server.port}`), PATIENT)
    expect((await client.get('1')).item?.id).toBe('1')
  })

  test('several take turns, and one that is down is passed over', async () => {
    const seen: [string[], string[]] = [[], []]
    await using a = await echo('none', seen[0])
    await using b = await echo('none', seen[1])
    await using client = connect([a.target, `dns:///${b.target}`, '127.0.0.1:1'], PATIENT)
    const deadlineMs = Date.now() + 20_000
    while (seen.some(({ length }) => length === 0) && Date.now() < deadlineMs) await client.get('1')
    expect(seen.map(({ length }) => length > 0)).toEqual([true, true])
  })

  test('a pool has so many connections', async () => {
    await using server = await echo('none', [])
    using relay = await startRelay(server.port)
    await using client = connect(relay.target, { connections: 3, ...PATIENT })
    await Promise.all(Array.from({ length: 9 }, () => client.get('1')))
    expect(relay.connections).toBe(3)
  })

  test('a Unix socket', async () => {
    await using directory = await mkdtempDisposable(join(tmpdir(), 'itemcache-'))
    const seen: string[] = []
    await using server = await echo('authorization', seen)
    using relay = await startRelay(server.port, join(directory.path, 'socket'))
    // It stays on this machine, so a token may go there in the clear.
    await using client = connect(relay.target, { ...PATIENT, token: 'abc' })
    await client.get('1')
    await using absolute = connect(relay.target.replace('unix:', 'unix://'), PATIENT)
    await absolute.get('1')
    expect(seen).toEqual(['Bearer abc', ''])
  })

  test('what cannot be is refused at once', () => {
    expect(() => connect([])).toThrow(InvalidArgumentError)
    expect(() => connect('')).toThrow(InvalidArgumentError)
    expect(() => connect('a:1', { connections: 0 })).toThrow(InvalidArgumentError)
    expect(() => connect('a:1', { nearCache: { maxEntries: 0 } })).toThrow(InvalidArgumentError)
    for (const far of [['localhost:1', 'example.com:1'], 'unix-cache.example.com:1', 'unix.example.com:1']) {
      expect(() => connect(far, { token: 't' })).toThrow(InvalidArgumentError)
    }
  })
})

describe('the connection', () => {
  test('one that brings nothing any more is found by keepalive, and what waits for it fails', async () => {
    await using server = await startScriptedServer({ watchMetrics: (call) => call.write({ snapshot: {} }) })
    using relay = await startRelay(server.port)
    await using client = connect(relay.target, { keepaliveMs: 100, keepaliveTimeoutMs: 3000 })
    const frames = client.watchMetrics()
    await frames.next()
    relay.cut()
    await expect(frames.next()).rejects.toMatchObject({ code: 'UNAVAILABLE' })
  })

  test('announces the flow-control window that it is given', async () => {
    const { promise: windows, resolve } = Promise.withResolvers<number>()
    const server = createServer((socket) => {
      const parts: Buffer[] = []
      socket.on('error', () => {})
      socket.on('data', (bytes: Buffer) => {
        parts.push(bytes)
        const window = initialWindow(Buffer.concat(parts))
        if (window !== undefined) resolve(window)
      })
    })
    server.listen(0, '127.0.0.1')
    await once(server, 'listening')
    const address = server.address()
    if (address === null || typeof address === 'string') throw new Error('it does not listen')
    const options = { ...PATIENT, flowControlWindowBytes: 1_234_567 }
    await using client = connect(`127.0.0.1:${address.port}`, options)
    const abort = new AbortController()
    const asked = client.get('1', { signal: abort.signal })
    expect(await windows).toBe(1_234_567)
    abort.abort()
    await expect(asked).rejects.toBeInstanceOf(CancelledError)
    server.close()
  })

  test('without one, what is aborted or closed ends at once, and what waits is told why there is none', async () => {
    await using bystander = connect('127.0.0.1:1')
    const order: string[] = []
    const told = bystander
      .watch()
      .next()
      .finally(() => order.push('told'))
    const abort = new AbortController()
    await using aborted = connect('127.0.0.1:1')
    const watch = aborted
      .watch({ signal: abort.signal })
      .next()
      .finally(() => order.push('aborted'))
    abort.abort('enough')
    await expect(watch).rejects.toMatchObject({ name: 'CancelledError', cause: 'enough' })
    await connect('127.0.0.1:1', { nearCache: {} }).close()
    order.push('closed')
    expect((await told).value).toMatchObject({
      kind: 'disconnected',
      error: { code: 'UNAVAILABLE', message: expect.stringContaining('ECONNREFUSED') },
    })
    expect(order).toEqual(['aborted', 'closed', 'told'])
  })
})

/** What the first SETTINGS frame of a connection says of the window of a stream; `undefined` while it is not there. */
function initialWindow(bytes: Buffer): number | undefined {
  if (bytes.length < PREFACE.length + 9) return undefined
  const frame = bytes.subarray(PREFACE.length)
  const payload = frame.subarray(9, 9 + frame.readUIntBE(0, 3))
  if (frame.readUInt8(3) !== FRAME.settings || payload.length < frame.readUIntBE(0, 3)) return undefined
  for (let at = 0; at < payload.length; at += 6) {
    if (payload.readUInt16BE(at) === INITIAL_WINDOW_SIZE) return payload.readUInt32BE(at + 2)
  }
  return undefined
}

/** RFC 9113, section 6.5.2. */
const INITIAL_WINDOW_SIZE = 4

describe('credentials', () => {
  test('a token goes with every call, and a provider is asked each time', async () => {
    const seen: string[] = []
    await using server = await echo('authorization', seen)
    await using fixed = connect(server.target, { ...PATIENT, token: 'abc' })
    await fixed.get('1')
    let n = 0
    await using renewed = connect(server.target, { ...PATIENT, token: async () => `t${++n}` })
    await renewed.get('1')
    await renewed.get('1')
    expect(seen).toEqual(['Bearer abc', 'Bearer t1', 'Bearer t2'])
  })

  test('a provider that fails is UNAUTHENTICATED, with its error as the cause', async () => {
    const cause = new Error('no network')
    await using client = connect('127.0.0.1:1', { token: () => Promise.reject(cause) })
    const error = await client.get('1').catch((thrown: unknown) => thrown)
    expect(error).toBeInstanceOf(UnauthenticatedError)
    expect(error).toMatchObject({ reason: 'NO_TOKEN', cause })
  })

  test('a provider that does not answer is given up with the call', async () => {
    await using client = connect('127.0.0.1:1', { token: () => new Promise(() => {}) })
    const abort = new AbortController()
    const calls = [
      client.get('1', { signal: abort.signal }),
      client.watchMetrics({ signal: abort.signal }).next(),
    ]
    abort.abort()
    for (const call of calls) await expect(call).rejects.toBeInstanceOf(CancelledError)
  })

  test('a provider that fails ends a watch that begins, and not one that goes on', async () => {
    let streams = 0
    await using server = await startScriptedServer({
      watchInvalidations: (call) => {
        call.write({
          event: { case: 'started', value: { position: 10n, heartbeatInterval: { seconds: 60n } } },
        })
        if (++streams === 1) call.emit('error', refusal(status.UNAVAILABLE, 'gone'))
      },
    })
    let asked = 0
    const token = async () => {
      if (++asked % 2 === 1) throw new Error('no network')
      return 't'
    }
    await using client = connect(server.target, { ...PATIENT, token })
    await expect(client.watch().next()).rejects.toMatchObject({ reason: 'NO_TOKEN' })
    const kinds: string[] = []
    for await (const { kind } of client.watch()) {
      kinds.push(kind)
      if (kind === 'resumed') break
    }
    expect(kinds).toEqual(['started', 'disconnected', 'resumed'])
    expect(asked).toBe(4)
  })
})

test('the trace context of the caller goes with its calls once OpenTelemetry is set up', async () => {
  const storage = new AsyncLocalStorage<typeof ROOT_CONTEXT>()
  const seen: string[] = []
  await using server = await startScriptedServer({
    getItem: ({ metadata }) => {
      seen.push(metadata.get('traceparent').join('|'))
      return {}
    },
    streamItems: (call) => {
      seen.push(`stream ${call.metadata.get('traceparent').join('|')}`)
      call.on('data', ({ correlationId }) => call.write({ correlationId }))
      call.on('end', () => call.end())
    },
  })
  await using piped = connect(server.target, { ...PATIENT, pipeline: true })
  await using client = connect(server.target, PATIENT)
  await client.get('1')
  const KEY = Symbol('trace')
  context.setGlobalContextManager({
    active: () => storage.getStore() ?? ROOT_CONTEXT,
    with: (one, act, self, ...args) => storage.run(one, () => act.call(self, ...args)),
    bind: (_one, target) => target,
    enable() {
      return this
    },
    disable() {
      return this
    },
  })
  propagation.setGlobalPropagator({
    inject: (one, carrier, setter) => setter.set(carrier, 'traceparent', String(one.getValue(KEY))),
    extract: (one) => one,
    fields: () => ['traceparent'],
  })
  const parent = '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01'
  try {
    await context.with(ROOT_CONTEXT.setValue(KEY, parent), () => client.get('1'))
    // Its stream serves other callers, too.
    await context.with(ROOT_CONTEXT.setValue(KEY, parent), () => piped.get('1', { freshness: 'cache-only' }))
  } finally {
    context.disable()
    propagation.disable()
  }
  expect(seen).toEqual(['', parent, 'stream '])
})

test('the published service configs are what the client uses, and what is safe without request ids', async () => {
  const read = async (name: string) =>
    JSON.parse(await readFile(join(import.meta.dirname, '../../../proto/itemcache/v1', name), 'utf8'))
  expect(await read('service_config_with_request_ids.json')).toEqual(SERVICE_CONFIG)
  const careful = await read('service_config.json')
  const methods = careful.methodConfig[0].name.map(({ method }: { method: string }) => method)
  for (const write of ['CreateItem', 'UpdateItem', 'DeleteItem']) expect(methods).not.toContain(write)
  expect({ ...careful, methodConfig: [{ ...careful.methodConfig[0], name: [] }] }).toEqual({
    ...SERVICE_CONFIG,
    methodConfig: [{ ...SERVICE_CONFIG.methodConfig[0], name: [] }],
  })
})

describe('a pipeline', () => {
  let service: TestService
  beforeAll(async () => {
    service = await startService()
    await service.client.call('getItem', { id: '1' })
  })
  afterAll(() => service?.[Symbol.asyncDispose]())

  const streams = async () => {
    const { snapshot } = await service.client.call('getMetrics', {})
    return Number(snapshot?.rpcs.find(({ method }) => method.endsWith('/StreamItems'))?.started ?? 0)
  }

  test('thousands of look-ups share one stream and answer as calls of their own would', async () => {
    const before = await streams()
    await using client = connect(service.address, { pipeline: true, timeoutMs: 50_000 })
    const results = await Promise.all(Array.from({ length: 3000 }, () => client.get('1')))
    expect(results.every(({ item }) => item?.id === '1')).toBe(true)
    expect(results[0]?.cache?.outcome).toBe(CacheOutcome.HIT)
    const etag = results[0]?.item?.etag
    expect(await client.get('1', { ifNoneMatch: etag })).toMatchObject({ notModified: true, item: undefined })
    await expect(client.get('absent')).rejects.toBeInstanceOf(NotFoundError)
    await expect(client.get('')).rejects.toBeInstanceOf(InvalidArgumentError)
    expect(await streams()).toBe(before + 1)
  })

  test('each look-up has its own deadline and its own signal', async () => {
    await using stuck = await startService({ catalogue: { intercept: () => true } })
    await using client = connect(stuck.address, { pipeline: true, ...PATIENT })
    await client.create({ id: 'quick' })
    const gone = new AbortController()
    const aborted = client.get('7', { signal: gone.signal })
    const late = client.get('8', { timeoutMs: 200 })
    gone.abort('changed my mind')
    const error = await aborted.catch((thrown: unknown) => thrown)
    expect(error).toBeInstanceOf(CancelledError)
    expect(error).toMatchObject({ cause: 'changed my mind' })
    expect((await client.get('quick')).item?.id).toBe('quick')
    await expect(late).rejects.toBeInstanceOf(DeadlineExceededError)
  })

  test('closing answers what was asked, and takes no more', async () => {
    const client = connect(service.address, { pipeline: true, ...PATIENT })
    const asked = client.get('1')
    const closing = client.close()
    await expect(client.get('1')).rejects.toBeInstanceOf(CancelledError)
    await closing
    expect((await asked).item?.id).toBe('1')
  })

  test('a service that refuses the stream is not asked again and again', async () => {
    await using server = await startScriptedServer({
      getItem: () => {
        throw refusal(status.UNIMPLEMENTED, 'no')
      },
    })
    await using client = connect(server.target, { pipeline: true, ...PATIENT })
    await expect(client.get('1')).rejects.toMatchObject({ code: 'UNIMPLEMENTED' })
  })
})

test('a watch whose consumer is slow loses nothing', async () => {
  await using service = await startService()
  await using client = connect(service.address, PATIENT)
  const watch = client.watch()
  expect((await watch.next()).value).toMatchObject({ kind: 'started' })
  const wanted: bigint[] = []
  for (let i = 0; i < 120; i++) wanted.push((await client.create({ id: `slow-${i}` })).revision)
  const seen: bigint[] = []
  for await (const message of watch) {
    if (message.kind !== 'event') continue
    seen.push(message.revision)
    if (seen.length % 40 === 0) await new Promise((resolve) => setTimeout(resolve, 300))
    if (seen.length === wanted.length) break
  }
  expect(seen).toEqual(wanted)
})
