import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { Lru, type LruOptions } from '../../src/tiers/lru.ts'

function lruAt(clock: { ms: number }, options: Partial<LruOptions<string>> = {}): Lru<string> {
  return new Lru<string>({ maxEntries: 3, now: () => clock.ms, ...options })
}

function keysOf(lru: Lru<string>): string[] {
  return lru.entries().map(([key]) => key)
}

describe('what is held', () => {
  test('a value that was set is returned until it is deleted', () => {
    const lru = lruAt({ ms: 0 })
    expect(lru.set('a', 'A', 1)).toBe(true)
    expect(lru.get('a')).toBe('A')
    expect(lru.delete('a')).toBe(true)
    expect(lru.get('a')).toBeUndefined()
    expect(lru.stats()).toMatchObject({ hits: 1, misses: 1, deletions: 1, entries: 0, bytes: 0 })
  })

  test('deleting a key that is gone, or was never there, is a no-op', () => {
    const lru = lruAt({ ms: 0 }, { maxEntries: 1 })
    lru.set('a', 'A', 1)
    lru.set('b', 'B', 1)
    expect(lru.delete('a')).toBe(false)
    expect(lru.delete('never')).toBe(false)
    expect(lru.delete('b')).toBe(true)
    expect(lru.delete('b')).toBe(false)
    expect(lru.stats()).toMatchObject({
      deletions: 1,
      evictions: { entries: 1, bytes: 0 },
      entries: 0,
      bytes: 0,
    })
  })

  test('the least recently used entry makes room', () => {
    const lru = lruAt({ ms: 0 })
    for (const key of ['a', 'b', 'c']) lru.set(key, key, 1)
    lru.get('a')
    lru.set('d', 'd', 1)
    expect(keysOf(lru)).toEqual(['d', 'a', 'c'])
  })

  test('setting a key again makes it the most recent one and holds it once', () => {
    const lru = lruAt({ ms: 0 })
    for (const key of ['a', 'b', 'c']) lru.set(key, key, 1)
    lru.set('a', 'new', 5)
    expect(lru.entries()).toEqual([
      ['a', 'new'],
      ['c', 'c'],
      ['b', 'b'],
    ])
    expect(lru.stats()).toMatchObject({ insertions: 3, entries: 3, bytes: 7 })
  })

  test('only real reads count as use: looking, inspecting and iterating do not', () => {
    const lru = lruAt({ ms: 0 })
    for (const key of ['a', 'b', 'c']) lru.set(key, key, 1)
    const before = lru.stats()
    expect(lru.peek('a')).toBe('a')
    expect(lru.has('a')).toBe(true)
    expect(lru.inspect('a')).toMatchObject({ value: 'a', cost: 1 })
    expect(lru.entries()).toHaveLength(3)
    expect(lru.stats()).toEqual(before)
    lru.set('d', 'd', 1)
    expect(lru.has('a')).toBe(false)
  })

  test('clearing deletes everything, and the map goes on from there', () => {
    const lru = lruAt({ ms: 0 }, { maxEntries: 1_000 })
    for (let index = 0; index < 500; index += 1) lru.set(`key-${index}`, 'x', 2)
    lru.clear()
    expect(lru.stats()).toMatchObject({ deletions: 500, entries: 0, bytes: 0 })
    expect(lru.get('key-1')).toBeUndefined()
    lru.set('a', 'A', 1)
    expect(lru.entries()).toEqual([['a', 'A']])
  })

  test('values that were deleted, evicted, expired or replaced are let go', async () => {
    setFlagsFromString('--expose-gc')
    const gc: () => void = runInNewContext('gc')
    const clock = { ms: 0 }
    const lru = new Lru<object>({ maxEntries: 4, now: () => clock.ms })
    const setFresh = (key: string, hardUntilMs?: number): WeakRef<object> => {
      const value = { key }
      lru.set(key, value, 1, undefined, hardUntilMs)
      return new WeakRef(value)
    }
    const gone = ['evicted', 'deleted', 'replaced'].map((key) => setFresh(key))
    gone.push(setFresh('expired', 10))
    clock.ms = 10
    for (const key of ['deleted', 'replaced', 'expired']) lru.get(key)
    const held = ['a', 'b', 'replaced'].map((key) => setFresh(key))
    lru.delete('deleted')
    // A weak reference holds its target until the job that made it is over.
    await new Promise(setImmediate)
    gc()
    expect(lru.entries().map(([key]) => key)).toEqual(['replaced', 'b', 'a'])
    expect(gone.map((reference) => reference.deref())).toEqual([undefined, undefined, undefined, undefined])
    expect(held.every((reference) => reference.deref() !== undefined)).toBe(true)
  })

  test('entries can be deleted while walking through them', () => {
    const lru = lruAt({ ms: 0 })
    for (const key of ['a', 'b', 'c']) lru.set(key, key, 1)
    const seen: string[] = []
    for (const [key] of lru.entries()) {
      seen.push(key)
      lru.delete(key)
    }
    expect(seen).toEqual(['c', 'b', 'a'])
    expect(lru.size).toBe(0)
  })
})

