/**
 * One load among all instances: whoever has the key's lock in Redis loads, the others wait until its copy arrives there.
 *
 * The lock only saves work. What an instance may answer is decided by the rule alone, so that a lock which is lost, held
 * twice, or held by the dead changes how much is loaded and nothing else:
 *
 * - A holder renews its lock while it loads. One that has crashed or is stopped does not, so that its lock ends by itself.
 * - Who waits looks for the copy every few milliseconds, and asks for the lock again when it is not there.
 * - While Redis does not answer nobody waits: each instance loads for itself.
 * - A holder that failed leaves its lock open for a moment, so that others do not queue up to fail one after the other.
 * - A lock is asked for by token. Whose reply was lost and who asks again finds its own token, and has the lock.
 */

import { ItemCacheError } from '../errors.ts'
import type { LoadLocks } from '../tiers/tier.ts'
import type { Flight } from './flights.ts'
import { walk } from './walk.ts'

export interface StampedeOptions {
  readonly locks: LoadLocks
  /** After how long a lock ends that is not renewed, in milliseconds. */
  readonly ttlMs: number
  /** How long a lock stays open after its holder failed, in milliseconds. */
  readonly openMs: number
  /** Uniform in [0, 1). */
  readonly random: () => number
}

/** What a waiting flight looks out for. */
export interface Waiting {
  /** Lands the flights whose copies have arrived in Redis, and returns the others; `undefined`: Redis does not answer. */
  readonly look: (flights: readonly Flight[]) => Promise<readonly Flight[] | undefined>
  /** Whether a flight loads without the lock rather than waiting on. */
  readonly hurries: (flight: Flight) => boolean
}

type LoadTurn = (flights: readonly Flight[], first: boolean) => Promise<void>

/** Pauses between two looks: about this long at first, then growing. Each varies by half either way. */
const FIRST_PAUSE_MS = 10
const MAX_PAUSE_MS = 40

export class Stampede {
  readonly #options: StampedeOptions

  constructor(options: StampedeOptions) {
    this.#options = options
  }

  /**
   * Calls `load` with the flights whose turn it is, each once, until all have landed or failed. `first`: nobody else has
   * had their locks lately. `load` ends when its flights are over; when it throws they fail.
   */
  async guard(tenant: string, flights: readonly Flight[], waiting: Waiting, load: LoadTurn): Promise<void> {
    const loads: Promise<void>[] = []
    const start = (ready: readonly Flight[], first = false) => {
      if (ready.length > 0) loads.push(this.#hold(tenant, ready, first, load))
    }
    let left: readonly Flight[] = flights
    let hasWaited = false
    for (let pauseMs = FIRST_PAUSE_MS; left.length > 0; pauseMs = Math.min(1.5 * pauseMs, MAX_PAUSE_MS)) {
      const asking = walk('redis.lock', left, left.length)
      const states = await this.#options.locks.acquire(tenant, left)
      asking?.[Symbol.dispose]()
      const held: Flight[] = []
      const first: Flight[] = []
      const ready: Flight[] = []
      let endsInMs = Number.POSITIVE_INFINITY
      for (const flight of left) {
        const state = states.get(flight.id) ?? 'free'
        if (state === 'ours' && !hasWaited) first.push(flight)
        else if (typeof state !== 'number') ready.push(flight)
        else if (!flight.isOver) {
          held.push(flight)
          flight.trace?.event('waiting')
          endsInMs = Math.min(endsInMs, state)
        }
      }
      start(first, true)
      start(ready)
      if (held.length === 0) break
      hasWaited = true
      if (!held.some(waiting.hurries)) {
        await pause(Math.min(pauseMs * (0.5 + this.#options.random()), endsInMs + 1), held)
      }
      const going = held.filter((flight) => !flight.isOver)
      const patient = going.filter((flight) => !waiting.hurries(flight))
      start(going.filter(waiting.hurries))
      if (patient.length === 0) break
      const found = await waiting.look(patient)
      if (found === undefined) start(patient)
      left = found ?? []
    }
    await Promise.all(loads)
  }

  /** Loads, and keeps the locks until each flight is over and what it brought is in Redis. */
  async #hold(tenant: string, flights: readonly Flight[], first: boolean, load: LoadTurn): Promise<void> {
    const { locks, ttlMs, openMs } = this.#options
    const releases = flights.map(async (flight) => {
      const failed = await flight.result.promise.then(() => false, isUnavailable)
      await flight.stored
      await locks.release(tenant, flight, failed ? openMs : 0)
    })
    const renewal = setInterval(() => {
      const going = flights.filter((flight) => !flight.isOver)
      if (going.length > 0) void locks.renew(tenant, going)
    }, ttlMs / 3)
    renewal.unref()
    try {
      await load(
        flights.filter((flight) => !flight.isOver),
        first,
      )
    } catch (error) {
      for (const flight of flights) flight.fail(error)
    } finally {
      clearInterval(renewal)
    }
    await Promise.all(releases)
  }
}

function isUnavailable(error: unknown): boolean {
  return error instanceof ItemCacheError && error.code === 'unavailable'
}

/** Ends early when one of the flights is over or gets its first reader. */
async function pause(ms: number, flights: readonly Flight[]): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>()
  const timer = setTimeout(resolve, ms)
  for (const flight of flights) flight.wake = resolve
  await promise
  clearTimeout(timer)
  for (const flight of flights) flight.wake = undefined
}
