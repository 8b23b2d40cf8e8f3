import { getEventListeners } from 'node:events'
import { setImmediate } from 'node:timers/promises'
import { create, type DescMessage, type MessageInitShape, toBinary } from '@bufbuild/protobuf'
import { anyPack, DurationSchema } from '@bufbuild/protobuf/wkt'
import { Metadata, status } from '@grpc/grpc-js'
import { describe, expect, test } from 'vitest'
import {
  BadRequestSchema,
  ErrorInfoSchema,
  ResourceInfoSchema,
  RetryInfoSchema,
} from '../src/gen/google/rpc/error_details_pb.ts'
import { StatusSchema } from '../src/gen/google/rpc/status_pb.ts'
import { CacheStatusSchema, Freshness, InvalidationMode } from '../src/gen/itemcache/v1/item_cache_pb.ts'
import {
  AlreadyExistsError,
  CancelledError,
  ConflictError,
  connect,
  DeadlineExceededError,
  InternalError,
  InvalidArgumentError,
  ItemCacheError,
  NotFoundError,
  OutOfRangeError,
  PermissionDeniedError,
  ResourceExhaustedError,
  Tier,
  UnauthenticatedError,
  UnavailableError,
  UnimplementedError,
} from '../src/index.ts'
import { refusal, startScriptedServer } from './scripted-server.ts'

/** For what is not about time: the servers share this process, which may be slow. */
const PATIENT = { timeoutMs: 20_000 }

/** What `promise` rejects with. */
async function failure(promise: Promise<unknown>): Promise<ItemCacheError> {
  const error = await promise.then(
    () => undefined,
    (reason: unknown) => reason,
  )
  if (!(error instanceof ItemCacheError)) throw new Error(`expected an ItemCacheError, got ${error}`)
  return error
}

/** Never resolves before its caller gives up. */
const never = async ({ cancelled }: { cancelled: Promise<void> }): Promise<never> => {
  await cancelled
  throw refusal(status.CANCELLED, 'gone')
}

function withDetails(...details: [DescMessage, MessageInitShape<DescMessage>][]): Metadata {
  const metadata = new Metadata()
  const packed = details.map(([schema, init]) => anyPack(schema, create(schema, init)))
  metadata.set(
    'grpc-status-details-bin',
    Buffer.from(toBinary(StatusSchema, create(StatusSchema, { details: packed }))),
  )
  return metadata
}

