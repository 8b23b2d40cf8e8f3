/** What callers see when PostgreSQL is slow, gone, full or ends a connection. */
import { once } from 'node:events'
import { type AddressInfo, connect, createServer, type Socket } from 'node:net'
import { Client } from 'pg'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { ItemCacheError } from '../../src/errors.ts'
import { connectPostgres } from '../../src/tiers/postgres.ts'
import { NO_FAULT, Way } from '../consistency/way.ts'
import { freshPostgres } from '../support/servers.ts'
import {
  by,
  connectSql,
  draft,
  newTenant,
  openStore,
  revisionOf,
  type Sql,
  type Store,
  someoneWaits,
} from './postgres-fixture.ts'

let store: Store
let sql: Sql

beforeAll(async () => {
  store = await openStore()
  sql = store.sql
})

afterAll(() => store[Symbol.asyncDispose]())

const late = { code: 'unavailable', reason: 'POSTGRES_TIMEOUT', retryAfterMs: 1000 }
const down = { code: 'unavailable', reason: 'POSTGRES_UNAVAILABLE', retryAfterMs: 1000 }
const cancelled = { code: 'cancelled' }

/** Holds a lock that no read gets past until it is let go. */
async function lockedItems() {
  const session = await store.session()
  await session('BEGIN; LOCK TABLE items')
  return { [Symbol.asyncDispose]: async () => void (await session('ROLLBACK')) }
}

describe('a slow database', () => {
  test('a lock that is not to be had in time is reported as unavailable', async () => {
    const tier = await store.open({ statementTimeoutMs: 100 })
    await using _lock = await lockedItems()
    const byTheLock = { ...late, reason: 'POSTGRES_LOCK_TIMEOUT', cause: { code: '55P03' } }
    await expect(tier.read(newTenant(), ['a'])).rejects.toMatchObject(byTheLock)
    await expect(tier.create(by(newTenant()), 'a', draft())).rejects.toMatchObject(byTheLock)
    expect(await tier.inspect(newTenant(), 'a')).toEqual({ present: false, skipped: 'timeout' })
  })

  test('a statement that takes too long is reported as unavailable, and the connection is used again', async () => {
    await using own = await openStore({ statementTimeoutMs: 100, maxConnections: 2 })
    await own.sql(`INSERT INTO items (tenant, id) VALUES ('t', 'a')`)
    await own.sql(`CREATE OR REPLACE FUNCTION itemcache_timeline_start() RETURNS bigint LANGUAGE plpgsql AS
      'BEGIN PERFORM pg_sleep(60); RETURN 0; END'`)
    await expect(own.tier.read('t', ['a'])).rejects.toMatchObject({ ...late, cause: { code: '57014' } })
    await own.sql(`CREATE OR REPLACE FUNCTION itemcache_timeline_start() RETURNS bigint LANGUAGE plpgsql AS
      'BEGIN RETURN 0; END'`)
    // A machine that stalls may keep any statement for so long.
    await expect.poll(async () => (await own.tier.read('t', ['a'])).get('a')?.state).toBe('present')
    expect(own.tier.stats.connections.read.total).toBe(1)
  })

  test('a write that others keep from a connection for too long says so', async () => {
    const tier = await store.open({ maxConnections: 2, connectTimeoutMs: 2_000, statementTimeoutMs: 30_000 })
    await using _lock = await lockedItems()
    const first = tier.create(by(newTenant()), 'a', draft())
    first.catch(() => undefined)
    await someoneWaits(sql)
    const queued = { ...late, reason: 'POSTGRES_QUEUE_TIMEOUT' }
    await expect(tier.create(by(newTenant()), 'a', draft())).rejects.toMatchObject(queued)
  })

  test('a read that finds every connection in use does not wait for ever', async () => {
    const tier = await store.open({ maxConnections: 2, connectTimeoutMs: 2_000, statementTimeoutMs: 30_000 })
    await using _lock = await lockedItems()
    const first = tier.read(newTenant(), ['a'])
    first.catch(() => undefined)
    await someoneWaits(sql)
    await expect(tier.read(newTenant(), ['a'])).rejects.toMatchObject(late)
    expect(tier.stats.connections.read).toMatchObject({ total: 1, idle: 0, waiting: 0 })
  })

  test('writers that wait for a tenant do not keep anybody from reading', async () => {
    const tier = await store.open({ maxConnections: 4, connectTimeoutMs: 5000 })
    const tenant = newTenant()
    await using session = await connectSql(store.url)
    await session('BEGIN')
    await session(`INSERT INTO items (tenant, id) VALUES ($1, 'a')`, [tenant])
    const writes = Array.from({ length: 4 }, (_, n) => tier.create(by(tenant), `${n}`, draft()))
    await someoneWaits(sql)
    expect((await tier.read(tenant, ['a'])).get('a')?.state).toBe('unknown')
    await session('COMMIT')
    await Promise.all(writes)
    expect(await revisionOf(sql, tenant)).toBe(5)
  })
})

