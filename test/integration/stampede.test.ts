import { type AddressInfo, connect, createServer, type Socket } from 'node:net'
import pg from 'pg'
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { type Catalogue, startCatalogue } from '../../src/embedded/catalogue.ts'
import { Tier } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { parseRedisUrl } from '../../src/tiers/redis-url.ts'
import { callerAs } from '../support/caller.ts'
import { type ServiceProcess, startProcess } from '../support/process.ts'
import { type FreshDatabase, freshDatabase, freshRedis, redisUrl } from '../support/servers.ts'
import { PATIENT, startService, type TestClient } from '../support/service.ts'
import { unlessStalled } from '../support/stalls.ts'

/** A catalogue of which the test decides when it answers. */
async function heldCatalogue() {
  let hold = false
  const held: (() => void)[] = []
  const catalogue = await startCatalogue({
    intercept: (request, response) => {
      if (!hold) return false
      const id = Number(request.url?.split('/').at(-1))
      held.push(() => response.end(JSON.stringify({ ...PRODUCT, id })))
      return true
    },
  })
  return {
    catalogue,
    /** Requests that come from now on are not answered before `release`. */
    hold: () => {
      hold = true
    },
    /** Requests that come from now on are answered at once. */
    answerFromNowOn: () => {
      hold = false
    },
    /** How many requests wait. */
    waiting: () => held.length,
    release: () => {
      hold = false
      for (const answer of held.splice(0)) answer()
    },
    asked: (id: string) => catalogue.requests.get(`/products/${id}`) ?? 0,
    [Symbol.asyncDispose]: () => catalogue[Symbol.asyncDispose](),
  }
}

const PRODUCT = { title: 'A held product', price: 1.5, description: '', category: 'held', image: '' }
/** So long that a holder whose machine is busy renews it in time. */
const LOCK_TTL_MS = 15_000
/** For holders that die: the others wait for it to end. */
const SHORT_LOCK_TTL_MS = 4_000
/** Longer than anything here should take, on a machine with other things to do. */
const PATIENCE_MS = 15_000

let database: FreshDatabase
let origin: Awaited<ReturnType<typeof heldCatalogue>>
let tenants = 0
let tenant = ''

beforeAll(async () => {
  database = await freshDatabase()
  origin = await heldCatalogue()
})
afterAll(async () => {
  await database[Symbol.asyncDispose]()
  await origin[Symbol.asyncDispose]()
})
beforeEach(() => {
  origin.release()
  tenants += 1
  tenant = `stampede-${tenants}`
})

const environment = (catalogue: Catalogue) => ({
  DATABASE_URL: database.url,
  REDIS_URL: redisUrl(),
  ORIGIN_URL: catalogue.url,
  ...PATIENT,
  ITEMCACHE_LOCK_TTL: `${LOCK_TTL_MS}ms`,
  ITEMCACHE_ORIGIN_TIMEOUT: '20s',
  // Room for the calls of the test beside those of the callers.
  ITEMCACHE_MAX_CONCURRENT_STREAMS: '2000',
})

/** So many callers of one item on one instance, and whether all of them got it. */
async function callers(client: TestClient, count: number, id: string): Promise<boolean> {
  const { call } = callerAs({ client }, tenant)
  const answers = await Promise.all(
    Array.from({ length: count }, () => call('getItem', { id }, { timeoutMs: 2 * PATIENCE_MS })),
  )
  return answers.every(({ result }) => result.case === 'item')
}

/** Each of these has asked PostgreSQL for one item more than before. */
async function haveLoaded(clients: readonly TestClient[], loads: readonly bigint[]): Promise<void> {
  await expect
    .poll(async () => (await loadsOf(clients)).map((now, i) => now > (loads[i] ?? 0n)), {
      timeout: PATIENCE_MS,
      interval: 20,
    })
    .toEqual(clients.map(() => true))
}

const loadsOf = (clients: readonly TestClient[]) =>
  Promise.all(clients.map(async (client) => (await client.call('getMetrics', {})).snapshot?.loads ?? 0n))

/** How many statements about items the instances have sent. */
async function statementsOf(clients: readonly TestClient[]): Promise<number> {
  const snapshots = await Promise.all(clients.map((client) => client.call('getMetrics', {})))
  return snapshots
    .flatMap(({ snapshot }) => snapshot?.tiers.filter(({ tier }) => tier === Tier.POSTGRES) ?? [])
    .reduce((sum, { latency }) => sum + Number(latency?.count ?? 0), 0)
}