describe('the bound in bytes', () => {
  test('as many entries make room as it takes', () => {
    const lru = lruAt({ ms: 0 }, { maxEntries: 10, maxBytes: 10 })
    for (const key of ['a', 'b', 'c']) lru.set(key, key, 3)
    expect(lru.stats().bytes).toBe(9)
    lru.set('d', 'd', 7)
    expect(keysOf(lru)).toEqual(['d', 'c'])
    expect(lru.stats()).toMatchObject({ evictions: { entries: 0, bytes: 2 }, bytes: 10 })
  })

  test('an entry of exactly the bound is held, alone', () => {
    const lru = lruAt({ ms: 0 }, { maxBytes: 10 })
    lru.set('a', 'a', 4)
    expect(lru.set('b', 'b', 10)).toBe(true)
    expect(keysOf(lru)).toEqual(['b'])
    expect(lru.set('b', 'B', 10)).toBe(true)
    expect(lru.stats().bytes).toBe(10)
  })

  test('an entry that grows evicts others, never itself', () => {
    const lru = lruAt({ ms: 0 }, { maxBytes: 10 })
    for (const key of ['a', 'b', 'c']) lru.set(key, key, 3)
    lru.set('a', 'A', 8)
    expect(lru.entries()).toEqual([['a', 'A']])
    expect(lru.stats()).toMatchObject({ evictions: { bytes: 2 }, bytes: 8 })
  })

  test('an entry larger than the bound is not stored, and what it should replace goes', () => {
    const lru = lruAt({ ms: 0 }, { maxBytes: 10 })
    lru.set('a', 'old', 3)
    lru.set('b', 'b', 3)
    expect(lru.set('a', 'new', 11)).toBe(false)
    expect(lru.entries()).toEqual([['b', 'b']])
    expect(lru.set('c', 'c', Number.POSITIVE_INFINITY)).toBe(false)
    expect(lru.stats()).toMatchObject({ insertions: 2, evictions: { bytes: 1 }, bytes: 3 })
  })

  test('an entry of 4 GiB is too large even without a bound', () => {
    const lru = lruAt({ ms: 0 })
    expect(lru.set('a', 'a', 2 ** 32 - 1)).toBe(true)
    expect(lru.set('b', 'b', 2 ** 32)).toBe(false)
    expect(lru.stats().bytes).toBe(2 ** 32 - 1)
  })

  test.each([-1, 0.5, Number.NaN])('a cost of %s is refused and changes nothing', (cost) => {
    const lru = lruAt({ ms: 0 })
    lru.set('a', 'a', 1)
    expect(() => lru.set('a', 'b', cost)).toThrow(RangeError)
    expect(lru.entries()).toEqual([['a', 'a']])
  })
})

describe('the soft and the hard TTL', () => {
  test('an entry is fresh, then stale, then gone, each from the very millisecond', () => {
    const clock = { ms: 0 }
    const lru = lruAt(clock)
    lru.set('a', 'A', 1, 100, 200)
    for (const [ms, stale] of [
      [0, false],
      [99.9, false],
      [100, true],
      [199.9, true],
    ] as const) {
      clock.ms = ms
      expect(lru.get('a')).toBe('A')
      expect(lru.stale).toBe(stale)
      expect(lru.peek('a')).toBe('A')
      expect(lru.stale).toBe(stale)
    }
    clock.ms = 200
    expect(lru.get('a')).toBeUndefined()
    expect(lru.stats()).toMatchObject({ hits: 4, misses: 1, expirations: 1, entries: 0, bytes: 0 })
    expect(lru.get('a')).toBeUndefined()
    expect(lru.stats()).toMatchObject({ misses: 2, expirations: 1 })
  })

  test('nobody sees an entry past its hard TTL, but only a read removes it', () => {
    const clock = { ms: 0 }
    const lru = lruAt(clock)
    lru.set('a', 'A', 1, 10, 20)
    lru.set('b', 'B', 1)
    clock.ms = 20
    expect(lru.peek('a')).toBeUndefined()
    expect(lru.has('a')).toBe(false)
    expect(lru.inspect('a')).toBeUndefined()
    expect(keysOf(lru)).toEqual(['b'])
    expect(lru.stats()).toMatchObject({ expirations: 0, entries: 2 })
  })

  test('setting a key again gives it new times', () => {
    const clock = { ms: 0 }
    const lru = lruAt(clock)
    lru.set('a', 'A', 1, 10, 20)
    clock.ms = 15
    lru.set('a', 'B', 1, 25, 35)
    clock.ms = 24
    expect(lru.get('a')).toBe('B')
    expect(lru.stale).toBe(false)
    clock.ms = 34
    expect(lru.get('a')).toBe('B')
    expect(lru.stale).toBe(true)
  })

  test('an entry without times never ages', () => {
    const clock = { ms: 0 }
    const lru = lruAt(clock)
    lru.set('a', 'A', 1)
    clock.ms = Number.MAX_SAFE_INTEGER
    expect(lru.get('a')).toBe('A')
    expect(lru.stale).toBe(false)
  })
})

