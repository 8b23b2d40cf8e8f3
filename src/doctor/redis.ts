/** What may be wrong with Redis: whether it answers, what it may use, what the user may do, whether a part can fail. */
import { randomUUID } from 'node:crypto'
import { availableParallelism } from 'node:os'
import type { TLSSocket } from 'node:tls'
import { Cluster, Redis } from 'ioredis'
import { type Config, isLoopback } from '../config.ts'
import { dialRedis, slotOf } from '../tiers/redis.ts'
import { redisKey } from '../tiers/redis-format.ts'
import { describeRedis, parseRedisUrl, type RedisTarget } from '../tiers/redis-url.ts'
import {
  checkClock,
  checkExpiry,
  clockAheadMs,
  megabytes,
  reasonOf,
  roundTripMs,
  seconds,
} from './measures.ts'
import type { Report } from './report.ts'

const PATIENCE_MS = 3_000
const OLDEST = [6, 2] as const
const MAXMEMORY_SHARE = 0.7
/** A server may be asked for a little more than the share that is recommended. */
const MAXMEMORY_MOST = 0.8
/** Of less than this, the allocator's own needs make the ratio large. */
const FRAGMENTATION_FROM_BYTES = 64 * 2 ** 20
const FRAGMENTATION = 1.5
const CLIENTS_SHARE = 0.8
const ROUND_TRIP_WARNING_MS = 5
const LAZYFREE = [
  'lazyfree-lazy-eviction',
  'lazyfree-lazy-expire',
  'lazyfree-lazy-server-del',
  'lazyfree-lazy-user-del',
] as const
/** What the service never does and an intruder would like to. */
const DANGEROUS = [
  ['KEYS', 'itemcache-doctor'],
  // Were they ever executed, they would be syntax errors.
  ['FLUSHALL', 'itemcache-doctor'],
  ['FLUSHDB', 'itemcache-doctor'],
  ['CONFIG', 'GET', 'maxmemory'],
] as const
const ACL =
  'Give the service the user of deploy/redis/users.acl, which may do what it needs and nothing else (docs/scaling.md#redis).'

/** Examines the Redis of `REDIS_URL`, every node of a cluster; `instances` is how many instances are to use it. */
export async function examineRedis(report: Report, config: Config, instances: number): Promise<void> {
  if (config.redis.kind === 'off') {
    return report.warning(
      'redis.configured',
      'REDIS_URL=off: instances share no copies, and each loads for itself',
      'Set REDIS_URL where there is more than one instance.',
    )
  }
  if (config.redis.kind === 'embedded') {
    return report.ok('redis.configured', 'a private Redis, which the service starts by itself')
  }
  const target = parseRedisUrl(config.redis.url)
  const where = describeRedis(config.redis.url)
  try {
    await using client = await dialRedis(target, PATIENCE_MS)
    report.ok('redis.connection', `${where} answers`)
    checkWay(report, target)
    const server = client instanceof Cluster ? await anyPrimary(client) : client
    await checkCommands(report, client, server)
    await checkRights(report, server)
    if (client instanceof Cluster) await examineCluster(report, client, server, config, instances)
    else await examineServer(report, client, config, instances)
    if (target.sentinel !== undefined) await checkSentinels(report, target, target.sentinel)
  } catch (error) {
    report.fault('redis.connection', `${where} cannot be used: ${reasonOf(error)}`, mendConnection(error))
  }
}

function mendConnection(error: unknown): string {
  const reason = reasonOf(error)
  if (/NOAUTH|WRONGPASS|AUTH/.test(reason))
    return 'Put the user and the password into REDIS_URL, percent-encoded.'
  if (/certificate|SSL|TLS/i.test(reason))
    return 'Compare rediss:// and ?ca= in REDIS_URL with the certificate of the server.'
  if (/ECONNRESET|socket hang up|closed/i.test(reason))
    return 'Does the server want TLS? Then REDIS_URL begins with rediss://.'
  if (/LOADING/.test(reason)) return 'Wait until it has read its data.'
  return 'Is it running, and do address, firewall and DNS lead there? The service goes on without it, but slower.'
}

