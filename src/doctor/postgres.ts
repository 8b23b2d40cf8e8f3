/** What may be wrong with PostgreSQL: whether it answers, what the role may do, whether the schema is as it must be. */
import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import type { TLSSocket } from 'node:tls'
import { type Config, isLoopback, withoutPasswords } from '../config.ts'
import { pendingMigrations } from '../tiers/migrate.ts'
import { dialPostgres } from '../tiers/postgres.ts'
import { checkClock, checkExpiry, clockAheadMs, reasonOf, roundTripMs, seconds } from './measures.ts'
import type { Report } from './report.ts'

type Connection = Awaited<ReturnType<typeof dialPostgres>>

const TABLES = ['tenants', 'items', 'item_tags', 'invalidations', 'requests'] as const
const TRIGGERS = ['items_log_insert', 'items_log_update', 'items_log_delete', 'items_log_truncate'] as const
/** What an instance has besides its pool: two that follow the log, one that listens. */
const FOLLOWING = 3
const CONNECTIONS_SHARE = 0.8
const ROUND_TRIP_WARNING_MS = 10
const NOTIFIED_WITHIN_MS = 3_000
/** Its rows are made in a transaction that is rolled back. */
const TENANT = 'itemcache-doctor'
const ROLE =
  'Make a role for the service: CREATE ROLE itemcache LOGIN PASSWORD … NOSUPERUSER NOBYPASSRLS, and let it own the database.'

/** Examines the database of `DATABASE_URL`, which so many instances are to use. Changes nothing in it. */
export async function examinePostgres(report: Report, config: Config, instances: number): Promise<void> {
  if (config.database.kind === 'embedded') {
    return report.ok(
      'postgres.configured',
      'a private PostgreSQL, which the service starts by itself: for one instance on one machine',
    )
  }
  const { url } = config.database
  const where = withoutPasswords(url)
  const dial = () =>
    dialPostgres({
      url,
      connectTimeoutMs: config.timeouts.postgresConnectMs,
      statementTimeoutMs: config.timeouts.postgresStatementMs,
      applicationName: 'itemcache-doctor',
    })
  let client: Connection
  try {
    client = await dial()
  } catch (error) {
    return report.fault(
      'postgres.connection',
      `${where} cannot be reached: ${withoutPasswords(reasonOf(error))}`,
      mendConnection(error),
    )
  }
  await using connection = client
  report.ok('postgres.connection', `${where} answers`)
  try {
    await checkServer(report, connection)
    await checkTime(report, connection, config)
    checkWay(report, connection, url)
    await checkRole(report, connection, config)
    const hasSchema = await checkMigrations(report, connection)
    if (hasSchema) {
      await checkRowSecurity(report, connection)
      await checkTriggers(report, connection)
      await checkWrites(report, connection)
    }
    await checkConnections(report, connection, config, instances)
    await checkNotifications(report, connection, dial)
  } catch (error) {
    report.fault(
      'postgres.connection',
      `${where} stopped answering: ${withoutPasswords(reasonOf(error))}`,
      mendConnection(error),
    )
  }
}

function mendConnection(error: unknown): string {
  const { code = '' } = error as { code?: string }
  if (code === '28P01' || code === '28000')
    return 'Compare user and password in DATABASE_URL with pg_hba.conf.'
  if (code === '3D000') return 'Create the database: CREATE DATABASE itemcache OWNER itemcache.'
  if (code === '53300') return 'Raise max_connections, or lower ITEMCACHE_POSTGRES_POOL.'
  if (/certificate|SSL/i.test(reasonOf(error))) {
    return 'Compare sslmode and sslrootcert in DATABASE_URL with the certificate of the server.'
  }
  return 'Is it running, and do address, firewall and DNS lead there? Nothing works without it.'
}

/** The row of a query that has one. */
async function one<T>(client: Connection, sql: string, values: readonly unknown[] = []): Promise<T> {
  const { rows } = await client.query(sql, [...values])
  return rows[0] as T
}

async function checkServer(report: Report, client: Connection): Promise<void> {
  const server = await one<{
    version: string
    number: number
    standby: boolean
    readonly: string
    commit: string
    fsync: string
  }>(
    client,
    `SELECT current_setting('server_version') AS version, current_setting('server_version_num')::integer AS number,
      pg_is_in_recovery() AS standby, current_setting('default_transaction_read_only') AS readonly,
      current_setting('synchronous_commit') AS commit, current_setting('fsync') AS fsync`,
  )
  if (server.number < 150_000) {
    report.fault('postgres.version', `PostgreSQL ${server.version} is too old`, 'Use PostgreSQL 15 or newer.')
  } else report.ok('postgres.version', `PostgreSQL ${server.version}`)
  if (server.standby || server.readonly === 'on') {
    report.fault(
      'postgres.primary',
      server.standby ? 'this server is a standby' : 'transactions are read-only by default',
      'DATABASE_URL must lead to the primary: with several hosts, add target_session_attrs=read-write.',
    )
  } else report.ok('postgres.primary', 'it takes writes')
  if (server.fsync === 'off' || server.commit === 'off') {
    report.fault(
      'postgres.durability',
      `${server.fsync === 'off' ? 'fsync' : 'synchronous_commit'} is off: a crash loses writes that were acknowledged, whose revisions are then used again`,
      'Turn it on, for this role at least.',
    )
  } else report.ok('postgres.durability', 'commits are on disk')
}

