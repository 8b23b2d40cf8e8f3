import type { MessageInitShape } from '@bufbuild/protobuf'
import { type ServiceError, status } from '@grpc/grpc-js'
import pg from 'pg'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import {
  CacheOutcome,
  InvalidationKind,
  InvalidationMode,
  type WatchInvalidationsRequestSchema,
  type WatchInvalidationsResponse,
} from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { failureOf, startService, type TestService } from '../support/service.ts'
import { unlessStalled } from '../support/stalls.ts'

type Watch = MessageInitShape<typeof WatchInvalidationsRequestSchema>
type Event = WatchInvalidationsResponse['event']

/** Reads a stream message by message; heartbeats are passed over unless asked for. */
class Watcher implements AsyncDisposable {
  readonly #stream: AsyncGenerator<WatchInvalidationsResponse>

  constructor(service: TestService, request: Watch = {}, tenant = 'default') {
    this.#stream = service.client.stream('watchInvalidations', request, {
      metadata: { 'x-tenant-id': tenant },
    })
  }

  async next({ heartbeats = false } = {}): Promise<Event> {
    for (;;) {
      const { value, done } = await this.#stream.next()
      if (done) throw new Error('the stream has ended')
      if (heartbeats || value.event.case !== 'heartbeat') return value.event
    }
  }

  /** The next `count` events, of as many batches as they come in. */
  async events(count: number) {
    const events = []
    while (events.length < count) {
      const event = await this.next()
      if (event.case !== 'batch') throw new Error(`expected a batch, got ${event.case}`)
      events.push(...event.value.events)
    }
    return events
  }

  async started() {
    const event = await this.next()
    if (event.case !== 'started') throw new Error(`expected started, got ${event.case}`)
    return event.value
  }

  async [Symbol.asyncDispose]() {
    await this.#stream.return(undefined)
  }
}

const range = (from: bigint, count: number) => Array.from({ length: count }, (_, i) => from + BigInt(i))

