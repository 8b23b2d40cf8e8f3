import type { MessageInitShape } from '@bufbuild/protobuf'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import type {
  WatchInvalidationsRequestSchema,
  WatchInvalidationsResponse,
} from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { connectPostgres } from '../../src/tiers/postgres.ts'
import { startService, type TestService } from '../support/service.ts'
import { by, connectSql, draft, newTenant, openStore, type Store } from './postgres-fixture.ts'

const KEEP_ALL = { maxAgeMs: 3_600_000, maxRows: 1_000_000 }

describe('retention', () => {
  let store: Store
  const revisionsOf = async (tenant: string) =>
    (await store.sql('SELECT revision FROM invalidations WHERE tenant = $1 ORDER BY revision', [tenant])).map(
      (row) => Number(row['revision']),
    )
  const write = async (tenant: string, rows: number) => {
    for (let i = 0; i < rows; i++) {
      await store.sql('SELECT itemcache_invalidate($1, $2, $3, $4)', [
        tenant,
        'KEYS_INVALIDATED',
        'EXPIRE',
        ['x'],
      ])
    }
    return revisionsOf(tenant)
  }
  const age = (tenant: string, through: number) =>
    store.sql(
      `UPDATE invalidations SET committed_at = committed_at - interval '2 h' WHERE tenant = $1 AND revision <= $2`,
      [tenant, through],
    )

  beforeAll(async () => {
    store = await openStore()
  })
  afterAll(() => store?.[Symbol.asyncDispose]())

  test('keeps what is young and within the bound', async () => {
    const tenant = newTenant()
    const revisions = await write(tenant, 5)
    expect(await store.tier.trim({ ...KEEP_ALL, step: 10 })).toBe(0)
    expect(await revisionsOf(tenant)).toEqual(revisions)
  })

  test('drops rows that are too old, the oldest first, in steps', async () => {
    const tenant = newTenant()
    const revisions = await write(tenant, 7)
    await age(tenant, revisions[4] ?? 0)
    expect(await store.tier.trim({ ...KEEP_ALL, step: 2 })).toBe(2)
    expect(await revisionsOf(tenant)).toEqual(revisions.slice(2))
    expect(await store.tier.trim({ ...KEEP_ALL, step: 2 })).toBe(2)
    expect(await store.tier.trim({ ...KEEP_ALL, step: 2 })).toBe(1)
    expect(await store.tier.trim({ ...KEEP_ALL, step: 2 })).toBe(0)
    expect(await revisionsOf(tenant)).toEqual(revisions.slice(5))
  })

  test('drops rows beyond the number that is kept, of each tenant by itself', async () => {
    const [large, small] = [newTenant(), newTenant()]
    const revisions = await write(large, 9)
    const few = await write(small, 3)
    while ((await store.tier.trim({ ...KEEP_ALL, maxRows: 3, step: 4 })) > 0);
    expect(await revisionsOf(large)).toEqual(revisions.slice(6))
    expect(await revisionsOf(small)).toEqual(few)
  })

  test('never leaves a hole, even where the clock has jumped', async () => {
    const tenant = newTenant()
    const revisions = await write(tenant, 6)
    await store.sql(
      `UPDATE invalidations SET committed_at = committed_at - interval '2 h' WHERE tenant = $1 AND revision IN ($2, $3)`,
      [tenant, revisions[0], revisions[3]],
    )
    while ((await store.tier.trim({ ...KEEP_ALL, step: 10 })) > 0);
    expect(await revisionsOf(tenant)).toEqual(revisions.slice(4))
  })

  test('goes on with the revisions where they were when the whole log is gone', async () => {
    const tenant = newTenant()
    const revisions = await write(tenant, 3)
    const last = revisions[2] ?? 0
    await age(tenant, last)
    expect(await store.tier.trim({ ...KEEP_ALL, step: 10 })).toBe(3)
    expect(await store.tier.bounds(tenant)).toEqual({ revision: last, oldest: last + 1 })
    expect(await write(tenant, 1)).toEqual([last + 1])
  })

  test('forgets the outcomes of old request ids, in steps, and no younger ones', async () => {
    const tenant = newTenant()
    for (const id of ['a', 'b', 'c', 'd']) {
      await store.tier.create(by(tenant, { requestId: id, fingerprint: id }), id, draft())
    }
    await store.sql(
      `UPDATE requests SET created_at = created_at - interval '2 h' WHERE tenant = $1 AND request_id <> 'd'`,
      [tenant],
    )
    expect(await store.tier.trim({ ...KEEP_ALL, step: 2 })).toBe(2)
    expect(await store.tier.trim({ ...KEEP_ALL, step: 2 })).toBe(1)
    const left = await store.sql('SELECT request_id FROM requests WHERE tenant = $1', [tenant])
    expect(left).toEqual([{ request_id: 'd' }])
  })
})

