/** The LRU against a reference that keeps an array in order and looks through all of it every time. */
import assert from 'node:assert/strict'
import fc from 'fast-check'
import { describe, test } from 'vitest'
import { Lru, type LruStats } from '../../src/tiers/lru.ts'

interface Held {
  readonly key: string
  readonly value: number
  readonly cost: number
  readonly softUntilMs: number
  readonly hardUntilMs: number
}

/** What comes before the last `@` of a key here is the key itself, and what comes after it is its owner. */
const nameOf = (key: string) => key.slice(0, key.lastIndexOf('@'))
const ownerOf = (key: string) => key.slice(key.lastIndexOf('@') + 1)
const OWNERS = ['', 'owner-1', 'owner-2']

class Reference {
  /** From most to least recent. */
  held: Held[] = []
  nowMs = 0
  hits = 0
  misses = 0
  insertions = 0
  evictedForEntries = 0
  evictedForBytes = 0
  expirations = 0
  deletions = 0
  readonly maxEntries: number
  readonly maxBytes: number
  readonly maxOwnerEntries: number
  readonly maxOwnerBytes: number
  readonly hasOwners: boolean

  constructor(maxEntries: number, maxBytes: number, share: number) {
    this.maxEntries = maxEntries
    this.maxBytes = maxBytes
    this.hasOwners = share < 1
    this.maxOwnerEntries = Math.max(1, Math.floor(maxEntries * share))
    this.maxOwnerBytes = Math.max(1, Math.floor(maxBytes * share))
  }

  ownedBy(owner: string): Held[] {
    // With the whole for a share there are no owners.
    if (!this.hasOwners) return []
    return this.held.filter(({ key }) => ownerOf(key) === owner)
  }

  get bytes(): number {
    return this.held.reduce((sum, { cost }) => sum + cost, 0)
  }

  living(key: string): Held | undefined {
    return this.held.find((entry) => entry.key === key && this.nowMs < entry.hardUntilMs)
  }

  take(key: string): Held | undefined {
    const found = this.held.find((entry) => entry.key === key)
    this.held = this.held.filter((entry) => entry !== found)
    return found
  }

  get(key: string): Held | undefined {
    const entry = this.take(key)
    if (entry !== undefined && this.nowMs < entry.hardUntilMs) {
      this.hits += 1
      this.held.unshift(entry)
      return entry
    }
    this.misses += 1
    if (entry !== undefined) this.expirations += 1
    return undefined
  }

  set(entry: Held): boolean {
    const older = this.take(entry.key)
    if (entry.cost > this.maxOwnerBytes) {
      if (older !== undefined) this.evictedForBytes += 1
      return false
    }
    if (older === undefined) this.insertions += 1
    const owner = ownerOf(entry.key)
    if (this.ownedBy(owner).length === this.maxOwnerEntries) {
      this.take(this.ownedBy(owner).at(-1)?.key ?? '')
      this.evictedForEntries += 1
    }
    if (this.held.length === this.maxEntries) {
      this.held.pop()
      this.evictedForEntries += 1
    }
    const owned = () => this.ownedBy(owner)
    while (owned().reduce((sum, { cost }) => sum + cost, entry.cost) > this.maxOwnerBytes) {
      this.take(this.ownedBy(owner).at(-1)?.key ?? '')
      this.evictedForBytes += 1
    }
    while (this.bytes + entry.cost > this.maxBytes) {
      this.held.pop()
      this.evictedForBytes += 1
    }
    this.held.unshift(entry)
    return true
  }

  delete(key: string): boolean {
    const found = this.take(key) !== undefined
    if (found) this.deletions += 1
    return found
  }

  stats(): LruStats {
    return {
      hits: this.hits,
      misses: this.misses,
      insertions: this.insertions,
      evictions: { entries: this.evictedForEntries, bytes: this.evictedForBytes },
      expirations: this.expirations,
      deletions: this.deletions,
      entries: this.held.length,
      bytes: this.bytes,
    }
  }
}

interface Real {
  readonly lru: Lru<number>
  readonly clock: { ms: number }
  /** What was stored, without what the LRU has said that it dropped. */
  kept: number[]
}

const inOrder = (values: readonly number[]): readonly number[] => values.toSorted((a, b) => a - b)

/** Compares everything that can be seen, after every command. */
function agree(model: Reference, { lru, kept }: Real): void {
  const living = model.held.filter(({ hardUntilMs }) => model.nowMs < hardUntilMs)
  assert.deepEqual(
    lru.entries(),
    living.map(({ key, value }) => [nameOf(key), value]),
  )
  assert.deepEqual(inOrder(kept), inOrder(model.held.map(({ value }) => value)))
  const stats = lru.stats()
  assert.deepEqual(stats, model.stats())
  const { entries, evictions, expirations, deletions } = stats
  assert.equal(stats.insertions, entries + evictions.entries + evictions.bytes + expirations + deletions)
  assert.ok(entries <= lru.maxEntries)
  assert.ok(stats.bytes <= lru.maxBytes)
  for (const owner of OWNERS) {
    const held = model.ownedBy(owner)
    assert.ok(held.length <= model.maxOwnerEntries)
    assert.ok(held.reduce((sum, { cost }) => sum + cost, 0) <= model.maxOwnerBytes)
  }
}

class Step implements fc.Command<Reference, Real> {
  readonly #name: string
  readonly #run: (model: Reference, real: Real) => void

  constructor(name: string, run: (model: Reference, real: Real) => void) {
    this.#name = name
    this.#run = run
  }

  check(): boolean {
    return true
  }

