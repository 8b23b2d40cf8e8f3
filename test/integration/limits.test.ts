/** Bounds that only a whole server shows: docs/limits.md names all of them. */
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { type ClientHttp2Stream, constants } from 'node:http2'
import { connect } from 'node:net'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { create, fromBinary, type MessageShape, toBinary } from '@bufbuild/protobuf'
import { status } from '@grpc/grpc-js'
import { describe, expect, test } from 'vitest'
import { HealthCheckRequestSchema } from '../../src/gen/health/v1/health_pb.ts'
import {
  type InvalidationEvent,
  ItemCacheService,
  WatchInvalidationsResponseSchema,
} from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { startAdmin } from '../../src/observe/admin.ts'
import { callerAs } from '../support/caller.ts'
import { CallerConnection } from '../support/http2-calls.ts'
import { grpcMessage } from '../support/http2-frames.ts'
import { startService, type TestService } from '../support/service.ts'
import { by, connectSql, openStore } from './postgres-fixture.ts'

const KIB = 1024
const LookUp = ItemCacheService.method.streamItems
const lookUps = ({ client }: TestService) =>
  client.raw.makeBidiStreamRequest(
    `/${ItemCacheService.typeName}/StreamItems`,
    (request: MessageShape<typeof LookUp.input>) => Buffer.from(toBinary(LookUp.input, request)),
    (bytes: Buffer) => fromBinary(LookUp.output, bytes),
  )
const held = ({ app }: TestService, what: string) => app.metrics.held()[what]

test('docs/limits.md names every number of itemcache_held, and no other', async () => {
  await using service = await startService()
  const text = await (await fetch(`http://127.0.0.1:${service.app.admin?.port}/metrics`)).text()
  const told = [...text.matchAll(/^itemcache_held\{what="(\w+)"\}/gm)].map(([, what]) => what)
  const page = readFileSync(join(import.meta.dirname, '../../docs/limits.md'), 'utf8')
  // The column before the last, which is that of the tests.
  const cells = page.split('\n').map((line) => (line.split(' | ').length < 5 ? '' : line.split(' | ').at(-2)))
  const names = cells.flatMap((cell = '') => [...cell.matchAll(/`([a-z_]+)`/g)].map(([, name]) => name ?? ''))
  expect(new Set(names.filter((name) => !name.startsWith('itemcache_')))).toEqual(new Set(told))
  for (const name of names.filter((name) => name.startsWith('itemcache_'))) {
    expect(text).toContain(`# TYPE ${name} `)
  }
})

test('calls on all connections together are bounded, and there is room again when one ends', async () => {
  await using service = await startService({ env: { ITEMCACHE_MAX_CALLS: '2' } })
  const { client } = service
  const streams = [1, 2].map(() => client.stream('watchMetrics', {}))
  await Promise.all(streams.map((stream) => stream.next()))
  expect(await client.failure('getItem', { id: '1' })).toMatchObject({
    code: status.RESOURCE_EXHAUSTED,
    info: { reason: 'TOO_MANY_CALLS' },
    retry: { retryDelay: { seconds: 1n } },
  })
  await streams[0]?.return(undefined)
  await expect
    .poll(() => client.call('getItem', { id: '1' }).catch(() => undefined))
    .toMatchObject({ result: { case: 'item' } })
  await streams[1]?.return(undefined)
})

