import { once } from 'node:events'
import { connect } from 'node:http2'
import {
  create,
  createFileRegistry,
  type DescMessage,
  fromBinary,
  type MessageInitShape,
  type MessageShape,
  toBinary,
} from '@bufbuild/protobuf'
import { BinaryReader, BinaryWriter, WireType } from '@bufbuild/protobuf/wire'
import { FileDescriptorProtoSchema } from '@bufbuild/protobuf/wkt'
import { type Client, type ServiceError, status } from '@grpc/grpc-js'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { startApp } from '../../src/app.ts'
import { parseConfig } from '../../src/config.ts'
import { Health, HealthCheckResponse_ServingStatus as Serving } from '../../src/gen/health/v1/health_pb.ts'
import {
  CacheOutcome,
  type CacheStatus,
  ItemCacheService,
  Tier,
} from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { createLogger } from '../../src/observe/log.ts'
import { newCaller } from '../support/caller.ts'
import { gatewayTo } from '../support/gateway.ts'
import { freshDatabase } from '../support/servers.ts'
import { failureOf, startService, type TestService } from '../support/service.ts'

let service: TestService

beforeAll(async () => {
  service = await startService()
})
afterAll(() => service?.[Symbol.asyncDispose]())

const healthPath = (name: string) => `/${Health.typeName}/${name}`
const encoder =
  <Desc extends DescMessage>(schema: Desc) =>
  (init: MessageInitShape<Desc>) =>
    Buffer.from(toBinary(schema, create(schema, init)))
const decoder =
  <Desc extends DescMessage>(schema: Desc) =>
  (bytes: Buffer): MessageShape<Desc> =>
    fromBinary(schema, bytes)

/** What Check answers: the name of the state, or the code of the error. */
async function healthOf(client: Client, name: string): Promise<keyof typeof Serving | number> {
  const { input, output } = Health.method.check
  const { promise, resolve } = Promise.withResolvers<keyof typeof Serving | number>()
  client.makeUnaryRequest(
    healthPath('Check'),
    encoder(input),
    decoder(output),
    { service: name },
    { deadline: Date.now() + 10_000 },
    (error, answer) => resolve(error?.code ?? nameOf(answer?.status)),
  )
  return promise
}

function nameOf(state: Serving | undefined): keyof typeof Serving {
  const [name] = Object.entries(Serving).find(([, value]) => value === state) ?? []
  if (name === undefined) throw new Error(`no health state has the number ${state}`)
  return name as keyof typeof Serving
}

/** The states that Watch sends. */
async function* watchHealth(client: Client, name: string) {
  const { input, output } = Health.method.watch
  const call = client.makeServerStreamRequest(healthPath('Watch'), encoder(input), decoder(output), {
    service: name,
  })
  call.on('error', () => {})
  try {
    for await (const { status: state } of call as AsyncIterable<{ status: Serving }>) yield nameOf(state)
  } finally {
    call.cancel()
  }
}

describe('health', () => {
  const names = ['', ItemCacheService.typeName]

  test('is SERVING for the server and for the service, and NOT_FOUND for others', async () => {
    for (const name of names) expect(await healthOf(service.client.raw, name)).toBe('SERVING')
    expect(await healthOf(service.client.raw, 'other.v1.Service')).toBe(status.NOT_FOUND)
  })

  test('lists both', async () => {
    const { input, output } = Health.method.list
    const { promise, resolve, reject } = Promise.withResolvers<MessageShape<typeof output>>()
    service.client.raw.makeUnaryRequest(
      healthPath('List'),
      encoder(input),
      decoder(output),
      {},
      (error, answer) => (answer === undefined ? reject(error) : resolve(answer)),
    )
    const { statuses } = await promise
    expect(Object.fromEntries(Object.entries(statuses).map(([name, one]) => [name, one.status]))).toEqual({
      '': Serving.SERVING,
      [ItemCacheService.typeName]: Serving.SERVING,
    })
  })

  test('turns to NOT_SERVING without PostgreSQL and anything cached, and back', async () => {
    await using database = await freshDatabase()
    await using way = await gatewayTo(database.url)
    await using service = await startService({ databaseUrl: way.url, env: { REDIS_URL: 'off' } })
    const watch = watchHealth(service.client.raw, ItemCacheService.typeName)
    expect((await watch.next()).value).toBe('SERVING')
    await way.cut()
    expect((await watch.next()).value).toBe('NOT_SERVING')
    for (const name of names) expect(await healthOf(service.client.raw, name)).toBe('NOT_SERVING')
    await way.restore()
    expect((await watch.next()).value).toBe('SERVING')
    await watch.return(undefined)
    // With something cached it goes on serving.
    await service.client.call('getItem', { id: '1' })
    await way.cut()
    await expect
      .poll(async () => (await service.client.failure('getItem', { id: 'x' })).code)
      .toBe(status.UNAVAILABLE)
    expect(await healthOf(service.client.raw, '')).toBe('SERVING')
  })
})

