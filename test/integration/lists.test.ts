import { status } from '@grpc/grpc-js'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { CacheOutcome, type ListItemsResponse, Tier } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { type Caller, callerAs, newCaller } from '../support/caller.ts'
import { startService, type TestService } from '../support/service.ts'
import { unlessStalled } from '../support/stalls.ts'
import { connectSql, type Sql } from './postgres-fixture.ts'

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

const insert = (caller: Caller, ids: readonly string[]) =>
  sql('INSERT INTO items (tenant, id, title) SELECT $1, id, id FROM unnest($2::text[]) AS id', [
    caller.tenant,
    ids,
  ])
const numbered = (count: number) => Array.from({ length: count }, (_, i) => `n${`${i}`.padStart(4, '0')}`)
const idsOf = ({ items }: ListItemsResponse) => items.map(({ id }) => id)

/** Every page up to the last. */
async function pages(caller: Caller, request: object): Promise<ListItemsResponse[]> {
  const found: ListItemsResponse[] = []
  for (let pageToken = ''; found.length === 0 || pageToken !== ''; ) {
    const page = await caller.call('listItems', { ...request, pageToken })
    found.push(page)
    pageToken = page.nextPageToken
  }
  return found
}

describe('ListItems', () => {
  test('lists by the bytes of the ids', async () => {
    const caller = newCaller(service)
    // In UTF-16 the emoji comes before the full-width letter, in UTF-8 after it; a locale has its own ideas.
    const ids = [
      'b',
      'B',
      'a',
      'ä',
      'Z',
      '10',
      '9',
      ' ',
      '~',
      'a b',
      'a-b',
      'ab',
      '\uff5e',
      '💡',
      'é',
      'e\u0301',
    ]
    await insert(caller, ids)
    const expected = ids.toSorted((a, b) => Buffer.compare(Buffer.from(a), Buffer.from(b)))
    expect(idsOf(await caller.call('listItems', {}))).toEqual(expected)
    const small = await pages(caller, { pageSize: 1 })
    expect(small.flatMap(idsOf)).toEqual(expected)
  })

  test.each([
    [50, 7],
    [14, 7],
    [7, 7],
    [1, 500],
  ])('gives each of %i items once, in pages of %i, and ends', async (count, pageSize) => {
    const caller = newCaller(service)
    const ids = numbered(count)
    await insert(caller, ids)
    const found = await pages(caller, { pageSize })
    expect(found.flatMap(idsOf)).toEqual(ids)
    expect(found.map(({ items }) => items.length)).toEqual([
      ...Array(Math.ceil(count / pageSize) - 1).fill(pageSize),
      count % pageSize || pageSize,
    ])
  })

  test('gives 50 items unless another page size from 1 to 500 is asked for', async () => {
    const caller = newCaller(service)
    await insert(caller, numbered(501))
    for (const [pageSize, length] of [
      [0, 50],
      [1, 1],
      [500, 500],
    ] as const) {
      const page = await caller.call('listItems', { pageSize })
      expect(page.items).toHaveLength(length)
      expect(page.nextPageToken).not.toBe('')
    }
    for (const pageSize of [-1, 501, -(2 ** 31), 2 ** 31 - 1]) {
      const failure = await caller.failure('listItems', { pageSize })
      expect(failure.code).toBe(status.INVALID_ARGUMENT)
      expect(failure.badRequest?.fieldViolations).toMatchObject([{ field: 'page_size' }])
    }
  })

  test('tells of which revision it is, and where it came from', async () => {
    await unlessStalled(async () => {
      const caller = newCaller(service)
      expect(await caller.call('listItems', {})).toMatchObject({
        items: [],
        nextPageToken: '',
        revision: 2n ** 40n,
        cache: { tier: Tier.POSTGRES, outcome: CacheOutcome.MISS },
      })
      const { item, revision } = await caller.call('createItem', { item: { id: 'a', title: 'A' } })
      const first = await caller.call('listItems', {})
      expect(first).toMatchObject({ revision, cache: { asOf: revision } })
      expect(first.items).toEqual([item])
      expect(await caller.call('listItems', {})).toMatchObject({
        items: first.items,
        cache: { tier: Tier.MEMORY, outcome: CacheOutcome.HIT },
      })
      const gone = await caller.call('deleteItem', { id: 'a' })
      expect(await caller.call('listItems', {})).toMatchObject({
        items: [],
        revision: gone.revision,
        cache: { tier: Tier.POSTGRES, asOf: gone.revision },
      })
    })
  })

  test('shows every change at once', async () => {
    const caller = newCaller(service)
    await caller.call('createItem', { item: { id: 'a', title: 'old', tags: ['x'], category: 'c' } })
    await caller.call('listItems', { tag: 'x' })
    await caller.call('updateItem', { item: { id: 'a', title: 'new', tags: ['y'], category: 'd' } })
    expect((await caller.call('listItems', {})).items).toMatchObject([{ title: 'new' }])
    for (const [filter, ids] of [
      [{ tag: 'x' }, []],
      [{ tag: 'y' }, ['a']],
      [{ category: 'c' }, []],
      [{ category: 'd' }, ['a']],
    ] as const) {
      expect(idsOf(await caller.call('listItems', filter))).toEqual(ids)
    }
  })

  test('shows soon what somebody else has changed, and keeps the pages that it does not concern', async () => {
    await unlessStalled(async () => {
      const caller = newCaller(service)
      const red = async () => (await caller.call('listItems', { tag: 'red' })).items.map(({ title }) => title)
      const lamps = async () => (await caller.call('listItems', { category: 'lamps' })).cache?.outcome
      await caller.call('createItem', { item: { id: 'a', title: 'old', tags: ['red'] } })
      await caller.call('createItem', { item: { id: 'b', title: 'lamp', category: 'lamps' } })
      expect(await red()).toEqual(['old'])
      await lamps()
      await sql(`UPDATE items SET title = 'by hand' WHERE tenant = $1 AND id = 'a'`, [caller.tenant])
      await expect.poll(red).toEqual(['by hand'])
      expect(await lamps()).toBe(CacheOutcome.HIT)
      await sql(`UPDATE items SET category = '' WHERE tenant = $1 AND id = 'b'`, [caller.tenant])
      await expect.poll(async () => (await caller.call('listItems', { category: 'lamps' })).items).toEqual([])
    })
  })

  test('comes from memory until something changes that it lists, or could list', async () => {
    await unlessStalled(async () => {
      const caller = newCaller(service)
      const cacheOf = async (request: object) => (await caller.call('listItems', request)).cache
      await caller.call('createItem', { item: { id: 'a', tags: ['x'], category: 'c' } })
      await caller.call('createItem', { item: { id: 'b', tags: ['y'], category: 'd' } })
      const untouched = [{ tag: 'x' }, { category: 'c' }, { tag: 'x', category: 'c' }]
      const touched = [{}, { tag: 'y' }, { category: 'd' }, { tag: 'y', category: 'd' }]
      const miss = { tier: Tier.POSTGRES, outcome: CacheOutcome.MISS }
      const hit = { tier: Tier.MEMORY, outcome: CacheOutcome.HIT }
      for (const list of [...untouched, ...touched]) {
        expect(await cacheOf(list)).toMatchObject(miss)
        expect(await cacheOf(list)).toMatchObject(hit)
      }
      for (const item of [
        { id: 'b', title: 'a change of what is listed' },
        { id: 'new', tags: ['y'], category: 'd' },
        { id: 'new', tags: ['z'], category: 'e' },
      ]) {
        await caller.call('updateItem', { item, allowMissing: true })
        for (const list of untouched) expect(await cacheOf(list)).toMatchObject(hit)
        for (const list of touched) expect(await cacheOf(list)).toMatchObject(miss)
      }
      // To read changes nothing. Another page is another answer.
      await caller.call('getItem', { id: 'a' })
      expect(await cacheOf({})).toMatchObject(hit)
      expect(await cacheOf({ pageSize: 1 })).toMatchObject(miss)
    })
  })

  test('finds a page in Redis that another instance has read', async () => {
    await unlessStalled(async () => {
      const caller = newCaller(service)
      await insert(caller, ['a', 'b'])
      const page = await caller.call('listItems', { pageSize: 1 })
      // While this one starts, the page is stored.
      await using other = await startService({ databaseUrl: service.databaseUrl })
      const again = await callerAs(other, caller.tenant).call('listItems', { pageSize: 1 })
      expect(again).toMatchObject({ items: page.items, nextPageToken: page.nextPageToken })
      expect(again.cache?.tier).toBe(Tier.REDIS)
    })
  })

  test('leaves out deleted items, those of other tenants, and those that only the origin knows', async () => {
    const [caller, other] = [newCaller(service), newCaller(service)]
    await insert(caller, ['a', 'b', 'c'])
    await insert(other, ['d'])
    await caller.call('deleteItem', { id: 'b' })
    expect(idsOf(await caller.call('listItems', {}))).toEqual(['a', 'c'])
    await caller.call('getItem', { id: '1' })
    await expect.poll(async () => idsOf(await caller.call('listItems', {}))).toEqual(['1', 'a', 'c'])
  })

  test('goes on where a page ended, though its last item is gone and new ones have come', async () => {
    const caller = newCaller(service)
    await insert(caller, ['b', 'd', 'f', 'h'])
    const { nextPageToken: pageToken } = await caller.call('listItems', { pageSize: 2 })
    await caller.call('deleteItem', { id: 'd' })
    await insert(caller, ['a', 'e'])
    expect(idsOf(await caller.call('listItems', { pageSize: 2, pageToken }))).toEqual(['e', 'f'])
  })

  test('takes a page token with another page size', async () => {
    const caller = newCaller(service)
    await insert(caller, numbered(10))
    const { nextPageToken: pageToken } = await caller.call('listItems', { pageSize: 3 })
    expect(idsOf(await caller.call('listItems', { pageSize: 5, pageToken }))).toEqual(
      numbered(10).slice(3, 8),
    )
  })

  test('lists by category, by tag, and by both, page by page', async () => {
    const caller = newCaller(service)
    const ids = numbered(30)
    await sql(
      `INSERT INTO items (tenant, id, category, tags)
        SELECT $1, id, (ARRAY['red', 'blue'])[1 + n % 2],
          CASE WHEN n % 3 = 0 THEN ARRAY['third', 'any'] ELSE ARRAY['any'] END
        FROM unnest($2::text[]) WITH ORDINALITY AS i (id, n)`,
      [caller.tenant, ids],
    )
    const nth = (wanted: (n: number) => boolean) => ids.filter((_, i) => wanted(i + 1))
    for (const [filter, expected] of [
      [{ category: 'red' }, nth((n) => n % 2 === 0)],
      [{ category: 'blue' }, nth((n) => n % 2 === 1)],
      [{ tag: 'third' }, nth((n) => n % 3 === 0)],
      [{ tag: 'any' }, ids],
      [{ category: 'red', tag: 'third' }, nth((n) => n % 6 === 0)],
      // A category is a tag when items are invalidated, but not when they are listed.
      [{ tag: 'red' }, []],
      [{ category: 'third' }, []],
      [{ category: 'Red' }, []],
    ] as const) {
      const found = await pages(caller, { ...filter, pageSize: 4 })
      expect(found.flatMap(idsOf)).toEqual(expected)
    }
  })

  test.each([
    ['category', { category: 'x'.repeat(65) }],
    ['category', { category: 'a\0' }],
    ['tag', { tag: 'x'.repeat(65) }],
    ['tag', { tag: 'a\n' }],
  ])('refuses a %s that no item can have', async (field, request) => {
    const failure = await newCaller(service).failure('listItems', request)
    expect(failure.code).toBe(status.INVALID_ARGUMENT)
    expect(failure.badRequest?.fieldViolations).toMatchObject([{ field }])
  })
})

