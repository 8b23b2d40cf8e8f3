import {
  create,
  type DescMessage,
  fromBinary,
  type JsonObject,
  type MessageInitShape,
  toBinary,
} from '@bufbuild/protobuf'
import { durationMs } from '@bufbuild/protobuf/wkt'
import { status } from '@grpc/grpc-js'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { ItemCacheError } from '../../src/errors.ts'
import {
  BatchGetItemsRequestSchema,
  BatchGetItemsResponseSchema,
  type BatchGetItemsResultSchema,
  CacheOutcome,
  CacheStatusSchema,
  CreateItemResponseSchema,
  GetItemResponseSchema,
  type Item,
  ItemSchema,
  ItemSource,
  ListItemsResponseSchema,
  SkipReason,
  StaleReason,
  StreamItemsResponseSchema,
  Tier,
  UpdateItemResponseSchema,
} from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { READ_OUTCOMES, TIER_NAMES } from '../../src/observe/metrics.ts'
import { BatchRequest } from '../../src/rpc/batch-request.ts'
import {
  type BatchResult,
  cacheStatus,
  encodeBatch,
  encodeGetItem,
  encodeItemError,
  encodeList,
  encodePage,
  encodePlainHits,
  encodeStreamFailure,
  encodeStreamItem,
  encodeWritten,
  type GetItemResult,
  masked,
} from '../../src/rpc/encode.ts'
import { Malformed } from '../../src/rpc/service-definition.ts'
import { FieldWriter } from '../../src/rpc/wire.ts'
import type { Answer } from '../../src/service/read.ts'
import type { Copy } from '../../src/tiers/tier.ts'

const timestamp = fc.record({
  seconds: fc.bigInt({ min: 0n, max: 253_402_300_799n }),
  nanos: fc.nat(999_999_999),
})
const text = fc.string({ unit: 'binary', maxLength: 20 })
const int64 = fc.bigInt({ min: -(2n ** 63n), max: 2n ** 63n - 1n })
const revision = fc.maxSafeNat()
const oneOf = <T>(values: Readonly<Record<string, T>>) => fc.constantFrom(...Object.values(values))

/** A message's init with any of its fields left out. */
const partly = <T>(fields: { [K in keyof T]: fc.Arbitrary<T[K]> }) =>
  fc.record<T, never>(fields, { requiredKeys: [] })

const CODES = {
  'not-found': status.NOT_FOUND,
  'ahead-of-log': status.OUT_OF_RANGE,
  unavailable: status.UNAVAILABLE,
  timeout: status.DEADLINE_EXCEEDED,
  exhausted: status.RESOURCE_EXHAUSTED,
} as const

const NOT_FOUND = {
  code: status.NOT_FOUND,
  reason: 'ITEM_NOT_FOUND',
  message: 'the item does not exist',
} as const

/** What an `ItemError` says of an error. */
const wordsOf = ({ code, reason, message, retryAfterMs }: ItemCacheError) => ({
  code: CODES[code as keyof typeof CODES],
  reason,
  message,
  ...(retryAfterMs !== undefined && {
    retryDelay: {
      seconds: BigInt(Math.floor(retryAfterMs / 1000)),
      nanos: (retryAfterMs % 1000) * 1_000_000,
    },
  }),
})

/** The reader's clock when the answer is given. */
const NOW_MS = 1e12
const time = fc.double({ min: 0, max: 2 * NOW_MS, noNaN: true })

const answer: fc.Arbitrary<Answer> = fc.record({
  copy: fc.option(
    fc.record({
      id: text,
      asOf: revision,
      bytes: fc.constant(undefined),
      revision,
      tags: fc.constant([]),
      verifiedAtMs: time,
      freshUntilMs: time,
    }),
    { nil: undefined },
  ),
  tier: fc.constantFrom(...TIER_NAMES, undefined),
  outcome: fc.constantFrom(...READ_OUTCOMES),
  staleReason: fc.constantFrom('REVALIDATING', 'SOFT_TIMEOUT', 'TIER_DOWN', 'UNVERIFIED', undefined),
  coalesced: fc.boolean(),
  skipped: fc.array(
    fc.record({ tier: fc.constantFrom(...TIER_NAMES), reason: fc.constantFrom('off', 'down', 'timeout') }),
    { maxLength: 4 },
  ),
})

const statusOf = (one: Answer, nowMs = NOW_MS) => fromBinary(CacheStatusSchema, cacheStatus(one, nowMs))

/** What most answers say besides what they found. */
const origin = (one: Answer) => ({ cache: statusOf(one), revision: BigInt(one.copy?.asOf ?? 0) })

