/** What the near cache asks the service, and what it answers, on a log that the test itself tells. */
import { setImmediate } from 'node:timers/promises'
import { create } from '@bufbuild/protobuf'
import { beforeEach, describe, expect, test } from 'vitest'
import {
  DeadlineExceededError,
  type ItemCacheError,
  OutOfRangeError,
  PermissionDeniedError,
  UnavailableError,
} from '../src/errors.ts'
import {
  CacheOutcome,
  CacheStatusSchema,
  ItemSchema,
  StaleReason,
} from '../src/gen/itemcache/v1/item_cache_pb.ts'
import { NearCache } from '../src/near-cache.ts'
import type { GetManyOptions, GetManyResult, GetOptions, GetResult } from '../src/reads.ts'

let nowMs: number
let near: NearCache
/** The `min_revision` of each call, in order. */
let asked: bigint[]

beforeEach(() => {
  nowMs = 1000
  asked = []
  near = new NearCache({ maxEntries: 100, maxStaleMs: 60_000 }, () => nowMs)
  near.follow({ kind: 'started', position: 10n, oldestResumable: 0n })
  heard(10)
})

const heard = (revision: number) =>
  near.follow({ kind: 'heartbeat', revision: BigInt(revision), heardAtMs: nowMs })

const event = (
  revision: number,
  kind: 'tags-invalidated' | 'upserted',
  { ids = [], tags = [] }: { ids?: string[]; tags?: string[] },
) =>
  near.follow({
    kind: 'event',
    revision: BigInt(revision),
    event: kind,
    mode: 'expire',
    ids,
    tags,
    items: [],
    committedAt: new Date(0),
    clientId: '',
  })

const invalidateTag = (revision: number) =>
  near.log.acknowledge({ revision, kind: 'TAGS_INVALIDATED', mode: 'EXPIRE', ids: [], tags: ['x'] })

/** An item with the tag `x`, as of this revision. */
function answer(id: string, asOf: bigint, outcome: CacheOutcome = CacheOutcome.HIT): GetResult {
  return {
    item: create(ItemSchema, { id, etag: 'e', tags: ['x'], revision: 5n }),
    notModified: false,
    cache: create(CacheStatusSchema, {
      outcome,
      asOf,
      age: { seconds: outcome === CacheOutcome.STALE ? 62n : 1n },
      ...(outcome !== CacheOutcome.STALE && { freshFor: { seconds: 60n } }),
    }),
    near: false,
    revision: asOf,
  }
}

/** A service that is at `revision`, or as far as it must be. */
const service = (revision: bigint) => async (options: GetOptions) => {
  const { minRevision = 0n } = options
  asked.push(minRevision)
  return answer('a', minRevision > revision ? minRevision : revision)
}

const manyFrom =
  (one: (options: GetOptions) => Promise<GetResult>) =>
  async (ids: readonly string[], options: GetManyOptions, take: (result: GetManyResult) => void) => {
    for (const id of ids) {
      const { cache } = await one(options)
      take({ id, item: answer(id, 0n).item, error: undefined, cache, near: false })
    }
  }

const get = (options: GetOptions = {}, fetch = service(10n)) =>
  near.hit('a', options) ?? near.load('a', { ...options, timeoutMs: 10_000 }, fetch)

async function getMany(options: GetManyOptions, one = service(10n), ids = ['a']) {
  const results = new Map<string, GetManyResult>()
  await near.loadMany(results, ids, options, manyFrom(one))
  return results
}

const failing = (error: ItemCacheError) => async () => {
  await setImmediate()
  throw error
}
const away = failing(new UnavailableError('gone'))

