/** Tenants in PostgreSQL: what keeps them apart when a statement does not. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { by, draft, logOf, newTenant, openStore, type Sql, type Store } from './postgres-fixture.ts'

const TABLES = ['tenants', 'items', 'item_tags', 'invalidations', 'requests']
const anyEtag = { etag: '', allowMissing: false }

let store: Store
let confined: Sql

beforeAll(async () => {
  store = await openStore()
  confined = await store.session()
})
afterAll(() => store?.[Symbol.asyncDispose]())

/** Two tenants with a row in every table. */
async function twoTenants() {
  const [mine, others] = [newTenant(), newTenant()]
  for (const tenant of [mine, others]) {
    await store.tier.create(by(tenant, { requestId: 'r', fingerprint: 'f' }), 'a', draft({ tags: ['t'] }))
  }
  await confined(`SELECT set_config('itemcache.tenant', $1, false)`, [mine])
  return { mine, others }
}

describe('a session that has said whose rows it wants', () => {
  test.each(TABLES)('sees no other tenant in %s, whatever it asks for', async (table) => {
    const { mine } = await twoTenants()
    const tenant = table === 'tenants' ? 'name' : 'tenant'
    expect(await confined(`SELECT DISTINCT ${tenant} AS tenant FROM ${table}`)).toEqual([{ tenant: mine }])
  })

  test('changes nothing of another tenant', async () => {
    const { others } = await twoTenants()
    expect(
      await confined(`UPDATE items SET title = 'mine now' WHERE tenant = $1 RETURNING 1`, [others]),
    ).toEqual([])
    expect(await confined('DELETE FROM items WHERE tenant = $1 RETURNING 1', [others])).toEqual([])
    await expect(confined(`INSERT INTO items (tenant, id) VALUES ($1, 'planted')`, [others])).rejects.toThrow(
      'row-level security',
    )
    await expect(
      confined(`SELECT itemcache_invalidate($1, 'TENANT_INVALIDATED', 'REMOVE')`, [others]),
    ).rejects.toThrow('row-level security')
    expect(await logOf(store.sql, others)).toHaveLength(1)
  })
})

test('the service is confined to the tenant that it asks for, on every connection', async () => {
  const own = await store.open({ maxConnections: 1, applicationName: 'one' })
  const { mine, others } = await twoTenants()
  for (const tenant of [mine, others, mine]) {
    const found = await own.read(tenant, ['a'])
    expect(found.get('a')?.state).toBe('present')
  }
  // A policy for this test alone tells what the sessions say of themselves.
  await store.sql(`CREATE TABLE seen (scope text)`)
  await store.sql(`CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN INSERT INTO seen VALUES (current_setting('itemcache.tenant')); RETURN NULL; END $$`)
  await store.sql(`CREATE TRIGGER tell AFTER INSERT OR UPDATE OR DELETE ON items
    FOR EACH STATEMENT EXECUTE FUNCTION tell()`)
  await own.update(by(mine), 'a', anyEtag, () => draft({ title: 'new' }))
  await own.delete(by(others), 'a', anyEtag)
  await own.insertLoaded(mine, new Map([['b', draft()]]))
  expect(await store.sql('SELECT DISTINCT scope FROM seen ORDER BY scope')).toEqual([
    { scope: mine },
    { scope: others },
  ])
  await store.sql('DROP TRIGGER tell ON items')
})

test('an answer from a session that was set to another tenant meanwhile is refused, not believed', async () => {
  const { mine, others } = await twoTenants()
  const own = await store.open({ maxConnections: 1 })
  await own.read(mine, ['a'])
  // As a pooler would that shares sessions by the transaction: somebody else's setting arrives in between.
  await store.sql(`CREATE OR REPLACE FUNCTION itemcache_timeline_start() RETURNS bigint LANGUAGE sql VOLATILE AS $$
    SELECT set_config('itemcache.tenant', '${others}', false);
    SELECT ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint << 40
  $$`)
  try {
    await own.read(mine, ['a']).catch(() => undefined)
    await expect(own.read(mine, ['a'])).rejects.toMatchObject({ reason: 'TENANT_MIXED_UP' })
  } finally {
    await store.sql(`CREATE OR REPLACE FUNCTION itemcache_timeline_start() RETURNS bigint LANGUAGE sql VOLATILE AS $$
      SELECT ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint << 40
    $$`)
  }
})

test('a session of the pool that has not said so sees nothing', async () => {
  await twoTenants()
  await confined(`SET itemcache.tenant = E'\\x01'`)
  for (const table of TABLES) expect(await confined(`SELECT 1 FROM ${table}`)).toEqual([])
})

test('the owner who types SQL without a setting sees and changes every tenant, and the log has it', async () => {
  const { mine, others } = await twoTenants()
  await store.sql(`UPDATE items SET title = 'typed' WHERE tenant IN ($1, $2)`, [mine, others])
  for (const tenant of [mine, others]) {
    expect((await logOf(store.sql, tenant)).map(({ kind }) => kind)).toEqual(['UPSERTED', 'UPSERTED'])
  }
  const pages = await store.tier.after(new Map([mine, others].map((tenant) => [tenant, 0])), {
    rows: 9,
    names: 99,
  })
  expect([...pages].map(([tenant, page]) => [tenant, page.rows.length])).toEqual([
    [mine, 2],
    [others, 2],
  ])
})

test('a page of a list still costs its own length', async () => {
  const tenant = newTenant()
  await store.sql(
    `INSERT INTO items (tenant, id) SELECT $1, to_char(n, '00000') FROM generate_series(1, 3000) AS n`,
    [tenant],
  )
  await confined(`SET enable_seqscan = off`)
  await confined(`SELECT set_config('itemcache.tenant', $1, false)`, [tenant])
  const plan = await confined(
    `EXPLAIN SELECT * FROM items WHERE tenant = '${tenant}' AND NOT deleted AND id > ' 02900' ORDER BY id LIMIT 50`,
  )
  const text = plan.map((row) => row['QUERY PLAN']).join('\n')
  // The id is in the condition of the index, not in a filter behind the policy.
  expect(text).toMatch(/Index Cond: .*id > ' 02900'/)
})