const attributes = fc
  .dictionary(text, fc.jsonValue({ maxDepth: 2, noUnicodeString: false }), { maxKeys: 4 })
  .map((value) => JSON.parse(JSON.stringify(value)) as JsonObject)

const item: fc.Arbitrary<Item> = partly({
  id: text,
  title: text,
  description: text,
  category: text,
  imageUri: text,
  price: fc.record({ currencyCode: text, units: int64, nanos: fc.integer() }),
  rating: fc.record({ rate: fc.double(), count: int64 }),
  tags: fc.array(text, { maxLength: 4 }),
  attributes,
  etag: text,
  revision: int64,
  createTime: timestamp,
  updateTime: timestamp,
  source: oneOf(ItemSource),
}).map((init) => create(ItemSchema, init))

const encoded = (one: Item) => toBinary(ItemSchema, one)

const snapshot = (one: Item) => ({
  id: one.id,
  asOf: 0,
  state: 'present' as const,
  bytes: encoded(one),
  revision: 0,
  tags: [],
})

/** Whether the bytes say what the message says. */
function same<Desc extends DescMessage>(schema: Desc, bytes: Uint8Array, init: MessageInitShape<Desc>): void {
  expect(fromBinary(schema, bytes)).toEqual(fromBinary(schema, toBinary(schema, create(schema, init))))
}

describe('a response that is put together by hand is the one that the generated code makes', () => {
  const result = fc.oneof(
    fc.record({ kind: fc.constant('item' as const), item }),
    fc.record({ kind: fc.constantFrom('not-modified' as const, 'none' as const) }),
  )

  test('of GetItem', () => {
    fc.assert(
      fc.property(result, answer, (one, from) => {
        const given: GetItemResult = one.kind === 'item' ? { kind: 'item', bytes: encoded(one.item) } : one
        same(GetItemResponseSchema, encodeGetItem(given, from, NOW_MS).message, {
          ...(one.kind === 'item' && { result: { case: 'item', value: one.item } }),
          ...(one.kind === 'not-modified' && { result: { case: 'notModified', value: true } }),
          ...origin(from),
        })
      }),
    )
  })

  test('of StreamItems', () => {
    const notFound = fc.record({ kind: fc.constant('not-found' as const) })
    const correlation = fc.bigInt({ min: 0n, max: 2n ** 64n - 1n })
    fc.assert(
      fc.property(fc.oneof(result, notFound), answer, correlation, (one, from, correlationId) => {
        const given = one.kind === 'item' ? { kind: one.kind, bytes: encoded(one.item) } : one
        same(StreamItemsResponseSchema, encodeStreamItem(correlationId, given, from, NOW_MS), {
          correlationId,
          ...(one.kind === 'item' && { result: { case: 'item', value: one.item } }),
          ...(one.kind === 'not-modified' && { result: { case: 'notModified', value: true } }),
          ...(one.kind === 'not-found' && {
            result: {
              case: 'error',
              value: NOT_FOUND,
            },
          }),
          ...origin(from),
        })
        same(
          StreamItemsResponseSchema,
          encodeStreamFailure(correlationId, new ItemCacheError('timeout', 'late')),
          {
            correlationId,
            result: {
              case: 'error',
              value: { code: status.DEADLINE_EXCEEDED, reason: 'TIMEOUT', message: 'late' },
            },
          },
        )
      }),
    )
  })

  test('of BatchGetItems', () => {
    const error = fc
      .record({
        code: fc.constantFrom(...(Object.keys(CODES) as (keyof typeof CODES)[])),
        message: text,
        reason: fc.option(text, { nil: undefined }),
        retryAfterMs: fc.option(fc.nat(100_000), { nil: undefined }),
      })
      .map(
        ({ code, message, reason, retryAfterMs }) =>
          new ItemCacheError(code, message, {
            ...(reason !== undefined && { reason }),
            ...(retryAfterMs !== undefined && { retryAfterMs }),
          }),
      )
    const result = fc.record({
      id: text,
      from: fc.oneof(error, answer),
      item: fc.option(item, { nil: undefined }),
    })
    fc.assert(
      fc.property(fc.array(result, { maxLength: 6 }), (results) => {
        const given = results.map(({ from, item: held }): BatchResult => {
          if (from instanceof ItemCacheError) return encodeItemError(from)
          return { ...from, copy: from.copy && { ...from.copy, bytes: held && encoded(held) } }
        })
        const ids = results.map(({ id }) => id)
        same(BatchGetItemsResponseSchema, encodeBatch(ids, given, undefined, NOW_MS).message, {
          results: results.map(
            ({ id, from, item: held }): MessageInitShape<typeof BatchGetItemsResultSchema> => {
              if (from instanceof ItemCacheError)
                return { id, result: { case: 'error', value: wordsOf(from) } }
              const cache = statusOf(from)
              if (from.copy === undefined) return { id, cache }
              if (held !== undefined) return { id, cache, result: { case: 'item', value: held } }
              return { id, cache, result: { case: 'error', value: NOT_FOUND } }
            },
          ),
        })
      }),
    )
  })

  test('of a BatchGetItems of plain hits: byte by byte what any batch with these answers has', () => {
    const id = fc.string({ unit: 'grapheme-ascii', minLength: 1, maxLength: 127 })
    const content = fc.oneof(
      fc.uint8Array({ maxLength: 200 }),
      fc.nat(255).map((byte) => new Uint8Array(5000).fill(byte)),
    )
    // Copies of one SELECT have one time, so equal ones are frequent.
    const times = fc.oneof(fc.constantFrom(0, NOW_MS - 1.5, NOW_MS), time)
    const hit = fc.record({
      id,
      asOf: revision,
      bytes: content,
      at: times,
      until: times,
    })
    let lent = 0
    fc.assert(
      fc.property(fc.array(hit, { minLength: 1, maxLength: 30 }), (hits) => {
        const ids = hits.map((one) => one.id)
        const copies = hits.map(
          ({ id, asOf, bytes, at, until }): Copy => ({
            ...{ id, asOf, bytes, revision: 1, tags: [] },
            ...{ verifiedAtMs: at, freshUntilMs: until },
          }),
        )
        const answers = copies.map(
          (copy): Answer => ({
            ...{ copy, tier: 'memory', outcome: 'HIT' },
            ...{ staleReason: undefined, coalesced: false, skipped: [] },
          }),
        )
        const message = Buffer.from(
          toBinary(BatchGetItemsRequestSchema, create(BatchGetItemsRequestSchema, { ids })),
        )
        const asciiIds = new BatchRequest(message, () => new Malformed('not asked')).asciiIds()
        if (asciiIds === undefined) throw new Error('the ids are ASCII')
        const frame = encodePlainHits(asciiIds, copies, NOW_MS)
        expect(frame.bytes).toEqual(encodeBatch(ids, answers, undefined, NOW_MS).bytes)
        if (frame.isLent) lent++
        // The next one may have this one's buffer.
        frame.sent(null)
      }),
      { numRuns: 300 },
    )
    expect(lent).toBeGreaterThan(20)
  })

  test('of ListItems', () => {
    fc.assert(
      fc.property(fc.array(item, { maxLength: 5 }), text, answer, (items, token, from) => {
        const page = encodePage({ items: items.map(snapshot), nextPageToken: token })
        same(ListItemsResponseSchema, encodeList(page, from, NOW_MS).message, {
          items,
          nextPageToken: token,
          ...origin(from),
        })
      }),
    )
  })

  test('of CreateItem and UpdateItem', () => {
    fc.assert(
      fc.property(item, revision, (one, at) => {
        for (const schema of [CreateItemResponseSchema, UpdateItemResponseSchema]) {
          same(schema, encodeWritten(encoded(one), at).message, { item: one, revision: BigInt(at) })
        }
      }),
    )
  })
})

