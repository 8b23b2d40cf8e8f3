/** Our LRU and those that people would use instead, behind one face. */
import { LRUCache } from 'lru-cache'
import { LRUCache as MnemonistCache, LRUMap as MnemonistMap } from 'mnemonist'
import QuickLRU from 'quick-lru'
import { lru as tinyLru } from 'tiny-lru'
import { Lru } from '../../src/tiers/lru.ts'

export interface Cache {
  get(key: string): unknown
  /** `bytes` is what the entry costs, where costs are counted. */
  set(key: string, value: object, bytes: number): unknown
}

export const TTL_MS = 300_000
const MAX_BYTES = 1e12

/** As lru-cache does, the clock is read at most once a millisecond or so: here every 1,024 questions. */
function ours(capacity: number): Cache {
  let [asked, nowMs] = [0, performance.now()]
  const now = () => {
    asked += 1
    if ((asked & 1_023) === 0) nowMs = performance.now()
    return nowMs
  }
  const lru = new Lru<object>({ maxEntries: capacity, maxBytes: MAX_BYTES, now })
  return {
    get: (key) => lru.get(key),
    set: (key, value, bytes) => lru.set(key, value, bytes, now() + TTL_MS / 10, now() + TTL_MS),
  }
}

/** Each with its most entries alone, but for ours, which always has both times to live and a bound of bytes. */
export const CACHES: Readonly<Record<string, (capacity: number) => Cache>> = {
  ours,
  'lru-cache': (max) => {
    const cache = new LRUCache<string, object>({ max })
    return { get: (key) => cache.get(key), set: (key, value) => cache.set(key, value) }
  },
  'lru-cache with TTL and size': (max) => {
    const cache = new LRUCache<string, object>({ max, maxSize: MAX_BYTES, ttl: TTL_MS })
    return {
      get: (key) => cache.get(key),
      set: (key, value, size) => cache.set(key, value, { size }),
    }
  },
  'mnemonist LRUCache': (capacity) => new MnemonistCache<string, object>(capacity),
  'mnemonist LRUMap': (capacity) => new MnemonistMap<string, object>(capacity),
  'quick-lru': (maxSize) => {
    const cache = new QuickLRU<string, object>({ maxSize })
    return { get: (key) => cache.get(key), set: (key, value) => cache.set(key, value) }
  },
  'tiny-lru': (max) => tinyLru<object>(max),
}