  run(model: Reference, real: Real): void {
    this.#run(model, real)
    agree(model, real)
  }

  toString(): string {
    return this.#name
  }
}

const get = (key: string) =>
  new Step(`get(${key})`, (model, { lru }) => {
    const expected = model.get(key)
    assert.equal(lru.get(nameOf(key), ownerOf(key)), expected?.value)
    if (expected !== undefined) assert.equal(lru.stale, model.nowMs >= expected.softUntilMs)
  })

const look = (key: string) =>
  new Step(`look(${key})`, (model, { lru }) => {
    const expected = model.living(key)
    assert.equal(lru.has(nameOf(key), ownerOf(key)), expected !== undefined)
    assert.equal(lru.peek(nameOf(key), ownerOf(key)), expected?.value)
    if (expected !== undefined) assert.equal(lru.stale, model.nowMs >= expected.softUntilMs)
    const { key: _, ...inspected } = expected ?? {}
    assert.deepEqual(lru.inspect(nameOf(key), ownerOf(key)), expected === undefined ? undefined : inspected)
  })

const set = (key: string, value: number, cost: number, softMs: number, hardMs: number) =>
  new Step(`set(${key}, ${value}, ${cost} B, ${softMs} ms, ${hardMs} ms)`, (model, real) => {
    const [softUntilMs, hardUntilMs] = [model.nowMs + softMs, model.nowMs + hardMs]
    const stored = model.set({ key, value, cost, softUntilMs, hardUntilMs })
    assert.equal(real.lru.set(nameOf(key), value, cost, softUntilMs, hardUntilMs, ownerOf(key)), stored)
    if (stored) real.kept.push(value)
  })

const remove = (key: string) =>
  new Step(`delete(${key})`, (model, { lru }) => {
    assert.equal(lru.delete(nameOf(key), ownerOf(key)), model.delete(key))
  })

const clear = () =>
  new Step('clear()', (model, real) => {
    model.deletions += model.held.length
    model.held = []
    real.lru.clear()
    // It tells nobody of what it clears.
    real.kept = []
  })

const wait = (ms: number) =>
  new Step(`wait(${ms})`, (model, { clock }) => {
    model.nowMs += ms
    clock.ms = model.nowMs
  })

const owners = fc.constantFrom(...OWNERS)
const keysOf = (names: fc.Arbitrary<string>) =>
  fc.tuple(names, owners).map(([name, owner]) => `${name}@${owner}`)
const FEW_KEYS = keysOf(fc.constantFrom('a', 'ao', '', '__proto__', '🛒'))
/** Most are of one length and end alike, so that the hash of their ends does not tell them apart. */
const MANY_KEYS = keysOf(
  fc.integer({ min: 10, max: 36 }).map((key) => (key % 4 === 0 ? `key-${key}` : `${key} ends alike`)),
)
/** Of so many parts of a second, for there is a difference between those that are whole seconds and the others. */
const msUpTo = (parts: number) => fc.nat(parts).map((n) => n * 250)

function commandsOver(keys: fc.Arbitrary<string>, maxCommands: number) {
  const sets = fc
    .tuple(keys, fc.nat(999), fc.integer({ min: 0, max: 12 }), msUpTo(10), msUpTo(20))
    .map((args) => set(...args))
  const mix: [count: number, commands: fc.Arbitrary<Step>][] = [
    [16, sets],
    [16, keys.map(get)],
    [4, keys.map(look)],
    [4, keys.map(remove)],
    [4, msUpTo(6).map(wait)],
    // Seldom, or there would never be many entries.
    [1, fc.constant(clear())],
  ]
  // What is listed twice comes twice as often.
  const commands = mix.flatMap(([count, commands]) => Array.from({ length: count }, () => commands))
  return fc.commands(commands, { maxCommands, size: 'max' })
}

function runBoth(
  maxEntries: number,
  maxBytes: number,
  ownerShare: number,
  draw: number,
  steps: Iterable<fc.Command<Reference, Real>>,
): void {
  const clock = { ms: 0 }
  const dropped = (value: number) => {
    const at = real.kept.indexOf(value)
    assert.notEqual(at, -1, `${value} was dropped, and was not held`)
    real.kept.splice(at, 1)
  }
  const options = { maxEntries, maxBytes, ownerShare, now: () => clock.ms, random: () => draw, dropped }
  const real: Real = { lru: new Lru<number>(options), clock, kept: [] }
  fc.modelRun(() => ({ model: new Reference(maxEntries, maxBytes, ownerShare), real }), steps)
}

/** What the hash draws its secrets from; 0 makes the worst hash, in which keys share buckets. */
const DRAWS = fc.constantFrom(0, 0.37, 0.999)

/** 1: there are no owners. */
const SHARES = fc.constantFrom(1, 0.7, 0.34, 0.01)

describe('the LRU and a naive reference', () => {
  test('agree after every command, over 10,000 short sequences with tight bounds', {
    timeout: 60_000,
  }, () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 6 }),
        fc.integer({ min: 1, max: 30 }),
        SHARES,
        DRAWS,
        commandsOver(FEW_KEYS, 24),
        runBoth,
      ),
      { numRuns: 10_000 },
    )
  })

  test('agree after every command, over long sequences that make the LRU grow', { timeout: 60_000 }, () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 17, max: 70 }),
        fc.integer({ min: 100, max: 500 }),
        SHARES,
        DRAWS,
        commandsOver(MANY_KEYS, 400),
        runBoth,
      ),
      { numRuns: 100 },
    )
  })
})