describe('callers who do not take their answers', () => {
  const start = async () => {
    const service = await startService({ env: { ITEMCACHE_MAX_ANSWER_MEMORY: '1MiB' } })
    const description = 'd'.repeat(200 * KIB)
    await service.client.call('createItem', { item: { id: 'large', description } })
    await service.client.call('createItem', { item: { id: 'small' } })
    return service
  }
  const ids = Array.from({ length: 6 }, () => 'large')
  const full = { code: status.RESOURCE_EXHAUSTED, info: { reason: 'TOO_MUCH_UNSENT' } }

  test('hold no more than the bound; large answers are refused meanwhile, and small ones are not', async () => {
    await using service = await start()
    const { client } = service
    {
      using raw = new CallerConnection(service.address)
      // Opened at once, before the first answer: no bound of a connection would stop any of them.
      for (let i = 0; i < 50; i++) raw.open('batchGetItems', { ids }, 'default')
      await expect.poll(() => held(service, 'unsent_bytes')).toBeGreaterThan(KIB * KIB)
      expect(await client.failure('batchGetItems', { ids })).toMatchObject(full)
      expect(await client.failure('listItems', {})).toMatchObject(full)
      expect(await client.failure('updateItem', { item: { id: 'small', title: 'x' } })).toMatchObject(full)
      expect(await client.call('getItem', { id: 'small' })).toMatchObject({ result: { case: 'item' } })
      // Only who holds them may not write.
      await callerAs(service, 'another').call('createItem', { item: { id: 'small' } })
      // One answer may be larger than the bound, and none comes after it.
      expect(held(service, 'unsent_bytes')).toBeLessThan(2 * KIB * KIB)
    }
    await expect.poll(() => held(service, 'unsent_bytes')).toBe(0)
    expect((await client.call('batchGetItems', { ids })).results).toHaveLength(6)
    await client.call('updateItem', { item: { id: 'small', title: 'x' } })
    await expect.poll(() => held(service, 'unsent_bytes')).toBe(0)
  })

  test('of look-ups count, however small they are', async () => {
    await using service = await start()
    await service.client.call('createItem', { item: { id: 'medium', description: 'd'.repeat(3 * KIB) } })
    using raw = new CallerConnection(service.address)
    const stream = raw.begin('streamItems', 'default')
    // 64 KiB are on their way to a caller who reads nothing.
    for (let n = 1n; n <= 100n; n++) {
      stream.write(
        grpcMessage(toBinary(LookUp.input, create(LookUp.input, { correlationId: n, id: 'medium' }))),
      )
    }
    await expect.poll(() => held(service, 'unsent_bytes')).toBeGreaterThan(10 * KIB)
    stream.resume()
    await expect.poll(() => held(service, 'unsent_bytes')).toBe(0)
  })

  test('of look-ups lose their stream when there is no room, and what it held is free again', async () => {
    await using service = await start()
    using raw = new CallerConnection(service.address)
    raw.open('batchGetItems', { ids }, 'default')
    await expect.poll(() => held(service, 'unsent_bytes')).toBeGreaterThan(KIB * KIB)
    const stream = raw.open('streamItems', { correlationId: 1n, id: 'large' }, 'default')
    const [trailers] = await once(stream.resume(), 'response')
    expect(trailers['grpc-status']).toBe(`${status.RESOURCE_EXHAUSTED}`)
    raw[Symbol.dispose]()
    await expect.poll(() => held(service, 'unsent_bytes')).toBe(0)
    // Answers that wait for their caller, who takes them in the end, or goes.
    for (const end of ['takes', 'goes']) {
      using other = new CallerConnection(service.address)
      const slow = other.begin('streamItems', 'default')
      for (let n = 1n; n <= 2n; n++) {
        slow.write(
          grpcMessage(toBinary(LookUp.input, create(LookUp.input, { correlationId: n, id: 'large' }))),
        )
      }
      await expect.poll(() => held(service, 'unsent_bytes')).toBeGreaterThan(300 * KIB)
      if (end === 'takes') slow.resume()
      else other[Symbol.dispose]()
      await expect.poll(() => held(service, 'unsent_bytes')).toBe(0)
    }
  })

  test('of invalidations hold one message each, and get all the others when they read on', async () => {
    await using service = await startService()
    using raw = new CallerConnection(service.address)
    const stream = raw.open('watchInvalidations', { includeItems: true }, 'default')
    await expect.poll(() => service.app.metrics.subscribers).toBe(1)
    const writes = 40
    for (let n = 0; n < writes; n++) {
      const item = { id: `item-${n}`, description: 'd'.repeat(200 * KIB) }
      await service.client.call('createItem', { item })
    }
    await expect.poll(() => held(service, 'unsent_bytes')).toBeGreaterThan(200 * KIB)
    expect(held(service, 'unsent_bytes')).toBeLessThan(3 * KIB * KIB)
    const events = eventsOf(stream)
    await expect.poll(() => events).toHaveLength(writes)
    expect(events.map(({ ids }) => ids)).toEqual(Array.from({ length: writes }, (_, n) => [`item-${n}`]))
    await expect.poll(() => held(service, 'unsent_bytes')).toBe(0)
  })

  test('are sent without their items when others hold too many', async () => {
    // A quarter of it is for items: that of seven streams.
    await using service = await startService({ env: { ITEMCACHE_MAX_ANSWER_MEMORY: '6MiB' } })
    const create = (id: string) =>
      service.client.call('createItem', { item: { id, description: 'd'.repeat(200 * KIB) } })
    using raw = new CallerConnection(service.address)
    for (let n = 0; n < 10; n++) raw.open('watchInvalidations', { includeItems: true }, 'default')
    await expect.poll(() => service.app.metrics.subscribers).toBe(10)
    await create('first')
    await expect.poll(() => held(service, 'unsent_bytes')).toBeGreaterThan(7 * 200 * KIB)

    using other = new CallerConnection(service.address)
    const events = eventsOf(other.open('watchInvalidations', { includeItems: true }, 'default'))
    await expect.poll(() => service.app.metrics.subscribers).toBe(11)
    await create('second')
    await expect.poll(() => events).toMatchObject([{ ids: ['second'], items: [] }])
    raw[Symbol.dispose]()
    await expect.poll(() => held(service, 'unsent_bytes')).toBe(0)
    await create('third')
    await expect
      .poll(() => events)
      .toMatchObject([{ items: [] }, { ids: ['third'], items: [{ id: 'third' }] }])
  })
})

