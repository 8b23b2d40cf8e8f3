import { create } from '@bufbuild/protobuf'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { type Item, ItemSchema, ItemSource } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import type { ItemDraft } from '../../src/item.ts'
import { cut, type ItemMask, merge, parseMask, readOnlyFields, setFields } from '../../src/rpc/field-mask.ts'

const FIELDS = ItemSchema.fields.map(({ name }) => name)
const SUB_FIELDS = ['price.currency_code', 'price.units', 'price.nanos', 'rating.rate', 'rating.count']

const item = create(ItemSchema, {
  id: 'a',
  title: 'A',
  description: 'D',
  category: 'c',
  imageUri: 'u',
  price: { currencyCode: 'EUR', units: 5n, nanos: 7 },
  rating: { rate: 4, count: 3n },
  tags: ['t'],
  attributes: { k: 1 },
  etag: '"e"',
  revision: 9n,
  createTime: { seconds: 1n },
  updateTime: { seconds: 2n },
  source: ItemSource.LOCAL,
})
const whole: ItemDraft = {
  title: 'A',
  description: 'D',
  category: 'c',
  imageUri: 'u',
  price: { currencyCode: 'EUR', units: 5n, nanos: 7 },
  rating: { rate: 4, count: 3n },
  tags: ['t'],
  attributes: { k: 1 },
}
const nothing: ItemDraft = {
  title: '',
  description: '',
  category: '',
  imageUri: '',
  price: undefined,
  rating: undefined,
  tags: [],
  attributes: undefined,
}

/** The mask of paths that are known to be good. */
function maskOf(...paths: string[]): ItemMask | undefined {
  const { parsed, unknown } = parseMask(paths)
  expect(unknown).toEqual([])
  return parsed
}

describe('parseMask', () => {
  test('knows every field of an item, and the parts of price and rating', () => {
    for (const path of [...FIELDS, ...SUB_FIELDS]) expect(parseMask([path]).unknown).toEqual([])
  })

  test('takes * for all fields, wherever it stands, and still finds unknown paths', () => {
    expect(parseMask(['*'])).toEqual({ parsed: undefined, unknown: [] })
    expect(parseMask(['title', '*', 'colour'])).toEqual({ parsed: undefined, unknown: ['colour'] })
  })

  test.each([
    '',
    '.',
    'colour',
    'Title',
    'imageUri',
    'title.x',
    'price.',
    'price.tax',
    'price.units.x',
    '.price',
    'tags.0',
    'attributes.k',
    'create_time.seconds',
    '__proto__',
    'constructor',
    'price.__proto__',
    'price.constructor',
    '**',
    ' title',
  ])('does not know "%s"', (path) => {
    const { parsed, unknown } = parseMask([path, 'title'])
    expect(unknown).toEqual([path])
    expect(parsed).toEqual(new Map([['title', 'all']]))
  })

  test('takes the whole of a field that is named with and without a part', () => {
    for (const paths of [
      ['price', 'price.units'],
      ['price.units', 'price'],
      ['price.units', 'price', 'price.nanos'],
    ]) {
      expect(maskOf(...paths)).toEqual(new Map([['price', 'all']]))
    }
    expect(maskOf('price.units', 'price.nanos')).toEqual(new Map([['price', new Set(['units', 'nanos'])]]))
  })
})