async function rowsOf(id: string): Promise<number> {
  const client = new pg.Client(database.url)
  await client.connect()
  try {
    const { rows } = await client.query(
      'SELECT count(*)::int AS n FROM items WHERE tenant = $1 AND id = $2',
      [tenant, id],
    )
    return rows[0].n
  } finally {
    await client.end()
  }
}

describe('three instances', () => {
  async function startThree(more: Readonly<Record<string, string>> = {}) {
    const env = { ...environment(origin.catalogue), ...more }
    const processes = await Promise.all([1, 2, 3].map(() => startProcess(env)))
    return {
      processes,
      clients: processes.map(({ client }) => client),
      [Symbol.asyncDispose]: async () => {
        await Promise.all(processes.map((one) => one[Symbol.asyncDispose]()))
      },
    }
  }

  test('ask the origin once for an item that 1,000 callers of each want, read PostgreSQL once each, and make one row', async () => {
    await using three = await startThree()
    const { clients } = three
    const scenario = async (id: string) => {
      const before = await loadsOf(clients)
      const asked = origin.asked(id)
      const statements = await statementsOf(clients)
      origin.hold()
      const reading = clients.map((client) => callers(client, 1000, id))
      await haveLoaded(clients, before)
      await expect.poll(origin.waiting, { timeout: PATIENCE_MS }).toBe(1)
      origin.release()
      expect(await Promise.all(reading)).toEqual([true, true, true])
      expect(origin.asked(id) - asked).toBe(1)
      expect(await rowsOf(id)).toBe(1)
      // A SELECT each, and the insert, which reads back what it has inserted.
      expect((await statementsOf(clients)) - statements).toBe(4)
    }
    // The next item, when a busy machine has kept an instance from hearing of the log for too long.
    let next = 0
    await unlessStalled(() => scenario(String(++next)))
  })

  for (const how of ['SIGKILL', 'SIGSTOP'] as const) {
    test(`ask the origin twice at most when the one that loads gets ${how}, and wait for it no longer than its lock lasts`, async () => {
      await using three = await startThree({ ITEMCACHE_LOCK_TTL: `${SHORT_LOCK_TTL_MS}ms` })
      const [holder, ...others] = three.processes
      const { clients } = three
      const before = await loadsOf(clients)
      const asked = origin.asked('2')
      origin.hold()
      const lost = callers((holder as ServiceProcess).client, 10, '2').catch(() => false)
      await expect.poll(origin.waiting, { timeout: PATIENCE_MS }).toBe(1)
      const waiting = others.map(({ client }) => callers(client, 100, '2'))
      await haveLoaded(clients, before)
      // Whoever asks next is answered at once; the first request never is, or after all is over.
      origin.answerFromNowOn()
      const endedAt = performance.now()
      holder?.signal(how)
      expect(await Promise.all(waiting)).toEqual([true, true])
      const waitedMs = performance.now() - endedAt
      if (process.env['TEST_LOG_LEVEL'] === 'info') console.log(`${how}: waited ${Math.round(waitedMs)} ms`)
      expect(waitedMs).toBeLessThan(SHORT_LOCK_TTL_MS + PATIENCE_MS / 2)
      expect(origin.asked('2') - asked).toBe(2)
      holder?.signal('SIGCONT')
      origin.release()
      expect(await lost).toBe(how === 'SIGSTOP')
      expect(await rowsOf('2')).toBe(1)
    })
  }

  test('ask the origin once each when Redis is down, and do not wait', async () => {
    await using redis = await freshRedis()
    await using three = await startThree({
      REDIS_URL: redis.url,
      ITEMCACHE_REDIS_TIMEOUT: '1s',
      ITEMCACHE_REDIS_SLOW: '1s',
    })
    const { clients } = three
    await redis.kill()
    const asked = origin.asked('3')
    const before = await loadsOf(clients)
    origin.hold()
    const reading = clients.map((client) => callers(client, 100, '3'))
    await haveLoaded(clients, before)
    await expect.poll(origin.waiting, { timeout: PATIENCE_MS }).toBe(3)
    origin.release()
    expect(await Promise.all(reading)).toEqual([true, true, true])
    expect(origin.asked('3') - asked).toBe(3)
    expect(await rowsOf('3')).toBe(1)
  })
})

