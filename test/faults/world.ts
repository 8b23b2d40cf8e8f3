/**
 * What the fault matrix breaks: a PostgreSQL, a Redis and a catalogue as processes of their own, and an instance of the
 * service as another, which reaches each of them by a way that misbehaves on command.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { join, resolve } from 'node:path'
import { createInterface } from 'node:readline'
import type pg from 'pg'
import { startPostgres } from '../../src/embedded/postgres.ts'
import { connectSql, Instance } from '../consistency/servers.ts'
import { Way } from '../consistency/way.ts'
import { type OwnServer, ownRedis, ownServer } from '../support/own-server.ts'
import { postgresPackages } from '../support/postgres-packages.ts'
import type { RunDirectory } from '../support/run-directory.ts'

const ROOT = resolve(import.meta.dirname, '..', '..')
const CATALOGUE = join(import.meta.dirname, 'catalogue.ts')

/** Where things are kept. */
export interface Places {
  /** For the service's log. */
  readonly directory: RunDirectory
  /** Where the binaries of the private PostgreSQL and Redis are unpacked. */
  readonly postgresCache: string
  readonly redisCache: string
}

/** One thing that can break. */
export interface Dependency {
  readonly way: Way
  /** SIGKILL. */
  kill(): Promise<void>
  /** Starts it again after `kill`; resolves when it answers. */
  restart(): Promise<void>
  /** SIGSTOP, and SIGCONT. */
  pause(): void
  resume(): void
}

export type DependencyName = 'redis' | 'postgres' | 'origin'

export interface World extends AsyncDisposable {
  /** Of gRPC, and of the admin server. */
  readonly address: string
  readonly admin: string
  /** Where the service's log is. */
  readonly logFile: string
  readonly dependencies: Readonly<Record<DependencyName, Dependency>>
  /** A connection to the database that goes past the way. */
  connectSql(): Promise<pg.Client & AsyncDisposable>
}

export interface WorldOptions {
  /** Of the service, besides what names its dependencies. */
  readonly env?: Readonly<Record<string, string>>
  /** The service reaches Redis without a way in between. */
  readonly directly?: boolean
}

/** Starts everything. */
export async function startWorld(
  { directory, postgresCache, redisCache }: Places,
  { env = {}, directly = false }: WorldOptions = {},
): Promise<World> {
  await using started = new AsyncDisposableStack()
  const [database, redis, catalogue] = await allOf(started, [
    ownServer((dataDir) =>
      startPostgres({ dataDir, cacheDir: postgresCache, packagesDir: postgresPackages }),
    ),
    ownRedis(redisCache),
    CatalogueProcess.start(),
  ])
  const { searchParams } = new URL(database.url)
  const postgresWay = started.use(await Way.to({ path: `${searchParams.get('host')}/.s.PGSQL.5432` }))
  const redisWay = started.use(await Way.to({ path: redis.url.replace('unix:', '') }))
  const originWay = started.use(await Way.to({ host: '127.0.0.1', port: catalogue.port }))
  const logFile = join(directory.path, 'service.log')
  const service = started.use(
    new Instance(
      'service',
      ROOT,
      {
        DATABASE_URL: `postgres://itemcache@127.0.0.1:${postgresWay.port}/itemcache`,
        REDIS_URL: directly ? redis.url : `redis://127.0.0.1:${redisWay.port}`,
        ORIGIN_URL: `http://127.0.0.1:${originWay.port}`,
        ITEMCACHE_LISTEN: '127.0.0.1:0',
        ITEMCACHE_ADMIN_LISTEN: '127.0.0.1:0',
        ITEMCACHE_LOG_LEVEL: 'info',
        ...env,
      },
      logFile,
    ),
  )
  await service.start()
  if (service.pid !== undefined) directory.ends(service.pid, 'SIGKILL')
  await using sql = await connectSql(database.url)
  // Nothing of this is a loss of power, and other work on this machine should not be what is measured.
  await sql.query('ALTER SYSTEM SET fsync = off')
  await sql.query('SELECT pg_reload_conf()')
  const running = started.move()
  return {
    address: service.address,
    admin: service.admin,
    logFile,
    dependencies: {
      redis: dependency(redis, redisWay),
      postgres: dependency(database, postgresWay),
      origin: {
        way: originWay,
        kill: () => catalogue.kill(),
        restart: async () => {
          await catalogue.restart()
          originWay.retarget({ host: '127.0.0.1', port: catalogue.port }, true)
        },
        pause: () => catalogue.signal('SIGSTOP'),
        resume: () => catalogue.signal('SIGCONT'),
      },
    },
    connectSql: () => connectSql(database.url),
    [Symbol.asyncDispose]: () => running.disposeAsync(),
  }
}

/** Waits for all of them, so that those which have started are disposed when another one fails. */
async function allOf<T extends readonly AsyncDisposable[]>(
  started: AsyncDisposableStack,
  starting: { readonly [K in keyof T]: Promise<T[K]> },
): Promise<T> {
  const settled = await Promise.allSettled(starting)
  for (const one of settled) if (one.status === 'fulfilled') started.use(one.value as AsyncDisposable)
  return (await Promise.all(starting)) as unknown as T
}

function dependency(server: OwnServer, way: Way): Dependency {
  return {
    way,
    kill: () => server.kill(),
    restart: () => server.restart(),
    pause: () => server.pause(),
    resume: () => server.resume(),
  }
}

class CatalogueProcess implements AsyncDisposable {
  #process: ChildProcess | undefined
  /** Another one after each start. */
  port = 0

  static async start(): Promise<CatalogueProcess> {
    const catalogue = new CatalogueProcess()
    await catalogue.restart()
    return catalogue
  }

  async restart(): Promise<void> {
    await this.kill()
    const child = spawn(process.execPath, [CATALOGUE], { stdio: ['pipe', 'pipe', 'inherit'] })
    this.#process = child
    for await (const line of createInterface({ input: child.stdout })) {
      this.port = Number(new URL(line).port)
      return
    }
    throw new Error('the catalogue ended before it was ready')
  }

  signal(signal: 'SIGSTOP' | 'SIGCONT'): void {
    this.#process?.kill(signal)
  }

  async kill(): Promise<void> {
    const child = this.#process
    this.#process = undefined
    if (child === undefined || child.exitCode !== null || child.signalCode !== null) return
    const gone = once(child, 'exit')
    child.kill('SIGKILL')
    await gone
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.kill()
  }
}