describe('stale answers', () => {
  beforeEach(async () => {
    await get()
    nowMs += 2000
  })
  const STALE = {
    near: true,
    item: { id: 'a' },
    cache: { outcome: CacheOutcome.STALE, staleReason: StaleReason.UNVERIFIED },
  }

  test('are given when the service does not answer, whatever way an item is read that the near cache may answer', async () => {
    expect(await get({}, away)).toMatchObject(STALE)
    expect(await get({ freshness: 'cache-only' }, away)).toMatchObject(STALE)
    expect(await get({ ifNoneMatch: 'other' }, away)).toMatchObject(STALE)
    expect(await get({ ifNoneMatch: 'e' }, away)).toMatchObject({
      ...STALE,
      notModified: true,
      item: undefined,
    })
    expect(await get({ maxStalenessMs: 60_000 }, away)).toMatchObject(STALE)
    expect((await getMany({}, away)).get('a')).toMatchObject({ ...STALE, error: undefined })
  })

  test.each([
    ['freshness: fresh', { freshness: 'fresh' }],
    ['near: false', { near: false }],
    ['allowStale: false', { allowStale: false }],
    ['a smaller maxStalenessMs', { maxStalenessMs: 2999 }],
    ['a later minRevision', { minRevision: 11n }],
    ['fields', { fields: ['title'] }],
    ['metadata', { metadata: { 'x-a': 'b' } }],
  ] satisfies [string, GetOptions][])('are not given for %s', async (_, options) => {
    await expect(get(options, away)).rejects.toThrow('gone')
    await expect(getMany(options, away)).rejects.toThrow('gone')
  })

  test('for many: what has no copy carries the error, and where nothing has one, the call fails', async () => {
    const results = await getMany({}, away, ['a', 'b'])
    expect(results.get('a')).toMatchObject(STALE)
    expect(results.get('b')).toMatchObject({ item: undefined, error: { code: 'UNAVAILABLE' } })
    await expect(getMany({}, away, ['b'])).rejects.toThrow('gone')
    const refused = failing(new PermissionDeniedError('no'))
    await expect(getMany({}, refused)).rejects.toThrow('no')
  })
})

describe('what this client has invalidated by a tag, before the stream brings it', () => {
  beforeEach(() => invalidateTag(20))

  test.each([
    ['get', () => get()],
    ['get with fields', () => get({ fields: ['title'] })],
    ['get with ifNoneMatch', () => get({ ifNoneMatch: 'e' })],
    ['get of caches only', () => get({ freshness: 'cache-only' })],
    ['get past the near cache', () => get({ near: false })],
    ['getMany', async () => (await getMany({})).get('a')],
    ['getMany with fields', async () => (await getMany({ fields: ['title'] })).get('a')],
    ['getMany of caches only', async () => (await getMany({ freshness: 'cache-only' })).get('a')],
  ])('is not undone by an instance that lags: %s', async (_, read) => {
    expect((await read())?.cache?.asOf).toBe(20n)
    expect(asked).toEqual([20n])
  })
})

describe('what the stream has shown of a tag', () => {
  test('holds for reads that do not tell the tags of what they read', async () => {
    event(11, 'tags-invalidated', { tags: ['x'] })
    for (const options of [
      { fields: ['title'] },
      { freshness: 'cache-only' },
      { ifNoneMatch: 'e' },
    ] as const) {
      expect((await get(options)).revision).toBe(11n)
    }
    await getMany({ fields: ['title'] })
    await getMany({ freshness: 'cache-only' })
    expect(asked).toEqual([11n, 11n, 11n, 11n, 11n])
  })

  test('while a batch was on its way has it asked for again, and what comes then is kept', async () => {
    const one = service(10n)
    const results = await getMany({}, async (options) => {
      const result = await one(options)
      if (asked.length === 1) event(11, 'tags-invalidated', { tags: ['x'] })
      return result
    })
    expect(results.get('a')?.cache?.asOf).toBe(11n)
    expect(near.hit('a', {})).toMatchObject({ near: true, revision: 11n })
  })
})

