import { create, fromBinary, type MessageInitShape, toBinary } from '@bufbuild/protobuf'
import { BinaryWriter, WireType } from '@bufbuild/protobuf/wire'
import { anyUnpack } from '@bufbuild/protobuf/wkt'
import { type Client, Metadata, type ServiceError, status } from '@grpc/grpc-js'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { ResourceInfoSchema } from '../../src/gen/google/rpc/error_details_pb.ts'
import { StatusSchema } from '../../src/gen/google/rpc/status_pb.ts'
import {
  type CreateItemRequestSchema,
  Freshness,
  GetItemRequestSchema as GetItemRequest,
  type GetItemRequestSchema,
  InvalidationMode,
  ItemCacheService,
  SkipReason,
} from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { createLogger } from '../../src/observe/log.ts'
import { callerAs, newCaller } from '../support/caller.ts'
import { gatewayTo } from '../support/gateway.ts'
import { freshDatabase } from '../support/servers.ts'
import { type Failure, failureOf, startService, type TestService } from '../support/service.ts'
import { connectSql, revisionOf, type Sql } from './postgres-fixture.ts'

let service: TestService
let sql: Sql

beforeAll(async () => {
  service = await startService()
  sql = await connectSql(service.databaseUrl)
})
afterAll(async () => {
  await sql?.[Symbol.asyncDispose]()
  await service?.[Symbol.asyncDispose]()
})

const fieldsOf = (failure: Failure) => failure.badRequest?.fieldViolations.map(({ field }) => field)

/** The error of a call that is made with exactly these bytes and metadata. */
async function rawError(
  client: Client,
  method: string,
  bytes: Uint8Array,
  metadata = new Metadata(),
  deadline = Date.now() + 10_000,
): Promise<ServiceError> {
  const { promise, resolve, reject } = Promise.withResolvers<ServiceError>()
  const identity = (value: Buffer) => value
  const path = `/${ItemCacheService.typeName}/${method}`
  const { methodKind } = ItemCacheService.methods.find(({ name }) => name === method) ?? {}
  if (methodKind === 'server_streaming') {
    client
      .makeServerStreamRequest(path, identity, identity, Buffer.from(bytes), metadata, { deadline })
      .on('data', () => reject(new Error(`${method} was expected to fail and sent a message`)))
      .on('error', (error) => resolve(error as ServiceError))
  } else {
    client.makeUnaryRequest(path, identity, identity, Buffer.from(bytes), metadata, { deadline }, (error) =>
      error === null ? reject(new Error(`${method} was expected to fail`)) : resolve(error),
    )
  }
  return promise
}

const utf8 = (text: string) => new TextEncoder().encode(text)
const field = (number: number, bytes: Uint8Array) =>
  new BinaryWriter().tag(number, WireType.LengthDelimited).bytes(bytes).finish()

describe('a message that cannot be decoded is INVALID_ARGUMENT', () => {
  const MALFORMED: Readonly<Record<string, Uint8Array>> = {
    'a field that ends too early': Uint8Array.of(0x0a, 5, 0x61),
    'a varint that never ends': new Uint8Array(16).fill(0xff),
    'field number 0': Uint8Array.of(0x02, 0),
    'wire type 7': Uint8Array.of(0x0f, 0),
    'groups in groups in groups': new Uint8Array(100_000).fill(0x7b),
  }
  const methods = ItemCacheService.methods.filter(
    ({ methodKind, name }) => methodKind !== 'bidi_streaming' && name !== 'WatchInvalidations',
  )

  test.each(methods.map(({ name }) => name))('by %s', async (method) => {
    for (const [what, bytes] of Object.entries(MALFORMED)) {
      const failure = failureOf(await rawError(service.client.raw, method, bytes))
      expect(failure, what).toMatchObject({
        code: status.INVALID_ARGUMENT,
        info: { reason: 'MALFORMED_MESSAGE', domain: 'itemcache.v1' },
      })
    }
  })

  test.each([
    ['a byte that is no UTF-8', Uint8Array.of(0x61, 0xc3, 0x28)],
    ['a lone surrogate', Uint8Array.of(0xed, 0xa0, 0x80)],
    ['an overlong form', Uint8Array.of(0xc0, 0x80)],
  ])('with %s in an id', async (_, bytes) => {
    const failure = failureOf(await rawError(service.client.raw, 'GetItem', field(1, bytes)))
    expect(failure).toMatchObject({ code: status.INVALID_ARGUMENT, info: { reason: 'MALFORMED_MESSAGE' } })
  })

  test('also when attributes are nested without end', async () => {
    for (const [depth, reason] of [
      [40, 'INVALID_FIELD'],
      [20_000, 'MALFORMED_MESSAGE'],
    ] as const) {
      const failure = failureOf(
        await rawError(service.client.raw, 'CreateItem', field(1, nestedAttributes(depth))),
      )
      expect(failure).toMatchObject({ code: status.INVALID_ARGUMENT, info: { reason } })
    }
  })
})

