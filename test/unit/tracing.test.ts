import { readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { SpanKind } from '@opentelemetry/api'
import { W3CTraceContextPropagator } from '@opentelemetry/core'
import { InMemorySpanExporter, SimpleSpanProcessor, TracerProvider } from '@opentelemetry/sdk-trace'
import { describe, expect, test } from 'vitest'
import { parseConfig } from '../../src/config.ts'
import { ItemCacheError } from '../../src/errors.ts'
import { OPERATIONS, Tracing } from '../../src/observe/tracing.ts'
import { serverOf } from '../../src/observe/tracing-sdk.ts'

const METHOD = 'itemcache.v1.ItemCacheService/GetItem'

/** Tracing whose spans are there when they have ended. */
function inMemory() {
  const exporter = new InMemorySpanExporter()
  const provider = new TracerProvider({ spanProcessors: [new SimpleSpanProcessor({ exporter })] })
  const propagator = new W3CTraceContextPropagator()
  const tracing = new Tracing({
    tracer: provider.getTracer('test'),
    propagator,
    fields: propagator.fields(),
    tiers: {},
  })
  const call = (metadata: Record<string, string[]> = {}, peer = '127.0.0.1:5') =>
    tracing.call(METHOD, { metadata: { get: (name) => metadata[name] ?? [] }, getPeer: () => peer })
  return { tracing, call, ended: () => exporter.getFinishedSpans() }
}

const ENDING = {
  code: 'OK',
  tenant: 't',
  id: undefined,
  tier: undefined,
  outcome: undefined,
  reason: undefined,
}

describe('a trace', () => {
  test('keeps its children, events and links within bounds, however many there are', () => {
    const { call, ended } = inMemory()
    const rpc = call()
    const other = call()
    for (let i = 0; i < 1000; i++) {
      rpc.tier('redis.read', 1).end()
      rpc.event('hit')
      rpc.coalesced(other)
    }
    rpc.answered(ENDING)
    const spans = ended()
    expect(spans.filter(({ kind }) => kind === SpanKind.CLIENT)).toHaveLength(64)
    const [server] = spans.filter(({ kind }) => kind === SpanKind.SERVER)
    expect(server?.events).toHaveLength(32)
    expect(server?.links).toHaveLength(32)
  })

  test('passes its context on where a child is left out, and when it is over', () => {
    const { call } = inMemory()
    const rpc = call()
    for (let i = 0; i < 64; i++) rpc.tier('redis.read', 1)
    const left = rpc.tier('origin.fetch', 1)
    rpc.answered(ENDING)
    expect(left.headers()).toEqual({ traceparent: rpc.traceparent })
  })

  test('has one load for flights that are under way together, which ends with the last of them', () => {
    const { call, ended } = inMemory()
    const rpc = call()
    const [first, second] = [rpc.load('cached'), rpc.load('cached')]
    expect(second).toBe(first)
    first.end()
    expect(ended()).toEqual([])
    second.end()
    expect(ended().map(({ name }) => name)).toEqual(['load'])
    expect(rpc.load('direct')).not.toBe(first)
  })

  test('notes nothing after its end', () => {
    const { call, ended } = inMemory()
    const rpc = call()
    rpc.answered(ENDING)
    rpc.event('hit')
    rpc.fail(new Error('late'))
    rpc.end()
    expect(ended()).toHaveLength(1)
    expect(ended()[0]).toMatchObject({ events: [], status: { code: 0 } })
  })

  test('tells of a failure what callers may know, and nothing of what a driver says', () => {
    const { call, ended } = inMemory()
    const cause = new Error('password hunter2 is wrong')
    const known = call().tier('postgres.read', 1)
    known.fail(new ItemCacheError('unavailable', 'PostgreSQL does not answer', { cause }))
    known.end()
    const unknown = call().tier('postgres.read', 1)
    unknown.fail(cause)
    unknown.end()
    expect(ended().map(({ attributes, status }) => [attributes['error.type'], status])).toEqual([
      ['UNAVAILABLE', { code: 2, message: 'PostgreSQL does not answer' }],
      ['Error', { code: 2 }],
    ])
  })

  test('is not the fault of a tier when nobody waits any more', () => {
    const { call, ended } = inMemory()
    const span = call().tier('postgres.read', 1)
    span.fail(new ItemCacheError('cancelled', 'nobody waits for the load any more'))
    span.end()
    expect(ended()[0]?.status.code).toBe(0)
  })

  test.each([
    ['10.0.0.1:5', '10.0.0.1'],
    ['::1:5', '::1'],
    ['[::1]:5', '::1'],
    ['ipv6:[::1]:5', '::1'],
    ['unknown', undefined],
    ['/run/socket', undefined],
  ])('knows the address of a peer like %s', (peer, address) => {
    const { call, ended } = inMemory()
    call({}, peer).answered(ENDING)
    expect(ended()[0]?.attributes['client.address']).toBe(address)
  })

  test.each([
    ['no context', {}],
    ['nonsense', { traceparent: ['00-1-2-3'] }],
    ['two contexts', { traceparent: Array(2).fill(`00-${'a'.repeat(32)}-${'b'.repeat(16)}-01`) }],
  ])('begins here when the caller sends %s', (_, metadata) => {
    const { call, ended } = inMemory()
    call(metadata).answered(ENDING)
    expect(ended()[0]?.parentSpanContext).toBeUndefined()
  })
})

describe('tracing', () => {
  const ENDPOINT = { OTEL_EXPORTER_OTLP_ENDPOINT: 'http://collector:4318' }

  test.each([
    ['nothing is set', {}],
    ['only the service is named', { OTEL_SERVICE_NAME: 'cache', OTEL_RESOURCE_ATTRIBUTES: 'a=b' }],
    ['the endpoint is empty', { OTEL_EXPORTER_OTLP_ENDPOINT: ' ' }],
    ['the SDK is disabled', { ...ENDPOINT, OTEL_SDK_DISABLED: 'TRUE' }],
    ['the exporter is none', { ...ENDPOINT, OTEL_TRACES_EXPORTER: 'none' }],
  ])('is off when %s', (_, env) => {
    expect(parseConfig(env).tracing).toBeUndefined()
  })

  test.each([
    ENDPOINT,
    { OTEL_EXPORTER_OTLP_TRACES_ENDPOINT: 'http://collector:4318/v1/traces' },
    { OTEL_TRACES_EXPORTER: 'otlp', OTEL_SDK_DISABLED: 'false' },
  ])('is on with %j', (env) => {
    expect(parseConfig({ ...env, PATH: '/bin' }).tracing).toEqual(env)
  })

  test('that is off loads nothing of OpenTelemetry', () => {
    const seen = new Set<string>()
    const loaded = new Set<string>()
    const load = (file: string) => {
      if (seen.has(file)) return
      seen.add(file)
      const source = readFileSync(file, 'utf8')
      for (const [, type, from = ''] of source.matchAll(
        /^(?:import|export)( type)? [^'"()]*?from '([^']+)'/gms,
      )) {
        if (type !== undefined) continue
        if (from.startsWith('.')) load(join(dirname(file), from))
        else loaded.add(from)
      }
    }
    load('src/main.ts')
    expect(seen).toContain('src/tiers/postgres.ts')
    expect(loaded).toContain('pg')
    expect([...loaded].filter((name) => name.startsWith('@opentelemetry/'))).toEqual([])
  })
})

test('docs/tracing.md names every span, event and attribute', () => {
  const page = readFileSync('docs/tracing.md', 'utf8')
  const sources = [
    'src/observe/tracing.ts',
    'src/observe/tracing-sdk.ts',
    'src/service/walk.ts',
    'src/service/read.ts',
    'src/service/load.ts',
    'src/service/stampede.ts',
    'src/tiers/origin.ts',
  ].map((file) => readFileSync(file, 'utf8'))
  const found = (pattern: RegExp) =>
    sources.flatMap((source) => [...source.matchAll(pattern)].map(([, name = '']) => name))
  const attributes = found(/'((?:itemcache|rpc|db|http|url|server|client|network|error)\.[a-z_.]+)'/g)
  const events = found(/\.event\('([a-z]+)'/g)
  expect(new Set(attributes).size).toBeGreaterThan(25)
  expect(new Set(events).size).toBeGreaterThan(5)
  const spans = Object.values(OPERATIONS).map(({ name }) => name)
  for (const name of [...attributes, ...events, ...spans]) expect(page).toContain(`\`${name}\``)
})

test.each([
  [
    'postgres://user:hunter2@db:5433/shop',
    { 'server.address': 'db', 'server.port': 5433, 'db.namespace': 'shop' },
  ],
  ['postgres://user@localhost/shop?host=/run/pg', { 'server.address': '/run/pg', 'db.namespace': 'shop' }],
  ['socket:/run/pg?db=shop', { 'server.address': '/run/pg', 'db.namespace': 'shop' }],
  ['redis://:hunter2@a:6379,redis://:hunter2@b:6379', { 'server.address': 'a', 'server.port': 6379 }],
  ['unix:/run/redis.sock', { 'server.address': '/run/redis.sock' }],
  ['https://fakestoreapi.com', { 'server.address': 'fakestoreapi.com' }],
  [undefined, {}],
])('of %s spans tell where the server is, and no password', (url, attributes) => {
  expect(serverOf(url)).toEqual(attributes)
})