describe('keys', () => {
  const ODD = [
    '',
    ' ',
    '__proto__',
    'constructor',
    'hasOwnProperty',
    'toString',
    'a\u0000',
    '\u0000a',
    '\u0000',
    '\u0000\u0000',
    '1',
    '01',
    '1.0',
    'é',
    'e\u0301',
    '🛒',
    '\ud83d',
    'x'.repeat(100_000),
    `${'x'.repeat(99_999)}y`,
  ]

  test('odd keys are keys like all others', () => {
    const lru = lruAt({ ms: 0 }, { maxEntries: 100 })
    for (const [index, key] of ODD.entries()) lru.set(key, `value ${index}`, 1)
    for (const [index, key] of ODD.entries()) expect(lru.get(key)).toBe(`value ${index}`)
    for (const key of ODD) expect(lru.delete(key)).toBe(true)
    expect(lru.size).toBe(0)
  })

  test.each([
    ['a random hash', Math.random],
    ['a hash that keeps everything in few buckets', () => 0],
  ])('10,000 keys are each found, also after every other one was deleted, with %s', (_, random) => {
    const lru = lruAt({ ms: 0 }, { maxEntries: 10_000, random })
    const keys = Array.from({ length: 10_000 }, (_, index) => index.toString(36))
    for (const key of keys) lru.set(key, key, 1)
    for (const [index, key] of keys.entries()) if (index % 2 === 0) lru.delete(key)
    expect(keys.every((key, index) => lru.get(key) === (index % 2 === 0 ? undefined : key))).toBe(true)
    for (const key of keys) lru.set(key, key, 1)
    expect(keys.every((key) => lru.get(key) === key)).toBe(true)
    expect(lru.size).toBe(10_000)
  })

  // Were they looked through one by one, this would take minutes.
  test.each([
    ['begin', (n: number) => `${n}/products/of/a/catalogue`],
    ['end', (n: number) => `/products/of/a/catalogue/${n}`],
    ['are long in the middle, and begin and end alike,', (n: number) => `/products/${n}/of/a/catalogue`],
  ])(
    '40,000 keys are found as fast as any, whether they differ where they %s',
    { timeout: 10_000 },
    (_, keyOf) => {
      const lru = new Lru<number>({ maxEntries: 40_000, now: () => 0 })
      for (let n = 0; n < 40_000; n++) lru.set(keyOf(n), n, 1)
      let found = 0
      for (let n = 0; n < 40_000; n++) if (lru.get(keyOf(n)) === n) found += 1
      expect(found).toBe(40_000)
    },
  )

  test('keys that end alike, and come when there are many others, are found as those are', () => {
    const lru = new Lru<number>({ maxEntries: 1_100, now: () => 0 })
    for (let n = 0; n < 1_000; n++) lru.set(`key-${n}`, n, 1)
    // What is missed before and set after is found, too.
    expect(lru.get('it ends alike')).toBeUndefined()
    for (let n = 0; n < 99; n++) lru.set(`${n} ends alike`, n, 1)
    lru.set('it ends alike', 99, 1)
    expect(lru.get('it ends alike')).toBe(99)
    for (let n = 0; n < 1_000; n++) expect(lru.get(`key-${n}`)).toBe(n)
    for (let n = 0; n < 99; n++) expect(lru.get(`${n} ends alike`)).toBe(n)
    for (let n = 0; n < 99; n++) expect(lru.delete(`${n} ends alike`)).toBe(true)
    expect(lru.entries()).toHaveLength(1_001)
    expect(lru.delete('key-1')).toBe(true)
  })
})

