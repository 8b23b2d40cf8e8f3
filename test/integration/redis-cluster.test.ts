import { setTimeout as sleep } from 'node:timers/promises'
import { Command } from 'ioredis'
import { afterAll, beforeAll, expect, inject, test } from 'vitest'
import { RedisTier } from '../../src/tiers/redis.ts'
import { redisKey } from '../../src/tiers/redis-format.ts'
import type { Copy } from '../../src/tiers/tier.ts'
import { type ClusterNode, SLOTS, startCluster } from '../support/redis-cluster.ts'
import { makeRunDirectory } from '../support/run-directory.ts'

function now(): number {
  return performance.now()
}

function copyOf(id: string, asOf = 1): Copy {
  const bytes = new TextEncoder().encode(`item ${id}`)
  return { id, asOf, bytes, revision: asOf, tags: [], verifiedAtMs: now(), freshUntilMs: now() + 60_000 }
}

function slotOf(id: string): number {
  return new Command('get', [redisKey('test', 't', id)]).getSlot()
}

async function until(condition: () => Promise<boolean>): Promise<void> {
  while (!(await condition())) await sleep(20)
}

const cleanup = new AsyncDisposableStack()
let nodes: readonly ClusterNode[]
let tier: RedisTier

beforeAll(async () => {
  const directory = cleanup.use(makeRunDirectory())
  const cluster = cleanup.use(await startCluster({ directory, cacheDir: inject('redisCache') }))
  nodes = cluster.nodes
  const { url } = cluster
  tier = cleanup.use(new RedisTier({ url, prefix: 'test', now, random: () => 0.5, commandTimeoutMs: 20_000 }))
  expect(await tier.settled()).toBe('ready')
})

afterAll(() => cleanup.disposeAsync())

test('a batch is spread over all nodes of a cluster and read in pipelines of one node each', async () => {
  const copies = Array.from({ length: 500 }, (_, index) => copyOf(`many-${index}`))
  await tier.store('t', copies)
  // Connections to the nodes are made at their first use, so that only now all of them stand.
  const before = { ...tier.counters }
  const answer = await tier.read(
    't',
    copies.map(({ id }) => id),
  )
  expect(answer.copies.size).toBe(500)
  expect(answer.copies.get('many-7')?.bytes).toEqual(copies[7]?.bytes)
  // 25 ids in each, and up to one pipeline for each node that is not full.
  expect(tier.counters.roundTrips - before.roundTrips).toBeLessThanOrEqual(500 / 25 + 3)
  for (const { client } of nodes) expect(await client.dbsize()).toBeGreaterThan(100)
  expect(tier.counters).toMatchObject({ errors: before.errors, timeouts: 0, corrupt: 0, misses: 0 })
})

test('every primary of a cluster says how many connections it has and allows', async () => {
  const servers = await tier.servers()
  expect(servers.map(({ node }) => node).sort()).toEqual(nodes.map(({ port }) => `127.0.0.1:${port}`).sort())
  for (const { connectedClients, maxClients, usedBytes } of servers) {
    expect(connectedClients).toBeGreaterThan(0)
    expect(maxClients).toBeGreaterThan(100)
    expect(usedBytes).toBeGreaterThan(100_000)
  }
})

test('locks work in a cluster, whatever nodes they are on', async () => {
  const claims = Array.from({ length: 100 }, (_, index) => ({ id: `locked-${index}`, token: 'mine' }))
  expect(new Set((await tier.acquire('t', claims)).values())).toEqual(new Set(['ours']))
  const others = claims.map(({ id }) => ({ id, token: 'yours' }))
  for (const state of (await tier.acquire('t', others)).values()) expect(state).toBeTypeOf('number')
  await tier.renew('t', claims)
  await Promise.all(claims.map((claim) => tier.release('t', claim, 0)))
  expect(new Set((await tier.acquire('t', others)).values())).toEqual(new Set(['handed-on']))
})

test('an older copy replaces no newer one in a cluster either', async () => {
  await tier.store('t', [copyOf('order', 5)])
  await tier.store('t', [copyOf('order', 4)])
  expect((await tier.read('t', ['order'])).copies.get('order')?.asOf).toBe(5)
})

test('items whose slot moves to another node are found before, during and after the move', async () => {
  const [from, to] = nodes
  if (from === undefined || to === undefined) throw new Error('no nodes')
  const all = Array.from({ length: 60 }, (_, index) => `move-${index}`)
  const moving = all.find((id) => slotOf(id) < 5_000) ?? ''
  const slot = slotOf(moving)
  await tier.store(
    't',
    all.map((id) => copyOf(id)),
  )

  await to.client.cluster('SETSLOT', slot, 'IMPORTING', from.id)
  await from.client.cluster('SETSLOT', slot, 'MIGRATING', to.id)
  await from.client.migrate('127.0.0.1', to.port, redisKey('test', 't', moving), 0, 1_000)
  expect((await tier.read('t', all)).copies.size).toBe(60)
  await tier.store('t', [copyOf(moving, 2)])
  expect((await tier.read('t', [moving])).copies.get(moving)?.asOf).toBe(2)

  for (const { client } of [to, from, ...nodes]) await client.cluster('SETSLOT', slot, 'NODE', to.id)
  await tier.store(
    't',
    all.map((id) => copyOf(id, 3)),
  )
  const moved = await tier.read('t', all)
  expect([...moved.copies.values()].map(({ asOf }) => asOf)).toEqual(all.map(() => 3))
})

test('a node that dies costs quick misses for its items only, until it is back', async () => {
  const ids = Array.from({ length: 60 }, (_, index) => `node-${index}`)
  await tier.store(
    't',
    ids.map((id) => copyOf(id)),
  )
  const lost = nodes[2]
  const kept = ids.filter((id) => slotOf(id) < (SLOTS * 2) / 3 - 1)
  await lost?.kill()
  for (let times = 0; times < 20; times += 1) {
    const startMs = now()
    const answer = await tier.read('t', ids)
    expect([...answer.copies.keys()].sort()).toEqual(kept.toSorted())
    expect(answer.skipped).toBeUndefined()
    expect(now() - startMs).toBeLessThan(10_000)
  }
  expect(
    await tier.read(
      't',
      ids.filter((id) => !kept.includes(id)),
    ),
  ).toMatchObject({ skipped: 'down' })
  await lost?.restart()
  await until(async () => {
    await tier.store(
      't',
      ids.map((id) => copyOf(id)),
    )
    return (await tier.read('t', ids)).copies.size === 60
  })
}, 180_000)

test('a cluster that is gone altogether is a miss, and is found again', async () => {
  await Promise.all(nodes.map((node) => node.kill()))
  await until(async () => (await tier.read('t', ['1'])).skipped === 'down' && tier.state === 'down')
  const startMs = now()
  expect(await tier.read('t', ['1'])).toEqual({ copies: new Map(), skipped: 'down' })
  expect(now() - startMs).toBeLessThan(5_000)
  await Promise.all(nodes.map((node) => node.restart()))
  await until(async () => {
    await tier.store('t', [copyOf('1')])
    return (await tier.read('t', ['1'])).copies.size === 1
  })
}, 180_000)
