/** Traces, as a collector receives them from a running service. */
import { randomBytes } from 'node:crypto'
import type { IncomingMessage, ServerResponse } from 'node:http'
import { create, toBinary } from '@bufbuild/protobuf'
import { Metadata } from '@grpc/grpc-js'
import { Client } from 'pg'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { StreamItemsRequestSchema } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { createLogger } from '../../src/observe/log.ts'
import { connectPostgres } from '../../src/tiers/postgres.ts'
import { type Caller, newCaller } from '../support/caller.ts'
import {
  type Collector,
  type ReceivedSpan,
  startCollector,
  startGrpcCollector,
} from '../support/collector.ts'
import { freshDatabase } from '../support/servers.ts'
import { type ServiceOptions, startService, type TestService } from '../support/service.ts'
import { unlessStalled } from '../support/stalls.ts'

const CLIENT = 3
const SERVER = 2
const ERROR = 2

/** What the catalogue does with a request; by default what it always does. */
let intercept: ((request: IncomingMessage, response: ServerResponse) => boolean) | undefined

const lines: string[] = []
let collector: Collector
let service: TestService

beforeAll(async () => {
  collector = await startCollector()
  service = await startTraced(collector, {
    catalogue: { intercept: (request, response) => intercept?.(request, response) ?? false },
    app: {
      log: createLogger({
        level: 'info',
        version: '0',
        destination: { write: (line) => void lines.push(line) },
      }),
    },
    env: { OTEL_SERVICE_NAME: 'shop-cache', OTEL_RESOURCE_ATTRIBUTES: 'deployment.environment.name=test' },
  })
})
afterAll(async () => {
  await service?.[Symbol.asyncDispose]()
  await collector?.[Symbol.asyncDispose]()
})

/** A service that sends its spans soon. */
function startTraced({ url }: Collector, options: ServiceOptions = {}): Promise<TestService> {
  const env = { OTEL_EXPORTER_OTLP_ENDPOINT: url, OTEL_BSP_SCHEDULE_DELAY: '50', ...options.env }
  return startService({ ...options, env })
}

/** A caller's own trace: the context that it sends, sampled or not. */
function callersTrace(sampled = true) {
  const traceId = randomBytes(16).toString('hex')
  const spanId = randomBytes(8).toString('hex')
  return { traceId, spanId, metadata: { traceparent: `00-${traceId}-${spanId}-0${sampled ? 1 : 0}` } }
}

/** The spans of a trace, once all of these have come. */
async function spansOf(traceId: string, ...names: readonly string[]): Promise<readonly ReceivedSpan[]> {
  await expect
    .poll(() => collector.trace(traceId).map(({ name }) => name))
    .toEqual(expect.arrayContaining([...names]))
  return collector.trace(traceId)
}

const called = (method: string) => `itemcache.v1.ItemCacheService/${method}`

function only(spans: readonly ReceivedSpan[], name: string): ReceivedSpan {
  const found = spans.filter((span) => span.name === name)
  expect(found, name).toHaveLength(1)
  return found[0] as ReceivedSpan
}

const childrenOf = (spans: readonly ReceivedSpan[], parent: ReceivedSpan) =>
  spans
    .filter(({ parentSpanId }) => parentSpanId === parent.spanId)
    .sort((a, b) => Number(a.start - b.start))
    .map(({ name }) => name)

const eventsOf = ({ events }: ReceivedSpan) => events.map(({ name }) => name)

/** A caller whose tenant's log is followed already. */
async function warmCaller(): Promise<Caller> {
  const caller = newCaller(service)
  await caller.call('getItem', { id: 'nothing', options: { allowStale: false } }, {}).catch(() => {})
  return caller
}

