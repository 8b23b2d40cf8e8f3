import type { MessageInitShape } from '@bufbuild/protobuf'
import { status } from '@grpc/grpc-js'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import {
  CacheOutcome,
  Freshness,
  type InvalidateItemsRequestSchema,
  InvalidationMode,
  type Item,
  ItemSource,
  StaleReason,
  Tier,
} from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { type Caller, callerAs, newCaller } from '../support/caller.ts'
import { startService, type TestService } from '../support/service.ts'
import { unlessStalled } from '../support/stalls.ts'
import { connectSql, logOf, revisionOf, type Sql, TIMELINE } from './postgres-fixture.ts'

type Target = NonNullable<MessageInitShape<typeof InvalidateItemsRequestSchema>['target']>

const LAMP = {
  title: 'Lamp',
  description: 'Gives light.',
  category: 'lighting',
  imageUri: 'https://images.example/lamp.svg',
  price: { currencyCode: 'EUR', units: 19n, nanos: 990_000_000 },
  rating: { rate: 4.5, count: 12n },
  tags: ['sale', 'new'],
  attributes: { watts: 7, colours: ['white', null], dimmable: true, size: { cm: 40.5 } },
}

let service: TestService
let sql: Sql
/** What the catalogue answers instead of its own products, by id. */
const overridden = new Map<string, string>()

beforeAll(async () => {
  service = await startService({
    catalogue: {
      intercept: (request, response) => {
        const body = overridden.get(request.url?.replace('/products/', '') ?? '')
        if (body === undefined) return false
        response.end(body)
        return true
      },
    },
  })
  sql = await connectSql(service.databaseUrl)
})
afterAll(async () => {
  await sql?.[Symbol.asyncDispose]()
  await service?.[Symbol.asyncDispose]()
})

/** The item, or `undefined` for NOT_FOUND. */
async function read(caller: Caller, id: string): Promise<Item | undefined> {
  const { results } = await caller.call('batchGetItems', { ids: [id] })
  const [found] = results
  return found?.result.case === 'item' ? found.result.value : undefined
}

const create = async (caller: Caller, id: string, content: object = LAMP): Promise<Item> => {
  const { item } = await caller.call('createItem', { item: { id, ...content } })
  if (item === undefined) throw new Error('CreateItem answered without an item')
  return item
}

/** The catalogue's title for a product is the same for every tenant. */
async function catalogueItem(id: string): Promise<Item> {
  const item = await read(newCaller(service), id)
  if (item === undefined) throw new Error(`the catalogue has no product ${id}`)
  return item
}

describe('CreateItem', () => {
  test('stores everything that it was given, and sets source, etag, revision and times', async () => {
    const caller = newCaller(service)
    const beforeMs = Date.now()
    const { item, revision } = await caller.call('createItem', { item: { id: 'lamp', ...LAMP } })
    expect(item).toMatchObject({ id: 'lamp', ...LAMP, source: ItemSource.LOCAL, revision })
    expect(item?.etag).toMatch(/^"[0-9a-z]+"$/)
    expect(revision).toBeGreaterThan(0n)
    const createdMs = Number(item?.createTime?.seconds) * 1000
    expect(createdMs).toBeGreaterThan(beforeMs - 2000)
    expect(createdMs).toBeLessThanOrEqual(Date.now())
    expect(item?.updateTime).toEqual(item?.createTime)
  })

  test('ignores what the request says of the fields that the server sets', async () => {
    const caller = newCaller(service)
    const item = await create(caller, 'a', {
      etag: '"forged"',
      revision: 7n,
      createTime: { seconds: 1n },
      updateTime: { seconds: 1n },
      source: ItemSource.ORIGIN,
    })
    expect(item.source).toBe(ItemSource.LOCAL)
    expect(item.etag).not.toBe('"forged"')
    expect(item.revision).toBeGreaterThan(7n)
    expect(item.createTime?.seconds).toBeGreaterThan(1n)
  })

  test('keeps each tag once', async () => {
    const item = await create(newCaller(service), 'a', { tags: ['x', 'y', 'x'] })
    expect(item.tags).toEqual(['x', 'y'])
  })

  test('keeps attributes with any keys', async () => {
    const caller = newCaller(service)
    const attributes = JSON.parse('{"__proto__": {"a": 1}, "constructor": "c", "": [], "emoji 💡": "é"}')
    const item = await create(caller, 'a', { attributes })
    expect(JSON.stringify(item.attributes)).toBe(JSON.stringify((await read(caller, 'a'))?.attributes))
    expect(Object.entries(item.attributes ?? {}).sort()).toEqual(Object.entries(attributes).sort())
  })

  test('of an id that exists is ALREADY_EXISTS and changes nothing', async () => {
    const caller = newCaller(service)
    const first = await create(caller, 'a')
    const failure = await caller.failure('createItem', { item: { id: 'a', title: 'other' } })
    expect(failure).toMatchObject({ code: status.ALREADY_EXISTS, info: { reason: 'ALREADY_EXISTS' } })
    expect(await read(caller, 'a')).toEqual(first)
  })

  test('of an item that the origin has and nobody has loaded yet is ALREADY_EXISTS', async () => {
    const caller = newCaller(service)
    const failure = await caller.failure('createItem', { item: { id: '3', title: 'mine' } })
    expect(failure.code).toBe(status.ALREADY_EXISTS)
    expect((await read(caller, '3'))?.title).toBe((await catalogueItem('3')).title)
  })

  test('takes a number that the origin does not know', async () => {
    const caller = newCaller(service)
    expect(await read(caller, '9999')).toBeUndefined()
    await create(caller, '9999')
    expect(await read(caller, '9999')).toMatchObject({ title: 'Lamp', source: ItemSource.LOCAL })
  })

  test('of one id by many at once succeeds for one of them', async () => {
    const caller = newCaller(service)
    const outcomes = await Promise.allSettled(
      Array.from({ length: 10 }, (_, i) => caller.call('createItem', { item: { id: 'a', title: `${i}` } })),
    )
    const created = outcomes.filter((outcome) => outcome.status === 'fulfilled')
    expect(created).toHaveLength(1)
    expect((await read(caller, 'a'))?.title).toBe(created[0]?.value.item?.title)
    for (const outcome of outcomes) {
      if (outcome.status === 'rejected') expect(outcome.reason.code).toBe(status.ALREADY_EXISTS)
    }
  })

  test('revives a deleted item as a new one', async () => {
    const caller = newCaller(service)
    const first = await create(caller, 'a')
    await caller.call('deleteItem', { id: 'a' })
    const second = await create(caller, 'a', { title: 'again' })
    expect(second).toMatchObject({ title: 'again', description: '', tags: [] })
    expect(second.revision).toBeGreaterThan(first.revision)
    expect(second.etag).not.toBe(first.etag)
    expect((await read(caller, 'a'))?.title).toBe('again')
  })
})