async function checkTime(report: Report, client: Connection, { timeouts }: Config): Promise<void> {
  const ms = await roundTripMs(() => client.query('SELECT'))
  const text = `a round trip takes ${seconds(ms)}`
  if (ms > timeouts.softMs) {
    report.fault('postgres.round-trip', text, 'Put the service next to the database, in the same region.')
  } else if (ms > ROUND_TRIP_WARNING_MS) {
    report.warning('postgres.round-trip', text, 'Every miss takes one: put the service next to the database.')
  } else report.ok('postgres.round-trip', text)
  const ahead = await clockAheadMs(async () => {
    const { ms } = await one<{ ms: number }>(
      client,
      'SELECT extract(epoch FROM clock_timestamp())::double precision * 1000 AS ms',
    )
    return ms
  })
  checkClock(report, 'postgres.clock', "PostgreSQL's", ahead)
}

function checkWay(report: Report, client: Connection, url: string): void {
  const { stream } = (client as unknown as { connection: { stream: Partial<TLSSocket> } }).connection
  if (typeof stream.getPeerCertificate === 'function') {
    checkExpiry(report, 'postgres.certificate', "PostgreSQL's", stream.getPeerCertificate().valid_to)
    return
  }
  const { host } = client
  const isLocal = host === '' || host.startsWith('/') || isLoopback(host)
  if (!isLocal && !url.includes('host=/')) {
    report.warning(
      'postgres.tls',
      'the way to PostgreSQL is not encrypted',
      'Add sslmode=verify-full&sslrootcert=FILE to DATABASE_URL.',
    )
  }
}

async function checkRole(report: Report, client: Connection, { auth }: Config): Promise<void> {
  const role = await one<{ name: string; past: boolean; identified: boolean }>(
    client,
    `SELECT rolname AS name, rolsuper OR rolbypassrls AS past,
      has_function_privilege('pg_control_system()', 'EXECUTE') AS identified
      FROM pg_roles WHERE rolname = current_user`,
  )
  if (role.past) {
    const text = `row level security does not hold the role ${role.name}, which is a superuser or has BYPASSRLS`
    if (auth.kind === 'none') report.warning('postgres.role', text, ROLE)
    else report.fault('postgres.role', `${text}: a mistake would show a tenant the items of another`, ROLE)
  } else report.ok('postgres.role', `row level security holds the role ${role.name}`)
  if (!role.identified) {
    report.fault(
      'postgres.identity',
      `the role ${role.name} may not ask which database this is`,
      `GRANT EXECUTE ON FUNCTION pg_control_system() TO ${role.name}`,
    )
  }
}

/** Whether the schema is there. */
async function checkMigrations(report: Report, client: Connection): Promise<boolean> {
  try {
    const { applied, pending } = await pendingMigrations(client)
    if (pending.length === 0) {
      report.ok('postgres.migrations', `all ${applied} are applied`)
      return true
    }
    const { may } = await one<{ may: boolean }>(
      client,
      `SELECT has_schema_privilege(current_schema(), 'CREATE') AS may`,
    )
    const names = pending.map(({ version, name }) => `${version} (${name})`).join(', ')
    if (!may) {
      report.fault(
        'postgres.migrations',
        `${names} are pending, and the role may not create tables`,
        'GRANT CREATE, USAGE ON SCHEMA public to the role, or start one instance as the owner.',
      )
    } else {
      report.warning(
        'postgres.migrations',
        `${names} are pending`,
        'The next start of this release applies them; docs/runbook.md says how to go back.',
      )
    }
    return applied > 0
  } catch (error) {
    const { reason = '' } = error as { reason?: string }
    const code = (error as { code?: string }).code
    if (code === '42501') {
      report.fault('postgres.migrations', `the role may not see them: ${reasonOf(error)}`, ROLE)
    } else {
      report.fault(
        'postgres.migrations',
        reasonOf(error),
        reason === 'SCHEMA_TOO_NEW'
          ? 'Start the release that this database was brought to, or a newer one.'
          : reason === 'SCHEMA_CHANGED'
            ? 'A file of a migration was edited after it had been applied: use the files of the release.'
            : 'docs/docker.md says how to move to another PostgreSQL.',
      )
    }
    return false
  }
}

async function checkRowSecurity(report: Report, client: Connection): Promise<void> {
  const { rows } = await client.query(
    `SELECT relname AS name FROM pg_class
      WHERE oid = ANY (SELECT to_regclass(t) FROM unnest($1::text[]) AS t) AND NOT (relrowsecurity AND relforcerowsecurity)`,
    [TABLES],
  )
  if (rows.length === 0) return report.ok('postgres.row-security', 'on, and forced, for every table')
  const names = rows.map(({ name }: { name: string }) => name)
  report.fault(
    'postgres.row-security',
    `row level security is off for ${names.join(', ')}`,
    names.map((name) => `ALTER TABLE ${name} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY`).join('; '),
  )
}