describe('a caller who goes away', () => {
  test('stops waiting at once, for a statement and for a connection', async () => {
    const tier = await store.open({ maxConnections: 2 })
    const lock = await lockedItems()
    const leaving = new AbortController()
    const inStatement = tier.read(newTenant(), ['a'], leaving.signal)
    inStatement.catch(() => undefined)
    await someoneWaits(sql)
    const inQueue = tier.list(newTenant(), { category: '', tag: '', afterId: '', limit: 1 }, leaving.signal)
    inQueue.catch(() => undefined)
    leaving.abort()
    await expect(inStatement).rejects.toMatchObject(cancelled)
    await expect(inQueue).rejects.toMatchObject(cancelled)
    await expect(tier.read(newTenant(), ['a'], leaving.signal)).rejects.toMatchObject(cancelled)
    await lock[Symbol.asyncDispose]()
    // The connection comes back, and nothing is left on it.
    expect((await tier.read(newTenant(), ['a'])).get('a')?.state).toBe('unknown')
    expect(tier.stats.connections.read).toMatchObject({ total: 1, idle: 1, waiting: 0 })
  })

  test('leaves no half of a write behind', async () => {
    const tier = await store.open({ maxConnections: 2 })
    const tenant = newTenant()
    await using session = await connectSql(store.url)
    await session('BEGIN')
    await session(`INSERT INTO items (tenant, id) VALUES ($1, 'a')`, [tenant])
    const leaving = new AbortController()
    const write = tier.create(
      by(tenant, { signal: leaving.signal, requestId: 'r', fingerprint: 'f' }),
      'b',
      draft(),
    )
    write.catch(() => undefined)
    await someoneWaits(sql)
    leaving.abort()
    await expect(write).rejects.toMatchObject(cancelled)
    await session('COMMIT')
    // The next write of the tenant comes after the rollback: they use the same connection.
    expect((await tier.create(by(tenant, { requestId: 'r', fingerprint: 'f' }), 'b', draft())).replayed).toBe(
      false,
    )
    expect(await revisionOf(sql, tenant)).toBe(2)
  })

  test('may say why', async () => {
    const deadline = new ItemCacheError('timeout', 'the deadline has passed')
    await expect(store.tier.read(newTenant(), ['a'], AbortSignal.abort(deadline))).rejects.toBe(deadline)
  })
})