describe('UpdateItem', () => {
  const update = (caller: Caller, item: object, ...paths: string[]) =>
    caller.call('updateItem', { item, updateMask: { paths } })

  test('changes the fields that the mask names, and no others', async () => {
    const caller = newCaller(service)
    const before = await create(caller, 'a')
    const { item, revision } = await update(
      caller,
      { id: 'a', title: 'New', description: 'Not named' },
      'title',
    )
    expect(item).toEqual({
      ...before,
      title: 'New',
      revision,
      etag: item?.etag,
      updateTime: item?.updateTime,
    })
    expect(revision).toBeGreaterThan(before.revision)
    expect(item?.etag).not.toBe(before.etag)
  })

  test('changes parts of price and rating without being told the others', async () => {
    const caller = newCaller(service)
    await create(caller, 'a')
    const { item } = await update(
      caller,
      { id: 'a', price: { units: 5n }, rating: { count: 13n } },
      'price.units',
      'rating.count',
    )
    expect(item?.price).toMatchObject({ currencyCode: 'EUR', units: 5n, nanos: 990_000_000 })
    expect(item?.rating).toMatchObject({ rate: 4.5, count: 13n })
    const later = await update(caller, { id: 'a' }, 'price.nanos', 'rating.rate')
    expect(later.item?.price).toMatchObject({ currencyCode: 'EUR', units: 5n, nanos: 0 })
    expect(later.item?.rating).toMatchObject({ rate: 0, count: 13n })
  })

  describe('by many at once', () => {
    test('of items that memory knows shares commits, and everybody gets what they wrote', async () => {
      const caller = newCaller(service)
      const ids = Array.from({ length: 60 }, (_, n) => `many-${n}`)
      for (const id of ids) await create(caller, id)
      const before = await revisionOf(sql, caller.tenant)
      const answers = await Promise.all(
        ids.map((id) => update(caller, { id, title: `New ${id}`, tags: [id] }, 'title', 'tags')),
      )
      expect(answers.map(({ item }) => item?.title)).toEqual(ids.map((id) => `New ${id}`))
      expect(answers.map(({ item }) => item?.category)).toEqual(ids.map(() => LAMP.category))
      const log = (await logOf(sql, caller.tenant)).filter(({ revision }) => revision > before)
      expect(log.map(({ revision }) => revision)).toEqual(ids.map((_, n) => before + 1 + n))
      const transactions = await sql(
        'SELECT DISTINCT xmin::text FROM invalidations WHERE tenant = $1 AND revision > $2',
        [caller.tenant, TIMELINE + before],
      )
      expect(transactions.length).toBeLessThan(60)
      expect(log.flatMap((row) => row.ids).sort()).toEqual(ids.toSorted())
      for (const { item, revision } of answers) {
        const row = log.find(({ revision: own }) => own === Number(revision) - TIMELINE)
        expect(row?.ids).toContain(item?.id)
        expect(await read(caller, item?.id ?? '')).toEqual(item)
      }
    })

    test('of one item keeps every change', async () => {
      const caller = newCaller(service)
      await create(caller, 'a')
      const fields = ['title', 'description', 'category', 'image_uri', 'rating.rate', 'price.units'] as const
      const after = {
        title: 'T',
        description: 'D',
        category: 'C',
        imageUri: 'https://images.example/new.svg',
        rating: { rate: 1 },
        price: { units: 7n },
      }
      await Promise.all(fields.map((path) => update(caller, { id: 'a', ...after }, path)))
      expect(await read(caller, 'a')).toMatchObject({ ...after, tags: LAMP.tags })
    })

    test('with the same etag lets one through, and does not keep the others’ items from being written', async () => {
      const caller = newCaller(service)
      const { etag } = await create(caller, 'a')
      const others = ['b', 'c', 'd']
      for (const id of others) await create(caller, id)
      const [first, ...rest] = await Promise.allSettled([
        ...others.map((id) => update(caller, { id, title: 'New' }, 'title')),
        ...['1', '2', '3', '4'].map((title) => update(caller, { id: 'a', etag, title }, 'title')),
      ])
      expect(first?.status).toBe('fulfilled')
      expect(rest.filter(({ status }) => status === 'fulfilled')).toHaveLength(2 + 1)
      for (const each of rest) {
        if (each.status === 'rejected') expect(each.reason).toMatchObject({ code: status.ABORTED })
      }
    })

    test('of which one breaks a rule of the database refuses that one alone', async () => {
      const caller = newCaller(service)
      for (const id of ['a', 'b', 'c']) await create(caller, id)
      await sql(`ALTER TABLE items ADD CONSTRAINT no_gnomes CHECK (title <> 'gnome')`)
      try {
        const answers = await Promise.allSettled(
          ['a', 'b', 'c'].map((id) => update(caller, { id, title: id === 'b' ? 'gnome' : 'New' }, 'title')),
        )
        expect(answers.map((each) => each.status)).toEqual(['fulfilled', 'rejected', 'fulfilled'])
        expect(answers[1]).toMatchObject({ reason: { code: status.INVALID_ARGUMENT } })
        expect((await read(caller, 'b'))?.title).toBe(LAMP.title)
      } finally {
        await sql('ALTER TABLE items DROP CONSTRAINT no_gnomes')
      }
    })

    test('with one request id writes once, and everybody gets that outcome', async () => {
      const caller = newCaller(service)
      const { revision } = await create(caller, 'a')
      const request = { item: { id: 'a', title: 'New' }, updateMask: { paths: ['title'] }, requestId: 'r' }
      const answers = await Promise.all(Array.from({ length: 5 }, () => caller.call('updateItem', request)))
      for (const answer of answers) expect(answer).toEqual(answers[0])
      expect(answers[0]?.revision).toBe(revision + 1n)
      expect(await revisionOf(sql, caller.tenant)).toBe(2)
    })
  })

  test('refuses parts that do not fit the rest', async () => {
    const caller = newCaller(service)
    const before = await create(caller, 'a')
    const paths = ['price.units']
    const failure = await caller.failure('updateItem', {
      item: { id: 'a', price: { units: -5n } },
      updateMask: { paths },
    })
    expect(failure).toMatchObject({
      code: status.INVALID_ARGUMENT,
      badRequest: { fieldViolations: [{ field: 'item.price.nanos' }] },
    })
    await create(caller, 'free', { title: 'without a price' })
    const priceless = await caller.failure('updateItem', {
      item: { id: 'free', price: { units: 5n } },
      updateMask: { paths },
    })
    expect(priceless.badRequest?.fieldViolations).toMatchObject([{ field: 'item.price.currency_code' }])
    expect(await read(caller, 'a')).toEqual(before)
  })

  test('clears a field that is named and not set', async () => {
    const caller = newCaller(service)
    await create(caller, 'a')
    const { item } = await update(
      caller,
      { id: 'a' },
      'description',
      'category',
      'image_uri',
      'price',
      'rating',
      'tags',
      'attributes',
    )
    expect(item).toMatchObject({ title: 'Lamp', description: '', category: '', imageUri: '', tags: [] })
    expect(item?.price).toBeUndefined()
    expect(item?.rating).toBeUndefined()
    expect(item?.attributes).toBeUndefined()
  })

  test('with * replaces everything', async () => {
    const caller = newCaller(service)
    await create(caller, 'a')
    const { item } = await update(caller, { id: 'a', title: 'Only this' }, '*')
    expect(item).toMatchObject({ title: 'Only this', description: '', category: '', tags: [] })
    expect(item?.price).toBeUndefined()
  })

  test('without a mask changes the fields that are set', async () => {
    const caller = newCaller(service)
    await create(caller, 'a')
    const { item } = await caller.call('updateItem', { item: { id: 'a', title: 'New', tags: ['old'] } })
    expect(item).toMatchObject({ ...LAMP, title: 'New', tags: ['old'] })
    const emptied = await update(caller, { id: 'a', attributes: {} })
    expect(emptied.item).toMatchObject({ title: 'New', attributes: {} })
  })

  test('ignores what the item says of fields that the mask does not name, whatever it is', async () => {
    const caller = newCaller(service)
    await create(caller, 'a')
    const { item } = await update(caller, { id: 'a', title: 'New', price: { currencyCode: 'euro' } }, 'title')
    expect(item).toMatchObject({ title: 'New', price: LAMP.price })
  })

  test('lists every path that is unknown or that only the server sets', async () => {
    const caller = newCaller(service)
    await create(caller, 'a')
    const failure = await caller.failure('updateItem', {
      item: { id: 'a', title: 'New' },
      updateMask: {
        paths: ['title', 'colour', 'price.tax', 'tags.0', 'revision', 'create_time', 'source', ''],
      },
    })
    expect(failure.code).toBe(status.INVALID_ARGUMENT)
    const said = failure.badRequest?.fieldViolations.map(({ description }) => description).join('\n')
    for (const path of ['colour', 'price.tax', 'tags.0', 'revision', 'create_time', 'source', '""']) {
      expect(said).toContain(path)
    }
    expect(failure.badRequest?.fieldViolations).toHaveLength(7)
    expect((await read(caller, 'a'))?.title).toBe('Lamp')
  })

  test('with an etag that is not the current one is ABORTED and changes nothing', async () => {
    const caller = newCaller(service)
    const first = await create(caller, 'a')
    const second = (await update(caller, { id: 'a', etag: first.etag, title: 'Second' }, 'title')).item
    const late = { item: { id: 'a', etag: first.etag, title: 'Late' }, updateMask: { paths: ['title'] } }
    const failure = await caller.failure('updateItem', late)
    expect(failure).toMatchObject({ code: status.ABORTED, info: { reason: 'ETAG_MISMATCH' } })
    expect(await read(caller, 'a')).toEqual(second)
  })

  test('of an absent item is NOT_FOUND, or creates it with allow_missing', async () => {
    const caller = newCaller(service)
    const item = { id: 'a', title: 'New' }
    expect((await caller.failure('updateItem', { item })).code).toBe(status.NOT_FOUND)
    const etagged = { item: { ...item, etag: '"x"' }, allowMissing: true }
    expect((await caller.failure('updateItem', etagged)).code).toBe(status.ABORTED)
    const made = await caller.call('updateItem', {
      item,
      allowMissing: true,
      updateMask: { paths: ['title'] },
    })
    expect(made.item).toMatchObject({ title: 'New', source: ItemSource.LOCAL })
  })

  test('of a deleted item is NOT_FOUND, or revives it with allow_missing', async () => {
    const caller = newCaller(service)
    await create(caller, 'a')
    await caller.call('deleteItem', { id: 'a' })
    const item = { id: 'a', title: 'New' }
    expect((await caller.failure('updateItem', { item })).code).toBe(status.NOT_FOUND)
    await caller.call('updateItem', { item, allowMissing: true })
    // Nothing of what it was before comes back.
    expect(await read(caller, 'a')).toMatchObject({ title: 'New', description: '', tags: [] })
  })

  test('of an origin item that nobody has loaded keeps its other fields and makes it local', async () => {
    const caller = newCaller(service)
    const known = await catalogueItem('4')
    const { item } = await update(caller, { id: '4', title: 'Ours' }, 'title')
    expect(item).toMatchObject({
      title: 'Ours',
      description: known.description,
      price: known.price,
      rating: known.rating,
      source: ItemSource.LOCAL,
    })
  })

  test('that changes nothing takes no revision', async () => {
    const caller = newCaller(service)
    const before = await create(caller, 'a')
    const { item, revision } = await update(caller, { id: 'a', title: 'Lamp' }, 'title')
    expect(item).toEqual(before)
    expect(revision).toBe(before.revision)
    expect(await logOf(sql, caller.tenant)).toHaveLength(1)
  })

  test('of different fields at once keeps both changes', async () => {
    const caller = newCaller(service)
    await create(caller, 'a')
    const titles = Array.from({ length: 5 }, (_, i) => update(caller, { id: 'a', title: `t${i}` }, 'title'))
    await Promise.all([
      ...titles,
      update(caller, { id: 'a', description: 'D' }, 'description'),
      update(caller, { id: 'a', category: 'C' }, 'category'),
    ])
    const item = await read(caller, 'a')
    expect(item).toMatchObject({ description: 'D', category: 'C' })
    expect(item?.title).toMatch(/^t\d$/)
  })
})

