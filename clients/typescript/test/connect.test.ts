/** Where and how a client connects, and what it sends besides the request. */
import { AsyncLocalStorage } from 'node:async_hooks'
import { once } from 'node:events'
import { readFile } from 'node:fs/promises'
import { connect as connectTcp, createServer } from 'node:net'
import { join } from 'node:path'
import { status } from '@grpc/grpc-js'
import { context, propagation, ROOT_CONTEXT } from '@opentelemetry/api'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
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
    await using client = connect(form.replace('PORT', `${server.port}`))
    expect((await client.get('1')).item?.id).toBe('1')
  })

  test('several take turns, and one that is down is passed over', async () => {
    const seen: [string[], string[]] = [[], []]
    await using a = await echo('none', seen[0])
    await using b = await echo('none', seen[1])
    await using client = connect([a.target, `dns:///${b.target}`, '127.0.0.1:1'], { timeoutMs: 10_000 })
    const deadlineMs = Date.now() + 20_000
    while (seen.some(({ length }) => length === 0) && Date.now() < deadlineMs) await client.get('1')
    expect(seen.map(({ length }) => length > 0)).toEqual([true, true])
  })

  test('a pool has so many connections', async () => {
    await using server = await echo('none', [])
    let connections = 0
    const proxy = createServer((near) => {
      connections++
      const far = connectTcp(server.port, '127.0.0.1')
      near.pipe(far).pipe(near)
      for (const socket of [near, far]) socket.on('error', () => {})
    })
    proxy.listen(0, '127.0.0.1')
    await once(proxy, 'listening')
    const address = proxy.address()
    if (address === null || typeof address === 'string') throw new Error('it does not listen')
    {
      await using client = connect(`127.0.0.1:${address.port}`, { connections: 3, timeoutMs: 10_000 })
      await Promise.all(Array.from({ length: 9 }, () => client.get('1')))
      expect(connections).toBe(3)
    }
    proxy.close()
  })

  test('what cannot be is refused at once', () => {
    expect(() => connect([])).toThrow(InvalidArgumentError)
    expect(() => connect('')).toThrow(InvalidArgumentError)
    expect(() => connect('a:1', { connections: 0 })).toThrow(InvalidArgumentError)
    expect(() => connect('a:1', { nearCache: { maxEntries: 0 } })).toThrow(InvalidArgumentError)
    expect(() => connect(['localhost:1', 'example.com:1'], { token: 't' })).toThrow(InvalidArgumentError)
  })
})

describe('credentials', () => {
  test('a token goes with every call, and a provider is asked each time', async () => {
    const seen: string[] = []
    await using server = await echo('authorization', seen)
    await using fixed = connect(server.target, { token: 'abc' })
    await fixed.get('1')
    let n = 0
    await using renewed = connect(server.target, { token: async () => `t${++n}` })
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
})

test('the trace context of the caller goes with its calls once OpenTelemetry is set up', async () => {
  const storage = new AsyncLocalStorage<typeof ROOT_CONTEXT>()
  const seen: string[] = []
  await using server = await echo('traceparent', seen)
  await using client = connect(server.target)
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
  } finally {
    context.disable()
    propagation.disable()
  }
  expect(seen).toEqual(['', parent])
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
    await using client = connect(stuck.address, { pipeline: true, timeoutMs: 20_000 })
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
    const client = connect(service.address, { pipeline: true, timeoutMs: 20_000 })
    const asked = client.get('1')
    const closing = client.close()
    await expect(client.get('1')).rejects.toBeInstanceOf(CancelledError)
    await closing
    await asked.catch((error: unknown) => expect(error).toBeInstanceOf(CancelledError))
  })

  test('a service that refuses the stream is not asked again and again', async () => {
    await using server = await startScriptedServer({
      getItem: () => {
        throw refusal(status.UNIMPLEMENTED, 'no')
      },
    })
    await using client = connect(server.target, { pipeline: true, timeoutMs: 20_000 })
    await expect(client.get('1')).rejects.toMatchObject({ code: 'UNIMPLEMENTED' })
  })
})

test('a watch whose consumer is slow loses nothing', async () => {
  await using service = await startService()
  await using client = connect(service.address, { timeoutMs: 20_000 })
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
