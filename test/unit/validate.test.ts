import { create, type MessageInitShape } from '@bufbuild/protobuf'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { ItemCacheError } from '../../src/errors.ts'
import { Freshness, ItemSchema, ReadOptionsSchema } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import type { ItemDraft, Json } from '../../src/item.ts'
import {
  checkDraft,
  checkId,
  checkListSize,
  checkOptionalName,
  checkTag,
  durationMs,
  itemDraft,
  itemMask,
  readOptions,
  Violations,
} from '../../src/rpc/validate.ts'

/** The fields that a check complains about. */
function complaints(check: (violations: Violations) => void): string[] {
  const violations = new Violations()
  check(violations)
  try {
    violations.throwIfAny()
    return []
  } catch (error) {
    if (!(error instanceof ItemCacheError)) throw error
    return error.violations.map(({ field }) => field)
  }
}

const draftOf = (content: Partial<ItemDraft>): ItemDraft => ({ ...itemDraft(create(ItemSchema)), ...content })
const complaintsOf = (content: Partial<ItemDraft>) =>
  complaints((violations) => checkDraft(draftOf(content), violations))

describe('Violations', () => {
  test('throws nothing when nothing is wrong', () => {
    expect(() => new Violations().throwIfAny()).not.toThrow()
  })

  test('throws one error with all of them; its message is about the first', () => {
    const violations = new Violations()
    violations.add('a', 'is wrong')
    violations.check(true, 'b', 'is fine')
    violations.check(false, 'c', 'is wrong, too')
    try {
      violations.throwIfAny()
      expect.unreachable()
    } catch (error) {
      expect(error).toMatchObject({
        code: 'invalid',
        reason: 'INVALID_FIELD',
        message: 'a: is wrong (and 1 more)',
        violations: [
          { field: 'a', description: 'is wrong' },
          { field: 'c', description: 'is wrong, too' },
        ],
      })
    }
  })
})

describe('a name', () => {
  test('has 1 to the greatest number of bytes, however many characters that is', () => {
    fc.assert(
      fc.property(fc.string({ unit: 'grapheme', maxLength: 140 }), (text) => {
        const bytes = Buffer.byteLength(text)
        for (const [most, check] of [
          [128, checkId],
          [64, checkTag],
        ] as const) {
          const fits = bytes >= 1 && bytes <= most
          expect(complaints((violations) => check(text, 'f', violations))).toEqual(fits ? [] : ['f'])
        }
      }),
    )
  })

  test.each([
    ['x'.repeat(128), true],
    ['x'.repeat(129), false],
    ['é'.repeat(64), true],
    [`${'é'.repeat(64)}x`, false],
    ['€'.repeat(42), true],
    ['€'.repeat(43), false],
    ['💡'.repeat(32), true],
    ['💡'.repeat(33), false],
    ['', false],
  ])('%s: %s', (text, fits) => {
    expect(complaints((violations) => checkId(text, 'id', violations))).toEqual(fits ? [] : ['id'])
  })

  test('has no control characters and is well-formed', () => {
    for (let code = 0; code < 0x100; code++) {
      const isControl = code < 0x20 || (code >= 0x7f && code < 0xa0)
      const text = `a${String.fromCharCode(code)}b`
      expect(complaints((violations) => checkId(text, 'id', violations))).toEqual(isControl ? ['id'] : [])
    }
    expect(complaints((violations) => checkId('a\ud800', 'id', violations))).toEqual(['id'])
  })

  test('may be left out where it is optional', () => {
    const check = (text: string) =>
      complaints((violations) => checkOptionalName(text, 'request_id', 128, violations))
    expect(check('')).toEqual([])
    expect(check('x'.repeat(128))).toEqual([])
    expect(check('x'.repeat(129))).toEqual(['request_id'])
    expect(check('\0')).toEqual(['request_id'])
  })
})

test('a list has a number of entries between its bounds', () => {
  const check = (size: number) => complaints((violations) => checkListSize(size, [1, 3], 'ids', violations))
  expect([0, 1, 3, 4].map(check)).toEqual([['ids'], [], [], ['ids']])
})