describe('DeleteItem', () => {
  test('of an origin item lasts: nobody asks the origin for it again', async () => {
    const caller = newCaller(service)
    expect(await read(caller, '5')).toBeDefined()
    await caller.call('deleteItem', { id: '5' })
    const asked = service.catalogue.requests.get('/products/5')
    const failure = await caller.failure('getItem', { id: '5' })
    expect(failure.code).toBe(status.NOT_FOUND)
    const options = { freshness: Freshness.FRESH }
    const fresh = await caller.failure('getItem', { id: '5', options })
    expect(fresh).toMatchObject({ code: status.NOT_FOUND, cache: { tier: Tier.POSTGRES } })
    expect(service.catalogue.requests.get('/products/5')).toBe(asked)
  })

  test('of an origin item that nobody has loaded lasts, too', async () => {
    const caller = newCaller(service)
    const { revision } = await caller.call('deleteItem', { id: '6' })
    expect(revision).toBeGreaterThan(0n)
    expect(await read(caller, '6')).toBeUndefined()
    // Not even for an instance that knows nothing of it.
    await using other = await startService({ databaseUrl: service.databaseUrl })
    expect(await read(callerAs(other, caller.tenant), '6')).toBeUndefined()
    expect(other.catalogue.requests.size).toBe(0)
  })

  test('of an absent item is NOT_FOUND, or nothing with allow_missing', async () => {
    const caller = newCaller(service)
    expect((await caller.failure('deleteItem', { id: 'a' })).code).toBe(status.NOT_FOUND)
    expect((await caller.call('deleteItem', { id: 'a', allowMissing: true })).revision).toBe(2n ** 40n)
    await create(caller, 'a')
    const { revision } = await caller.call('deleteItem', { id: 'a' })
    expect((await caller.failure('deleteItem', { id: 'a' })).code).toBe(status.NOT_FOUND)
    expect((await caller.call('deleteItem', { id: 'a', allowMissing: true })).revision).toBe(revision)
    expect(await logOf(sql, caller.tenant)).toHaveLength(2)
  })

  test('with an etag that is not the current one is ABORTED and deletes nothing', async () => {
    const caller = newCaller(service)
    const { etag } = await create(caller, 'a')
    const failure = await caller.failure('deleteItem', { id: 'a', etag: '"0"' })
    expect(failure).toMatchObject({ code: status.ABORTED, info: { reason: 'ETAG_MISMATCH' } })
    expect(await read(caller, 'a')).toBeDefined()
    await caller.call('deleteItem', { id: 'a', etag })
    expect(await read(caller, 'a')).toBeUndefined()
  })
})

