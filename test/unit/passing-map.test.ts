import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
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
      let most = 0
      for (const [n, { key, does }] of taken.entries()) {
        if (does === 'set') {
          values.set(key, n)
          model.set(key, n)
        } else expect(values.delete(key)).toBe(model.delete(key))
        most = Math.max(most, model.size)
        expect([values.size, values.places]).toEqual([model.size, most])
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

test('values that were deleted or replaced are let go', async () => {
  setFlagsFromString('--expose-gc')
  const gc: () => void = runInNewContext('gc')
  const values = new PassingMap<object>()
  const set = (key: string): WeakRef<object> => {
    const value = { key }
    values.set(key, value)
    return new WeakRef(value)
  }
  const [deleted, replaced, held] = ['deleted', 'replaced', 'held'].map(set)
  values.delete('deleted')
  values.set('replaced', {})
  // A weak reference holds its target until the job that made it is over.
  await new Promise(setImmediate)
  gc()
  expect([deleted?.deref(), replaced?.deref()]).toEqual([undefined, undefined])
  expect(held?.deref()).toBe(values.get('held'))
})