describe('a duration', () => {
  const check = (seconds: bigint, nanos: number) =>
    complaints((violations) =>
      durationMs({ $typeName: 'google.protobuf.Duration', seconds, nanos }, 'd', violations),
    )

  test('is read in milliseconds', () => {
    const violations = new Violations()
    const read = (seconds: bigint, nanos: number) =>
      durationMs({ $typeName: 'google.protobuf.Duration', seconds, nanos }, 'd', violations)
    expect(read(2n, 500_000_000)).toBe(2500)
    expect(read(-1n, -500_000)).toBe(-1000.5)
    expect(read(0n, 1)).toBe(0.000001)
    violations.throwIfAny()
  })

  test('has the range that its message allows', () => {
    expect(check(315_576_000_000n, 999_999_999)).toEqual([])
    expect(check(315_576_000_001n, 0)).toEqual(['d'])
    expect(check(-315_576_000_001n, 0)).toEqual(['d'])
    expect(check(2n ** 63n - 1n, 0)).toEqual(['d'])
    expect(check(0n, 1_000_000_000)).toEqual(['d'])
    expect(check(0n, -1_000_000_000)).toEqual(['d'])
  })
})

describe('read options', () => {
  const read = (init: MessageInitShape<typeof ReadOptionsSchema>) => {
    const violations = new Violations()
    const options = readOptions(create(ReadOptionsSchema, init), violations)
    violations.throwIfAny()
    return options
  }
  const defaults = {
    freshness: 'DEFAULT',
    minRevision: 0,
    maxStalenessMs: Number.POSITIVE_INFINITY,
    allowStale: true,
  }

  test('have their defaults, whether the message is there or not', () => {
    expect(readOptions(undefined, new Violations())).toEqual(defaults)
    expect(read({})).toEqual(defaults)
    expect(read({ freshness: Freshness.DEFAULT })).toEqual(defaults)
  })

  test('are taken as they are', () => {
    expect(
      read({
        freshness: Freshness.CACHE_ONLY,
        minRevision: 5n,
        maxStaleness: { seconds: 1n },
        allowStale: false,
      }),
    ).toEqual({ freshness: 'CACHE_ONLY', minRevision: 5, maxStalenessMs: 1000, allowStale: false })
    expect(read({ freshness: Freshness.FRESH }).freshness).toBe('FRESH')
    // What no revision can be is ahead of every log.
    expect(read({ minRevision: 2n ** 62n }).minRevision).toBe(Number.MAX_SAFE_INTEGER)
  })

  test.each([
    ['options.freshness', { freshness: 4 as Freshness }],
    ['options.freshness', { freshness: -1 as Freshness }],
    ['options.min_revision', { minRevision: -1n }],
    ['options.max_staleness', { maxStaleness: { seconds: 0n, nanos: -1 } }],
  ])('refuse a bad %s', (field, init) => {
    expect(complaints((violations) => readOptions(create(ReadOptionsSchema, init), violations))).toEqual([
      field,
    ])
  })
})

describe('a field mask', () => {
  const read = (paths: string[]) => {
    const violations = new Violations()
    const mask = itemMask({ $typeName: 'google.protobuf.FieldMask', paths }, 'read_mask', violations)
    return { mask, found: complaints(() => violations.throwIfAny()) }
  }
  const check = (paths: string[]) =>
    complaints((violations) =>
      itemMask({ $typeName: 'google.protobuf.FieldMask', paths }, 'read_mask', violations),
    )

  test('is every field when it is missing, empty, or *', () => {
    expect(itemMask(undefined, 'read_mask', new Violations())).toBeUndefined()
    expect(read([]).mask).toBeUndefined()
    expect(read(['*']).mask).toBeUndefined()
    expect(read(['title']).mask).toEqual(new Map([['title', 'all']]))
  })

  test('has at most 64 paths, each of which names a field', () => {
    expect(check(Array(64).fill('title'))).toEqual([])
    expect(check(Array(65).fill('title'))).toEqual(['read_mask'])
    expect(check(['colour', 'title', 'size'])).toEqual(['read_mask', 'read_mask'])
    // What is beyond the limit is not even looked at.
    expect(check(Array(10_000).fill('colour'))).toHaveLength(65)
  })
})