describe('after a write', () => {
  test('the same instance serves the new value from memory', async () => {
    await unlessStalled(async () => {
      const caller = newCaller(service)
      const created = await create(caller, 'a')
      const first = await caller.call('getItem', { id: 'a' })
      expect(first.cache).toMatchObject({ tier: Tier.MEMORY, outcome: CacheOutcome.HIT })
      expect(first.result.value).toEqual(created)

      const { item, revision } = await caller.call('updateItem', { item: { id: 'a', title: 'New' } })
      const second = await caller.call('getItem', { id: 'a' })
      expect(second.cache).toMatchObject({ tier: Tier.MEMORY, outcome: CacheOutcome.HIT })
      expect(second.result.value).toEqual(item)
      expect(second.revision).toBe(revision)

      await caller.call('deleteItem', { id: 'a' })
      const third = await caller.failure('getItem', { id: 'a' })
      expect(third.cache).toMatchObject({ tier: Tier.MEMORY, outcome: CacheOutcome.NEGATIVE_HIT })

      await create(caller, 'a', { title: 'again' })
      const fourth = await caller.call('getItem', { id: 'a' })
      expect(fourth.cache).toMatchObject({ tier: Tier.MEMORY, outcome: CacheOutcome.HIT })
      expect(fourth.result.value).toMatchObject({ title: 'again' })
    })
  })

  test('another instance that is told its revision serves it, or newer', async () => {
    const caller = newCaller(service)
    await create(caller, 'a')
    await using other = await startService({ databaseUrl: service.databaseUrl })
    const there = callerAs(other, caller.tenant)
    await there.call('getItem', { id: 'a' })
    const { revision } = await caller.call('updateItem', { item: { id: 'a', title: 'New' } })
    const { result } = await there.call('getItem', { id: 'a', options: { minRevision: revision } })
    expect(result.value).toMatchObject({ title: 'New' })
  })

  test('the log has a row for it that names the writer', async () => {
    const caller = newCaller(service)
    const as = (writer: string) => ({ metadata: { 'x-client-id': writer } })
    await caller.call('createItem', { item: { id: 'a', tags: ['t'], category: 'c' } }, as('one'))
    await caller.call('updateItem', { item: { id: 'a', tags: ['u'] } }, as('two'))
    await caller.call('deleteItem', { id: 'a' }, as('three'))
    await caller.call('createItem', { item: { id: 'b' } })
    const { ids, tags } = { ids: { ids: ['a', 'b'] }, tags: { tags: ['t'] } }
    await caller.call('invalidateItems', { target: { case: 'ids', value: ids } }, as('four'))
    await caller.call('invalidateItems', {
      target: { case: 'tags', value: tags },
      mode: InvalidationMode.REMOVE,
    })
    await caller.call('invalidateItems', { target: { case: 'all', value: true } }, as('five'))
    expect(await logOf(sql, caller.tenant)).toEqual([
      { revision: 1, kind: 'UPSERTED', mode: 'EXPIRE', ids: ['a'], tags: ['c', 't'], writer: 'one' },
      { revision: 2, kind: 'UPSERTED', mode: 'EXPIRE', ids: ['a'], tags: ['c', 't', 'u'], writer: 'two' },
      { revision: 3, kind: 'DELETED', mode: 'REMOVE', ids: ['a'], tags: ['c', 'u'], writer: 'three' },
      { revision: 4, kind: 'UPSERTED', mode: 'EXPIRE', ids: ['b'], tags: [], writer: '' },
      { revision: 5, kind: 'KEYS_INVALIDATED', mode: 'EXPIRE', ids: ['a', 'b'], tags: [], writer: 'four' },
      { revision: 6, kind: 'TAGS_INVALIDATED', mode: 'REMOVE', ids: [], tags: ['t'], writer: '' },
      { revision: 7, kind: 'TENANT_INVALIDATED', mode: 'EXPIRE', ids: [], tags: [], writer: 'five' },
    ])
  })
})