describe('the trace of a read', () => {
  test('that nothing is cached for shows every tier in its turn, below the span of the caller', () =>
    unlessStalled(async () => {
      const caller = await warmCaller()
      const { traceId, spanId, metadata } = callersTrace()
      await caller.call('getItem', { id: '1' }, { metadata })

      const spans = await spansOf(traceId, called('GetItem'), 'load', 'EVALSHA store_copies')
      const rpc = only(spans, called('GetItem'))
      expect(rpc).toMatchObject({ parentSpanId: spanId, kind: SERVER, status: 0 })
      expect(rpc.attributes).toMatchObject({
        'rpc.system.name': 'grpc',
        'rpc.method': called('GetItem'),
        'rpc.response.status_code': 'OK',
        'server.address': '127.0.0.1',
        'server.port': service.app.address.port,
        'client.address': '127.0.0.1',
        'itemcache.tenant': caller.tenant,
        'itemcache.item.id': '1',
        'itemcache.tier': 'origin',
        'itemcache.outcome': 'MISS',
      })
      expect(childrenOf(spans, rpc)).toEqual(['memory', 'load'])
      expect(eventsOf(only(spans, 'memory'))).toEqual(['miss'])
      const load = only(spans, 'load')
      expect(childrenOf(spans, load)).toEqual([
        'EVALSHA read_copies',
        'SELECT items',
        'EVALSHA take_lock',
        'GET /products/{id}',
        'INSERT items',
        'EVALSHA store_copies',
      ])
      expect(load.events).toEqual([{ name: 'refill', attributes: { 'itemcache.tier': 'memory' } }])
      expect(spans).toHaveLength(9)

      const redis = only(spans, 'EVALSHA read_copies')
      expect(redis).toMatchObject({ kind: CLIENT, attributes: { 'db.system.name': 'redis' } })
      expect(eventsOf(redis)).toEqual(['miss'])
      for (const select of spans.filter(({ name }) => name === 'SELECT items')) {
        expect(select.kind).toBe(CLIENT)
        expect(select.attributes).toMatchObject({
          'db.system.name': 'postgresql',
          'db.namespace': new URL(service.databaseUrl).pathname.slice(1),
          'db.operation.name': 'SELECT',
          'db.collection.name': 'items',
          'itemcache.tier': 'postgres',
        })
        expect(eventsOf(select)).toEqual(['miss'])
      }
      const origin = only(spans, 'GET /products/{id}')
      expect(origin.kind).toBe(CLIENT)
      expect(origin.attributes).toMatchObject({
        'http.request.method': 'GET',
        'url.full': `${service.catalogue.url}/products/1`,
        'http.response.status_code': 200,
        'server.port': Number(new URL(service.catalogue.url).port),
      })
      for (const span of spans) {
        expect(span.end, span.name).toBeGreaterThanOrEqual(span.start)
        expect(span.start, span.name).toBeGreaterThanOrEqual(rpc.start)
        expect(span.resource).toMatchObject({
          'service.name': 'shop-cache',
          'deployment.environment.name': 'test',
        })
      }
    }))

  test('that memory answers is one look into memory', () =>
    unlessStalled(async () => {
      const caller = newCaller(service)
      await caller.call('getItem', { id: '2' })
      const { traceId, spanId, metadata } = callersTrace()
      await caller.call('getItem', { id: '2' }, { metadata })

      const spans = await spansOf(traceId, called('GetItem'))
      const rpc = only(spans, called('GetItem'))
      expect(rpc.parentSpanId).toBe(spanId)
      expect(rpc.attributes).toMatchObject({ 'itemcache.tier': 'memory', 'itemcache.outcome': 'HIT' })
      expect(childrenOf(spans, rpc)).toEqual(['memory'])
      expect(eventsOf(only(spans, 'memory'))).toEqual(['hit'])
      expect(spans).toHaveLength(2)
    }))

  test('that waits for the load of another has a link to it', () =>
    unlessStalled(async () => {
      const asked = Promise.withResolvers<void>()
      const answer = Promise.withResolvers<void>()
      intercept = (request, response) => {
        if (request.url !== '/products/3') return false
        asked.resolve()
        void answer.promise.then(() => response.end(product(3)))
        return true
      }
      const caller = await warmCaller()
      const [first, second] = [callersTrace(), callersTrace()]
      const reads = [caller.call('getItem', { id: '3' }, { metadata: first.metadata })]
      await asked.promise
      reads.push(caller.call('getItem', { id: '3' }, { metadata: second.metadata }))
      await expect.poll(() => service.app.metrics.openCalls).toBe(2)
      answer.resolve()
      await Promise.all(reads)
      intercept = undefined

      const load = only(await spansOf(first.traceId, called('GetItem'), 'load'), 'load')
      const spans = await spansOf(second.traceId, called('GetItem'))
      const rpc = only(spans, called('GetItem'))
      expect(eventsOf(rpc)).toEqual(['coalesced'])
      expect(rpc.links).toEqual([{ traceId: first.traceId, spanId: load.spanId }])
      expect(childrenOf(spans, rpc)).toEqual(['memory'])
    }))

  test('that fails shows which tier has failed, and how', async () => {
    intercept = (request, response) => {
      if (request.url !== '/products/4') return false
      response.writeHead(503).end()
      return true
    }
    const caller = await warmCaller()
    const { traceId, metadata } = callersTrace()
    await caller.failure('getItem', { id: '4' }, { metadata })
    intercept = undefined

    const spans = await spansOf(traceId, called('GetItem'), 'load')
    const rpc = only(spans, called('GetItem'))
    expect(rpc).toMatchObject({
      status: ERROR,
      attributes: { 'rpc.response.status_code': 'UNAVAILABLE', 'error.type': 'ORIGIN_STATUS' },
    })
    expect(only(spans, 'load').status).toBe(ERROR)
    const origin = only(spans, 'GET /products/{id}')
    expect(origin).toMatchObject({
      status: ERROR,
      attributes: {
        'http.response.status_code': 503,
        'http.request.resend_count': 2,
        'error.type': 'ORIGIN_STATUS',
      },
    })
    expect(eventsOf(origin)).toEqual(['retry', 'retry'])
    expect(spans.filter(({ status }) => status === ERROR)).toHaveLength(3)
  })

  test('of an item that does not exist is no failure', async () => {
    const caller = newCaller(service)
    const { traceId, metadata } = callersTrace()
    await caller.failure('getItem', { id: 'absent' }, { metadata })
    const spans = await spansOf(traceId, called('GetItem'), 'load')
    expect(spans.filter(({ status }) => status === ERROR)).toEqual([])
    expect(only(spans, called('GetItem')).attributes).toMatchObject({
      'rpc.response.status_code': 'NOT_FOUND',
    })
  })

  test('goes on at the origin, which is told of the span that asks it', async () => {
    const told: unknown[] = []
    intercept = (request) => {
      if (request.url === '/products/5') told.push(request.headers['traceparent'])
      return false
    }
    const { traceId, metadata } = callersTrace()
    await newCaller(service).call('getItem', { id: '5' }, { metadata })
    const unsampled = callersTrace(false)
    await newCaller(service).call('getItem', { id: '5' }, { metadata: unsampled.metadata })
    intercept = undefined

    const { spanId } = only(await spansOf(traceId, 'GET /products/{id}'), 'GET /products/{id}')
    expect(told[0]).toBe(`00-${traceId}-${spanId}-01`)
    // Whoever does not sample a trace wants nobody to.
    expect(told[1]).toMatch(new RegExp(`^00-${unsampled.traceId}-[0-9a-f]{16}-00$`))
  })

  test('of many items is bounded', async () => {
    const caller = newCaller(service)
    const ids = Array.from({ length: 80 }, (_, i) => String(1000 + i))
    const { traceId, metadata } = callersTrace()
    await caller.call('batchGetItems', { ids }, { metadata, timeoutMs: 45_000 })

    const spans = await spansOf(traceId, called('BatchGetItems'), 'load', 'SELECT invalidations')
    const rpc = only(spans, called('BatchGetItems'))
    expect(rpc.attributes).toMatchObject({ 'itemcache.memory.hits': 0, 'itemcache.memory.misses': 80 })
    const load = only(spans, 'load')
    expect(only(spans, 'EVALSHA read_copies').attributes['db.operation.batch.size']).toBe(80)
    // Each of the 80 is asked of the origin by itself.
    expect(childrenOf(spans, load).length).toBe(64)
  })

  test('that is not sampled by its caller is sent to nobody', async () => {
    const caller = newCaller(service)
    const unsampled = callersTrace(false)
    await caller.call('getItem', { id: '6' }, { metadata: unsampled.metadata })
    const { traceId, metadata } = callersTrace()
    await caller.call('getItem', { id: '6' }, { metadata })
    await spansOf(traceId, called('GetItem'))
    expect(collector.trace(unsampled.traceId)).toEqual([])
  })

  test('begins here when the caller has none, or sends nonsense', async () => {
    const caller = newCaller(service)
    await caller.call('getItem', { id: '7' }, { metadata: { traceparent: '00-zz-zz-01' } })
    await expect
      .poll(() => collector.spans.find(({ attributes }) => attributes['itemcache.tenant'] === caller.tenant))
      .toMatchObject({ parentSpanId: '', name: called('GetItem') })
  })
})

