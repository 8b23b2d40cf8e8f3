/**
 * `npm run failover -- --minutes 3`: three instances, 48 readers and 4 writers on a Redis Cluster of three primaries with a
 * replica each, of which a primary is killed every 15 s; it comes back as a replica 5 s later. Exits with 1 when a call
 * failed, or an answer lacked a write that had been acknowledged.
 */
import { join, resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { startPostgres } from '../../src/embedded/postgres.ts'
import { Instance } from '../consistency/servers.ts'
import { ownServer } from '../support/own-server.ts'
import { type ClusterNode, startCluster } from '../support/redis-cluster.ts'
import { makeRunDirectory } from '../support/run-directory.ts'
import { breakerOf, Load } from './failover.ts'

const { values } = parseArgs({ options: { minutes: { type: 'string', default: '3' } } })
const ROOT = join(import.meta.dirname, '../..')
const EVERY_MS = 15_000
const AWAY_MS = 5_000

await using started = new AsyncDisposableStack()
const directory = started.use(makeRunDirectory())
const database = started.use(
  await ownServer((dataDir) => startPostgres({ dataDir, cacheDir: join(directory.path, 'cache') })),
)
const cluster = started.use(
  await startCluster({ directory, cacheDir: resolve(ROOT, '.itemcache/cache'), replicas: 1 }),
)
const instances = await Promise.all(
  ['one', 'two', 'three'].map(async (name) => {
    const env = {
      DATABASE_URL: database.url,
      REDIS_URL: cluster.url,
      ORIGIN_URL: 'off',
      ITEMCACHE_LISTEN: '127.0.0.1:0',
      ITEMCACHE_ADMIN_LISTEN: '127.0.0.1:0',
      ITEMCACHE_MEMORY_MAX_ENTRIES: '100',
    }
    const instance = started.use(new Instance(name, ROOT, env, join(directory.path, `${name}.log`)))
    await instance.start()
    directory.ends(instance.pid, 'SIGKILL')
    return instance
  }),
)
const load = await Load.start({
  addresses: instances.map(({ address }) => address),
  name: 'item',
  items: 1_000,
  readers: 48,
  writers: 4,
  pauseMs: 100,
})

let [kills, worstMs] = [0, 0]
const endMs = performance.now() + Number(values.minutes) * 60_000
while (performance.now() < endMs) {
  const primary = await anyPrimary()
  const held = load.heldBy(await primary.client.keys('ic:*'))
  await primary.kill()
  kills += 1
  const killedMs = performance.now()
  // Answers that were on their way.
  await sleep(100)
  const before = load.count(held)
  // Its items come out of Redis again, wherever they are now.
  while (load.count(held) === before && performance.now() - killedMs < EVERY_MS) await sleep(20)
  worstMs = Math.max(worstMs, performance.now() - killedMs)
  await sleep(Math.max(0, AWAY_MS - (performance.now() - killedMs)))
  await primary.restart()
  await cluster.settled()
  await sleep(Math.max(0, EVERY_MS - (performance.now() - killedMs)))
  const states = await Promise.all(instances.map(({ admin }) => breakerOf(admin)))
  console.log(
    `${kills} primaries killed: ${load.reads} reads, ${load.count(new Set(), true)} of them out of Redis, ` +
      `${load.marked} marked stale, ${load.writes} writes; wrong: ${load.wrong.length}; breakers ${states.join(', ')}`,
  )
}
await load[Symbol.asyncDispose]()
for (const text of load.wrong.slice(0, 20)) console.log(text)
console.log(
  `${kills} failovers, ${load.reads} reads (${load.failedReads.length} failed, ${load.stale.length} stale, ` +
    `${load.marked} marked stale), ${load.writes} writes (${load.failedWrites.length} failed); ` +
    `items of the lost primary came out of Redis again after ${(worstMs / 1000).toFixed(1)} s at most`,
)
process.exitCode = load.wrong.length === 0 ? 0 : 1

/** One that has slots and a replica that can take over. */
async function anyPrimary(): Promise<ClusterNode> {
  for (;;) {
    for (const node of cluster.nodes.toSorted(() => Math.random() - 0.5)) {
      const info = await node.client.info('replication').catch(() => '')
      if (info.includes('role:master') && info.includes('state=online')) return node
    }
    await sleep(100)
  }
}