describe('reflection', () => {
  const [LIST, SYMBOL] = [7, 4]

  /** The answer to one question: its fields, by number. */
  async function ask(client: Client, version: string, question: number, text: string) {
    const identity = (value: Buffer) => value
    const call = client.makeBidiStreamRequest(
      `/grpc.reflection.${version}.ServerReflection/ServerReflectionInfo`,
      identity,
      identity,
    )
    call.write(Buffer.from(new BinaryWriter().tag(question, WireType.LengthDelimited).string(text).finish()))
    call.end()
    const [answer] = (await once(call, 'data')) as [Buffer]
    return fieldsOf(answer)
  }

  function fieldsOf(bytes: Uint8Array): Map<number, Uint8Array[]> {
    const fields = new Map<number, Uint8Array[]>()
    const reader = new BinaryReader(bytes)
    while (reader.pos < reader.len) {
      const [number, type] = reader.tag()
      if (type === WireType.LengthDelimited)
        fields.set(number, [...(fields.get(number) ?? []), reader.bytes()])
      else reader.skip(type)
    }
    return fields
  }
  const inside = (fields: Map<number, Uint8Array[]>, number: number) =>
    fieldsOf(fields.get(number)?.[0] ?? new Uint8Array())

  test.each(['v1', 'v1alpha'])('%s lists the services and describes them completely', async (version) => {
    const client = service.client.raw
    const listed = inside(await ask(client, version, LIST, ''), 6).get(1) ?? []
    const names = listed.map((one) => Buffer.from(fieldsOf(one).get(1)?.[0] ?? []).toString())
    expect(names).toEqual(expect.arrayContaining([ItemCacheService.typeName, Health.typeName]))
    for (const [symbol, methods] of [
      [ItemCacheService.typeName, 12],
      [Health.typeName, 3],
    ] as const) {
      const files = inside(await ask(client, version, SYMBOL, symbol), 4).get(1) ?? []
      const described = files.map((bytes) => fromBinary(FileDescriptorProtoSchema, bytes))
      const [own] = described
      if (own === undefined) throw new Error(`${symbol} is not described`)
      const registry = createFileRegistry(own, (name) => described.find((file) => file.name === name))
      expect(registry.getService(symbol)?.methods).toHaveLength(methods)
    }
    const unknown = await ask(client, version, SYMBOL, 'no.such.Thing')
    expect(unknown.has(7)).toBe(true)
  })

  test('describes the error details', async () => {
    const answer = await ask(service.client.raw, 'v1', SYMBOL, 'google.rpc.ErrorInfo')
    expect(inside(answer, 4).get(1)?.length).toBeGreaterThan(0)
  })

  test('can be switched off', async () => {
    await using silent = await startService({ env: { ITEMCACHE_REFLECTION: 'false' } })
    await expect(ask(silent.client.raw, 'v1', LIST, '')).rejects.toMatchObject({ code: status.UNIMPLEMENTED })
  })
})

