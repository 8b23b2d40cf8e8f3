import { join } from 'node:path'
import { afterAll, beforeAll, expect, inject, test } from 'vitest'
import { Tier } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { Instance } from '../consistency/servers.ts'
import { type Cluster, startCluster } from '../support/redis-cluster.ts'
import type { RedisProcess } from '../support/redis-process.ts'
import { startSentinels } from '../support/redis-sentinels.ts'
import { makeRunDirectory, type RunDirectory } from '../support/run-directory.ts'
import { freshDatabase } from '../support/servers.ts'
import { breakerOf, Load, metricOf } from './failover.ts'

const ROOT = join(import.meta.dirname, '../..')

const held = new AsyncDisposableStack()
let directory: RunDirectory

beforeAll(() => {
  directory = held.use(makeRunDirectory())
})
afterAll(() => held.disposeAsync())

function cluster(name: string, nodeTimeoutMs: number): Promise<Cluster> {
  return startCluster({ directory, name, cacheDir: inject('redisCache'), replicas: 1, nodeTimeoutMs })
}

/** Instances that hold few copies themselves, so that Redis is asked all the time. */
async function startInstance(name: string, databaseUrl: string, redisUrl: string): Promise<Instance> {
  const env = {
    DATABASE_URL: databaseUrl,
    REDIS_URL: redisUrl,
    ORIGIN_URL: 'off',
    ITEMCACHE_LISTEN: '127.0.0.1:0',
    ITEMCACHE_ADMIN_LISTEN: '127.0.0.1:0',
    ITEMCACHE_LOG_LEVEL: 'info',
    ITEMCACHE_MEMORY_MAX_ENTRIES: '10',
    // What a busy machine takes is no failure of Redis, and no reason for a stale answer.
    ITEMCACHE_REDIS_TIMEOUT: '2s',
    ITEMCACHE_REDIS_SLOW: '2s',
    ITEMCACHE_SOFT_TIMEOUT: '10s',
    ITEMCACHE_POSTGRES_CONNECT_TIMEOUT: '10s',
    ITEMCACHE_POSTGRES_STATEMENT_TIMEOUT: '10s',
  }
  const instance = new Instance(name, ROOT, env, join(directory.path, `${name}.log`))
  await instance.start()
  directory.ends(instance.pid, 'SIGKILL')
  return instance
}

async function roleOf({ client }: RedisProcess): Promise<string> {
  const info = await client.info('replication').catch(() => '')
  return /role:(\w+)/.exec(info)?.[1] ?? 'unknown'
}

