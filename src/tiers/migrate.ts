/** Brings a database to the schema of this release: numbered SQL files, each applied once, all or none. */
import { createHash } from 'node:crypto'
import { readdir, readFile } from 'node:fs/promises'
import { ItemCacheError } from '../errors.ts'

/** A connection of its own to the database, without a transaction. */
export interface SqlConnection {
  query(sql: string, values?: unknown[]): Promise<{ readonly rows: unknown[] }>
}

/** One file of `migrations/`: `0001_tables.sql` has version 1 and name `tables`. */
export interface Migration {
  readonly version: number
  readonly name: string
  readonly sql: string
}

/** "itemcach" in ASCII: the advisory lock that instances which start at once take in turn. */
const LOCK = '7598809991774036840'

/** The migrations of this release, in order. */
export async function knownMigrations(): Promise<readonly Migration[]> {
  const folder = new URL('./migrations/', import.meta.url)
  const files = (await readdir(folder)).filter((file) => file.endsWith('.sql')).sort()
  return Promise.all(
    files.map(async (file, index) => {
      const [, digits = '', name = ''] = /^(\d{4})_([a-z_]+)\.sql$/.exec(file) ?? []
      if (Number(digits) !== index + 1) {
        throw new ItemCacheError('internal', `migration ${file} should be number ${index + 1}`)
      }
      return { version: index + 1, name, sql: await readFile(new URL(file, folder), 'utf8') }
    }),
  )
}

/**
 * Applies what is missing, in one transaction, and returns how many migrations that were. Waits for another
 * instance that does the same. Throws `unavailable` with reason `SCHEMA_TOO_NEW`, `SCHEMA_CHANGED` or
 * `POSTGRES_UNSUITABLE` when the database is not one that this release can work with; then nothing is changed.
 */
export async function migrate(client: SqlConnection, migrations?: readonly Migration[]): Promise<number> {
  const known = migrations ?? (await knownMigrations())
  await checkServer(client)
  await client.query('BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE')
  try {
    await client.query(`SET LOCAL lock_timeout = '60s'; SET LOCAL statement_timeout = 0`)
    await client.query('SELECT pg_advisory_xact_lock($1)', [LOCK])
    await client.query(`CREATE TABLE IF NOT EXISTS itemcache_migrations (
      version integer PRIMARY KEY, name text NOT NULL, checksum text NOT NULL,
      applied_at timestamptz NOT NULL DEFAULT now()
    )`)
    const applied = await appliedChecksums(client)
    checkHistory(known, applied)
    const missing = known.filter(({ version }) => !applied.has(version))
    for (const migration of missing) {
      await client.query(migration.sql)
      await client.query('INSERT INTO itemcache_migrations (version, name, checksum) VALUES ($1, $2, $3)', [
        migration.version,
        migration.name,
        checksum(migration),
      ])
    }
    await client.query('COMMIT')
    return missing.length
  } catch (error) {
    // The first error is the one worth reporting; a connection that is gone has rolled back by itself.
    await client.query('ROLLBACK').catch(() => undefined)
    throw error
  }
}

/** What a database lacks of the schema of this release, without changing anything. Throws as `migrate` does. */
export async function pendingMigrations(
  client: SqlConnection,
  migrations?: readonly Migration[],
): Promise<{ readonly applied: number; readonly pending: readonly Migration[] }> {
  const known = migrations ?? (await knownMigrations())
  await checkServer(client)
  const { rows } = await client.query(`SELECT to_regclass('itemcache_migrations') IS NOT NULL AS exists`)
  const applied = (rows[0] as { exists: boolean }).exists ? await appliedChecksums(client) : new Map()
  checkHistory(known, applied)
  return { applied: applied.size, pending: known.filter(({ version }) => !applied.has(version)) }
}

async function checkServer(client: SqlConnection): Promise<void> {
  const { rows } = await client.query(
    `SELECT current_setting('server_version_num')::integer AS version,
      current_setting('server_encoding') AS encoding, current_schema() AS schema`,
  )
  const server = rows[0] as { version: number; encoding: string; schema: string | null } | undefined
  const problem =
    server === undefined || server.version < 150_000
      ? 'PostgreSQL 15 or newer is needed'
      : server.encoding !== 'UTF8'
        ? `the database must have the encoding UTF8, it has ${server.encoding}`
        : server.schema === null
          ? 'no schema of the search_path exists'
          : undefined
  if (problem !== undefined)
    throw new ItemCacheError('unavailable', problem, { reason: 'POSTGRES_UNSUITABLE' })
}

async function appliedChecksums(client: SqlConnection): Promise<ReadonlyMap<number, string>> {
  const { rows } = await client.query('SELECT version, checksum FROM itemcache_migrations')
  return new Map((rows as { version: number; checksum: string }[]).map((row) => [row.version, row.checksum]))
}

function checkHistory(known: readonly Migration[], applied: ReadonlyMap<number, string>): void {
  const newest = Math.max(0, ...applied.keys())
  if (newest > known.length) {
    throw new ItemCacheError(
      'unavailable',
      `the database has schema version ${newest}, this release knows ${known.length}: start a newer release`,
      { reason: 'SCHEMA_TOO_NEW' },
    )
  }
  for (const migration of known) {
    const recorded = applied.get(migration.version)
    if (recorded !== undefined && recorded !== checksum(migration)) {
      throw new ItemCacheError(
        'unavailable',
        `migration ${migration.version} (${migration.name}) is not the one that was applied to this database`,
        { reason: 'SCHEMA_CHANGED' },
      )
    }
  }
}

function checksum({ sql }: Migration): string {
  return createHash('sha256').update(sql).digest('hex')
}
