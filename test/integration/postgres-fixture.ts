/** What the tests of the PostgreSQL tier start from: a database of their own, the tier on it, and a psql of sorts. */
import { Client } from 'pg'
import type { ItemDraft } from '../../src/item.ts'
import { connectPostgres, type PostgresOptions, type PostgresTier } from '../../src/tiers/postgres.ts'
import type { WriteContext } from '../../src/tiers/tier.ts'
import { freshDatabase } from '../support/servers.ts'

type Row = Record<string, unknown>

/** A connection like that of somebody who types SQL. Rows come as the driver delivers them: int8 is text. */
export interface Sql extends AsyncDisposable {
  (text: string, values?: unknown[]): Promise<Row[]>
  readonly client: Client
}

export interface Store extends AsyncDisposable {
  readonly url: string
  readonly tier: PostgresTier
  readonly sql: Sql
  /** Another connection. It is closed with the store. */
  session(): Promise<Sql>
  /** The same, as a superuser. */
  superuser(): Promise<Sql>
  /** Another tier on the same database. It is closed with the store. */
  open(options?: Partial<PostgresOptions>): Promise<PostgresTier>
}

export async function openStore(options: Partial<PostgresOptions> = {}): Promise<Store> {
  const started = new AsyncDisposableStack()
  const { url, superuserUrl } = started.use(await freshDatabase())
  const open = async (more: Partial<PostgresOptions> = {}) =>
    started.use(await connectPostgres({ url, ...options, ...more }))
  const session = async () => started.use(await connectSql(url))
  return {
    url,
    tier: await open(),
    sql: await session(),
    session,
    superuser: async () => started.use(await connectSql(superuserUrl)),
    open,
    [Symbol.asyncDispose]: () => started.disposeAsync(),
  }
}

export async function connectSql(url: string): Promise<Sql> {
  const client = new Client({ connectionString: url })
  client.on('error', () => undefined)
  await client.connect()
  const query = async (text: string, values?: unknown[]) => (await client.query(text, values)).rows as Row[]
  return Object.assign(query, { client, [Symbol.asyncDispose]: () => client.end() })
}

export const TIMELINE = 2 ** 40

/** A tenant's log, its revisions counted from the start of the first timeline. */
export async function logOf(sql: Sql, tenant: string) {
  const rows = await sql(
    'SELECT revision, kind, mode, ids, tags, writer FROM invalidations WHERE tenant = $1 ORDER BY revision',
    [tenant],
  )
  return rows.map((row) => ({ ...row, revision: Number(row['revision']) - TIMELINE })) as {
    revision: number
    kind: string
    mode: string
    ids: string[]
    tags: string[]
    writer: string
  }[]
}

/** How many revisions a tenant has taken on the first timeline; 0 without a row. */
export async function revisionOf(sql: Sql, tenant: string): Promise<number> {
  const [row] = await sql('SELECT revision FROM tenants WHERE name = $1', [tenant])
  return row === undefined ? 0 : Number(row['revision']) - TIMELINE
}

/** Resolves when so many other sessions of the database wait for a lock. */
export async function someoneWaits(sql: Sql, sessions = 1): Promise<void> {
  const waiting = `SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`
  while ((await sql(waiting)).length < sessions);
}

export function draft(content: Partial<ItemDraft> = {}): ItemDraft {
  return {
    title: 'Lamp',
    description: '',
    category: '',
    imageUri: '',
    price: undefined,
    rating: undefined,
    tags: [],
    attributes: undefined,
    ...content,
  }
}

export function by(tenant: string, context: Partial<WriteContext> = {}): WriteContext {
  return { tenant, requestId: '', fingerprint: '', clientId: '', ...context }
}

let tenants = 0

/** A tenant that no other test of the file uses. */
export function newTenant(): string {
  return `tenant-${++tenants}`
}
