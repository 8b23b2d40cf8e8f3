/** For tests that expect a copy to be served as current. */
import { vi } from 'vitest'

/**
 * Runs the scenario from its beginning until it holds, for 50 s at most. An instance that a busy machine has kept from
 * hearing of the log for 1.5 s may vouch for no copy, so that a hit becomes a miss: now and then, while a service that is
 * wrong is wrong every time. A scenario must not find what the one before it has left: it uses a tenant or ids of its own.
 */
export function unlessStalled<T>(scenario: () => Promise<T>): Promise<T> {
  return vi.waitFor(scenario, { timeout: 50_000, interval: 50 })
}