test('a cluster that loses a primary under load: no read fails, none is stale, and the tier is used again', {
  timeout: 180_000,
}, async () => {
  await using started = new AsyncDisposableStack()
  const redis = started.use(await cluster('loaded', 3_000))
  const database = started.use(await freshDatabase())
  const instances = await Promise.all(
    ['one', 'two'].map(async (name) => started.use(await startInstance(name, database.url, redis.url))),
  )
  const load = started.use(
    await Load.start({
      addresses: instances.map(({ address }) => address),
      name: 'loaded',
      items: 100,
      readers: 12,
      writers: 2,
      pauseMs: 15,
    }),
  )
  const [lost] = redis.primaries
  const [heir] = redis.replicas[0] ?? []
  if (lost === undefined || heir === undefined) throw new Error('there is no cluster')
  const ofTheLost = load.heldBy(await lost.client.keys('ic:*'))
  expect(ofTheLost.size).toBeGreaterThan(10)
  await expect.poll(() => load.count(ofTheLost), { message: 'Redis answers' }).toBeGreaterThan(50)

  // Nobody takes over until this test lets it.
  heir.signal('SIGSTOP')
  await lost.kill()
  // One primary is left alone; the metrics and /readyz say so.
  const states = () => Promise.all(instances.map(({ admin }) => breakerOf(admin)))
  await expect.poll(states, { interval: 50 }).toContain('OPEN')
  const open = /^itemcache_tier_breaker_state\{(?=.*redis)(?=.*"(half_)?open")/
  await expect
    .poll(() => Promise.all(instances.map(({ admin }) => metricOf(admin, open))), { interval: 50 })
    .toContain(1)
  // What the other primaries hold is answered by them all the time: two thirds of what is read.
  const before = { kept: load.count(ofTheLost, true), reads: load.reads }
  await expect.poll(() => load.reads - before.reads, { message: 'reads go on' }).toBeGreaterThan(300)
  const share = (load.count(ofTheLost, true) - before.kept) / (load.reads - before.reads)
  expect(share).toBeGreaterThan(0.3)
  expect(load.wrong).toEqual([])

  heir.signal('SIGCONT')
  await expect.poll(() => roleOf(heir), { message: 'the replica takes over' }).toBe('master')
  const promoted = load.count(ofTheLost)
  await expect
    .poll(() => load.count(ofTheLost) - promoted, { message: 'the new primary answers' })
    .toBeGreaterThan(50)
  await expect.poll(states, { message: 'all breakers are closed' }).toEqual(['CLOSED', 'CLOSED'])
  expect(load.wrong).toEqual([])

  await lost.restart()
  await redis.settled()
  await expect.poll(() => roleOf(lost), { message: 'the old primary follows' }).toBe('slave')
  expect(load.wrong).toEqual([])
})

test('writes that a failover of Redis loses make no answer stale: the old copies are refused', {
  timeout: 180_000,
}, async () => {
  await using started = new AsyncDisposableStack()
  const redis = started.use(await cluster('quiet', 15_000))
  const database = started.use(await freshDatabase())
  const one = started.use(await startInstance('three', database.url, redis.url))
  // Nobody but the test writes and reads here.
  const load = started.use(
    await Load.start({
      addresses: [one.address],
      name: 'quiet',
      items: 60,
      readers: 0,
      writers: 0,
      pauseMs: 10,
    }),
  )
  const [, primary] = redis.primaries
  const [replica] = redis.replicas[1] ?? []
  if (primary === undefined || replica === undefined) throw new Error('there is no cluster')
  const ids = [...load.heldBy(await primary.client.keys('ic:*'))]
  expect(ids.length).toBeGreaterThan(5)
  // Whatever was stored has arrived at the replica, and nothing does from now on.
  await expect.poll(async () => load.heldBy(await replica.client.keys('ic:*')).size).toBe(ids.length)
  await replica.client.config('SET', 'masteruser', 'nobody')
  await replica.client.config('SET', 'masterauth', 'nothing')
  await replica.client.call('CLIENT', 'KILL', 'TYPE', 'master')
  await expect.poll(() => replica.client.info('replication')).toContain('master_link_status:down')
  for (const id of ids) await load.write(id, 0)

  await primary.kill()
  // It need not wait until the others agree that the primary has failed.
  await replica.client.call('CLUSTER', 'FAILOVER', 'TAKEOVER')
  await expect.poll(() => roleOf(replica)).toBe('master')
  const refused = () => metricOf(one.admin, /^itemcache_redis_copies_refused/)
  const refusedBefore = await refused()
  // One who has seen the writes, and one who starts now and has not.
  const late = started.use(await startInstance('four', database.url, redis.url))
  const later = started.use(
    await Load.start({
      addresses: [late.address],
      name: 'late',
      items: 0,
      readers: 0,
      writers: 0,
      pauseMs: 10,
    }),
  )
  const others = load.ids.filter((id) => !ids.includes(id))
  const tiers: (Tier | undefined)[] = []
  await expect
    .poll(async () => {
      // The memory of this instance holds ten copies, which are these from now on.
      for (const id of others) await load.read(id, 0)
      for (const id of ids) tiers.push(await load.read(id, 0))
      return (await refused()) - refusedBefore
    })
    .toBeGreaterThan(0)
  expect(tiers).toContain(Tier.POSTGRES)
  expect(load.wrong).toEqual([])
  for (const id of ids) expect(await later.versionOf(id)).toBe(2)
  expect(load.wrong).toEqual([])
})

test('sentinels that find another primary under load: no read fails, none is stale, and the tier is used again', {
  timeout: 180_000,
}, async () => {
  await using started = new AsyncDisposableStack()
  const sentinels = started.use(
    await startSentinels({ directory, name: 'watched', cacheDir: inject('redisCache') }),
  )
  const database = started.use(await freshDatabase())
  const instance = started.use(await startInstance('five', database.url, sentinels.url))
  const load = started.use(
    await Load.start({
      addresses: [instance.address],
      name: 'watched',
      items: 60,
      readers: 6,
      writers: 1,
      pauseMs: 15,
    }),
  )
  const answered = () => load.count(new Set(), true)
  await expect.poll(answered, { message: 'Redis answers' }).toBeGreaterThan(50)

  await sentinels.primary.kill()
  await expect
    .poll(() => roleOf(sentinels.replica), { message: 'the replica takes over', timeout: 40_000 })
    .toBe('master')
  const before = answered()
  await expect.poll(answered, { message: 'the new primary answers' }).toBeGreaterThan(before + 50)
  await expect.poll(() => breakerOf(instance.admin)).toBe('CLOSED')
  expect(load.wrong).toEqual([])
})