/** An item whose attributes have lists within lists, `depth` deep. Made from the inside, without recursion. */
function nestedAttributes(depth: number): Uint8Array {
  const header = (number: number, length: number) =>
    new BinaryWriter().tag(number, WireType.LengthDelimited).uint32(length).finish()
  const parts: Uint8Array[] = []
  let length = 0
  const wrap = (number: number) => {
    const head = header(number, length)
    parts.push(head)
    length += head.length
  }
  for (let i = 0; i < depth; i++) {
    wrap(1) // ListValue.values
    wrap(6) // Value.list_value
  }
  wrap(2) // the value of the map's entry
  const key = field(1, utf8('k'))
  parts.push(key)
  length += key.length
  wrap(1) // Struct.fields
  wrap(9) // Item.attributes
  return Buffer.concat([field(1, utf8('deep')), ...parts.toReversed()])
}

describe('ids', () => {
  const BAD = {
    'an empty one': '',
    '129 bytes': 'x'.repeat(129),
    '130 bytes in 65 characters': 'é'.repeat(65),
    'a NUL': 'a\0b',
    'a line break': 'a\r\nb',
    'a tab': 'a\tb',
    DEL: 'a\x7f',
    'a control character beyond ASCII': 'a\x85',
  }

  test.each(Object.entries(BAD))('%s is INVALID_ARGUMENT wherever an id is taken', async (_, id) => {
    const caller = newCaller(service)
    const failures = await Promise.all([
      caller.failure('getItem', { id }),
      caller.failure('batchGetItems', { ids: ['fine', id] }),
      caller.failure('createItem', { item: { id } }),
      caller.failure('updateItem', { item: { id } }),
      caller.failure('deleteItem', { id }),
      caller.failure('invalidateItems', { target: { case: 'ids', value: { ids: ['fine', id] } } }),
      caller.failure('inspectItem', { id }),
    ])
    for (const failure of failures) {
      expect(failure).toMatchObject({ code: status.INVALID_ARGUMENT, info: { reason: 'INVALID_FIELD' } })
    }
    const fields = ['id', 'ids[1]', 'item.id', 'item.id', 'id', 'ids.ids[1]', 'id']
    expect(failures.map(fieldsOf)).toEqual(fields.map((name) => [name]))
    expect(await revisionOf(sql, caller.tenant)).toBe(0)
  })

  test('of any other text are kept apart, in every tier', async () => {
    const ids = [
      '__proto__',
      'constructor',
      'toString',
      '*',
      '{x}',
      '{x}y',
      '../..',
      '@host',
      'a:b',
      'a%3Ab',
      'a b',
      ' ',
      '%',
      "'; DROP TABLE items; --",
      '💡',
      '💡'.repeat(32),
      'é',
      'e\u0301',
      'A',
      'a',
      'x'.repeat(128),
      '\u2028',
    ]
    const { tenant, call } = newCaller(service)
    for (const id of ids) await call('createItem', { item: { id, title: `title of ${id}` } })
    const titles = ids.map((id) => [id, `title of ${id}`])
    await using second = await startService({ databaseUrl: service.databaseUrl })
    await using third = await startService({ databaseUrl: service.databaseUrl, env: { REDIS_URL: 'off' } })
    for (const one of [service, second, third]) {
      const { results } = await callerAs(one, tenant).call('batchGetItems', { ids })
      const found = results.map(({ result }) => (result.case === 'item' ? result.value : undefined))
      expect(found.map((item) => [item?.id, item?.title])).toEqual(titles)
      expect(one.catalogue.requests.size).toBe(0)
    }
  })

  test('of different tenants never meet, however both are spelled', async () => {
    const pairs = [
      ['a', 'b:c'],
      ['a:b', 'c'],
      ['a%3Ab', 'c'],
      ['1', '1:x'],
      ['1:1', 'x'],
      ['__proto__', 'x'],
      ['{a}', 'x'],
    ] as const
    for (const [tenant, id] of pairs) {
      await callerAs(service, tenant).call('createItem', { item: { id, title: `${tenant} ${id}` } })
    }
    await using other = await startService({ databaseUrl: service.databaseUrl })
    for (const one of [service, other]) {
      for (const [tenant, id] of pairs) {
        const { result } = await callerAs(one, tenant).call('getItem', { id })
        expect(result.value).toMatchObject({ title: `${tenant} ${id}` })
      }
    }
  })
})