describe('a large answer', () => {
  const frame = (text: string) =>
    new FieldWriter()
      .startLent(20_000)
      .string(1, text.repeat(20_000 / text.length))
      .finishLent()

  test('has a buffer that nobody else gets before it has been sent, nor when it could not be', () => {
    const [first, second] = [frame('a'), frame('b')]
    const [a, b] = [Buffer.from(first.bytes), Buffer.from(second.bytes)]
    expect(first.bytes.buffer).not.toBe(second.bytes.buffer)
    first.sent(new Error('the stream was closed'))
    const third = frame('c')
    expect(third.bytes.buffer).not.toBe(first.bytes.buffer)
    expect([first.bytes, second.bytes]).toEqual([a, b])
    second.sent(undefined)
    expect(frame('d').bytes.buffer).toBe(second.bytes.buffer)
  })

  test('leaves buffers of at most 4 MiB in all for the next ones', () => {
    const frames = () =>
      Array.from({ length: 40 }, () => new FieldWriter().startLent(200_000).string(1, 'a').finishLent())
    const first = frames()
    for (const one of first) one.sent(null)
    const known = new Set(first.map((one) => one.bytes.buffer))
    const again = frames().filter((one) => known.has(one.bytes.buffer))
    expect(again.length).toBeGreaterThan(0)
    expect(again.reduce((sum, one) => sum + one.heldBytes, 0)).toBeLessThanOrEqual(4 * 1024 * 1024)
  })

  test('counts as much as its buffer has, and is as long as what was written', () => {
    const one = frame('a')
    expect(one.byteLength).toBe(20_004)
    expect(one.message).toHaveLength(20_004)
    expect(one.heldBytes).toBe(one.bytes.buffer.byteLength)
  })
})

