/**
 * Finds the real PostgreSQL and Redis that tests share, each in this order: `TEST_DATABASE_URL` and `TEST_REDIS_URL`;
 * the private PostgreSQL that is installed in `TEST_POSTGRES_PACKAGES`; containers, when a Docker engine answers (`TEST_POSTGRES_IMAGE`, `TEST_REDIS_IMAGE`); the private servers of a bare
 * start, with their data in a temporary directory. What it starts it stops.
 */
import { join } from 'node:path'
import { Redis } from 'ioredis'
import { Client } from 'pg'
import type { StartedTestContainer } from 'testcontainers'
import type { TestProject } from 'vitest/node'
import { startPostgres } from '../../src/embedded/postgres.ts'
import { startRedis } from '../../src/embedded/redis.ts'
import { postgresPackages } from './postgres-packages.ts'
import { makeRunDirectory, type RunDirectory } from './run-directory.ts'

declare module 'vitest' {
  interface ProvidedContext {
    /** A superuser's URL of a database on the shared server. */
    databaseUrl: string
    redisUrl: string
    /** Where the private PostgreSQL's binaries are unpacked. */
    postgresCache: string
    /** Where an unpacked Redis is kept from run to run. */
    redisCache: string
  }
}

/** A server to use: how to reach it, and what it is. */
interface Found {
  readonly url: string
  readonly what: string
}

const DOCKER_ANSWERS_WITHIN_MS = 3000
const CONTAINER_STARTS_WITHIN_MS = 180_000
const redisCache = join(import.meta.dirname, '..', '..', '.itemcache', 'cache')

export default async function setup(project: TestProject): Promise<() => Promise<void>> {
  await using started = new AsyncDisposableStack()
  const directory = started.use(makeRunDirectory())
  const [postgres, redis] = await Promise.all([
    findPostgres(started, directory),
    findRedis(started, directory),
  ])
  console.log(`Servers for the tests: ${postgres.what}; ${redis.what}`)
  project.provide('databaseUrl', postgres.url)
  project.provide('redisUrl', redis.url)
  project.provide('postgresCache', join(directory.path, 'cache'))
  project.provide('redisCache', redisCache)
  const running = started.move()
  return () => running.disposeAsync()
}

export async function findPostgres(started: AsyncDisposableStack, directory: RunDirectory): Promise<Found> {
  const given = process.env['TEST_DATABASE_URL'] ?? ''
  if (given !== '')
    return { url: given, what: `PostgreSQL ${await postgresVersion(given)} (TEST_DATABASE_URL)` }
  const image = process.env['TEST_POSTGRES_IMAGE'] ?? 'postgres:18-alpine'
  const container =
    postgresPackages === undefined
      ? await startContainer(started, image, 5432, { POSTGRES_PASSWORD: 'itemcache' })
      : undefined
  if (container !== undefined) {
    const url = `postgresql://postgres:itemcache@${container.getHost()}:${container.getMappedPort(5432)}/postgres`
    return { url, what: `PostgreSQL ${await postgresVersion(url)} (container ${image})` }
  }
  try {
    const server = started.use(
      await startPostgres({ dataDir: directory.path, packagesDir: postgresPackages }),
    )
    directory.ends(server.pid, 'SIGQUIT')
    return { url: server.url, what: `PostgreSQL ${server.version} (private)` }
  } catch (cause) {
    const why = (cause as Error).message
    throw new Error(`No PostgreSQL for the tests: start Docker, or set TEST_DATABASE_URL. ${why}`, { cause })
  }
}

/** The server's version, once it takes connections: a container may need a moment after its port is open. */
async function postgresVersion(url: string): Promise<string> {
  for (let attempt = 1; ; attempt++) {
    const client = new Client({ connectionString: url, connectionTimeoutMillis: 5000 })
    try {
      await client.connect()
      const { rows } = await client.query("SELECT current_setting('server_version') AS version")
      return rows[0].version
    } catch (error) {
      if (attempt === 20)
        throw new Error(`PostgreSQL at ${new URL(url).host} does not answer`, { cause: error })
      await new Promise((done) => setTimeout(done, 250))
    } finally {
      await client.end().catch(() => undefined)
    }
  }
}

export async function findRedis(started: AsyncDisposableStack, directory: RunDirectory): Promise<Found> {
  const given = process.env['TEST_REDIS_URL'] ?? ''
  if (given !== '') return { url: given, what: `Redis ${await redisVersion(given)} (TEST_REDIS_URL)` }
  const image = process.env['TEST_REDIS_IMAGE'] ?? 'redis:8-alpine'
  const container = await startContainer(started, image, 6379, {})
  if (container !== undefined) {
    const url = `redis://${container.getHost()}:${container.getMappedPort(6379)}`
    return { url, what: `Redis ${await redisVersion(url)} (container ${image})` }
  }
  const server = await startRedis({ dataDir: directory.path, cacheDir: redisCache, log: console.log })
  if ('unavailable' in server) {
    throw new Error(`No Redis for the tests: start Docker, or set TEST_REDIS_URL. ${server.unavailable}`)
  }
  started.use(server)
  directory.ends(server.pid, 'SIGKILL')
  return { url: server.url, what: `${server.version} (private)` }
}

async function redisVersion(url: string): Promise<string> {
  const redis = new Redis(url.replace(/^unix:/, ''), {
    lazyConnect: true,
    retryStrategy: (times) => (times < 20 ? 250 : null),
  })
  redis.on('error', () => undefined)
  try {
    const info = await redis.info('server')
    return /redis_version:(\S+)/.exec(info)?.[1] ?? 'of unknown version'
  } catch (error) {
    throw new Error(`Redis at ${new URL(url).host} does not answer`, { cause: error })
  } finally {
    redis.disconnect()
  }
}

/** A started container; `undefined` when no engine answers, or, with a printed reason, when the image fails. */
async function startContainer(
  started: AsyncDisposableStack,
  image: string,
  port: number,
  environment: Record<string, string>,
): Promise<StartedTestContainer | undefined> {
  const { GenericContainer, getContainerRuntimeClient } = await import('testcontainers')
  try {
    await within(DOCKER_ANSWERS_WITHIN_MS, getContainerRuntimeClient())
  } catch {
    return undefined
  }
  const starting = new GenericContainer(image).withEnvironment(environment).withExposedPorts(port).start()
  // A container that comes too late is stopped, too.
  started.defer(() =>
    starting.then(
      async (container) => void (await container.stop()),
      () => undefined,
    ),
  )
  try {
    return await within(CONTAINER_STARTS_WITHIN_MS, starting)
  } catch (error) {
    console.log(`Docker answers, but ${image} does not start: ${(error as Error).message}`)
    return undefined
  }
}

function within<T>(ms: number, promise: Promise<T>): Promise<T> {
  const { promise: late, reject } = Promise.withResolvers<never>()
  const timer = setTimeout(() => reject(new Error(`it took longer than ${ms / 1000} s`)), ms)
  return Promise.race([promise, late]).finally(() => clearTimeout(timer))
}
