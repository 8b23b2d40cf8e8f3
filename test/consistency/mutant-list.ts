/** The rules of the design, each left out once: what to change in a copy of the sources, and where it can show. */
import type { Profile } from './plan.ts'

/** One replacement. `find` must occur exactly once in the file. */
export interface Edit {
  readonly file: string
  readonly find: string
  readonly put: string
}

export interface Mutant {
  readonly name: string
  /** What is left out. */
  readonly rule: string
  readonly edits: readonly Edit[]
  /**
   * Changes that break no rule and make the situation frequent in which the rule matters: smaller pages, say, or no
   * notifications. A copy with these alone must stay without violations.
   */
  readonly amplifiers?: readonly Edit[]
  readonly profile: Profile
}

const VIEW = 'src/invalidation/view.ts'
const TAIL = 'src/invalidation/tail.ts'
const READ = 'src/service/read.ts'
const LOAD = 'src/service/load.ts'
const FLIGHTS = 'src/service/flights.ts'
const WRITE = 'src/service/write.ts'
const POSTGRES = 'src/tiers/postgres.ts'
const STREAMS = 'src/invalidation/subscriptions.ts'
const LOADED_SQL = 'src/tiers/migrations/0004_insert_loaded.sql'
const REPLACE_SQL = 'src/tiers/migrations/0005_replace_known.sql'
const LOG_SQL = 'src/tiers/migrations/0002_change_log.sql'

/** Only the poll brings news, up to half a second late. */
const NO_NOTIFICATIONS: Edit = {
  file: POSTGRES,
  find: `await client.query('LISTEN itemcache_invalidations')`,
  put: `await client.query('SELECT 1')`,
}
/** Also of a tenant that has just changed. */
const NO_CLOSE_FOLLOWING: Edit = {
  file: TAIL,
  find: 'const HOT_POLL_MS = ',
  put: 'const HOT_POLL_MS = 400 || ',
}
/** Every other second, almost too seldom to call anything current. */
const RARE_POLLS: Edit = { file: 'src/app.ts', find: 'const POLL_MS = ', put: 'const POLL_MS = 1200 || ' }
const SMALL_PAGES: Edit = { file: TAIL, find: 'const PAGE_ROWS = ', put: 'const PAGE_ROWS = 1 || ' }
/** Every write locks its row. */
const NO_GROUPS: Edit = { file: WRITE, find: 'const MAX_WAITING = ', put: 'const MAX_WAITING = 0 && ' }
const SHORT_ACTIVATION: Edit = {
  file: TAIL,
  find: 'const ACTIVATION_ROWS = ',
  put: 'const ACTIVATION_ROWS = 2 || ',
}
const SLOW_APPLICATION: readonly Edit[] = [
  { file: TAIL, find: 'const FLOORS_PER_TURN = ', put: 'const FLOORS_PER_TURN = 1 || ' },
  { file: TAIL, find: 'setImmediate(resolve)', put: 'setTimeout(resolve, 150)' },
]
/** Slow load: many readers of a key meet in one flight. */
const SLOW_READS: Edit = {
  file: POSTGRES,
  find: 'return snapshotsOf(ids, await this.#ask<DatedRow>(tenant, READ, [tenant, ids], signal, span))',
  put: `const answer = await this.#ask<DatedRow>(tenant, READ, [tenant, ids], signal, span)
    await sleep(this.#random() * 150)
    return snapshotsOf(ids, answer)`,
}

/** Two keys, large memories, and nothing that goes wrong by itself. */
const CALM: Profile = {
  ms: 6000,
  tenants: 1,
  ids: ['a', 'b'],
  otherFaults: false,
  failover: false,
  origin: false,
  bulk: false,
  trims: false,
  watchers: 2,
  thinkMs: 5,
  carriers: 2,
  env: {
    ITEMCACHE_MAX_FLOORS: '1000',
    ITEMCACHE_MEMORY_MAX_ENTRIES: '1000',
    ITEMCACHE_MAX_TENANTS: '10',
    ITEMCACHE_FRESH_FOR: '60s',
    ITEMCACHE_NEGATIVE_TTL: '60s',
    ITEMCACHE_REDIS_TIMEOUT: '150ms',
    ITEMCACHE_SOFT_TIMEOUT: '100ms',
  },
  workload: { read: 60, batch: 0, fresh: 1, cacheOnly: 1, update: 15, create: 2, delete: 3, pause: 0 },
}