test('tags and categories of any text are listed and invalidated by their exact name', async () => {
  const { call } = newCaller(service)
  const names = [
    '__proto__',
    'constructor',
    '*',
    '{x}',
    'a,b',
    '{a,b}',
    'NULL',
    '"',
    '\\',
    '💡',
    'x'.repeat(64),
  ]
  for (const [i, name] of names.entries()) {
    await call('createItem', { item: { id: `tagged-${i}`, tags: [name] } })
    await call('createItem', { item: { id: `kind-${i}`, category: name } })
  }
  for (const [i, name] of names.entries()) {
    const tagged = await call('listItems', { tag: name })
    expect(tagged.items.map(({ id }) => id)).toEqual([`tagged-${i}`])
    const kind = await call('listItems', { category: name })
    expect(kind.items.map(({ id }) => id)).toEqual([`kind-${i}`])
  }
  await call('invalidateItems', {
    target: { case: 'tags', value: { tags: ['__proto__'] } },
    mode: InvalidationMode.REMOVE,
  })
  const options = { freshness: Freshness.CACHE_ONLY }
  const { results } = await call('batchGetItems', {
    ids: ['tagged-0', 'kind-0', 'tagged-1', 'kind-1'],
    options,
  })
  expect(results.map(({ result }) => result.case)).toEqual([undefined, undefined, 'item', 'item'])
})

