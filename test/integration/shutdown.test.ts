/** How the service ends, as a process of its own: what it still does, what it cuts off, and what it leaves behind. */
import { existsSync, mkdirSync, readdirSync, readFileSync, symlinkSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fromBinary } from '@bufbuild/protobuf'
import { type ServiceError, status } from '@grpc/grpc-js'
import { Client as Sql } from 'pg'
import { describe, expect, inject, test } from 'vitest'
import { startCatalogue } from '../../src/embedded/catalogue.ts'
import { findProcess } from '../../src/embedded/processes.ts'
import {
  HealthCheckResponseSchema,
  HealthCheckResponse_ServingStatus as Serving,
} from '../../src/gen/health/v1/health_pb.ts'
import type { WatchInvalidationsResponse } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { CallerConnection } from '../support/http2-calls.ts'
import { type Ended, type ServiceProcess, startProcess } from '../support/process.ts'
import { makeRunDirectory } from '../support/run-directory.ts'
import { freshDatabase, redisUrl } from '../support/servers.ts'
import { failureOf, TestClient } from '../support/service.ts'

const PATIENT = { timeout: 20_000 }
/** What hangs in these tests hangs for longer than a busy machine takes to see it hang. */
const HANGING = {
  ITEMCACHE_POSTGRES_STATEMENT_TIMEOUT: '150s',
  ITEMCACHE_ORIGIN_TIMEOUT: '90s',
  ITEMCACHE_MAX_DEADLINE: '3m',
}
const TENANT = { metadata: { 'x-tenant-id': 'acme' } }

/** A catalogue that answers nobody until `open` resolves. */
async function closedCatalogue(open: Promise<void>) {
  let asked = 0
  const passed = new WeakSet<object>()
  const catalogue = await startCatalogue({
    intercept: (request, response) => {
      if (passed.has(request)) return false
      asked++
      void open.then(() => {
        response.writeHead(200, { 'content-type': 'application/json' })
        const id = Number(request.url?.split('/').at(-1))
        response.end(JSON.stringify({ id, title: `Product ${id}`, price: 1 }))
      })
      return true
    },
  })
  return { url: catalogue.url, asked: () => asked, [Symbol.asyncDispose]: catalogue[Symbol.asyncDispose] }
}

async function connectSql(url: string) {
  const sql = new Sql({ connectionString: url })
  sql.on('error', () => {})
  await sql.connect()
  return Object.assign(sql, { [Symbol.asyncDispose]: () => sql.end().catch(() => {}) })
}

/** Holds a row until `letGo`. */
async function lockItem(url: string, id: string) {
  const sql = await connectSql(url)
  await sql.query('BEGIN')
  await sql.query(`SELECT FROM items WHERE tenant = 'acme' AND id = $1 FOR UPDATE`, [id])
  return { letGo: () => sql.query('COMMIT'), [Symbol.asyncDispose]: sql[Symbol.asyncDispose] }
}

async function waitingForLocks(url: string): Promise<number> {
  await using sql = await connectSql(url)
  const { rows } = await sql.query(
    `SELECT count(*)::integer AS n FROM pg_stat_activity
      WHERE datname = current_database() AND wait_event_type = 'Lock'`,
  )
  return rows[0].n
}

async function readiness({ admin }: ServiceProcess): Promise<{ ready: number; live: number }> {
  const [ready, live] = await Promise.all(
    ['readyz', 'healthz'].map((path) => fetch(`http://${admin}/${path}`).catch(() => undefined)),
  )
  return { ready: ready?.status ?? 0, live: live?.status ?? 0 }
}

/** Sends the signal and waits until the service says that it is about to end. */
async function beginDrain(service: ServiceProcess, signal: NodeJS.Signals): Promise<void> {
  service.signal(signal)
  await expect.poll(() => readiness(service), PATIENT).toEqual({ ready: 503, live: 200 })
}

/** Fails rather than waiting for ever. */
async function endOf(service: ServiceProcess): Promise<Ended> {
  const late = sleep(25_000, undefined, { ref: false }).then(() => {
    throw new Error('the service has not ended')
  })
  return Promise.race([service.ended, late])
}

