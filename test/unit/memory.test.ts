import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { MemoryTier, type MemoryTierOptions } from '../../src/tiers/memory.ts'
import type { Copy } from '../../src/tiers/tier.ts'

const MAX_STALE_MS = 1_000
const NOTHING = new Uint8Array()

function tierAt(clock: { ms: number }, options: Partial<MemoryTierOptions> = {}): MemoryTier {
  return new MemoryTier({
    maxEntries: 10,
    maxBytes: 2 ** 20,
    maxStaleMs: MAX_STALE_MS,
    now: () => clock.ms,
    ...options,
  })
}

function copyOf(id: string, changes: Partial<Copy> = {}): Copy {
  return {
    id,
    asOf: 1,
    bytes: Buffer.from([1, 2, 3]),
    revision: 1,
    tags: [],
    verifiedAtMs: 0,
    freshUntilMs: 100,
    ...changes,
  }
}

function held(tier: MemoryTier, id: string): Copy {
  const copy = tier.peek('t', id)
  if (copy === undefined) throw new Error(`${id} is not there`)
  return copy
}

describe('reads', () => {
  test('copies of one moment are not dropped at one moment, and none later than maxStaleMs', () => {
    const clock = { ms: 0 }
    let drawn = 0
    const tier = tierAt(clock, { jitter: 0.2, random: () => drawn })
    for (const [id, draw] of [['a', 0] as const, ['b', 0.5] as const]) {
      drawn = draw
      tier.set('t', copyOf(id))
    }
    clock.ms = MAX_STALE_MS * 0.9 - 1
    expect([tier.get('t', 'a')?.id, tier.get('t', 'b')?.id]).toEqual(['a', 'b'])
    clock.ms = MAX_STALE_MS * 0.9
    expect([tier.get('t', 'a')?.id, tier.get('t', 'b')?.id]).toEqual(['a', undefined])
    clock.ms = MAX_STALE_MS
    expect(tier.get('t', 'a')).toBeUndefined()
  })

  test('a tier that is off holds nothing and says so', async () => {
    const tier = tierAt({ ms: 0 }, { enabled: false })
    expect(tier.set('t', copyOf('a'))).toBe(false)
    expect(await tier.read('t', ['a'])).toEqual({ copies: new Map(), skipped: 'off' })
    expect(await tier.inspect('t', 'a')).toEqual({ present: false, skipped: 'off' })
    expect(tier.stats()).toMatchObject({ entries: 0 })
  })

  test('a hit is what was stored, synchronously, and counts', () => {
    const tier = tierAt({ ms: 0 })
    const copy = copyOf('a')
    tier.set('t', copy)
    expect(tier.get('t', 'a')).toEqual(copy)
    expect(tier.get('t', 'b')).toBeUndefined()
    expect(tier.stats()).toMatchObject({ hits: 1, misses: 1, entries: 1 })
  })

  test('a copy past its freshness is still answered, and dropped once maxStaleMs have passed since its SELECT', () => {
    const clock = { ms: 0 }
    const tier = tierAt(clock)
    tier.set('t', copyOf('a', { verifiedAtMs: -300, freshUntilMs: 100 }))
    clock.ms = MAX_STALE_MS - 301
    expect(tier.get('t', 'a')).toBeDefined()
    clock.ms = MAX_STALE_MS - 300
    expect(tier.peek('t', 'a')).toBeUndefined()
    expect(tier.get('t', 'a')).toBeUndefined()
    expect(tier.stats()).toMatchObject({ expirations: 1, entries: 0, bytes: 0 })
  })

  test('only real reads touch recency: looking, inspecting and stamping do not', async () => {
    const tier = tierAt({ ms: 0 }, { maxEntries: 2 })
    tier.set('t', copyOf('a'))
    tier.set('t', copyOf('b'))
    const before = tier.stats()
    tier.peek('t', 'a')
    await tier.inspect('t', 'a')
    tier.restamp(held(tier, 'a'), 5)
    expect(tier.stats()).toEqual(before)
    tier.set('t', copyOf('c'))
    expect(tier.peek('t', 'a')).toBeUndefined()

    await tier.read('t', ['b'])
    tier.set('t', copyOf('d'))
    expect(tier.peek('t', 'b')).toBeDefined()
    expect(tier.peek('t', 'c')).toBeUndefined()
  })

  test('an inspection tells age, remaining time, size and tags by the injected clock', async () => {
    const clock = { ms: 0 }
    const tier = tierAt(clock)
    tier.set('t', copyOf('a', { verifiedAtMs: -10, tags: ['fruit'], asOf: 9 }))
    clock.ms = 40
    expect(await tier.inspect('t', 'a')).toEqual({
      present: true,
      negative: false,
      asOf: 9,
      ageMs: 50,
      ttlMs: MAX_STALE_MS - 50,
      sizeBytes: tier.stats().bytes,
      tags: ['fruit'],
    })
    clock.ms = MAX_STALE_MS
    expect(await tier.inspect('t', 'a')).toEqual({ present: false })
  })
})

