/** What the PostgreSQL tier promises to the service. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { decodeItem } from '../../src/codec.ts'
import { etagOf, type ItemDraft, type ItemRecord, LIMITS } from '../../src/item.ts'
import type { PostgresTier } from '../../src/tiers/postgres.ts'
import type {
  InvalidationTarget,
  KnownWrite,
  ListQuery,
  Snapshot,
  WriteContext,
} from '../../src/tiers/tier.ts'
import {
  by,
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
let tier: PostgresTier
let sql: Sql

beforeAll(async () => {
  store = await openStore({ random: () => 0 })
  tier = store.tier
  sql = store.sql
})

afterAll(() => store[Symbol.asyncDispose]())

const anyEtag = { etag: '', allowMissing: false }
const orMissing = { etag: '', allowMissing: true }

const full: ItemDraft = {
  title: 'Lamp 💡',
  description: 'It shines.',
  category: 'light',
  imageUri: 'https://example.com/lamp.png',
  price: { currencyCode: 'EUR', units: -9_223_372_036_854_775_808n, nanos: -999_999_999 },
  rating: { rate: 4.7, count: 9_223_372_036_854_775_807n },
  tags: ['new', 'with "quotes", \\ and {braces}'],
  attributes: {
    watts: 7.5,
    tiny: 5e-324,
    huge: 1e308,
    nested: { list: [1, null, 'x', true, {}] },
    __proto_: '',
  },
}

function decoded(snapshot: Snapshot | undefined) {
  if (snapshot?.bytes === undefined) throw new Error(`the item is ${snapshot?.state}`)
  return decodeItem(snapshot.bytes)
}

async function readOne(tenant: string, id: string): Promise<Snapshot> {
  const snapshot = (await tier.read(tenant, [id])).get(id)
  if (snapshot === undefined) throw new Error('no entry')
  return snapshot
}

describe('reads', () => {
  test('an item comes back with everything that was written', async () => {
    const tenant = newTenant()
    const { snapshot, revision } = await tier.create(by(tenant), 'lamp', full)
    expect(snapshot).toEqual(await readOne(tenant, 'lamp'))
    expect(snapshot).toMatchObject({
      state: 'present',
      asOf: revision,
      revision,
      tags: [...full.tags, 'light'],
    })
    const item = decoded(snapshot)
    expect(item).toMatchObject({ ...full, id: 'lamp', source: 'LOCAL', revision })
    expect(item.createTimeMs).toBe(item.updateTimeMs)
    expect(Math.abs(Date.now() - item.createTimeMs)).toBeLessThan(60_000)
  })

  test('an item without any content comes back without any', async () => {
    const tenant = newTenant()
    const { snapshot } = await tier.create(by(tenant), 'x', draft({ title: '' }))
    expect(decoded(snapshot)).toMatchObject({ ...draft({ title: '' }), id: 'x' })
  })

  test('every id gets an entry of the same snapshot, in one statement', async () => {
    const tenant = newTenant()
    await tier.create(by(tenant), 'there', draft())
    await tier.create(by(tenant), 'gone', draft({ tags: ['t'] }))
    const { revision } = await tier.delete(by(tenant), 'gone', anyEtag)
    const before = tier.stats.statements.read
    const snapshots = await tier.read(tenant, ['never', 'there', 'gone'])
    expect(tier.stats.statements.read).toBe(before + 1)
    expect([...snapshots.values()]).toMatchObject([
      { id: 'never', state: 'unknown', asOf: revision, revision: 0, tags: [] },
      { id: 'there', state: 'present', asOf: revision, revision: revision - 2 },
      { id: 'gone', state: 'deleted', asOf: revision, revision, bytes: undefined, tags: [] },
    ])
  })

  test('never create a tenant: one without a row is at the start of the timeline', async () => {
    const tenant = newTenant()
    expect(await readOne(tenant, 'a')).toEqual({
      id: 'a',
      asOf: 2 ** 40,
      state: 'unknown',
      bytes: undefined,
      revision: 0,
      tags: [],
    })
    expect(await tier.list(tenant, { category: '', tag: '', afterId: '', limit: 5 })).toEqual({
      asOf: 2 ** 40,
      items: [],
    })
    expect(await tier.inspect(tenant, 'a')).toEqual({ present: false })
    await expect(tier.update(by(tenant), 'a', anyEtag, () => draft())).rejects.toMatchObject({
      code: 'not-found',
    })
    await tier.delete(by(tenant), 'a', orMissing)
    expect(await revisionOf(sql, tenant)).toBe(0)
  })

  test('another tenant has other items under the same ids', async () => {
    const [mine, yours] = [newTenant(), newTenant()]
    await tier.create(by(mine), 'a', draft({ title: 'mine', tags: ['t'] }))
    expect((await readOne(yours, 'a')).state).toBe('unknown')
    await tier.create(by(yours), 'a', draft({ title: 'yours', tags: ['t'] }))
    expect(decoded(await readOne(mine, 'a')).title).toBe('mine')
    const page = await tier.list(mine, { category: '', tag: 't', afterId: '', limit: 5 })
    expect(page.items.map((item) => decoded(item).title)).toEqual(['mine'])
  })

  test('ids of every spelling are themselves', async () => {
    const tenant = newTenant()
    const ids = [
      '__proto__',
      'constructor',
      '*',
      '{x}',
      '../..',
      `'; DROP TABLE items; --`,
      'a,b',
      '"',
      '\\',
      '💡',
      'NULL',
    ]
    for (const id of ids) await tier.create(by(tenant), id, draft({ title: id, tags: [id] }))
    const snapshots = await tier.read(tenant, ids)
    expect(ids.map((id) => decoded(snapshots.get(id)).title)).toEqual(ids)
    for (const tag of ids) {
      const page = await tier.list(tenant, { category: '', tag, afterId: '', limit: 5 })
      expect(page.items.map((item) => item.id)).toEqual([tag])
    }
  })

  test('what PostgreSQL cannot hold is invalid, never a crash', async () => {
    const tenant = newTenant()
    const invalid = { code: 'invalid' }
    await expect(tier.read(tenant, ['a\0b'])).rejects.toMatchObject(invalid)
    await expect(tier.read('a\0b', ['a'])).rejects.toMatchObject(invalid)
    await expect(tier.create(by(tenant), 'a\0b', draft())).rejects.toMatchObject(invalid)
    await expect(tier.create(by(tenant), 'a', draft({ title: 'a\0b' }))).rejects.toMatchObject(invalid)
    await expect(tier.create(by(tenant), 'a', draft({ attributes: { 'a\0b': 1 } }))).rejects.toMatchObject(
      invalid,
    )
    await expect(tier.create(by(tenant, { clientId: 'a\0b' }), 'a', draft())).rejects.toMatchObject(invalid)
    await expect(tier.create(by(tenant), 'x'.repeat(129), draft())).rejects.toMatchObject(invalid)
    await expect(tier.create(by(tenant), 'a', draft({ tags: ['x'.repeat(65)] }))).rejects.toMatchObject(
      invalid,
    )
    await expect(
      tier.create(by(tenant), 'a', draft({ rating: { rate: Number.NaN, count: 1n } })),
    ).rejects.toMatchObject(invalid)
    expect((await readOne(tenant, 'a')).state).toBe('unknown')
  })

  test('a broken rule does not cost a connection', async () => {
    const pid = async () =>
      sql(
        `SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'counted'`,
      )
    const counted = await store.open({ maxConnections: 1, applicationName: 'counted' })
    await counted.ping()
    const before = await pid()
    await expect(counted.create(by(newTenant()), 'a', draft({ category: 'x'.repeat(65) }))).rejects.toThrow()
    await expect(counted.read('a\0b', ['a'])).rejects.toThrow()
    await counted.ping()
    expect(before).toHaveLength(1)
    expect(await pid()).toEqual(before)
  })
})

describe('lists', () => {
  async function ids(tenant: string, query: Partial<ListQuery>) {
    const pages: string[][] = []
    for (let afterId = ''; ; ) {
      const page = await tier.list(tenant, { category: '', tag: '', afterId, limit: 4, ...query })
      if (page.items.length === 0) return pages
      pages.push(page.items.map((item) => item.id))
      afterId = pages.at(-1)?.at(-1) ?? ''
    }
  }

  test('pages come in the order of the ids’ bytes and end', async () => {
    const tenant = newTenant()
    const names = ['10', '2', 'A', 'B', 'a', 'b', 'ä', '9', '💡']
    await tier.insertLoaded(tenant, new Map(names.map((id) => [id, draft()])))
    expect(await ids(tenant, {})).toEqual([['10', '2', '9', 'A'], ['B', 'a', 'b', 'ä'], ['💡']])
  })

  test('by category, by tag and by both hold exactly the items that have them now', async () => {
    const tenant = newTenant()
    const items = new Map<string, ItemDraft>()
    for (let n = 10; n < 40; n++) {
      items.set(
        `${n}`,
        draft({ category: `c${n % 2}`, tags: [`t${n % 3}`, ...(n % 10 === 0 ? ['rare', 'rare'] : [])] }),
      )
    }
    await tier.insertLoaded(tenant, items)
    await tier.delete(by(tenant), '20', anyEtag)
    await tier.update(by(tenant), '30', anyEtag, (item) => ({
      ...draft(),
      ...item,
      tags: ['other'],
      category: 'c1',
    }))
    await sql(`UPDATE items SET deleted = true WHERE tenant = $1 AND id = '12'`, [tenant])
    const expected = (matches: (n: number) => boolean) =>
      Array.from({ length: 30 }, (_, k) => k + 10)
        .filter((n) => n !== 20 && n !== 12 && matches(n))
        .map(String)
    expect((await ids(tenant, {})).flat()).toEqual(expected(() => true))
    expect((await ids(tenant, { tag: 't0' })).flat()).toEqual(expected((n) => n !== 30 && n % 3 === 0))
    expect((await ids(tenant, { tag: 'rare' })).flat()).toEqual(['10'])
    expect((await ids(tenant, { tag: 'other' })).flat()).toEqual(['30'])
    expect((await ids(tenant, { category: 'c1' })).flat()).toEqual(expected((n) => n === 30 || n % 2 === 1))
    expect((await ids(tenant, { category: 'c0', tag: 't1' })).flat()).toEqual(
      expected((n) => n !== 30 && n % 2 === 0 && n % 3 === 1),
    )
    expect(await ids(tenant, { tag: 'c1' })).toEqual([])
    expect(await ids(tenant, { category: 't1' })).toEqual([])
  })

  test('a page costs its own length, also where plans were made when there was one item', async () => {
    await using own = await openStore({ maxConnections: 1 })
    const page = (query: Partial<ListQuery>) =>
      own.tier.list('t', { category: '', tag: '', afterId: '5', limit: 10, ...query })
    const queries = [{}, { category: 'c' }, { tag: 'x' }, { tag: 'x', category: 'c' }]
    const askAll = async () => {
      for (const query of queries) await page(query)
      await own.tier.read('t', ['0', '1'])
    }
    await own.tier.create(by('t'), '0', draft({ category: 'c', tags: ['x'] }))
    await own.sql('ANALYZE')
    for (let n = 0; n < 10; n++) await askAll()
    await own.sql(`ALTER TABLE items SET (autovacuum_enabled = false)`)
    await own.sql(`INSERT INTO items (tenant, id, category, tags)
      SELECT 't', g::text, 'c', '{x}' FROM generate_series(1, 2000) AS g`)
    for (let n = 0; n < 2; n++) await askAll()
    // A connection reports what it has read when it ends, at the latest.
    await own.tier[Symbol.asyncDispose]()
    while (
      (
        await own.sql(`SELECT 1 FROM pg_stat_activity
      WHERE datname = current_database() AND pid <> pg_backend_pid()`)
      ).length > 0
    );
    expect(
      await own.sql(`SELECT relname, seq_tup_read FROM pg_stat_user_tables
        WHERE relname IN ('items', 'item_tags') AND seq_tup_read > 0`),
    ).toEqual([])
  })

  test('a page and its as-of are of one snapshot', async () => {
    const tenant = newTenant()
    const { revision } = await tier.create(by(tenant), 'a', draft())
    const page = await tier.list(tenant, { category: '', tag: '', afterId: '', limit: 5 })
    expect(page).toEqual({ asOf: revision, items: [await readOne(tenant, 'a')] })
    expect(await tier.list(tenant, { category: 'none', tag: '', afterId: '', limit: 5 })).toEqual({
      asOf: revision,
      items: [],
    })
  })
})

describe('items of the origin', () => {
  test('are inserted once, in one revision, and read back', async () => {
    const tenant = newTenant()
    const loaded = new Map([
      ['2', draft({ title: 'two', price: { currencyCode: 'USD', units: 3n, nanos: 990_000_000 } })],
      ['1', draft({ title: 'one' })],
    ])
    const snapshots = await tier.insertLoaded(tenant, loaded)
    expect([...snapshots.keys()].sort()).toEqual(['1', '2'])
    expect(decoded(snapshots.get('2'))).toMatchObject({ ...loaded.get('2'), source: 'ORIGIN' })
    expect(snapshots.get('1')).toMatchObject({ asOf: TIMELINE + 1, revision: TIMELINE + 1 })
    await tier.insertLoaded(tenant, loaded)
    expect(await revisionOf(sql, tenant)).toBe(1)
  })

  test('never overwrite what is there: a local item, a newer one or a marker row', async () => {
    const tenant = newTenant()
    await tier.create(by(tenant), 'local', draft({ title: 'mine' }))
    await tier.create(by(tenant), 'gone', draft())
    await tier.delete(by(tenant), 'gone', anyEtag)
    const snapshots = await tier.insertLoaded(
      tenant,
      new Map(['local', 'gone', 'new'].map((id) => [id, draft({ title: 'origin' })])),
    )
    expect(decoded(snapshots.get('local')).title).toBe('mine')
    expect(snapshots.get('gone')?.state).toBe('deleted')
    expect(decoded(snapshots.get('new')).title).toBe('origin')
    expect((await logOf(sql, tenant)).at(-1)?.ids).toEqual(['new'])
  })

  test('that many instances load at once make one row and one revision', async () => {
    const tenant = newTenant()
    const other = await store.open()
    const loaded = new Map(Array.from({ length: 50 }, (_, n) => [`${n}`, draft()]))
    const backwards = new Map([...loaded].reverse())
    await Promise.all([
      ...Array.from({ length: 5 }, () => tier.insertLoaded(tenant, loaded)),
      ...Array.from({ length: 5 }, () => other.insertLoaded(tenant, backwards)),
    ])
    expect(await revisionOf(sql, tenant)).toBe(1)
  })

  test('that two instances load in opposite orders do not deadlock', async () => {
    const tenant = newTenant()
    const [one, two] = [await store.open(), await store.open()]
    const session = await store.session()
    await session('BEGIN')
    await session(`INSERT INTO items (tenant, id) VALUES ($1, 'm')`, [tenant])
    const load = (by: PostgresTier, ids: readonly string[]) =>
      by.insertLoaded(tenant, new Map(ids.map((id) => [id, draft()])))
    const loads = [load(one, ['a', 'm', 'z'])]
    await someoneWaits(sql)
    loads.push(load(two, ['z', 'm', 'a']))
    await someoneWaits(sql, 2)
    await session('ROLLBACK')
    await Promise.all(loads)
    expect([one.stats.retries, two.stats.retries]).toEqual([0, 0])
  })

  describe('that are fetched again', () => {
    const fresh = draft({ title: 'fresh', tags: ['b'] })

    async function loaded(tenant: string) {
      const snapshots = await tier.insertLoaded(tenant, new Map([['1', draft({ tags: ['a'] })]]))
      return snapshots.get('1')?.revision ?? 0
    }

    test('replace the row that the refetch started from, and stay the origin’s', async () => {
      const tenant = newTenant()
      const snapshot = await tier.refetched(tenant, '1', fresh, await loaded(tenant))
      expect(snapshot).toMatchObject({ revision: TIMELINE + 2, asOf: TIMELINE + 2, tags: ['b'] })
      expect(decoded(snapshot)).toMatchObject({ ...fresh, source: 'ORIGIN' })
      expect((await logOf(sql, tenant)).at(-1)?.tags).toEqual(['a', 'b'])
    })

    test('change nothing when the content is the same', async () => {
      const tenant = newTenant()
      const snapshot = await tier.refetched(tenant, '1', draft({ tags: ['a'] }), await loaded(tenant))
      expect(snapshot.revision).toBe(TIMELINE + 1)
      expect(await revisionOf(sql, tenant)).toBe(1)
    })

    test('do not touch a row that has moved on', async () => {
      const tenant = newTenant()
      const from = await loaded(tenant)
      await tier.refetched(tenant, '1', draft({ title: 'newer' }), from)
      expect(decoded(await tier.refetched(tenant, '1', fresh, from)).title).toBe('newer')
      expect(decoded(await tier.refetched(tenant, '1', undefined, from)).title).toBe('newer')
      expect(decoded(await tier.refetched(tenant, '1', fresh, 0)).title).toBe('newer')
    })

    test('do not touch an item that was written here', async () => {
      const tenant = newTenant()
      await loaded(tenant)
      const { revision } = await tier.update(by(tenant), '1', anyEtag, () => draft({ title: 'mine' }))
      expect(decoded(await tier.refetched(tenant, '1', fresh, revision))).toMatchObject({
        title: 'mine',
        source: 'LOCAL',
      })
      expect(decoded(await tier.refetched(tenant, '1', undefined, revision)).title).toBe('mine')
    })

    test('revive a marker row', async () => {
      const tenant = newTenant()
      await loaded(tenant)
      const { revision } = await tier.delete(by(tenant), '1', anyEtag)
      expect(decoded(await tier.refetched(tenant, '1', fresh, revision))).toMatchObject({
        ...fresh,
        source: 'ORIGIN',
      })
    })

    test('leave a marker row when the origin no longer has the item', async () => {
      const tenant = newTenant()
      const snapshot = await tier.refetched(tenant, '1', undefined, await loaded(tenant))
      expect(snapshot).toMatchObject({ state: 'deleted', revision: TIMELINE + 2 })
      expect((await logOf(sql, tenant)).at(-1)).toMatchObject({ kind: 'DELETED', ids: ['1'], tags: ['a'] })
      expect(await tier.refetched(tenant, '1', undefined, snapshot.revision)).toEqual(snapshot)
    })

    test('are inserted when there was no row; an id that the origin does not know leaves none', async () => {
      const tenant = newTenant()
      expect((await tier.refetched(tenant, '1', undefined, 0)).state).toBe('unknown')
      expect(await revisionOf(sql, tenant)).toBe(0)
      expect(decoded(await tier.refetched(tenant, '1', fresh, 0))).toMatchObject({
        ...fresh,
        source: 'ORIGIN',
      })
    })
  })
})

describe('create', () => {
  test('of an item that exists is refused and changes nothing', async () => {
    const tenant = newTenant()
    await tier.create(by(tenant), 'a', draft())
    await expect(tier.create(by(tenant), 'a', draft())).rejects.toMatchObject({
      code: 'already-exists',
      id: 'a',
    })
    expect(await revisionOf(sql, tenant)).toBe(1)
  })

  test('of one id by many at once succeeds for one', async () => {
    const tenant = newTenant()
    const attempts = await Promise.allSettled(
      Array.from({ length: 8 }, (_, n) => tier.create(by(tenant), 'a', draft({ title: `${n}` }))),
    )
    expect(attempts.filter(({ status }) => status === 'fulfilled')).toHaveLength(1)
    for (const attempt of attempts) {
      if (attempt.status === 'rejected') expect(attempt.reason).toMatchObject({ code: 'already-exists' })
    }
    expect(await revisionOf(sql, tenant)).toBe(1)
  })

  test('revives a marker row as a new item', async () => {
    const tenant = newTenant()
    await sql(`INSERT INTO items (tenant, id, create_time, deleted) VALUES ($1, 'a', '2001-01-01', true)`, [
      tenant,
    ])
    const { snapshot, revision, formerTags } = await tier.create(by(tenant), 'a', full)
    expect(decoded(snapshot)).toMatchObject({ ...full, source: 'LOCAL', revision })
    expect(decoded(snapshot).createTimeMs).toBe(decoded(snapshot).updateTimeMs)
    expect(formerTags).toEqual([])
  })

  test('of an item that is too large is refused before anything is written', async () => {
    const tenant = newTenant()
    const tooLarge = draft({ description: 'x'.repeat(LIMITS.itemBytes) })
    const refused = { code: 'exhausted', reason: 'ITEM_TOO_LARGE', id: 'a' }
    await expect(tier.create(by(tenant), 'a', tooLarge)).rejects.toMatchObject(refused)
    await expect(tier.insertLoaded(tenant, new Map([['a', tooLarge]]))).rejects.toMatchObject(refused)
    await expect(tier.update(by(tenant), 'a', orMissing, () => tooLarge)).rejects.toMatchObject(refused)
    expect(await revisionOf(sql, tenant)).toBe(0)
    const largest = draft({ description: 'x'.repeat(LIMITS.itemBytes - 100) })
    expect((await tier.create(by(tenant), 'a', largest)).snapshot.bytes?.byteLength).toBeGreaterThan(
      LIMITS.itemBytes - 100,
    )
  })
})

describe('update', () => {
  test('sees the current content and names the tags from before', async () => {
    const tenant = newTenant()
    const created = await tier.create(by(tenant), 'a', full)
    const { snapshot, revision, formerTags, replayed } = await tier.update(
      by(tenant),
      'a',
      anyEtag,
      (current) => {
        expect(current).toMatchObject(full)
        return { ...full, ...current, title: 'Desk lamp', tags: ['desk'], category: '' }
      },
    )
    expect(revision).toBe(created.revision + 1)
    expect(decoded(snapshot)).toMatchObject({
      ...full,
      title: 'Desk lamp',
      tags: ['desk'],
      category: '',
      revision,
    })
    expect(decoded(snapshot).createTimeMs).toBe(decoded(created.snapshot).createTimeMs)
    expect(formerTags).toEqual([...full.tags, 'light'])
    expect(replayed).toBe(false)
  })

  test('with the content that is there changes nothing and returns the item’s revision', async () => {
    const tenant = newTenant()
    const loaded = await tier.insertLoaded(tenant, new Map([['a', full]]))
    await tier.create(by(tenant), 'b', draft())
    const { snapshot, revision } = await tier.update(by(tenant), 'a', anyEtag, (current) => ({
      ...full,
      ...current,
    }))
    expect(revision).toBe(TIMELINE + 1)
    expect(snapshot.bytes).toEqual(loaded.get('a')?.bytes)
    expect(snapshot.asOf).toBe(TIMELINE + 2)
    expect(await revisionOf(sql, tenant)).toBe(2)
  })

  test('with an etag applies to that version only', async () => {
    const tenant = newTenant()
    const { revision } = await tier.create(by(tenant), 'a', draft())
    const ifUnchanged = { etag: etagOf(revision), allowMissing: false }
    await tier.update(by(tenant), 'a', ifUnchanged, () => draft({ title: 'second' }))
    const conflict = { code: 'conflict', reason: 'ETAG_MISMATCH', id: 'a' }
    await expect(tier.update(by(tenant), 'a', ifUnchanged, () => draft())).rejects.toMatchObject(conflict)
    await expect(tier.delete(by(tenant), 'a', ifUnchanged)).rejects.toMatchObject(conflict)
    await expect(
      tier.update(by(tenant), 'none', { ...ifUnchanged, allowMissing: true }, () => draft()),
    ).rejects.toMatchObject({ ...conflict, id: 'none' })
    expect(decoded(await readOne(tenant, 'a')).title).toBe('second')
  })

  test('of concurrent callers with the same etag, one wins', async () => {
    const tenant = newTenant()
    const { revision } = await tier.create(by(tenant), 'a', draft())
    const attempts = await Promise.allSettled(
      Array.from({ length: 6 }, (_, n) =>
        tier.update(by(tenant), 'a', { etag: etagOf(revision), allowMissing: false }, () =>
          draft({ title: `${n}` }),
        ),
      ),
    )
    expect(attempts.filter(({ status }) => status === 'fulfilled')).toHaveLength(1)
  })

  test('of an absent item is not found, or creates it when that is allowed', async () => {
    const tenant = newTenant()
    await tier.create(by(tenant), 'gone', full)
    await tier.delete(by(tenant), 'gone', anyEtag)
    for (const id of ['gone', 'never']) {
      await expect(tier.update(by(tenant), id, anyEtag, () => draft())).rejects.toMatchObject({
        code: 'not-found',
        id,
      })
      const { snapshot } = await tier.update(by(tenant), id, orMissing, (current) => {
        expect(current).toBeUndefined()
        return draft({ title: 'made' })
      })
      expect(decoded(snapshot)).toMatchObject({ ...draft({ title: 'made' }), source: 'LOCAL' })
    }
  })

  test('whose change throws changes nothing and throws the same', async () => {
    const tenant = newTenant()
    await tier.create(by(tenant), 'a', draft())
    const mistake = new RangeError('of the caller')
    const attempt = tier.update(by(tenant, { requestId: 'r' }), 'a', anyEtag, () => {
      throw mistake
    })
    await expect(attempt).rejects.toBe(mistake)
    expect(await revisionOf(sql, tenant)).toBe(1)
    expect(await sql('SELECT * FROM requests WHERE tenant = $1', [tenant])).toEqual([])
  })

  test('names its writer in the log', async () => {
    const tenant = newTenant()
    await tier.create(by(tenant, { clientId: `o'neill` }), 'a', draft())
    await tier.update(by(tenant), 'a', anyEtag, () => draft({ title: 'x' }))
    expect((await logOf(sql, tenant)).map(({ writer }) => writer)).toEqual([`o'neill`, ''])
  })
})

describe('items that are replaced together', () => {
  /** Items with these ids, as they are, and what makes a write of one. */
  async function items(tenant: string, ...ids: readonly string[]) {
    const known = new Map<string, ItemRecord>()
    for (const id of ids) {
      known.set(id, decoded((await tier.create(by(tenant), id, { ...full, title: `old ${id}` })).snapshot))
    }
    return (
      id: string,
      content: Partial<ItemDraft> = {},
      context: Partial<WriteContext> = {},
    ): KnownWrite => ({
      write: by(tenant, context),
      known: known.get(id) ?? { ...full, id, source: 'LOCAL', revision: 1, createTimeMs: 0, updateTimeMs: 0 },
      draft: { ...full, title: `new ${id}`, ...content },
    })
  }

  test('take one statement and one commit, a revision each, and are read back', async () => {
    const tenant = newTenant()
    const writeOf = await items(tenant, 'a', 'b', 'c')
    // Tells the connection whose rows it wants.
    await tier.replaceKnown(tenant, [])
    const before = tier.stats.statements.write
    const written = await tier.replaceKnown(tenant, [
      writeOf('c'),
      writeOf('a', { tags: ['x'], attributes: undefined }),
    ])
    expect(tier.stats.statements.write - before).toBe(1)
    expect([...written.keys()].sort()).toEqual(['a', 'c'])
    const { snapshot, revision, formerTags, replayed } = written.get('a') ?? expect.unreachable()
    expect(decoded(snapshot)).toMatchObject({
      ...full,
      title: 'new a',
      tags: ['x'],
      attributes: undefined,
      revision,
    })
    expect(snapshot).toMatchObject({ id: 'a', asOf: TIMELINE + 5, tags: ['x', 'light'] })
    expect({ revision, formerTags, replayed }).toEqual({
      revision: TIMELINE + 4,
      formerTags: [...full.tags, 'light'],
      replayed: false,
    })
    expect(written.get('c')).toMatchObject({ snapshot: { asOf: TIMELINE + 5 }, revision: TIMELINE + 5 })
    expect(snapshot.bytes).toEqual((await readOne(tenant, 'a')).bytes)
    expect((await logOf(sql, tenant)).slice(3)).toEqual([
      { revision: 4, kind: 'UPSERTED', mode: 'EXPIRE', ids: ['a'], tags: expect.anything(), writer: '' },
      { revision: 5, kind: 'UPSERTED', mode: 'EXPIRE', ids: ['c'], tags: expect.anything(), writer: '' },
    ])
    expect((await logOf(sql, tenant)).at(3)?.tags.toSorted()).toEqual(['x', 'light', ...full.tags].toSorted())
    const tagged = async (tag: string) =>
      (await tier.list(tenant, { category: '', tag, afterId: '', limit: 10 })).items.map(({ id }) => id)
    expect(await tagged('x')).toEqual(['a'])
    expect(await tagged('new')).toEqual(['b', 'c'])
    const transactions = 'SELECT DISTINCT xmin::text FROM invalidations WHERE tenant = $1 AND revision > $2'
    expect(await sql(transactions, [tenant, TIMELINE + 3])).toHaveLength(1)
    expect(decoded(await readOne(tenant, 'b')).title).toBe('old b')
  })

  test('leave those alone that have changed, were deleted or never were, and say so', async () => {
    const tenant = newTenant()
    const writeOf = await items(tenant, 'moved', 'deleted', 'same')
    await tier.update(by(tenant), 'moved', anyEtag, () => draft({ title: 'moved on' }))
    await tier.delete(by(tenant), 'deleted', anyEtag)
    const ids = ['moved', 'deleted', 'never', 'same']
    const written = await tier.replaceKnown(
      tenant,
      ids.map((id) => writeOf(id)),
    )
    expect([...written.keys()]).toEqual(['same'])
    expect(decoded(await readOne(tenant, 'moved')).title).toBe('moved on')
    expect((await readOne(tenant, 'deleted')).state).toBe('deleted')
    expect((await readOne(tenant, 'never')).state).toBe('unknown')
    expect(await revisionOf(sql, tenant)).toBe(6)
  })

  test('with the content that is there change nothing and return the item’s revision', async () => {
    const tenant = newTenant()
    const writeOf = await items(tenant, 'a')
    const { snapshot, revision } =
      (await tier.replaceKnown(tenant, [writeOf('a', { title: 'old a' })])).get('a') ?? expect.unreachable()
    expect({ revision, asOf: snapshot.asOf }).toEqual({ revision: TIMELINE + 1, asOf: TIMELINE + 1 })
    expect(await revisionOf(sql, tenant)).toBe(1)
  })

  test('belong to their tenant, whatever the ids are', async () => {
    const [mine, others] = [newTenant(), newTenant()]
    await items(others, 'a')
    const writeOf = await items(mine, 'a')
    await tier.replaceKnown(mine, [writeOf('a')])
    expect(decoded(await readOne(others, 'a')).title).toBe('old a')
    expect(await revisionOf(sql, others)).toBe(1)
  })

  test('name each writer in the log, in the order of the writes', async () => {
    const tenant = newTenant()
    const writeOf = await items(tenant, 'a', 'b', 'c')
    await tier.replaceKnown(tenant, [
      writeOf('a', {}, { clientId: 'one' }),
      writeOf('b', {}, { clientId: `o'neill` }),
      writeOf('c', {}, { clientId: 'one' }),
    ])
    const log = (await logOf(sql, tenant)).slice(3)
    expect(log.map(({ revision, writer, ids }) => [revision, writer, ids])).toEqual([
      [4, 'one', ['a']],
      [5, `o'neill`, ['b']],
      [6, 'one', ['c']],
    ])
  })

  test('are replayed when their request ids come back, and refused with another content', async () => {
    const tenant = newTenant()
    const writeOf = await items(tenant, 'a', 'b')
    const context = { requestId: 'r', fingerprint: 'f' }
    const first = (await tier.replaceKnown(tenant, [writeOf('a', {}, context), writeOf('b')])).get('a')
    await tier.update(by(tenant), 'a', anyEtag, () => draft({ title: 'later' }))
    expect(await tier.replaceKnown(tenant, [writeOf('a', {}, context)])).toEqual(new Map())
    const untouched = () => expect.unreachable('the change was applied again')
    expect(await tier.update(by(tenant, context), 'a', anyEtag, untouched)).toEqual({
      ...first,
      replayed: true,
    })
    const other = by(tenant, { ...context, fingerprint: 'other' })
    await expect(tier.update(other, 'a', anyEtag, untouched)).rejects.toMatchObject({
      reason: 'REQUEST_ID_REUSED',
    })
    expect(await revisionOf(sql, tenant)).toBe(5)
  })

  test('leave no request id behind of a write that was not made', async () => {
    const tenant = newTenant()
    const writeOf = await items(tenant, 'a', 'b')
    await tier.update(by(tenant), 'a', anyEtag, () => draft({ title: 'later' }))
    const context = { requestId: 'r', fingerprint: 'f' }
    const written = await tier.replaceKnown(tenant, [
      writeOf('a', {}, context),
      writeOf('b', {}, { requestId: 's' }),
    ])
    expect([...written.keys()]).toEqual(['b'])
    expect(await sql('SELECT request_id FROM requests WHERE tenant = $1', [tenant])).toEqual([
      { request_id: 's' },
    ])
    const { replayed } = await tier.update(by(tenant, context), 'a', anyEtag, () => draft())
    expect(replayed).toBe(false)
  })

  test('by many instances at once, in any order, do not deadlock, and each item is written once', async () => {
    const tenant = newTenant()
    const ids = Array.from({ length: 20 }, (_, n) => `item-${n}`)
    const writeOf = await items(tenant, ...ids)
    const other = await store.open({ random: () => 0 })
    const requests = (n: number) => ({ requestId: `request ${n}`, fingerprint: 'f' })
    const before = tier.stats.retries
    const outcomes = await Promise.all(
      Array.from({ length: 6 }, (_, n) => {
        const order = n % 2 === 0 ? ids : ids.toReversed()
        const named = n < 4
        return (n % 3 === 0 ? tier : other).replaceKnown(
          tenant,
          order
            .slice(0, 15)
            .map((id, at) => writeOf(id, { title: `by ${n}` }, named && at < 7 ? requests(at) : {})),
        )
      }),
    )
    const written = outcomes.flatMap((outcome) => [...outcome.keys()])
    expect(new Set(written).size).toBe(written.length)
    expect(tier.stats.retries - before + other.stats.retries).toBe(0)
    for (const outcome of outcomes) {
      for (const [id, { snapshot }] of outcome)
        expect(snapshot.bytes).toEqual((await readOne(tenant, id)).bytes)
    }
  })

  test('do not wait for an item that somebody else has locked: it is left out', async () => {
    const tenant = newTenant()
    const writeOf = await items(tenant, 'a', 'b')
    await using other = await store.session()
    await other('BEGIN')
    await other('SELECT FROM items WHERE tenant = $1 AND id = $2 FOR UPDATE', [tenant, 'a'])
    const context = { requestId: 'r', fingerprint: 'f' }
    const written = await tier.replaceKnown(tenant, [writeOf('a', {}, context), writeOf('b')])
    expect([...written.keys()]).toEqual(['b'])
    await other('ROLLBACK')
    expect(decoded(await readOne(tenant, 'a')).title).toBe('old a')
    expect(await sql('SELECT request_id FROM requests WHERE tenant = $1', [tenant])).toEqual([])
  })

  test('do not wait for a write with the same request id that is in progress: all are left out', async () => {
    const tenant = newTenant()
    const writeOf = await items(tenant, 'a', 'b')
    await using other = await store.session()
    await other('BEGIN')
    await other(`INSERT INTO requests (tenant, request_id, fingerprint) VALUES ($1, 'r', 'f')`, [tenant])
    const context = { requestId: 'r', fingerprint: 'f' }
    expect(await tier.replaceKnown(tenant, [writeOf('a', {}, context), writeOf('b')])).toEqual(new Map())
    await other('COMMIT')
    // The next ones wait for locks as long as ever.
    const [setting] = await sql('SHOW lock_timeout')
    expect(setting).toEqual({ lock_timeout: '0' })
    expect((await tier.replaceKnown(tenant, [writeOf('b')])).size).toBe(1)
  })

  test('cost as much in large tables, also where plans were made in empty ones', async () => {
    await using own = await openStore({ maxConnections: 1 })
    const tenant = 't'
    const known = new Map<string, ItemRecord>()
    const replace = async (n: number, size: number) => {
      const writes = Array.from({ length: size }, (_, at) => {
        const item = known.get(`k${at}`) ?? expect.unreachable()
        const write = by(tenant, { requestId: `${n}-${at}`, fingerprint: 'f' })
        return { write, known: item, draft: draft({ title: `${n}` }) }
      })
      const written = await own.tier.replaceKnown(tenant, writes)
      expect(written.size).toBe(size)
      for (const [id, { snapshot }] of written) known.set(id, decoded(snapshot))
    }
    for (let at = 0; at < 20; at++) {
      const { snapshot } = await own.tier.create(by(tenant), `k${at}`, draft())
      known.set(`k${at}`, decoded(snapshot))
    }
    for (const table of ['items', 'requests', 'tenants', 'invalidations', 'item_tags']) {
      await own.sql(`ALTER TABLE ${table} SET (autovacuum_enabled = false)`)
      await own.sql(`ANALYZE ${table}`)
    }
    for (let n = 0; n < 10; n++) await replace(n, n % 2 === 0 ? 1 : 20)
    await own.sql(`INSERT INTO items (tenant, id) SELECT 't', 'x' || g FROM generate_series(1, 5000) AS g`)
    await own.sql(`INSERT INTO requests (tenant, request_id, fingerprint)
      SELECT 't', 'x' || g, 'f' FROM generate_series(1, 5000) AS g`)
    const filled = await rowsRead(own.sql)
    expect(filled).toBeGreaterThanOrEqual(5_000)
    for (let n = 10; n < 20; n++) await replace(n, n % 2 === 0 ? 1 : 20)
    // A connection reports what it has read when it ends, at the latest.
    await own.tier[Symbol.asyncDispose]()
    const others =
      'SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()'
    while ((await own.sql(others)).length > 0);
    // 105 writes look at a few rows each, and old versions of them; to walk over a table once is 5,000.
    expect((await rowsRead(own.sql)) - filled).toBeLessThan(20_000)
  })

  /** Rows that were read of items and requests, by whatever way. */
  async function rowsRead(of: Sql): Promise<number> {
    // What this session has counted itself is told when the statement is over.
    await of('SELECT pg_stat_force_next_flush()')
    const [row] = await of(`SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::int AS rows
      FROM pg_stat_user_tables WHERE relname IN ('items', 'requests')`)
    return Number(row?.['rows'])
  }

  test('that a demoted primary refuses were not written, and nobody is told that they may have been', async () => {
    await using own = await openStore()
    const { snapshot } = await own.tier.create(by('t'), 'a', draft())
    await own.sql(`DO $$ BEGIN
      EXECUTE format('ALTER DATABASE %I SET default_transaction_read_only = on', current_database()); END $$`)
    const demoted = await own.open()
    const attempt = demoted.replaceKnown('t', [
      { write: by('t'), known: decoded(snapshot), draft: draft({ title: 'x' }) },
    ])
    await expect(attempt).rejects.toMatchObject({ code: 'unavailable', reason: 'POSTGRES_UNAVAILABLE' })
  })

  test('of which the database refuses one are none of them written', async () => {
    const tenant = newTenant()
    const writeOf = await items(tenant, 'a', 'b')
    const attempt = tier.replaceKnown(tenant, [writeOf('a'), writeOf('b', { title: 'NUL \0' })])
    await expect(attempt).rejects.toMatchObject({ code: 'invalid' })
    expect(await revisionOf(sql, tenant)).toBe(2)
  })

  test('are not written by a server older than one that was seen', async () => {
    const tenant = newTenant()
    const writeOf = await items(tenant, 'a')
    const fenced = await store.open()
    fenced.seen(2 * TIMELINE)
    expect(await fenced.replaceKnown(tenant, [writeOf('a')])).toEqual(new Map())
    expect(await revisionOf(sql, tenant)).toBe(1)
  })
})