test('a connection whose answers are not taken gets no further calls; others do', async () => {
  await using service = await startService({ env: { ITEMCACHE_MAX_SESSION_MEMORY: '1MiB' } })
  const { client } = service
  await client.call('createItem', { item: { id: 'large', description: 'd'.repeat(200 * KIB) } })
  using raw = new CallerConnection(service.address)
  raw.open('batchGetItems', { ids: Array.from({ length: 20 }, () => 'large') }, 'default')
  await expect.poll(() => held(service, 'unsent_bytes')).toBeGreaterThan(KIB * KIB)
  const refused = raw.open('getItem', { id: '1' }, 'default')
  await new Promise((done) => refused.once('close', done))
  expect(refused.rstCode).toBe(constants.NGHTTP2_ENHANCE_YOUR_CALM)
  expect(await client.call('getItem', { id: '1' })).toMatchObject({ result: { case: 'item' } })
})

test('a stream of look-ups has 500 under way, and reads on when one is answered', async () => {
  const patient = { ITEMCACHE_POSTGRES_STATEMENT_TIMEOUT: '29s', ITEMCACHE_POSTGRES_CONNECT_TIMEOUT: '29s' }
  await using service = await startService({ env: { ORIGIN_URL: 'off', REDIS_URL: 'off', ...patient } })
  await using locker = await connectSql(service.databaseUrl)
  await locker('BEGIN; LOCK TABLE items IN ACCESS EXCLUSIVE MODE')
  const call = lookUps(service)
  let answered = 0
  call.on('data', () => answered++)
  for (let n = 1; n <= 700; n++) call.write(create(LookUp.input, { correlationId: BigInt(n), id: `${n}` }))
  call.end()
  await expect.poll(() => held(service, 'flights')).toBe(500)
  await service.client.call('getMetrics', {})
  expect(held(service, 'flights')).toBe(500)
  await locker('COMMIT')
  await expect.poll(() => answered).toBe(700)
})

