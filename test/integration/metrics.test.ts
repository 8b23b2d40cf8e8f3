/** What `/metrics` of a running service shows, and that docs/metrics.md names all of it and nothing else. */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { credentials, status } from '@grpc/grpc-js'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { newAuthority, temporaryFiles } from '../support/credentials.ts'
import { metricsAt, type Scrape } from '../support/scrape.ts'
import { freshPostgres, freshRedis } from '../support/servers.ts'
import { startService, TestClient, type TestService } from '../support/service.ts'

const SERVICE = 'itemcache.v1.ItemCacheService'

const scraped = ({ app }: TestService): Promise<Scrape> => metricsAt(`127.0.0.1:${app.admin?.port}`)

describe('the page of metrics', () => {
  const files = temporaryFiles()
  let service: TestService
  let client: TestClient
  let scrape: Scrape

  beforeAll(async () => {
    const authority = await newAuthority('one')
    const { cert, key } = await authority.issue('server')
    service = await startService({
      env: {
        ITEMCACHE_TLS_CERT: files.write('cert.pem', cert),
        ITEMCACHE_TLS_KEY: files.write('key.pem', key),
      },
    })
    client = new TestClient(
      service.address.replace('127.0.0.1', 'localhost'),
      credentials.createSsl(Buffer.from(authority.cert)),
    )
    await client.call('getItem', { id: '1' })
    scrape = await scraped(service)
  })
  afterAll(async () => {
    client?.[Symbol.dispose]()
    await service?.[Symbol.asyncDispose]()
    files[Symbol.dispose]()
  })

  const page = readFileSync(join(import.meta.dirname, '../../docs/metrics.md'), 'utf8')
  const documented = page.split('\n').flatMap((line) => {
    const [, name, type, labels = '', unit] =
      /^\| `(\w+)` \| (\w+) \| (.+?) \| ([^|]+) \| [^|]+ \|$/.exec(line) ?? []
    if (name === undefined) return []
    return [{ name, type, unit, labels: [...labels.matchAll(/`(\w+)`/g)].map(([, label]) => label) }]
  })
  // Only Linux tells them.
  const here = documented.filter(
    ({ name }) => process.platform === 'linux' || !/^process_(virtual|heap|open|max)_/.test(name),
  )

  test('has every metric of a running service, with its type, and no other', () => {
    const types = here.map(({ name, type }) => [name, type] as const)
    expect(Object.fromEntries(types)).toEqual(Object.fromEntries(scrape.types))
    expect(types).toHaveLength(scrape.types.size)
  })

  test('has the labels of every metric', () => {
    for (const { name, labels } of here) {
      const series = scrape.samples.filter((sample) => sample.metric === name)
      for (const sample of series) {
        const shown = Object.keys(sample.labels).filter((label) => label !== 'le')
        expect(shown.sort(), name).toEqual(labels.toSorted())
      }
      // Requests to the operating system and collections of garbage need not have been seen.
      if (!/^nodejs_(active|gc)_/.test(name)) expect(series, name).not.toEqual([])
    }
  })

  test('names seconds and bytes as units where the name does', () => {
    for (const { name, unit } of documented) {
      const [, suffix] = /_(seconds|bytes)(?:_total)?$/.exec(name) ?? []
      if (suffix !== undefined) expect(unit, name).toMatch(suffix)
    }
  })

  test('has as many buckets as gRPC’s own metrics, where they have them', () => {
    const bounds = (metric: string) =>
      new Set(scrape.samples.filter((s) => s.metric === metric).flatMap(({ labels }) => labels['le'] ?? []))
    expect(bounds('grpc_server_call_duration_seconds').size).toBe(42)
    expect([...bounds('grpc_server_call_sent_total_compressed_message_size_bytes')]).toEqual([
      ...['0', '1024', '2048', '4096', '16384', '65536', '262144', '1048576', '4194304', '16777216'],
      ...['67108864', '268435456', '1073741824', '4294967296', '+Inf'],
    ])
  })

  test('shows when the certificate ends', () => {
    const inDays =
      ((scrape.value('itemcache_tls_certificate_expiry_timestamp_seconds') ?? 0) - Date.now() / 1000) / 86_400
    expect(inDays).toBeGreaterThan(0.5)
  })
})

