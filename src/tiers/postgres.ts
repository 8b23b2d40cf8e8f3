/**
 * The PostgreSQL tier: the truth about every item that was ever loaded or written. The only file that knows `pg`.
 *
 * What makes the rest of the system simple is in `migrations/`: triggers give every committed change the tenant's
 * next revision and a row in the log. Here, every read returns rows and the revision of their snapshot from one
 * statement, and every write is one transaction whose answer is read back before COMMIT.
 *
 * Waits are bounded: for a connection by the pool, for a lock and a statement by the server, for an answer by the
 * driver, each longer than the one before, so that the most precise error is the one that is seen. Reads, writes and
 * the log have connections of their own: writers that queue for one tenant's lock do not keep anybody from reading, and
 * readers that queue do not keep the tail from hearing of the log, without which they would be even more.
 *
 * Every session is confined to one tenant, by the policies of `migrations/0003_row_security.sql`: the setting is sent
 * ahead of the first statement, in the same packet, and what reads tell of the items says under which it was read.
 */
import { Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import pg from 'pg'
import { encodeItem } from '../codec.ts'
import { ItemCacheError, itemNotFound } from '../errors.ts'
import { TIMELINE_SPAN } from '../invalidation/view.ts'
import {
  etagOf,
  floorTags,
  type ItemDraft,
  type ItemRecord,
  type JsonObject,
  LIMITS,
  mostItemBytes,
} from '../item.ts'
import { migrate } from './migrate.ts'
import type {
  Inspection,
  InvalidationMode,
  InvalidationTarget,
  KnownWrite,
  ListQuery,
  LogEntry,
  LogListener,
  LogPage,
  LogSource,
  PageLimit,
  Revision,
  Snapshot,
  StoreTier,
  TierSpan,
  WriteContext,
  Written,
} from './tier.ts'

export interface PostgresOptions {
  /** `postgres://user:password@host:5432/database`, or `socket:/directory?db=database`. */
  readonly url: string
  /** Most connections, half of them for reads. Default 10. 1: reads and writes share it. The log has three more. */
  readonly maxConnections?: number
  /** For a new connection, or a free one of the pool. Default 2,000 ms. */
  readonly connectTimeoutMs?: number
  /** Most callers who wait for a connection: to read, to write, and for the log, each. Default 1,000. */
  readonly maxWaiting?: number
  /** For a statement in the server. Default 5,000 ms. */
  readonly statementTimeoutMs?: number
  /** What `pg_stat_activity` shows. Default `itemcache`. */
  readonly applicationName?: string
  /** 0 up to 1, for the pauses before retries. Default `Math.random`. */
  readonly random?: () => number
  /** Called when a connection breaks outside of a statement; the pool opens another when it needs one. */
  readonly onConnectionError?: (error: Error) => void
}

/** Cumulative since construction, but for `connections`. */
export interface PostgresStats {
  /** Statements sent, those of transactions (BEGIN, COMMIT) included. */
  readonly statements: { readonly read: number; readonly write: number }
  /** Transactions repeated after a deadlock or a serialisation failure. */
  readonly retries: number
  readonly connections: { readonly read: PoolSize; readonly write: PoolSize; readonly log: PoolSize }
}

/** `waiting` counts callers without a connection. */
export interface PoolSize {
  readonly max: number
  readonly total: number
  readonly idle: number
  readonly waiting: number
}

/** Deadlocks and serialisation failures are retried this often. */
const MAX_RETRIES = 5
/** The longest pause before the first retry; it doubles with each. */
const RETRY_PAUSE_MS = 5
const RETRY_AFTER_MS = 1000
/** For the log, besides `maxConnections`: a poll that was given up may still hold one. */
const FOLLOWER_CONNECTIONS = 2
/** Before the listener connects again. */
const LISTEN_PAUSE_MS = 200
/** The listener's connection is tried so often: nobody else would notice that it is dead. */
const LISTEN_BEAT_MS = 1000
const LISTEN_ANSWER_MS = 2000
/** A session that is cut off in a transaction keeps its locks, and so all writers of its tenant waiting, no longer. */
const MAX_IDLE_IN_TRANSACTION_MS = 3000
/** A connection is not given up sooner, however little time statements have: this process may be busy. */
const MIN_QUERY_MS = 2000
/** A connection that does not end by itself is cut after this time. */
const CLOSE_PATIENCE_MS = 500

/** Opens the tier, with the schema of this release. Throws `unavailable` when that is impossible. */
export async function connectPostgres(options: PostgresOptions): Promise<PostgresTier> {
  const { statement_timeout, lock_timeout, query_timeout, ...connection } = clientConfig(options)
  const client = new pg.Client(connection)
  client.on('error', () => undefined)
  try {
    await client.connect()
    await migrate(client)
  } catch (error) {
    throw translated(error)
  } finally {
    await client.end().catch(() => undefined)
  }
  return new PostgresTier(options)
}

/** One connection, made as the tier makes its own, for those who examine a database. Rejects with the driver's error. */
export async function dialPostgres(options: PostgresOptions): Promise<pg.Client & AsyncDisposable> {
  const client = new pg.Client(clientConfig(options))
  client.on('error', () => undefined)
  const end = { [Symbol.asyncDispose]: () => client.end().catch(() => undefined) }
  try {
    await client.connect()
  } catch (error) {
    await end[Symbol.asyncDispose]()
    throw error
  }
  return Object.assign(client, end)
}

function clientConfig(options: PostgresOptions) {
  const statementMs = options.statementTimeoutMs ?? 5000
  return {
    connectionString: options.url,
    application_name: options.applicationName ?? 'itemcache',
    connectionTimeoutMillis: options.connectTimeoutMs ?? 2000,
    // Longer than the server's deadlock_timeout (1 s) by default, so that a deadlock is reported as one.
    lock_timeout: Math.ceil(statementMs * 0.6),
    statement_timeout: statementMs,
    // Beyond what the server gives a statement, so that its own word is heard.
    query_timeout: Math.max(statementMs + 500, MIN_QUERY_MS),
    idle_in_transaction_session_timeout: Math.min(statementMs * 2, MAX_IDLE_IN_TRANSACTION_MS),
    keepAlive: true,
    types: { getTypeParser },
  } satisfies pg.ClientConfig
}

const INT8 = 20

function getTypeParser(oid: number, format?: 'text' | 'binary') {
  if (oid === INT8 && format !== 'binary') return safeInteger
  return format === 'binary' ? pg.types.getTypeParser(oid, 'binary') : pg.types.getTypeParser(oid, 'text')
}

/** Refuses what a double cannot hold: a revision that was rounded would be a wrong one. */
function safeInteger(text: string): number {
  const value = Number(text)
  if (!Number.isSafeInteger(value)) {
    throw new ItemCacheError('internal', 'PostgreSQL sent an integer beyond 2^53', {
      reason: 'REVISION_TOO_LARGE',
    })
  }
  return value
}

/** A statement that each connection parses and plans once. */
interface Prepared {
  readonly name: string
  readonly text: string
}

/** A row of `items`, as `COLUMNS` selects it. Every column is null when the item has no row. */
interface ItemRow {
  readonly id: string
  readonly title: string
  readonly description: string
  readonly category: string
  readonly image_uri: string
  readonly price_currency: string | null
  readonly price_units: string | null
  readonly price_nanos: number
  readonly rating_rate: number | null
  readonly rating_count: string | null
  readonly tags: string[]
  readonly attributes: JsonObject | null
  readonly source: 'ORIGIN' | 'LOCAL'
  readonly deleted: boolean
  readonly revision: number
  readonly created_ms: number
  readonly updated_ms: number
}

/** An answer with the timeline that it comes from: the revision at which the server's timeline starts. */
interface FromTimeline {
  readonly timeline: number
}

/** An answer with the setting of the session that read it: rows of other tenants were not there for it. */
interface FromTenant {
  readonly scope: string
}

type LockedRow = FromTimeline & FromTenant & (ItemRow | { readonly id: null })
type DatedRow = LockedRow & { readonly as_of: number }

/** A row of the log; all of it is null where there is none. */
interface LogLine extends FromTimeline {
  readonly name: string
  readonly head: number
  /** How many rows there were before the page was cut, up to its limit. */
  readonly found: number
  readonly revision: number | null
  readonly kind: LogEntry['kind']
  readonly mode: LogEntry['mode']
  readonly ids: string[]
  readonly tags: string[]
  readonly writer: string
  readonly committed_ms: number
  readonly age_ms: number
}

interface OutcomeRow {
  readonly fingerprint: string
  readonly revision: number
  readonly state: Snapshot['state'] | null
  readonly id: string
  readonly as_of: number
  readonly item_revision: number
  readonly item: Uint8Array | null
  readonly tags: string[]
  readonly former_tags: string[]
  /** The item is in the outcome, not in `item`. */
  readonly recalled: boolean
}

const CONTENT = [
  'title',
  'description',
  'category',
  'image_uri',
  'price_currency',
  'price_units',
  'price_nanos',
  'rating_rate',
  'rating_count',
  'tags',
  'attributes',
] as const

/** What of `items` the tier reads. Integers that may be beyond 2^53 travel as text. */
const COLUMNS = [
  'i.id',
  ...CONTENT.map((column) =>
    column === 'price_units' || column === 'rating_count' ? `i.${column}::text` : `i.${column}`,
  ),
  'i.source',
  'i.deleted',
  'i.revision',
  'floor(extract(epoch FROM i.create_time) * 1000)::double precision AS created_ms',
  'floor(extract(epoch FROM i.update_time) * 1000)::double precision AS updated_ms',
].join(', ')

const contentOf = (alias: string) => CONTENT.map((column) => `${alias}.${column}`).join(', ')

/** A draft as JSON (see `draftJson`), unpacked by the server. */
const DRAFT = `(
  id text, title text, description text, category text COLLATE "C", image_uri text,
  price_currency text, price_units bigint, price_nanos integer, rating_rate double precision, rating_count bigint,
  tags text[] COLLATE "C", attributes jsonb
)`

/**
 * A tenant `t` by its name in $1, dated. Without a row it is at the start of the timeline: its first revision is the
 * next one, so that its first row is no hole in the log, and a row that a failover lost is behind it.
 */
const DATED = `(
    SELECT itemcache_timeline_start() AS timeline, current_setting('itemcache.tenant', true) AS scope
  ) AS s LEFT JOIN tenants t ON t.name = $1`
const HEAD = 'greatest(t.revision, s.timeline)'

const READ: Prepared = {
  name: 'read',
  text: `SELECT s.timeline, s.scope, ${HEAD} AS as_of, ${COLUMNS} FROM ${DATED}
    LEFT JOIN items i ON i.tenant = t.name AND i.id = ANY ($2)`,
}

const LIST_ALL: Prepared = {
  name: 'list',
  text: listing(`SELECT * FROM items WHERE tenant = $1 AND NOT deleted AND id > $2 ORDER BY id LIMIT $3`),
}

const LIST_BY_CATEGORY: Prepared = {
  name: 'list-category',
  text: listing(`SELECT * FROM items
    WHERE tenant = $1 AND NOT deleted AND category = $4 AND id > $2 ORDER BY id LIMIT $3`),
}

// OFFSET 0 keeps the planner from a join of another kind: item by item, in the order of the tag's ids, a page costs
// its length; a merge join reads every item up to the page's last.
const LIST_BY_TAG: Prepared = {
  name: 'list-tag',
  text: listing(`SELECT o.* FROM item_tags g
    CROSS JOIN LATERAL (SELECT * FROM items WHERE tenant = g.tenant AND id = g.id OFFSET 0) AS o
    WHERE g.tenant = $1 AND g.tag = $4 AND g.id > $2 ORDER BY g.id LIMIT $3`),
}

const LIST_BY_BOTH: Prepared = {
  name: 'list-tag-category',
  text: listing(`SELECT o.* FROM item_tags g
    CROSS JOIN LATERAL (
      SELECT * FROM items WHERE tenant = g.tenant AND id = g.id AND category = $5 OFFSET 0
    ) AS o
    WHERE g.tenant = $1 AND g.tag = $4 AND g.id > $2 ORDER BY g.id LIMIT $3`),
}

function listing(page: string): string {
  return `SELECT s.timeline, s.scope, ${HEAD} AS as_of, ${COLUMNS} FROM ${DATED}
    LEFT JOIN LATERAL (${page}) AS i ON true ORDER BY i.id`
}

/** One row, also where there is no item: it says who has answered, before anything is changed. */
const LOCK_ITEM: Prepared = {
  name: 'lock',
  text: `SELECT s.timeline, s.scope, ${COLUMNS} FROM (
      SELECT itemcache_timeline_start() AS timeline, current_setting('itemcache.tenant', true) AS scope
    ) AS s LEFT JOIN LATERAL (SELECT * FROM items WHERE tenant = $1 AND id = $2 FOR UPDATE) AS i ON true`,
}

/** In the order of ids, so that two of these never wait for each other. */
const INSERT: Prepared = {
  name: 'insert',
  text: `INSERT INTO items (tenant, id, ${CONTENT.join(', ')}, source)
    SELECT $1, x.id, ${contentOf('x')}, $3 FROM jsonb_to_recordset($2::jsonb) AS x ${DRAFT}
    ORDER BY x.id COLLATE "C"
    ON CONFLICT (tenant, id) DO NOTHING`,
}

/** What is there afterwards, dated: the statement inserts and reads back, see `migrations/0004_insert_loaded.sql`. */
const INSERT_LOADED: Prepared = {
  name: 'insert-loaded',
  text: `SELECT itemcache_timeline_start() AS timeline, current_setting('itemcache.tenant', true) AS scope,
      loaded.as_of, ${COLUMNS}
    FROM itemcache_insert_loaded($1, $2::jsonb) AS loaded CROSS JOIN LATERAL (SELECT (loaded.item).*) AS i`,
}

/** Touches no row whose content is the same: a write that changes nothing leaves no trace. */
const replacing = (source: 'ORIGIN' | 'LOCAL', condition: string) => `UPDATE items i
  SET (${CONTENT.join(', ')}) = ROW (${contentOf('x')}), source = '${source}', deleted = false,
    create_time = CASE WHEN i.deleted THEN now() ELSE i.create_time END
  FROM jsonb_to_record($3::jsonb) AS x ${DRAFT}
  WHERE i.tenant = $1 AND i.id = $2 AND ${condition}
    AND (i.deleted OR (${contentOf('i')}) IS DISTINCT FROM (${contentOf('x')}))`

const blanking = (source: 'ORIGIN' | 'LOCAL', condition: string) => `UPDATE items i
  SET (${CONTENT.join(', ')}) = ROW (${CONTENT.map(() => 'DEFAULT').join(', ')}), source = '${source}', deleted = true
  WHERE i.tenant = $1 AND i.id = $2 AND NOT i.deleted AND ${condition}`

/** The setting tells the triggers that the item stays the origin's. */
const LOADING = `set_config('itemcache.loading', 'on', true) = 'on'`

const REPLACE: Prepared = { name: 'replace', text: replacing('LOCAL', 'true') }
const DELETE: Prepared = { name: 'delete', text: blanking('LOCAL', 'true') }
const REFETCH: Prepared = {
  name: 'refetch',
  text: replacing('ORIGIN', `i.revision = $4 AND (i.deleted OR i.source = 'ORIGIN') AND ${LOADING}`),
}
const REFETCH_GONE: Prepared = {
  name: 'refetch-gone',
  text: blanking('ORIGIN', `i.revision = $3 AND i.source = 'ORIGIN' AND ${LOADING}`),
}

/** Nothing comes back of an item for which nothing was done, see `migrations/0005_replace_known.sql`. */
const REPLACE_KNOWN: Prepared = {
  name: 'replace-known',
  text: `SELECT replaced.as_of, ${COLUMNS}
    FROM itemcache_replace_known($1, $2, $3::jsonb) AS replaced
    CROSS JOIN LATERAL (SELECT (replaced.item).*) AS i`,
}

const INVALIDATE: Prepared = {
  name: 'invalidate',
  text: 'SELECT itemcache_invalidate($1, $2, $3, $4) AS revision, itemcache_timeline_start() AS timeline',
}

const LOG_COLUMNS = `r.found, r.revision, r.kind, r.mode, r.ids, r.tags, r.writer,
  floor(extract(epoch FROM r.committed_at) * 1000)::double precision AS committed_ms,
  extract(epoch FROM clock_timestamp() - r.committed_at)::double precision * 1000 AS age_ms`

/** Rows of the log in an order, up to the one with which the page has enough rows, or enough ids and tags. */
function cutPage(condition: string, order: string, rows: string, names: string): string {
  return `SELECT * FROM (
      SELECT *, count(*) OVER () AS found,
        sum(cardinality(ids) + cardinality(tags)) OVER (ORDER BY ${order}) - cardinality(ids) - cardinality(tags)
          AS names_before
      FROM (SELECT * FROM invalidations WHERE ${condition} ORDER BY ${order} LIMIT ${rows}) AS page
    ) AS weighed WHERE names_before < ${names} OR names_before = 0`
}

const LOG_NEWEST: Prepared = {
  name: 'log-newest',
  text: `SELECT s.timeline, $1 AS name, ${HEAD} AS head, ${LOG_COLUMNS} FROM ${DATED}
    LEFT JOIN LATERAL (${cutPage('tenant = t.name', 'revision DESC', '$2', '$3')}) AS r ON true
    ORDER BY r.revision`,
}

const LOG_AFTER: Prepared = {
  name: 'log-after',
  text: `SELECT s.timeline, p.name, ${HEAD} AS head, ${LOG_COLUMNS}
    FROM (SELECT itemcache_timeline_start() AS timeline) AS s
    CROSS JOIN unnest($1::text[], $2::bigint[]) AS p (name, position)
    LEFT JOIN tenants t ON t.name = p.name
    LEFT JOIN LATERAL (
      ${cutPage('tenant = p.name AND revision > p.position', 'revision', '$3', '$4')}
    ) AS r ON true
    ORDER BY p.name, r.revision`,
}

const LOG_BOUNDS: Prepared = {
  name: 'log-bounds',
  text: `SELECT s.timeline, ${HEAD} AS head, (
      SELECT revision FROM invalidations WHERE tenant = t.name ORDER BY revision LIMIT 1
    ) AS oldest FROM ${DATED}`,
}

// The oldest rows of each log, up to the last of them that is too old or too far behind: always a prefix of the log. One
// look at the oldest row passes over a log that has nothing to trim. Revisions count rows only within a timeline.
const LOG_TRIM: Prepared = {
  name: 'log-trim',
  text: `DELETE FROM invalidations d USING (
      SELECT t.name, max(o.revision) FILTER (
        WHERE o.committed_at < now() - make_interval(secs => $1)
          OR (o.revision <= t.revision - $2 AND o.revision >> 40 = t.revision >> 40)
      ) AS last
      FROM tenants t
      CROSS JOIN LATERAL (
        SELECT revision, committed_at FROM invalidations WHERE tenant = t.name ORDER BY revision LIMIT 1
      ) AS oldest
      CROSS JOIN LATERAL (
        SELECT revision, committed_at FROM invalidations WHERE tenant = t.name ORDER BY revision LIMIT $3
      ) AS o
      WHERE oldest.committed_at < now() - make_interval(secs => $1)
        OR (oldest.revision <= t.revision - $2 AND oldest.revision >> 40 = t.revision >> 40)
      GROUP BY t.name
    ) AS trimmed
    WHERE d.tenant = trimmed.name AND d.revision <= trimmed.last`,
}

const REQUESTS_TRIM: Prepared = {
  name: 'requests-trim',
  text: `DELETE FROM requests WHERE (tenant, request_id) IN (
      SELECT tenant, request_id FROM requests WHERE created_at < now() - make_interval(secs => $1)
      ORDER BY created_at LIMIT $2
    )`,
}

const CLAIM_REQUEST: Prepared = {
  name: 'request-claim',
  text: `INSERT INTO requests (tenant, request_id, fingerprint) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING`,
}

const FIND_REQUEST: Prepared = {
  name: 'request-find',
  text: `SELECT fingerprint, revision, state, id, as_of, item_revision, item, tags, former_tags,
      outcome IS NOT NULL AS recalled
    FROM requests WHERE tenant = $1 AND request_id = $2`,
}

/** The item that `REPLACE_KNOWN` has left there. */
const RECALL: Prepared = {
  name: 'request-recall',
  text: `SELECT r.as_of, ${COLUMNS} FROM requests r CROSS JOIN LATERAL jsonb_populate_record(NULL::items, r.outcome) AS i
    WHERE r.tenant = $1 AND r.request_id = $2`,
}

const COMPLETE_REQUEST: Prepared = {
  name: 'request-complete',
  text: `UPDATE requests SET revision = $3, state = $4, id = $5, as_of = $6, item_revision = $7, item = $8,
      tags = $9, former_tags = $10
    WHERE tenant = $1 AND request_id = $2`,
}

const SET_WRITER: Prepared = { name: 'writer', text: `SELECT set_config('itemcache.writer', $1, true)` }

const SET_TENANT: Prepared = { name: 'tenant', text: `SELECT set_config('itemcache.tenant', $1, false)` }

/**
 * A trace's context for the server: where its administrators look (`pg_stat_activity`, `%a` in the log), and where the
 * extension pg_tracing does. Not a comment in the statement, which would have to be parsed and planned again.
 */
const SET_TRACE: Prepared = {
  name: 'trace',
  text: `SELECT set_config('application_name', $1, false), set_config('pg_tracing.trace_context', $2, false)`,
}

/** For what is about the rows of every tenant. */
const EVERY_TENANT = ''

type Statement = Prepared | string

interface Answer<Row> {
  readonly rows: Row[]
  /** How many it has changed. */
  readonly rowCount: number | null
}

/** A statement with its values. */
type Call = readonly [statement: Statement, values?: unknown[]]

const BEGIN: Call = ['BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE']

/**
 * One checked-out connection. `broken` when its protocol state is not known: it is closed instead of reused. `open`: a
 * transaction has begun whose COMMIT has not been sent.
 */
interface Session {
  readonly client: pg.PoolClient
  readonly purpose: 'read' | 'write'
  /** Whose rows there are for it. `undefined`: it touches none. */
  readonly tenant: string | undefined
  readonly signal: AbortSignal | undefined
  readonly traceparent: string | undefined
  broken: boolean
  open: boolean
}

/** Throws `unavailable`, `timeout` or `cancelled` (by the signal) and `internal` besides what `StoreTier` names. */
export class PostgresTier implements StoreTier, LogSource, AsyncDisposable {
  readonly name = 'postgres'
  readonly #readers: pg.Pool
  readonly #writers: pg.Pool
  readonly #followers: pg.Pool
  readonly #random: () => number
  readonly #maxWaiting: number
  readonly #statements = { read: 0, write: 0 }
  #retries = 0
  /** The start of the newest timeline that an answer came from. */
  #timeline = 0
  /** The tenant that each connection is confined to. */
  readonly #tenants = new WeakMap<pg.PoolClient, string>()
  /** The trace that each connection was last told of. */
  readonly #traces = new WeakMap<pg.PoolClient, string | undefined>()
  readonly #applicationName: string
  /** Of the connections of all pools. */
  readonly #sockets = new Set<Socket>()
  readonly #connection: pg.ClientConfig
  #closing: Promise<unknown> | undefined

  constructor(options: PostgresOptions) {
    const max = options.maxConnections ?? 10
    this.#connection = clientConfig(options)
    const first: pg.QueryConfig & Pick<pg.ClientConfig, 'query_timeout'> = {
      text: `SET enable_seqscan = off; SET default_transaction_isolation = 'read committed';
        SET itemcache.tenant = E'\\x01'`,
      query_timeout: this.#connection.connectionTimeoutMillis,
    }
    const newPool = (size: number) => {
      const pool = new pg.Pool({
        ...clientConfig(options),
        max: size,
        stream: () => {
          const socket = new Socket()
          this.#sockets.add(socket)
          return socket.once('close', () => this.#sockets.delete(socket))
        },
        // So that the tenant is set without waiting for the answer.
        pipeline: true,
        // A session that forgot to say whose rows it wants gets nobody's: no tenant has a control character.
        //
        // Plans are kept for as long as a connection lives. One that was made while the tables were small must not
        // read them from end to end when they are large.
        onConnect: async (client) => void (await client.query(first)),
      })
      const report = (error: Error) => {
        // A connection that breaks while the tier is closed is nobody's concern.
        if (this.#closing === undefined) options.onConnectionError?.(error)
      }
      // The pool reports its idle clients only; a client that breaks while it is checked out and silent would be
      // an uncaught error.
      pool.on('error', () => undefined)
      pool.on('connect', (client) => void client.on('error', report))
      return pool
    }
    this.#writers = newPool(Math.max(1, Math.floor(max / 2)))
    this.#readers = max === 1 ? this.#writers : newPool(Math.ceil(max / 2))
    this.#followers = newPool(FOLLOWER_CONNECTIONS)
    this.#random = options.random ?? Math.random
    this.#applicationName = options.applicationName ?? 'itemcache'
    this.#maxWaiting = options.maxWaiting ?? 1000
  }

  get stats(): PostgresStats {
    const sizeOf = (pool: pg.Pool): PoolSize => ({
      max: pool.options.max,
      total: pool.totalCount,
      idle: pool.idleCount,
      waiting: pool.waitingCount,
    })
    return {
      statements: { ...this.#statements },
      retries: this.#retries,
      connections: {
        read: sizeOf(this.#readers),
        write: sizeOf(this.#writers),
        log: sizeOf(this.#followers),
      },
    }
  }

  /**
   * What sets this database apart from every other: the cluster's identifier (which a standby shares) and the
   * database's oid.
   */
  async systemId(): Promise<string> {
    const [row] = await this.#ask<{ id: string }>(
      undefined,
      `SELECT system_identifier || '-' || (SELECT oid FROM pg_database WHERE datname = current_database()) AS id
        FROM pg_control_system()`,
    )
    if (row === undefined)
      throw new ItemCacheError('internal', 'PostgreSQL did not tell its system identifier')
    return row.id
  }

  /** The role that the service has, if row level security does not hold it. */
  async rolePastRowSecurity(): Promise<string | undefined> {
    const [row] = await this.#ask<{ role: string }>(
      undefined,
      'SELECT rolname AS role FROM pg_roles WHERE rolname = current_user AND (rolsuper OR rolbypassrls)',
    )
    return row?.role
  }

  async ping(signal?: AbortSignal): Promise<void> {
    await this.#ask(undefined, 'SELECT', [], signal)
  }

  async read(
    tenant: string,
    ids: readonly string[],
    signal?: AbortSignal,
    span?: TierSpan,
  ): Promise<ReadonlyMap<string, Snapshot>> {
    return snapshotsOf(ids, await this.#ask<DatedRow>(tenant, READ, [tenant, ids], signal, span))
  }

  async list(
    tenant: string,
    query: ListQuery,
    signal?: AbortSignal,
    span?: TierSpan,
  ): Promise<{ readonly asOf: Revision; readonly items: readonly Snapshot[] }> {
    const { tag, category } = query
    const [statement, filters] =
      tag === ''
        ? category === ''
          ? [LIST_ALL, []]
          : [LIST_BY_CATEGORY, [category]]
        : category === ''
          ? [LIST_BY_TAG, [tag]]
          : [LIST_BY_BOTH, [tag, category]]
    const rows = await this.#ask<DatedRow>(
      tenant,
      statement,
      [tenant, query.afterId, query.limit, ...filters],
      signal,
      span,
    )
    return {
      asOf: rows[0]?.as_of ?? 0,
      items: rows.flatMap((row) => (row.id === null ? [] : [snapshotOf(row, row.as_of)])),
    }
  }

  async insertLoaded(
    tenant: string,
    loaded: ReadonlyMap<string, ItemDraft>,
    signal?: AbortSignal,
    span?: TierSpan,
  ): Promise<ReadonlyMap<string, Snapshot>> {
    for (const [id, draft] of loaded) checkSize(id, draft)
    const drafts = JSON.stringify(Array.from(loaded, ([id, draft]) => draftJson(id, draft)))
    const rows = await this.#retrying(signal, () =>
      this.#withSession(this.#writers, 'write', tenant, signal, span, (session) =>
        this.#query<DatedRow>(session, INSERT_LOADED, [tenant, drafts]),
      ),
    )
    return snapshotsOf([...loaded.keys()], rows)
  }

  async refetched(
    tenant: string,
    id: string,
    draft: ItemDraft | undefined,
    fromRevision: Revision,
    signal?: AbortSignal,
  ): Promise<Snapshot> {
    if (draft !== undefined) {
      checkSize(id, draft)
      const json = draftJson(id, draft)
      if (fromRevision === 0)
        await this.#change(tenant, INSERT, [tenant, JSON.stringify([json]), 'ORIGIN'], signal)
      else await this.#change(tenant, REFETCH, [tenant, id, JSON.stringify(json), fromRevision], signal)
    } else if (fromRevision !== 0) {
      await this.#change(tenant, REFETCH_GONE, [tenant, id, fromRevision], signal)
    }
    const snapshots = await this.read(tenant, [id], signal)
    return snapshots.get(id) ?? unknown(id, 0)
  }

  create(write: WriteContext, id: string, draft: ItemDraft): Promise<Written> {
    return this.#writeItem(write, id, (current) => {
      if (current !== undefined && !current.deleted) {
        throw new ItemCacheError('already-exists', 'an item with this id exists', { id })
      }
      return putting(write.tenant, id, draft, current)
    })
  }

  update(
    write: WriteContext,
    id: string,
    options: { readonly etag: string; readonly allowMissing: boolean },
    change: (current: ItemDraft | undefined) => ItemDraft,
  ): Promise<Written> {
    return this.#writeItem(write, id, (current) => {
      const item = checkPrecondition(id, current, options)
      return putting(write.tenant, id, change(item && recordOf(item)), current)
    })
  }

  delete(
    write: WriteContext,
    id: string,
    options: { readonly etag: string; readonly allowMissing: boolean },
  ): Promise<Written> {
    return this.#writeItem(
      write,
      id,
      (current) => checkPrecondition(id, current, options) && [DELETE, [write.tenant, id]],
    )
  }

  async replaceKnown(
    tenant: string,
    writes: readonly KnownWrite[],
    span?: TierSpan,
  ): Promise<ReadonlyMap<string, Written>> {
    const objects = writes.map(({ write, known, draft }) => ({
      ...draftJson(known.id, draft),
      revision: known.revision,
      known_tags: known.tags,
      former_tags: floorTags(known),
      writer: write.clientId,
      request_id: write.requestId,
      fingerprint: write.fingerprint,
    }))
    const json = JSON.stringify(objects)
    const rows = await this.#retrying(undefined, () =>
      this.#withSession(this.#writers, 'write', tenant, undefined, span, async (session) => {
        try {
          return await this.#query<DatedRow>(session, REPLACE_KNOWN, [tenant, this.#timeline, json])
        } catch (error) {
          // Once the server has refused it nothing is committed.
          const { cause } = error as ItemCacheError
          throw session.broken && !(cause instanceof pg.DatabaseError) ? commitUnknown(error) : error
        }
      }),
    )
    const formerTags = new Map(writes.map(({ known }) => [known.id, floorTags(known)]))
    return new Map(
      Array.from(snapshotsOf([], rows), ([id, snapshot]) => {
        const { revision } = snapshot
        return [id, { snapshot, revision, replayed: false, formerTags: formerTags.get(id) ?? [] }]
      }),
    )
  }

  async outcomeOf(write: WriteContext): Promise<Revision | undefined> {
    if (write.requestId === '') return undefined
    const [former] = await this.#ask<OutcomeRow>(
      write.tenant,
      FIND_REQUEST,
      [write.tenant, write.requestId],
      write.signal,
    )
    if (former !== undefined) checkFingerprint(former, write)
    return former?.revision
  }

  async invalidate(
    write: WriteContext,
    target: InvalidationTarget,
    mode: InvalidationMode,
  ): Promise<Revision> {
    const [kind, keys] =
      target.kind === 'ids'
        ? ['KEYS_INVALIDATED', target.ids]
        : target.kind === 'tags'
          ? ['TAGS_INVALIDATED', target.tags]
          : ['TENANT_INVALIDATED', []]
    const invalidate: Call = [INVALIDATE, [write.tenant, kind, mode, keys]]
    return this.#transact(write, async (session, opening) => {
      let calls = [...opening, invalidate]
      if (write.requestId !== '') {
        const former = await this.#claimRequest(session, write, opening)
        if (former !== undefined) return former.revision
        calls = [invalidate]
      }
      const answers = await this.#together<{ revision: number }>(session, calls)
      const { revision } = answers.at(-1)?.rows[0] ?? {}
      if (revision === undefined) throw new ItemCacheError('internal', 'the invalidation took no revision')
      if (write.requestId !== '') await this.#commit(session, [completing(write, revision)])
      return revision
    })
  }

  async inspect(tenant: string, id: string): Promise<Inspection> {
    try {
      const snapshot = (await this.read(tenant, [id])).get(id)
      if (snapshot === undefined || snapshot.state === 'unknown') return { present: false }
      return {
        present: true,
        negative: snapshot.state === 'deleted',
        asOf: snapshot.asOf,
        sizeBytes: snapshot.bytes?.byteLength ?? 0,
        tags: snapshot.tags,
      }
    } catch (error) {
      if (!(error instanceof ItemCacheError) || error.code !== 'unavailable') throw error
      return { present: false, skipped: error.reason.endsWith('_TIMEOUT') ? 'timeout' : 'down' }
    }
  }

  async newest(tenant: string, limit: PageLimit): Promise<LogPage> {
    this.#checkWaiting(this.#followers)
    const lines = await this.#follow<LogLine>(tenant, LOG_NEWEST, [tenant, limit.rows, limit.names])
    return pagesOf([tenant], lines, limit).get(tenant) ?? EMPTY_LOG
  }

  seen(revision: Revision): void {
    this.#timeline = Math.max(this.#timeline, Math.floor(revision / TIMELINE_SPAN) * TIMELINE_SPAN)
  }

  async after(
    positions: ReadonlyMap<string, Revision>,
    limit: PageLimit,
    signal?: AbortSignal,
  ): Promise<ReadonlyMap<string, LogPage>> {
    const names = [...positions.keys()]
    const values = [names, [...positions.values()], limit.rows, limit.names]
    const lines = await this.#follow<LogLine>(EVERY_TENANT, LOG_AFTER, values, signal)
    return pagesOf(names, lines, limit)
  }

  async bounds(tenant: string, signal?: AbortSignal): Promise<{ revision: Revision; oldest: Revision }> {
    this.#checkWaiting(this.#followers)
    const [row] = await this.#follow<FromTimeline & { head: number; oldest: number | null }>(
      tenant,
      LOG_BOUNDS,
      [tenant],
      signal,
    )
    const revision = row?.head ?? 0
    return { revision, oldest: row?.oldest ?? revision + 1 }
  }

  async listen(listener: LogListener): Promise<AsyncDisposable> {
    const closing = new AbortController()
    let told = false
    const listenOnce = async () => {
      const socket = new Socket()
      const client = new pg.Client({
        ...this.#connection,
        query_timeout: LISTEN_ANSWER_MS,
        stream: () => socket,
      })
      const over = new AbortController()
      const end = () => over.abort()
      client.on('error', end)
      client.on('end', end)
      client.on('notification', ({ payload = '' }) =>
        listener.changed(payload.slice(payload.indexOf(' ') + 1)),
      )
      closing.signal.addEventListener('abort', end, { once: true })
      try {
        await client.connect()
        await client.query('LISTEN itemcache_invalidations')
        told = false
        listener.connected()
        while (!over.signal.aborted) {
          await sleep(LISTEN_BEAT_MS, undefined, { signal: over.signal }).catch(() => undefined)
          if (!over.signal.aborted) await client.query('SELECT')
        }
      } finally {
        closing.signal.removeEventListener('abort', end)
        // A server that is silent would never answer the farewell.
        void client.end().catch(() => undefined)
        setTimeout(() => socket.destroy(), CLOSE_PATIENCE_MS).unref()
      }
    }
    const listening = (async () => {
      while (!closing.signal.aborted) {
        try {
          await listenOnce()
        } catch (error) {
          if (!told) listener.lost(error)
          told = true
        }
        await sleep(LISTEN_PAUSE_MS, undefined, { signal: closing.signal }).catch(() => undefined)
      }
    })()
    return {
      async [Symbol.asyncDispose]() {
        closing.abort()
        await listening
      },
    }
  }

  async trim(
    options: { maxAgeMs: number; maxRows: number; step: number },
    signal?: AbortSignal,
  ): Promise<number> {
    const { maxAgeMs, maxRows, step } = options
    const rows = await this.#change(EVERY_TENANT, LOG_TRIM, [maxAgeMs / 1000, maxRows, step], signal)
    return rows + (await this.#change(EVERY_TENANT, REQUESTS_TRIM, [maxAgeMs / 1000, step], signal))
  }

  /**
   * Closes the connections when their statements are done, and after a moment in any case. What comes after fails as
   * `unavailable`.
   */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#closing ??= this.#close()
    await this.#closing
  }

  async #close(): Promise<void> {
    const pools = [...new Set([this.#readers, this.#writers, this.#followers])]
    const closed = Promise.all(pools.map((pool) => pool.end()))
    const patience = setTimeout(() => {
      for (const socket of this.#sockets) socket.destroy()
    }, CLOSE_PATIENCE_MS)
    await closed
    clearTimeout(patience)
  }

  /**
   * One write of one item: replays the request, or locks the row, changes it and reads it back. From the change until
   * COMMIT the tenant's other writers wait; so these are sent together, and nobody waits for this process meanwhile.
   */
  #writeItem(
    write: WriteContext,
    id: string,
    /** What changes the item as it is now; `undefined`: nothing. */
    change: (current: ItemRow | undefined) => Call | undefined,
  ): Promise<Written> {
    const { tenant, requestId } = write
    const lock: Call = [LOCK_ITEM, [tenant, id]]
    return this.#transact(write, async (session, opening) => {
      let locking = [...opening, lock]
      if (requestId !== '') {
        const former = await this.#claimRequest(session, write, opening)
        if (former !== undefined) return this.#replay(session, write, former)
        locking = [lock]
      }
      const [row] = (await this.#together<LockedRow>(session, locking)).at(-1)?.rows ?? []
      const current = row === undefined || row.id === null ? undefined : row
      const changing = change(current)
      const calls: readonly Call[] = [...(changing === undefined ? [] : [changing]), [READ, [tenant, [id]]]]
      const answers = await (requestId === ''
        ? this.#commit<DatedRow>(session, calls)
        : this.#together<DatedRow>(session, calls))
      if (changing?.[0] === INSERT && answers[0]?.rowCount === 0) throw insertedByAnother(id)
      const snapshot = snapshotsOf([id], answers.at(-1)?.rows ?? []).get(id) ?? unknown(id, 0)
      const written: Written = {
        snapshot,
        // The revision that wrote what is there now: this commit's, or an earlier one's if nothing changed.
        revision: snapshot.state === 'unknown' ? snapshot.asOf : snapshot.revision,
        replayed: false,
        formerTags: current === undefined || current.deleted ? [] : floorTags(current),
      }
      if (requestId !== '') await this.#commit(session, [completing(write, written.revision, written)])
      return written
    })
  }

  /**
   * The outcome of an earlier write with the same request id; waits while that one is in progress. `opening` is sent
   * ahead.
   */
  async #claimRequest(
    session: Session,
    write: WriteContext,
    opening: readonly Call[],
  ): Promise<OutcomeRow | undefined> {
    const key = [write.tenant, write.requestId]
    const claim: Call = [CLAIM_REQUEST, [...key, write.fingerprint]]
    for (let claiming = [...opening, claim]; ; claiming = [claim]) {
      const claimed = (await this.#together(session, claiming)).at(-1)
      if (claimed?.rowCount !== 0) return undefined
      const [former] = await this.#query<OutcomeRow>(session, FIND_REQUEST, key)
      if (former === undefined) continue
      checkFingerprint(former, write)
      return former
    }
  }

  async #replay(session: Session, write: WriteContext, outcome: OutcomeRow): Promise<Written> {
    const { revision, former_tags: formerTags } = outcome
    if (!outcome.recalled) return { snapshot: recalled(outcome), revision, replayed: true, formerTags }
    const rows = await this.#query<DatedRow>(session, RECALL, [write.tenant, write.requestId])
    const snapshot = snapshotsOf([outcome.id], rows).get(outcome.id) ?? unknown(outcome.id, outcome.as_of)
    return { snapshot, revision, replayed: true, formerTags }
  }

  /**
   * Runs `work` in a transaction, again after a deadlock or a serialisation failure; `work` sends what opens it ahead of its
   * first statement. A caller who goes away stops waiting at once; the transaction is then rolled back before its next
   * statement.
   *
   * When the connection is lost while COMMIT is on its way, nobody knows whether the write happened: `unavailable`
   * with reason `COMMIT_UNKNOWN`. To repeat the write with the same `requestId` is safe.
   */
  #transact<T>(
    write: WriteContext,
    work: (session: Session, opening: readonly Call[]) => Promise<T>,
  ): Promise<T> {
    const opening = write.clientId === '' ? [BEGIN] : [BEGIN, [SET_WRITER, [write.clientId]] satisfies Call]
    return this.#retrying(write.signal, () =>
      this.#withSession(this.#writers, 'write', write.tenant, write.signal, write.span, async (session) => {
        session.open = true
        try {
          const result = await work(session, opening)
          if (session.open) await this.#commit(session, [])
          return result
        } catch (error) {
          if (session.open) await this.#rollback(session)
          throw error
        }
      }),
    )
  }

  async #rollback(session: Session): Promise<void> {
    if (session.broken) return
    try {
      this.#statements.write++
      await session.client.query('ROLLBACK')
    } catch {
      // The server rolls back when the connection closes.
      session.broken = true
    }
  }

  /** Sends the last statements of a transaction, and COMMIT behind them. Returns what they have answered. */
  async #commit<Row>(session: Session, last: readonly Call[]): Promise<readonly Answer<Row>[]> {
    session.signal?.throwIfAborted()
    const { stream } = session.client.connection
    stream.cork()
    const answering = last.map((call) => this.#send<Row>(session, ...call))
    session.open = false
    this.#statements.write++
    const committing = session.client.query('COMMIT')
    stream.uncork()
    const answers = await Promise.allSettled(answering)
    const failed = answers.find(isRejected)
    try {
      const { command } = await committing
      if (failed === undefined && command !== 'COMMIT') {
        throw new ItemCacheError('internal', 'the transaction was rolled back')
      }
    } catch (error) {
      if (error instanceof ItemCacheError) throw error
      if (isCommitRefusal(error)) throw translated(error)
      session.broken = true
      // Once the server has refused a statement it commits nothing.
      if (failed !== undefined && failed.reason.cause instanceof pg.DatabaseError) throw failed.reason
      throw commitUnknown(error)
    }
    if (failed !== undefined) throw failed.reason
    return answers.filter(isFulfilled).map(({ value }) => value)
  }

  /** One read statement. */
  #ask<Row>(
    tenant: string | undefined,
    statement: Statement,
    values: unknown[] = [],
    signal?: AbortSignal,
    span?: TierSpan,
  ): Promise<Row[]> {
    return this.#askOn(this.#readers, tenant, statement, values, signal, span)
  }

  /** One statement about the log, on connections that readers and writers cannot take. */
  #follow<Row>(
    tenant: string,
    statement: Statement,
    values: unknown[],
    signal?: AbortSignal,
  ): Promise<Row[]> {
    return this.#askOn(this.#followers, tenant, statement, values, signal)
  }

  /**
   * A statement whose own time is over (a poll's, a probe's) takes its connection with it: that may be dead, and would be
   * missing for as long as any other statement may take. A caller who goes away leaves it alone.
   */
  #askOn<Row>(
    pool: pg.Pool,
    tenant: string | undefined,
    statement: Statement,
    values: unknown[],
    signal: AbortSignal | undefined,
    span?: TierSpan,
  ): Promise<Row[]> {
    const ask = async (session: Session) => {
      const giveUp = () => {
        if (isTimeout(signal?.reason)) session.client.connection.stream.destroy()
      }
      signal?.addEventListener('abort', giveUp, { once: true })
      try {
        return await this.#query<Row>(session, statement, values)
      } finally {
        signal?.removeEventListener('abort', giveUp)
      }
    }
    return untilAborted(signal, this.#withSession(pool, 'read', tenant, signal, span, ask))
  }

  /** One statement that changes something and may be repeated, in a transaction of its own. */
  #change(
    tenant: string,
    statement: Prepared,
    values: unknown[],
    signal: AbortSignal | undefined,
    span?: TierSpan,
  ): Promise<number> {
    return this.#retrying(signal, () =>
      this.#withSession(this.#writers, 'write', tenant, signal, span, async (session) => {
        return (await this.#send(session, statement, values)).rowCount ?? 0
      }),
    )
  }

  #retrying<T>(signal: AbortSignal | undefined, attempt: () => Promise<T>): Promise<T> {
    const attempts = async (): Promise<T> => {
      for (let retry = 0; ; retry++) {
        try {
          return await attempt()
        } catch (error) {
          if (!isContention(error) || retry === MAX_RETRIES) throw error
        }
        this.#retries++
        await sleep(this.#random() * RETRY_PAUSE_MS * 2 ** retry, undefined, { ...(signal && { signal }) })
      }
    }
    return untilAborted(signal, attempts())
  }

  async #withSession<T>(
    pool: pg.Pool,
    purpose: Session['purpose'],
    tenant: string | undefined,
    signal: AbortSignal | undefined,
    span: TierSpan | undefined,
    work: (session: Session) => Promise<T>,
  ): Promise<T> {
    signal?.throwIfAborted()
    // Following the log must go on, whoever else is waiting: what callers want of it has been checked before.
    if (pool !== this.#followers) this.#checkWaiting(pool)
    const client = await pool.connect().catch((error) => {
      throw isQueueTimeout(error) && purpose === 'write' ? queuedTooLong(error) : translated(error)
    })
    const session: Session = {
      client,
      purpose,
      tenant,
      signal,
      traceparent: span?.traceparent,
      broken: false,
      open: false,
    }
    try {
      return await work(session)
    } finally {
      client.release(session.broken)
    }
  }

  /** A caller who has left may still be waiting for a connection, so that nobody but the pool knows how many do. */
  #checkWaiting(pool: pg.Pool): void {
    if (pool.waitingCount < this.#maxWaiting) return
    throw new ItemCacheError('exhausted', 'too many calls of the database are waiting', {
      reason: 'POSTGRES_BUSY',
      retryAfterMs: RETRY_AFTER_MS,
    })
  }

  async #query<Row>(session: Session, ...call: Call): Promise<Row[]> {
    return (await this.#send<Row>(session, ...call)).rows
  }

  /** Statements in one packet. Rejects with the first error, once all have been answered. */
  async #together<Row>(session: Session, calls: readonly Call[]): Promise<readonly Answer<Row>[]> {
    const { stream } = session.client.connection
    stream.cork()
    const answering = calls.map((call) => this.#send<Row>(session, ...call))
    stream.uncork()
    const answers = await Promise.allSettled(answering)
    const failed = answers.find(isRejected)
    if (failed !== undefined) throw failed.reason
    return answers.filter(isFulfilled).map(({ value }) => value)
  }

  /** An answer says which tenant's rows there were for it, and where it comes from. */
  #check(session: Session, rows: readonly unknown[]): void {
    const { timeline, scope } = (rows[0] ?? {}) as Partial<FromTimeline & FromTenant>
    if (scope !== undefined && scope !== session.tenant) {
      // A connection pooler that hands statements to sessions as it likes: what was not there proves nothing.
      session.broken = true
      throw new ItemCacheError('internal', 'PostgreSQL answered for another tenant', {
        reason: 'TENANT_MIXED_UP',
      })
    }
    if (timeline !== undefined) this.#checkTimeline(session, timeline)
  }

  /** Timelines: an answer of a server that a newer one has replaced is dropped, and its connection is closed. */
  #checkTimeline(session: Session, timeline: number): void {
    if (timeline >= this.#timeline) {
      this.#timeline = timeline
      return
    }
    session.broken = true
    throw new ItemCacheError('unavailable', 'the database that answered is no longer the primary', {
      reason: 'OLD_TIMELINE',
      retryAfterMs: RETRY_AFTER_MS,
    })
  }

  /**
   * Tells the connection of the trace, or that there is none any more: ahead of the next statement and in the same
   * packet. Whether that has worked is nobody's concern.
   */
  #tellTrace({ client, traceparent }: Session): void {
    if (this.#traces.get(client) === traceparent) return
    this.#traces.set(client, traceparent)
    const name = this.#applicationName
    const values =
      traceparent === undefined
        ? [name, '']
        : [`${name} ${traceparent.slice(3, -3)}`, `traceparent='${traceparent}'`]
    client.query({ ...SET_TRACE, values }).catch(() => undefined)
  }

  /** Sends a statement before it returns. */
  async #send<Row>(session: Session, ...[statement, values = []]: Call): Promise<Answer<Row>> {
    session.signal?.throwIfAborted()
    this.#statements[session.purpose]++
    const { client, tenant } = session
    try {
      this.#tellTrace(session)
      const confined =
        tenant === undefined || this.#tenants.get(client) === tenant
          ? undefined
          : client.query({ ...SET_TENANT, values: [tenant] })
      if (confined !== undefined && tenant !== undefined) this.#tenants.set(client, tenant)
      const answer = client.query(
        typeof statement === 'string' ? { text: statement, values } : { ...statement, values },
      )
      if (confined !== undefined) {
        const [confining] = await Promise.allSettled([confined, answer])
        if (confining.status === 'rejected') {
          this.#tenants.delete(client)
          // The other may have begun a transaction.
          session.broken = session.purpose === 'write'
          throw confining.reason
        }
      }
      const result = await answer
      this.#check(session, result.rows)
      return result
    } catch (error) {
      session.broken ||= !isRefusal(error)
      throw translated(error)
    }
  }
}

