import fc from 'fast-check'
import { expect, test } from 'vitest'
import { RateLimit } from '../../src/rpc/rate-limit.ts'

function limitAt(clock: { ms: number }, perSecond: number, burst: number, maxTenants = 100) {
  const limit = new RateLimit({ perSecond, burst, maxTenants, now: () => clock.ms })
  const take = (tenant: string): number | undefined => {
    try {
      limit.take(tenant)
      return undefined
    } catch (error) {
      return (error as { retryAfterMs?: number }).retryAfterMs
    }
  }
  return { limit, take }
}

test('a tenant may call in a burst, and then at its rate', () => {
  const clock = { ms: 0 }
  const { take } = limitAt(clock, 10, 3)
  expect([take('t'), take('t'), take('t')]).toEqual([undefined, undefined, undefined])
  expect(take('t')).toBe(100)
  clock.ms += 99
  expect(take('t')).toBe(1)
  clock.ms += 1
  expect(take('t')).toBeUndefined()
  expect(take('t')).toBe(100)
  expect(take('other')).toBeUndefined()
})

test('whoever waits as long as it was told may call', () => {
  fc.assert(
    fc.property(fc.integer({ min: 1, max: 5_000 }), fc.integer({ min: 1, max: 50 }), (perSecond, burst) => {
      const clock = { ms: 0 }
      const { take } = limitAt(clock, perSecond, burst)
      for (let i = 0; i < 200; i++) {
        const waitMs = take('t')
        if (waitMs === undefined) continue
        clock.ms += waitMs
        expect(take('t')).toBeUndefined()
      }
    }),
  )
})

test('in no time does a tenant get more calls through than the rate and one burst', () => {
  const pauses = fc.array(fc.nat(400), { maxLength: 200 })
  fc.assert(
    fc.property(
      fc.integer({ min: 1, max: 100 }),
      fc.integer({ min: 1, max: 20 }),
      pauses,
      (perSecond, burst, all) => {
        const clock = { ms: 0 }
        const { take } = limitAt(clock, perSecond, burst)
        let taken = 0
        for (const ms of all) {
          clock.ms += ms
          while (take('t') === undefined) taken += 1
          expect(taken).toBeLessThanOrEqual(burst + (clock.ms * perSecond) / 1000 + 1e-6)
        }
      },
    ),
  )
})

test('the buckets are bounded', () => {
  const { limit, take } = limitAt({ ms: 0 }, 1, 1, 3)
  for (let i = 0; i < 100; i++) take(`${i}`)
  expect(limit.tenants).toBe(3)
})