/** Reads on, and collects what comes. */
function eventsOf(stream: ClientHttp2Stream): InvalidationEvent[] {
  const events: InvalidationEvent[] = []
  let received = Buffer.alloc(0)
  stream.on('data', (chunk: Buffer) => {
    received = Buffer.concat([received, chunk])
    while (received.byteLength >= 5 && received.byteLength >= 5 + received.readUInt32BE(1)) {
      const end = 5 + received.readUInt32BE(1)
      const { event } = fromBinary(WatchInvalidationsResponseSchema, received.subarray(5, end))
      if (event.case === 'batch') events.push(...event.value.events)
      received = received.subarray(end)
    }
  })
  return events
}

test('names that nobody here has are not remembered, however many callers ask for their health', async () => {
  await using service = await startService()
  const identity = (bytes: Buffer) => bytes
  const watch = (name: string) => {
    const request = Buffer.from(
      toBinary(HealthCheckRequestSchema, create(HealthCheckRequestSchema, { service: name })),
    )
    const call = service.client.raw.makeServerStreamRequest(
      '/grpc.health.v1.Health/Watch',
      identity,
      identity,
      request,
    )
    call.on('error', () => {})
    return call
  }
  const calls = ['', ...Array.from({ length: 100 }, (_, n) => `stranger ${n}`)].map(watch)
  await Promise.all(calls.map((call) => once(call, 'data')))
  expect(held(service, 'health_names')).toBe(1)
  for (const call of calls) call.cancel()
})

test('the admin server takes 256 connections at once', async () => {
  await using admin = await startAdmin({
    host: '127.0.0.1',
    port: 0,
    metrics: { contentType: 'text/plain', text: async () => '' },
    ready: async () => ({ ready: true, detail: {} }),
  })
  let closed = 0
  const sockets = Array.from({ length: 300 }, () => {
    const socket = connect(admin.address.port, admin.address.host)
    socket.on('error', () => {})
    return socket.once('close', () => closed++)
  })
  await expect.poll(() => closed).toBeGreaterThanOrEqual(300 - 256)
  for (const socket of sockets) socket.destroy()
})

describe('callers who wait for a connection to PostgreSQL', () => {
  test('are bounded: those who read, those who write, and those who ask for the log', async () => {
    await using store = await openStore({
      maxConnections: 2,
      maxWaiting: 3,
      connectTimeoutMs: 20_000,
      statementTimeoutMs: 20_000,
    })
    const { tier } = store
    await using locker = await store.session()
    await locker('BEGIN; LOCK TABLE items, invalidations, tenants IN ACCESS EXCLUSIVE MODE')
    const over = new AbortController()
    const busy = { code: 'exhausted', reason: 'POSTGRES_BUSY' }
    // More than ever fit: some connections may still be on their way, and those who ask them do not wait yet.
    const crowd = async (ask: () => Promise<unknown>) => {
      const asked: Promise<unknown>[] = []
      for (let n = 0; n < 30; n++) {
        asked.push(
          ask().then(
            () => 'answered',
            (error: { reason: string }) => error,
          ),
        )
        await sleep(0)
      }
      return asked
    }
    const read = await crowd(() => tier.read('t', ['a'], over.signal))
    const written = await crowd(() => tier.invalidate(by('t'), { kind: 'all' }, 'EXPIRE'))
    const logged = await crowd(() => tier.bounds('t', over.signal))
    for (const asked of [read, written, logged]) {
      expect(await Promise.race(asked.slice(15))).toMatchObject(busy)
    }
    const { connections } = tier.stats
    expect(connections.read.waiting).toBeLessThanOrEqual(3)
    expect(connections.write.waiting).toBeLessThanOrEqual(3)
    await locker('COMMIT')
    for (const asked of [read, logged]) expect(await asked[0]).toBe('answered')
    await Promise.all([...read, ...written, ...logged])
  })
})