/** Settles as `promise` does, but rejects at once when the signal is aborted; `promise` then goes on unheard. */
function untilAborted<T>(signal: AbortSignal | undefined, promise: Promise<T>): Promise<T> {
  if (signal === undefined) return promise
  const { promise: answer, resolve, reject } = Promise.withResolvers<T>()
  const abort = () => reject(abortError(signal))
  promise
    .then(resolve, (error) => reject(signal.aborted ? abortError(signal) : error))
    .finally(() => {
      signal.removeEventListener('abort', abort)
    })
  if (signal.aborted) abort()
  else signal.addEventListener('abort', abort, { once: true })
  return answer
}

const isTimeout = (reason: unknown) => reason instanceof DOMException && reason.name === 'TimeoutError'

/** Whoever aborts may say why with an `ItemCacheError` (a deadline: `timeout`). */
function abortError(signal: AbortSignal): ItemCacheError {
  const { reason } = signal
  if (reason instanceof ItemCacheError) return reason
  if (isTimeout(reason)) {
    return new ItemCacheError('unavailable', 'the database did not answer in time', {
      reason: 'POSTGRES_TIMEOUT',
      retryAfterMs: RETRY_AFTER_MS,
      cause: reason,
    })
  }
  return new ItemCacheError('cancelled', 'the caller went away', { cause: signal.reason })
}