describe('changes', () => {
  test('an older copy is refused, unless the newer one has outlived its time', () => {
    const clock = { ms: 0 }
    const tier = tierAt(clock)
    expect(tier.set('t', copyOf('a', { asOf: 5 }))).toBe(true)
    expect(tier.set('t', copyOf('a', { asOf: 4 }))).toBe(false)
    expect(tier.set('t', copyOf('a', { asOf: 5, revision: 2 }))).toBe(true)
    expect(tier.peek('t', 'a')?.revision).toBe(2)
    clock.ms = MAX_STALE_MS
    expect(tier.set('t', copyOf('a', { asOf: 4, verifiedAtMs: clock.ms }))).toBe(true)
  })

  test('stamping raises the as-of and nothing else, and never lowers it', () => {
    const tier = tierAt({ ms: 0 })
    const copy = copyOf('a', { asOf: 5, tags: ['fruit'] })
    tier.set('t', copy)
    const { bytes } = tier.stats()
    tier.restamp(held(tier, 'a'), 8)
    expect(tier.peek('t', 'a')).toEqual({ ...copy, asOf: 8 })
    expect(copy.asOf).toBe(5)
    tier.restamp(held(tier, 'a'), 7)
    expect(tier.peek('t', 'a')?.asOf).toBe(8)
    expect(tier.stats().bytes).toBe(bytes)
    expect(tier.set('t', copyOf('a', { asOf: 7 }))).toBe(false)
  })

  test('stamping a copy that has been replaced since says so of the copy alone', () => {
    const tier = tierAt({ ms: 0 })
    tier.set('t', copyOf('a', { asOf: 5 }))
    const found = held(tier, 'a')
    tier.set('t', copyOf('a', { asOf: 6 }))
    // It has the place in memory that the first one had.
    tier.set('t', copyOf('b', { asOf: 7 }))
    expect(tier.restamp(found, 9).asOf).toBe(9)
    expect([tier.peek('t', 'a')?.asOf, tier.peek('t', 'b')?.asOf]).toEqual([6, 7])

    const last = held(tier, 'b')
    tier.delete('t', 'b')
    tier.set('t', copyOf('c', { asOf: 7 }))
    tier.set('t', copyOf('d', { asOf: 8 }))
    expect(tier.restamp(last, 9).asOf).toBe(9)
    expect([tier.peek('t', 'c')?.asOf, tier.peek('t', 'd')?.asOf]).toEqual([7, 8])
  })

  test('whatever has been stored, refused, replaced and evicted, nothing is left of what is held no more', () => {
    const tier = tierAt({ ms: 0 }, { maxEntries: 5, maxBytes: 20_000, tenantShare: 0.9 })
    for (let i = 0; i < 500; i++) {
      const bytes = i % 7 === 0 ? undefined : new Uint8Array((i * 37) % 19_000)
      tier.set(i % 3 === 0 ? 't' : 'u', copyOf(`${i % 11}`, { asOf: i, bytes, tags: [`${i}`, 'all'] }))
      const { entries, bytes: cost, recordBytes, tagLists } = tier.stats()
      expect(tagLists).toBe(entries)
      expect(recordBytes.live).toBeLessThanOrEqual(cost)
    }
    for (const tenant of ['t', 'u']) for (let i = 0; i < 11; i++) tier.delete(tenant, `${i}`)
    expect(tier.stats()).toMatchObject({ entries: 0, bytes: 0, recordBytes: { live: 0 }, tagLists: 0 })
  })

  test('a copy is its reader’s own: neither later changes of the tier nor the writer’s buffer reach it', () => {
    const tier = tierAt({ ms: 0 })
    const bytes = new Uint8Array([1, 2, 3])
    const tags = ['fruit']
    tier.set('t', copyOf('a', { bytes, tags }))
    bytes.fill(9)
    tags[0] = 'other'
    const found = held(tier, 'a')
    for (let i = 0; i < 1_000; i++)
      tier.set('t', copyOf('a', { asOf: i, bytes: new Uint8Array(700).fill(7) }))
    tier.delete('t', 'a')
    expect([...(found.bytes ?? [])]).toEqual([1, 2, 3])
    expect(found.tags).toEqual(['fruit'])
  })

  test('deleting what is gone already, evicted or never there, is a no-op', () => {
    const tier = tierAt({ ms: 0 }, { maxEntries: 1 })
    tier.set('t', copyOf('a'))
    tier.set('t', copyOf('b'))
    expect(tier.delete('t', 'a')).toBe(false)
    expect(tier.delete('u', 'b')).toBe(false)
    expect(tier.delete('t', 'b')).toBe(true)
    expect(tier.delete('t', 'b')).toBe(false)
    expect(tier.stats()).toMatchObject({ deletions: 1, evictions: { entries: 1 }, entries: 0, bytes: 0 })
  })
})