test('after the database was restored, no read fails for what was known of its former history', async () => {
  event(11, 'upserted', { ids: ['a'] })
  const restored = async ({ minRevision = 0n }: GetOptions) => {
    if (minRevision > 5n) throw new OutOfRangeError('ahead')
    return answer('a', 5n)
  }
  expect((await get({}, restored)).revision).toBe(5n)
  expect((await get({ fields: ['title'] }, restored)).revision).toBe(5n)
  const some = new Map<string, GetManyResult>()
  await near.loadMany(some, ['a'], {}, async (ids, options, take) => {
    for (const id of ids) {
      const failed = (error: ItemCacheError) => ({
        id,
        item: undefined,
        error,
        cache: undefined,
        near: false,
      })
      take(
        await restored(options).then(
          ({ item, cache }) => ({ id, item, error: undefined, cache, near: false }),
          failed,
        ),
      )
    }
  })
  expect(some.get('a')).toMatchObject({ item: { id: 'a' }, error: undefined })
  await expect(get({ minRevision: 12n }, restored)).rejects.toBeInstanceOf(OutOfRangeError)
})

describe('callers of one id', () => {
  const counted = (fetch: (options: GetOptions) => Promise<GetResult>) => {
    const calls = { count: 0 }
    return Object.assign(
      async (options: GetOptions) => {
        calls.count++
        await setImmediate()
        return fetch(options)
      },
      { calls },
    )
  }
  /** Half of them come when the first call is under way. */
  async function hundred(fetch: (options: GetOptions) => Promise<GetResult>) {
    const first = Array.from({ length: 50 }, () => get({}, fetch))
    for (let i = 0; i < 5; i++) await undefined
    return Promise.allSettled([...first, ...Array.from({ length: 50 }, () => get({}, fetch))])
  }

  test('share what comes, a stale answer too, as it is', async () => {
    const fetch = counted(async () => answer('a', 10n, CacheOutcome.STALE))
    const results = await hundred(fetch)
    expect(fetch.calls.count).toBe(1)
    for (const result of results) {
      expect(result).toMatchObject({
        value: { cache: { outcome: CacheOutcome.STALE, age: { seconds: 62n } } },
      })
    }
    expect(
      results.filter((result) => result.status === 'fulfilled' && result.value.cache?.coalesced),
    ).toHaveLength(99)
  })

  test('get the newer answer, never what was held, once a copy is past its freshness', async () => {
    await get()
    nowMs += 61_000
    heard(10)
    const stale = await Promise.all(
      [1, 2, 3].map(() => get({}, async () => answer('a', 10n, CacheOutcome.STALE))),
    )
    expect(stale.map(({ cache }) => cache?.outcome)).toEqual(Array(3).fill(CacheOutcome.STALE))
    const failed = await Promise.allSettled([1, 2, 3].map(() => get({}, away)))
    expect(failed.map(({ status }) => status)).toEqual(Array(3).fill('rejected'))
  })

  test('send two calls at most while the log is not heard of', async () => {
    nowMs += 2000
    const fetch = counted(async () => answer('a', 10n))
    await hundred(fetch)
    expect(fetch.calls.count).toBe(2)
  })

  test('send two calls at most when an event comes during the first', async () => {
    const fetch = counted(async (options) => {
      if (fetch.calls.count === 1) event(11, 'upserted', { ids: ['a'] })
      return service(10n)(options)
    })
    const results = await hundred(fetch)
    expect(fetch.calls.count).toBe(2)
    for (const result of results) expect(result).toMatchObject({ value: { revision: 11n } })
  })

  test('do not share the deadline of the one who was first', async () => {
    const gate = Promise.withResolvers<void>()
    const late = async () => {
      await gate.promise
      throw new DeadlineExceededError('late')
    }
    const first = expect(get({}, late)).rejects.toThrow('late')
    await setImmediate()
    const patient = get()
    gate.resolve()
    await first
    expect((await patient).revision).toBe(10n)
  })
})

test('why the stream does not stand is told for as long as it does not', () => {
  const error = new UnavailableError('gone')
  near.follow({ kind: 'disconnected', error })
  expect(near.stats()).toMatchObject({ connected: false, error })
  near.follow({ kind: 'resumed', after: 10n })
  expect(near.stats()).toMatchObject({ connected: true, error: undefined })
})
