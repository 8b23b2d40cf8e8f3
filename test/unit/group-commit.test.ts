import { expect, test } from 'vitest'
import { GroupCommit } from '../../src/service/group-commit.ts'

interface Write {
  readonly id: string
  readonly requestId: string
}

/** A group commit whose commits last until they are told to end, and what each of them held. */
function started() {
  const commits: { tenant: string; ids: readonly string[]; end: () => void }[] = []
  const group = new GroupCommit<Write>((tenant, writes) => {
    const { promise, resolve } = Promise.withResolvers<void>()
    commits.push({ tenant, ids: writes.map(({ id }) => id), end: resolve })
    return promise
  })
  const add = (tenant: string, ...ids: readonly string[]) => {
    for (const id of ids) group.add(tenant, { id, requestId: '' })
  }
  const turn = () => new Promise<void>((resolve) => setImmediate(resolve))
  const end = async (at: number) => {
    commits[at]?.end()
    await turn()
  }
  return { group, commits, add, turn, end, held: () => commits.map(({ ids }) => ids.join(' ')) }
}

test('writes of one tick are committed together, and those that come meanwhile in the next commit', async () => {
  const { add, turn, end, held } = started()
  add('t', 'a', 'b')
  await turn()
  add('t', 'c')
  await turn()
  add('t', 'd')
  expect(held()).toEqual(['a b'])
  await end(0)
  expect(held()).toEqual(['a b', 'c d'])
})

test('nobody waits for writes of another tenant', async () => {
  const { commits, add, turn } = started()
  add('t', 'a')
  add('u', 'a')
  await turn()
  expect(commits.map(({ tenant }) => tenant)).toEqual(['t', 'u'])
})

test('a commit holds one write of an item and one of a request id; the next one builds on it', async () => {
  const { group, add, turn, end, held } = started()
  add('t', 'a', 'a', 'b', 'a')
  group.add('t', { id: 'c', requestId: 'r' })
  group.add('t', { id: 'd', requestId: 'r' })
  await turn()
  await end(0)
  await end(1)
  await end(2)
  expect(held()).toEqual(['a b c', 'a d', 'a'])
})

test('a commit holds 100 writes at most, in the order in which they came', async () => {
  const { group, add, turn, end, held } = started()
  const ids = Array.from({ length: 130 }, (_, n) => `${n}`)
  add('t', ...ids)
  expect(group.waiting('t')).toBe(130)
  await turn()
  expect(group.waiting('t')).toBe(30)
  await end(0)
  expect(held()).toEqual([ids.slice(0, 100).join(' '), ids.slice(100).join(' ')])
})

test('whoever comes after all is done begins anew', async () => {
  const { group, add, turn, end, held } = started()
  add('t', 'a')
  await turn()
  await end(0)
  expect(group.waiting('t')).toBe(0)
  add('t', 'a')
  await turn()
  expect(held()).toEqual(['a', 'a'])
})