describe('options', () => {
  test.each([
    [{ maxEntries: 0 }, 'maxEntries should be a whole number from 1 to 30000000, got 0'],
    [{ maxEntries: 1.5 }, 'maxEntries should be a whole number from 1 to 30000000, got 1.5'],
    [{ maxEntries: 30_000_001 }, 'maxEntries should be a whole number from 1 to 30000000, got 30000001'],
    [{ maxBytes: 0 }, 'maxBytes should be at least 1, got 0'],
    [{ maxBytes: Number.NaN }, 'maxBytes should be at least 1, got NaN'],
  ])('%j are refused with a reason', (options, message) => {
    expect(() => lruAt({ ms: 0 }, options)).toThrow(new RangeError(message))
  })

  test('a bound of 30,000,000 entries takes no memory in advance', () => {
    const before = process.memoryUsage().arrayBuffers
    const lru = lruAt({ ms: 0 }, { maxEntries: 30_000_000 })
    lru.set('a', 'A', 1)
    expect(process.memoryUsage().arrayBuffers - before).toBeLessThan(1_000_000)
  })
})

test('two owners may have the same key, also when the hashes of both are the same', () => {
  // The hash of this seed and multiplier is the same for the same letters in any order.
  const lru = new Lru<number>({ maxEntries: 10, now: () => 0, random: () => 0 })
  lru.set('key', 1, 1, 9, 9, 'ab')
  lru.set('key', 2, 1, 9, 9, 'ba')
  expect([lru.get('key', 'ab'), lru.get('key', 'ba'), lru.get('key')]).toEqual([1, 2, undefined])
})

describe('a key that is found by its bytes', () => {
  const text = fc.string({ unit: 'grapheme-ascii', maxLength: 12 })
  const find = (lru: Lru<string>, key: string, owner: string, nowMs: number, before = 'x', after = 'y') => {
    const bytes = Buffer.from(before + key + after)
    return lru.findAscii(bytes, before.length, before.length + key.length, owner, nowMs)
  }

  test('is the one that is found by its text, with the same order and the same counts after a hit', () => {
    const key = fc.constantFrom('a', 'b', 'ab', 'ba', 'key-1', 'key-2', '~ ~', '')
    const owner = fc.constantFrom('', 'one', 'two')
    const access = fc.record({ key, owner, nowMs: fc.nat(20), set: fc.boolean() })
    fc.assert(
      fc.property(fc.array(access, { maxLength: 60 }), (accesses) => {
        const [byText, byBytes] = [lruAt({ ms: 0 }), lruAt({ ms: 0 })]
        for (const [n, { key, owner, nowMs, set }] of accesses.entries()) {
          if (set) for (const lru of [byText, byBytes]) lru.set(key, `${n}`, 1, 10, 15, owner)
          const expected = byText.peek(key, owner) !== undefined && nowMs < 15
          const found = find(byBytes, key, owner, nowMs)
          if (expected) {
            expect(found).toBe(byText.get(key, owner, nowMs))
            byBytes.foundIsHit()
          } else expect(found).toBeUndefined()
          expect(byBytes.entries()).toEqual(byText.entries())
          expect(byBytes.stats()).toEqual(byText.stats())
        }
      }),
    )
  })

  test('is no other key, however alike they are', () => {
    fc.assert(
      fc.property(fc.uniqueArray(text, { minLength: 2, maxLength: 40 }), ([missing = '', ...keys]) => {
        const lru = lruAt({ ms: 0 }, { maxEntries: 100 })
        for (const key of keys) lru.set(key, key, 1)
        expect(find(lru, missing, '', 0)).toBeUndefined()
        for (const key of keys) expect(find(lru, key, '', 0)).toBe(key)
        expect(find(lru, keys[0] ?? '', 'another', 0)).toBeUndefined()
      }),
    )
  })

  test('counts, moves and removes nothing when it is not taken for a hit', () => {
    const lru = lruAt({ ms: 0 })
    for (const key of ['a', 'b']) lru.set(key, key, 1, 10, 20)
    expect(find(lru, 'a', '', 5)).toBe('a')
    expect(find(lru, 'a', '', 20)).toBeUndefined()
    expect(find(lru, 'c', '', 5)).toBeUndefined()
    expect(keysOf(lru)).toEqual(['b', 'a'])
    expect(lru.stats()).toMatchObject({ hits: 0, misses: 0, expirations: 0, entries: 2 })
  })
})