async function checkTriggers(report: Report, client: Connection): Promise<void> {
  const { rows } = await client.query(
    `SELECT tgname AS name FROM pg_trigger
      WHERE tgrelid = to_regclass('items') AND tgenabled IN ('O', 'A') AND tgname = ANY ($1)`,
    [TRIGGERS],
  )
  const present = new Set(rows.map(({ name }: { name: string }) => name))
  const missing = TRIGGERS.filter((name) => !present.has(name))
  if (missing.length === 0) return report.ok('postgres.triggers', 'every change of an item is logged')
  report.fault(
    'postgres.triggers',
    `changes are not logged, so caches keep old items: ${missing.join(', ')} off`,
    'ALTER TABLE items ENABLE TRIGGER USER, then invalidate everything that was changed meanwhile.',
  )
}

/** What writes do, in a transaction that is rolled back: nobody hears of it. */
async function checkWrites(report: Report, client: Connection): Promise<void> {
  try {
    await client.query('BEGIN')
    await client.query(`SELECT set_config('itemcache.tenant', $1, true)`, [TENANT])
    await client.query(
      `INSERT INTO requests (tenant, request_id, fingerprint) VALUES ($1, 'doctor', 'doctor')`,
      [TENANT],
    )
    await client.query(`INSERT INTO items (tenant, id, title) VALUES ($1, 'doctor', 'doctor')`, [TENANT])
    await client.query(`UPDATE items SET title = 'well' WHERE tenant = $1 AND id = 'doctor'`, [TENANT])
    await client.query(`SELECT itemcache_invalidate($1, 'TENANT_INVALIDATED', 'EXPIRE')`, [TENANT])
    await client.query(`DELETE FROM requests WHERE tenant = $1`, [TENANT])
    await client.query(`DELETE FROM invalidations WHERE tenant = $1`, [TENANT])
    report.ok('postgres.permissions', 'the role may do all that the service does')
  } catch (error) {
    report.fault(
      'postgres.permissions',
      `the role could not do what the service does: ${reasonOf(error)}`,
      'Let it own the tables, or GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public to it.',
    )
  } finally {
    await client.query('ROLLBACK')
  }
}

async function checkConnections(
  report: Report,
  client: Connection,
  { pools }: Config,
  instances: number,
): Promise<void> {
  // Of sessions of other roles, a role without pg_read_all_stats sees no backend_type. PostgreSQL 15 reserves for nobody
  // but superusers.
  const { most, others } = await one<{ most: number; others: number }>(
    client,
    `SELECT least(
        current_setting('max_connections')::integer - current_setting('superuser_reserved_connections')::integer
          - coalesce(current_setting('reserved_connections', true)::integer, 0),
        (SELECT nullif(rolconnlimit, -1) FROM pg_roles WHERE rolname = current_user),
        (SELECT nullif(datconnlimit, -1) FROM pg_database WHERE datname = current_database())
      ) AS most,
      (SELECT count(*)::integer FROM pg_stat_activity
        WHERE usesysid IS NOT NULL AND datid IS NOT NULL
          AND coalesce(backend_type, 'client backend') = 'client backend'
          AND application_name NOT LIKE 'itemcache%') AS others`,
  )
  const each = pools.postgres + FOLLOWING
  const wanted = each * instances + others
  const text = `${instances} instances need ${each} connections each and others have ${others}, of ${most}`
  const mend =
    'Lower ITEMCACHE_POSTGRES_POOL, raise max_connections, or see docs/scaling.md#postgresql for many instances.'
  if (wanted > most) report.fault('postgres.connections', text, mend)
  else if (wanted > most * CONNECTIONS_SHARE) report.warning('postgres.connections', text, mend)
  else report.ok('postgres.connections', text)
}

/** A pooler that lends connections for a transaction swallows LISTEN. */
async function checkNotifications(
  report: Report,
  client: Connection,
  dial: () => Promise<Connection>,
): Promise<void> {
  const channel = `itemcache_doctor_${randomUUID().replaceAll('-', '')}`
  const heard = Promise.withResolvers<boolean>()
  client.on('notification', () => heard.resolve(true))
  await client.query(`LISTEN ${channel}`)
  {
    await using other = await dial()
    await other.query(`NOTIFY ${channel}`)
  }
  const isHeard = await Promise.race([heard.promise, sleep(NOTIFIED_WITHIN_MS, false)])
  if (isHeard) return report.ok('postgres.notifications', 'LISTEN works')
  report.fault(
    'postgres.notifications',
    'a notification did not arrive: changes made elsewhere are seen only every 0.5 s',
    'Go past the pooler, or use its session mode: transaction mode does not carry LISTEN or session settings.',
  )
}