describe('connections that end', () => {
  const KILL = `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = $1`

  test('while idle cost nothing: the next call opens another', async () => {
    const reported: Error[] = []
    const name = 'killed-idle'
    const gone = Promise.withResolvers<void>()
    const tier = await store.open({
      applicationName: name,
      onConnectionError: (error) => {
        reported.push(error)
        gone.resolve()
      },
    })
    await tier.ping()
    await sql(KILL, [name])
    await gone.promise
    await tier.ping()
    expect(reported).toHaveLength(1)
  })

  test('while in use fail that call only', async () => {
    const name = 'killed-busy'
    const tier = await store.open({ applicationName: name })
    {
      await using _lock = await lockedItems()
      const read = tier.read(newTenant(), ['a'])
      const write = tier.create(by(newTenant()), 'a', draft())
      for (const call of [read, write]) call.catch(() => undefined)
      await someoneWaits(sql, 2)
      await sql(KILL, [name])
      await expect(read).rejects.toMatchObject(down)
      await expect(write).rejects.toMatchObject(down)
    }
    await tier.ping()
    await tier.create(by(newTenant()), 'a', draft())
  })

  test('inside a transaction leave nothing behind', async () => {
    const name = 'killed-inside'
    const tier = await store.open({ applicationName: name })
    const tenant = newTenant()
    await tier.create(by(tenant), 'a', draft())
    const write = tier.update(by(tenant), 'a', { etag: '', allowMissing: false }, () => {
      // The kill arrives between two statements, when nobody waits for an answer.
      sql(KILL, [name]).catch(() => undefined)
      return draft({ title: 'x'.repeat(200_000) })
    })
    await write.catch((error) => expect(error).toMatchObject({ code: 'unavailable' }))
    await tier.ping()
  })

  test('while COMMIT is on its way leave the outcome open, and a retry with the request id finds out', async () => {
    await using proxy = await openProxy(store.url)
    await using tier = await connectPostgres({ url: proxy.url })
    const tenant = newTenant()
    const write = by(tenant, { requestId: 'r', fingerprint: 'f' })
    const unknown = { code: 'unavailable', reason: 'COMMIT_UNKNOWN' }

    proxy.cutAtCommit('after')
    await expect(tier.create(write, 'a', draft())).rejects.toMatchObject(unknown)
    expect(await tier.create(write, 'a', draft())).toMatchObject({ replayed: true })
    expect(await revisionOf(sql, tenant)).toBe(1)

    const second = { ...write, requestId: 's' }
    proxy.cutAtCommit('before')
    await expect(tier.create(second, 'b', draft())).rejects.toMatchObject(unknown)
    expect(await tier.create(second, 'b', draft())).toMatchObject({ replayed: false })
    expect(await revisionOf(sql, tenant)).toBe(2)
  })
})

describe('a connection that has died without a word', () => {
  test('goes with the statement whose time is over: the next one gets another', async () => {
    await using way = await openWay(store.url)
    // One reader; no other bound ends its statement before the test is over.
    await using tier = await connectPostgres({ url: way.url, maxConnections: 2, statementTimeoutMs: 120_000 })
    await tier.ping()
    way.setFault(SILENT)
    await expect(tier.ping(AbortSignal.timeout(50))).rejects.toMatchObject(late)
    way.setFault(NO_FAULT)
    await tier.ping(AbortSignal.timeout(20_000))
    expect(tier.stats.connections.read.total).toBe(1)
  })

  test('does not keep the listener from hearing for long, though nothing else is wrong', async () => {
    await using way = await openWay(store.url)
    await using tier = await connectPostgres({ url: way.url })
    const heard: string[] = []
    let connected = 0
    let lost = 0
    await using _listening = await tier.listen({
      changed: (tenant) => heard.push(tenant),
      connected: () => connected++,
      lost: () => lost++,
    })
    await expect.poll(() => connected, { timeout: 20_000 }).toBe(1)
    way.setFault(SILENT)
    await expect.poll(() => lost, { timeout: 20_000 }).toBe(1)
    way.setFault(NO_FAULT)
    await expect.poll(() => connected, { timeout: 20_000 }).toBe(2)
    const tenant = newTenant()
    await sql('INSERT INTO items (tenant, id) VALUES ($1, $2)', [tenant, 'a'])
    await expect.poll(() => heard, { timeout: 20_000 }).toContain(tenant)
  })

  test('in the middle of a write keeps other writers of the item waiting for seconds, not for the longest statement', async () => {
    await using way = await openWay(store.url)
    const tenant = newTenant()
    const tier = await store.open({ statementTimeoutMs: 25_000 })
    await tier.create(by(tenant), 'a', draft())
    await using cutOff = await connectPostgres({ url: way.url, statementTimeoutMs: 25_000 })
    const options = { etag: '', allowMissing: false }
    const lost = cutOff.update(by(tenant), 'a', options, () => {
      way.setFault(SILENT)
      return draft({ title: 'lost' })
    })
    lost.catch(() => {})
    await someoneIdles(sql)
    // A lock is waited for 15 s here.
    const { snapshot } = await tier.update(by(tenant), 'a', options, () => draft({ title: 'kept' }))
    expect(snapshot.state).toBe('present')
    way.breakAll()
    // COMMIT was sent together with the change.
    await expect(lost).rejects.toMatchObject({ code: 'unavailable', reason: 'COMMIT_UNKNOWN' })
  })
})