function checkWay(report: Report, { nodes, tls, password, path }: RedisTarget): void {
  if (path !== undefined || nodes.every(({ host }) => isLoopback(host))) return
  if (tls === undefined) {
    report.warning(
      'redis.tls',
      'the way to Redis is not encrypted',
      'Use rediss:// and a server with TLS (deploy/redis/redis.conf).',
    )
  }
  if (password === '') report.fault('redis.password', 'nobody has to say who they are', ACL)
}

/** Does what the service does, on a key of its own. */
async function checkCommands(report: Report, client: Redis | Cluster, server: Redis): Promise<void> {
  const isThere = (key: string) =>
    !(client instanceof Cluster) || client.slots[slotOf(key)]?.[0] === addressOf(server)
  let [key, lock] = ['', '']
  do {
    key = redisKey(`doctor-${randomUUID()}`, 'doctor', 'doctor')
    lock = `${key}:lock`
  } while (!isThere(key) || !isThere(lock))
  const steps: readonly (readonly [name: string, step: () => Promise<unknown>])[] = [
    ['store a copy', () => client.storeCopies(1, key, 1, Buffer.from('doctor'), 1_000)],
    ['read a copy', () => client.readCopiesBuffer(1, key)],
    ['take a lock', () => client.takeLock(lock, 'doctor', 1_000)],
    ['renew a lock', () => client.renewLock(lock, 'doctor', 1_000)],
    ['release a lock', () => client.releaseLock(lock, 'doctor', 0, 1_000)],
  ]
  const failed: string[] = []
  for (const [name, step] of steps) {
    await step().catch((error: unknown) => failed.push(`${name} (${reasonOf(error)})`))
  }
  if (failed.length === 0) return report.ok('redis.permissions', 'the user may do all that the service does')
  const isFull = failed.some((text) => text.includes('OOM'))
  report.fault(
    'redis.permissions',
    `the service could not ${failed.join(', ')}`,
    isFull ? 'Set maxmemory-policy allkeys-lru, so that a full Redis makes room.' : ACL,
  )
}

/**
 * Which dangerous commands the user may give. They are queued in a transaction, where rights are checked, and discarded:
 * none is executed.
 */
async function checkRights(report: Report, node: Redis): Promise<void> {
  // A connection that comes back would have lost its transaction.
  const client = node.duplicate({ retryStrategy: () => null, lazyConnect: true, enableOfflineQueue: false })
  client.on('error', () => {})
  try {
    await client.connect()
    const isQueueing = (await client.call('MULTI')) === 'OK' && (await client.call('PING')) === 'QUEUED'
    if (!isQueueing) return report.unknown('redis.acl', 'this server does not say what the user may do')
    const allowed: string[] = []
    for (const [name, ...args] of DANGEROUS) {
      const answer = await client.call(name, ...args).catch(() => 'refused')
      if (answer === 'QUEUED') allowed.push(name)
    }
    await client.call('DISCARD')
    if (allowed.length > 0) report.warning('redis.acl', `the user may also give ${allowed.join(', ')}`, ACL)
    else report.ok('redis.acl', 'the user may not give KEYS, FLUSHALL, FLUSHDB or CONFIG')
  } catch (error) {
    report.unknown('redis.acl', `what the user may do cannot be asked: ${reasonOf(error)}`)
  } finally {
    client.disconnect()
  }
}