describe('errors', () => {
  test.each([
    [status.INVALID_ARGUMENT, InvalidArgumentError],
    [status.NOT_FOUND, NotFoundError],
    [status.ALREADY_EXISTS, AlreadyExistsError],
    [status.ABORTED, ConflictError],
    [status.OUT_OF_RANGE, OutOfRangeError],
    [status.RESOURCE_EXHAUSTED, ResourceExhaustedError],
    [status.UNAVAILABLE, UnavailableError],
    [status.DEADLINE_EXCEEDED, DeadlineExceededError],
    [status.CANCELLED, CancelledError],
    [status.UNAUTHENTICATED, UnauthenticatedError],
    [status.PERMISSION_DENIED, PermissionDeniedError],
    [status.UNIMPLEMENTED, UnimplementedError],
    [status.INTERNAL, InternalError],
    [status.FAILED_PRECONDITION, ItemCacheError],
  ])('status %i has its own class, code and message', async (code, Class) => {
    await using server = await startScriptedServer({
      getItem: () => {
        throw refusal(code, 'what happened')
      },
    })
    await using client = connect(server.target, PATIENT)
    const error = await failure(client.get('1'))
    expect(error).toBeInstanceOf(Class)
    expect(error).toMatchObject({ name: Class.name, code: status[code], message: 'what happened' })
  })

  test('an error carries everything that the service tells in its details', async () => {
    await using server = await startScriptedServer({
      getItem: () => {
        const metadata = withDetails(
          [ErrorInfoSchema, { reason: 'INVALID_FIELD', domain: 'itemcache.v1' }],
          [BadRequestSchema, { fieldViolations: [{ field: 'id', description: 'must be short' }] }],
          [ResourceInfoSchema, { resourceType: 'itemcache.v1.Item', resourceName: 'x'.repeat(200) }],
          [RetryInfoSchema, { retryDelay: create(DurationSchema, { nanos: 1_500_000 }) }],
          [CacheStatusSchema, { tier: Tier.POSTGRES }],
        )
        throw refusal(status.INVALID_ARGUMENT, 'id: must be short', metadata)
      },
    })
    await using client = connect(server.target, PATIENT)
    const error = await failure(client.get('1'))
    expect(error).toMatchObject({
      reason: 'INVALID_FIELD',
      violations: [{ field: 'id', description: 'must be short' }],
      id: 'x'.repeat(200),
      retryAfterMs: 1.5,
      cache: { tier: Tier.POSTGRES },
    })
  })

  test('details that cannot be read do not hide the error', async () => {
    await using server = await startScriptedServer({
      getItem: () => {
        const metadata = new Metadata()
        metadata.set('grpc-status-details-bin', Buffer.from([0xff, 0xff, 0xff]))
        throw refusal(status.NOT_FOUND, 'gone', metadata)
      },
    })
    await using client = connect(server.target, PATIENT)
    expect(await failure(client.get('1'))).toMatchObject({
      code: 'NOT_FOUND',
      reason: undefined,
      violations: [],
    })
  })

  test('the stack of an error shows who called', async () => {
    await using server = await startScriptedServer({
      getItem: () => {
        throw refusal(status.NOT_FOUND, 'gone')
      },
    })
    await using client = connect(server.target, PATIENT)
    const theCaller = async () => await client.get('1')
    expect((await failure(theCaller())).stack).toContain('theCaller')
  })

  test('a service that cannot be reached is unavailable, without a reason of its own', async () => {
    const { target } = await stopped()
    await using client = connect(target, PATIENT)
    const error = await failure(client.get('1'))
    expect(error).toBeInstanceOf(UnavailableError)
    expect(error.reason).toBeUndefined()
  })

  test('what cannot be sent is an invalid argument', async () => {
    await using client = connect('127.0.0.1:1')
    const attempts = [
      client.create({ id: '1', price: { currencyCode: 'EUR', nanos: 1.5 } }),
      client.get('1', { timeoutMs: 0 }),
      client.get('1', { timeoutMs: Number.NaN }),
      client.get('1', { maxStalenessMs: Number.NaN }),
      client.get('1', { metadata: { 'x-note': 'line\nbreak' } }),
      client.watch({ heartbeatMs: Number.NaN }).next(),
      client.watch({ maxBatchDelayMs: Number.POSITIVE_INFINITY }).next(),
    ]
    for (const attempt of attempts) expect(await failure(attempt)).toBeInstanceOf(InvalidArgumentError)
    expect(() => connect('127.0.0.1:1', { tenant: 'line\nbreak' })).toThrow(InvalidArgumentError)
  })
})

async function stopped() {
  await using server = await startScriptedServer({})
  return { target: server.target, port: server.port }
}

describe('retries', () => {
  test('a read and a write are retried while the service is unavailable, the write under one request id', async () => {
    let reads = 0
    const requestIds: string[] = []
    await using server = await startScriptedServer({
      getItem: ({ request }) => {
        if (++reads < 3) throw refusal(status.UNAVAILABLE, 'not yet')
        return { result: { case: 'item', value: { id: request.id } }, revision: 7n }
      },
      deleteItem: ({ request }) => {
        if (requestIds.push(request.requestId) < 3) throw refusal(status.UNAVAILABLE, 'not yet')
        return { revision: 8n }
      },
    })
    await using client = connect(server.target, PATIENT)
    expect((await client.get('1')).revision).toBe(7n)
    expect(await client.delete('1')).toEqual({ revision: 8n })
    expect(reads).toBe(3)
    expect(requestIds).toHaveLength(3)
    expect(new Set(requestIds).size).toBe(1)
    expect(requestIds[0]).not.toBe('')
  })

  test('each write has a request id of its own unless one is given', async () => {
    const requestIds: string[] = []
    await using server = await startScriptedServer({
      invalidateItems: ({ request }) => {
        requestIds.push(request.requestId)
        return { revision: 1n }
      },
    })
    await using client = connect(server.target, PATIENT)
    await client.invalidate({ all: true })
    await client.invalidate({ all: true })
    await client.invalidate({ all: true }, { requestId: 'mine' })
    expect(new Set(requestIds).size).toBe(3)
    expect(requestIds[2]).toBe('mine')
  })

  test('nothing else is retried', async () => {
    let calls = 0
    await using server = await startScriptedServer({
      getItem: () => {
        calls++
        throw refusal(status.INTERNAL, 'bug')
      },
    })
    await using client = connect(server.target, PATIENT)
    await failure(client.get('1'))
    expect(calls).toBe(1)
  })

  test('a client that outlives its service finds it again', async () => {
    const script = { getItem: () => ({ revision: 1n }) }
    await using first = await startScriptedServer(script)
    await using client = connect(first.target, {
      ...PATIENT,
      channelOptions: { 'grpc.initial_reconnect_backoff_ms': 100 },
    })
    await client.get('1')
    await first[Symbol.asyncDispose]()
    expect(await failure(client.get('1'))).toBeInstanceOf(UnavailableError)
    await using _second = await startScriptedServer(script, { port: first.port })
    await expect.poll(() => client.get('1').catch(() => undefined)).toMatchObject({ revision: 1n })
  })
})

