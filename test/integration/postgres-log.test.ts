/** What the database promises to everybody who changes items, through ItemCache or by hand. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { connectPostgres } from '../../src/tiers/postgres.ts'
import { freshDatabase } from '../support/servers.ts'
import {
  by,
  connectSql,
  draft,
  logOf,
  newTenant,
  openStore,
  revisionOf,
  type Sql,
  type Store,
  someoneWaits,
  TIMELINE,
} from './postgres-fixture.ts'

let store: Store
let sql: Sql

beforeAll(async () => {
  store = await openStore()
  sql = store.sql
})

afterAll(() => store[Symbol.asyncDispose]())

const upserted = { kind: 'UPSERTED', mode: 'EXPIRE', writer: '' }
const deleted = { kind: 'DELETED', mode: 'REMOVE', writer: '' }

describe('a change typed in psql', () => {
  test('takes a revision and leaves a log row, with nothing but tenant, id and title given', async () => {
    const tenant = newTenant()
    await sql('INSERT INTO items (tenant, id, title) VALUES ($1, $2, $3)', [tenant, '1', 'Lamp'])
    await sql('UPDATE items SET title = $2, category = $3 WHERE tenant = $1', [tenant, 'Desk lamp', 'light'])
    await sql('DELETE FROM items WHERE tenant = $1', [tenant])
    expect(await logOf(sql, tenant)).toEqual([
      { ...upserted, revision: 1, ids: ['1'], tags: [] },
      { ...upserted, revision: 2, ids: ['1'], tags: ['light'] },
      { ...deleted, revision: 3, ids: ['1'], tags: ['light'] },
    ])
    expect(await revisionOf(sql, tenant)).toBe(3)
  })

  test('gives the row its revision and update time', async () => {
    const tenant = newTenant()
    await sql(
      `INSERT INTO items (tenant, id, create_time, update_time, revision) VALUES ($1, 'x', '2001-01-01', '2001-01-01', 7)`,
      [tenant],
    )
    const [row] = await sql(
      `SELECT revision, update_time > now() - interval '1 minute' AS just_now, create_time < '2002-01-01' AS kept
        FROM items WHERE tenant = $1`,
      [tenant],
    )
    expect(row).toEqual({ revision: String(TIMELINE + 1), just_now: true, kept: true })
  })

  test('puts a revision right that was written by hand', async () => {
    const tenant = newTenant()
    await sql(`INSERT INTO items (tenant, id) VALUES ($1, 'x')`, [tenant])
    await sql('UPDATE items SET revision = 5 WHERE tenant = $1', [tenant])
    const [row] = await sql('SELECT revision FROM items WHERE tenant = $1', [tenant])
    expect(row).toEqual({ revision: String(TIMELINE + 2) })
  })

  test('makes an item of the origin a local one, unless it says otherwise', async () => {
    const tenant = newTenant()
    await store.tier.insertLoaded(tenant, new Map(['1', '2', '3'].map((id) => [id, draft()])))
    await sql(`UPDATE items SET title = 'by hand' WHERE tenant = $1 AND id < '3'`, [tenant])
    await sql(`UPDATE items SET title = 'given back', source = 'ORIGIN' WHERE tenant = $1 AND id = '2'`, [
      tenant,
    ])
    expect(await sql('SELECT id, source FROM items WHERE tenant = $1 ORDER BY id', [tenant])).toEqual([
      { id: '1', source: 'LOCAL' },
      { id: '2', source: 'ORIGIN' },
      { id: '3', source: 'ORIGIN' },
    ])
    expect(await revisionOf(sql, tenant)).toBe(3)
  })

  test('is logged whatever its search_path is', async () => {
    const tenant = newTenant()
    const other = await store.session()
    await other('CREATE SCHEMA IF NOT EXISTS elsewhere')
    await other('CREATE TABLE elsewhere.invalidations (nothing integer)')
    await other('SET search_path = elsewhere')
    await other(`INSERT INTO public.items (tenant, id) VALUES ($1, 'x')`, [tenant])
    expect(await logOf(sql, tenant)).toHaveLength(1)
  })

  test('is logged with session_replication_role = replica', async () => {
    const tenant = newTenant()
    const other = await store.superuser()
    await other('SET session_replication_role = replica')
    await other(`INSERT INTO items (tenant, id) VALUES ($1, 'x')`, [tenant])
    await other('DELETE FROM items WHERE tenant = $1', [tenant])
    expect((await logOf(sql, tenant)).map((row) => row.kind)).toEqual(['UPSERTED', 'DELETED'])
  })

  test('leaves nothing when it is rolled back, not even to a savepoint', async () => {
    const tenant = newTenant()
    const other = await store.session()
    await other(`BEGIN; INSERT INTO items (tenant, id) VALUES ('${tenant}', 'a'); SAVEPOINT s;
      INSERT INTO items (tenant, id) VALUES ('${tenant}', 'b'); ROLLBACK TO s;
      INSERT INTO items (tenant, id) VALUES ('${tenant}', 'c'); COMMIT`)
    expect((await logOf(sql, tenant)).map(({ revision, ids }) => [revision, ids])).toEqual([
      [1, ['a']],
      [2, ['c']],
    ])
    await other(`BEGIN; DELETE FROM items WHERE tenant = '${tenant}'; ROLLBACK`)
    expect(await revisionOf(sql, tenant)).toBe(2)
  })

  test('commits durably even where synchronous_commit is off, and keeps a stronger setting', async () => {
    const tenant = newTenant()
    const other = await store.session()
    const inEffect = async (setting: string) => {
      await other(`BEGIN; SET LOCAL synchronous_commit = ${setting}`)
      await other(`INSERT INTO items (tenant, id) VALUES ($1, $2)`, [tenant, setting])
      const [row] = await other('SHOW synchronous_commit')
      await other('ROLLBACK')
      return row?.['synchronous_commit']
    }
    expect(await inEffect('off')).toBe('on')
    expect(await inEffect('remote_write')).toBe('on')
    expect(await inEffect('remote_apply')).toBe('remote_apply')
  })

  test('names its writer when the setting itemcache.writer says who it is', async () => {
    const tenant = newTenant()
    await sql(`BEGIN; SET LOCAL itemcache.writer = 'import job';
      INSERT INTO items (tenant, id) VALUES ('${tenant}', 'a'); COMMIT;
      INSERT INTO items (tenant, id) VALUES ('${tenant}', 'b')`)
    expect((await logOf(sql, tenant)).map((row) => row.writer)).toEqual(['import job', ''])
  })

  test.each([
    [`id = ''`],
    [`id = 'line' || chr(10) || 'break'`],
    [`id = repeat('x', 129)`],
    [`tenant = ''`],
    [`tags = ARRAY['a', NULL]`],
    [`tags = ARRAY['']`],
    [`tags = ARRAY[repeat('x', 65)]`],
    [`tags = array_fill('x'::text, ARRAY[33])`],
    [`tags = ARRAY[ARRAY['a'], ARRAY['b']]`],
    [`category = repeat('x', 65)`],
    [`price_units = 5`],
    [`price_currency = 'EUR'`],
    [`price_nanos = 5`],
    [`price_currency = 'euro', price_units = 5`],
    [`price_currency = 'EUR', price_units = 5, price_nanos = -1`],
    [`price_currency = 'EUR', price_units = 5, price_nanos = 1000000000`],
    [`rating_rate = 4`],
    [`rating_rate = 'NaN', rating_count = 1`],
    [`rating_rate = 4, rating_count = -1`],
    [`attributes = '[1]'`],
    [`source = 'ELSEWHERE'`],
    [`create_time = 'infinity'`],
  ])('is refused when it breaks an item: %s', async (assignment) => {
    const tenant = newTenant()
    await sql(`INSERT INTO items (tenant, id) VALUES ($1, 'x')`, [tenant])
    await expect(sql(`UPDATE items SET ${assignment} WHERE tenant = $1`, [tenant])).rejects.toThrow(
      /violates (check|not-null) constraint/,
    )
  })

  test('cannot make a tenant start over', async () => {
    const tenant = newTenant()
    await sql(`INSERT INTO items (tenant, id) VALUES ($1, 'x')`, [tenant])
    const refusal = /a tenant is never deleted or renamed, and its revision never falls/
    await expect(sql('DELETE FROM tenants WHERE name = $1', [tenant])).rejects.toThrow(refusal)
    await expect(sql('UPDATE tenants SET revision = 1 WHERE name = $1', [tenant])).rejects.toThrow(refusal)
    await expect(sql(`UPDATE tenants SET name = 'else' WHERE name = $1`, [tenant])).rejects.toThrow(refusal)
    await expect(sql('TRUNCATE tenants')).rejects.toThrow(refusal)
  })
})

describe('a statement over many items', () => {
  test('a bulk UPDATE of 2,500 rows by psql makes three log rows with consecutive revisions', async () => {
    const tenant = newTenant()
    await sql(`INSERT INTO items (tenant, id) SELECT $1, g::text FROM generate_series(1, 2500) AS g`, [
      tenant,
    ])
    await sql(`UPDATE items SET title = 'new' WHERE tenant = $1`, [tenant])
    const log = await logOf(sql, tenant)
    expect(log.map(({ revision, ids }) => [revision, ids.length])).toEqual([
      [1, 1000],
      [2, 1000],
      [3, 500],
      [4, 1000],
      [5, 1000],
      [6, 500],
    ])
    expect(new Set(log.slice(3).flatMap(({ ids }) => ids)).size).toBe(2500)
    const wrong = await sql(
      `SELECT i.id FROM items i JOIN invalidations l ON l.tenant = i.tenant AND i.id = ANY (l.ids)
        WHERE i.tenant = $1 AND l.revision > $2 AND i.revision <> l.revision`,
      [tenant, TIMELINE + 3],
    )
    expect(wrong).toEqual([])
  })

  test('logs only the items that it changed', async () => {
    const tenant = newTenant()
    await sql(`INSERT INTO items (tenant, id) VALUES ($1, 'a'), ($1, 'b'), ($1, 'c')`, [tenant])
    await sql(`UPDATE items SET title = CASE id WHEN 'b' THEN 'new' ELSE title END WHERE tenant = $1`, [
      tenant,
    ])
    expect((await logOf(sql, tenant)).at(-1)).toEqual({ ...upserted, revision: 2, ids: ['b'], tags: [] })
  })

  test('gives each tenant its own revisions', async () => {
    const [first, second] = [newTenant(), newTenant()]
    await sql(`INSERT INTO items (tenant, id) VALUES ($1, 'a'), ($2, 'a'), ($1, 'b')`, [second, first])
    expect(await logOf(sql, first)).toEqual([{ ...upserted, revision: 1, ids: ['a'], tags: [] }])
    expect(await logOf(sql, second)).toEqual([{ ...upserted, revision: 1, ids: ['a', 'b'], tags: [] }])
  })

  test('logs deleted and changed items apart', async () => {
    const tenant = newTenant()
    await sql(`INSERT INTO items (tenant, id, tags) VALUES ($1, 'a', '{x}'), ($1, 'b', '{y}')`, [tenant])
    await sql(`UPDATE items SET title = 'new', deleted = id = 'a' WHERE tenant = $1`, [tenant])
    expect((await logOf(sql, tenant)).slice(1)).toEqual([
      { ...deleted, revision: 2, ids: ['a'], tags: ['x'] },
      { ...upserted, revision: 3, ids: ['b'], tags: ['y'] },
    ])
  })

  test('an item that one statement deletes and inserts again is not gone', async () => {
    const tenant = newTenant()
    await sql(`INSERT INTO items (tenant, id, tags) VALUES ($1, 'a', '{x,y}')`, [tenant])
    await sql(
      `WITH gone AS (DELETE FROM items WHERE tenant = $1 RETURNING *)
        INSERT INTO items (tenant, id, tags) SELECT tenant, id, '{y,z}' FROM gone`,
      [tenant],
    )
    expect((await logOf(sql, tenant)).map((row) => row.kind)).not.toContain('DELETED')
    for (const [tag, ids] of [
      ['x', []],
      ['y', ['a']],
      ['z', ['a']],
    ] as const) {
      const page = await store.tier.list(tenant, { category: '', tag, afterId: '', limit: 10 })
      expect(page.items.map((item) => item.id)).toEqual(ids)
    }
  })

  test('MERGE and ON CONFLICT DO UPDATE log what they did to each item', async () => {
    const tenant = newTenant()
    await sql(`INSERT INTO items (tenant, id) VALUES ($1, 'a'), ($1, 'b')`, [tenant])
    await sql(
      `INSERT INTO items (tenant, id, title) VALUES ($1, 'a', 'new'), ($1, 'c', 'new')
        ON CONFLICT (tenant, id) DO UPDATE SET title = excluded.title`,
      [tenant],
    )
    await sql(
      `MERGE INTO items i USING (VALUES ('b', false), ('c', true), ('d', true)) AS v (id, keep)
        ON i.tenant = $1 AND i.id = v.id
        WHEN MATCHED AND NOT keep THEN DELETE
        WHEN MATCHED THEN UPDATE SET title = 'merged'
        WHEN NOT MATCHED THEN INSERT (tenant, id) VALUES ($1, v.id)`,
      [tenant],
    )
    const log = (await logOf(sql, tenant)).slice(1).map(({ kind, ids }) => `${kind} ${ids}`)
    expect(log.slice(0, 2).sort()).toEqual(['UPSERTED a', 'UPSERTED c'])
    expect(log.slice(2).sort()).toEqual(['DELETED b', 'UPSERTED c', 'UPSERTED d'])
    expect(await revisionOf(sql, tenant)).toBe(6)
  })
})

describe('a statement that changes nothing', () => {
  test('writes no log row when ON CONFLICT DO NOTHING hits a conflict', async () => {
    const tenant = newTenant()
    await sql(`INSERT INTO items (tenant, id) VALUES ($1, 'a')`, [tenant])
    await sql(`INSERT INTO items (tenant, id) VALUES ($1, 'a') ON CONFLICT DO NOTHING`, [tenant])
    await sql(`INSERT INTO items (tenant, id) VALUES ($1, 'a'), ($1, 'b') ON CONFLICT DO NOTHING`, [tenant])
    expect((await logOf(sql, tenant)).map(({ revision, ids }) => [revision, ids])).toEqual([
      [1, ['a']],
      [2, ['b']],
    ])
  })

  test('writes nothing when an update sets what is there, or finds no row', async () => {
    const tenant = newTenant()
    await sql(`INSERT INTO items (tenant, id, title, attributes) VALUES ($1, 'a', 't', '{"x": 1}')`, [tenant])
    const before = await sql('SELECT * FROM items WHERE tenant = $1', [tenant])
    await sql(`UPDATE items SET title = 't', attributes = '{"x": 1.0}' WHERE tenant = $1`, [tenant])
    await sql(`UPDATE items SET title = 'x' WHERE tenant = $1 AND id = 'none'`, [tenant])
    await sql(`DELETE FROM items WHERE tenant = $1 AND id = 'none'`, [tenant])
    expect(await sql('SELECT * FROM items WHERE tenant = $1', [tenant])).toEqual(before)
    expect(await revisionOf(sql, tenant)).toBe(1)
  })

  test('creates no tenant', async () => {
    const tenant = newTenant()
    await sql(`UPDATE items SET title = 'x' WHERE tenant = $1`, [tenant])
    await sql('DELETE FROM items WHERE tenant = $1', [tenant])
    expect(await sql('SELECT * FROM tenants WHERE name = $1', [tenant])).toEqual([])
  })
})

describe('a changed key or tag', () => {
  test('changing a tag or the category logs the old and the new one', async () => {
    const tenant = newTenant()
    await sql(`INSERT INTO items (tenant, id, tags, category) VALUES ($1, 'a', '{old,kept}', 'was')`, [
      tenant,
    ])
    await sql(`UPDATE items SET tags = '{kept,new}', category = 'is' WHERE tenant = $1`, [tenant])
    expect((await logOf(sql, tenant)).at(-1)?.tags).toEqual(['is', 'kept', 'new', 'old', 'was'])
  })

  test('moving an item to another id or tenant invalidates both', async () => {
    const [from, to] = [newTenant(), newTenant()]
    await sql(`INSERT INTO items (tenant, id, tags) VALUES ($1, 'a', '{x}')`, [from])
    await sql(`UPDATE items SET id = 'b' WHERE tenant = $1`, [from])
    await sql('UPDATE items SET tenant = $2 WHERE tenant = $1', [from, to])
    expect(await logOf(sql, from)).toEqual([
      { ...upserted, revision: 1, ids: ['a'], tags: ['x'] },
      { ...deleted, revision: 2, ids: ['a'], tags: ['x'] },
      { ...upserted, revision: 3, ids: ['b'], tags: ['x'] },
      { ...deleted, revision: 4, ids: ['b'], tags: ['x'] },
    ])
    expect(await logOf(sql, to)).toEqual([{ ...upserted, revision: 1, ids: ['b'], tags: ['x'] }])
    const page = await store.tier.list(to, { category: '', tag: 'x', afterId: '', limit: 10 })
    expect(page.items.map((item) => item.revision)).toEqual([TIMELINE + 1])
  })
})

describe('TRUNCATE', () => {
  test('removes everything of every tenant that has ever held an item', async () => {
    await using own = await openStore()
    await own.sql(`INSERT INTO items (tenant, id, tags) VALUES ('a', '1', '{x}'), ('b', '1', '{x}')`)
    await own.sql(`DELETE FROM items WHERE tenant = 'b'`)
    await own.sql('TRUNCATE items')
    const all = { kind: 'TENANT_INVALIDATED', mode: 'REMOVE', ids: [], tags: [], writer: '' }
    expect((await logOf(own.sql, 'a')).at(-1)).toEqual({ ...all, revision: 2 })
    expect((await logOf(own.sql, 'b')).at(-1)).toEqual({ ...all, revision: 3 })
    expect(await own.sql('SELECT * FROM item_tags')).toEqual([])
    expect(await own.tier.read('a', ['1'])).toMatchObject(
      new Map([['1', { state: 'unknown', asOf: TIMELINE + 2 }]]),
    )
  })
})

describe('an explicit invalidation typed in psql', () => {
  test('takes one revision for each 1,000 keys', async () => {
    const tenant = newTenant()
    const keys = Array.from({ length: 2001 }, (_, n) => `k${n}`)
    const [row] = await sql(`SELECT itemcache_invalidate($1, 'KEYS_INVALIDATED', 'EXPIRE', $2) AS last`, [
      tenant,
      keys,
    ])
    expect(row).toEqual({ last: String(TIMELINE + 3) })
    const log = await logOf(sql, tenant)
    expect(log.map(({ ids }) => ids.length)).toEqual([1000, 1000, 1])
    expect(log.flatMap(({ ids }) => ids)).toEqual(keys)
  })

  test('is refused for a kind that only changes have, for no keys and for an unknown mode', async () => {
    const tenant = newTenant()
    for (const call of [
      `'UPSERTED', 'EXPIRE', '{a}'`,
      `'KEYS_INVALIDATED', 'EXPIRE'`,
      `'TENANT_INVALIDATED', 'X'`,
    ]) {
      await expect(sql(`SELECT itemcache_invalidate('${tenant}', ${call})`)).rejects.toThrow()
    }
    expect(await revisionOf(sql, tenant)).toBe(0)
  })
})

describe('listeners', () => {
  test('are told the tenant and a revision at COMMIT, but not of every one of commits that follow each other closely', async () => {
    const tenant = `${newTenant()} with spaces`
    const listener = await store.session()
    const heard: (string | undefined)[] = []
    let told = Promise.withResolvers<void>()
    listener.client.on('notification', ({ payload }) => {
      heard.push(payload)
      told.resolve()
    })
    await listener('LISTEN itemcache_invalidations')
    const invalidate = `SELECT itemcache_invalidate('${tenant}', 'TENANT_INVALIDATED', 'EXPIRE')`
    await sql(`BEGIN; INSERT INTO items (tenant, id) SELECT '${tenant}', g::text FROM generate_series(1, 1500) AS g;
      ${invalidate}; COMMIT`)
    await told.promise
    expect(heard[0]).toBe(`${TIMELINE + 2} ${tenant}`)
    const beganMs = performance.now()
    for (let i = 0; i < 20; i++) await sql(invalidate)
    await listener('SELECT')
    expect(heard.length).toBeLessThanOrEqual(3 + (performance.now() - beganMs) / 250)
    // What was told a second ago, or by a clock that has been set back, silences nobody.
    for (const age of ['1 s', '-1 h']) {
      told = Promise.withResolvers<void>()
      await sql(`UPDATE tenants SET notified_at = now() - interval '${age}', revision = revision + 1
        WHERE name = '${tenant}'`)
      await sql(invalidate)
      await told.promise
    }
  })
})

describe('concurrent writers', () => {
  test('revisions are gap-free in commit order under 8 concurrent writers', async () => {
    const tenant = newTenant()
    const tier = await store.open({ maxConnections: 16 })
    const seen: number[] = []
    let writing = true
    const watch = (async () => {
      while (writing) seen.push((await tier.read(tenant, ['none'])).get('none')?.asOf ?? 0)
    })()
    // A reader of the log must never see a revision without every smaller one: commit order.
    const holes = (async () => {
      const reader = await store.session()
      while (writing) {
        const [row] = await reader(
          `SELECT count(*) AS rows, coalesce(max(l.revision), 0) AS newest,
              coalesce((SELECT revision FROM tenants WHERE name = $1), 0) AS revision
            FROM invalidations l WHERE l.tenant = $1`,
          [tenant],
        )
        expect(row?.['newest']).toBe(row?.['revision'])
        expect(Number(row?.['rows'])).toBe(Math.max(0, Number(row?.['newest']) - TIMELINE))
      }
    })()
    const written = Promise.all(
      Array.from({ length: 8 }, async (_, writer) => {
        const revisions: number[] = []
        for (let n = 0; n < 25; n++) {
          const { revision } = await tier.update(
            by(tenant),
            `item-${(writer + n) % 5}`,
            { etag: '', allowMissing: true },
            () => draft({ title: `${writer}/${n}` }),
          )
          revisions.push(revision - TIMELINE)
        }
        return revisions
      }),
    ).finally(() => {
      writing = false
    })
    const [revisionsOfWriters] = await Promise.all([written, watch, holes])
    expect(revisionsOfWriters.flat().sort((a, b) => a - b)).toEqual(
      Array.from({ length: 200 }, (_, n) => n + 1),
    )
    for (const revisions of revisionsOfWriters) expect(revisions).toEqual(revisions.toSorted((a, b) => a - b))
    expect(seen).toEqual(seen.toSorted((a, b) => a - b))
  })

  test('a statement over two tenants in opposite orders from two sessions does not deadlock', async () => {
    const [a, b, c] = [newTenant(), newTenant(), newTenant()].sort() as [string, string, string]
    await sql(`INSERT INTO items (tenant, id) VALUES ($1, 'seed'), ($2, 'seed'), ($3, 'seed')`, [a, b, c])
    const [one, two] = [await store.session(), await store.session()]
    const insert = (session: Sql, id: string, order: readonly string[]) =>
      session(`INSERT INTO items (tenant, id) SELECT unnest($1::text[]), $2`, [order, id])
    for (let n = 0; n < 20; n++) {
      // Each session holds its new rows; both then want the three tenants.
      await Promise.all([insert(one, `one-${n}`, [a, b, c]), insert(two, `two-${n}`, [c, b, a])])
    }
    expect([await revisionOf(sql, a), await revisionOf(sql, b), await revisionOf(sql, c)]).toEqual([
      41, 41, 41,
    ])
  })

  test('a writer that waited for its tenant goes on from the revision that the other committed', async () => {
    const tenant = newTenant()
    await sql(`INSERT INTO items (tenant, id) VALUES ($1, 'a')`, [tenant])
    const other = await store.session()
    await other('BEGIN')
    await other(`INSERT INTO items (tenant, id) VALUES ($1, 'b')`, [tenant])
    const waiting = store.tier.create(by(tenant), 'c', draft())
    await someoneWaits(sql)
    await other('COMMIT')
    expect((await waiting).revision).toBe(TIMELINE + 3)
  })
})

describe('timelines', () => {
  test('revisions of a new timeline are greater than every one of the old', async () => {
    const { url, [Symbol.asyncDispose]: drop } = await freshDatabase()
    try {
      await using tier = await connectPostgres({ url })
      await using other = await connectSql(url)
      await tier.create(by('t'), 'a', draft())
      // The server's timeline is 1; as if it had been 3 before, and is 5 then.
      const pretend = (timeline: number) =>
        other(`CREATE OR REPLACE FUNCTION itemcache_timeline_start() RETURNS bigint LANGUAGE sql AS
          'SELECT ${timeline}::bigint << 40'`)
      await pretend(5)
      expect((await tier.read('t', ['a'])).get('a')).toMatchObject({
        asOf: 5 * TIMELINE,
        revision: TIMELINE + 1,
      })
      expect((await tier.read('new tenant', ['a'])).get('a')?.asOf).toBe(5 * TIMELINE)
      expect((await tier.create(by('t'), 'b', draft())).revision).toBe(5 * TIMELINE + 1)
    } finally {
      await drop()
    }
  })

  test('the answer of a server that a newer one has replaced is dropped', async () => {
    await using own = await openStore()
    const { tier, sql } = own
    const pretend = (timeline: number) =>
      sql(`CREATE OR REPLACE FUNCTION itemcache_timeline_start() RETURNS bigint LANGUAGE sql AS
        'SELECT ${timeline}::bigint << 40'`)
    await pretend(5)
    await tier.read('t', ['a'])
    await pretend(4)
    const old = { code: 'unavailable', reason: 'OLD_TIMELINE' }
    await expect(tier.read('t', ['a'])).rejects.toMatchObject(old)
    await expect(tier.create(by('t'), 'a', draft())).rejects.toMatchObject(old)
    await expect(tier.newest('t', { rows: 1, names: 1 })).rejects.toMatchObject(old)
    await pretend(5)
    expect((await tier.read('t', ['a'])).get('a')?.state).toBe('unknown')
  })

  test('a revision that a double cannot hold is refused rather than rounded', async () => {
    await using own = await openStore()
    await own.sql(`INSERT INTO tenants VALUES ('t', 1::bigint << 53)`)
    await expect(own.tier.read('t', ['a'])).rejects.toMatchObject({
      code: 'internal',
      reason: 'REVISION_TOO_LARGE',
    })
  })
})