/** Whether the sentinels are enough to let a replica take over, as the first of them that answers sees it. */
async function checkSentinels(
  report: Report,
  { nodes, tls }: RedisTarget,
  { name, username, password }: NonNullable<RedisTarget['sentinel']>,
): Promise<void> {
  const text = `found the primary ${name}`
  let failure: unknown
  for (const { host, port } of nodes) {
    const sentinel = new Redis({
      host,
      port,
      ...(username === '' ? {} : { username }),
      ...(password === '' ? {} : { password }),
      ...(tls === undefined ? {} : { tls }),
      connectTimeout: PATIENCE_MS,
      commandTimeout: PATIENCE_MS,
      retryStrategy: () => null,
      enableReadyCheck: false,
      lazyConnect: true,
    })
    sentinel.on('error', (error: unknown) => {
      failure = error
    })
    try {
      await sentinel.connect()
      await sentinel.call('SENTINEL', 'CKQUORUM', name)
      return report.ok('redis.sentinels', `${text}, and can replace it`)
    } catch (error) {
      const reason = reasonOf(error)
      if (reason.startsWith('NOQUORUM')) {
        const mend = `Start the sentinels that are down: redis-cli -p 26379 SENTINEL SENTINELS ${name} lists them.`
        return report.warning('redis.sentinels', `${text}, but could not replace it: ${reason}`, mend)
      }
      // That of a connection is told by an event: here it is only said to be closed.
      if (sentinel.status === 'ready') failure = error
    } finally {
      sentinel.disconnect()
    }
  }
  report.unknown(
    'redis.sentinels',
    `${text}, but no sentinel says whether it can be replaced: ${reasonOf(failure)}`,
  )
}

const addressOf = ({ options: { host, port } }: Redis) => `${host}:${port}`

/** A primary that answers. Rejects with what the last one failed with. */
async function anyPrimary(cluster: Cluster): Promise<Redis> {
  let failure: unknown = new Error('no node of the cluster is a primary')
  for (const node of cluster.nodes('master')) {
    try {
      await node.ping()
      return node
    } catch (error) {
      failure = error
    }
  }
  throw failure
}

async function examineCluster(
  report: Report,
  cluster: Cluster,
  server: Redis,
  config: Config,
  instances: number,
): Promise<void> {
  const info = fieldsOf(String(await server.cluster('INFO')))
  const served = Number(info.get('cluster_slots_ok') ?? 0)
  if (info.get('cluster_state') === 'ok' && served === 16_384) {
    report.ok('redis.cluster', 'all 16,384 slots are served')
  } else {
    report.fault(
      'redis.cluster',
      `${served} of 16,384 slots are served, the cluster's state is ${info.get('cluster_state')}`,
      'See which nodes have failed: redis-cli --cluster check HOST:PORT.',
    )
  }
  const primaries = new Map(
    cluster.slots
      .filter((nodes) => nodes !== undefined && nodes.length > 0)
      .map((nodes) => [nodes[0], nodes]),
  )
  const alone = Array.from(primaries.values(), ([primary, ...replicas]) =>
    replicas.length === 0 ? [primary] : [],
  ).flat()
  if (alone.length > 0) {
    report.warning(
      'redis.replicas',
      `${alone.join(', ')}: no replica could take over`,
      'Give each primary a replica on another machine: redis-cli --cluster add-node … --cluster-slave.',
    )
  } else report.ok('redis.replicas', `each of the ${primaries.size} primaries has a replica`)
  if (primaries.size < 3) {
    report.warning(
      'redis.quorum',
      `${primaries.size} primaries cannot agree that one of them has failed`,
      'Use three or more.',
    )
  }
  for (const address of new Set(cluster.slots.flat())) {
    const own = report.at(address)
    // One that has refused to be connected is not among the nodes any more.
    const node = cluster.nodes('all').find((each) => addressOf(each) === address)
    try {
      if (node === undefined) throw new Error('ECONNREFUSED')
      await examineServer(own, node, config, instances)
    } catch (error) {
      own.fault('redis.connection', `cannot be used: ${reasonOf(error)}`, mendConnection(error))
    }
  }
}