describe('a database that is gone', () => {
  test('makes every call unavailable in bounded time, and they work again when it is back', async () => {
    await using server = await freshPostgres()
    await using tier = await connectPostgres({
      url: server.url,
      statementTimeoutMs: 2_000,
      connectTimeoutMs: 2_000,
    })
    await tier.create(by('t'), 'a', draft())
    await tier.ping()
    server.pause()
    await expect(tier.read('t', ['a'])).rejects.toMatchObject(late)
    // Nobody gets the connection on which an answer may still come.
    expect(tier.stats.connections.read.total).toBe(0)
    await expect(tier.ping()).rejects.toMatchObject(late)
    server.resume()
    expect((await tier.read('t', ['a'])).get('a')?.state).toBe('present')
    await server.stop()
    await expect(tier.read('t', ['a'])).rejects.toMatchObject(down)
    await expect(tier.create(by('t'), 'b', draft())).rejects.toMatchObject(down)
    expect(await tier.inspect('t', 'a')).toEqual({ present: false, skipped: 'down' })
    await server.restart()
    expect((await tier.read('t', ['a'])).get('a')?.state).toBe('present')
    await server.kill()
    await expect(tier.read('t', ['a'])).rejects.toMatchObject(down)
    await server.restart()
    expect((await tier.create(by('t'), 'b', draft())).replayed).toBe(false)
  })

  test('keeps a start from succeeding, without a word of the address or the password', async () => {
    const start = connectPostgres({ url: 'postgres://user:hidden@127.0.0.1:1/nowhere' })
    await expect(start).rejects.toMatchObject(down)
    await start.catch((error) => expect(error.message).not.toMatch(/hidden|127|nowhere/))
    const other = new URL(store.url)
    other.pathname = '/no_such_database'
    await expect(connectPostgres({ url: other.href })).rejects.toMatchObject({
      ...down,
      reason: 'POSTGRES_REFUSED',
    })
  })

  test('answers nothing after it was closed', async () => {
    const tier = await store.open()
    await tier[Symbol.asyncDispose]()
    await tier[Symbol.asyncDispose]()
    await expect(tier.read('t', ['a'])).rejects.toMatchObject(down)
  })
})

const SILENT = { dropUp: true, dropDown: true, forGood: true }

/** Resolves when another session of the database is in a transaction and has nothing to do. */
async function someoneIdles(sql: Sql): Promise<void> {
  const idle = `SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'`
  while ((await sql(idle)).length === 0);
}

/** The database by a way that misbehaves on command. */
async function openWay(url: string) {
  const { host, port } = new Client(url)
  const way = await Way.to(host.startsWith('/') ? { path: `${host}/.s.PGSQL.${port}` } : { host, port })
  return Object.assign(way, { url: throughPort(url, way.port) })
}

function throughPort(url: string, port: number): string {
  const through = new URL(url)
  through.hostname = '127.0.0.1'
  through.port = `${port}`
  through.searchParams.delete('host')
  through.searchParams.delete('port')
  return through.href
}

/** A way to the database that can be cut at a COMMIT: before the server gets it, or after it has answered. */
async function openProxy(url: string) {
  const target = new URL(url)
  const socketDirectory = target.searchParams.get('host') ?? decodeURIComponent(target.hostname)
  const sockets = new Set<Socket>()
  let cut: 'before' | 'after' | undefined
  const server = createServer((client) => {
    const upstream = socketDirectory.startsWith('/')
      ? connect(`${socketDirectory}/.s.PGSQL.${target.port || target.searchParams.get('port') || 5432}`)
      : connect(Number(target.port || 5432), target.hostname)
    const end = () => {
      client.destroy()
      upstream.destroy()
    }
    let committing = false
    for (const socket of [client, upstream]) {
      sockets.add(socket)
      socket.on('error', end).on('close', end)
    }
    client.on('data', (data) => {
      committing = cut !== undefined && data.includes('COMMIT\0')
      if (committing && cut === 'before') {
        cut = undefined
        end()
      } else upstream.write(data)
    })
    upstream.on('data', (data) => {
      if (committing) {
        cut = undefined
        end()
      } else client.write(data)
    })
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  return {
    url: throughPort(url, (server.address() as AddressInfo).port),
    cutAtCommit: (when: 'before' | 'after') => {
      cut = when
    },
    [Symbol.asyncDispose]: async () => {
      for (const socket of sockets) socket.destroy()
      server.close()
      await once(server, 'close')
    },
  }
}
