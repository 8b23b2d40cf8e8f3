import { expect, test } from 'vitest'
import { ItemCacheError } from '../../src/errors.ts'
import { RecentFailures } from '../../src/service/failures.ts'

const down = new ItemCacheError('unavailable', 'the catalogue did not give a usable answer', {
  reason: 'ORIGIN_TIMEOUT',
  id: '1',
})

function failuresAt(clock: { ms: number }, options = {}) {
  return new RecentFailures({ ttlMs: 1_000, jitter: 0, now: () => clock.ms, random: () => 0.5, ...options })
}

test('a failure comes again for as long as it is remembered, with the time that is left', () => {
  const clock = { ms: 0 }
  const failures = failuresAt(clock)
  failures.remember('t', 'a', down)
  clock.ms = 400
  expect(failures.recent('t', 'a')).toMatchObject({
    code: 'unavailable',
    reason: 'ORIGIN_TIMEOUT',
    id: '1',
    retryAfterMs: 600,
    cause: down,
  })
  expect(failures.recent('t', 'b')).toBeUndefined()
  expect(failures.recent('u', 'a')).toBeUndefined()
  clock.ms = 1_000
  expect(failures.recent('t', 'a')).toBeUndefined()
  expect(failures.size).toBe(0)
})

test('chance shortens the time, so that not all try again at once', () => {
  const clock = { ms: 0 }
  const failures = failuresAt(clock, { jitter: 0.2 })
  failures.remember('t', 'a', down)
  clock.ms = 899
  expect(failures.recent('t', 'a')).toBeDefined()
  clock.ms = 900
  expect(failures.recent('t', 'a')).toBeUndefined()
})

test('a caller who goes away, a full queue and a bug are no failures of the origin', () => {
  const failures = failuresAt({ ms: 0 })
  for (const code of ['cancelled', 'timeout', 'exhausted', 'internal'] as const) {
    failures.remember('t', 'a', new ItemCacheError(code, 'no'))
  }
  failures.remember('t', 'a', new Error('no'))
  expect(failures.recent('t', 'a')).toBeUndefined()
  const off = failuresAt({ ms: 0 }, { ttlMs: 0 })
  off.remember('t', 'a', down)
  expect(off.size).toBe(0)
})

test('of 10,000 failures the one that was asked for least recently makes room for one more', () => {
  const failures = failuresAt({ ms: 0 })
  for (let n = 0; n < 10_000; n++) failures.remember('t', `${n}`, down)
  expect(failures.recent('t', '0')).toBeDefined()
  failures.remember('t', '10000', down)
  expect(failures.size).toBe(10_000)
  expect(failures.recent('t', '0')).toBeDefined()
  expect(failures.recent('t', '1')).toBeUndefined()
  expect(failures.recent('t', '10000')).toBeDefined()
})
