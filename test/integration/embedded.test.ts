import { spawn } from 'node:child_process'
import {
  chmodSync,
  existsSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs'
import { dirname, join } from 'node:path'
import { createInterface } from 'node:readline'
import { Redis } from 'ioredis'
import { Client } from 'pg'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, inject, test, vi } from 'vitest'
import { startPostgres } from '../../src/embedded/postgres.ts'
import { claimDataDir, findProcess } from '../../src/embedded/processes.ts'
import { findRedis, type RedisProgram, startRedis } from '../../src/embedded/redis.ts'
import { ItemCacheError } from '../../src/errors.ts'
import { makeRunDirectory, type RunDirectory } from '../support/run-directory.ts'

/** A server program, and a directory that all tests with PostgreSQL share, because creating its data takes a second. */
let program: RedisProgram
let shared: RunDirectory
beforeAll(async () => {
  program = await findRedis(inject('redisCache'), console.log)
  shared = makeRunDirectory()
})
afterAll(() => shared[Symbol.asyncDispose]())

let directory: RunDirectory
beforeEach(() => {
  directory = makeRunDirectory()
})
afterEach(async () => {
  vi.unstubAllEnvs()
  await directory[Symbol.asyncDispose]()
})

function postgres() {
  return startPostgres({ dataDir: shared.path, cacheDir: inject('postgresCache') })
}

async function redis({ path: dataDir } = directory) {
  const started = await startRedis({ dataDir, cacheDir: inject('redisCache') })
  if ('unavailable' in started) throw new Error(started.unavailable)
  return started
}

async function sql(url: string, statement: string) {
  const client = new Client({ connectionString: url })
  await client.connect()
  try {
    return (await client.query(statement)).rows
  } finally {
    await client.end()
  }
}

async function redisCommand(url: string, name: string, ...args: string[]) {
  const client = new Redis({ path: url.slice('unix:'.length) })
  try {
    return await client.call(name, ...args)
  } finally {
    client.disconnect()
  }
}

/** Starts a process that owns the data directory and both servers, and says so. */
async function otherService(options: { detached?: boolean } = {}) {
  const room = join(import.meta.dirname, '..', '..', 'src', 'embedded')
  const [cacheDir, redisCache] = [inject('postgresCache'), inject('redisCache')]
  const program = `
    const { startPostgres } = await import(${JSON.stringify(join(room, 'postgres.ts'))})
    const { startRedis } = await import(${JSON.stringify(join(room, 'redis.ts'))})
    const dataDir = ${JSON.stringify(shared.path)}
    const [postgres, redis] = await Promise.all([
      startPostgres({ dataDir, cacheDir: ${JSON.stringify(cacheDir)} }),
      startRedis({ dataDir, cacheDir: ${JSON.stringify(redisCache)} }),
    ])
    process.on('SIGINT', () => console.log('interrupted'))
    process.stdin.on('end', async () => { await postgres.stop(); await redis.stop() }).resume()
    console.log(JSON.stringify({ postgres, redis }))`
  const args = ['--input-type=module', '-e', program]
  const child = spawn(process.execPath, args, { stdio: ['pipe', 'pipe', 'inherit'], ...options })
  const lines = createInterface(child.stdout)[Symbol.asyncIterator]()
  const exited = new Promise<void>((done) => child.once('exit', () => done()))
  const { value = '' } = await lines.next()
  const servers: { postgres: { pid: number; url: string }; redis: { pid: number; url: string } } =
    JSON.parse(value)
  shared.ends(servers.postgres.pid, 'SIGQUIT')
  shared.ends(servers.redis.pid, 'SIGKILL')
  return { child, lines, exited, pid: child.pid ?? 0, ...servers }
}