describe('INVALID_ARGUMENT names every rule that is broken', () => {
  test.each<[string, MessageInitShape<typeof GetItemRequestSchema>, string[]]>([
    [
      'everything',
      {
        id: '',
        options: {
          freshness: 99 as Freshness,
          minRevision: -1n,
          maxStaleness: { seconds: -1n },
        },
        readMask: { paths: ['title', 'colour', 'price.tax'] },
      },
      ['id', 'options.freshness', 'options.min_revision', 'options.max_staleness', 'read_mask', 'read_mask'],
    ],
    ['a negative fraction', { id: 'a', options: { maxStaleness: { nanos: -1 } } }, ['options.max_staleness']],
    [
      'a duration beyond its own range',
      { id: 'a', options: { maxStaleness: { seconds: 315_576_000_001n } } },
      ['options.max_staleness'],
    ],
    [
      'a duration with too many nanoseconds',
      { id: 'a', options: { maxStaleness: { nanos: 1_000_000_000 } } },
      ['options.max_staleness'],
    ],
    ['65 paths', { id: 'a', readMask: { paths: Array(65).fill('title') } }, ['read_mask']],
  ])('of GetItem: %s', async (_, request, fields) => {
    const failure = await service.client.failure('getItem', request)
    expect(failure.code).toBe(status.INVALID_ARGUMENT)
    expect(fieldsOf(failure)).toEqual(fields)
  })

  test.each<[string, MessageInitShape<typeof CreateItemRequestSchema>['item'], string[]]>([
    [
      'everything',
      {
        id: 'a\n',
        title: '\0',
        description: 'a\0b',
        imageUri: '\0',
        category: 'x'.repeat(65),
        tags: ['', 'fine', 'x'.repeat(65), 'a\0'],
        price: { currencyCode: 'euro', units: 1n, nanos: -1 },
        rating: { rate: Number.NaN, count: -1n },
        attributes: { a: '\0', b: { '\0': 1 }, c: [Number.POSITIVE_INFINITY] },
      },
      [
        'item.id',
        'item.title',
        'item.description',
        'item.image_uri',
        'item.category',
        'item.tags[0]',
        'item.tags[2]',
        'item.tags[3]',
        'item.price.currency_code',
        'item.price.nanos',
        'item.rating.rate',
        'item.rating.count',
        'item.attributes',
        'item.attributes',
        'item.attributes',
      ],
    ],
    ['33 tags', { id: 'a', tags: Array.from({ length: 33 }, (_, i) => `${i}`) }, ['item.tags']],
    ['a rating above 5', { id: 'a', rating: { rate: 5.1 } }, ['item.rating.rate']],
    ['a rating below 0', { id: 'a', rating: { rate: -0.1 } }, ['item.rating.rate']],
    [
      'a billion nanos',
      { id: 'a', price: { currencyCode: 'EUR', nanos: 1_000_000_000 } },
      ['item.price.nanos'],
    ],
    ['an attribute that is no number', { id: 'a', attributes: { x: Number.NaN } }, ['item.attributes']],
    ['no item', undefined, ['item']],
  ])('of an item: %s', async (_, item, fields) => {
    const caller = newCaller(service)
    const request = item === undefined ? {} : { item }
    for (const name of ['createItem', 'updateItem'] as const) {
      const failure = await caller.failure(name, request)
      expect(failure.code).toBe(status.INVALID_ARGUMENT)
      expect(fieldsOf(failure)).toEqual(fields)
    }
    expect(await revisionOf(sql, caller.tenant)).toBe(0)
  })

  test('of a batch: none and 501 ids', async () => {
    for (const ids of [[], Array.from({ length: 501 }, (_, i) => `${i}`)]) {
      const failure = await service.client.failure('batchGetItems', { ids })
      expect(failure.code).toBe(status.INVALID_ARGUMENT)
      expect(fieldsOf(failure)).toEqual(['ids'])
    }
  })

  test('of a request id that is too long', async () => {
    const requestId = 'x'.repeat(129)
    for (const failure of [
      await service.client.failure('createItem', { item: { id: 'a' }, requestId }),
      await service.client.failure('updateItem', { item: { id: 'a' }, requestId }),
      await service.client.failure('deleteItem', { id: 'a', requestId }),
      await service.client.failure('invalidateItems', { target: { case: 'all', value: true }, requestId }),
    ]) {
      expect(failure.code).toBe(status.INVALID_ARGUMENT)
      expect(fieldsOf(failure)).toEqual(['request_id'])
    }
  })

  test('as far as they fit into the headers that every client takes', async () => {
    const error = await rawError(
      service.client.raw,
      'BatchGetItems',
      new Uint8Array(Array.from({ length: 501 }, () => [0x0a, 0]).flat()),
    )
    expect(error.code).toBe(status.INVALID_ARGUMENT)
    const failure = failureOf(error)
    expect(failure.badRequest?.fieldViolations.length).toBeGreaterThan(20)
    expect(failure.message).toContain('(and 500 more)')
    const worst = await service.client.failure('batchGetItems', {
      ids: Array(500).fill('\0'),
      readMask: { paths: Array(64).fill('\u0001'.repeat(64)) },
    })
    expect(worst.code).toBe(status.INVALID_ARGUMENT)
    const [details] = error.metadata.get('grpc-status-details-bin')
    expect(details?.length).toBeLessThan(6000)
  })
})

