import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest'
import { Turns } from '../../src/service/turns.ts'

const PATIENCE_MS = 1_000
const forever = new AbortController().signal

beforeEach(() => void vi.useFakeTimers())
afterEach(() => void vi.useRealTimers())

/** Pieces of work that run until they are told to end, and which of them have begun. */
function bench(most: number) {
  const turns = new Turns({ most, patienceMs: PATIENCE_MS })
  const begun: string[] = []
  const ends = new Map<string, PromiseWithResolvers<void>>()
  const start = (name: string, signal = forever) => {
    const end = Promise.withResolvers<void>()
    ends.set(name, end)
    const work = async () => {
      begun.push(name)
      await end.promise
    }
    return turns.take(name.slice(0, 1), signal, work)
  }
  const settled = () => vi.advanceTimersByTimeAsync(0)
  return {
    begun,
    start,
    settled,
    end: async (name: string) => {
      ends.get(name)?.resolve()
      await settled()
    },
    fail: async (name: string) => {
      ends.get(name)?.reject(new Error(name))
      await settled()
    },
  }
}

describe('what is large', () => {
  test('begins at once while there is little of it', async () => {
    const { begun, start } = bench(2)
    void start('a1')
    void start('a2')
    expect(begun).toEqual(['a1', 'a2'])
  })

  test('waits for the end of others, one tenant after the other, however much each wants', async () => {
    const { begun, start, end } = bench(1)
    for (const name of ['a1', 'a2', 'a3', 'b1', 'c1', 'c2']) void start(name)
    for (const name of ['a1', 'a2', 'b1', 'c1', 'a3', 'c2']) {
      expect(begun.at(-1)).toBe(name)
      await end(name)
    }
    expect(begun).toEqual(['a1', 'a2', 'b1', 'c1', 'a3', 'c2'])
  })

  test('goes on after a failure, which is that of one alone', async () => {
    const { begun, start, fail } = bench(1)
    const first = start('a1').catch((error: Error) => error.message)
    void start('b1')
    await fail('a1')
    expect(await first).toBe('a1')
    expect(begun).toEqual(['a1', 'b1'])
  })

  test('is not begun for a caller who has left, whose place the next one gets', async () => {
    const { begun, start, end } = bench(1)
    void start('a1')
    const leaver = new AbortController()
    const left = start('b1', leaver.signal).catch((error: Error) => error.message)
    void start('c1')
    leaver.abort(new Error('gone'))
    expect(await left).toBe('gone')
    await end('a1')
    expect(begun).toEqual(['a1', 'c1'])
    expect(await start('b2', leaver.signal).catch((error: Error) => error.message)).toBe('gone')
  })

  test('waits a second at most', async () => {
    const { begun, start, end } = bench(1)
    void start('a1')
    void start('b1')
    await vi.advanceTimersByTimeAsync(PATIENCE_MS)
    expect(begun).toEqual(['a1', 'b1'])
    // Nobody more before there are as few again.
    void start('c1')
    await end('a1')
    expect(begun).toEqual(['a1', 'b1'])
    await end('b1')
    expect(begun).toEqual(['a1', 'b1', 'c1'])
    await end('c1')
    void start('d1')
    expect(begun.at(-1)).toBe('d1')
  })
})