const isRejected = (settled: PromiseSettledResult<unknown>): settled is PromiseRejectedResult =>
  settled.status === 'rejected'

const isFulfilled = <T>(settled: PromiseSettledResult<T>): settled is PromiseFulfilledResult<T> =>
  settled.status === 'fulfilled'

/** The connection was lost when a write was under way that may have been committed. */
function commitUnknown(cause: unknown): ItemCacheError {
  return new ItemCacheError('unavailable', 'the connection was lost while the write was committed', {
    reason: 'COMMIT_UNKNOWN',
    retryAfterMs: RETRY_AFTER_MS,
    cause,
  })
}

/** What makes an item of a draft. */
function putting(tenant: string, id: string, draft: ItemDraft, current: ItemRow | undefined): Call {
  checkSize(id, draft)
  const json = draftJson(id, draft)
  return current === undefined
    ? [INSERT, [tenant, JSON.stringify([json]), 'LOCAL']]
    : [REPLACE, [tenant, id, JSON.stringify(json)]]
}

/** What keeps the outcome of a write for its retries. */
function completing(write: WriteContext, revision: Revision, written?: Written): Call {
  const { state, id, asOf, revision: itemRevision, bytes, tags } = written?.snapshot ?? {}
  return [
    COMPLETE_REQUEST,
    [
      write.tenant,
      write.requestId,
      revision,
      state,
      id,
      asOf,
      itemRevision,
      bytes && Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength),
      tags,
      written?.formerTags,
    ],
  ]
}