describe('delete', () => {
  test('leaves a marker row without content', async () => {
    const tenant = newTenant()
    await tier.create(by(tenant), 'a', full)
    const { snapshot, revision, formerTags } = await tier.delete(by(tenant), 'a', anyEtag)
    expect(snapshot).toEqual({
      id: 'a',
      asOf: revision,
      state: 'deleted',
      bytes: undefined,
      revision,
      tags: [],
    })
    expect(formerTags).toEqual([...full.tags, 'light'])
    expect((await logOf(sql, tenant)).at(-1)).toMatchObject({ kind: 'DELETED', mode: 'REMOVE', ids: ['a'] })
    expect(await sql(`SELECT title, tags, price_units FROM items WHERE tenant = $1`, [tenant])).toEqual([
      { title: '', tags: [], price_units: null },
    ])
  })

  test('of an absent item is not found, or nothing when that is allowed', async () => {
    const tenant = newTenant()
    await tier.create(by(tenant), 'gone', draft())
    const { revision } = await tier.delete(by(tenant), 'gone', anyEtag)
    for (const id of ['gone', 'never']) {
      await expect(tier.delete(by(tenant), id, anyEtag)).rejects.toMatchObject({ code: 'not-found', id })
      expect((await tier.delete(by(tenant), id, orMissing)).revision).toBe(revision)
    }
    expect(await revisionOf(sql, tenant)).toBe(2)
  })
})