/** The states of health that are told, and how the stream ends. */
async function watchedHealth(client: TestClient): Promise<(keyof typeof Serving)[]> {
  const states: (keyof typeof Serving)[] = []
  const call = client.raw.makeServerStreamRequest(
    '/grpc.health.v1.Health/Watch',
    (bytes: Buffer) => bytes,
    (bytes: Buffer) => fromBinary(HealthCheckResponseSchema, bytes),
    Buffer.alloc(0),
  )
  const names = new Map<number, keyof typeof Serving>(
    Object.entries(Serving).map(([name, value]) => [value, name as keyof typeof Serving]),
  )
  call.on('data', ({ status: state }) => states.push(names.get(state) ?? 'UNKNOWN'))
  await new Promise((done) => call.on('error', done).on('end', done))
  return states
}

test('SIGTERM under load loses no acknowledged write and no call that had been taken', async () => {
  await using database = await freshDatabase()
  const open = Promise.withResolvers<void>()
  await using catalogue = await closedCatalogue(open.promise)
  await using service = await startProcess({
    DATABASE_URL: database.url,
    REDIS_URL: redisUrl(),
    ORIGIN_URL: catalogue.url,
    ITEMCACHE_ADMIN_LISTEN: '127.0.0.1:0',
    ITEMCACHE_DRAIN_TIMEOUT: '90s',
    ...HANGING,
  })
  const { client } = service
  await client.call('createItem', { item: { id: 'locked' } }, TENANT)
  await client.call('createItem', { item: { id: 'warm' } }, TENANT)
  const health = watchedHealth(client)

  let over = false
  let signalled = false
  const acknowledged = new Set<string>(['locked', 'warm'])
  const problems: string[] = []
  const reads = { ok: 0, refused: 0 }
  const note = ({ code, message }: ServiceError) => {
    if (code === status.UNAVAILABLE && signalled) reads.refused++
    else problems.push(`${signalled ? 'after' : 'before'} SIGTERM: ${message}`)
  }
  const load = Array.from({ length: 6 }, async (_, n) => {
    using own = new TestClient(service.address)
    for (let i = 0; !over; i++) {
      const id = `item-${n}-${i}`
      const calls =
        n < 3
          ? [client.call('createItem', { item: { id } }, { ...TENANT, timeoutMs: 60_000 })]
          : Array.from({ length: 5 }, () => own.call('getItem', { id: 'warm' }, TENANT))
      await Promise.all(
        calls.map((call) =>
          call.then(() => {
            if (n < 3) acknowledged.add(id)
            else reads.ok++
          }, note),
        ),
      )
      if (signalled) await sleep(10)
    }
  })
  const events: WatchInvalidationsResponse['event'][] = []
  const watched = (async () => {
    try {
      for await (const { event } of client.stream('watchInvalidations', {}, TENANT)) events.push(event)
    } catch (error) {
      return failureOf(error as ServiceError)
    }
    return undefined
  })()
  // Calls that have been taken for certain: they wait for the catalogue, and for a row.
  const slow = { ...TENANT, timeoutMs: 90_000 }
  await using lock = await lockItem(database.superuserUrl, 'locked')
  const taken = [
    client.call('getItem', { id: '1' }, slow),
    client.call('getItem', { id: '2' }, slow),
    client.call('updateItem', { item: { id: 'locked', title: 'after all' } }, slow),
  ]
  await expect.poll(catalogue.asked, PATIENT).toBe(2)
  await expect.poll(() => waitingForLocks(database.superuserUrl), PATIENT).toBeGreaterThan(0)
  await expect.poll(() => Math.min(reads.ok, acknowledged.size), PATIENT).toBeGreaterThan(10)

  signalled = true
  await beginDrain(service, 'SIGTERM')
  await expect.poll(() => reads.refused, PATIENT).toBeGreaterThan(0)
  expect(await watched).toMatchObject({ code: status.UNAVAILABLE, info: { reason: 'DRAINING' } })
  expect(events.at(-1)?.case).toBe('draining')
  over = true
  open.resolve()
  await lock.letGo()
  const [one, two, updated] = await Promise.all(taken)
  expect(one).toMatchObject({ result: { value: { title: 'Product 1' } } })
  expect(two).toMatchObject({ result: { value: { title: 'Product 2' } } })
  expect(updated).toMatchObject({ item: { title: 'after all' } })
  expect(await endOf(service)).toEqual({ code: 0, signal: null })
  await Promise.all(load)
  expect((await health).slice(0, 2)).toEqual(['SERVING', 'NOT_SERVING'])
  expect(problems).toEqual([])

  // What was acknowledged is there, and what is there was acknowledged.
  await using sql = await connectSql(database.superuserUrl)
  const { rows } = await sql.query(`SELECT id FROM items WHERE tenant = 'acme' AND source = 'LOCAL'`)
  expect(rows.map(({ id }) => id).toSorted()).toEqual([...acknowledged].toSorted())
}, 120_000)