function checkPrecondition(
  id: string,
  current: ItemRow | undefined,
  options: { readonly etag: string; readonly allowMissing: boolean },
): ItemRow | undefined {
  const item = current?.deleted ? undefined : current
  if (item === undefined && !options.allowMissing) {
    throw itemNotFound(id)
  }
  if (options.etag !== '' && options.etag !== etagOf(item?.revision ?? 0)) {
    throw new ItemCacheError('conflict', 'the item has changed since the etag was read', {
      reason: 'ETAG_MISMATCH',
      id,
    })
  }
  return item
}

function checkFingerprint(former: OutcomeRow, write: WriteContext): void {
  if (former.fingerprint === write.fingerprint) return
  throw new ItemCacheError('invalid', 'the request id was used for another request', {
    reason: 'REQUEST_ID_REUSED',
    violations: [{ field: 'request_id', description: 'must not be used for a different request' }],
  })
}

function checkSize(id: string, draft: ItemDraft): void {
  // Most are so small that nobody need look.
  if (mostItemBytes(draft) <= LIMITS.itemBytes) return
  // The longest form: what the database adds is at most as large as this.
  const record: ItemRecord = {
    ...draft,
    id,
    source: 'LOCAL',
    revision: Number.MAX_SAFE_INTEGER,
    createTimeMs: 1e12 - 1,
    updateTimeMs: 1e12 - 1,
  }
  if (encodeItem(record).byteLength > LIMITS.itemBytes) {
    throw new ItemCacheError('exhausted', `an item may have at most ${LIMITS.itemBytes} bytes`, {
      reason: 'ITEM_TOO_LARGE',
      id,
    })
  }
}

