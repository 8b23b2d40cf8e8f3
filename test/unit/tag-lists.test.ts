import { expect, test } from 'vitest'
import { TagLists } from '../../src/tiers/tag-lists.ts'

test('who has the same tags in the same order shares one list, and nobody else does', () => {
  const lists = new TagLists()
  const first = lists.join(['a', 'b'])
  expect(lists.join(['a', 'b'])).toBe(first)
  const others = [['b', 'a'], ['a,b'], ['a1:b'], ['a'], ['a', 'b', ''], ['1:a', 'b'], ['\ud800']]
  const numbers = others.map((tags) => lists.join(tags))
  expect(new Set([first, ...numbers]).size).toBe(others.length + 1)
  expect(lists.of(first)).toEqual(['a', 'b'])
  expect(numbers.map((number) => lists.of(number))).toEqual(others)
})

test('a list is held until the last one has left, and nothing is held for no tags', () => {
  const lists = new TagLists()
  const [one, two] = [lists.join(['a']), lists.join(['a'])]
  const none = lists.join([])
  expect(lists.size).toBe(1)
  lists.leave(one)
  expect(lists.of(two)).toEqual(['a'])
  lists.leave(two)
  lists.leave(none)
  expect(lists.size).toBe(0)
  expect(() => lists.leave(one)).toThrow('nobody has')
  expect(lists.of(lists.join([]))).toEqual([])
  // The number is free again.
  expect(lists.of(lists.join(['b']))).toEqual(['b'])
})
