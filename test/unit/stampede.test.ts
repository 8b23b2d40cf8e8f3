/** How long one instance waits for another that loads, to the millisecond of a clock that the test moves. */
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest'
import { Flight } from '../../src/service/flights.ts'
import { Stampede, type Waiting } from '../../src/service/stampede.ts'
import type { LoadLocks, LockState } from '../../src/tiers/tier.ts'

const TTL_MS = 2_000
const TENANT = 'tenant'

beforeEach(() => {
  vi.useFakeTimers({ now: 1_000_000 })
})
afterEach(() => {
  vi.useRealTimers()
})

/** Locks that last as those in Redis do. Each command takes `tripMs` there, and as long back. */
class Locks implements LoadLocks {
  readonly #held = new Map<string, { token: string; endsAt: number }>()
  readonly #tripMs: number

  constructor(tripMs = 0) {
    this.#tripMs = tripMs
  }

  async acquire(_: string, claims: Parameters<LoadLocks['acquire']>[1]) {
    await trip(this.#tripMs)
    const states = new Map<string, LockState>()
    for (const { id, token } of claims) {
      const lock = this.#held.get(id)
      const isHeld = lock !== undefined && lock.endsAt > Date.now() && lock.token !== token
      if (!isHeld) this.#held.set(id, { token, endsAt: Date.now() + TTL_MS })
      states.set(id, isHeld ? lock.endsAt - Date.now() : 'ours')
    }
    await trip(this.#tripMs)
    return states
  }

  async renew(_: string, claims: Parameters<LoadLocks['renew']>[1]) {
    for (const { id, token } of claims) {
      const lock = this.#held.get(id)
      if (lock?.token === token && lock.endsAt > Date.now()) lock.endsAt = Date.now() + TTL_MS
    }
  }

  async release(_: string, { id, token }: Parameters<LoadLocks['release']>[1]) {
    if (this.#held.get(id)?.token === token) this.#held.delete(id)
  }
}

async function trip(ms: number): Promise<void> {
  if (ms > 0) await new Promise((resolve) => setTimeout(resolve, ms))
}

interface Circumstances {
  readonly random?: number
  readonly copyThere?: () => boolean
  readonly loadMs?: number
}

/** An instance that wants `a`, and what comes of it. */
function instance(
  locks: LoadLocks,
  { random = 0.5, copyThere = () => false, loadMs = 0 }: Circumstances = {},
) {
  const stampede = new Stampede({ locks, ttlMs: TTL_MS, openMs: 0, random: () => random })
  const flight = new Flight('a', {}, () => {})
  const seen: { loadsAt?: number; foundAt?: number } = {}
  const land = () =>
    flight.land({
      copy: { id: 'a', asOf: 1, bytes: undefined, revision: 1, verifiedAtMs: 0, freshUntilMs: 0, tags: [] },
      tier: 'postgres',
      sentAt: 0,
      skipped: [],
    })
  const waiting: Waiting = {
    look: async (flights) => {
      if (!copyThere()) return flights
      seen.foundAt = Date.now()
      land()
      return []
    },
    hurries: () => false,
  }
  const done = stampede.guard(TENANT, [flight], waiting, async () => {
    seen.loadsAt = Date.now()
    await trip(loadMs)
    land()
  })
  return { seen, done }
}

/** Somebody takes the lock of `a`, and is never heard of again. */
async function die(locks: LoadLocks): Promise<void> {
  await locks.acquire(TENANT, [{ id: 'a', token: 'the dead' }])
}

describe('one who waits for an instance that has died', () => {
  // With these the pauses between two looks are shortest, middling and longest.
  const draws = [0, 0.5, 1 - 1e-9]
  const arrivals = Array.from({ length: 50 }, (_, i) => (i * TTL_MS) / 50)

  test.each(draws)('loads within a millisecond of the end of its lock (%d)', async (random) => {
    for (const afterMs of arrivals) {
      const locks = new Locks()
      await die(locks)
      const endsAt = Date.now() + TTL_MS
      await vi.advanceTimersByTimeAsync(afterMs)
      const { seen, done } = instance(locks, { random })
      await vi.advanceTimersByTimeAsync(endsAt - 1 - Date.now())
      expect(seen.loadsAt).toBeUndefined()
      await vi.advanceTimersByTimeAsync(2)
      expect(seen.loadsAt).toBeOneOf([endsAt, endsAt + 1])
      await done
    }
  })

  test.each(draws)('loads within 100 ms of it when Redis takes 40 ms for an answer (%d)', async (random) => {
    for (const afterMs of arrivals) {
      const locks = new Locks(20)
      const dying = die(locks)
      await vi.advanceTimersByTimeAsync(20)
      const endsAt = Date.now() + TTL_MS
      await vi.advanceTimersByTimeAsync(20)
      await dying
      await vi.advanceTimersByTimeAsync(afterMs)
      const { seen, done } = instance(locks, { random })
      await vi.advanceTimersByTimeAsync(endsAt + 100 - Date.now())
      expect(seen.loadsAt).toBeGreaterThanOrEqual(endsAt)
      expect(seen.loadsAt).toBeLessThan(endsAt + 100)
      await done
    }
  })

  test('is one alone: the others wait for the copy that it brings', async () => {
    const locks = new Locks()
    await die(locks)
    const endsAt = Date.now() + TTL_MS
    let isThere = false
    const all = draws.map((random) => instance(locks, { random, copyThere: () => isThere, loadMs: 500 }))
    await vi.advanceTimersByTimeAsync(TTL_MS + 1)
    const loading = all.filter(({ seen }) => seen.loadsAt !== undefined)
    expect(loading.map(({ seen }) => seen.loadsAt)).toEqual([expect.toBeOneOf([endsAt, endsAt + 1])])
    await vi.advanceTimersByTimeAsync(400)
    isThere = true
    // The longest pause there is.
    await vi.advanceTimersByTimeAsync(60)
    const found = all.filter(({ seen }) => seen.foundAt !== undefined)
    expect(found).toHaveLength(all.length - 1)
    expect(all.filter(({ seen }) => seen.loadsAt !== undefined)).toEqual(loading)
    await vi.advanceTimersByTimeAsync(100)
    await Promise.all(all.map(({ done }) => done))
  })
})

test('an instance that lives keeps its lock for as long as its load takes', async () => {
  const locks = new Locks()
  const holder = instance(locks, { loadMs: 10 * TTL_MS })
  await vi.advanceTimersByTimeAsync(0)
  expect(holder.seen.loadsAt).toBeDefined()
  const other = instance(locks)
  await vi.advanceTimersByTimeAsync(10 * TTL_MS - 1)
  expect(other.seen.loadsAt).toBeUndefined()
  // It has found no copy: its turn comes when the lock is given up, after one pause.
  await vi.advanceTimersByTimeAsync(61)
  expect(other.seen.loadsAt).toBeDefined()
  await vi.advanceTimersByTimeAsync(0)
  await Promise.all([holder.done, other.done])
})