/** A way to Redis that loses the reply to the first command about a lock, and the connection with it. */
async function lossyRedis() {
  const { path, nodes } = parseRedisUrl(redisUrl())
  const sockets = new Set<Socket>()
  let lost = 0
  const server = createServer((near) => {
    const far = path === undefined ? connect(nodes[0]?.port ?? 0, nodes[0]?.host) : connect(path)
    for (const socket of [near, far]) {
      sockets.add(socket)
      socket.on('error', () => {}).on('close', () => [near, far].map((each) => each.destroy()))
    }
    let losing = false
    near.on('data', (chunk) => {
      if (lost === 0 && chunk.toString('latin1').includes(':lock')) losing = true
      far.write(chunk)
    })
    far.on('data', (chunk) => {
      // The script may not be there yet: then the command comes again.
      if (losing && !chunk.toString('latin1').startsWith('-NOSCRIPT')) {
        lost += 1
        near.destroy()
      } else near.write(chunk)
    })
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  return {
    url: `redis://127.0.0.1:${(server.address() as AddressInfo).port}`,
    lost: () => lost,
    [Symbol.dispose]() {
      server.close()
      for (const socket of sockets) socket.destroy()
    },
  }
}

describe('two instances', () => {
  test('ask the origin once although the reply to the lock was lost: it is held all the same', async () => {
    using lossy = await lossyRedis()
    const env = environment(origin.catalogue)
    await using one = await startService({
      databaseUrl: database.url,
      env: { ...env, REDIS_URL: lossy.url, ITEMCACHE_REDIS_TIMEOUT: '2s' },
    })
    await using two = await startService({ databaseUrl: database.url, env })
    const before = await loadsOf([two.client])
    const asked = origin.asked('4')
    origin.hold()
    const first = callers(one.client, 10, '4')
    await expect.poll(origin.waiting, { timeout: PATIENCE_MS }).toBe(1)
    expect(lossy.lost()).toBe(1)
    const second = callers(two.client, 10, '4')
    await haveLoaded([two.client], before)
    origin.release()
    expect(await Promise.all([first, second])).toEqual([true, true])
    expect(origin.asked('4') - asked).toBe(1)
  })

  test('refresh a copy once for both, while they hear of the log', async () => {
    const env = { ...environment(origin.catalogue), ITEMCACHE_FRESH_FOR: '4s', ITEMCACHE_TTL_JITTER: '0' }
    await using one = await startService({ databaseUrl: database.url, env })
    await using two = await startService({ databaseUrl: database.url, env })
    const both = [one, two]
    const refreshes = () => both.map(({ app }) => app.metrics.refreshesOk)
    const selects = () => both.reduce((sum, { app }) => sum + app.metrics.tiers.postgres.hits, 0)
    // An instance that hears nothing for a while, on a machine that has no time for it, calls no copy current and asks for itself.
    const silences = () =>
      both.reduce((sum, { app: { metrics } }) => {
        const { REVALIDATING, ...unheard } = metrics.staleReads
        const refused = metrics.refusedRedisCopies + metrics.tiers.memory.misses
        return sum + refused + Object.values(unheard).reduce((a, b) => a + b)
      }, 0)
    const refreshed = async (id: string) => {
      for (const { client } of both) await callers(client, 1, id)
      const [before, selectsBefore, silencesBefore] = [refreshes(), selects(), silences()]
      const since = () => refreshes().map((count, n) => count - (before[n] ?? 0))
      while (since().includes(0)) for (const { client } of both) await callers(client, 1, id)
      return { each: since(), selects: selects() - selectsBefore, heard: silences() === silencesBefore }
    }
    let last = await refreshed('5')
    for (let id = 6; !last.heard; id++) last = await refreshed(`${id}`)
    expect(last).toEqual({ each: [1, 1], selects: 1, heard: true })
  })

  test('do not queue up behind each other to be told that the origin is down', async () => {
    const requests: (() => void)[] = []
    await using down = await startCatalogue({
      intercept: (_, response) => {
        requests.push(() => response.writeHead(403).end())
        return true
      },
    })
    const refused = async () => {
      await expect.poll(() => requests.length, { timeout: PATIENCE_MS }).toBe(1)
      requests.pop()?.()
    }
    const env = { ...environment(down), ITEMCACHE_LOCK_TTL: '20s', ITEMCACHE_FAILURE_TTL: '20s' }
    await using one = await startService({ databaseUrl: database.url, env })
    await using two = await startService({ databaseUrl: database.url, env })
    const failure = ({ client }: { readonly client: TestClient }) =>
      callerAs({ client }, tenant).failure('getItem', { id: '6' }, { timeoutMs: 2 * PATIENCE_MS })
    const first = failure(one)
    await refused()
    expect(await first).toMatchObject({ info: { reason: 'ORIGIN_STATUS' } })
    // The lock is open now: who comes asks for itself.
    const second = failure(two)
    await refused()
    expect(await second).toMatchObject({ info: { reason: 'ORIGIN_STATUS' } })
    // And each remembers for itself.
    expect(await failure(one)).toMatchObject({ info: { reason: 'ORIGIN_STATUS' } })
    expect(down.requests.get('/products/6')).toBe(2)
  })
})