describe('what is not a read', () => {
  test('a write shows its statement, and what is put into Redis', async () => {
    const caller = newCaller(service)
    const { traceId, metadata } = callersTrace()
    await caller.call('createItem', { item: { id: 'new', title: 'new' } }, { metadata })
    const spans = await spansOf(traceId, called('CreateItem'), 'INSERT items', 'EVALSHA store_copies')
    const rpc = only(spans, called('CreateItem'))
    expect(childrenOf(spans, rpc)).toEqual(['SELECT invalidations', 'INSERT items', 'EVALSHA store_copies'])
  })

  test('rows of the log that are applied are a trace of their own', async () => {
    const caller = newCaller(service)
    await caller.call('createItem', { item: { id: 'new', title: 'new' } })
    await expect
      .poll(() => collector.spans.find(({ name }) => name === 'invalidations'))
      .toMatchObject({ parentSpanId: '', attributes: { 'itemcache.log.rows': expect.any(Number) } })
  })

  test('a refresh behind a stale answer is a trace of its own, with a link to the call', () =>
    unlessStalled(async () => {
      const caller = newCaller(service)
      await caller.call('getItem', { id: '8' })
      await caller.call('invalidateItems', { target: { case: 'ids', value: { ids: ['8'] } } })
      const { traceId, metadata } = callersTrace()
      await caller.call('getItem', { id: '8' }, { metadata })

      const spans = await spansOf(traceId, called('GetItem'))
      const rpc = only(spans, called('GetItem'))
      expect(rpc.events).toContainEqual({
        name: 'stale',
        attributes: { 'itemcache.stale_reason': 'REVALIDATING' },
      })
      const ofCaller = ({ name, attributes }: ReceivedSpan) =>
        name === 'refresh' && attributes['itemcache.tenant'] === caller.tenant
      await expect.poll(() => collector.spans.filter(ofCaller)).toHaveLength(1)
      const [refresh] = collector.spans.filter(ofCaller)
      expect(refresh?.links).toEqual([{ traceId, spanId: rpc.spanId }])
      expect(refresh?.parentSpanId).toBe('')
      expect(collector.trace(refresh?.traceId ?? '').map(({ name }) => name)).toContain('SELECT items')
    }))

  test('a stream is one span, however much goes through it', () =>
    unlessStalled(async () => {
      await service.client.call('getItem', { id: '10' })
      const { traceId, metadata } = callersTrace()
      const sent = new Metadata()
      sent.set('traceparent', metadata.traceparent)
      const stream = service.client.raw.makeBidiStreamRequest(
        `/${called('StreamItems')}`,
        (id: string) =>
          Buffer.from(toBinary(StreamItemsRequestSchema, create(StreamItemsRequestSchema, { id }))),
        (bytes: Buffer) => bytes,
        sent,
      )
      for (let i = 0; i < 300; i++) stream.write('10')
      stream.end()
      let answers = 0
      for await (const _ of stream) answers++
      expect(answers).toBe(300)

      const spans = await spansOf(traceId, called('StreamItems'))
      expect(spans).toHaveLength(1)
      expect(spans[0]?.events).toEqual([])
      expect(spans[0]?.attributes).toMatchObject({
        'itemcache.memory.hits': 300,
        'itemcache.memory.misses': 0,
      })
    }))
})

