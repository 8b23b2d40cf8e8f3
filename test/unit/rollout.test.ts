import fc from 'fast-check'
import { expect, test } from 'vitest'
import { isInShare } from '../../src/service/rollout.ts'

const name = fc.string({ minLength: 1, maxLength: 20 })

test('a key that is in a share is in every larger one, in that of 100 and not in that of 0', () => {
  fc.assert(
    fc.property(name, name, fc.nat(100), fc.nat(100), (tenant, id, one, other) => {
      const [small, large] = [Math.min(one, other), Math.max(one, other)]
      if (isInShare(tenant, id, small)) expect(isInShare(tenant, id, large)).toBe(true)
      expect(isInShare(tenant, id, 0)).toBe(false)
      expect(isInShare(tenant, id, 100)).toBe(true)
    }),
  )
})

test('shares are as large as they say, also of ids that are numbers', () => {
  for (const percent of [1, 10, 50, 90]) {
    let inside = 0
    for (let id = 1; id <= 20_000; id++) if (isInShare('default', `${id}`, percent)) inside++
    expect(inside / 200).toBeGreaterThan(percent - 1.5)
    expect(inside / 200).toBeLessThan(percent + 1.5)
  }
})

test('the choice never changes, so that all instances and versions agree', () => {
  const chosen = Array.from({ length: 20 }, (_, id) => (isInShare('default', `${id + 1}`, 50) ? 1 : 0))
  expect(chosen.join('')).toMatchInlineSnapshot(`"00100101001001000110"`)
})
