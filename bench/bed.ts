/**
 * What the measurements stand on: a private PostgreSQL and Redis in a temporary directory, instances of the service
 * as processes of their own (so that their CPU and memory are theirs alone), and a client that decodes only what
 * a measurement needs.
 */
import type { ChildProcess } from 'node:child_process'
import { readFileSync, writeFileSync } from 'node:fs'
import { connect as connectHttp2 } from 'node:http2'
import { cpus } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { parseArgs } from 'node:util'
import { create, type DescMethod, fromBinary, type MessageInitShape, toBinary } from '@bufbuild/protobuf'
import { Client, credentials, Metadata } from '@grpc/grpc-js'
import { Redis } from 'ioredis'
import pg from 'pg'
import { startPostgres } from '../src/embedded/postgres.ts'
import { startRedis } from '../src/embedded/redis.ts'
import { ItemCacheService, type MetricsSnapshot } from '../src/gen/itemcache/v1/item_cache_pb.ts'
import { makeRunDirectory } from '../test/support/run-directory.ts'
import { type Asked, asServer, start } from './control.ts'

const ROOT = join(import.meta.dirname, '..')

export interface Bed extends AsyncDisposable {
  readonly databaseUrl: string
  /** Where PostgreSQL and Redis listen: paths of Unix sockets. */
  readonly databaseSocket: string
  readonly redisSocket: string
  readonly redisUrl: string
  readonly versions: string
  /** A connection to PostgreSQL, closed with the bed. */
  sql(): Promise<pg.Client>
  instance(
    env?: Readonly<Record<string, string>>,
    options?: { readonly core?: number | undefined; readonly execArgv?: readonly string[] },
  ): Promise<Instance>
}

export interface Instance {
  readonly address: string
  readonly pid: number
  metrics(): Promise<MetricsSnapshot>
  /** One sample of /metrics; the sum of all that carry the name and the labels. */
  sample(name: string, labels?: string): Promise<number>
  /** See `Asked`. */
  ask<T>(name: string, argument?: unknown): Promise<T>
  cpuUs(): Promise<number>
  /** Kills it before the bed is disposed. */
  stop(): Promise<void>
  residentMb(): number
  readonly client: Client
  call(
    name: 'getItem' | 'updateItem' | 'invalidateItems',
    request: object,
    tenant: string,
  ): Promise<{ readonly revision: bigint }>
  /** The answer is not decoded. */
  batchGet(ids: readonly string[], tenant: string): Promise<Buffer>
}

export async function startBed(): Promise<Bed> {
  await using started = new AsyncDisposableStack()
  const directory = started.use(makeRunDirectory())
  const cacheDir = join(ROOT, '.itemcache', 'cache')
  const postgres = started.use(await startPostgres({ dataDir: directory.path }))
  directory.ends(postgres.pid, 'SIGQUIT')
  const redis = await startRedis({ dataDir: directory.path, cacheDir, log: progress })
  if ('unavailable' in redis) throw new Error(redis.unavailable)
  started.use(redis)
  directory.ends(redis.pid, 'SIGKILL')
  await keepAll(redis.url)
  const running = started.move()
  const sql = async () => {
    const client = new pg.Client(postgres.url)
    client.on('error', () => {})
    await client.connect()
    running.defer(() => client.end())
    return client
  }
  const instance: Bed['instance'] = async (env = {}, options = {}) => {
    const started = start(
      join(ROOT, 'src', 'main.ts'),
      asServer({
        cwd: directory.path,
        stdout: 'pipe',
        core: options.core,
        execArgv: options.execArgv ?? [],
        env: {
          DATABASE_URL: postgres.url,
          REDIS_URL: redis.url,
          ORIGIN_URL: 'off',
          ITEMCACHE_LISTEN: '127.0.0.1:0',
          ITEMCACHE_ADMIN_LISTEN: '127.0.0.1:0',
          ITEMCACHE_LOG_LEVEL: 'error',
          ...env,
        },
      }),
    )
    running.use(started)
    const { grpc, admin } = await banner(started.child)
    const client = new Client(grpc, credentials.createInsecure())
    running.defer(() => client.close())
    return newInstance(grpc, admin, started, client)
  }
  return {
    databaseUrl: postgres.url,
    databaseSocket: join(new URL(postgres.url).searchParams.get('host') ?? '', '.s.PGSQL.5432'),
    redisSocket: redis.url.replace(/^unix:/, ''),
    redisUrl: redis.url,
    versions: `node ${process.version}, PostgreSQL ${postgres.version}, ${redis.version}, ${cpus().length} cores of ${cpus()[0]?.model ?? '?'}`,
    sql,
    instance,
    [Symbol.asyncDispose]: () => running.disposeAsync(),
  }
}