/** The columns of a draft. What is `undefined` is left out, which the server takes as NULL. */
function draftJson(id: string, draft: ItemDraft) {
  return {
    id,
    title: draft.title,
    description: draft.description,
    category: draft.category,
    image_uri: draft.imageUri,
    price_currency: draft.price?.currencyCode,
    price_units: draft.price?.units.toString(),
    price_nanos: draft.price?.nanos ?? 0,
    rating_rate: draft.rating?.rate,
    rating_count: draft.rating?.count.toString(),
    tags: draft.tags,
    attributes: draft.attributes,
  }
}

function recordOf(row: ItemRow): ItemRecord {
  return {
    id: row.id,
    title: row.title,
    description: row.description,
    category: row.category,
    imageUri: row.image_uri,
    price:
      row.price_currency === null || row.price_units === null
        ? undefined
        : { currencyCode: row.price_currency, units: BigInt(row.price_units), nanos: row.price_nanos },
    rating:
      row.rating_rate === null || row.rating_count === null
        ? undefined
        : { rate: row.rating_rate, count: BigInt(row.rating_count) },
    tags: row.tags,
    attributes: row.attributes ?? undefined,
    source: row.source,
    revision: row.revision,
    createTimeMs: row.created_ms,
    updateTimeMs: row.updated_ms,
  }
}