describe('invalidate', () => {
  test.each<[InvalidationTarget, 'EXPIRE' | 'REMOVE', object]>([
    [{ kind: 'ids', ids: ['a', 'b'] }, 'EXPIRE', { kind: 'KEYS_INVALIDATED', ids: ['a', 'b'], tags: [] }],
    [{ kind: 'tags', tags: ['t'] }, 'REMOVE', { kind: 'TAGS_INVALIDATED', ids: [], tags: ['t'] }],
    [{ kind: 'all' }, 'REMOVE', { kind: 'TENANT_INVALIDATED', ids: [], tags: [] }],
  ])('%j appends to the log and returns the revision', async (target, mode, logged) => {
    const tenant = newTenant()
    expect(await tier.invalidate(by(tenant, { clientId: 'me' }), target, mode)).toBe(TIMELINE + 1)
    expect(await logOf(sql, tenant)).toEqual([{ ...logged, mode, revision: 1, writer: 'me' }])
  })

  test('again with the same request id appends nothing', async () => {
    const tenant = newTenant()
    const write = by(tenant, { requestId: 'r', fingerprint: 'f' })
    const first = await tier.invalidate(write, { kind: 'all' }, 'EXPIRE')
    await tier.invalidate(by(tenant), { kind: 'all' }, 'EXPIRE')
    expect(await tier.invalidate(write, { kind: 'all' }, 'EXPIRE')).toBe(first)
    expect(await revisionOf(sql, tenant)).toBe(2)
  })
})