/** Redis holds whatever is put there, and makes no copy of itself on disk meanwhile: by itself it evicts at 256 MB. */
async function keepAll(url: string): Promise<void> {
  const redis = new Redis({ path: url.replace(/^unix:/, '') })
  await redis.config('SET', 'maxmemory', '0', 'save', '')
  await redis.quit()
}

async function banner(child: ChildProcess): Promise<{ grpc: string; admin: string }> {
  if (child.stdout === null) throw new Error('the service has no output')
  for await (const line of createInterface(child.stdout)) {
    if (line.startsWith('{"ready"')) return JSON.parse(line)
  }
  throw new Error('the service ended before it was ready')
}

function newInstance(address: string, admin: string, started: Asked, client: Client): Instance {
  const { pid } = started
  const call: Instance['call'] = (name, request, tenant) => unary(client, name, request, tenant)
  return {
    address,
    pid,
    client,
    call,
    batchGet: (ids, tenant) => send(client, 'batchGetItems', { ids }, tenant),
    async metrics() {
      const { snapshot } = (await unary(client, 'getMetrics', {}, 'default')) as unknown as {
        snapshot: MetricsSnapshot
      }
      return snapshot
    },
    async sample(name, labels = '') {
      const text = await (await fetch(`http://${admin}/metrics`)).text()
      let sum = 0
      for (const line of text.split('\n')) {
        if (!line.startsWith(name) || !/[ {]/.test(line[name.length] ?? '') || !line.includes(labels))
          continue
        sum += Number(line.slice(line.lastIndexOf(' ')))
      }
      return sum
    },
    ask: started.ask,
    cpuUs: started.cpuUs,
    stop: async () => started[Symbol.asyncDispose](),
    residentMb() {
      return Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1]) / 1024
    },
  }
}

function metadataOf(tenant: string): Metadata {
  const metadata = new Metadata()
  metadata.set('x-tenant-id', tenant)
  return metadata
}

async function unary(
  client: Client,
  name: keyof typeof ItemCacheService.method,
  request: object,
  tenant: string,
) {
  const { output } = ItemCacheService.method[name] as DescMethod
  const bytes = await send(client, name, request, tenant)
  return fromBinary(output, bytes) as unknown as { revision: bigint }
}

function send(
  client: Client,
  name: keyof typeof ItemCacheService.method,
  request: object,
  tenant: string,
): Promise<Buffer> {
  const { input, name: rpc } = ItemCacheService.method[name] as DescMethod
  const { promise, resolve, reject } = Promise.withResolvers<Buffer>()
  client.makeUnaryRequest(
    `/${ItemCacheService.typeName}/${rpc}`,
    (bytes: Buffer) => bytes,
    (bytes: Buffer) => bytes,
    Buffer.from(toBinary(input, create(input, request as MessageInitShape<typeof input>))),
    metadataOf(tenant),
    { deadline: Date.now() + 30_000 },
    (error, bytes) => (error === null && bytes !== undefined ? resolve(bytes) : reject(error)),
  )
  return promise
}

/** Streams at the level of HTTP/2, on one connection: nothing is decoded, and nothing is read unless asked for. */
export interface RawStreams {
  /** Opens one more stream. Without `onMessage` nothing is ever read of it. */
  open(request: MessageInitShape<typeof watchInput>, onMessage?: (message: Buffer) => void): void
  close(): void
}

const { input: watchInput, name: watchName } = ItemCacheService.method.watchInvalidations