describe('a request id', () => {
  const requestId = 'request-1'
  const WRITES = {
    createItem: { item: { id: 'new', title: 'New' } },
    updateItem: { item: { id: 'a', title: 'New' } },
    deleteItem: { id: 'a' },
    invalidateItems: { target: { case: 'ids', value: { ids: ['a'] } } },
  } as const
  const OTHERS = {
    createItem: { item: { id: 'new', title: 'Other' } },
    updateItem: { item: { id: 'a', title: 'Other' } },
    deleteItem: { id: 'a', allowMissing: true },
    invalidateItems: { target: { case: 'all', value: true } },
  } as const
  const names = ['createItem', 'updateItem', 'deleteItem', 'invalidateItems'] as const

  test.each(names)('makes a retry of %s return the first outcome and change nothing', async (name) => {
    const caller = newCaller(service)
    await create(caller, 'a')
    const request = { ...WRITES[name], requestId }
    const first = await caller.call(name, request)
    const revision = await revisionOf(sql, caller.tenant)
    expect(await caller.call(name, request)).toEqual(first)
    // Later writes do not change what a retry returns, nor does it undo them.
    await caller.call('updateItem', { item: { id: 'a', title: 'Later' }, allowMissing: true })
    expect(await caller.call(name, request)).toEqual(first)
    expect(await revisionOf(sql, caller.tenant)).toBe(revision + 1)
    expect((await read(caller, 'a'))?.title).toBe('Later')
    // Any instance knows it.
    await using other = await startService({ databaseUrl: service.databaseUrl })
    expect(await callerAs(other, caller.tenant).call(name, request)).toEqual(first)
  })

  test.each(names)('makes retries of %s at the same time one write', async (name) => {
    const caller = newCaller(service)
    await create(caller, 'a')
    const revision = await revisionOf(sql, caller.tenant)
    const request = { ...WRITES[name], requestId }
    const [first, ...others] = await Promise.all(Array.from({ length: 8 }, () => caller.call(name, request)))
    for (const other of others) expect(other).toEqual(first)
    expect(await revisionOf(sql, caller.tenant)).toBe(revision + 1)
  })

  test.each(names)('is refused when it comes back to %s with another content', async (name) => {
    const caller = newCaller(service)
    await create(caller, 'a')
    await caller.call(name, { ...WRITES[name], requestId })
    const revision = await revisionOf(sql, caller.tenant)
    const failure = await caller.failure(name, { ...OTHERS[name], requestId })
    expect(failure).toMatchObject({
      code: status.INVALID_ARGUMENT,
      info: { reason: 'REQUEST_ID_REUSED' },
      badRequest: { fieldViolations: [{ field: 'request_id' }] },
    })
    const elsewhere = name === 'deleteItem' ? 'createItem' : 'deleteItem'
    const other = await caller.failure(elsewhere, { ...WRITES[elsewhere], requestId })
    expect(other.info?.reason).toBe('REQUEST_ID_REUSED')
    expect(await revisionOf(sql, caller.tenant)).toBe(revision)
  })

  test('belongs to its tenant', async () => {
    const [one, two] = [newCaller(service), newCaller(service)]
    await one.call('createItem', { item: { id: 'a', title: 'one' }, requestId })
    await two.call('createItem', { item: { id: 'a', title: 'two' }, requestId })
    expect((await read(two, 'a'))?.title).toBe('two')
  })

  test('of a write that failed can be used again', async () => {
    const caller = newCaller(service)
    const request = { item: { id: 'a', title: 'New' }, requestId }
    expect((await caller.failure('updateItem', request)).code).toBe(status.NOT_FOUND)
    await create(caller, 'a')
    expect((await caller.call('updateItem', request)).item).toMatchObject({ title: 'New' })
  })

  test('knows its request again when a client encodes the attributes in another order', async () => {
    const caller = newCaller(service)
    const one = { id: 'a', attributes: { x: 1, y: { p: [1, 2], q: null } } }
    const two = { id: 'a', attributes: { y: { q: null, p: [1, 2] }, x: 1 } }
    const first = await caller.call('createItem', { item: one, requestId })
    expect(await caller.call('createItem', { item: two, requestId })).toEqual(first)
    const swapped = { id: 'a', attributes: { x: 1, y: { p: [2, 1], q: null } } }
    const failure = await caller.failure('createItem', { item: swapped, requestId })
    expect(failure.info?.reason).toBe('REQUEST_ID_REUSED')
  })
})