test('the line of a call has the ids of its span', async () => {
  const { traceId, metadata } = callersTrace()
  const caller = newCaller(service)
  await caller.call('getItem', { id: '9' }, { metadata })
  const rpc = only(await spansOf(traceId, called('GetItem')), called('GetItem'))
  const line = lines.map((one) => JSON.parse(one)).find((one) => one.trace_id === traceId)
  expect(line).toMatchObject({
    msg: 'request',
    span_id: rpc.spanId,
    tenant: caller.tenant,
    method: called('GetItem'),
    id: '9',
    cache_hit: false,
    tier: 'origin',
    outcome: 'MISS',
    code: 'OK',
    duration_ms: expect.any(Number),
  })
})

test('PostgreSQL is told of the trace, and when it is over', async () => {
  await using database = await freshDatabase()
  await using tier = await connectPostgres({ url: database.url, maxConnections: 1 })
  const admin = new Client({ connectionString: database.superuserUrl })
  await admin.connect()
  const names = async () => {
    const { rows } = await admin.query<{ application_name: string }>(
      `SELECT application_name FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'itemcache%'`,
    )
    return rows.map(({ application_name }) => application_name)
  }
  const span = { headers: () => ({}), note: () => {}, event: () => {} }
  const traceparent = '00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01'
  try {
    await tier.read('t', ['1'], undefined, { ...span, traceparent })
    expect(await names()).toEqual(['itemcache 4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7'])
    // Not sampled: nobody could find it.
    await tier.read('t', ['1'], undefined, { ...span, traceparent: undefined })
    expect(await names()).toEqual(['itemcache'])
    expect(tier.stats.connections.read.total).toBe(1)
  } finally {
    await admin.end()
  }
})