/** One server. Rejects when it does not answer. */
async function examineServer(
  report: Report,
  client: Redis,
  config: Config,
  instances: number,
): Promise<void> {
  const { redisMs } = config.timeouts
  const ms = await roundTripMs(() => client.ping())
  const text = `a round trip takes ${seconds(ms)}`
  if (ms > redisMs / 2) {
    report.fault(
      'redis.round-trip',
      `${text}, and commands are given up after ${seconds(redisMs)}`,
      'Put Redis next to the service, in the same zone.',
    )
  } else if (ms > ROUND_TRIP_WARNING_MS) {
    report.warning(
      'redis.round-trip',
      text,
      'Put Redis next to the service: within a zone it is less than 1 ms.',
    )
  } else report.ok('redis.round-trip', text)

  await client.time().then(
    async () => {
      const ahead = await clockAheadMs(async () => {
        const [secs, micros] = await client.time()
        return Number(secs) * 1_000 + Number(micros) / 1_000
      })
      checkClock(report, 'redis.clock', "Redis's", ahead)
    },
    (error: unknown) =>
      report.unknown('redis.clock', `the user may not ask for the time: ${reasonOf(error)}`),
  )

  const socket = client.stream as TLSSocket | undefined
  if (typeof socket?.getPeerCertificate === 'function') {
    checkExpiry(report, 'redis.certificate', "Redis's", socket.getPeerCertificate().valid_to)
  }

  let info: ReadonlyMap<string, string>
  try {
    info = fieldsOf(await client.info())
  } catch (error) {
    return report.unknown(
      'redis.settings',
      `the user may not give INFO (${reasonOf(error)}): version, memory and clients are not checked`,
      ACL,
    )
  }
  checkVersion(report, info)
  checkMemory(report, info)
  checkClients(report, info, instances)
  await checkSettings(report, client)
}

function checkVersion(report: Report, info: ReadonlyMap<string, string>): void {
  const version = info.get('valkey_version') ?? info.get('redis_version') ?? ''
  const name = info.get('server_name') ?? 'redis'
  const [major = 0, minor = 0] = (info.get('redis_version') ?? '').split('.').map(Number)
  if (major > OLDEST[0] || (major === OLDEST[0] && minor >= OLDEST[1])) {
    report.ok('redis.version', `${name} ${version}`)
  } else {
    report.fault(
      'redis.version',
      `${name} ${version} is too old`,
      'Use Redis 6.2 or newer, Valkey, KeyDB or Dragonfly.',
    )
  }
}

/** By the fields of INFO. */
export function checkMemory(report: Report, info: ReadonlyMap<string, string>): void {
  const numberOf = (name: string) => Number(info.get(name) ?? 0)
  const [max, machine, used] = ['maxmemory', 'total_system_memory', 'used_memory'].map(numberOf) as [
    number,
    number,
    number,
  ]
  const mend = `Set maxmemory to ${MAXMEMORY_SHARE * 100} % of the memory that the machine, or its container, has${machine > 0 ? `: ${megabytes(machine * MAXMEMORY_SHARE)}, if that is all its own` : ''}.`
  if (max === 0) {
    report.fault('redis.maxmemory', 'there is no maxmemory: it grows until the system ends it', mend)
  } else if (machine > 0 && max > machine * MAXMEMORY_MOST) {
    report.fault(
      'redis.maxmemory',
      `maxmemory is ${megabytes(max)} of the machine's ${megabytes(machine)}: no room for buffers, fragments and forks`,
      mend,
    )
  } else report.ok('redis.maxmemory', `maxmemory is ${megabytes(max)}, ${megabytes(used)} are used`)

  const policy = info.get('maxmemory_policy') ?? 'noeviction'
  const lru = 'Set maxmemory-policy allkeys-lru.'
  if (/^allkeys-(lru|lfu)$/.test(policy)) report.ok('redis.maxmemory-policy', policy)
  else if (policy === 'noeviction') {
    report.fault('redis.maxmemory-policy', 'noeviction: a full Redis refuses new copies', lru)
  } else {
    report.warning('redis.maxmemory-policy', `${policy}: copies that are in use go as well as others`, lru)
  }

  const ratio = numberOf('mem_fragmentation_ratio')
  const text = `the process holds ${ratio.toFixed(2)} times of what is used`
  if (used < FRAGMENTATION_FROM_BYTES || ratio === 0) {
    report.ok('redis.fragmentation', `too little is used to tell (${megabytes(used)})`)
  } else if (ratio > FRAGMENTATION) {
    report.warning(
      'redis.fragmentation',
      `${text}: memory is fragmented`,
      'Set activedefrag yes (with jemalloc), or restart it when few are waiting: its copies are loaded again.',
    )
  } else if (ratio < 0.9) {
    report.warning(
      'redis.fragmentation',
      `${text}: a part has been swapped out`,
      'Give it more memory, or a smaller maxmemory, and turn swap off.',
    )
  } else report.ok('redis.fragmentation', text)
}

