/**
 * Measures what an entry of the memory tier takes, and how fast the LRU is.
 *
 *     node --expose-gc bench/micro/lru.ts cost              bytes per copy: the constants of src/tiers/memory.ts
 *     node --expose-gc bench/micro/lru.ts speed [PEER.mjs]  Zipf 0.99, 1,000,000 keys, capacity 100,000
 *
 * PEER.mjs is a module of your own that exports `name` and `create(capacity)`, which returns an object with
 * `get(key)` and `set(key, value, bytes)`: the same trace runs over it, in turns with ours, each in a process of
 * its own. For `lru-cache`:
 *
 *     export const name = 'lru-cache'
 *     export const create = (max) => {
 *       const cache = new LRUCache({ max, maxSize: 1e12, ttl: 300_000 })
 *       return { get: (key) => cache.get(key), set: (key, value, size) => cache.set(key, value, { size }) }
 *     }
 */
import { execFileSync } from 'node:child_process'
import { setTimeout as sleep } from 'node:timers/promises'
import { pathToFileURL } from 'node:url'
import { Lru } from '../../src/tiers/lru.ts'
import { MemoryTier } from '../../src/tiers/memory.ts'
import { seededRandom, zipfTrace } from '../../test/support/zipf.ts'

interface Cache {
  get(key: string): unknown
  set(key: string, value: object, bytes: number): unknown
}
interface Peer {
  readonly name: string
  create(capacity: number): Cache
}

const KEYS = 1_000_000
const CAPACITY = 100_000
const ACCESSES = 2_000_000
const ROUNDS = 5
const TTL_MS = 300_000
const ITEM_BYTES = 320

const [mode = 'speed', ...rest] = process.argv.slice(2)
if (mode === 'cost') costs()
else if (mode === 'speed') speed(rest[0])
else if (mode === 'cost-of') await costOf(Number(rest[0]), Number(rest[1]), Number(rest[2]))
else if (mode === 'speed-of') await speedOf(rest[0])
else throw new Error(`expected "cost" or "speed", got "${mode}"`)

interface Speed {
  readonly cpuNs: number
  readonly hitRate: number
  readonly bytesPerEntry: number
}

function inProcess<T>(...args: readonly string[]): T {
  return JSON.parse(
    execFileSync(process.execPath, ['--expose-gc', import.meta.filename, ...args], { encoding: 'utf8' }),
  )
}

/** The slope between two sizes, so that what a process takes anyway does not count. */
function costs(): void {
  const [few, many] = [100_000, 400_000]
  const perEntry = (bytes: number, tags: number): number => {
    const taken = [few, many].map((count) => {
      const args = ['cost-of', String(count), String(bytes), String(tags)]
      return median([1, 2, 3].map(() => inProcess<{ readonly taken: number }>(...args).taken))
    })
    return ((taken[1] ?? 0) - (taken[0] ?? 0)) / (many - few)
  }
  const absent = perEntry(-1, 0)
  const present = perEntry(ITEM_BYTES, 0)
  const tagged = perEntry(ITEM_BYTES, 4)
  console.log(
    `node ${process.version}, ${process.arch}: resident bytes per copy besides its item, key and tags`,
  )
  console.table({
    'entry of an absent item': Math.round(absent),
    'more for a byte array': Math.round(present - absent),
    'more for each tag': Math.round((tagged - present) / 4),
  })
}

/** Fills a tier and prints what that took besides the payload that `costOf` counts by itself. */
async function costOf(count: number, bytes: number, tags: number): Promise<void> {
  const tier = (entries: number) =>
    new MemoryTier({
      maxEntries: entries,
      maxBytes: 1e12,
      maxStaleMs: 3_600_000,
      now: () => performance.now(),
    })
  fill(tier(1_000), 20_000, bytes, tags)
  const memory = tier(count)
  await settle()
  const before = process.memoryUsage.rss()
  fill(memory, count, bytes, tags)
  await settle()
  const payload =
    count * (Math.max(bytes, 0) + '7:default'.length + flatId(0).length + tags * flatTag(0, 0).length)
  console.log(
    JSON.stringify({ taken: process.memoryUsage.rss() - before - payload, entries: memory.stats().entries }),
  )
}

