/**
 * The servers that test files use. Shared: a PostgreSQL, on which each file has databases of its own, and a Redis,
 * whose keys the tests keep apart by the database. Own: a server that one test may kill, pause and restart.
 */
import { randomBytes } from 'node:crypto'
import { Client } from 'pg'
import { inject } from 'vitest'
import { startPostgres } from '../../src/embedded/postgres.ts'
import { type OwnServer, ownRedis, ownServer } from './own-server.ts'
import { postgresPackages } from './postgres-packages.ts'

export type { OwnServer } from './own-server.ts'

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

/** A private PostgreSQL for fault tests: database `itemcache`, empty. */
export function freshPostgres(): Promise<OwnServer> {
  return ownServer((dataDir) =>
    startPostgres({ dataDir, cacheDir: inject('postgresCache'), packagesDir: postgresPackages }),
  )
}

/** A private Redis for fault tests. */
export function freshRedis(): Promise<OwnServer> {
  return ownRedis(inject('redisCache'))
}