describe('a watcher of a trimmed log', () => {
  let service: TestService
  beforeAll(async () => {
    // Trimmed by the service itself, as soon as it looks.
    service = await startService({
      env: { ITEMCACHE_LOG_RETENTION_ROWS: '1000', ITEMCACHE_RING_ROWS: '100' },
    })
  })
  afterAll(() => service?.[Symbol.asyncDispose]())

  type Watch = MessageInitShape<typeof WatchInvalidationsRequestSchema>
  const watch = (tenant: string, request: Watch) =>
    service.client.stream('watchInvalidations', request, { metadata: { 'x-tenant-id': tenant } })
  const next = async (stream: AsyncGenerator<WatchInvalidationsResponse>) => {
    const { value, done } = await stream.next()
    if (done) throw new Error('the stream has ended')
    return value.event
  }
  /** The stream tells of a gap; in several parts while the instance is still applying what came before the trim. */
  const gapBetween = async (
    stream: AsyncGenerator<WatchInvalidationsResponse>,
    after = 0n,
    through = 0n,
  ): Promise<void> => {
    for (let at = after; at < through; ) {
      const event = await next(stream)
      expect(event).toMatchObject({ case: 'gap', value: { after: at } })
      if (event.case === 'gap') at = event.value.through
      expect(at).toBeLessThanOrEqual(through)
    }
  }
  const put = (tenant: string) =>
    service.client.call(
      'updateItem',
      { item: { id: 'x', title: `${Math.random()}` }, allowMissing: true },
      { metadata: { 'x-tenant-id': tenant } },
    )

  test('that resumes before the oldest revision is told what is missing, and then gets the rest', async () => {
    await using store = await openStoreOf(service)
    const revisions: bigint[] = []
    for (let i = 0; i < 6; i++) revisions.push((await put('trimmed')).revision)
    while ((await store.tier.trim({ ...KEEP_ALL, maxRows: 2, step: 100 })) > 0);
    const stream = watch('trimmed', { resumeAfter: revisions[0] })
    expect(await next(stream)).toMatchObject({
      case: 'started',
      value: { position: revisions[0], oldestResumable: revisions[3] },
    })
    await gapBetween(stream, revisions[0], revisions[3])
    const batch = await next(stream)
    expect(batch.case === 'batch' && batch.value.events.map(({ revision }) => revision)).toEqual(
      revisions.slice(4),
    )
    await stream.return(undefined)
  })

  test('that resumes when nothing is left is told of a gap up to the end of the log', async () => {
    await using store = await openStoreOf(service)
    const { revision: first } = await put('emptied')
    const { revision: last } = await put('emptied')
    await store.sql('DELETE FROM invalidations WHERE tenant = $1', ['emptied'])
    const stream = watch('emptied', { resumeAfter: first - 1n })
    expect(await next(stream)).toMatchObject({ case: 'started', value: { oldestResumable: last } })
    await gapBetween(stream, first - 1n, last)
    const { revision } = await put('emptied')
    const batch = await next(stream)
    expect(batch.case === 'batch' && batch.value.events.map((event) => event.revision)).toEqual([revision])
    await stream.return(undefined)
  })

  test('keeps its bookmark ahead of the trim by its heartbeats, although nothing that it selects happens', async () => {
    await using store = await openStoreOf(service)
    await put('idle')
    const stream = watch('idle', { ids: ['never-written'], heartbeatInterval: { nanos: 100_000_000 } })
    await next(stream)
    const { revision } = await put('idle')
    let bookmark = 0n
    while (bookmark < revision) {
      const event = await next(stream)
      expect(event.case).toBe('heartbeat')
      if (event.case === 'heartbeat') bookmark = event.value.revision
    }
    await stream.return(undefined)
    await store.sql('DELETE FROM invalidations WHERE tenant = $1', ['idle'])
    const resumed = watch('idle', { resumeAfter: bookmark, ids: ['x'] })
    expect(await next(resumed)).toMatchObject({ case: 'started', value: { oldestResumable: bookmark } })
    const { revision: newer } = await put('idle')
    expect(await next(resumed)).toMatchObject({
      case: 'batch',
      value: { events: [{ revision: newer, ids: ['x'] }] },
    })
    await resumed.return(undefined)
  })
})

/** The service's own database, seen from beside it. */
async function openStoreOf({ databaseUrl }: TestService) {
  const started = new AsyncDisposableStack()
  const tier = started.use(await connectPostgres({ url: databaseUrl }))
  const sql = started.use(await connectSql(databaseUrl))
  return { tier, sql, [Symbol.asyncDispose]: () => started.disposeAsync() }
}