describe('a request id', () => {
  test('makes a retry return the first outcome, whatever has happened since', async () => {
    const tenant = newTenant()
    const write = (requestId: string) => by(tenant, { requestId, fingerprint: `of ${requestId}` })
    const created = await tier.create(write('create'), 'a', full)
    const updated = await tier.update(write('update'), 'a', anyEtag, () =>
      draft({ title: 'second', tags: ['x'] }),
    )
    const gone = await tier.delete(write('delete'), 'a', anyEtag)
    const nothing = await tier.delete(write('nothing'), 'none', orMissing)
    const again = (first: object) => ({ ...first, replayed: true })
    const untouched = () => expect.unreachable('the change was applied again')
    expect(await tier.create(write('create'), 'a', full)).toEqual(again(created))
    expect(await tier.update(write('update'), 'a', anyEtag, untouched)).toEqual(again(updated))
    expect(await tier.delete(write('delete'), 'a', anyEtag)).toEqual(again(gone))
    expect(await tier.delete(write('nothing'), 'none', orMissing)).toEqual(again(nothing))
    expect(await revisionOf(sql, tenant)).toBe(3)
  })

  test('that comes back with another request is refused', async () => {
    const tenant = newTenant()
    await tier.create(by(tenant, { requestId: 'r', fingerprint: 'one' }), 'a', draft())
    const other = by(tenant, { requestId: 'r', fingerprint: 'two' })
    const refused = { code: 'invalid', reason: 'REQUEST_ID_REUSED' }
    await expect(tier.create(other, 'b', draft())).rejects.toMatchObject(refused)
    await expect(tier.invalidate(other, { kind: 'all' }, 'EXPIRE')).rejects.toMatchObject(refused)
    expect((await readOne(tenant, 'b')).state).toBe('unknown')
  })

  test('is the tenant’s own', async () => {
    const [mine, yours] = [newTenant(), newTenant()]
    await tier.create(by(mine, { requestId: 'r', fingerprint: 'one' }), 'a', draft())
    const written = await tier.create(by(yours, { requestId: 'r', fingerprint: 'two' }), 'a', draft())
    expect(written.replayed).toBe(false)
  })

  test('sent many times at once writes once, and everybody gets that outcome', async () => {
    const tenant = newTenant()
    const other = await store.open()
    const write = by(tenant, { requestId: 'r', fingerprint: 'f' })
    const outcomes = await Promise.all(
      Array.from({ length: 8 }, (_, n) =>
        (n % 2 === 0 ? tier : other).update(write, 'a', orMissing, () => draft({ title: `${n}` })),
      ),
    )
    expect(outcomes.filter(({ replayed }) => !replayed)).toHaveLength(1)
    expect(new Set(outcomes.map(({ snapshot }) => decoded(snapshot).title)).size).toBe(1)
    expect(await revisionOf(sql, tenant)).toBe(1)
  })

  test('of a write that failed may be used again', async () => {
    const tenant = newTenant()
    const write = by(tenant, { requestId: 'r', fingerprint: 'f' })
    await expect(tier.update(write, 'a', anyEtag, () => draft())).rejects.toMatchObject({ code: 'not-found' })
    await tier.create(by(tenant), 'a', draft())
    const { replayed } = await tier.update(write, 'a', anyEtag, () => draft({ title: 'x' }))
    expect(replayed).toBe(false)
  })
})