describe('metadata', () => {
  const request = toBinary(GetItemRequest, create(GetItemRequest, { id: 'a' }))

  test('with two tenants is INVALID_ARGUMENT', async () => {
    const metadata = new Metadata()
    metadata.add('x-tenant-id', 'one')
    metadata.add('x-tenant-id', 'two')
    const failure = failureOf(await rawError(service.client.raw, 'GetItem', request, metadata))
    expect(failure).toMatchObject({ code: status.INVALID_ARGUMENT, info: { reason: 'INVALID_METADATA' } })
    expect(fieldsOf(failure)).toEqual(['x-tenant-id'])
  })

  test.each(['', 'a b', 'x'.repeat(129)])('with the tenant "%s" is INVALID_ARGUMENT', async (tenant) => {
    const failure = await service.client.failure(
      'getItem',
      { id: 'a' },
      { metadata: { 'x-tenant-id': tenant } },
    )
    expect(failure.code).toBe(status.INVALID_ARGUMENT)
    expect(fieldsOf(failure)).toEqual(['x-tenant-id'])
  })

  test('with a client id that is too long is INVALID_ARGUMENT for a write', async () => {
    const { failure } = newCaller(service)
    const options = { metadata: { 'x-client-id': 'x'.repeat(129) } }
    const refused = await failure('createItem', { item: { id: 'a' } }, options)
    expect(refused.code).toBe(status.INVALID_ARGUMENT)
    expect(fieldsOf(refused)).toEqual(['x-client-id'])
  })
})

describe('RESOURCE_EXHAUSTED', () => {
  test('is the answer to a message above the limit', async () => {
    const item = { id: 'a', description: 'x'.repeat(5 * 1024 * 1024) }
    const failure = await newCaller(service).failure('createItem', { item })
    expect(failure.code).toBe(status.RESOURCE_EXHAUSTED)
  })

  test('is the answer to an item above 256 KiB, also when an update makes it so', async () => {
    const { call, failure } = newCaller(service)
    const tooLarge = { code: status.RESOURCE_EXHAUSTED, info: { reason: 'ITEM_TOO_LARGE' } }
    const half = 'x'.repeat(130 * 1024)
    const whole = { id: 'a', description: half + half }
    expect(await failure('createItem', { item: whole })).toMatchObject(tooLarge)
    await call('createItem', { item: { id: 'a', description: half } })
    expect(await failure('updateItem', { item: { id: 'a', title: half } })).toMatchObject(tooLarge)
    const { result } = await call('getItem', { id: 'a' })
    expect(result.value).toMatchObject({ title: '' })
  })
})

describe('DEADLINE_EXCEEDED', () => {
  test('ends a call without a deadline at the server’s maximum; the load goes on', async () => {
    const held = Promise.withResolvers<void>()
    await using service = await startService({
      env: {
        ITEMCACHE_MAX_DEADLINE: '1s',
        ITEMCACHE_REDIS_TIMEOUT: '150ms',
        ITEMCACHE_SOFT_TIMEOUT: '100ms',
        ITEMCACHE_POSTGRES_CONNECT_TIMEOUT: '900ms',
        ITEMCACHE_POSTGRES_STATEMENT_TIMEOUT: '900ms',
        ITEMCACHE_ORIGIN_TIMEOUT: '900ms',
      },
      catalogue: {
        intercept: (_, response) => {
          void held.promise.then(() => response.end('{"id": 1, "title": "late", "price": 1}'))
          return true
        },
      },
    })
    const startedMs = performance.now()
    const { client } = service
    const failures = await Promise.all([
      client.failure('getItem', { id: '1' }, { timeoutMs: Number.POSITIVE_INFINITY }),
      client.failure('getItem', { id: '1' }, { timeoutMs: 10_000 }),
      client.failure('updateItem', { item: { id: '1', title: 'new' } }, { timeoutMs: 10_000 }),
    ])
    const tookMs = performance.now() - startedMs
    expect(tookMs).toBeGreaterThan(900)
    expect(tookMs).toBeLessThan(20_000)
    for (const failure of failures) {
      expect(failure).toMatchObject({
        code: status.DEADLINE_EXCEEDED,
        info: { reason: 'TIMEOUT', domain: 'itemcache.v1' },
      })
    }
    held.resolve()
    await expect
      .poll(
        async () => (await service.client.call('getItem', { id: '1' }).catch(() => undefined))?.result.value,
      )
      .toMatchObject({ title: 'late' })
  })

  test('and a call that is cancelled free the waiter at once and are counted', async () => {
    const held = Promise.withResolvers<void>()
    const asked = Promise.withResolvers<void>()
    await using service = await startService({
      catalogue: {
        intercept: (_, response) => {
          asked.resolve()
          void held.promise.then(() => response.end('null'))
          return true
        },
      },
    })
    const finished = () =>
      service.app.metrics.snapshot().rpcs.find(({ method }) => method.endsWith('/GetItem'))?.finished
    const gaveUp = () => (finished()?.DEADLINE_EXCEEDED ?? 0) + (finished()?.CANCELLED ?? 0)
    const patient = service.client.failure('getItem', { id: '1' })
    await asked.promise
    const cancel = new AbortController()
    const cancelled = service.client.failure('getItem', { id: '1' }, { signal: cancel.signal })
    const late = await service.client.failure('getItem', { id: '1' }, { timeoutMs: 150 })
    expect(late.code).toBe(status.DEADLINE_EXCEEDED)
    // The client gives up at its deadline, which on the way here may look like a cancellation.
    await expect.poll(gaveUp).toBe(1)
    cancel.abort()
    expect((await cancelled).code).toBe(status.CANCELLED)
    await expect.poll(gaveUp).toBe(2)
    held.resolve()
    expect((await patient).code).toBe(status.NOT_FOUND)
    expect(service.catalogue.requests.get('/products/1')).toBe(1)
  })
})