function fill(memory: MemoryTier, count: number, bytes: number, tags: number): void {
  for (let index = 0; index < count; index += 1) {
    const revision = 2 ** 40 + index
    memory.set('default', {
      id: flatId(index),
      asOf: revision,
      bytes: bytes < 0 ? undefined : new Uint8Array(bytes).fill(1),
      revision,
      tags: Array.from({ length: tags }, (_, tag) => flatTag(tag, index)),
      verifiedAtMs: performance.now(),
      freshUntilMs: performance.now() + 30_000,
    })
  }
}

/** Strings as a decoder makes them: flat, and not shared. */
function flatId(index: number): string {
  return Buffer.from(`item-${String(index).padStart(7, '0')}`).toString()
}

function flatTag(tag: number, index: number): string {
  return Buffer.from(`tag-${tag}-${String(index).padStart(7, '0')}`).toString()
}

function speed(peerFile: string | undefined): void {
  const files = peerFile === undefined ? [''] : ['', peerFile]
  const names = files.map((file) => (file === '' ? 'Lru' : file))
  const runs = files.map((): Speed[] => [])
  for (let round = 0; round < ROUNDS; round += 1) {
    for (const [index, file] of files.entries()) runs[index]?.push(inProcess<Speed>('speed-of', file))
  }
  const table = runs.map((own, index) => ({
    cache: names[index],
    'CPU ns/access': Math.round(median(own.map((run) => run.cpuNs))),
    'hit rate': own[0]?.hitRate,
    'bytes/entry': Math.round(median(own.map((run) => run.bytesPerEntry))),
  }))
  console.log(`node ${process.version}, ${process.arch}: medians of ${ROUNDS} processes each, in turns`)
  console.table(table)
  const [ours, theirs] = table
  if (ours !== undefined && theirs !== undefined) {
    console.log(`ratio of throughput ${(theirs['CPU ns/access'] / ours['CPU ns/access']).toFixed(2)}`)
  }
}

async function speedOf(peerFile = ''): Promise<void> {
  const peer: Peer =
    peerFile === '' ? { name: 'Lru', create: ours } : await import(pathToFileURL(peerFile).href)
  const keys = Array.from({ length: KEYS }, (_, index) => Buffer.from(`7:default${index}`).toString())
  // A Map keeps a string's hash in the string; having them all is the peers' best case.
  const hashed = new Map(keys.map((key) => [key, true]))
  hashed.clear()
  const trace = zipfTrace({ keys: KEYS, length: ACCESSES, exponent: 0.99, random: seededRandom(42) })
  const value = { bytes: new Uint8Array(ITEM_BYTES) }
  await settle()
  const before = used()
  const cache = peer.create(CAPACITY)
  let [hits, cpuNs] = [0, Number.POSITIVE_INFINITY]
  for (let pass = 0; pass < 3; pass += 1) {
    hits = 0
    const start = process.cpuUsage()
    for (const index of trace) {
      const key = keys[index] as string
      if (cache.get(key) !== undefined) hits += 1
      else cache.set(key, value, ITEM_BYTES + key.length)
    }
    const { user, system } = process.cpuUsage(start)
    cpuNs = Math.min(cpuNs, ((user + system) * 1_000) / ACCESSES)
  }
  await settle()
  const bytesPerEntry = (used() - before) / CAPACITY
  // Asked once more, so that neither the cache nor what it is compared without is collected before.
  const live = cache.get(keys[trace[0] as number] as string) !== undefined && hashed.size === 0
  console.log(JSON.stringify({ cpuNs, hitRate: hits / ACCESSES, bytesPerEntry, live }))
}

/** As peers do, the clock is read at most once in a while: every 1,024 questions. */
function ours(capacity: number): Cache {
  let [asked, nowMs] = [0, performance.now()]
  const now = () => {
    asked += 1
    if ((asked & 1_023) === 0) nowMs = performance.now()
    return nowMs
  }
  const lru = new Lru<object>({ maxEntries: capacity, maxBytes: 1e12, now })
  return {
    get: (key) => lru.get(key),
    set: (key, value, bytes) => lru.set(key, value, bytes, now() + TTL_MS / 10, now() + TTL_MS),
  }
}

async function settle(): Promise<void> {
  for (let round = 0; round < 5; round += 1) {
    globalThis.gc?.()
    await sleep(20)
  }
}

function used(): number {
  const { heapUsed, arrayBuffers } = process.memoryUsage()
  return heapUsed + arrayBuffers
}

function median(values: readonly number[]): number {
  return values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)] ?? Number.NaN
}