describe('the private PostgreSQL', () => {
  test('lets the service in as the owner of its database, whom row level security holds', async () => {
    await using server = await postgres()
    const who = 'SELECT rolname, rolsuper, rolbypassrls FROM pg_roles WHERE rolname = current_user'
    expect(await sql(server.serviceUrl, who)).toEqual([
      { rolname: 'itemcache', rolsuper: false, rolbypassrls: false },
    ])
    await sql(server.serviceUrl, 'CREATE TABLE own (); DROP TABLE own')
  })

  test('hands what an earlier release has left to that role', async () => {
    {
      await using earlier = await postgres()
      await sql(earlier.url, 'CREATE TABLE old AS SELECT 1 AS n; ALTER DATABASE itemcache OWNER TO postgres')
      await sql(earlier.url, 'CREATE FUNCTION old_function() RETURNS integer LANGUAGE sql AS $$ SELECT 1 $$')
      const [{ data }] = (await sql(earlier.url, 'SHOW data_directory')).map((row) => ({
        data: row.data_directory,
      })) as [{ data: string }]
      rmSync(join(data, 'itemcache-role'))
    }
    await using server = await postgres()
    await sql(
      server.serviceUrl,
      'DROP FUNCTION old_function(); DROP TABLE old; CREATE TABLE new (); DROP TABLE new',
    )
  })

  test('is a real server in UTF-8 that keeps what is written over a restart', async () => {
    {
      await using first = await postgres()
      await sql(first.url, "CREATE TABLE words AS SELECT 'Grüße' AS word")
    }
    await using second = await postgres()
    expect(await sql(second.url, 'SELECT word, current_database() AS name FROM words')).toEqual([
      { word: 'Grüße', name: 'itemcache' },
    ])
    const [settings] = await sql(
      second.url,
      "SELECT current_setting('server_version') AS version, current_setting('fsync') AS fsync, current_setting('listen_addresses') AS addresses, current_setting('server_encoding') AS encoding",
    )
    expect(settings).toEqual({ version: second.version, fsync: 'on', addresses: '', encoding: 'UTF8' })
  })

  test('is not led astray by the variables that PostgreSQL and its clients read', async () => {
    for (const [name, value] of Object.entries({
      PGPORT: '1',
      PGDATA: '/nowhere',
      PGHOST: 'nowhere',
      TZ: 'x',
      LC_ALL: 'x',
    })) {
      vi.stubEnv(name, value)
    }
    await using server = await postgres()
    expect(await sql(server.url, "SELECT current_setting('TimeZone') AS zone")).toEqual([{ zone: 'UTC' }])
  })

  test('leaves neither a process nor a socket nor a claim when it stops', async () => {
    const server = await postgres()
    const sockets = new URL(server.url).searchParams.get('host') ?? ''
    expect(statSync(sockets).mode & 0o777).toBe(0o700)
    await server.stop()
    await server.stop()
    expect(findProcess(server.pid)).toBeUndefined()
    expect(existsSync(sockets)).toBe(false)
    expect(existsSync(join(shared.path, 'owner'))).toBe(false)
  })

  test('stops within its bound although clients are busy', async () => {
    const server = await postgres()
    const busy = sql(server.url, 'SELECT pg_sleep(600)').catch((error: Error) => error)
    await expect
      .poll(() => sql(server.url, "SELECT 1 FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'"))
      .toHaveLength(1)
    await server.stop()
    expect(await busy).toBeInstanceOf(Error)
  })

  test('starts although a pid file names a process that is something else by now', async () => {
    await (await postgres()).stop()
    const data = join(shared.path, 'postgres', 'data')
    // PostgreSQL itself sees through a process of another user, but not through one of its own.
    const { uid, gid } = statSync(data)
    const stranger = spawn('sleep', ['60'], process.getuid?.() === 0 ? { uid, gid, cwd: '/' } : {})
    const pidFile = `${stranger.pid}\n${data}\n1\n5432\n/tmp\n\n0 0\nready\n`
    writeFileSync(join(data, 'postmaster.pid'), pidFile)
    try {
      await using server = await postgres()
      expect(await sql(server.url, 'SELECT 1 AS one')).toEqual([{ one: 1 }])
      expect(findProcess(stranger.pid ?? 0)).toBeDefined()
    } finally {
      stranger.kill()
    }
  })

  test('refuses the data of another major version in one sentence', async () => {
    await (await postgres()).stop()
    const file = join(shared.path, 'postgres', 'data', 'PG_VERSION')
    const version = readFileSync(file)
    writeFileSync(file, '9.6\n')
    await expect(postgres()).rejects.toThrow(
      /holds data of PostgreSQL 9\.6, .* set ITEMCACHE_DATA_DIR .* or DATABASE_URL\.$/,
    )
    writeFileSync(file, version)
    expect(existsSync(join(shared.path, 'owner'))).toBe(false)
  })

  test('begins anew when the first start was cut off half-way', async () => {
    await (await postgres()).stop()
    const data = join(shared.path, 'postgres', 'data')
    renameSync(data, `${data}.new`)
    rmSync(join(`${data}.new`, 'global'), { recursive: true })
    await using server = await postgres()
    expect(await sql(server.url, 'SELECT 1 AS one')).toEqual([{ one: 1 }])
  })
})