const calm = ({ env, workload, ...more }: Profile): Profile => ({
  ...CALM,
  ...more,
  env: { ...CALM.env, ...env },
  workload: { ...CALM.workload, ...workload },
})

const BY_TAG = { invalidateTags: 12, invalidateIds: 0, invalidateAll: 0, update: 6, sql: 10 }
/** One instance at a time loses PostgreSQL, for seconds; memory goes on. */
const CUT_OFF: Profile = { faults: { postgresDrop: true, postgresCut: true }, faultEveryMs: 700 }
const ORIGIN: Profile = { ids: ['1', '2', '3'], origin: true }

export const MUTANTS: readonly Mutant[] = [
  {
    name: 'floors-before-position',
    rule: 'Floors before position: readers get a turn between the two',
    edits: [
      {
        file: VIEW,
        find: `  apply(row: LogRow): void {
    this.#raiseFloors(row)`,
        put: `  apply(row: LogRow): void {
    setTimeout(() => this.#raiseFloors(row), 100)`,
      },
    ],
    profile: calm({}),
  },
  {
    name: 'key-floor',
    rule: 'A change raises the floor of its keys',
    edits: [
      {
        file: VIEW,
        find: `for (const id of row.ids) this.#raise(this.#keys, id, mark, revision)
        // A page`,
        put: '// A page',
      },
    ],
    profile: calm({}),
  },
  {
    name: 'list-floor',
    rule: 'A change raises the floor of every list that holds the item, before or after',
    edits: [
      {
        file: VIEW,
        find: 'for (const tag of row.tags) this.#raise(this.#tags, LISTED + tag, mark, revision)',
        put: '',
      },
      { file: VIEW, find: 'this.#raise(this.#tags, LISTED, mark, revision)', put: '' },
    ],
    profile: calm({ workload: { list: 20 } }),
  },
  {
    name: 'list-before-image',
    rule: 'Also of those that held it before',
    edits: [
      {
        file: WRITE,
        find: 'tags: [...tags, ...formerTags],',
        put: 'tags,',
      },
    ],
    amplifiers: [NO_NOTIFICATIONS, NO_CLOSE_FOLLOWING],
    profile: calm({ workload: { list: 20, update: 30 } }),
  },
  {
    name: 'key-floor-of-invalidation',
    rule: 'An invalidation by id raises the floor of its keys',
    edits: [
      {
        file: VIEW,
        find: `        for (const id of row.ids) this.#raise(this.#keys, id, mark, revision)
        break
      case 'TAGS`,
        put: `        break
      case 'TAGS`,
      },
    ],
    profile: calm({ workload: { invalidateIds: 15, update: 5 } }),
  },
  {
    name: 'tag-floor',
    rule: 'An invalidation by tag raises the floor of the tag',
    edits: [
      {
        file: VIEW,
        find: 'for (const tag of row.tags) this.#raise(this.#tags, tag, mark, revision)',
        put: '',
      },
    ],
    profile: calm({ workload: BY_TAG }),
  },
  {
    name: 'tenant-floor',
    rule: 'An invalidation of everything raises the tenant floor',
    edits: [{ file: VIEW, find: 'else this.#raiseTenant(revision)', put: 'else void 0' }],
    profile: calm({ workload: { invalidateAll: 12, update: 5 } }),
  },
  {
    name: 'forgetting',
    rule: 'Forgetting a floor raises the tenant floor',
    edits: [
      { file: VIEW, find: 'this.#tenant.changed = Math.max(this.#tenant.changed, top(forgotten))', put: '' },
    ],
    profile: calm({ env: { ITEMCACHE_MAX_FLOORS: '1' }, ids: ['a', 'b', 'c', 'd'] }),
  },
  {
    name: 'forgetting-removed',
    rule: 'Forgetting a floor raises the tenant’s removed mark',
    edits: [
      {
        file: VIEW,
        find: 'this.#tenant.removed = Math.max(this.#tenant.removed, forgotten.removed)',
        put: '',
      },
    ],
    profile: calm({
      ...CUT_OFF,
      env: { ITEMCACHE_MAX_FLOORS: '1' },
      ids: ['a', 'b', 'c', 'd'],
      workload: { update: 8, delete: 8, create: 8, read: 50 },
    }),
  },
  {
    name: 'activation-floor',
    rule: 'Activation sets the tenant floor below its oldest row',
    edits: [
      {
        file: VIEW,
        find: 'this.#raiseTenant(known[0] === undefined ? revision : known[0].revision - 1)',
        put: '',
      },
    ],
    amplifiers: [SHORT_ACTIVATION],
    profile: calm({
      tenants: 2,
      watchers: 0,
      faults: { kill: true },
      faultEveryMs: 1200,
      faultForMs: 800,
      env: { ITEMCACHE_MAX_TENANTS: '1' },
      ids: ['a', 'b', 'c', 'd'],
      workload: { sql: 60, update: 6, invalidateTags: 0, invalidateAll: 0 },
    }),
  },
  {
    name: 'hole-check',
    rule: 'A hole in the log makes a view jump',
    edits: [
      {
        file: TAIL,
        find: 'page.rows.every((row, i) => row.revision === from + 1 + i) && (!page.complete || last === page.revision)',
        put: 'true',
      },
    ],
    amplifiers: [NO_NOTIFICATIONS, RARE_POLLS],
    profile: calm({
      ms: 10_000,
      trims: true,
      watchers: 0,
      ids: ['a', 'b', 'c', 'd'],
      workload: { sql: 60, update: 6, invalidateTags: 0, invalidateAll: 0 },
    }),
  },
  {
    name: 'heard-bound',
    rule: 'Nothing is current 1.5 s after the log was last heard of',
    edits: [{ file: VIEW, find: 'HEARD_BOUND_MS = 1500', put: 'HEARD_BOUND_MS = 1e9' }],
    profile: calm({ ...CUT_OFF, workload: { update: 5, delete: 1 } }),
  },
  {
    name: 'heard-send-time',
    rule: 'Heard is when the poll was sent, not when its answer came',
    edits: [
      {
        file: TAIL,
        find: 'page.rows.every((row, i) => row.revision === from + 1 + i)',
        put: '((sentAtMs = this.#options.now()), page.rows.every((row, i) => row.revision === from + 1 + i))',
      },
    ],
    amplifiers: [NO_NOTIFICATIONS, RARE_POLLS],
    profile: calm({
      faults: { postgresDelay: true },
      delayMs: 850,
      faultForMs: 3000,
      faultEveryMs: 400,
      workload: { update: 5, delete: 1, read: 90 },
    }),
  },
  {
    name: 'heard-complete',
    rule: 'Only a complete answer counts as heard',
    edits: [
      {
        file: TAIL,
        find: 'if (page.complete || !whole) this.#hear(tenant, tailed, sentAtMs)',
        put: `this.#hear(tenant, tailed, sentAtMs)
    if (page.complete || !whole) return`,
      },
    ],
    amplifiers: [SMALL_PAGES],
    profile: calm({
      ms: 8000,
      watchers: 0,
      faults: { postgresDelay: true },
      delayMs: 400,
      faultEveryMs: 500,
      faultForMs: 5000,
      workload: { update: 20, sql: 20, invalidateTags: 0 },
    }),
  },
  {
    name: 'heard-applied',
    rule: 'An answer counts as heard when it has been applied, not before',
    edits: [
      {
        file: TAIL,
        find: `    if (whole) {
      for (let next`,
        put: `    if (page.complete) view.heard(sentAtMs)
    if (whole) {
      for (let next`,
      },
    ],
    amplifiers: SLOW_APPLICATION,
    profile: calm({ workload: { update: 20 } }),
  },
  {
    name: 'one-statement',
    rule: 'As-of and rows come from one statement',
    edits: [
      {
        file: POSTGRES,
        find: 'return snapshotsOf(ids, await this.#ask<DatedRow>(tenant, READ, [tenant, ids], signal, span))',
        put: `const rows = await this.#ask<DatedRow>(tenant, READ, [tenant, ids], signal, span)
    await sleep(this.#random() * 50)
    const [later] = await this.#ask<DatedRow>(tenant, READ, [tenant, ids], signal, span)
    return snapshotsOf(ids, rows.map((row) => ({ ...row, as_of: later?.as_of ?? row.as_of })))`,
      },
    ],
    profile: calm({ workload: { update: 20, fresh: 10 } }),
  },
  {
    name: 'commit-unknown',
    rule: 'A write whose COMMIT was not confirmed is neither acknowledged nor kept',
    edits: [
      {
        file: POSTGRES,
        find: `      throw commitUnknown(error)
    }
    if (failed`,
        put: `      if (failed !== undefined) throw commitUnknown(error)
    }
    if (failed`,
      },
    ],
    amplifiers: [
      {
        file: POSTGRES,
        find: `const committing = session.client.query('COMMIT')`,
        put: `const committing = sleep(this.#random() * 100).then(() => session.client.query('COMMIT'))`,
      },
      NO_GROUPS,
    ],
    profile: calm({ faults: { postgresCut: true }, faultEveryMs: 300, workload: { update: 40 } }),
  },
  {
    name: 'stored-iff-it-passes',
    rule: 'A result is stored iff it passes on arrival',
    edits: [{ file: LOAD, find: `if (view.judge(copy) !== 'current' || `, put: 'if (' }],
    amplifiers: [SLOW_READS],
    profile: calm({ env: { ITEMCACHE_MEMORY_MAX_ENTRIES: '2' }, workload: { update: 20, fresh: 10 } }),
  },
  {
    name: 'flight-sent-after',
    rule: 'A reader accepts a flight only if its SELECT was sent after the reader began',
    edits: [{ file: READ, find: 'if (sentAt > began) {', put: 'if (sentAt > 0) {' }],
    amplifiers: [SLOW_READS],
    profile: calm({ workload: { update: 25 } }),
  },
  {
    name: 'flight-must-pass',
    rule: 'What an older flight brings must pass the rule now',
    edits: [
      {
        file: READ,
        find: `if (view.hasHeard(now) && view.judge(copy) === 'current' && fits(stamped, options, now)) {
            return { ...answer('MISS'), copy: stamped }`,
        put: `if (fits(copy, options, now)) {
            return answer('MISS')`,
      },
    ],
    amplifiers: [SLOW_READS],
    profile: calm({ workload: { update: 25 } }),
  },
  {
    name: 'flight-direct',
    rule: 'A retry starts its own flight instead of joining one that has left',
    edits: [
      {
        file: FLIGHTS,
        find: `if (under !== undefined && (route === 'cached' || under.sentAt === undefined)) {`,
        put: 'if (under !== undefined) {',
      },
    ],
    amplifiers: [SLOW_READS],
    profile: calm({ workload: { update: 20, fresh: 20 } }),
  },
  {
    name: 'acknowledge-invalidation',
    rule: 'Known before applied: an acknowledged invalidation raises its floors',
    edits: [
      {
        file: WRITE,
        find: 'this.#parts.tail.raising(tenant)?.acknowledge(invalidationRow(target, mode, revision))',
        put: 'void invalidationRow(target, mode, revision)',
      },
    ],
    amplifiers: [NO_NOTIFICATIONS],
    profile: calm({ workload: { invalidateIds: 15, invalidateAll: 3, update: 5 } }),
  },
  {
    name: 'acknowledge-write',
    rule: 'Known before applied: an acknowledged write raises its floors, a replayed one too',
    edits: [
      {
        file: WRITE,
        find: 'this.#raise(write.tenant, written.snapshot, written.revision, written.formerTags)',
        put: '',
      },
    ],
    amplifiers: [NO_NOTIFICATIONS, RARE_POLLS],
    profile: calm({
      watchers: 0,
      repeats: 0.8,
      workload: { update: 30, read: 60, invalidateTags: 0 },
    }),
  },
  {
    name: 'acknowledge-group',
    rule: 'Known before applied: a group commit raises the floors of its writes',
    edits: [{ file: WRITE, find: 'this.#raise(tenant, snapshot, revision, formerTags)', put: '' }],
    amplifiers: [NO_NOTIFICATIONS, RARE_POLLS],
    profile: calm({ watchers: 0, workload: { update: 30, read: 60, invalidateTags: 0 } }),
  },
  {
    name: 'ahead',
    rule: 'Known before applied: a copy ahead of the position raises its key’s floor',
    edits: [
      {
        file: VIEW,
        find: 'if (asOf <= this.#position) return',
        put: 'if (asOf !== undefined) return',
      },
    ],
    amplifiers: [
      NO_NOTIFICATIONS,
      RARE_POLLS,
      { ...SLOW_READS, put: SLOW_READS.put.replace('150', '800') },
      // That memory keeps the newer of two copies is economy.
      { file: 'src/tiers/memory.ts', find: 'this.#isNewer(stored, copy)', put: '!copy' },
    ],
    profile: calm({
      watchers: 0,
      env: { REDIS_URL: 'off' },
      workload: { fresh: 30, update: 20, read: 40, invalidateTags: 0 },
    }),
  },
  {
    name: 'stamp-checked',
    rule: 'Only a copy that has passed is stamped',
    edits: [
      {
        file: READ,
        find: `verdict === 'current' ? stamp(view, found) : found\n`,
        put: 'stamp(view, found)\n',
      },
    ],
    profile: calm({
      ...CUT_OFF,
      env: { ITEMCACHE_SOFT_TIMEOUT: '20ms' },
      workload: { update: 12, invalidateIds: 8, cacheOnly: 15 },
    }),
  },
  {
    name: 'removed-mark',
    rule: 'A removed item is not served, even as stale',
    edits: [
      {
        file: VIEW,
        find: `if (mark === 'removed') floor.removed = Math.max(floor.removed, revision)`,
        put: '',
      },
    ],
    profile: calm({ ...CUT_OFF, workload: { update: 8, delete: 10, create: 8, invalidateIds: 8 } }),
  },
  {
    name: 'removed-by-tag',
    rule: 'REMOVE by tag raises the tenant’s removed mark: an old copy may lack the tag',
    edits: [
      {
        file: VIEW,
        find: `if (mark === 'removed') this.#tenant.removed = Math.max(this.#tenant.removed, revision)`,
        put: '',
      },
    ],
    profile: calm({
      faults: { postgresCut: true },
      faultEveryMs: 500,
      faultForMs: 1000,
      ids: ['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'i', 'j'],
      workload: { read: 25, update: 30, invalidateTags: 15, invalidateIds: 0, invalidateAll: 0, sql: 3 },
    }),
  },
  {
    name: 'expire-apart',
    rule: 'An expired copy that has changed, too, is not served while it reloads',
    edits: [
      { file: VIEW, find: `return asOf < changed ? 'superseded' : 'expired'`, put: `return 'expired'` },
    ],
    profile: calm({ workload: { invalidateIds: 8, update: 15 } }),
  },
  {
    name: 'timeline-seen',
    rule: 'A newer timeline, seen in any copy, raises every floor and ends the trust in older primaries',
    edits: [{ file: TAIL, find: 'if (timeline <= this.#timeline) return', put: 'if (timeline >= 0) return' }],
    profile: calm({
      failover: true,
      split: true,
      env: { ITEMCACHE_MEMORY_MAX_ENTRIES: '1' },
      ids: ['a', 'b', 'c'],
      faults: { redisEvict: true },
      faultEveryMs: 300,
      workload: { update: 20, fresh: 20, read: 60 },
    }),
  },
  {
    name: 'old-timeline-dropped',
    rule: 'An answer of a replaced primary is dropped',
    edits: [{ file: POSTGRES, find: 'if (timeline >= this.#timeline) {', put: 'if (timeline > 0) {' }],
    profile: calm({ failover: true, split: true, workload: { update: 20, fresh: 30 } }),
  },
  {
    name: 'timeline-in-revisions',
    rule: 'Revisions begin with the timeline',
    edits: [
      {
        file: LOG_SQL,
        find: `SELECT ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint << 40`,
        put: 'SELECT 1::bigint << 40',
      },
    ],
    profile: calm({ failover: true, workload: { update: 20 } }),
  },
  {
    name: 'redis-under-the-rule',
    rule: 'A copy from Redis must pass the rule',
    edits: [
      {
        file: LOAD,
        find: `const passes = view.hasHeard(now) && view.judge(copy) === 'current'`,
        put: 'const passes = true',
      },
    ],
    profile: calm({
      env: { ITEMCACHE_MEMORY_MAX_ENTRIES: '1' },
      faults: { redisDelay: true, redisLostReplies: true, redisDump: true, redisDrop: true },
      faultEveryMs: 400,
    }),
  },
  {
    name: 'redis-heard',
    rule: 'A copy from Redis is not current when the log is silent',
    edits: [
      {
        file: LOAD,
        find: `const passes = view.hasHeard(now) && view.judge(copy) === 'current'`,
        put: `const passes = view.judge(copy) === 'current'`,
      },
      {
        file: READ,
        find: `          if (served !== undefined) return served
        } else {`,
        put: `          if (fits(copy, options, this.#options.now())) return answer('HIT')
        } else {`,
      },
    ],
    profile: calm({
      ...CUT_OFF,
      env: { ITEMCACHE_MEMORY_MAX_ENTRIES: '1' },
      // With SQL, for a write through the service puts the new copy into Redis.
      workload: { update: 0, create: 0, delete: 0, sql: 12, read: 60 },
      ids: ['a', 'b', 'c'],
    }),
  },
  {
    name: 'redis-tags',
    rule: 'A copy in Redis carries its tags',
    edits: [{ file: 'src/tiers/redis-format.ts', find: '    tags,\n', put: '    tags: [],\n' }],
    profile: calm({ env: { ITEMCACHE_MEMORY_MAX_ENTRIES: '1' }, workload: BY_TAG, ids: ['a', 'b', 'c'] }),
  },
  {
    name: 'min-revision',
    rule: 'min_revision is a floor for memory, flights and stale answers',
    edits: [{ file: READ, find: 'return copy.asOf >= options.minRevision && now', put: 'return now' }],
    amplifiers: [NO_NOTIFICATIONS],
    profile: calm({ carriers: 6 }),
  },
  {
    name: 'min-revision-stale',
    rule: 'min_revision holds for stale answers',
    edits: [{ file: READ, find: 'if (!fits(copy, options, now) || now - copy', put: 'if (now - copy' }],
    profile: calm({ ...CUT_OFF, carriers: 8, env: { ITEMCACHE_SOFT_TIMEOUT: '20ms' } }),
  },
  {
    name: 'tag-acknowledgement-waits',
    rule: 'An invalidation by tag is acknowledged when the log has been applied',
    edits: [
      {
        file: WRITE,
        find: `if (target.kind === 'tags') {`,
        put: `if (target.kind === 'tags' && revision < 0) {`,
      },
    ],
    amplifiers: [NO_NOTIFICATIONS],
    profile: calm({ workload: { ...BY_TAG, update: 20, read: 80 } }),
  },
  {
    name: 'etag',
    rule: 'A write with an etag happens only if it is the current one',
    edits: [
      {
        file: POSTGRES,
        find: `options.etag !== '' && options.etag !== etagOf(item?.revision ?? 0)`,
        put: `options.etag === '\\0'`,
      },
    ],
    profile: calm({ workload: { update: 30 } }),
  },
  {
    name: 'known-revision',
    rule: 'A write in a group commit happens only if the item is at the revision that it builds on',
    edits: [
      {
        file: REPLACE_SQL,
        find: 'WHERE i.revision = x.revision AND NOT i.deleted AND',
        put: 'WHERE x.revision > 0 AND NOT i.deleted AND',
      },
    ],
    profile: calm({ workload: { update: 60 } }),
  },
  {
    name: 'refetch-condition',
    rule: 'A refetch updates only the row revision that it started from',
    edits: [
      {
        file: POSTGRES,
        find: `i.revision = $4 AND (i.deleted OR i.source = 'ORIGIN') AND`,
        put: `$4::bigint > 0 AND`,
      },
    ],
    profile: calm({ ...ORIGIN, refreshes: true, workload: { invalidateIds: 20, update: 15 } }),
  },
  {
    name: 'origin-do-nothing',
    rule: 'What the origin knew is inserted only where nothing is',
    edits: [
      {
        file: LOADED_SQL,
        find: 'ON CONFLICT ON CONSTRAINT items_pkey DO NOTHING',
        put: 'ON CONFLICT ON CONSTRAINT items_pkey DO UPDATE SET title = EXCLUDED.title, deleted = false',
      },
    ],
    profile: calm({ ...ORIGIN, workload: { sql: 60, read: 60, update: 10 } }),
  },
  {
    name: 'origin-read-back',
    rule: 'What the origin knew is read back after the insert',
    edits: [
      {
        file: POSTGRES,
        find: 'return snapshotsOf([...loaded.keys()], rows)',
        put: `return new Map(
      [...snapshotsOf([...loaded.keys()], rows)].map(([id, row]) => {
        const record = { ...(loaded.get(id) as ItemDraft), id, source: 'ORIGIN' as const, revision: row.revision }
        const bytes = encodeItem({ ...record, createTimeMs: 0, updateTimeMs: 0 })
        return [id, { ...row, state: 'present' as const, bytes }]
      }),
    )`,
      },
    ],
    profile: calm({ ...ORIGIN, workload: { sql: 40, read: 80 } }),
  },
  {
    name: 'delete-marker',
    rule: 'A delete leaves a marker, so that the origin is not asked again',
    edits: [
      {
        file: POSTGRES,
        find: `text: blanking('LOCAL', 'true') }`,
        put: `text: 'DELETE FROM items WHERE tenant = $1 AND id = $2' }`,
      },
    ],
    profile: calm({ ...ORIGIN, refreshes: false, workload: { delete: 12 } }),
  },
  {
    name: 'request-id',
    rule: 'A retry with the same request_id changes nothing',
    edits: [
      {
        file: POSTGRES,
        find: `if (claimed?.rowCount !== 0) return undefined`,
        put: `if (claimed !== undefined) return undefined`,
      },
    ],
    profile: calm({ faults: { kill: true, postgresLostReplies: true }, workload: { update: 30 } }),
  },
  {
    name: 'thousand-ids',
    rule: 'A statement takes one revision for each 1,000 items',
    edits: [{ file: LOG_SQL, find: '- 1) / 1000 AS nth', put: '- 1) / 100000 AS nth' }],
    profile: calm({ bulk: true, workload: { sql: 40 } }),
  },
  {
    name: 'old-image',
    rule: 'The log names the item before and after a change of its id',
    edits: [
      {
        file: LOG_SQL,
        find: 'FROM old_rows o FULL JOIN new_rows n USING',
        put: 'FROM old_rows o RIGHT JOIN new_rows n USING',
      },
    ],
    profile: calm({ workload: { sql: 60 }, ids: ['a', 'b', 'c', 'd', 'e'] }),
  },
  {
    name: 'enable-always',
    rule: 'The triggers fire for session_replication_role = replica, too',
    edits: [{ file: LOG_SQL, find: 'ALTER TABLE items ENABLE ALWAYS TRIGGER items_log_update;', put: '' }],
    profile: calm({ workload: { sql: 60 } }),
  },
  {
    name: 'stream-gap',
    rule: 'A gap names what a watcher is not sent',
    edits: [
      {
        file: STREAMS,
        find: 'if (next === undefined || next.revision > cursor + 1) {',
        put: 'if (next === undefined) {',
      },
    ],
    profile: calm({ trims: true, workload: { sql: 40 } }),
  },
  {
    name: 'stream-heartbeat',
    rule: 'A heartbeat never names what has not been sent',
    edits: [
      {
        file: STREAMS,
        find: `return { kind: 'heartbeat', revision: cursor, heardMs`,
        put: `return { kind: 'heartbeat', revision: cursor + 1, heardMs`,
      },
    ],
    profile: calm({}),
  },
]
