/** A Redis Cluster on loopback: primaries, each with so many replicas. */
import { setTimeout as sleep } from 'node:timers/promises'
import { type RedisProcess, startRedisProcess } from './redis-process.ts'
import type { RunDirectory } from './run-directory.ts'

export const SLOTS = 16_384

export interface ClusterNode extends RedisProcess {
  /** What the cluster calls it. */
  readonly id: string
}

export interface Cluster extends AsyncDisposable {
  /** Primary `i` has the i-th part of the slots, until there is a failover. */
  readonly primaries: readonly ClusterNode[]
  /** Those of primary `i`. */
  readonly replicas: readonly (readonly ClusterNode[])[]
  readonly nodes: readonly ClusterNode[]
  /** As `REDIS_URL` takes it. */
  readonly url: string
  /** Resolves when every node that answers sees all slots served. */
  settled(): Promise<void>
}

export interface ClusterOptions {
  readonly directory: RunDirectory
  /** Of what is in `directory`. */
  readonly name?: string
  readonly cacheDir: string
  readonly primaries?: number
  /** Of each primary. */
  readonly replicas?: number
  /** After how long a node that does not answer is given up. */
  readonly nodeTimeoutMs?: number
  /** More settings of every node. */
  readonly settings?: readonly string[]
}

export async function startCluster({
  directory,
  name: ofCluster = 'cluster',
  cacheDir,
  primaries: count = 3,
  replicas: each = 0,
  nodeTimeoutMs = 5_000,
  settings = [],
}: ClusterOptions): Promise<Cluster> {
  await using started = new AsyncDisposableStack()
  const startNode = async (name: string): Promise<ClusterNode> => {
    const node = started.use(
      await startRedisProcess({
        directory,
        name,
        cacheDir,
        args: (port) => [
          ...['--port', `${port}`, '--bind', '127.0.0.1', '--save', '', '--appendonly', 'no'],
          ...['--cluster-enabled', 'yes', '--cluster-config-file', 'nodes.conf'],
          // While a part of the slots is not served, the others must be.
          ...['--cluster-node-timeout', `${nodeTimeoutMs}`, '--cluster-require-full-coverage', 'no'],
          // However long a replica has been cut off, it may take over.
          ...['--cluster-replica-validity-factor', '0', '--repl-diskless-sync-delay', '0'],
          ...settings,
        ],
      }),
    )
    return Object.assign(node, { id: String(await node.client.cluster('MYID')) })
  }
  const nodes = await Promise.all(
    Array.from({ length: count * (1 + each) }, (_, index) => startNode(`${ofCluster}-${index}`)),
  )
  const primaries = nodes.slice(0, count)
  const [first] = primaries
  if (first === undefined) throw new Error('a cluster needs a primary')
  for (const [index, { client }] of primaries.entries()) {
    const [from, to] = [index, index + 1].map((part) => Math.ceil((SLOTS * part) / count)) as [number, number]
    await client.cluster(
      'ADDSLOTS',
      Array.from({ length: to - from }, (_, offset) => from + offset),
    )
    await client.call('CLUSTER', 'SET-CONFIG-EPOCH', index + 1)
  }
  for (const { client } of nodes.slice(1)) await client.cluster('MEET', '127.0.0.1', first.port)
  const replicas = primaries.map((_, index) => nodes.slice(count + index * each, count + (index + 1) * each))
  for (const [index, own] of replicas.entries()) {
    // A node knows those it has not met when they have told each other.
    for (const { client } of own) {
      while ((await client.cluster('REPLICATE', primaries[index]?.id ?? '').catch(() => '')) !== 'OK') {
        await sleep(20)
      }
    }
  }
  const settled = async () => {
    for (const { client } of nodes) {
      for (;;) {
        const info = String(
          await client.cluster('INFO').catch(() => 'cluster_state:ok cluster_slots_ok:16384'),
        )
        if (info.includes('cluster_state:ok') && info.includes(`cluster_slots_ok:${SLOTS}`)) break
        await sleep(20)
      }
    }
  }
  await settled()
  for (const { client } of replicas.flat()) {
    while (!String(await client.info('replication')).includes('master_link_status:up')) await sleep(20)
  }
  const running = started.move()
  return {
    primaries,
    replicas,
    nodes,
    url: nodes.map(({ port }) => `redis://127.0.0.1:${port}`).join(','),
    settled,
    [Symbol.asyncDispose]: () => running.disposeAsync(),
  }
}