describe('a server that drains', () => {
  test('tells watchers of health, ends streams as UNAVAILABLE, and takes no new calls', async () => {
    const service = await startService({ env: { ITEMCACHE_DRAIN_TIMEOUT: '2s' } })
    const watch = watchHealth(service.client.raw, '')
    expect((await watch.next()).value).toBe('SERVING')
    const metrics = service.client.stream('watchMetrics', {})
    await metrics.next()
    const ended = metrics.next().then(
      () => metrics.next(),
      (error: ServiceError) => failureOf(error),
    )
    const drained = service.app[Symbol.asyncDispose]()
    expect(await ended).toMatchObject({
      code: status.UNAVAILABLE,
      info: { reason: 'DRAINING' },
      retry: { retryDelay: { seconds: 1n } },
    })
    expect((await watch.next()).value).toBe('NOT_SERVING')
    await watch.return(undefined)
    await drained
    const late = await service.client.failure('getItem', { id: '1' }, { timeoutMs: 20_000 })
    expect(late.code).toBe(status.UNAVAILABLE)
    await service[Symbol.asyncDispose]()
  })

  test('waits no longer than the drain timeout for calls that do not end', async () => {
    const asked = Promise.withResolvers<void>()
    const service = await startService({
      env: { ITEMCACHE_DRAIN_TIMEOUT: '300ms' },
      catalogue: {
        intercept: () => {
          asked.resolve()
          return true
        },
      },
    })
    const stuck = service.client.failure('getItem', { id: '1' }, { timeoutMs: 60_000 })
    await asked.promise
    const { host, port } = service.app.address
    const connection = connect(`http://${host}:${port}`)
    const cut = new Promise((resolve) => connection.once('close', resolve))
    const unfinished = connection.request({
      ':method': 'POST',
      ':path': '/itemcache.v1.ItemCacheService/GetItem',
      'content-type': 'application/grpc',
      te: 'trailers',
    })
    unfinished.on('error', () => {}).write(Buffer.of(0))
    connection.on('error', () => {})
    await new Promise((resolve) => connection.once('remoteSettings', resolve))
    const startedMs = performance.now()
    const drained = service.app[Symbol.asyncDispose]()
    expect(await stuck).toMatchObject({ code: expect.toBeOneOf([status.UNAVAILABLE, status.CANCELLED]) })
    expect(performance.now() - startedMs).toBeGreaterThan(250)
    // Nor for what the catalogue may still say.
    await drained
    await cut
    expect(performance.now() - startedMs).toBeLessThan(20_000)
    await service[Symbol.asyncDispose]()
  })
})

test('a start on an address that is taken says so', async () => {
  await using database = await freshDatabase()
  const config = parseConfig({
    DATABASE_URL: database.url,
    REDIS_URL: 'off',
    ORIGIN_URL: 'off',
    ITEMCACHE_LISTEN: service.address,
    ITEMCACHE_ADMIN_LISTEN: 'off',
  })
  const log = createLogger({ level: 'silent', version: '0' })
  await expect(startApp(config, { log })).rejects.toThrow(`cannot listen on ${service.address}: is it taken?`)
})

describe('the log', () => {
  test('has one line for each request, and ids cannot forge another', async () => {
    const lines: Record<string, unknown>[] = []
    const log = createLogger({
      level: 'debug',
      version: '0',
      destination: {
        write: (line) =>
          void lines.push(
            ...line
              .trimEnd()
              .split('\n')
              .map((one) => JSON.parse(one)),
          ),
      },
    })
    await using service = await startService({ app: { log } })
    const { tenant, call, failure } = newCaller(service)
    const traceparent = '00-0123456789abcdef0123456789abcdef-0123456789abcdef-01'
    const metadata = { metadata: { traceparent } }
    await call('getItem', { id: '1' }, metadata)
    const again = await call('getItem', { id: '1' }, metadata)
    await call('createItem', { item: { id: 'a"} {"level":"fatal"' } }, metadata)
    await call('updateItem', { item: { id: '1', title: 'x' } }, metadata)
    await call('deleteItem', { id: '1' }, metadata)
    const absent = await failure('getItem', { id: '1' }, metadata)
    await failure('getItem', { id: 'a\n{"level":"fatal"}' })
    const requests = lines.filter(({ msg }) => msg === 'request')
    const nameOf = (names: Readonly<Record<string, number>>, value: number | undefined) =>
      Object.keys(names).find((name) => names[name] === value)
    /** What the answer says, whatever that is: a hit, unless the machine is too busy for one. */
    const told = (cache: CacheStatus | undefined) => ({
      tier: nameOf(Tier, cache?.tier)?.toLowerCase(),
      outcome: nameOf(CacheOutcome, cache?.outcome),
    })
    const line = (method: string, code: string, more: object) => ({
      level: expect.stringMatching(/^(debug|info|warn)$/),
      method: `itemcache.v1.ItemCacheService/${method}`,
      code,
      tenant,
      trace_id: '0123456789abcdef0123456789abcdef',
      duration_ms: expect.any(Number),
      ...more,
    })
    expect(requests).toMatchObject([
      line('GetItem', 'OK', { id: '1', tier: 'origin', outcome: 'MISS' }),
      line('GetItem', 'OK', { id: '1', ...told(again.cache) }),
      line('CreateItem', 'OK', { id: 'a"} {"level":"fatal"' }),
      line('UpdateItem', 'OK', { id: '1' }),
      line('DeleteItem', 'OK', { id: '1' }),
      line('GetItem', 'NOT_FOUND', { id: '1', ...told(absent.cache) }),
      line('GetItem', 'INVALID_ARGUMENT', {
        trace_id: expect.stringMatching(/^[0-9a-f]{32}$/),
        reason: 'INVALID_FIELD',
      }),
    ])
    expect(lines.filter(({ level }) => level === 'fatal')).toEqual([])
  })
})