describe('deadlines and cancellation', () => {
  test('every call has a deadline: its own, else the client’s', async () => {
    await using server = await startScriptedServer({ getItem: never })
    await using client = connect(server.target, { timeoutMs: 60 })
    expect(await failure(client.get('1'))).toBeInstanceOf(DeadlineExceededError)
    await using patient = connect(server.target, PATIENT)
    expect(await failure(patient.get('1', { timeoutMs: 60 }))).toBeInstanceOf(DeadlineExceededError)
  })

  test.each([60 * 24 * 3600 * 1000, Number.POSITIVE_INFINITY])(
    'a deadline of %d ms becomes one of a day: services fail at once when it is beyond 24 days',
    async (timeoutMs) => {
      let deadline = 0
      await using server = await startScriptedServer({
        getItem: (call) => {
          deadline = call.deadline
          return { revision: 1n }
        },
      })
      await using client = connect(server.target, { timeoutMs })
      expect((await client.get('1')).revision).toBe(1n)
      expect((deadline - Date.now()) / 3_600_000).toBeCloseTo(24, 1)
    },
  )

  test('aborting the signal ends the call here and at the service', async () => {
    const called = Promise.withResolvers<void>()
    const gone = Promise.withResolvers<void>()
    await using server = await startScriptedServer({
      getItem: async (call) => {
        called.resolve()
        call.cancelled.then(gone.resolve)
        return never(call)
      },
    })
    await using client = connect(server.target, PATIENT)
    const abort = new AbortController()
    const result = failure(client.get('1', { signal: abort.signal }))
    await called.promise
    abort.abort('changed my mind')
    const error = await result
    expect(error).toBeInstanceOf(CancelledError)
    expect(error.cause).toBe('changed my mind')
    await gone.promise
  })

  test('a signal that is aborted already sends nothing', async () => {
    let calls = 0
    await using server = await startScriptedServer({ getItem: () => ({ revision: BigInt(++calls) }) })
    await using client = connect(server.target, PATIENT)
    expect(await failure(client.get('1', { signal: AbortSignal.abort() }))).toBeInstanceOf(CancelledError)
    expect(calls).toBe(0)
  })

  test('a signal is left as it was found', async () => {
    await using server = await startScriptedServer({ getItem: () => ({ revision: 1n }) })
    await using client = connect(server.target, PATIENT)
    const { signal } = new AbortController()
    await client.get('1', { signal })
    expect(getEventListeners(signal, 'abort')).toEqual([])
  })

  test('closing lets the calls under way end and takes no more', async () => {
    const called = Promise.withResolvers<void>()
    const gate = Promise.withResolvers<void>()
    await using server = await startScriptedServer({
      getItem: async () => {
        called.resolve()
        await gate.promise
        return { revision: 1n }
      },
    })
    const client = connect(server.target, PATIENT)
    const result = client.get('1')
    await called.promise
    let closed = false
    const closing = client.close().then(() => (closed = true))
    expect(await failure(client.get('2'))).toBeInstanceOf(CancelledError)
    await setImmediate()
    expect(closed).toBe(false)
    gate.resolve()
    expect((await result).revision).toBe(1n)
    await closing
    await client.close()
  })
})

