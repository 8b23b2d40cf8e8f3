import fc from 'fast-check'
import { expect, test } from 'vitest'
import { MAX_EMPTY, Records } from '../../src/tiers/records.ts'

const SEGMENT_BYTES = 2 ** 18

/** Records with content, and what each should hold. */
class Filled {
  readonly records = new Records()
  readonly lengths = new Map<number, number>()
  #handles: number[] = []
  /** What the records take. */
  live = 0

  add(length: number): void {
    const handle = this.records.add(length)
    if (this.lengths.has(handle)) throw new Error(`record ${handle} is there already`)
    this.lengths.set(handle, length)
    this.#handles.push(handle)
    this.live += Records.sizeOf(length)
    this.bytesOf(handle).fill(contentOf(handle, length))
  }

  /** Any of them; the last one added takes its place. */
  remove(n: number): void {
    const at = n % this.#handles.length
    const [last, handle] = [this.#handles.at(-1), this.#handles[at]]
    if (last === undefined || handle === undefined) return
    this.#handles[at] = last
    this.#handles.pop()
    this.records.remove(handle)
    this.live -= Records.sizeOf(this.lengths.get(handle) ?? 0)
    this.lengths.delete(handle)
  }

  clear(): void {
    this.records.clear()
    this.lengths.clear()
    this.#handles = []
    this.live = 0
  }

  bytesOf(handle: number): Buffer {
    const at = this.records.at(handle)
    if (at % 8 !== 0) throw new Error(`record ${handle} begins at ${at}`)
    return this.records.segment(handle).bytes.subarray(at, at + (this.lengths.get(handle) ?? 0))
  }

  check(): void {
    for (const [handle, length] of this.lengths) {
      const bytes = this.bytesOf(handle)
      const expected = Buffer.alloc(length, contentOf(handle, length))
      if (!bytes.equals(expected)) throw new Error(`record ${handle} of ${length} bytes is not what it was`)
    }
  }
}

const contentOf = (handle: number, length: number): number => (handle * 31 + length) & 0xff

test('records keep their content, whatever is added and removed around them', () => {
  const length = fc.oneof(
    { weight: 6, arbitrary: fc.integer({ min: 0, max: 2_000 }) },
    { weight: 2, arbitrary: fc.integer({ min: 10_000, max: 20_000 }) },
    { weight: 1, arbitrary: fc.constantFrom(0, 1, 8, 2 ** 14 - 8, 2 ** 14 - 7, 2 ** 14, 300_000) },
  )
  const step = fc.oneof(
    { weight: 3, arbitrary: length.map((add) => ({ add, times: 30 })) },
    { weight: 2, arbitrary: fc.nat(10_000).map((remove) => ({ remove, times: 20 })) },
  )
  fc.assert(
    fc.property(fc.array(step, { minLength: 20, maxLength: 120 }), (steps) => {
      const filled = new Filled()
      for (const one of steps) {
        for (let i = 0; i < one.times; i++) {
          if ('add' in one) filled.add(one.add + (i % 3))
          else filled.remove(one.remove * (i + 1))
        }
      }
      filled.check()
    }),
    { numRuns: 60 },
  )
})

test('however long records come and go, an eighth and two segments is the most that is empty', () => {
  const random = fc.sample(fc.noBias(fc.integer({ min: 0, max: 2 ** 30 })), 1_000)
  const filled = new Filled()
  for (let i = 0; i < 4_000; i++) filled.add(300 + (i % 7) * 40)
  for (let i = 0; i < 60_000; i++) {
    const drawn = (random[i % random.length] ?? 0) + i * 7919
    // Some places change all the time, others seldom.
    filled.remove(i % 2 === 0 ? i % 100 : drawn)
    filled.add(100 + (drawn % 600))
    const most = filled.live * (1 + MAX_EMPTY) + 2 * SEGMENT_BYTES
    if (filled.records.allocated > most) {
      throw new Error(`${filled.records.allocated} bytes for ${filled.live}, after ${i} changes`)
    }
  }
  filled.check()
})

test('large records take no more than they are, and give it back at once', () => {
  const records = new Records()
  const handles = Array.from({ length: 50 }, () => records.add(100_000))
  expect(records.allocated).toBe(50 * Records.sizeOf(100_000))
  for (const handle of handles) records.remove(handle)
  expect(records.allocated).toBe(0)
})

test('what is removed altogether leaves one segment at most', () => {
  const filled = new Filled()
  for (let i = 0; i < 20_000; i++) filled.add(200)
  expect(filled.records.allocated).toBeGreaterThan(15 * SEGMENT_BYTES)
  while (filled.lengths.size > 0) filled.remove(0)
  expect(filled.records.allocated).toBeLessThanOrEqual(SEGMENT_BYTES)
  filled.add(10)
  filled.check()
})

test('clearing gives everything back, and records can be added anew', () => {
  const filled = new Filled()
  for (let i = 0; i < 2_000; i++) filled.add(200)
  filled.clear()
  expect(filled.records.allocated).toBe(0)
  for (let i = 0; i < 3_000; i++) filled.add(i)
  filled.check()
})