describe('a stream of invalidations', () => {
  let a: TestService
  let b: TestService
  let tenants = 0
  const freshTenant = () => `watched-${++tenants}`
  const as = (tenant: string, more = {}) => ({ metadata: { 'x-tenant-id': tenant, ...more } })
  const put = (service: TestService, tenant: string, id: string, title: string, more = {}) =>
    service.client.call('updateItem', { item: { id, title }, allowMissing: true }, as(tenant, more))

  beforeAll(async () => {
    a = await startService()
    b = await startService({ databaseUrl: a.databaseUrl })
  })
  afterAll(async () => {
    await b?.[Symbol.asyncDispose]()
    await a?.[Symbol.asyncDispose]()
  })

  test('begins with its position, and brings every change of every instance and of psql in order, each once', async () => {
    const tenant = freshTenant()
    await using watcher = new Watcher(a, {}, tenant)
    const { position, heartbeatInterval } = await watcher.started()
    expect(heartbeatInterval).toMatchObject({ seconds: 0n, nanos: 500_000_000 })
    for (let i = 0; i < 10; i++) await put(i % 2 ? a : b, tenant, `i${i}`, 'x')
    await psql(a, `INSERT INTO items (tenant, id, title, tags) VALUES ('${tenant}', 'by-hand', 'x', '{red}')`)
    await b.client.call('deleteItem', { id: 'i3' }, as(tenant))
    await a.client.call('invalidateItems', { target: { case: 'tags', value: { tags: ['red'] } } }, as(tenant))
    const events = await watcher.events(13)
    expect(events.map((event) => event.revision)).toEqual(range(position + 1n, 13))
    expect(events[10]).toMatchObject({ kind: InvalidationKind.UPSERTED, ids: ['by-hand'], tags: ['red'] })
    expect(events[11]).toMatchObject({ kind: InvalidationKind.DELETED, mode: InvalidationMode.REMOVE })
    expect(events[12]).toMatchObject({ kind: InvalidationKind.TAGS_INVALIDATED, tags: ['red'], ids: [] })
  })

  test('resumes exactly after a revision, on another instance', async () => {
    const tenant = freshTenant()
    const revisions: bigint[] = []
    for (let i = 0; i < 30; i++) revisions.push((await put(a, tenant, `i${i % 3}`, `${i}`)).revision)
    await using watcher = new Watcher(b, { resumeAfter: revisions[9] }, tenant)
    expect((await watcher.started()).position).toBe(revisions[9])
    const events = await watcher.events(20)
    expect(events.map((event) => event.revision)).toEqual(revisions.slice(10))
  })

  test('tells of a gap when the history is trimmed, and goes on after it', async () => {
    const tenant = freshTenant()
    const revisions: bigint[] = []
    for (let i = 0; i < 10; i++) revisions.push((await put(a, tenant, 'x', `${i}`)).revision)
    await psql(a, `DELETE FROM invalidations WHERE tenant = '${tenant}' AND revision <= ${revisions[5]}`)
    await using watcher = new Watcher(b, { resumeAfter: revisions[1] }, tenant)
    expect(await watcher.started()).toMatchObject({ oldestResumable: revisions[5] })
    expect(await watcher.next()).toMatchObject({
      case: 'gap',
      value: { after: revisions[1], through: revisions[5] },
    })
    expect((await watcher.events(4)).map((event) => event.revision)).toEqual(revisions.slice(6))
    expect(b.app.metrics.gapsSent).toBeGreaterThan(0)
  })

  test('that would resume ahead of the log is OUT_OF_RANGE', async () => {
    const tenant = freshTenant()
    const { revision } = await put(a, tenant, 'x', '1')
    await using watcher = new Watcher(a, { resumeAfter: revision + 1n }, tenant)
    const error = await watcher.next().catch((error: ServiceError) => failureOf(error))
    expect(error).toMatchObject({ code: status.OUT_OF_RANGE, info: { reason: 'REVISION_AHEAD_OF_LOG' } })
  })

  test('proves with heartbeats how far it has got', async () => {
    const tenant = freshTenant()
    await using watcher = new Watcher(a, { heartbeatInterval: { nanos: 100_000_000 } }, tenant)
    await watcher.started()
    const { revision } = await put(b, tenant, 'x', '1')
    await watcher.events(1)
    expect(await watcher.next({ heartbeats: true })).toMatchObject({ case: 'heartbeat', value: { revision } })
  })

  test('brings only what may concern the selected ids and tags', async () => {
    const tenant = freshTenant()
    await using watcher = new Watcher(a, { ids: ['mine'], tags: ['red'] }, tenant)
    await watcher.started()
    const write = (item: object) => a.client.call('createItem', { item }, as(tenant))
    await write({ id: 'other', title: 'x' })
    await write({ id: 'mine', title: 'x' })
    await write({ id: 'tagged', tags: ['red'] })
    await write({ id: 'sorted', category: 'red' })
    await write({ id: 'blue', tags: ['blue'] })
    await a.client.call('invalidateItems', { target: { case: 'all', value: true } }, as(tenant))
    const events = await watcher.events(4)
    expect(events.map((event) => event.ids)).toEqual([['mine'], ['tagged'], ['sorted'], []])
  })

  test('leaves out the watcher’s own writes when asked to', async () => {
    const tenant = freshTenant()
    await using watcher = new Watcher(a, { clientId: 'me', excludeOwnWrites: true }, tenant)
    await watcher.started()
    await put(a, tenant, 'x', '1', { 'x-client-id': 'me' })
    await put(b, tenant, 'y', '2', { 'x-client-id': 'you' })
    expect(await watcher.events(1)).toMatchObject([{ ids: ['y'], clientId: 'you' }])
  })

  test('carries the items when asked to', async () => {
    const tenant = freshTenant()
    await using watcher = new Watcher(a, { includeItems: true }, tenant)
    await watcher.started()
    await put(b, tenant, 'x', 'carried')
    expect(await watcher.events(1)).toMatchObject([{ items: [{ id: 'x', title: 'carried' }] }])
  })

  test('is sent no item twice in a batch, and nothing that its client could not take', async () => {
    const tenant = freshTenant()
    const { revision } = await put(a, tenant, 'small', '0')
    const description = 'x'.repeat(200_000)
    const update = `UPDATE items SET description = '${description}', rating_count = rating_count + 1
      WHERE tenant = '${tenant}' AND id = 'large'`
    await psql(
      a,
      `INSERT INTO items (tenant, id, rating_rate, rating_count) VALUES ('${tenant}', 'large', 1, 0)`,
    )
    for (let i = 0; i < 40; i++) await psql(a, update)
    await using watcher = new Watcher(a, { includeItems: true, resumeAfter: revision }, tenant)
    await watcher.started()
    const events = await watcher.events(41)
    const withItem = events.filter(({ items }) => items.length > 0)
    expect(withItem.at(-1)?.revision).toBe(events.at(-1)?.revision)
    expect(withItem.at(-1)?.items).toMatchObject([{ id: 'large', description, rating: { count: 40n } }])
    expect(withItem.length).toBeLessThan(10)
  })

  test('joins what happens within the batch delay', async () => {
    const tenant = freshTenant()
    await using watcher = new Watcher(a, { maxBatchDelay: { seconds: 1n } }, tenant)
    await watcher.started()
    const insert = (id: string) =>
      `BEGIN; INSERT INTO items (tenant, id) VALUES ('${tenant}', '${id}'); COMMIT;`
    await psql(a, ['x', 'y', 'z'].map(insert).join(' '))
    const batch = await watcher.next()
    expect(batch.case === 'batch' && batch.value.events.length).toBe(3)
  })

  test('shows a bulk change of 100,000 rows as 100 events', { timeout: 120_000 }, async () => {
    const tenant = freshTenant()
    await psql(
      a,
      `INSERT INTO items (tenant, id) SELECT '${tenant}', 'k' || n FROM generate_series(1, 100000) n`,
    )
    await using watcher = new Watcher(b, {}, tenant)
    const { position } = await watcher.started()
    await psql(a, `UPDATE items SET title = 'bulk' WHERE tenant = '${tenant}'`)
    const events = await watcher.events(100)
    expect(events.map((event) => event.revision)).toEqual(range(position + 1n, 100))
    expect(events.reduce((sum, event) => sum + event.ids.length, 0)).toBe(100_000)
  })

  test('refuses wrong bounds, naming each field', async () => {
    await using watcher = new Watcher(a, {
      heartbeatInterval: { nanos: 1 },
      maxBatchDelay: { seconds: 2n },
      excludeOwnWrites: true,
      ids: [''],
    })
    const error = await watcher.next().catch((error: ServiceError) => failureOf(error))
    expect(error).toMatchObject({ code: status.INVALID_ARGUMENT })
    expect((error as ReturnType<typeof failureOf>).badRequest?.fieldViolations).toHaveLength(4)
  })

  test('is refused as RESOURCE_EXHAUSTED when there are too many', async () => {
    await using service = await startService({
      databaseUrl: a.databaseUrl,
      env: { ITEMCACHE_MAX_WATCHERS: '2' },
    })
    await using one = new Watcher(service)
    await using two = new Watcher(service)
    await one.started()
    await two.started()
    await using three = new Watcher(service)
    const error = await three.next().catch((error: ServiceError) => failureOf(error))
    expect(error).toMatchObject({ code: status.RESOURCE_EXHAUSTED })
    expect(service.app.metrics.subscribers).toBe(2)
  })

  test('says that the server is draining, and where to resume', async () => {
    const service = await startService({ databaseUrl: a.databaseUrl })
    await using watcher = new Watcher(service)
    const { position } = await watcher.started()
    const stopped = service.app[Symbol.asyncDispose]()
    expect(await watcher.next()).toMatchObject({ case: 'draining', value: { position } })
    const error = await watcher.next().catch((error: ServiceError) => failureOf(error))
    expect(error).toMatchObject({ code: status.UNAVAILABLE, info: { reason: 'DRAINING' } })
    await stopped
    await service[Symbol.asyncDispose]()
  })

  test('begins with the first revision of a tenant that had none', async () => {
    const tenant = freshTenant()
    await using watcher = new Watcher(a, {}, tenant)
    await watcher.started()
    const { revision } = await put(b, tenant, 'x', 'first')
    expect(await watcher.events(1)).toMatchObject([{ revision }])
  })
})