function snapshotOf(row: ItemRow, asOf: Revision): Snapshot {
  const { id, revision } = row
  if (row.deleted) return { id, asOf, state: 'deleted', bytes: undefined, revision, tags: [] }
  return { id, asOf, state: 'present', bytes: encodeItem(recordOf(row)), revision, tags: floorTags(row) }
}

function unknown(id: string, asOf: Revision): Snapshot {
  return { id, asOf, state: 'unknown', bytes: undefined, revision: 0, tags: [] }
}

/** An entry for every id: those without a row are unknown. */
function snapshotsOf(ids: readonly string[], rows: readonly DatedRow[]): ReadonlyMap<string, Snapshot> {
  const asOf = rows[0]?.as_of ?? 0
  const snapshots = new Map(ids.map((id) => [id, unknown(id, asOf)]))
  for (const row of rows) if (row.id !== null) snapshots.set(row.id, snapshotOf(row, asOf))
  return snapshots
}

const EMPTY_LOG: LogPage = { revision: 0, rows: [], complete: true }

function pagesOf(
  names: readonly string[],
  lines: readonly LogLine[],
  limit: PageLimit,
): ReadonlyMap<string, LogPage> {
  const byName = Map.groupBy(lines, (line) => line.name)
  return new Map(
    names.map((name) => {
      const own = byName.get(name) ?? []
      const rows = own.flatMap((line) => (line.revision === null ? [] : [entryOf(line, line.revision)]))
      const found = own[0]?.found ?? 0
      const complete = found < limit.rows && rows.length >= found
      return [name, { revision: own[0]?.head ?? 0, rows, complete }]
    }),
  )
}