describe('the collector', () => {
  test.each([
    ['http/json', startCollector, 'application/json'],
    ['grpc', startGrpcCollector, 'application/grpc'],
  ])('may speak %s', async (protocol, start, contentType) => {
    await using other = await start()
    await using traced = await startTraced(other, { env: { OTEL_EXPORTER_OTLP_PROTOCOL: protocol } })
    await traced.client.call('getItem', { id: '1' })
    await expect.poll(() => other.spans.map(({ name }) => name)).toContain(called('GetItem'))
    expect([...other.contentTypes]).toEqual([contentType])
  })

  test('gets the last spans when the service stops', () =>
    unlessStalled(async () => {
      await using other = await startCollector()
      const traced = await startTraced(other, { env: { OTEL_BSP_SCHEDULE_DELAY: '3600000' } })
      await traced.client.call('getItem', { id: '1' })
      expect(other.spans).toEqual([])
      await traced[Symbol.asyncDispose]()
      expect(other.spans.map(({ name }) => name)).toEqual(
        expect.arrayContaining([called('GetItem'), 'load', 'SELECT items', 'EVALSHA store_copies']),
      )
    }))

  test('may be away: calls are answered, and what it misses is bounded', async () => {
    const gate = Promise.withResolvers<void>()
    await using other = await startCollector(gate.promise)
    const env = {
      OTEL_BSP_MAX_QUEUE_SIZE: '100',
      OTEL_BSP_MAX_EXPORT_BATCH_SIZE: '10',
      OTEL_EXPORTER_OTLP_TIMEOUT: '600000',
      OTEL_BSP_EXPORT_TIMEOUT: '600000',
    }
    await using traced = await startTraced(other, { env })
    for (let i = 0; i < 150; i++) await traced.client.call('getItem', { id: '1' })
    gate.resolve()
    // One batch was on its way, and the queue was full.
    await expect.poll(() => other.spans.length).toBeGreaterThanOrEqual(100)
    await traced[Symbol.asyncDispose]()
    expect(other.spans.length).toBeLessThanOrEqual(110)
  })

  test('that never answers holds up no stop', async () => {
    await using other = await startCollector(new Promise(() => {}))
    const env = { OTEL_EXPORTER_OTLP_TIMEOUT: '600000', OTEL_BSP_EXPORT_TIMEOUT: '600000' }
    const traced = await startTraced(other, { env })
    await traced.client.call('getItem', { id: '1' })
    await traced[Symbol.asyncDispose]()
  })

  test('that refuses connections costs no call', async () => {
    const other = await startCollector()
    await other[Symbol.asyncDispose]()
    await using traced = await startTraced(other)
    for (let i = 0; i < 20; i++) await traced.client.call('getItem', { id: '1' })
  })
})

describe('sampling', () => {
  test('is what OTEL_TRACES_SAMPLER says, for traces that begin here', async () => {
    await using other = await startCollector()
    const env = { OTEL_TRACES_SAMPLER: 'parentbased_traceidratio', OTEL_TRACES_SAMPLER_ARG: '0' }
    const traced = await startTraced(other, { env })
    const { traceId, metadata } = callersTrace()
    await traced.client.call('getItem', { id: '1' })
    await traced.client.call('getItem', { id: '1' }, { metadata })
    await expect.poll(() => other.trace(traceId).map(({ name }) => name)).toContain(called('GetItem'))
    await traced[Symbol.asyncDispose]()
    expect(new Set(other.spans.map((span) => span.traceId))).toEqual(new Set([traceId]))
  })
})

const product = (id: number) => JSON.stringify({ id, title: 'slow', price: 1, category: 'c' })