describe('metrics of calls', () => {
  let service: TestService
  beforeAll(async () => {
    service = await startService({
      env: { ITEMCACHE_METRICS_TENANTS: '2', ITEMCACHE_RATE_LIMIT: '1:3', REDIS_URL: 'off' },
    })
  })
  afterAll(() => service?.[Symbol.asyncDispose]())

  const as = (tenant: string) => ({ metadata: { 'x-tenant-id': tenant } })

  test('have the sizes of all messages of a call, and methods that there are not as one', async () => {
    const { client } = service
    const request = Buffer.from([10, 1, 0x31])
    const answer = await client.send('getItem', request, as('sizes'))
    await client.failure('getItem', { id: 'nobody' }, as('sizes'))
    await new Promise<void>((resolve) =>
      client.raw.makeUnaryRequest(
        '/nobody.v1.Knows/This',
        (value: Buffer) => value,
        (value: Buffer) => value,
        request,
        (error) => {
          expect(error?.code).toBe(status.UNIMPLEMENTED)
          resolve()
        },
      ),
    )
    const scrape = await scraped(service)
    const size = (direction: string, grpc_status: string) =>
      scrape.value(`grpc_server_call_${direction}_total_compressed_message_size_bytes_sum`, {
        grpc_method: `${SERVICE}/GetItem`,
        grpc_status,
      })
    expect(size('rcvd', 'OK')).toBe(3)
    expect(size('sent', 'OK')).toBe(answer.length)
    expect(size('rcvd', 'NOT_FOUND')).toBe(8)
    expect(size('sent', 'NOT_FOUND')).toBe(0)
    expect(scrape.value('grpc_server_call_started_total', { grpc_method: 'other' })).toBe(1)
    expect(
      scrape.value('grpc_server_call_duration_seconds_count', {
        grpc_method: 'other',
        grpc_status: 'UNIMPLEMENTED',
      }),
    ).toBe(1)
  })

  test('have the messages of streams in both directions', async () => {
    const stream = service.client.stream('watchMetrics', {}, as('sizes'))
    await stream.next()
    await stream.return(undefined)
    await expect
      .poll(async () =>
        (await scraped(service)).value('grpc_server_call_sent_total_compressed_message_size_bytes_sum', {
          grpc_method: `${SERVICE}/WatchMetrics`,
          grpc_status: 'CANCELLED',
        }),
      )
      .toBeGreaterThan(200)
  })

  test('count the first tenants by name, and all others as one', async () => {
    const { client } = service
    for (const tenant of ['b', 'c', 'd', 'other', 'other']) {
      await client.call('getItem', { id: '1' }, as(tenant))
    }
    const scrape = await scraped(service)
    const tenants = scrape.samples.filter(({ metric }) => metric === 'itemcache_tenant_calls_total')
    expect(tenants.map(({ labels }) => labels['tenant'])).toEqual(['sizes', 'b', 'other'])
    expect(scrape.value('itemcache_tenant_calls_total', { tenant: 'b' })).toBe(1)
    expect(scrape.value('itemcache_tenant_calls_total', { tenant: 'other' })).toBe(4)
  })

  test('count what is refused by its reason, and the rate limit by tenant', async () => {
    let refused = 0
    const calls = Array.from({ length: 200 }, () =>
      service.client.call('getItem', { id: '1' }, as('b')).catch((error) => {
        expect(error.code).toBe(status.RESOURCE_EXHAUSTED)
        refused++
      }),
    )
    await Promise.all(calls)
    expect(refused).toBeGreaterThan(0)
    const scrape = await scraped(service)
    expect(scrape.value('itemcache_refusals_total', { reason: 'rate_limited' })).toBe(refused)
    expect(scrape.value('itemcache_tenant_rate_limited_total', { tenant: 'b' })).toBe(refused)
  })
})

describe('metrics of Redis and PostgreSQL', () => {
  test('show what Redis says of itself, and that it is gone when it is killed', async () => {
    await using redis = await freshRedis()
    await using service = await startService({
      env: { REDIS_URL: redis.url, ITEMCACHE_BREAKER_CALLS: '5' },
    })
    const node = redis.url.replace('unix:', '')
    await service.client.call('getItem', { id: '1' })
    const before = await scraped(service)
    expect(before.value('itemcache_redis_connected_clients', { node })).toBe(1)
    expect(before.value('itemcache_redis_max_clients', { node })).toBeGreaterThan(100)
    expect(before.value('itemcache_redis_memory_used_bytes', { node })).toBeGreaterThan(100_000)
    expect(before.value('itemcache_redis_memory_max_bytes', { node })).toBe(256 * 1024 * 1024)
    expect(before.value('itemcache_redis_evicts', { node })).toBe(1)
    expect(before.value('itemcache_tier_up', { tier: 'redis' })).toBe(1)
    expect(before.value('itemcache_redis_round_trips_total')).toBeGreaterThan(0)
    expect(before.value('itemcache_postgres_connections_max', { pool: 'read' })).toBe(5)
    expect(before.value('itemcache_postgres_statements_total', { purpose: 'read' })).toBeGreaterThan(0)
    expect(before.value('itemcache_tier_breaker_state', { tier: 'redis', state: 'closed' })).toBe(1)
    expect(before.value('itemcache_ready')).toBe(1)

    await redis.kill()
    await expect
      .poll(async () => {
        // What memory does not know is asked of Redis.
        for (let i = 0; i < 10; i++) await service.client.failure('getItem', { id: `x${Math.random()}` })
        const scrape = await scraped(service)
        return {
          up: scrape.value('itemcache_tier_up', { tier: 'redis' }),
          clients: scrape.value('itemcache_redis_connected_clients', { node }),
          closed: scrape.value('itemcache_tier_breaker_state', { tier: 'redis', state: 'closed' }),
          opened: scrape.value('itemcache_tier_breaker_changes_total', { tier: 'redis', state: 'open' }) ?? 0,
        }
      })
      .toMatchObject({ up: 0, clients: undefined, closed: 0, opened: expect.toSatisfy((n) => n > 0) })
  })

  test('show that PostgreSQL does not answer, and for how long nothing was heard of the log', {
    timeout: 150_000,
  }, async () => {
    await using postgres = await freshPostgres()
    await using service = await startService({ databaseUrl: postgres.url })
    const seen = async () => {
      const scrape = await scraped(service)
      const age = scrape.value('itemcache_log_heard_age_seconds') ?? 0
      return { up: scrape.value('itemcache_tier_up', { tier: 'postgres' }), silent: age > 1.5 }
    }
    await service.client.call('getItem', { id: '1' })
    await expect.poll(seen, { timeout: 40_000 }).toEqual({ up: 1, silent: false })
    postgres.pause()
    await expect.poll(seen, { timeout: 40_000 }).toEqual({ up: 0, silent: true })
    postgres.resume()
    await expect.poll(seen, { timeout: 40_000 }).toEqual({ up: 1, silent: false })
  })
})