/** A service with everything that may hang: all of it was taken, none of it ends while a test runs. */
async function hungService(more: Readonly<Record<string, string>>) {
  await using started = new AsyncDisposableStack()
  const database = started.use(await freshDatabase())
  const catalogue = started.use(await closedCatalogue(new Promise(() => {})))
  const service = started.use(
    await startProcess({
      DATABASE_URL: database.url,
      REDIS_URL: redisUrl(),
      ORIGIN_URL: catalogue.url,
      ITEMCACHE_ADMIN_LISTEN: '127.0.0.1:0',
      ...HANGING,
      ...more,
    }),
  )
  const { client } = service
  await client.call('createItem', { item: { id: 'locked' } }, TENANT)
  started.use(await lockItem(database.superuserUrl, 'locked'))
  const raw = started.use(new CallerConnection(service.address))
  // Watchers who never read, and one who is behind; a request that never ends; look-ups that never end.
  raw.open('watchInvalidations', { includeItems: true }, 'acme')
  raw.open('watchInvalidations', { resumeAfter: 0n }, 'acme')
  raw.open('watchMetrics', {}, 'acme')
  raw.begin('updateItem', 'acme')
  raw.begin('streamItems', 'acme')
  const failures = [
    client.failure('getItem', { id: '1' }, { ...TENANT, timeoutMs: 90_000 }),
    client.failure('updateItem', { item: { id: 'locked' } }, { ...TENANT, timeoutMs: 90_000 }),
  ]
  const health = watchedHealth(client)
  started.defer(async () => {
    service.signal('SIGKILL')
    await Promise.all([...failures, health])
  })
  await expect.poll(catalogue.asked, PATIENT).toBeGreaterThan(0)
  await expect.poll(() => waitingForLocks(database.superuserUrl), PATIENT).toBeGreaterThan(0)
  const running = started.move()
  return { service, failures, [Symbol.asyncDispose]: () => running.disposeAsync() }
}

test.each([
  ['10 s unless told otherwise', {}],
  ['a second and a bit when told so', { ITEMCACHE_DRAIN_TIMEOUT: '1s' }],
])(
  'a stop waits no longer than %s for what never ends: readers who never read, slow tiers, open requests',
  async (_, more) => {
    await using hung = await hungService(more)
    const signalledAt = performance.now()
    hung.service.signal('SIGTERM')
    // 1 where the machine was too busy even for the rest, and the last resort came first.
    expect(await endOf(hung.service)).toEqual({ code: expect.toBeOneOf([0, 1]), signal: null })
    // By its own clock the service is gone 1.5 s after the drain at the latest. The rest is for a machine that is busy.
    const drainMs = 'ITEMCACHE_DRAIN_TIMEOUT' in more ? 1_000 : 8_000
    expect(performance.now() - signalledAt).toBeLessThan(drainMs + 7_000)
    for (const failure of hung.failures) {
      expect((await failure).code).toBeOneOf([status.UNAVAILABLE, status.CANCELLED])
    }
  },
  90_000,
)