describe('INTERNAL', () => {
  test('tells the caller a reference, and the log what happened', async () => {
    const lines: string[] = []
    const log = createLogger({
      level: 'error',
      version: '0',
      destination: { write: (line) => void lines.push(line) },
    })
    await using broken = await startService({ app: { log } })
    await using there = await connectSql(broken.databaseUrl)
    await there('ALTER TABLE items RENAME TO misplaced')
    const { client } = broken
    const errors = [
      await client.call('getItem', { id: 'a' }).catch((error: ServiceError) => error),
      await client.call('listItems', {}).catch((error: ServiceError) => error),
      await client.call('createItem', { item: { id: 'a' } }).catch((error: ServiceError) => error),
      await client.call('inspectItem', { id: 'a' }).catch((error: ServiceError) => error),
    ]
    for (const error of errors) {
      if (!(error instanceof Error)) throw new Error(`it answered ${error.$typeName}`)
      const failure = failureOf(error)
      expect(failure).toMatchObject({ code: status.INTERNAL, info: { reason: 'INTERNAL' } })
      const reference = /^internal error, reference ([0-9a-f]{16})$/.exec(failure.message)?.[1]
      expect(reference).toBeDefined()
      const [details] = error.metadata.get('grpc-status-details-bin')
      expect(`${failure.message}${String(details)}`).not.toMatch(/relation|items|select|postgres|sql/i)
      const line = lines.find((one) => one.includes(`${reference}`))
      expect(line).toContain('relation \\"items\\" does not exist')
    }
    // Each item of a batch by itself.
    const { results } = await client.call('batchGetItems', { ids: ['a', 'b'] })
    expect(results).toHaveLength(2)
    for (const { result } of results) {
      const { code, reason, message } = result.case === 'error' ? result.value : {}
      expect({ code, reason }).toEqual({ code: status.INTERNAL, reason: 'INTERNAL' })
      const reference = /^internal error, reference ([0-9a-f]{16})$/.exec(message ?? '')?.[1]
      expect(lines.find((one) => one.includes(`${reference}`))).toContain('does not exist')
    }
    await there('ALTER TABLE misplaced RENAME TO items')
    expect((await client.failure('getItem', { id: 'a' })).code).toBe(status.NOT_FOUND)
  })
})