describe('the cost of a copy', () => {
  function costOf(tenant: string, copy: Copy): number {
    const tier = tierAt({ ms: 0 })
    tier.set(tenant, copy)
    return tier.stats().bytes
  }

  test('counts every byte of the tenant, the id, the tags, and the item with what may be empty', () => {
    const empty = costOf('t', copyOf('a', { bytes: new Uint8Array() }))
    expect(costOf('t', copyOf('a', { bytes: new Uint8Array(800) })) - empty).toBe(900)
    const least = costOf('t', copyOf('a'))
    expect(costOf('tenant', copyOf('a')) - least).toBe(5)
    expect(costOf('t', copyOf('aé')) - least).toBe(3)
    expect(costOf('t', copyOf('a🛒')) - least).toBe(5)
    const tagged = costOf('t', copyOf('a', { tags: ['fruit'] }))
    expect(tagged).toBeGreaterThan(least + 5)
    expect(costOf('t', copyOf('a', { tags: ['fruits'] })) - tagged).toBe(2)
  })

  test('of an absent item is that of an entry alone, and not zero', () => {
    const absent = costOf('t', copyOf('a', { bytes: undefined }))
    expect(absent).toBeGreaterThan(100)
    expect(absent).toBe(costOf('t', copyOf('a', { bytes: new Uint8Array() })))
    expect(absent).toBeLessThan(costOf('t', copyOf('a', { bytes: new Uint8Array(8) })))
  })

  test('bounds what is held', () => {
    const tier = tierAt({ ms: 0 }, { maxEntries: 1_000, maxBytes: 100_000 })
    for (let index = 0; index < 1_000; index += 1) {
      tier.set('t', copyOf(`item-${index}`, { bytes: new Uint8Array(1_000) }))
      expect(tier.stats().bytes).toBeLessThanOrEqual(100_000)
    }
    const { entries, evictions } = tier.stats()
    expect(entries).toBeGreaterThan(40)
    expect(evictions).toEqual({ entries: 0, bytes: 1_000 - entries })
    expect(tier.set('t', copyOf('huge', { bytes: new Uint8Array(100_000) }))).toBe(false)
    expect(tier.stats().entries).toBe(entries)
  })
})