test.each([
  ['SIGTERM', 'SIGTERM', 143],
  ['SIGTERM', 'SIGINT', 130],
  ['SIGINT', 'SIGTERM', 143],
] as const)(
  '%s and then %s ends the service at once, with code %i',
  async (first, second, code) => {
    await using hung = await hungService({ ITEMCACHE_DRAIN_TIMEOUT: '10m' })
    await beginDrain(hung.service, first)
    hung.service.signal(second)
    expect(await endOf(hung.service)).toEqual({ code, signal: null })
  },
  90_000,
)

test('under npm, one Ctrl-C that comes by two ways is one', async () => {
  await using database = await freshDatabase()
  await using service = await startProcess({
    DATABASE_URL: database.url,
    REDIS_URL: 'off',
    ORIGIN_URL: 'off',
    npm_lifecycle_event: 'start',
  })
  // While it is stopped signals wait, so that both come at the same time; two of one kind would become one.
  service.signal('SIGSTOP')
  service.signal('SIGINT')
  service.signal('SIGTERM')
  service.signal('SIGCONT')
  expect(await endOf(service)).toEqual({ code: 0, signal: null })
})

describe('the private servers', () => {
  /** A data directory that need not unpack or fetch anything. */
  function dataDirectory() {
    const directory = makeRunDirectory()
    const cache = join(directory.path, 'cache')
    mkdirSync(cache)
    for (const from of [inject('postgresCache'), inject('redisCache')]) {
      if (!existsSync(from)) continue
      for (const name of readdirSync(from)) {
        if (!existsSync(join(cache, name))) symlinkSync(join(from, name), join(cache, name))
      }
    }
    return directory
  }
  const start = (dataDir: string) =>
    startProcess(
      { ITEMCACHE_DATA_DIR: dataDir, ITEMCACHE_ADMIN_LISTEN: '127.0.0.1:0', ITEMCACHE_DRAIN_TIMEOUT: '10m' },
      { ownGroup: true },
    )
  const pidsIn = (dataDir: string) =>
    [join('postgres', 'data', 'postmaster.pid'), join('redis', 'process')].map((file) =>
      Number.parseInt(readFileSync(join(dataDir, file), 'utf8'), 10),
    )
  const alive = (pids: readonly number[]) => pids.filter((pid) => findProcess(pid) !== undefined)

  test('end with the service, however it ends, or at its next start, and keep what was written', async () => {
    await using directory = dataDirectory()
    const dataDir = directory.path
    const all: number[] = []
    const running = () => {
      const pids = pidsIn(dataDir)
      for (const pid of pids) directory.ends(pid, 'SIGKILL')
      all.push(...pids)
      expect(alive(pids)).toEqual(pids)
      return pids
    }
    {
      await using killed = await start(dataDir)
      await killed.client.call('createItem', { item: { id: 'kept' } })
      running()
      killed.signal('SIGKILL')
      await killed.ended
    }
    {
      await using hurried = await start(dataDir)
      const pids = running()
      await hurried.client.call('getItem', { id: 'kept' })
      using raw = new CallerConnection(hurried.address)
      raw.begin('updateItem', 'default')
      await expect.poll(() => heldStreams(hurried), PATIENT).toBeGreaterThan(0)
      await beginDrain(hurried, 'SIGINT')
      hurried.signal('SIGINT')
      expect(await endOf(hurried)).toEqual({ code: 130, signal: null })
      await expect.poll(() => alive(pids), PATIENT).toEqual([])
    }
    await using last = await start(dataDir)
    running()
    await last.client.call('getItem', { id: 'kept' })
    process.kill(-last.pid, 'SIGINT')
    expect(await endOf(last)).toEqual({ code: 0, signal: null })
    expect(alive(all)).toEqual([])
  }, 120_000)

  /** Requests that have been begun: HTTP/2 streams, whatever has come of their content. */
  async function heldStreams({ admin }: ServiceProcess): Promise<number> {
    const text = await (await fetch(`http://${admin}/metrics`)).text()
    return Number(/^itemcache_held\{what="streams"\} (\d+)$/m.exec(text)?.[1])
  }
})