describe('UNAVAILABLE', () => {
  test('is what needs PostgreSQL while it is down, with the time of a retry', async () => {
    await using database = await freshDatabase()
    await using way = await gatewayTo(database.url)
    await using service = await startService({ databaseUrl: way.url })
    const { client } = service
    await client.call('createItem', { item: { id: 'a', title: 'A' } })
    await way.cut()
    for (const failure of [
      await client.failure('getItem', { id: 'b' }),
      await client.failure('getItem', { id: 'a', options: { freshness: Freshness.FRESH } }),
      await client.failure('listItems', {}),
      await client.failure('createItem', { item: { id: 'b' } }),
      await client.failure('updateItem', { item: { id: 'a', title: 'B' } }),
      await client.failure('deleteItem', { id: 'a' }),
      await client.failure('invalidateItems', { target: { case: 'all', value: true } }),
    ]) {
      expect(failure.code).toBe(status.UNAVAILABLE)
      expect(failure.info).toMatchObject({ domain: 'itemcache.v1', reason: /^POSTGRES_/ })
      expect(failure.retry?.retryDelay).toMatchObject({ seconds: 1n })
      expect(failure.message).not.toMatch(/ECONN|socket|127\.0\.0\.1|postgres:/i)
    }
    const { results } = await client.call('batchGetItems', { ids: ['a', 'b'] })
    expect(results[0]?.result.case).toBe('item')
    expect(results[1]?.result.value).toMatchObject({
      code: status.UNAVAILABLE,
      reason: /^POSTGRES_/,
      retryDelay: { seconds: 1n },
    })
    // An inspection reports what it cannot see.
    const { tiers } = await client.call('inspectItem', { id: 'a' })
    expect(tiers[0]?.present).toBe(true)
    expect(tiers[2]).toMatchObject({ present: false, skipped: SkipReason.DOWN })
  })

  test('is a refresh from an origin that is switched off', async () => {
    await using service = await startService({ env: { ORIGIN_URL: 'off' } })
    const failure = await service.client.failure('invalidateItems', {
      target: { case: 'ids', value: { ids: ['1'] } },
      refreshOrigin: true,
    })
    expect(failure).toMatchObject({ code: status.UNAVAILABLE, info: { reason: 'ORIGIN_OFF' } })
    expect(failure.retry?.retryDelay).toMatchObject({ seconds: 1n })
  })
})

test('OUT_OF_RANGE is the answer for a revision that the tenant has not reached', async () => {
  const { call, failure } = newCaller(service)
  const { revision } = await call('createItem', { item: { id: 'a' } })
  const options = { minRevision: revision + 1n }
  const ahead = { code: status.OUT_OF_RANGE, reason: 'REVISION_AHEAD_OF_LOG' }
  expect(await failure('getItem', { id: 'a', options })).toMatchObject({
    code: ahead.code,
    info: { reason: ahead.reason },
  })
  const { results } = await call('batchGetItems', { ids: ['a', 'b'], options })
  expect(results.map(({ result }) => result.value)).toMatchObject([ahead, ahead])
  // Not even one that no log can reach is anything else.
  const never = await failure('getItem', { id: 'a', options: { minRevision: 2n ** 63n - 1n } })
  expect(never.code).toBe(status.OUT_OF_RANGE)
})

test('a revision of the next timeline may be right, for the database may have failed over: UNAVAILABLE', async () => {
  const { call, failure } = newCaller(service)
  const { revision } = await call('createItem', { item: { id: 'a' } })
  const refused = await failure('getItem', { id: 'a', options: { minRevision: revision + 2n ** 40n } })
  expect(refused).toMatchObject({ code: status.UNAVAILABLE, info: { reason: 'NEWER_TIMELINE' } })
  expect(refused.retry).toBeDefined()
})

test('errors about one item name it in their details, whatever its id is', async () => {
  const { call } = newCaller(service)
  const id = 'é 💡 %'
  await call('createItem', { item: { id } })
  for (const [code, attempt] of [
    [status.NOT_FOUND, () => call('getItem', { id: `no ${id}` })],
    [status.NOT_FOUND, () => call('deleteItem', { id: `no ${id}` })],
    [status.ALREADY_EXISTS, () => call('createItem', { item: { id } })],
    [status.ABORTED, () => call('deleteItem', { id, etag: '"x"' })],
  ] as const) {
    const error = await attempt().catch((thrown: ServiceError) => thrown)
    if (!(error instanceof Error)) throw new Error(`it answered ${error.$typeName}`)
    expect(error.code).toBe(code)
    const [encoded] = error.metadata.get('grpc-status-details-bin')
    const details = fromBinary(StatusSchema, encoded as Buffer)
    expect(details).toMatchObject({ code, message: error.details })
    const resource = details.details.map((any) => anyUnpack(any, ResourceInfoSchema)).find(Boolean)
    expect(resource).toMatchObject({ resourceType: 'itemcache.v1.Item', resourceName: /é 💡 %$/ })
  }
})