describe('cut', () => {
  test('keeps exactly the fields that are named, for every mask', () => {
    const paths = fc.uniqueArray(fc.constantFrom(...FIELDS, ...SUB_FIELDS))
    fc.assert(
      fc.property(paths, (named) => {
        const expected: Record<string, unknown> = {}
        for (const { name, localName } of ItemSchema.fields) {
          if (named.includes(name)) expected[localName] = item[localName as keyof Item]
        }
        const part = (field: 'price' | 'rating', names: Record<string, string>) => {
          const taken = Object.keys(names).filter((sub) => named.includes(`${field}.${sub}`))
          if (named.includes(field) || taken.length === 0) return
          const value = item[field] as unknown as Record<string, unknown>
          expected[field] = Object.fromEntries(
            taken.map((sub) => [names[sub] ?? '', value[names[sub] ?? '']]),
          )
        }
        part('price', { currency_code: 'currencyCode', units: 'units', nanos: 'nanos' })
        part('rating', { rate: 'rate', count: 'count' })
        expect(cut(item, maskOf(...named) ?? new Map())).toEqual(create(ItemSchema, expected))
      }),
    )
  })

  test('leaves a field out that the item does not have', () => {
    const bare = create(ItemSchema, { id: 'a' })
    expect(cut(bare, maskOf('price.units', 'rating', 'create_time') ?? new Map())).toEqual(create(ItemSchema))
  })

  test('leaves the item as it is', () => {
    const before = structuredClone({ ...item })
    cut(item, maskOf('title', 'price.units') ?? new Map())
    expect({ ...item }).toEqual(before)
  })
})

describe('merge', () => {
  test('takes everything without a mask', () => {
    expect(merge(whole, nothing, undefined)).toEqual(nothing)
    expect(merge(undefined, whole, undefined)).toEqual(whole)
  })

  test('takes named fields from the new content, set or not, and the rest from the old', () => {
    const fields = {
      title: 'title',
      description: 'description',
      category: 'category',
      image_uri: 'imageUri',
      price: 'price',
      rating: 'rating',
      tags: 'tags',
      attributes: 'attributes',
    } as const
    const names = Object.keys(fields) as (keyof typeof fields)[]
    fc.assert(
      fc.property(fc.subarray(names), fc.boolean(), (named, clears) => {
        const [from, into] = clears ? [nothing, whole] : [whole, nothing]
        const merged = merge(into, from, maskOf(...named) ?? new Map())
        for (const name of names) {
          expect(merged[fields[name]]).toEqual((named.includes(name) ? from : into)[fields[name]])
        }
      }),
    )
  })

  test('takes the parts of price and rating that are named', () => {
    const other: ItemDraft = {
      ...nothing,
      price: { currencyCode: 'USD', units: 1n, nanos: 2 },
      rating: { rate: 1, count: 1n },
    }
    expect(merge(whole, other, maskOf('price.units', 'rating.count'))).toEqual({
      ...whole,
      price: { currencyCode: 'EUR', units: 1n, nanos: 7 },
      rating: { rate: 4, count: 1n },
    })
    expect(merge(whole, other, maskOf('price.currency_code', 'price.nanos', 'rating.rate'))).toEqual({
      ...whole,
      price: { currencyCode: 'USD', units: 5n, nanos: 2 },
      rating: { rate: 1, count: 3n },
    })
  })

  test('clears a part that is named and not set', () => {
    expect(merge(whole, nothing, maskOf('price.nanos', 'rating.rate'))).toEqual({
      ...whole,
      price: { currencyCode: 'EUR', units: 5n, nanos: 0 },
      rating: { rate: 0, count: 3n },
    })
  })

  test('begins with an empty item when there is none', () => {
    expect(merge(undefined, whole, maskOf('title'))).toEqual({ ...nothing, title: 'A' })
  })
})

test('setFields names what an update without a mask changes', () => {
  expect([...setFields(nothing)]).toEqual([])
  expect([...setFields(whole).keys()].sort()).toEqual(
    ['title', 'description', 'category', 'image_uri', 'price', 'rating', 'tags', 'attributes'].sort(),
  )
  // An empty object is set: it differs from none.
  expect([
    ...setFields({ ...nothing, attributes: {}, price: { currencyCode: '', units: 0n, nanos: 0 } }),
  ]).toEqual([
    ['price', 'all'],
    ['attributes', 'all'],
  ])
})

test('readOnlyFields names what only the server sets; id and etag may come along', () => {
  expect(readOnlyFields(maskOf(...FIELDS) ?? new Map())).toEqual([
    'revision',
    'create_time',
    'update_time',
    'source',
  ])
})