describe('InvalidateItems', () => {
  const targets = ['ids', 'tags', 'category', 'all'] as const
  const TARGETS: Readonly<Record<(typeof targets)[number], Target>> = {
    ids: { case: 'ids', value: { ids: ['a', 'elsewhere'] } },
    tags: { case: 'tags', value: { tags: ['unused', 't'] } },
    category: { case: 'tags', value: { tags: ['c'] } },
    all: { case: 'all', value: true },
  }

  const cacheOf = async (caller: Caller, id: string, options = {}) =>
    (await caller.call('getItem', { id, options })).cache
  const cacheOnly = { freshness: Freshness.CACHE_ONLY }
  const current = { tier: Tier.MEMORY, outcome: CacheOutcome.HIT }

  /** `a` is what the targets name, `b` is not, and both are in memory. */
  async function warm(on: TestService = service): Promise<Caller> {
    const caller = newCaller(on)
    await create(caller, 'a', { title: 'A', tags: ['t'], category: 'c' })
    await create(caller, 'b', { title: 'B', tags: ['u'], category: 'd' })
    return caller
  }

  test.each(targets)('of %s with EXPIRE serves the old copy as stale while it reloads', async (target) => {
    await unlessStalled(async () => {
      const caller = await warm()
      const { revision } = await caller.call('invalidateItems', {
        target: TARGETS[target],
        mode: InvalidationMode.EXPIRE,
      })
      expect(Number(revision)).toBe((await revisionOf(sql, caller.tenant)) + TIMELINE)
      expect(await cacheOf(caller, 'a')).toMatchObject({
        tier: Tier.MEMORY,
        outcome: CacheOutcome.STALE,
        staleReason: StaleReason.REVALIDATING,
      })
      await expect.poll(() => cacheOf(caller, 'a')).toMatchObject(current)
      expect((await caller.call('getItem', { id: 'a' })).revision).toBeGreaterThanOrEqual(revision)
      if (target !== 'all') expect(await cacheOf(caller, 'b')).toMatchObject(current)
    })
  })

  test.each(targets)('of %s with REMOVE never serves the old copy again', async (target) => {
    await unlessStalled(async () => {
      const caller = await warm()
      const { revision } = await caller.call('invalidateItems', {
        target: TARGETS[target],
        mode: InvalidationMode.REMOVE,
      })
      const nowhere = await caller.call('getItem', { id: 'a', options: cacheOnly })
      expect(nowhere.result.case).toBeUndefined()
      const first = await caller.call('getItem', { id: 'a' })
      expect(first.cache).toMatchObject({ tier: Tier.POSTGRES, outcome: CacheOutcome.MISS })
      expect(first.revision).toBeGreaterThanOrEqual(revision)
      expect(await cacheOf(caller, 'a')).toMatchObject(current)
      if (target !== 'all') expect(await cacheOf(caller, 'b')).toMatchObject(current)
    })
  })

  test('reaches copies in Redis, too', async () => {
    await using small = await startService({ env: { ITEMCACHE_MEMORY_MAX_ENTRIES: '1' } })
    for (const target of targets) {
      for (const mode of [InvalidationMode.EXPIRE, InvalidationMode.REMOVE]) {
        await unlessStalled(async () => {
          const caller = await warm(small)
          expect(await cacheOf(caller, 'a', cacheOnly)).toMatchObject({
            tier: Tier.REDIS,
            outcome: CacheOutcome.HIT,
          })
          await cacheOf(caller, 'b')
          await caller.call('invalidateItems', { target: TARGETS[target], mode })
          const { result, cache } = await caller.call('getItem', { id: 'a', options: cacheOnly })
          if (mode === InvalidationMode.REMOVE) expect(result.case).toBeUndefined()
          else expect(cache).toMatchObject({ tier: Tier.REDIS, outcome: CacheOutcome.STALE })
        })
      }
    }
  })

  test('with EXPIRE reloads at once for a caller who allows nothing stale', async () => {
    const caller = await warm()
    await caller.call('invalidateItems', { target: TARGETS.ids })
    expect(await cacheOf(caller, 'a', { allowStale: false })).toMatchObject({
      tier: Tier.POSTGRES,
      outcome: CacheOutcome.MISS,
    })
  })

  test('does not reach another tenant', async () => {
    await unlessStalled(async () => {
      const [mine, theirs] = [await warm(), await warm()]
      await mine.call('invalidateItems', { target: TARGETS.all, mode: InvalidationMode.REMOVE })
      expect(await cacheOf(mine, 'a')).toMatchObject({ outcome: CacheOutcome.MISS })
      expect(await cacheOf(theirs, 'a')).toMatchObject(current)
    })
  })

  test('changes no item', async () => {
    const caller = newCaller(service)
    const before = await create(caller, 'a')
    await caller.call('invalidateItems', { target: TARGETS.all, mode: InvalidationMode.REMOVE })
    expect(await read(caller, 'a')).toEqual(before)
  })

  test.each<[string, MessageInitShape<typeof InvalidateItemsRequestSchema>, string]>([
    ['no target', {}, 'target'],
    ['all: false', { target: { case: 'all', value: false } }, 'all'],
    ['no ids', { target: { case: 'ids', value: { ids: [] } } }, 'ids.ids'],
    ['501 ids', { target: { case: 'ids', value: { ids: Array(501).fill('a') } } }, 'ids.ids'],
    ['a bad id', { target: { case: 'ids', value: { ids: ['a', ''] } } }, 'ids.ids[1]'],
    ['no tags', { target: { case: 'tags', value: { tags: [] } } }, 'tags.tags'],
    ['33 tags', { target: { case: 'tags', value: { tags: Array(33).fill('a') } } }, 'tags.tags'],
    ['a long tag', { target: { case: 'tags', value: { tags: ['x'.repeat(65)] } } }, 'tags.tags[0]'],
    ['an unknown mode', { target: TARGETS.ids, mode: 9 as InvalidationMode }, 'mode'],
  ])('refuses %s', async (_, request, field) => {
    const caller = newCaller(service)
    const failure = await caller.failure('invalidateItems', request)
    expect(failure.code).toBe(status.INVALID_ARGUMENT)
    expect(failure.badRequest?.fieldViolations.map((violation) => violation.field)).toEqual([field])
    expect(await revisionOf(sql, caller.tenant)).toBe(0)
  })
})