test('an item that is not cut keeps its very bytes', () => {
  const bytes = encoded(create(ItemSchema, { id: 'a', title: 'A' }))
  expect(masked(bytes, undefined)).toBe(bytes)
  expect(fromBinary(ItemSchema, masked(bytes, new Map([['id', 'all']])))).toEqual(
    create(ItemSchema, { id: 'a' }),
  )
})

describe('the cache status', () => {
  const copy: Copy = {
    id: 'a',
    asOf: 7,
    bytes: new Uint8Array(1),
    revision: 5,
    tags: [],
    verifiedAtMs: 1000,
    freshUntilMs: 61_000,
  }
  const answer: Answer = {
    copy,
    tier: 'memory',
    outcome: 'HIT',
    staleReason: undefined,
    coalesced: false,
    skipped: [],
  }

  const statusOf = (answer: Answer, nowMs: number) =>
    fromBinary(CacheStatusSchema, cacheStatus(answer, nowMs))

  test('tells age, remaining freshness and revision by the reader’s clock', () => {
    const message = statusOf(answer, 3500.25)
    expect(message).toMatchObject({
      tier: Tier.MEMORY,
      outcome: CacheOutcome.HIT,
      asOf: 7n,
      coalesced: false,
    })
    expect(message.staleReason).toBe(StaleReason.UNSPECIFIED)
    expect(message.age && durationMs(message.age)).toBe(2500)
    expect(message.age?.nanos).toBe(500_250_000)
    expect(message.freshFor && durationMs(message.freshFor)).toBe(57_500)
  })

  test.each([
    ['memory', Tier.MEMORY],
    ['redis', Tier.REDIS],
    ['postgres', Tier.POSTGRES],
    ['origin', Tier.ORIGIN],
    [undefined, Tier.UNSPECIFIED],
  ] as const)('names the tier %s', (tier, expected) => {
    expect(statusOf({ ...answer, tier }, 0).tier).toBe(expected)
  })

  test.each([
    ['HIT', CacheOutcome.HIT],
    ['MISS', CacheOutcome.MISS],
    ['STALE', CacheOutcome.STALE],
    ['NEGATIVE_HIT', CacheOutcome.NEGATIVE_HIT],
    ['BYPASS', CacheOutcome.BYPASS],
  ] as const)('names the outcome %s', (outcome, expected) => {
    expect(statusOf({ ...answer, outcome }, 0).outcome).toBe(expected)
  })

  test('says why a stale copy was served, and no remaining freshness', () => {
    const stale = { ...answer, outcome: 'STALE', coalesced: true } as const
    for (const [staleReason, expected] of [
      ['REVALIDATING', StaleReason.REVALIDATING],
      ['TIER_DOWN', StaleReason.TIER_DOWN],
    ] as const) {
      const message = statusOf({ ...stale, staleReason }, 90_000)
      expect(message).toMatchObject({ staleReason: expected, coalesced: true })
      expect(message.freshFor).toBeUndefined()
    }
  })

  test('lists the tiers that were skipped', () => {
    const skipped = [
      { tier: 'redis', reason: 'off' },
      { tier: 'redis', reason: 'timeout' },
      { tier: 'postgres', reason: 'down' },
    ] as const
    expect(statusOf({ ...answer, skipped }, 0).skippedTiers).toMatchObject([
      { tier: Tier.REDIS, reason: SkipReason.OFF },
      { tier: Tier.REDIS, reason: SkipReason.TIMEOUT },
      { tier: Tier.POSTGRES, reason: SkipReason.DOWN },
    ])
  })

  test('has no age and no revision when no tier answered', () => {
    const message = statusOf({ ...answer, copy: undefined, tier: undefined, outcome: 'MISS' }, 5000)
    expect(message).toMatchObject({ tier: Tier.UNSPECIFIED, asOf: 0n })
    expect(message.age).toBeUndefined()
    expect(message.freshFor).toBeUndefined()
  })

  test('never shows a negative time', () => {
    const message = statusOf(answer, 0)
    expect(message.age).toMatchObject({ seconds: 0n, nanos: 0 })
    expect(statusOf(answer, 90_000).freshFor).toMatchObject({ seconds: 0n, nanos: 0 })
  })
})