describe('what is sent', () => {
  test('tenant and caller’s metadata go with every call, the client id with writes', async () => {
    const seen: Record<string, unknown>[] = []
    const note = ({ metadata }: { metadata: Metadata }) => {
      seen.push(metadata.getMap())
      return { revision: 1n }
    }
    await using server = await startScriptedServer({ getItem: note, deleteItem: note })
    await using client = connect(server.target, { ...PATIENT, tenant: 'blue', clientId: 'till-4' })
    await client.get('1', { metadata: { traceparent: '00-1', 'x-tenant-id': 'red' } })
    await client.delete('1')
    expect(seen[0]).toMatchObject({ 'x-tenant-id': 'blue', traceparent: '00-1' })
    expect(seen[0]).not.toHaveProperty('x-client-id')
    expect(seen[1]).toMatchObject({ 'x-tenant-id': 'blue', 'x-client-id': 'till-4' })
  })

  test('options of a read arrive as the contract names them', async () => {
    await using server = await startScriptedServer({
      getItem: ({ request }) => {
        expect(request).toMatchObject({
          id: '1',
          options: {
            freshness: Freshness.FRESH,
            minRevision: 9n,
            maxStaleness: { seconds: 5n, nanos: 100_000_000 },
            allowStale: false,
          },
          readMask: { paths: ['image_uri', 'price.currency_code', 'title'] },
          ifNoneMatch: '"a"',
        })
        return { result: { case: 'notModified', value: true } }
      },
    })
    await using client = connect(server.target, PATIENT)
    const result = await client.get('1', {
      freshness: 'fresh',
      minRevision: 9n,
      maxStalenessMs: 5100,
      allowStale: false,
      fields: ['imageUri', 'price.currencyCode', 'title'],
      ifNoneMatch: '"a"',
    })
    expect(result).toMatchObject({ item: undefined, notModified: true })
  })

  test('an invalidation names ids, tags or everything', async () => {
    const seen: unknown[] = []
    await using server = await startScriptedServer({
      invalidateItems: ({ request: { target, mode, refreshOrigin } }) => {
        seen.push([target.case, mode, refreshOrigin])
        return { revision: 5n }
      },
    })
    await using client = connect(server.target, PATIENT)
    expect(await client.invalidate({ ids: ['1'], refreshOrigin: true })).toEqual({ revision: 5n })
    await client.invalidate({ tags: ['sale'], mode: 'remove' })
    await client.invalidate({ all: true })
    expect(seen).toEqual([
      ['ids', InvalidationMode.EXPIRE, true],
      ['tags', InvalidationMode.REMOVE, false],
      ['all', InvalidationMode.EXPIRE, false],
    ])
  })
})

describe('getMany', () => {
  test('1,200 ids travel in batches of at most 500 and come back by id, each once', async () => {
    const sizes: number[] = []
    await using server = await startScriptedServer({
      batchGetItems: ({ request: { ids } }) => {
        sizes.push(ids.length)
        return {
          results: ids.map((id) => ({ id, result: { case: 'item', value: { id, title: `item ${id}` } } })),
        }
      },
    })
    await using client = connect(server.target, PATIENT)
    const ids = Array.from({ length: 1200 }, (_, i) => `${i}`)
    const results = await client.getMany([...ids, '7', '7'])
    expect(sizes.toSorted((a, b) => b - a)).toEqual([500, 500, 200])
    expect([...results.keys()]).toEqual(ids)
    for (const id of ids) expect(results.get(id)?.item?.title).toBe(`item ${id}`)
  })

  test('an item that is missing fails alone; a miss in the caches is neither item nor error', async () => {
    await using server = await startScriptedServer({
      batchGetItems: () => ({
        results: [
          { id: 'a', result: { case: 'item', value: { id: 'a' } } },
          {
            id: 'b',
            result: {
              case: 'error',
              value: { code: status.NOT_FOUND, reason: 'ITEM_NOT_FOUND', message: 'gone' },
            },
          },
          { id: 'c' },
        ],
      }),
    })
    await using client = connect(server.target, PATIENT)
    const results = await client.getMany(['a', 'b', 'c', 'd'])
    expect(results.get('a')).toMatchObject({ item: { id: 'a' }, error: undefined })
    expect(results.get('b')?.error).toBeInstanceOf(NotFoundError)
    expect(results.get('b')?.error).toMatchObject({ id: 'b', reason: 'ITEM_NOT_FOUND', message: 'gone' })
    expect(results.get('c')).toMatchObject({ item: undefined, error: undefined })
    // An answer that is too short is the service's bug, never a silent hole.
    expect(results.get('d')?.error).toBeInstanceOf(InternalError)
  })

  test('no ids, no call', async () => {
    await using client = connect('127.0.0.1:1')
    expect(await client.getMany([])).toEqual(new Map())
  })

  test('when a batch as a whole fails, its error is thrown and the others are cancelled', async () => {
    const cancelled = Promise.withResolvers<void>()
    await using server = await startScriptedServer({
      batchGetItems: async (call) => {
        if (call.request.ids.includes('0')) throw refusal(status.INTERNAL, 'bug')
        await call.cancelled
        cancelled.resolve()
        return {}
      },
    })
    await using client = connect(server.target, PATIENT)
    const ids = Array.from({ length: 501 }, (_, i) => `${i}`)
    expect(await failure(client.getMany(ids))).toBeInstanceOf(InternalError)
    await cancelled.promise
  })

  test('an answer may be as large as the contract allows, far beyond the 4 MiB of gRPC’s default', async () => {
    const description = 'x'.repeat(16 * 1024)
    await using server = await startScriptedServer({
      batchGetItems: ({ request: { ids } }) => ({
        results: ids.map((id) => ({ id, result: { case: 'item', value: { id, description } } })),
      }),
    })
    await using client = connect(server.target, PATIENT)
    const results = await client.getMany(Array.from({ length: 500 }, (_, i) => `${i}`))
    expect(results.get('499')?.item?.description).toBe(description)
  })
})

