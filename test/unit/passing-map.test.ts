import fc from 'fast-check'
import { expect, test } from 'vitest'
import { PassingMap } from '../../src/service/passing-map.ts'

const steps = fc.array(
  fc.record({
    key: fc.constantFrom('a', 'b', 'c', '__proto__', ''),
    does: fc.constantFrom('set', 'set', 'delete'),
  }),
  { maxLength: 100 },
)

test('values are found by their keys as in a Map, whichever come, go and are replaced', () => {
  fc.assert(
    fc.property(steps, (taken) => {
      const values = new PassingMap<number>()
      const model = new Map<string, number>()
      for (const [n, { key, does }] of taken.entries()) {
        if (does === 'set') {
          values.set(key, n)
          model.set(key, n)
        } else expect(values.delete(key)).toBe(model.delete(key))
        expect(values.size).toBe(model.size)
        for (const { key } of taken) expect(values.get(key)).toBe(model.get(key))
      }
    }),
  )
})

test('however many values come and go, there are no more places than were needed at a time', () => {
  const values = new PassingMap<number>()
  for (let n = 0; n < 10_000; n++) {
    values.set(`${n}`, n)
    values.delete(`${n - 20}`)
  }
  expect([values.size, values.places]).toEqual([20, 21])
})
