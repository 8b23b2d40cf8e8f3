import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { MAX_EMPTY, Records } from '../../src/tiers/records.ts'

const SEGMENT_BYTES = 2 ** 18
/** A record larger than this has a segment of its own. */
const MAX_SHARED_BYTES = SEGMENT_BYTES / 16

/** Records with content, and what each should hold. */
class Filled {
  readonly records = new Records()
  readonly #lengths = new Map<number, number>()
  #handles: number[] = []
  #live = 0

  get size(): number {
    return this.#handles.length
  }

  allocate(length: number): void {
    const handle = this.records.allocate(length)
    if (this.#lengths.has(handle)) throw new Error(`record ${handle} is there already`)
    this.#lengths.set(handle, length)
    this.#handles.push(handle)
    this.#live += Records.sizeOf(length)
    this.#bytesOf(handle).fill(contentOf(handle, length))
    if (this.records.live !== this.#live)
      throw new Error(`${this.records.live} bytes live, not ${this.#live}`)
  }

  /** Any of them; the last one takes its place. */
  free(n: number): void {
    const at = n % this.#handles.length
    const [last, handle] = [this.#handles.at(-1), this.#handles[at]]
    if (last === undefined || handle === undefined) return
    this.#handles[at] = last
    this.#handles.pop()
    this.records.free(handle)
    this.#live -= Records.sizeOf(this.#lengths.get(handle) ?? 0)
    this.#lengths.delete(handle)
  }

  freeAll(): void {
    while (this.size > 0) this.free(0)
  }

  /** More than this is not allocated for long. */
  get most(): number {
    return this.#live * (1 + MAX_EMPTY) + 2 * SEGMENT_BYTES
  }

  check(): void {
    for (const [handle, length] of this.#lengths) {
      const expected = Buffer.alloc(length, contentOf(handle, length))
      if (!this.#bytesOf(handle).equals(expected)) {
        throw new Error(`record ${handle} of ${length} bytes is not what it was`)
      }
    }
  }

  #bytesOf(handle: number): Buffer {
    const at = this.records.at(handle)
    const { bytes } = this.records.segment(handle)
    const to = at + (this.#lengths.get(handle) ?? 0)
    if (at % 8 !== 0 || to > bytes.byteLength) throw new Error(`record ${handle} is from ${at} to ${to}`)
    return bytes.subarray(at, to)
  }
}

const contentOf = (handle: number, length: number): number => (handle * 31 + length) & 0xff

test('records keep their content, whatever is allocated and freed around them', () => {
  const length = fc.oneof(
    { weight: 6, arbitrary: fc.integer({ min: 0, max: 2_000 }) },
    { weight: 3, arbitrary: fc.integer({ min: 2_000, max: 20_000 }) },
    {
      weight: 1,
      arbitrary: fc.constantFrom(
        0,
        1,
        8,
        MAX_SHARED_BYTES - 8,
        MAX_SHARED_BYTES - 7,
        SEGMENT_BYTES - 8,
        300_000,
      ),
    },
  )
  const step = fc.oneof(
    { weight: 3, arbitrary: length.map((allocate) => ({ allocate, times: 30 })) },
    { weight: 2, arbitrary: fc.nat(10_000).map((free) => ({ free, times: 20 })) },
  )
  fc.assert(
    fc.property(fc.array(step, { minLength: 20, maxLength: 120 }), (steps) => {
      const filled = new Filled()
      for (const one of steps) {
        for (let i = 0; i < one.times; i++) {
          if ('allocate' in one) filled.allocate(one.allocate + (i % 3))
          else filled.free(one.free * (i + 1))
        }
      }
      filled.check()
      filled.freeAll()
      expect(filled.records.live).toBe(0)
      expect(filled.records.allocated).toBeLessThanOrEqual(SEGMENT_BYTES)
    }),
    { numRuns: 60 },
  )
})

describe('what is empty', () => {
  test.each([
    ['small records', 4_000, (drawn: number) => 100 + (drawn % 600)],
    ['records of many sizes', 500, (drawn: number) => 2_000 + (drawn % 14_000)],
    ['records that just share a segment', 300, () => MAX_SHARED_BYTES - 8],
    ['small ones and large ones', 1_000, (drawn: number) => (drawn % 50 === 0 ? 100_000 : 300)],
  ])('is an eighth and two segments at most, however long there is replaced: %s', (_, count, lengthOf) => {
    const filled = new Filled()
    let drawn = 1
    const draw = () => {
      drawn = Math.imul(drawn, 1_103_515_245) + 12_345
      return (drawn >>> 8) & 0xff_ffff
    }
    while (filled.size < count) filled.allocate(lengthOf(draw()))
    let [over, longest] = [0, 0]
    for (let i = 0; i < 30_000; i++) {
      // Some places change all the time, others seldom.
      filled.free(i % 2 === 0 ? i % 100 : draw())
      filled.allocate(lengthOf(draw()))
      over = filled.records.allocated > filled.most ? over + 1 : 0
      longest = Math.max(longest, over)
    }
    // The cleaner goes on with the next ones.
    expect(longest).toBeLessThanOrEqual(10)
    filled.check()
    filled.freeAll()
    expect(filled.records.allocated).toBeLessThanOrEqual(SEGMENT_BYTES)
  })

  test('after half has gone, is given back while large records come, a few segments at a time', () => {
    const filled = new Filled()
    for (let i = 0; i < 60_000; i++) filled.allocate(300)
    for (let i = 0; i < 30_000; i++) filled.free(i)
    const before = filled.records.allocated
    filled.allocate(20_000)
    expect(before - filled.records.allocated).toBeLessThan(5 * SEGMENT_BYTES)
    for (let i = 0; i < 40; i++) filled.allocate(20_000)
    expect(filled.records.allocated).toBeLessThanOrEqual(filled.most)
    filled.check()
  })
})

test('a record of megabytes makes as much room as it takes', () => {
  const filled = new Filled()
  for (let i = 0; i < 20_000; i++) filled.allocate(2_000)
  for (let round = 0; round < 6; round++) {
    for (let i = 0; i < 2_000; i++) filled.free(i * 7_919)
    filled.allocate(4_000_000)
    expect(filled.records.allocated).toBeLessThanOrEqual(filled.most)
  }
  filled.check()
})

test('large records take no more than they are', () => {
  const records = new Records()
  const handles = Array.from({ length: 50 }, () => records.allocate(100_000))
  expect(records.allocated).toBe(50 * Records.sizeOf(100_000))
  for (const handle of handles) records.free(handle)
  expect(records.allocated).toBe(0)
})