test('no two pairs of tenant and id share a copy, whatever characters they have', () => {
  const text = fc.oneof(
    fc.string({ unit: 'grapheme', maxLength: 6 }),
    fc.string({ unit: fc.constantFrom('1', '2', ':', 'a', '\u0000', '🛒'), maxLength: 4 }),
  )
  fc.assert(
    fc.property(fc.tuple(text, text), fc.tuple(text, text), ([tenant, id], [otherTenant, otherId]) => {
      const tier = tierAt({ ms: 0 })
      tier.set(tenant, copyOf(id, { asOf: 1 }))
      const same = tenant === otherTenant && id === otherId
      expect(tier.peek(otherTenant, otherId) !== undefined).toBe(same)
      // The most confusable pair of all: the same text, cut elsewhere.
      const joined = `${tenant}${id}`
      for (let cut = 0; cut <= joined.length; cut += 1) {
        const found = tier.peek(joined.slice(0, cut), joined.slice(cut)) !== undefined
        expect(found).toBe(cut === tenant.length)
      }
    }),
    { numRuns: 2_000 },
  )
})

test('whatever is stored, replaced, deleted and evicted, a copy is found as it was stored last', () => {
  const ids = ['a', 'b', 'c', 'd', 'e', 'f'] as const
  const change = fc.record({
    id: fc.constantFrom(...ids),
    tenant: fc.constantFrom('t', 'u'),
    length: fc.option(fc.integer({ min: 0, max: 40_000 }), { nil: undefined }),
    fill: fc.nat(255),
    tags: fc.subarray(['x', 'y,"', '\ud800', '🛒'], { maxLength: 3 }),
    deletes: fc.boolean(),
  })
  fc.assert(
    fc.property(fc.array(change, { maxLength: 60 }), (changes) => {
      const tier = tierAt({ ms: 0 }, { maxEntries: 8, maxBytes: 150_000 })
      const stored = new Map<string, Copy>()
      for (const [n, { id, tenant, length, fill, tags, deletes }] of changes.entries()) {
        const key = `${tenant}/${id}`
        if (deletes) {
          tier.delete(tenant, id)
          stored.delete(key)
          continue
        }
        const bytes = length === undefined ? undefined : new Uint8Array(length).fill(fill)
        const copy = copyOf(id, { asOf: n, revision: 2 ** 40 + n, bytes, tags, verifiedAtMs: n / 4 })
        expect(tier.set(tenant, copy)).toBe(true)
        stored.set(key, copy)
      }
      let found = 0
      for (const tenant of ['t', 'u']) {
        for (const id of ids) {
          const copy = tier.peek(tenant, id)
          if (copy === undefined) continue
          found += 1
          const expected = stored.get(`${tenant}/${id}`)
          expect(copy).toEqual({ ...expected, bytes: copy.bytes })
          expect(Buffer.compare(copy.bytes ?? NOTHING, expected?.bytes ?? NOTHING)).toBe(0)
          expect(copy.bytes === undefined).toBe(expected?.bytes === undefined)
        }
      }
      expect(found).toBe(tier.stats().entries)
    }),
    { numRuns: 200 },
  )
})

describe('the share of a tenant', () => {
  test('keeps one that stores without end from evicting the others', () => {
    const tier = tierAt({ ms: 0 }, { maxEntries: 10, tenantShare: 0.5 })
    for (const id of ['a', 'b', 'c', 'd', 'e']) tier.set('quiet', copyOf(id))
    for (let i = 0; i < 1_000; i++) tier.set('loud', copyOf(`${i}`))
    for (const id of ['a', 'b', 'c', 'd', 'e']) expect(tier.peek('quiet', id)).toBeDefined()
    for (let i = 995; i < 1_000; i++) expect(tier.peek('loud', `${i}`)).toBeDefined()
    expect(tier.peek('loud', '994')).toBeUndefined()
  })

  test('holds for bytes, too, and what is larger than the share is not stored', () => {
    const large = (id: string, bytes: number) => copyOf(id, { bytes: new Uint8Array(bytes) })
    const tier = tierAt({ ms: 0 }, { maxBytes: 100_000, tenantShare: 0.5 })
    tier.set('quiet', large('a', 40_000))
    for (let i = 0; i < 10; i++) tier.set('loud', large(`${i}`, 30_000))
    expect(tier.peek('quiet', 'a')).toBeDefined()
    expect(tier.peek('loud', '9')).toBeDefined()
    expect(tier.set('loud', large('z', 60_000))).toBe(false)
    expect(tier.peek('loud', '9')).toBeDefined()
  })
})
