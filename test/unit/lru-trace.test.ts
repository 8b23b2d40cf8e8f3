import { describe, expect, test } from 'vitest'
import { Lru } from '../../src/tiers/lru.ts'
import { seed } from '../support/seed.ts'
import { seededRandom, zipfTrace } from '../support/zipf.ts'

const KEYS = 20_000
const ACCESSES = 200_000

/**
 * How often each stack distance occurs: the number of distinct keys from the last access of a key to this one, itself
 * included. An LRU of capacity C hits exactly the accesses whose distance is at most C, so one pass tells the hits of every
 * capacity, and needs no LRU (Mattson, Gecsei, Slutz, Traiger: Evaluation techniques for storage hierarchies, 1970).
 * A Fenwick tree over positions counts the keys whose latest access lies in a range.
 */
function stackDistances(trace: Uint32Array): Uint32Array {
  const tree = new Int32Array(trace.length + 1)
  const add = (position: number, amount: number): void => {
    for (let at = position; at <= trace.length; at += at & -at) tree[at] = (tree[at] ?? 0) + amount
  }
  const countUpTo = (position: number): number => {
    let count = 0
    for (let at = position; at > 0; at -= at & -at) count += tree[at] ?? 0
    return count
  }
  const lastAccess = new Map<number, number>()
  const occurrences = new Uint32Array(trace.length + 1)
  for (const [index, key] of trace.entries()) {
    const position = index + 1
    const last = lastAccess.get(key)
    if (last !== undefined) {
      const distance = countUpTo(position - 1) - countUpTo(last - 1)
      occurrences[distance] = (occurrences[distance] ?? 0) + 1
      add(last, -1)
    }
    add(position, 1)
    lastAccess.set(key, position)
  }
  return occurrences
}

describe('on a recorded trace of 200,000 Zipf accesses', () => {
  const trace = zipfTrace({ keys: KEYS, length: ACCESSES, exponent: 0.99, random: seededRandom(seed) })
  const distances = stackDistances(trace)

  test.each([1, 10, 100, 1_000, 5_000, KEYS])(
    'a capacity of %d hits exactly as often as LRU does',
    (capacity) => {
      const lru = new Lru<number>({ maxEntries: capacity, now: () => 0 })
      for (const key of trace) {
        const name = `item-${key}`
        if (lru.get(name) === undefined) lru.set(name, key, 1)
      }
      const expected = distances.subarray(0, capacity + 1).reduce((sum, count) => sum + count, 0)
      expect(expected).toBeGreaterThan(0)
      expect(lru.stats().hits).toBe(expected)
      expect(lru.stats().misses).toBe(ACCESSES - expected)
      const { insertions, evictions, entries } = lru.stats()
      expect(insertions).toBe(ACCESSES - expected)
      expect(evictions.entries).toBe(insertions - entries)
    },
  )

  test('a bound in bytes of 100 equal entries hits exactly as often as a capacity of 100', () => {
    const lru = new Lru<number>({ maxEntries: KEYS, maxBytes: 100 * 7, now: () => 0 })
    for (const key of trace) {
      const name = `item-${key}`
      if (lru.get(name) === undefined) lru.set(name, key, 7)
    }
    expect(lru.stats().hits).toBe(distances.subarray(0, 101).reduce((sum, count) => sum + count, 0))
    expect(lru.stats().evictions.entries).toBe(0)
  })
})