/** Streams of WatchInvalidations, or of another method that takes the same request, or does not look at it. */
export function rawStreams(
  address: string,
  tenant: string,
  path = `/${ItemCacheService.typeName}/${watchName}`,
): RawStreams {
  const session = connectHttp2(`http://${address}`)
  session.on('error', () => {})
  return {
    open(request, onMessage) {
      const message = toBinary(watchInput, create(watchInput, request))
      const prefix = Buffer.alloc(5)
      prefix.writeUInt32BE(message.byteLength, 1)
      const stream = session.request({
        ':method': 'POST',
        ':path': path,
        'content-type': 'application/grpc',
        te: 'trailers',
        'x-tenant-id': tenant,
      })
      stream.on('error', () => {})
      stream.end(Buffer.concat([prefix, message]))
      if (onMessage === undefined) return
      let rest: Buffer = Buffer.alloc(0)
      stream.on('data', (chunk: Buffer) => {
        rest = rest.byteLength === 0 ? chunk : Buffer.concat([rest, chunk])
        while (rest.byteLength >= 5 && rest.byteLength >= 5 + rest.readUInt32BE(1)) {
          const end = 5 + rest.readUInt32BE(1)
          onMessage(rest.subarray(5, end))
          rest = rest.subarray(end)
        }
      })
    },
    close: () => session.destroy(),
  }
}

export async function fill(client: pg.Client, tenant: string, items: number): Promise<void> {
  await client.query(
    `INSERT INTO items (tenant, id, title, category)
      SELECT $1, 'k' || n, 'Item number ' || n, 'c' || n % 50 FROM generate_series(1, $2::integer) AS n`,
    [tenant, items],
  )
}

/** Items whose encoded form takes about so many bytes: a catalogue's fields, and a description that fills up the rest. */
export async function fillItems(
  client: pg.Client,
  tenant: string,
  items: number,
  bytes: number,
): Promise<void> {
  // What the fields besides the description take, with an id of five bytes.
  const REST = 172
  await client.query(
    `INSERT INTO items (tenant, id, title, category, image_uri, price_currency, price_units, price_nanos, rating_rate,
        rating_count, tags, description)
      SELECT $1, 'k' || n, 'Stoneware bowl, size ' || n % 100, 'kitchen-' || n % 50,
        'https://catalogue.example/images/' || n % 1000 || '.svg', 'EUR', 1 + n % 300, 500000000, 4.5, 1 + n % 900,
        ARRAY['new'], left(repeat('Glazed by hand in small batches, safe in ovens. ', 1 + $3::integer / 40), $3::integer)
      FROM generate_series(1, $2::integer) AS n`,
    [tenant, items, bytes - REST],
  )
}

export const round = (value: number, digits = 1): number => Number(value.toFixed(digits))

export function progress(line: string): void {
  process.stderr.write(`${line}\n`)
}

/** The table for people, and the same as JSON: on the last line, and in the file that `--json` names. */
export function report(name: string, bed: Bed, rows: readonly Record<string, string | number>[]): void {
  console.log(`\n${name}: ${bed.versions}`)
  console.table(rows)
  const json = JSON.stringify({ name, machine: bed.versions, rows })
  console.log(json)
  const { json: file } = options()
  if (file !== undefined) writeFileSync(file, `${json}\n`)
}

/** `--seconds N`, `--json FILE`, and for one of the measurements `--stuck N` and `--rows N`. */
export function options(): {
  readonly seconds?: number
  readonly stuck?: number
  readonly rows?: number
  readonly count?: number
  readonly json?: string
} {
  const text = { type: 'string' } as const
  const { values } = parseArgs({
    options: { seconds: text, stuck: text, rows: text, count: text, json: text },
  })
  const { seconds, stuck, rows, count, json } = values
  return {
    ...(seconds !== undefined && { seconds: Number(seconds) }),
    ...(stuck !== undefined && { stuck: Number(stuck) }),
    ...(rows !== undefined && { rows: Number(rows) }),
    ...(count !== undefined && { count: Number(count) }),
    ...(json !== undefined && { json }),
  }
}