describe('list', () => {
  const pages = [
    { items: [{ id: 'a' }, { id: 'b' }], nextPageToken: 'two', revision: 3n },
    { items: [], nextPageToken: 'three', revision: 3n },
    { items: [{ id: 'c' }], nextPageToken: '', revision: 4n },
  ]
  const startPages = (tokens: string[]) =>
    startScriptedServer({
      listItems: ({ request }) => {
        expect(request).toMatchObject({ category: 'books', tag: 'sale', pageSize: 2 })
        tokens.push(request.pageToken)
        return pages[tokens.length - 1] ?? {}
      },
    })

  test('iterates over the items of all pages, past an empty one', async () => {
    const tokens: string[] = []
    await using server = await startPages(tokens)
    await using client = connect(server.target, PATIENT)
    const items = await Array.fromAsync(client.list({ category: 'books', tag: 'sale', pageSize: 2 }))
    expect(items.map(({ id }) => id)).toEqual(['a', 'b', 'c'])
    expect(tokens).toEqual(['', 'two', 'three'])
  })

  test('fetches no page before it is asked for', async () => {
    const tokens: string[] = []
    await using server = await startPages(tokens)
    await using client = connect(server.target, PATIENT)
    for await (const page of client.list({ category: 'books', tag: 'sale', pageSize: 2 }).pages()) {
      expect(page).toMatchObject({ nextPageToken: 'two', revision: 3n })
      break
    }
    expect(tokens).toEqual([''])
  })
})

describe('watchMetrics', () => {
  test('yields snapshots; breaking off ends the stream at the service', async () => {
    const gone = Promise.withResolvers<void>()
    await using server = await startScriptedServer({
      watchMetrics: (call) => {
        expect(call.request.interval).toMatchObject({ nanos: 250_000_000 })
        call.on('cancelled', gone.resolve)
        for (const hits of [1n, 2n, 3n]) call.write({ snapshot: { hits } })
      },
    })
    await using client = connect(server.target, PATIENT)
    const seen: bigint[] = []
    for await (const { hits } of client.watchMetrics({ intervalMs: 250 })) {
      if (seen.push(hits) === 2) break
    }
    expect(seen).toEqual([1n, 2n])
    await gone.promise
  })

  test('a stream has no deadline unless one is given, and fails as calls do', async () => {
    await using server = await startScriptedServer({
      watchMetrics: (call) => {
        call.write({ snapshot: { hits: 1n } })
        call.emit('error', refusal(status.UNAVAILABLE, 'draining'))
      },
    })
    await using client = connect(server.target, PATIENT)
    const frames = client.watchMetrics()
    expect((await frames.next()).value).toMatchObject({ hits: 1n })
    expect(await failure(frames.next())).toBeInstanceOf(UnavailableError)
  })

  test('aborting its signal, and closing the client, end it with CancelledError', async () => {
    await using server = await startScriptedServer({ watchMetrics: (call) => call.write({ snapshot: {} }) })
    const client = connect(server.target, PATIENT)
    const abort = new AbortController()
    const one = client.watchMetrics({ signal: abort.signal })
    const two = client.watchMetrics()
    await Promise.all([one.next(), two.next()])
    const ends = [failure(one.next()), failure(two.next())]
    abort.abort('enough')
    expect(await ends[0]).toMatchObject({ name: 'CancelledError', cause: 'enough' })
    await client.close()
    expect(await ends[1]).toBeInstanceOf(CancelledError)
  })
})
