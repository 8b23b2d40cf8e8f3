/**
 * What an item takes in memory, Redis and PostgreSQL, and what a call costs the process: the figures behind
 * docs/runbook.md#capacity.
 *
 *   node bench/capacity.ts [--items 20000]
 */
import { readFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { Redis } from 'ioredis'
import { startPostgres } from '../src/embedded/postgres.ts'
import { Tier } from '../src/gen/itemcache/v1/item_cache_pb.ts'
import { Caller, isFailed } from '../test/consistency/client.ts'
import { connectSql, Instance } from '../test/consistency/servers.ts'
import { ownRedis, ownServer } from '../test/support/own-server.ts'
import { makeRunDirectory } from '../test/support/run-directory.ts'

const { values } = parseArgs({ options: { items: { type: 'string', default: '20000' } } })
const ITEMS = Number(values.items)
const TENANT = 'capacity'
const BATCH = 100
const ROOT = join(import.meta.dirname, '..')
const metadata = { 'x-tenant-id': TENANT }
const options = { metadata, timeoutMs: 60_000 }

/** Of the length that the texts of an item have: those of the bundled catalogue, and long ones. */
const KINDS = [
  { name: 'catalogue', description: 110 },
  { name: 'long', description: 2_000 },
] as const

interface Row {
  readonly kind: string
  readonly encoded: number
  readonly memory: number
  readonly redis: number
  readonly postgres: number
  readonly log: number
}

await using started = new AsyncDisposableStack()
const directory = started.use(makeRunDirectory())
const cacheDir = resolve(ROOT, '.itemcache/cache')
const database = started.use(
  await ownServer((dataDir) => startPostgres({ dataDir, cacheDir: join(directory.path, 'cache') })),
)
const redisServer = started.use(await ownRedis(cacheDir))
const redis = new Redis(redisServer.url.replace('unix:', ''))
started.defer(() => redis.disconnect())
await using sql = await connectSql(database.url)
await sql.query('ALTER SYSTEM SET fsync = off')
await sql.query('SELECT pg_reload_conf()')

async function startInstance(env: Readonly<Record<string, string>> = {}): Promise<Instance> {
  const instance = new Instance(
    'service',
    ROOT,
    {
      DATABASE_URL: database.url,
      REDIS_URL: redisServer.url,
      ORIGIN_URL: 'off',
      ITEMCACHE_LISTEN: '127.0.0.1:0',
      ITEMCACHE_ADMIN_LISTEN: '127.0.0.1:0',
      ITEMCACHE_PROBE_ONE_IN: '0',
      // What others do on this machine is not what is measured.
      ITEMCACHE_REDIS_TIMEOUT: '5s',
      ITEMCACHE_REDIS_SLOW: '5s',
      ...env,
    },
    join(directory.path, 'service.log'),
  )
  await instance.start()
  directory.ends(instance.pid, 'SIGKILL')
  return instance
}

async function metricOf({ admin }: Instance, series: string): Promise<number> {
  const text = await (await fetch(`http://${admin}/metrics`)).text()
  const line = text.split('\n').find((each) => each.startsWith(series))
  if (line === undefined) throw new Error(`there is no ${series}`)
  return Number(line.split(' ').at(-1))
}

const idOf = (kind: string, index: number) => `${kind}-${index}`

async function redisBytes(): Promise<number> {
  return Number(/used_memory:(\d+)/.exec(await redis.info('memory'))?.[1])
}

async function relationBytes(...names: readonly string[]): Promise<number> {
  const { rows } = await sql.query(
    'SELECT sum(pg_total_relation_size(name::regclass))::float8 AS bytes FROM unnest($1::text[]) AS name',
    [names],
  )
  return rows[0].bytes
}

/** Calls with so many ids each, one after the other on 16 loops; resolves with the process's CPU time of a call, in µs. */
async function cpuOf(
  instance: Instance,
  ids: readonly string[],
  size: number,
  calls: number,
): Promise<number> {
  const caller = new Caller(instance.address)
  let next = 0
  const loop = async (until: number) => {
    while (next < until) {
      const at = (next++ * size) % ids.length
      const wanted = ids.slice(at, at + size)
      const answer =
        size === 1
          ? await caller.call('getItem', { id: wanted[0] ?? '' }, options)
          : await caller.call('batchGetItems', { ids: [...wanted] }, options)
      if (isFailed(answer)) throw new Error(answer.text)
    }
  }
  const run = (until: number) => Promise.all(Array.from({ length: 16 }, () => loop(until)))
  const before = cpuMs(instance.pid)
  await run(calls)
  const spent = cpuMs(instance.pid) - before
  caller.close()
  return (spent * 1_000) / calls
}

/** User and system time of a process, of whose ticks there are a hundred a second. */
function cpuMs(pid: number): number {
  const fields = readFileSync(`/proc/${pid}/stat`, 'utf8').split(') ')[1]?.split(' ') ?? []
  return (Number(fields[11]) + Number(fields[12])) * 10
}

const rows: Row[] = []
await using first = await startInstance({
  ITEMCACHE_MEMORY_MAX_BYTES: '1GiB',
  ITEMCACHE_MEMORY_MAX_ENTRIES: '1000000',
})
for (const { name, description } of KINDS) {
  const beforeItems = await relationBytes('items', 'item_tags')
  const beforeLog = await relationBytes('invalidations')
  await sql.query(
    `INSERT INTO items (tenant, id, title, description, category, image_uri, price_currency, price_units, price_nanos,
        rating_rate, rating_count, tags)
      SELECT $1, $2 || '-' || i, 'Brass desk lamp with dimmer ' || i, left(texts.text, $3), 'lighting',
        'https://catalogue.example/images/' || i || '.svg', 'USD', 64, 500000000, 4.4, 182, ARRAY['sale', 'new']
      FROM generate_series(0, $4::int - 1) AS i,
        -- Texts that are all different, and compress as poorly as such digits do.
        LATERAL (SELECT string_agg(md5(i || ' ' || n), ' ') AS text FROM generate_series(1, 1 + $3 / 32) AS n) AS texts`,
    [TENANT, name, description, ITEMS],
  )
  // A row of the log for each thousand; what one takes is seen with writes of one item each.
  const items = (await relationBytes('items', 'item_tags')) - beforeItems
  for (let i = 0; i < 1_000; i++) {
    await sql.query(`UPDATE items SET title = title || '.' WHERE tenant = $1 AND id = $2`, [
      TENANT,
      idOf(name, i),
    ])
  }
  const log = (await relationBytes('invalidations')) - beforeLog
  const before = {
    redis: await redisBytes(),
    memory: await metricOf(first, 'itemcache_tier_bytes{tier="memory"}'),
  }
  const ids = Array.from({ length: ITEMS }, (_, index) => idOf(name, index))
  await cpuOf(first, ids, BATCH, ITEMS / BATCH)
  await sleep(500)
  const inspected = new Caller(first.address)
  const answer = await inspected.call('inspectItem', { id: idOf(name, ITEMS - 1) }, options)
  inspected.close()
  const encoded = isFailed(answer)
    ? Number.NaN
    : Number(answer.tiers.find(({ tier }) => tier === Tier.REDIS)?.sizeBytes)
  rows.push({
    kind: name,
    encoded,
    memory: ((await metricOf(first, 'itemcache_tier_bytes{tier="memory"}')) - before.memory) / ITEMS,
    redis: ((await redisBytes()) - before.redis) / ITEMS,
    postgres: items / ITEMS,
    log: log / 1_000,
  })
}
const round = Math.round
console.log(
  '| item | value in Redis | memory | Redis | PostgreSQL | log, a write |\n|---|---|---|---|---|---|',
)
for (const { kind, encoded, memory, redis: inRedis, postgres, log } of rows) {
  console.log(
    `| ${kind} | ${encoded} | ${round(memory)} | ${round(inRedis)} | ${round(postgres)} | ${round(log)} |`,
  )
}

const ids = Array.from({ length: 5_000 }, (_, index) => idOf('catalogue', index))
const costs: [string, number][] = []
await cpuOf(first, ids, 1, 10_000)
costs.push(['GetItem, from memory', await cpuOf(first, ids, 1, 10_000)])
costs.push([`BatchGetItems of ${BATCH}, from memory`, await cpuOf(first, ids, BATCH, 2_000)])
await using second = await startInstance({ ITEMCACHE_MEMORY: 'off' })
await cpuOf(second, ids, 1, 10_000)
costs.push(['GetItem, from Redis', await cpuOf(second, ids, 1, 10_000)])
await using third = await startInstance({ ITEMCACHE_MEMORY: 'off', REDIS_URL: 'off' })
await cpuOf(third, ids, 1, 5_000)
costs.push(['GetItem, from PostgreSQL', await cpuOf(third, ids, 1, 5_000)])
console.log('\n| call | CPU, µs |\n|---|---|')
for (const [what, cost] of costs) console.log(`| ${what} | ${round(cost)} |`)
