/**
 * The servers that test files use. Shared: a PostgreSQL, on which each file has databases of its own, and a Redis,
 * whose keys the tests keep apart by the database. Own: a server that one test may kill, pause and restart.
 */
import { spawnSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { existsSync, readFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { Client } from 'pg'
import { inject } from 'vitest'
import { startPostgres } from '../../src/embedded/postgres.ts'
import { findProcess } from '../../src/embedded/processes.ts'
import { startRedis } from '../../src/embedded/redis.ts'
import { postgresPackages } from './postgres-packages.ts'
import { makeRunDirectory } from './run-directory.ts'

/** A new database on the shared PostgreSQL, dropped when disposed, whoever is still connected. */
export interface FreshDatabase extends AsyncDisposable {
  /** As its owner, who is no superuser: row level security holds. */
  readonly url: string
  readonly superuserUrl: string
  readonly name: string
}

export async function freshDatabase(): Promise<FreshDatabase> {
  const name = `itemcache_test_${randomBytes(8).toString('hex')}`
  // Test files that run at the same time make the same role.
  await administer(`DO $$ BEGIN
    CREATE ROLE ${OWNER} LOGIN PASSWORD '${OWNER}' NOSUPERUSER NOBYPASSRLS;
  EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
  END $$`)
  await administer(`CREATE DATABASE ${name} TEMPLATE template0 OWNER ${OWNER}`)
  const url = new URL(inject('databaseUrl'))
  url.pathname = `/${name}`
  const superuserUrl = url.href
  url.username = OWNER
  url.password = OWNER
  return {
    url: url.href,
    superuserUrl,
    name,
    [Symbol.asyncDispose]: () => administer(`DROP DATABASE IF EXISTS ${name} WITH (FORCE)`),
  }
}

const OWNER = 'itemcache_test'

async function administer(statement: string): Promise<void> {
  const client = new Client({ connectionString: inject('databaseUrl') })
  await client.connect()
  try {
    await client.query(statement)
  } finally {
    await client.end()
  }
}

/** The shared Redis, as `REDIS_URL` takes it. Never flush it: other files use it at the same time. */
export function redisUrl(): string {
  return inject('redisUrl')
}

/** A server that belongs to one test. Its URL stays the same over restarts. */
export interface OwnServer extends AsyncDisposable {
  readonly url: string
  /** Ends it as a crash would: nothing is written out, connections break. */
  kill(): Promise<void>
  /** It stops answering, but stays connected and takes connections. */
  pause(): void
  resume(): void
  /** Ends it in an orderly way. */
  stop(): Promise<void>
  /** Starts it again on the same data, after `stop` or `kill`; stops it first when it runs. */
  restart(): Promise<void>
}

/** A private PostgreSQL for fault tests: database `itemcache`, empty. */
export function freshPostgres(): Promise<OwnServer> {
  return own((dataDir) =>
    startPostgres({ dataDir, cacheDir: inject('postgresCache'), packagesDir: postgresPackages }),
  )
}

/** A private Redis for fault tests. */
export function freshRedis(): Promise<OwnServer> {
  return own(async (dataDir) => {
    const server = await startRedis({ dataDir, cacheDir: inject('redisCache') })
    if ('unavailable' in server) throw new Error(server.unavailable)
    return server
  })
}

interface Started {
  readonly url: string
  readonly pid: number
  stop(): Promise<void>
}

async function own(start: (dataDir: string) => Promise<Started>): Promise<OwnServer> {
  await using held = new AsyncDisposableStack()
  const directory = held.use(makeRunDirectory())
  let server = await start(directory.path)
  directory.ends(server.pid, 'SIGKILL')
  const signalAll = (signal: NodeJS.Signals) => {
    for (const pid of [server.pid, ...childrenOf(server.pid)]) signalIfAlive(pid, signal)
  }
  const stop = async () => {
    if (findProcess(server.pid) !== undefined) signalAll('SIGCONT')
    await server.stop()
  }
  held.defer(stop)
  const kept = held.move()
  return {
    url: server.url,
    kill: async () => {
      signalAll('SIGKILL')
      while (findProcess(server.pid) !== undefined) await sleep(5)
    },
    pause: () => signalAll('SIGSTOP'),
    resume: () => signalAll('SIGCONT'),
    stop,
    restart: async () => {
      await stop()
      server = await start(directory.path)
      directory.ends(server.pid, 'SIGKILL')
    },
    [Symbol.asyncDispose]: () => kept.disposeAsync(),
  }
}

/** A child may end between being found and being told. */
function signalIfAlive(pid: number, signal: NodeJS.Signals): void {
  try {
    process.kill(pid, signal)
  } catch (error) {
    if (!(error instanceof Error && 'code' in error && error.code === 'ESRCH')) throw error
  }
}

/** PostgreSQL works in child processes, each in a process group of its own. */
function childrenOf(pid: number): number[] {
  const list = existsSync('/proc/self/stat')
    ? readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8')
    : spawnSync('pgrep', ['-P', `${pid}`], { encoding: 'utf8' }).stdout
  return list.split(/\s/).filter(Boolean).map(Number)
}