describe('refresh_origin', () => {
  const product = (id: string, title: string) => JSON.stringify({ id: Number(id), title, price: 1 })
  const refresh = (caller: Caller, ...ids: string[]) =>
    caller.call('invalidateItems', { target: { case: 'ids', value: { ids } }, refreshOrigin: true })

  test('fetches what the catalogue says now', async () => {
    await unlessStalled(async () => {
      const caller = newCaller(service)
      overridden.set('101', product('101', 'before')).set('102', product('102', 'same'))
      expect((await read(caller, '101'))?.title).toBe('before')
      const same = await read(caller, '102')
      overridden.set('101', product('101', 'after'))
      const { revision } = await refresh(caller, '101', '102', 'not-from-there')
      const after = await caller.call('getItem', { id: '101' })
      expect(after.cache).toMatchObject({ tier: Tier.MEMORY, outcome: CacheOutcome.HIT })
      // It was fetched before the invalidation was logged, and read again after.
      expect(after.result.value).toMatchObject({
        title: 'after',
        source: ItemSource.ORIGIN,
        revision: revision - 1n,
      })
      expect(after.revision).toBeGreaterThanOrEqual(revision)
      expect(await read(caller, '102')).toEqual(same)
    })
  })

  test('is not done again by the retry of a call that succeeded', async () => {
    const caller = newCaller(service)
    overridden.set('103', product('103', 'first'))
    const request = {
      target: { case: 'ids' as const, value: { ids: ['103'] } },
      refreshOrigin: true,
      requestId: 'again',
    }
    const { revision } = await caller.call('invalidateItems', request)
    overridden.set('103', product('103', 'second'))
    expect((await caller.call('invalidateItems', request)).revision).toBe(revision)
    expect((await read(caller, '103'))?.title).toBe('first')
  })

  test('loads an item that nobody has asked for yet', async () => {
    await unlessStalled(async () => {
      const caller = newCaller(service)
      await refresh(caller, '7')
      const { cache, result } = await caller.call('getItem', { id: '7' })
      expect(cache?.tier).toBe(Tier.MEMORY)
      expect(result.value).toMatchObject({ source: ItemSource.ORIGIN })
    })
  })

  test('revives a deleted item that the origin still has', async () => {
    const caller = newCaller(service)
    await caller.call('deleteItem', { id: '8' })
    expect(await read(caller, '8')).toBeUndefined()
    await refresh(caller, '8')
    expect(await read(caller, '8')).toMatchObject({ source: ItemSource.ORIGIN })
  })

  test('deletes an item that the origin no longer has', async () => {
    const caller = newCaller(service)
    overridden.set('103', product('103', 'there'))
    expect(await read(caller, '103')).toBeDefined()
    overridden.set('103', 'null')
    await refresh(caller, '103')
    expect(await read(caller, '103')).toBeUndefined()
  })

  test('never overwrites an item that was written here', async () => {
    const caller = newCaller(service)
    overridden.set('104', product('104', 'theirs'))
    const { item } = await caller.call('updateItem', { item: { id: '104', title: 'ours' } })
    overridden.set('104', product('104', 'theirs, newer'))
    await refresh(caller, '104')
    expect(await read(caller, '104')).toEqual(item)
    overridden.set('104', 'null')
    await refresh(caller, '104')
    expect(await read(caller, '104')).toEqual(item)
  })

  test('changes nothing when the origin does not answer', async () => {
    const caller = newCaller(service)
    overridden.set('105', product('105', 'there'))
    await read(caller, '105')
    const revision = await revisionOf(sql, caller.tenant)
    overridden.set('105', 'this is no JSON')
    const target: Target = { case: 'ids', value: { ids: ['105'] } }
    const failure = await caller.failure('invalidateItems', { target, refreshOrigin: true })
    expect(failure.code).toBe(status.UNAVAILABLE)
    expect(failure.retry?.retryDelay).toBeDefined()
    expect(await revisionOf(sql, caller.tenant)).toBe(revision)
  })

  test.each<[string, Target]>([
    ['tags', { case: 'tags', value: { tags: ['t'] } }],
    ['all', { case: 'all', value: true }],
    ['more than 100 ids', { case: 'ids', value: { ids: Array.from({ length: 101 }, (_, i) => `${i}`) } }],
  ])('is refused with %s', async (_, target) => {
    const failure = await newCaller(service).failure('invalidateItems', { target, refreshOrigin: true })
    expect(failure.code).toBe(status.INVALID_ARGUMENT)
    expect(failure.badRequest?.fieldViolations).toMatchObject([{ field: 'refresh_origin' }])
  })
})