describe('another instance', () => {
  let a: TestService
  let b: TestService
  const put = (service: TestService, id: string, title: string) =>
    service.client.call('updateItem', { item: { id, title }, allowMissing: true })
  const titleAt = async (service: TestService, id: string, minRevision = 0n) => {
    const { result } = await service.client.call('getItem', { id, options: { minRevision } })
    return result.case === 'item' ? result.value.title : undefined
  }

  beforeAll(async () => {
    a = await startService()
    b = await startService({ databaseUrl: a.databaseUrl })
  })
  afterAll(async () => {
    await b?.[Symbol.asyncDispose]()
    await a?.[Symbol.asyncDispose]()
  })

  test('that is given the revision of a write never answers with anything older', async () => {
    for (let i = 0; i < 200; i++) {
      const { revision } = await put(a, 'alternating', `${i}`)
      expect(await titleAt(b, 'alternating', revision)).toBe(`${i}`)
    }
  })

  test('sees a write, and a change made with psql, soon without being told', async () => {
    await put(a, 'soon', 'before')
    expect(await titleAt(b, 'soon')).toBe('before')
    await put(a, 'soon', 'after')
    await expect.poll(() => titleAt(b, 'soon')).toBe('after')
    await psql(a, `UPDATE items SET title = 'by hand' WHERE id = 'soon'`)
    await expect.poll(() => titleAt(b, 'soon')).toBe('by hand')
    await expect.poll(() => titleAt(a, 'soon')).toBe('by hand')
  })

  test('goes on serving from memory what a write of something else did not touch', async () => {
    await unlessStalled(async () => {
      await put(a, 'quiet', 'x')
      await titleAt(b, 'quiet')
      // A watcher is told of what its instance has applied.
      await using watcher = new Watcher(b)
      await watcher.started()
      const { revision } = await put(a, 'loud', '1')
      for (let told = 0n; told < revision; ) told = (await watcher.events(1)).at(-1)?.revision ?? told
      const { cache } = await b.client.call('getItem', { id: 'quiet', options: { minRevision: revision } })
      expect(cache).toMatchObject({ outcome: CacheOutcome.HIT })
    })
  })

  test('that has acknowledged an invalidation by tag serves no copy from before it', async () => {
    await a.client.call('createItem', { item: { id: 'tagged', title: 'x', tags: ['late'] } })
    await titleAt(b, 'tagged')
    await psql(a, `UPDATE items SET title = 'y', tags = '{late,more}' WHERE id = 'tagged'`)
    await b.client.call('invalidateItems', {
      target: { case: 'tags', value: { tags: ['more'] } },
      mode: InvalidationMode.REMOVE,
    })
    expect(await titleAt(b, 'tagged')).toBe('y')
  })
})

async function psql(service: TestService, sql: string): Promise<void> {
  const client = new pg.Client(service.databaseUrl)
  await client.connect()
  try {
    await client.query(sql)
  } finally {
    await client.end()
  }
}