describe('a page token', () => {
  let caller: Caller
  let token: string

  beforeAll(async () => {
    caller = newCaller(service)
    await insert(caller, numbered(10))
    token = (await caller.call('listItems', { pageSize: 5 })).nextPageToken
  })

  const refused = async (by: Caller, request: object) => {
    const failure = await by.failure('listItems', request)
    expect(failure).toMatchObject({
      code: status.INVALID_ARGUMENT,
      info: { reason: 'INVALID_PAGE_TOKEN' },
      badRequest: { fieldViolations: [{ field: 'page_token' }] },
    })
  }

  test('of another tenant is refused', () => refused(newCaller(service), { pageToken: token }))

  test('of a list with other filters is refused', async () => {
    await refused(caller, { pageToken: token, category: 'c' })
    await refused(caller, { pageToken: token, tag: 't' })
  })

  test('that is damaged is refused', async () => {
    const other = (letter: string | undefined) => (letter === 'A' ? 'B' : 'A')
    for (const at of [0, 5, 10, token.length - 2]) {
      await refused(caller, { pageToken: token.slice(0, at) + other(token[at]) + token.slice(at + 1) })
    }
    for (const pageToken of [
      token.slice(0, -2),
      token.slice(0, 16),
      `${token}AA`,
      `${token}=`,
      'x',
      '💡',
      '\0',
    ]) {
      await refused(caller, { pageToken })
    }
  })

  test('is good at every instance, and for ever', async () => {
    await using other = await startService({ databaseUrl: service.databaseUrl })
    const there = callerAs(other, caller.tenant)
    for (let i = 0; i < 2; i++) {
      expect(idsOf(await there.call('listItems', { pageToken: token }))).toEqual(numbered(10).slice(5))
    }
  })
})