function entryOf(line: LogLine, revision: Revision): LogEntry {
  const { kind, mode, ids, tags, writer } = line
  return { revision, kind, mode, ids, tags, writer, committedAtMs: line.committed_ms, ageMs: line.age_ms }
}

function recalled(outcome: OutcomeRow): Snapshot {
  return {
    id: outcome.id,
    asOf: outcome.as_of,
    state: outcome.state ?? 'unknown',
    // A copy, since the driver's bytes are part of a larger buffer, which would be kept with them.
    bytes: outcome.item === null ? undefined : new Uint8Array(outcome.item),
    revision: outcome.item_revision,
    tags: outcome.tags,
  }
}

/**
 * The server has refused the statement, and the connection is in order. Judged by the code: the severity is in the
 * server's language. The codes left out end the connection (shutdown, idle for too long, credentials) or leave it
 * in doubt (internal error).
 */
function isRefusal(error: unknown): error is pg.DatabaseError {
  return (
    error instanceof pg.DatabaseError &&
    !/^(08|28|3D|533|57P|25006|25P0[34]|55000|XX)/.test(error.code ?? 'XX')
  )
}

/** COMMIT has been refused, so that nothing was written: a constraint, a deadlock, a serialisation failure. */
function isCommitRefusal(error: unknown): boolean {
  return error instanceof pg.DatabaseError && /^(23|40)/.test(error.code ?? '')
}