function checkClients(report: Report, info: ReadonlyMap<string, string>, instances: number): void {
  const most = Number(info.get('maxclients') ?? 0)
  const now = Number(info.get('connected_clients') ?? 0)
  // One for commands; in a cluster, one more for news of its topology.
  const wanted = 2 * instances
  const text = `${now} of at most ${most} clients are connected, and ${instances} instances need another ${wanted}`
  if (most === 0) {
    report.unknown('redis.clients', `${now} clients are connected; the server does not say how many may be`)
  } else if (now + wanted > most * CLIENTS_SHARE) {
    report.fault(
      'redis.clients',
      text,
      'Raise maxclients, and the open files that the system lets it have (LimitNOFILE).',
    )
  } else report.ok('redis.clients', text)
}

async function checkSettings(report: Report, client: Redis): Promise<void> {
  const names = [...LAZYFREE, 'io-threads', 'timeout', 'tcp-keepalive']
  const settings = new Map<string, string>()
  try {
    for (const name of names) {
      const [, value] = (await client.config('GET', name)) as string[]
      if (value !== undefined) settings.set(name, value)
    }
  } catch (error) {
    if (!/NOPERM|unknown command|not allowed/i.test(reasonOf(error))) throw error
    return report.unknown(
      'redis.settings',
      'the user may not give CONFIG, as it should be: lazyfree, io-threads and timeout are not checked',
      'To check them too, run the doctor once with an administrator in REDIS_URL.',
    )
  }
  const eager = LAZYFREE.filter((name) => settings.get(name) === 'no')
  if (eager.length > 0) {
    report.warning(
      'redis.lazyfree',
      `${eager.join(', ')}: memory is freed while callers wait`,
      `Set ${eager.map((name) => `${name} yes`).join(', ')}.`,
    )
  } else report.ok('redis.lazyfree', 'memory is freed in the background')

  const threads = Number(settings.get('io-threads') ?? 1)
  const cores = isHere(client) ? availableParallelism() : 0
  if (threads === 1 && cores >= 4) {
    report.warning(
      'redis.io-threads',
      `one thread does all input and output on a machine of ${cores} cores`,
      `Set io-threads ${Math.min(cores - 1, 8)}.`,
    )
  } else report.ok('redis.io-threads', `${threads}`)

  if (settings.get('timeout') === '0') {
    report.warning(
      'redis.timeout',
      'timeout is 0: connections of clients that have vanished stay',
      'Set timeout 300 and tcp-keepalive 60.',
    )
  } else report.ok('redis.timeout', `idle connections end after ${settings.get('timeout') ?? '?'} s`)
}

function isHere({ options }: Redis): boolean {
  return options.path !== undefined || isLoopback(options.host ?? 'localhost')
}

function fieldsOf(info: string): ReadonlyMap<string, string> {
  return new Map(
    info
      .split('\r\n')
      .map((line) => line.split(':'))
      .filter((parts) => parts.length === 2)
      .map(([name = '', value = '']) => [name, value]),
  )
}