describe('the private Redis', () => {
  test('keeps its copies over a restart and evicts by least recent use', async () => {
    {
      await using first = await redis()
      expect(first.version).toMatch(/^\w+ \d+\.\d+/)
      await redisCommand(first.url, 'SET', 'copy', '1')
    }
    await using second = await redis()
    expect(await redisCommand(second.url, 'GET', 'copy')).toBe('1')
    expect(await redisCommand(second.url, 'CONFIG', 'GET', 'maxmemory*')).toEqual(
      expect.arrayContaining(['maxmemory-policy', 'allkeys-lru', 'maxmemory', `${256 * 2 ** 20}`]),
    )
  })

  test('leaves neither a process nor a socket when it stops', async () => {
    const server = await redis()
    await server.stop()
    expect(findProcess(server.pid)).toBeUndefined()
    expect(existsSync(dirname(server.url.slice('unix:'.length)))).toBe(false)
  })

  test('starts empty when the copies it kept cannot be read', async () => {
    await (await redis()).stop()
    writeFileSync(join(directory.path, 'redis', 'dump.rdb'), 'REDIS9999 from the future')
    await using server = await redis()
    expect(await redisCommand(server.url, 'DBSIZE')).toBe(0)
  })

  test.each(['redis-server', 'valkey-server'])('is the %s on the PATH when there is one', async (name) => {
    const file = join(directory.path, name)
    const libraries = program.env['LD_LIBRARY_PATH'] ?? ''
    writeFileSync(file, `#!/bin/sh\nexport LD_LIBRARY_PATH='${libraries}'\nexec '${program.file}' "$@"\n`)
    chmodSync(file, 0o755)
    vi.stubEnv('PATH', `${directory.path}:/usr/bin:/bin`)
    expect(await findRedis('/nowhere', console.log)).toMatchObject({ file, version: program.version })
    await using server = await redis()
    expect(await redisCommand(server.url, 'PING')).toBe('PONG')
  })

  test('is off, with a sentence that says how to turn it on, where none can be had', async () => {
    const old = join(directory.path, 'redis-server')
    writeFileSync(old, '#!/bin/sh\necho "Redis server v=6.0.16 sha=0 malloc=libc bits=64 build=0"\n')
    chmodSync(old, 0o755)
    vi.stubEnv('PATH', directory.path)
    const answer = await startRedis({ dataDir: directory.path })
    expect(answer).toEqual({
      unavailable: expect.stringMatching(
        /redis-server cannot be used \(version 6\.0\.16 is older than 6\.2\), and no private copy .* Install Redis 6\.2 or newer \(or Valkey\), or set REDIS_URL\.$/,
      ),
    })
    expect(readdirSync(directory.path).sort()).toEqual(['cache', 'redis-server'])
  })
})

describe('the data directory', () => {
  test('belongs to one service at a time, and the second is told whose it is and what to do', async () => {
    const other = await otherService()
    const refused = await postgres().catch((error: unknown) => error)
    expect(refused).toBeInstanceOf(ItemCacheError)
    expect(refused).toMatchObject({ code: 'unavailable', reason: 'DATA_DIR_IN_USE' })
    const { message } = refused as ItemCacheError
    for (const part of [
      `process ${other.pid}`,
      shared.path,
      'ITEMCACHE_DATA_DIR',
      'DATABASE_URL',
      'REDIS_URL',
    ]) {
      expect(message).toContain(part)
    }
    await expect(redis(shared)).rejects.toThrow(message)
    other.child.stdin.end()
    await other.exited
    await using server = await postgres()
    expect(await sql(server.url, 'SELECT 1 AS one')).toEqual([{ one: 1 }])
  })

  test('of a killed service is taken over, with its servers stopped and its data kept', async () => {
    const killed = await otherService()
    await sql(killed.postgres.url, 'CREATE TABLE kept AS SELECT 1 AS n')
    await redisCommand(killed.redis.url, 'SET', 'copy', '1')
    killed.child.kill('SIGKILL')
    await killed.exited
    expect(findProcess(killed.postgres.pid)).toBeDefined()
    expect(findProcess(killed.redis.pid)).toBeDefined()

    await using server = await postgres()
    await using cache = await redis(shared)
    expect(findProcess(killed.postgres.pid)).toBeUndefined()
    expect(findProcess(killed.redis.pid)).toBeUndefined()
    expect(await sql(server.url, 'SELECT n FROM kept')).toEqual([{ n: 1 }])
    expect(await redisCommand(cache.url, 'GET', 'copy')).toBe('1')
  })

  test('claimed by a process whose id is used again is taken over', async () => {
    writeFileSync(join(directory.path, 'owner'), `${process.pid} an earlier time\n`)
    const claim = await claimDataDir(directory.path)
    expect(readFileSync(join(directory.path, 'owner'), 'utf8')).not.toContain('an earlier time')
    await claim[Symbol.asyncDispose]()
    expect(readdirSync(directory.path)).toEqual([])
  })

  test('that cannot be written to is named, with what to do', async () => {
    const file = join(directory.path, 'file')
    writeFileSync(file, '')
    await expect(claimDataDir(join(file, 'data'))).rejects.toThrow(
      /cannot be written to \(ENOTDIR\)\. Set ITEMCACHE_DATA_DIR/,
    )
  })

  test('keeps serving while Ctrl-C reaches the whole process group of the service', async () => {
    const service = await otherService({ detached: true })
    process.kill(-service.pid, 'SIGINT')
    expect(await service.lines.next()).toMatchObject({ value: 'interrupted' })
    expect(await sql(service.postgres.url, 'SELECT 1 AS one')).toEqual([{ one: 1 }])
    expect(await redisCommand(service.redis.url, 'PING')).toBe('PONG')
    service.child.stdin.end()
    await service.exited
    expect(findProcess(service.postgres.pid)).toBeUndefined()
    expect(findProcess(service.redis.pid)).toBeUndefined()
  })
})

test('a stranger who took the socket directory first is not trusted', async () => {
  const server = await redis()
  const sockets = dirname(server.url.slice('unix:'.length))
  await server.stop()
  writeFileSync(sockets, '')
  const answer = await startRedis({ dataDir: directory.path, cacheDir: inject('redisCache') })
  expect(answer).toEqual({ unavailable: expect.stringContaining(`${sockets} is not a directory of user`) })
  rmSync(sockets)
})