/** All connections of the pool were in use for as long as one is waited for. */
function isQueueTimeout(error: unknown): boolean {
  return error instanceof Error && error.message === 'timeout exceeded when trying to connect'
}

/** Writers of a tenant take turns, and hold connections while they wait: that too many do says nothing of the database. */
function queuedTooLong(cause: unknown): ItemCacheError {
  return new ItemCacheError('unavailable', 'too many writes are waiting for each other', {
    reason: 'POSTGRES_QUEUE_TIMEOUT',
    retryAfterMs: RETRY_AFTER_MS,
    cause,
  })
}

const CONTENTION = 'RETRIES_EXHAUSTED'

/** Where there was nothing when the row was looked for. */
function insertedByAnother(id: string): ItemCacheError {
  return new ItemCacheError('conflict', 'others kept inserting the item', { reason: CONTENTION, id })
}

function isContention(error: unknown): boolean {
  return error instanceof ItemCacheError && error.reason === CONTENTION
}

/** The driver's errors in the words of the domain. The texts are constant; the original is the `cause`. */
function translated(error: unknown): ItemCacheError {
  if (error instanceof ItemCacheError) return error
  const unavailable = (message: string, reason: string) =>
    new ItemCacheError('unavailable', message, { reason, retryAfterMs: RETRY_AFTER_MS, cause: error })
  if (!(error instanceof pg.DatabaseError)) {
    // The driver has no class for a connection that fails; errors of the language are bugs.
    if (error instanceof TypeError || error instanceof RangeError || error instanceof SyntaxError) {
      return new ItemCacheError('internal', 'the database driver failed', { cause: error })
    }
    return error instanceof Error && /timeout/i.test(error.message)
      ? unavailable('the database did not answer in time', 'POSTGRES_TIMEOUT')
      : unavailable('the database cannot be reached', 'POSTGRES_UNAVAILABLE')
  }
  const code = error.code ?? ''
  if (code === '40P01' || code === '40001') {
    return new ItemCacheError('conflict', 'other writes of the same items kept getting in the way', {
      reason: CONTENTION,
      retryAfterMs: RETRY_AFTER_MS,
      cause: error,
    })
  }
  // Cancelled by the statement timeout, or a transaction that was idle for too long.
  if (code === '57014' || code === '25P03') {
    return unavailable('the database did not answer in time', 'POSTGRES_TIMEOUT')
  }
  if (code === '55P03') {
    return unavailable('others held the lock for too long', 'POSTGRES_LOCK_TIMEOUT')
  }
  switch (code.slice(0, 2)) {
    case '22': // data that the column's type cannot hold (NUL in a text, say)
    case '23': // a constraint
    case '54': // too deep or too long for the server
      return new ItemCacheError('invalid', 'the database refuses this content', {
        reason: 'CONTENT_REFUSED',
        cause: error,
      })
    case '28': // the credentials
    case '3D': // the database's name
      return unavailable('the database refuses this service', 'POSTGRES_REFUSED')
    case '08': // the connection
    case '53': // too many connections, disk or memory full
    case '57': // shutting down or starting up
      return unavailable('the database cannot be used', 'POSTGRES_UNAVAILABLE')
  }
  // A primary that has become a standby: it is read-only, or has no WAL position of its own.
  if (code === '25006' || code === '55000')
    return unavailable('the database is read-only', 'POSTGRES_UNAVAILABLE')
  return new ItemCacheError('internal', 'the database failed in an unexpected way', { cause: error })
}