describe('the content of an item', () => {
  test('is taken from the message, with each tag once and without what the server sets', () => {
    const item = create(ItemSchema, {
      id: 'a',
      title: 'A',
      price: { currencyCode: 'EUR', units: 1n, nanos: 2 },
      rating: { rate: 1, count: 2n },
      tags: ['t', 'u', 't'],
      attributes: { k: [1] },
      etag: '"e"',
      revision: 7n,
    })
    expect(itemDraft(item)).toEqual({
      title: 'A',
      description: '',
      category: '',
      imageUri: '',
      price: { currencyCode: 'EUR', units: 1n, nanos: 2 },
      rating: { rate: 1, count: 2n },
      tags: ['t', 'u'],
      attributes: { k: [1] },
    })
  })

  test('is fine when it is empty, and when it is full', () => {
    expect(complaintsOf({})).toEqual([])
    expect(
      complaintsOf({
        title: 'a\nb\t\u0001',
        category: 'x'.repeat(64),
        tags: Array.from({ length: 32 }, (_, i) => `${i}`.padStart(64, 'x')),
        price: { currencyCode: 'EUR', units: -(2n ** 63n), nanos: -999_999_999 },
        rating: { rate: 5, count: 2n ** 63n - 1n },
        attributes: { a: [null, true, 1e308, 'text', { b: {} }] },
      }),
    ).toEqual([])
  })

  test.each<[string, Partial<ItemDraft>]>([
    ['item.title', { title: 'a\0' }],
    ['item.description', { description: '\0' }],
    ['item.image_uri', { imageUri: '\0' }],
    ['item.category', { category: 'x'.repeat(65) }],
    ['item.category', { category: 'a\n' }],
    ['item.tags', { tags: Array.from({ length: 33 }, (_, i) => `${i}`) }],
    ['item.tags[1]', { tags: ['a', ''] }],
    ['item.tags[0]', { tags: ['x'.repeat(65)] }],
    ['item.price.currency_code', { price: { currencyCode: '', units: 1n, nanos: 0 } }],
    ['item.price.currency_code', { price: { currencyCode: 'eur', units: 1n, nanos: 0 } }],
    ['item.price.currency_code', { price: { currencyCode: 'EURO', units: 1n, nanos: 0 } }],
    ['item.price.nanos', { price: { currencyCode: 'EUR', units: 0n, nanos: 1_000_000_000 } }],
    ['item.price.nanos', { price: { currencyCode: 'EUR', units: 0n, nanos: -1_000_000_000 } }],
    ['item.price.nanos', { price: { currencyCode: 'EUR', units: 1n, nanos: -1 } }],
    ['item.price.nanos', { price: { currencyCode: 'EUR', units: -1n, nanos: 1 } }],
    ['item.rating.rate', { rating: { rate: Number.NaN, count: 0n } }],
    ['item.rating.rate', { rating: { rate: 5.000001, count: 0n } }],
    ['item.rating.rate', { rating: { rate: -0.000001, count: 0n } }],
    ['item.rating.rate', { rating: { rate: Number.POSITIVE_INFINITY, count: 0n } }],
    ['item.rating.count', { rating: { rate: 0, count: -1n } }],
    ['item.attributes', { attributes: { a: '\0' } }],
    ['item.attributes', { attributes: { 'a\0': 1 } }],
    ['item.attributes', { attributes: { a: [[Number.NaN]] } }],
    ['item.attributes', { attributes: { a: { b: Number.NEGATIVE_INFINITY } } }],
  ])('has a bad %s', (field, content) => {
    expect(complaintsOf(content)).toEqual([field])
  })

  test('may have attributes 32 levels deep', () => {
    const nested = (levels: number): Json => (levels === 0 ? 'leaf' : [nested(levels - 1)])
    expect(complaintsOf({ attributes: { a: nested(31) } })).toEqual([])
    expect(complaintsOf({ attributes: { a: nested(32) } })).toEqual(['item.attributes'])
  })

  test('may have small parts of either sign', () => {
    for (const [units, nanos] of [
      [0n, 5],
      [0n, -5],
      [5n, 0],
      [-5n, 0],
      [-5n, -5],
    ] as const) {
      expect(complaintsOf({ price: { currencyCode: 'EUR', units, nanos } })).toEqual([])
    }
  })
})