describe('deadlocks and serialisation failures', () => {
  /** A trigger that fails the first `times` inserts of the tenant. A sequence counts, since it is never rolled back. */
  async function failing(tenant: string, code: string, times: number) {
    const name = tenant.replace('-', '_')
    await sql(`CREATE SEQUENCE attempts_${name};
      CREATE FUNCTION fail_${name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF NEW.tenant = '${tenant}' AND nextval('attempts_${name}') <= ${times} THEN
          RAISE EXCEPTION 'as ordered' USING ERRCODE = '${code}';
        END IF;
        RETURN NEW;
      END $$;
      CREATE TRIGGER fail_${name} BEFORE INSERT ON items FOR EACH ROW EXECUTE FUNCTION fail_${name}()`)
  }

  test.each(['40P01', '40001'])('%s is retried five times', async (code) => {
    const tenant = newTenant()
    await failing(tenant, code, 5)
    const before = tier.stats.retries
    expect((await tier.create(by(tenant, { requestId: 'r', fingerprint: 'f' }), 'a', draft())).replayed).toBe(
      false,
    )
    expect(tier.stats.retries).toBe(before + 5)
    expect(await revisionOf(sql, tenant)).toBe(1)
  })

  test('that last are a conflict', async () => {
    const tenant = newTenant()
    await failing(tenant, '40P01', 1000)
    const conflict = { code: 'conflict', reason: 'RETRIES_EXHAUSTED' }
    await expect(tier.create(by(tenant), 'a', draft())).rejects.toMatchObject(conflict)
    await expect(tier.insertLoaded(tenant, new Map([['a', draft()]]))).rejects.toMatchObject(conflict)
  })

  test('a deadlock with a psql session costs the caller nothing but time', async () => {
    const tenant = newTenant()
    await tier.create(by(tenant), 'a', draft())
    const other = await store.superuser()
    await other(`SET deadlock_timeout = '10s'`)
    await other('BEGIN')
    await other(`INSERT INTO items (tenant, id) VALUES ($1, 'b')`, [tenant])
    const before = tier.stats.retries
    // It holds a and waits for the tenant …
    const update = tier.update(by(tenant), 'a', anyEtag, () => draft({ title: 'from the service' }))
    await someoneWaits(sql)
    // … which psql holds, which now wants a.
    await other(`UPDATE items SET description = 'from psql' WHERE tenant = $1 AND id = 'a'`, [tenant])
    await other('COMMIT')
    expect((await update).revision).toBe(TIMELINE + 4)
    expect(tier.stats.retries).toBeGreaterThan(before)
  })
})

describe('inspect', () => {
  test('says what the table holds of an id', async () => {
    const tenant = newTenant()
    const { snapshot, revision } = await tier.create(by(tenant), 'a', draft())
    expect(await tier.inspect(tenant, 'a')).toEqual({
      present: true,
      negative: false,
      asOf: revision,
      sizeBytes: snapshot.bytes?.byteLength,
      tags: [],
    })
    await tier.delete(by(tenant), 'a', anyEtag)
    expect(await tier.inspect(tenant, 'a')).toEqual({
      present: true,
      negative: true,
      asOf: revision + 1,
      sizeBytes: 0,
      tags: [],
    })
    expect(await tier.inspect(tenant, 'none')).toEqual({ present: false })
  })
})

describe('the system id', () => {
  test('is the same for every connection to a database and another one for every other database', async () => {
    await using elsewhere = await openStore()
    const id = await tier.systemId()
    expect(id).toMatch(/^\d+-\d+$/)
    expect(await (await store.open()).systemId()).toBe(id)
    const other = await elsewhere.tier.systemId()
    expect(other).not.toBe(id)
    expect(other.split('-')[0]).toBe(id.split('-')[0])
  })
})
