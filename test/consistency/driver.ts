/** Runs one history: starts the instances of a plan, lets clients, watchers and faults loose on them, and records it all. */
import { appendFileSync, mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { pathToFileURL } from 'node:url'
import type pg from 'pg'
import { startCatalogue } from '../../src/embedded/catalogue.ts'
import {
  CacheOutcome,
  type CacheStatus,
  Freshness,
  InvalidationKind,
  InvalidationMode,
  type Item,
  StaleReason,
  Tier,
} from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { etagOf } from '../../src/item.ts'
import { AUDIT, testimonyOf } from './audit.ts'
import { Caller, type Failed, failed, isFailed } from './client.ts'
import type { Content, HistoryEvent, ReadEvent, ReadResult, StreamMessage, WriteEvent } from './history.ts'
import {
  type Act,
  type Chance,
  chanceOf,
  type Failover,
  type Plan,
  type PlannedFault,
  weighted,
} from './plan.ts'
import { connectSql, Instance, Postgres, RedisServer } from './servers.ts'
import { type Fault, NO_FAULT, Way } from './way.ts'

/** What outlives a history. */
export interface World extends AsyncDisposable {
  readonly dir: string
  readonly postgres: Postgres
  readonly redis: RedisServer
}

export const INSTANCES = ['A', 'B', 'C'] as const
/** For how long an instance is started again that does not find its database. */
const START_PATIENCE_MS = 60_000
const CLIENTS = 8
/** Tags that are never a category, so that a list by them is what the audit says has them. */
const LISTED_TAGS = ['t1', 't2']
const READ_TIMEOUT_MS = 1500
const WRITE_TIMEOUT_MS = 3000
/** Recovery takes as long as the longest backoff, timeout and poll together; a loaded machine doubles that. */
const RECOVERY_MS = 30_000
/** Clients stop when so much has been recorded. */
const MAX_CALLS = 20_000

export async function startWorld(dir: string, cacheDir: string, redisCacheDir: string): Promise<World> {
  await using started = new AsyncDisposableStack()
  mkdirSync(dir, { recursive: true })
  const [postgres, redis] = await Promise.all([
    Postgres.start(dir, cacheDir),
    RedisServer.start(dir, redisCacheDir),
  ])
  started.use(postgres)
  started.use(redis)
  const running = started.move()
  return { dir, postgres, redis, [Symbol.asyncDispose]: () => running.disposeAsync() }
}

export interface Outcome {
  readonly events: readonly HistoryEvent[]
  readonly file: string
  readonly calls: number
}

let databases = 0

/** `root` is where the sources of the instances are. */
export async function runHistory(world: World, plan: Plan, root: string): Promise<Outcome> {
  const run = new Run(world, plan, root)
  try {
    return await run.play()
  } finally {
    await run[Symbol.asyncDispose]()
  }
}

class Run implements AsyncDisposable {
  readonly #world: World
  readonly #plan: Plan
  readonly #root: string
  readonly #database = `h${process.pid}_${++databases}`
  readonly #file: string
  readonly #events: HistoryEvent[] = []
  readonly #started = new AsyncDisposableStack()
  readonly #instances: Instance[] = []
  readonly #callers: (Caller | undefined)[] = []
  readonly #postgresWays: Way[] = []
  readonly #redisWays: Way[] = []
  readonly #replaced: { readonly dir: string; readonly timeline: number }[] = []
  #psqlWay: Way | undefined
  #lines: string[] = []
  #timeline = 0
  #highest = new Map<string, number>()
  #over = false
  #watchersOver = false
  #calls = 0
  #redisBusy: Promise<unknown> = Promise.resolve()

  constructor(world: World, plan: Plan, root: string) {
    this.#world = world
    this.#plan = plan
    this.#root = root
    this.#file = join(world.dir, `history-${plan.seed}.jsonl`)
  }

  async play(): Promise<Outcome> {
    const { postgres } = this.#world
    const { failover, ms } = this.#plan
    writeFileSync(this.#file, `${JSON.stringify({ t: 'settings', ...this.#plan })}\n`)
    const { trims } = this.#plan
    this.#record({ t: 'plan', trims, split: (failover?.splitMs ?? 0) > 0 })
    await this.#prepare()
    if (failover !== undefined) await postgres.addStandby()
    const startedAt = performance.now()
    const watching = Array.from({ length: this.#plan.watchers }, (_, i) => this.#watch(i))
    const faults = this.#plan.faults.map((fault) => this.#inject(fault, startedAt))
    const failing = failover === undefined ? undefined : this.#failOver(failover, startedAt)
    const clients = Array.from({ length: CLIENTS }, (_, i) => this.#client(i))
    const psql = this.#psql()
    await sleep(ms)
    this.#over = true
    await Promise.all([...faults, failing, ...clients, psql])
    this.#note('all faults are over')
    await this.#recover()
    this.#watchersOver = true
    await Promise.all(watching)
    await this.#testify()
    appendFileSync(this.#file, this.#lines.join(''))
    this.#lines = []
    return { events: this.#events, file: this.#file, calls: this.#calls }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#over = true
    this.#watchersOver = true
    for (const caller of this.#callers) caller?.close()
    await Promise.all(this.#instances.map((instance) => instance.kill()))
    await this.#started.disposeAsync()
    await this.#world.postgres.dropStandby()
    this.#world.redis.signal('SIGCONT')
    await using sql = await connectSql(this.#world.postgres.url('postgres'))
    await sql.query(`DROP DATABASE IF EXISTS ${this.#database} WITH (FORCE)`)
  }

  #record(event: HistoryEvent): void {
    this.#events.push(event)
    this.#lines.push(`${JSON.stringify(event)}\n`)
  }

  #note(what: string): void {
    this.#record({ t: 'fault', time: performance.now(), what })
  }

  // ---- servers

  async #prepare(): Promise<void> {
    const { postgres, redis, dir } = this.#world
    const { env, origin } = this.#plan
    {
      await using sql = await connectSql(postgres.url('postgres'))
      await sql.query(`CREATE DATABASE ${this.#database} TEMPLATE template0 OWNER itemcache`)
    }
    // As the services, so that row level security holds them.
    const asOwner = postgres.url(this.#database).replace('//postgres@', '//itemcache@')
    await using sql = await connectSql(asOwner)
    const { migrate } = await import(pathToFileURL(join(this.#root, 'src/tiers/migrate.ts')).href)
    await migrate(sql)
    await sql.query(AUDIT)
    this.#timeline = await timelineOf(sql)
    let products = 0
    const catalogue = this.#started.use(
      await startCatalogue({
        intercept: (request, response) => {
          const id = Number(/\/products\/(\d+)/.exec(request.url ?? '')?.[1])
          // Every answer is another one, so that it is known which of them is shown.
          const body =
            id <= 3
              ? { id, title: `o${++products}`, price: 1, description: '', category: 't3', image: '' }
              : null
          setTimeout(() => response.end(JSON.stringify(body)), products % 3 === 0 ? 20 : 0)
          return true
        },
      }),
    )
    this.#psqlWay = this.#started.use(await Way.to(postgres.target))
    for (const name of INSTANCES) {
      const toPostgres = this.#started.use(await Way.to(postgres.target))
      const toRedis = this.#started.use(await Way.to(redis.target))
      this.#postgresWays.push(toPostgres)
      this.#redisWays.push(toRedis)
      const settings = {
        DATABASE_URL: `postgres://itemcache@127.0.0.1:${toPostgres.port}/${this.#database}`,
        REDIS_URL: `redis://127.0.0.1:${toRedis.port}`,
        ORIGIN_URL: origin ? catalogue.url : 'off',
        ITEMCACHE_LISTEN: '127.0.0.1:0',
        ITEMCACHE_ADMIN_LISTEN: 'off',
        ITEMCACHE_LOG_LEVEL: 'warn',
        ITEMCACHE_POSTGRES_STATEMENT_TIMEOUT: '1s',
        ITEMCACHE_POSTGRES_CONNECT_TIMEOUT: '700ms',
        ITEMCACHE_DRAIN_TIMEOUT: '0s',
        ...env,
      }
      this.#instances.push(new Instance(name, this.#root, settings, join(dir, `instance-${name}.log`)))
    }
    await Promise.all(this.#instances.map((_, i) => this.#startInstance(i)))
  }

  async #startInstance(i: number): Promise<void> {
    const instance = this.#instances[i]
    if (instance === undefined) return
    const giveUpMs = performance.now() + START_PATIENCE_MS
    for (;;) {
      try {
        await instance.start()
        break
      } catch (error) {
        // The database may be away just now, by another fault. Then whoever runs the service starts it again.
        const isAway =
          /the database (cannot be reached|did not answer in time|cannot be used|is read-only)$/.test(
            `${error}`,
          )
        if (!isAway || performance.now() > giveUpMs) throw error
        this.#note(`${instance.name} did not find the database`)
        await sleep(100)
      }
    }
    this.#callers[i]?.close()
    this.#callers[i] = new Caller(instance.address)
  }

  // ---- faults

  async #inject({ atMs, forMs, kind, instance: i, how }: PlannedFault, startedAt: number): Promise<void> {
    await sleep(Math.max(0, startedAt + atMs - performance.now()))
    const { redis, postgres } = this.#world
    const instance = this.#instances[i]
    const toPostgres = this.#postgresWays[i]
    const toRedis = this.#redisWays[i]
    if (instance === undefined || toPostgres === undefined || toRedis === undefined) return
    this.#note(`${kind} ${instance.name} for ${Math.round(forMs)} ms`)
    const faulty = async (way: Way, fault: Fault) => {
      const heal = way.setFault(fault)
      await sleep(forMs)
      heal()
    }
    const onRedis = (act: () => Promise<unknown>) => {
      this.#redisBusy = this.#redisBusy.then(act, act)
      return this.#redisBusy
    }
    switch (kind) {
      case 'kill': {
        if (!instance.running || instance.stopped || this.#killing.has(i))
          return this.#note('it is down already')
        this.#killing.add(i)
        await instance.kill()
        await sleep(forMs)
        await this.#startInstance(i)
        this.#killing.delete(i)
        break
      }
      case 'stop':
        if (!instance.running || instance.stopped || this.#killing.has(i))
          return this.#note('it is down already')
        this.#killing.add(i)
        instance.stop()
        await sleep(forMs)
        instance.resume()
        this.#killing.delete(i)
        break
      case 'postgresCut':
        await faulty(toPostgres, { cut: true })
        break
      case 'postgresDrop':
        await faulty(toPostgres, how < 0.3 ? { dropUp: true } : { dropUp: true, dropDown: true })
        break
      case 'postgresDelay':
        await faulty(
          toPostgres,
          how < 0.5
            ? { delayUpMs: this.#plan.delayMs ?? 300 * how }
            : { delayDownMs: this.#plan.delayMs ?? 400 * how },
        )
        break
      case 'postgresLostReplies':
        await faulty(toPostgres, { dropDown: true })
        break
      case 'postgresCrash':
        if (this.#plan.failover !== undefined) return
        await this.#replacePostgres(() => postgres.crash())
        break
      case 'redisCut':
        await faulty(toRedis, { cut: true })
        break
      case 'redisDrop':
        await faulty(toRedis, { dropUp: true, dropDown: true })
        break
      case 'redisDelay':
        // Longer than the command's timeout: it is given up and happens later.
        await faulty(toRedis, how < 0.5 ? { delayUpMs: 600 * how } : { delayDownMs: 200 * how })
        break
      case 'redisLostReplies':
        await faulty(toRedis, { dropDown: true })
        break
      case 'redisFlush':
        await onRedis(() => redis.flush())
        break
      case 'redisEvict':
        await onRedis(() => redis.evict(chanceOf(this.#plan.seed, 'evict', atMs), 0.5))
        break
      case 'redisDump':
        await onRedis(() => redis.dump())
        await sleep(forMs)
        await onRedis(() => redis.restart('dump'))
        this.#note('Redis is back at an older dump')
        break
      case 'redisEmpty':
        await onRedis(() => redis.restart('empty'))
        break
      case 'redisStop':
        await onRedis(async () => {
          redis.signal('SIGSTOP')
          await sleep(Math.min(forMs, 2000))
          redis.signal('SIGCONT')
        })
        break
    }
  }

  readonly #killing = new Set<number>()
  #replacing: Promise<unknown> = Promise.resolve()

  /** No way leads to PostgreSQL while `act` runs; then all lead to the one that runs. */
  async #replacePostgres(act: () => Promise<unknown>, kept?: Way): Promise<void> {
    const replace = async () => {
      const ways = [...this.#postgresWays, ...(this.#psqlWay === undefined ? [] : [this.#psqlWay])]
      for (const way of ways) way.retarget(undefined, way === kept)
      await act()
      for (const way of ways) way.retarget(this.#world.postgres.target, way === kept)
    }
    this.#replacing = this.#replacing.then(replace)
    await this.#replacing
  }

  async #failOver({ cutAtMs, atMs, splitMs }: Failover, startedAt: number): Promise<void> {
    const { postgres } = this.#world
    await sleep(Math.max(0, startedAt + cutAtMs - performance.now()))
    await postgres.cutStandby()
    this.#note('the standby follows no longer')
    await sleep(Math.max(0, startedAt + atMs - performance.now()))
    this.#note(splitMs > 0 ? 'the primary is cut off from all but one' : 'the primary dies')
    const kept = splitMs > 0 ? this.#postgresWays[0] : undefined
    let endOld = async () => {}
    await this.#replacePostgres(async () => {
      const old = await postgres.failOver(splitMs > 0)
      endOld = old.endOld
      this.#replaced.push({ dir: old.dir, timeline: this.#timeline })
    }, kept)
    this.#note('the standby has taken over')
    await sleep(splitMs)
    kept?.breakAll()
    await endOld()
    this.#note('the old primary is gone')
  }

  // ---- clients

  async #client(client: number): Promise<void> {
    const { seed, thinkMs, workload, carriers } = this.#plan
    const seen = new Map<string, number>()
    const versions = new Map<string, number>()
    for (let i = 0; !this.#over && this.#calls < MAX_CALLS; i++) {
      const chance = chanceOf(seed, client, i)
      const state = { client, op: `c${client}.${i}`, seen, versions, carries: client < carriers }
      await this.#act(weighted({ ...workload, sql: 0 }, chance), chance, state)
      await sleep(chance() * thinkMs)
    }
  }

  async #act(act: Act, chance: Chance, state: ClientState): Promise<void> {
    const { ids, tags, tenants, refreshes } = this.#plan
    const tenant = `tenant-${chance.int(tenants)}`
    const at = chance.int(INSTANCES.length)
    const id = chance.pick(ids)
    const some = <T>(from: readonly T[], most: number) =>
      Array.from({ length: 1 + chance.int(most) }, () => chance.pick(from)).filter(
        (one, i, all) => all.indexOf(one) === i,
      )
    const [asked, minChance] = [chance(), chance()]
    const requestId = chance.on(0.6) ? `${state.op}` : ''
    const item = {
      id,
      title: state.op,
      tags: tags.filter(() => chance.on(0.4)),
      category: chance.pick(['', 't3', 'c1']),
    }
    const mask = { paths: chance.on(0.7) ? ['title', 'tags', 'category'] : ['title'] }
    switch (act) {
      case 'read':
      case 'batch':
      case 'fresh':
      case 'cacheOnly': {
        const min = state.carries
          ? (state.seen.get(tenant) ?? 0)
          : minChance < 0.1
            ? (this.#highest.get(tenant) ?? 0)
            : 0
        const freshness = act === 'fresh' ? 'FRESH' : act === 'cacheOnly' ? 'CACHE_ONLY' : 'DEFAULT'
        const allowStale = chance.on(0.8)
        return this.#read(state, at, tenant, act === 'batch' ? some(ids, 4) : [id], {
          min,
          freshness,
          allowStale,
          batch: act === 'batch',
        })
      }
      case 'list':
        return this.#list(state, at, tenant, asked < 0.4 ? chance.pick(LISTED_TAGS) : '')
      case 'update': {
        const withEtag = asked < 0.25 ? state.versions.get(`${tenant} ${id}`) : undefined
        const etag = withEtag === undefined || withEtag === 0 ? '' : etagOf(withEtag)
        const request = { item: { ...item, etag }, updateMask: mask, allowMissing: asked > 0.4, requestId }
        return this.#write(
          state,
          chance,
          at,
          tenant,
          requestId,
          { kind: 'update', ids: [id], ...(etag !== '' && { etagRevision: withEtag as number }) },
          (caller, options) => caller.call('updateItem', request, options),
        )
      }
      case 'create':
        return this.#write(
          state,
          chance,
          at,
          tenant,
          requestId,
          { kind: 'create', ids: [id] },
          (caller, options) => caller.call('createItem', { item, requestId }, options),
        )
      case 'delete':
        return this.#write(
          state,
          chance,
          at,
          tenant,
          requestId,
          { kind: 'delete', ids: [id] },
          (caller, options) =>
            caller.call('deleteItem', { id, allowMissing: asked > 0.5, requestId }, options),
        )
      case 'invalidateIds':
      case 'invalidateTags':
      case 'invalidateAll': {
        const mode = chance.on(0.5) ? ('REMOVE' as const) : ('EXPIRE' as const)
        const target =
          act === 'invalidateIds'
            ? { case: 'ids' as const, value: { ids: some(ids, 3) } }
            : act === 'invalidateTags'
              ? { case: 'tags' as const, value: { tags: some(tags, 2) } }
              : { case: 'all' as const, value: true }
        const refreshOrigin = refreshes && act === 'invalidateIds' && asked < 0.5
        const write = {
          kind: 'invalidate' as const,
          mode,
          ids: target.case === 'ids' ? target.value.ids : [],
          ...(target.case === 'tags' && { tags: target.value.tags }),
          ...(target.case === 'all' && { all: true }),
          ...(refreshOrigin && { refreshOrigin }),
        }
        return this.#write(state, chance, at, tenant, requestId, write, (caller, options) =>
          caller.call(
            'invalidateItems',
            { target, mode: InvalidationMode[mode], refreshOrigin, requestId },
            options,
          ),
        )
      }
      default:
        await sleep(asked * 200)
    }
  }

  async #read(
    state: ClientState,
    at: number,
    tenant: string,
    ids: readonly string[],
    how: { min: number; freshness: ReadEvent['freshness']; allowStale: boolean; batch: boolean },
  ): Promise<void> {
    const caller = this.#callers[at]
    if (caller === undefined) return
    this.#calls++
    const { min, freshness, allowStale } = how
    const options = { freshness: Freshness[freshness], minRevision: BigInt(min), allowStale }
    const how_ = { metadata: { 'x-tenant-id': tenant }, timeoutMs: READ_TIMEOUT_MS }
    const start = performance.now()
    let results: ReadResult[]
    if (how.batch) {
      const answer = await caller.call('batchGetItems', { ids: [...ids], options }, how_)
      results = isFailed(answer)
        ? ids.map((id) => ({ id, error: answer.text }))
        : answer.results.map(({ id, result, cache }) =>
            result.case === 'error' && result.value.code !== 5
              ? { id, error: `${result.value.code} ${result.value.reason}` }
              : resultOf(
                  id,
                  result.case === 'item' ? result.value : result.case === 'error' ? null : undefined,
                  cache,
                ),
          )
    } else {
      const [id = ''] = ids
      const answer = await caller.call('getItem', { id, options }, how_)
      results = [
        !isFailed(answer)
          ? resultOf(id, answer.result.case === 'item' ? answer.result.value : undefined, answer.cache)
          : answer.code === 5
            ? resultOf(id, null, answer.cache)
            : { id, error: answer.text },
      ]
    }
    const end = performance.now()
    const at_ = INSTANCES[at] ?? ''
    this.#record({
      t: 'read',
      op: state.op,
      client: `${state.client}`,
      at: at_,
      tenant,
      start,
      end,
      freshness,
      min,
      results,
    })
    for (const { id, asOf = 0, rowRevision, stale } of results) {
      this.#see(state, tenant, asOf)
      if (stale === undefined && rowRevision !== undefined) state.versions.set(`${tenant} ${id}`, rowRevision)
    }
  }

  async #list(state: ClientState, at: number, tenant: string, tag: string): Promise<void> {
    const caller = this.#callers[at]
    if (caller === undefined) return
    this.#calls++
    const start = performance.now()
    const answer = await caller.call(
      'listItems',
      { pageSize: 500, tag },
      { metadata: { 'x-tenant-id': tenant }, timeoutMs: READ_TIMEOUT_MS },
    )
    const end = performance.now()
    const at_ = INSTANCES[at] ?? ''
    const call = {
      t: 'list',
      op: state.op,
      client: `${state.client}`,
      at: at_,
      tenant,
      start,
      end,
      tag,
    } as const
    if (isFailed(answer)) return this.#record({ ...call, items: [], error: answer.text })
    const { items, cache, revision, nextPageToken } = answer
    const upTo = nextPageToken === '' ? undefined : items.at(-1)?.id
    this.#record({
      ...call,
      items: items.map(({ id, title }) => ({ id, title })),
      asOf: Number(revision),
      ...(upTo !== undefined && { upTo }),
      ...staleOf(cache),
    })
    this.#see(state, tenant, Number(revision))
  }

  #see({ seen }: ClientState, tenant: string, revision: number): void {
    seen.set(tenant, Math.max(revision, seen.get(tenant) ?? 0))
    this.#highest.set(tenant, Math.max(revision, this.#highest.get(tenant) ?? 0))
  }

  /** One write; repeated, where it has a request id, when nobody knows what became of it, and sometimes for no reason. */
  async #write(
    state: ClientState,
    chance: Chance,
    at: number,
    tenant: string,
    requestId: string,
    what: Pick<WriteEvent, 'kind' | 'ids' | 'tags' | 'all' | 'mode' | 'etagRevision' | 'refreshOrigin'>,
    send: (
      caller: Caller,
      options: Parameters<Caller['call']>[2],
    ) => Promise<{ revision: bigint; item?: Item | undefined } | Failed>,
  ): Promise<void> {
    const { op, client } = state
    const repeats = chance.int(4)
    const again = chance.on(this.#plan.repeats)
    const elsewhere = [0, 1, 2].map(() => chance.int(INSTANCES.length))
    for (let attempt = 0; ; attempt++) {
      const where = attempt === 0 ? at : (elsewhere[attempt % 3] ?? 0)
      const caller = this.#callers[where]
      if (caller === undefined) return
      this.#calls++
      const options = { metadata: { 'x-tenant-id': tenant, 'x-client-id': op }, timeoutMs: WRITE_TIMEOUT_MS }
      const start = performance.now()
      const answer = await send(caller, options)
      const end = performance.now()
      const at_ = INSTANCES[where] ?? ''
      const call = { t: 'write', op, client: `${client}`, at: at_, tenant, start, end, ...what } as const
      if (isFailed(answer)) this.#record({ ...call, error: answer.text })
      else {
        const revision = Number(answer.revision)
        const item = answer.item
        this.#record({ ...call, revision, ...(item !== undefined && { content: contentOf(item) }) })
        this.#see(state, tenant, revision)
        if (item !== undefined) state.versions.set(`${tenant} ${what.ids[0]}`, Number(item.revision))
      }
      const isUnknown = isFailed(answer) && (answer.code === 14 || answer.code === 4)
      if (requestId === '' || this.#over) return
      if (isUnknown ? attempt >= repeats : !again || attempt > 0) return
      await sleep(chance() * 50)
    }
  }

  /** Somebody with psql. */
  async #psql(): Promise<void> {
    const { seed, workload, tenants, bulk, trims } = this.#plan
    const everyMs = 3000 / Math.max(0.1, workload.sql)
    const way = this.#psqlWay
    if (way === undefined) return
    let sql: (pg.Client & AsyncDisposable) | undefined
    for (let i = 0; !this.#over; i++) {
      const chance = chanceOf(seed, 'psql', i)
      const op = `psql.${i}`
      const tenant = `tenant-${chance.int(tenants)}`
      const statements =
        bulk && i === 5
          ? bulkEdit(tenant, op)
          : trims && chance.on(0.3)
            ? trimming(tenant)
            : this.#edit(chance, tenant, op)
      const start = performance.now()
      const call = { t: 'write', op, client: 'psql', at: 'psql', tenant, start, kind: 'sql' } as const
      try {
        sql ??= await connectSql(`postgres://postgres@127.0.0.1:${way.port}/${this.#database}`)
        await sql.query('BEGIN')
        await sql.query(`SELECT set_config('itemcache.writer', $1, true)`, [op])
        for (const [text, values] of statements) await sql.query(text, values)
        const { rows } = await sql.query(
          `SELECT max(revision) AS revision FROM audit_log WHERE tenant = $1 AND xmin = pg_current_xact_id()::xid`,
          [tenant],
        )
        const { command } = await sql.query('COMMIT')
        const end = performance.now()
        const revision = rows[0]?.revision as number | null
        if (command === 'COMMIT' && revision !== null) this.#record({ ...call, end, ids: ['?'], revision })
        else this.#record({ ...call, end, ids: [], error: '0 nothing changed' })
      } catch (error) {
        this.#record({ ...call, end: performance.now(), ids: [], error: `0 ${(error as Error).message}` })
        await sql?.end().catch(() => {})
        sql = undefined
      }
      await sleep(chance() * 2 * everyMs)
    }
    await sql?.end().catch(() => {})
  }

  #edit(chance: Chance, tenant: string, title: string): readonly [string, unknown[]][] {
    const { ids, tags } = this.#plan
    const id = chance.pick(ids)
    const statements: [string, unknown[]][] = []
    if (chance.on(0.2)) statements.push([`SET LOCAL session_replication_role = 'replica'`, []])
    const what = chance.int(8)
    switch (what) {
      case 0:
        statements.push(['DELETE FROM items WHERE tenant = $1 AND id = $2', [tenant, id]])
        break
      case 1:
        statements.push([
          'INSERT INTO items (tenant, id, title, tags) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING',
          [tenant, id, title, [chance.pick(tags)]],
        ])
        break
      case 2:
        statements.push(['UPDATE items SET title = $2 WHERE tenant = $1 AND NOT deleted', [tenant, title]])
        break
      case 3:
        statements.push([
          'UPDATE items SET tags = $3, title = $4 WHERE tenant = $1 AND id = $2 AND NOT deleted',
          [tenant, id, [chance.pick(tags)], title],
        ])
        break
      case 4:
        statements.push([
          `UPDATE items SET id = $3, title = $4 WHERE tenant = $1 AND id = $2 AND NOT deleted
            AND NOT EXISTS (SELECT FROM items o WHERE o.tenant = $1 AND o.id = $3)`,
          [tenant, id, chance.pick(ids), title],
        ])
        break
      case 5:
        // Two statements, two revisions, one commit.
        statements.push(
          [
            'UPDATE items SET title = $3 WHERE tenant = $1 AND id = $2 AND NOT deleted',
            [tenant, id, `${title}`],
          ],
          [
            'UPDATE items SET title = $3 WHERE tenant = $1 AND id = $2 AND NOT deleted',
            [tenant, chance.pick(ids), title],
          ],
        )
        break
      case 6:
        statements.push([
          `SELECT itemcache_invalidate($1, 'TAGS_INVALIDATED', $3, ARRAY[$2])`,
          [tenant, chance.pick(tags), chance.pick(['EXPIRE', 'REMOVE'])],
        ])
        break
      default:
        statements.push([
          'UPDATE items SET title = $3 WHERE tenant = $1 AND id = $2 AND NOT deleted',
          [tenant, id, title],
        ])
    }
    return statements
  }

  // ---- watchers

  async #watch(n: number): Promise<void> {
    const { seed, tenants, ids, tags } = this.#plan
    const tenant = `tenant-${n % tenants}`
    const watcher = `w${n}`
    const chooser = chanceOf(seed, 'watcher', n)
    const wanted =
      n < 2
        ? { ids: [], tags: [] }
        : { ids: [chooser.pick(ids)], tags: chooser.on(0.5) ? [chooser.pick(tags)] : [] }
    let cursor: number | undefined
    for (let i = 0; ; i++) {
      const chance = chanceOf(seed, watcher, i)
      const last = this.#watchersOver
      const at = chance.int(INSTANCES.length)
      const caller = this.#callers[at]
      if (caller === undefined) break
      const at_ = INSTANCES[at] ?? ''
      const record = (message: StreamMessage) =>
        this.#record({ t: 'watch', watcher, at: at_, tenant, time: performance.now(), message })
      record({ kind: 'open', ...wanted, ...(cursor !== undefined && { resumeAfter: cursor }) })
      const stream = caller.watch(
        {
          ...wanted,
          heartbeatInterval: { seconds: 0n, nanos: 100_000_000 },
          maxBatchDelay: { seconds: 0n, nanos: chance.pick([0, 0, 20_000_000]) },
          ...(cursor !== undefined && { resumeAfter: BigInt(cursor) }),
        },
        { 'x-tenant-id': tenant },
      )
      let open = true
      const ended = new Promise<string | undefined>((resolve) => {
        stream.on('error', (error) => {
          const { text } = failed(error as Parameters<typeof failed>[0])
          resolve(open ? text : undefined)
        })
        stream.on('end', () => resolve(undefined))
      })
      stream.on('data', ({ event }) => {
        if (!open) return
        switch (event.case) {
          case 'started':
            cursor = Number(event.value.position)
            record({ kind: 'started', position: cursor, oldest: Number(event.value.oldestResumable) })
            break
          case 'batch':
            for (const one of event.value.events) {
              const { kind, mode, ids, tags, clientId } = one
              const revision = Number(one.revision)
              cursor = Math.max(cursor ?? 0, revision)
              const row = {
                revision,
                kind: nameOf(InvalidationKind, kind),
                mode: nameOf(InvalidationMode, mode),
                ids,
                tags,
                writer: clientId,
              }
              record({ kind: 'event', row })
            }
            break
          case 'heartbeat': {
            const revision = Number(event.value.revision)
            cursor = Math.max(cursor ?? 0, revision)
            record({ kind: 'heartbeat', revision })
            break
          }
          case 'gap': {
            const { after, through } = event.value
            cursor = Math.max(cursor ?? 0, Number(through))
            record({ kind: 'gap', after: Number(after), through: Number(through) })
            break
          }
          case 'draining':
            record({ kind: 'draining', position: Number(event.value.position) })
        }
      })
      // The last connection stays until it has caught up.
      const until = performance.now() + (last ? RECOVERY_MS : 200 + chance() * chance.pick([300, 3000]))
      const isDone = () =>
        last
          ? (cursor ?? 0) >= (this.#head.get(tenant) ?? 0)
          : this.#watchersOver || performance.now() > until
      const end = await Promise.race([ended, this.#until(isDone, until)])
      open = false
      stream.cancel()
      record({ kind: 'end', ...(typeof end === 'string' && { error: end }) })
      if (last) {
        const head = this.#head.get(tenant) ?? 0
        const caughtUp = (cursor ?? 0) >= head
        if (typeof end === 'string' && !caughtUp && performance.now() < this.#streamsBy) {
          await sleep(200)
          continue
        }
        this.#record({
          t: 'final',
          what: `stream ${watcher} at ${cursor} of ${head}`,
          ok: caughtUp,
          afterMs: RECOVERY_MS,
        })
        return
      }
      await sleep(chance() * 300)
    }
  }

  #streamsBy = 0
  readonly #head = new Map<string, number>()

  async #until(condition: () => boolean, timeMs: number): Promise<undefined> {
    while (!condition() && performance.now() < timeMs) await sleep(20)
    return undefined
  }

  // ---- the end

  /** Every instance answers every item, unmarked, as PostgreSQL has it, and without anybody's help. */
  async #recover(): Promise<void> {
    for (const way of [...this.#postgresWays, ...this.#redisWays]) way.setFault(NO_FAULT)
    this.#world.redis.signal('SIGCONT')
    for (const instance of this.#instances) if (instance.stopped) instance.resume()
    const { tenants, ids } = this.#plan
    await using sql = await connectSql(this.#world.postgres.url(this.#database))
    // Asked again each time: a write that nobody waits for any more may still be under way.
    const actual = async (sql: pg.Client, tenant: string, id: string): Promise<Content> => {
      const { rows } = await sql.query(
        `SELECT title || '|' || description AS content FROM items WHERE tenant = $1 AND id = $2 AND NOT deleted`,
        [tenant, id],
      )
      return rows[0]?.content ?? null
    }
    const start = performance.now()
    this.#streamsBy = start + 2 * RECOVERY_MS
    const state: ClientState = {
      client: CLIENTS,
      op: '',
      seen: new Map(),
      versions: new Map(),
      carries: false,
    }
    await Promise.all(
      INSTANCES.map(async (name, at) => {
        await using own = await connectSql(this.#world.postgres.url(this.#database))
        for (let n = 0; n < tenants; n++) {
          const tenant = `tenant-${n}`
          for (const id of ids) {
            for (let i = 0; ; i++) {
              await this.#read({ ...state, op: `final.${name}.${n}.${id}.${i}` }, at, tenant, [id], {
                min: 0,
                freshness: 'DEFAULT',
                allowStale: true,
                batch: false,
              })
              const last = this.#lastRead(`final.${name}.${n}.${id}.${i}`)
              const want = await actual(own, tenant, id)
              const ok = last?.error === undefined && last?.stale === undefined && last?.content === want
              const afterMs = performance.now() - start
              if (!ok && afterMs < RECOVERY_MS) {
                await sleep(50)
                continue
              }
              if (!ok) {
                const what = `${name} ${tenant}/${id} is ${want}, answered ${JSON.stringify(last)}`
                this.#record({ t: 'final', what, ok, afterMs })
              }
              break
            }
          }
        }
      }),
    )
    for (const { name, revision } of (await sql.query('SELECT name, revision FROM tenants')).rows) {
      this.#head.set(name, revision)
    }
    this.#note(`recovered after ${Math.round(performance.now() - start)} ms`)
  }

  #lastRead(op: string): ReadResult | undefined {
    for (let i = this.#events.length - 1; i >= 0; i--) {
      const event = this.#events[i]
      if (event?.t === 'read' && event.op === op) return event.results[0]
    }
    return undefined
  }

  async #testify(): Promise<void> {
    const { postgres } = this.#world
    for (const { dir, timeline } of this.#replaced) {
      const testimony = await postgres.autopsy(dir, this.#database, testimonyOf)
      this.#record({ t: 'testimony', timeline, ...testimony })
    }
    await using sql = await connectSql(postgres.url(this.#database))
    this.#record({ t: 'testimony', timeline: await timelineOf(sql), ...(await testimonyOf(sql)) })
  }
}

interface ClientState {
  readonly client: number
  readonly op: string
  /** The highest revision seen of each tenant. */
  readonly seen: Map<string, number>
  /** The row revisions seen of each item, for etags. */
  readonly versions: Map<string, number>
  /** Sends the highest revision seen with every read. */
  readonly carries: boolean
}

/** Not what the code under test says of it. */
async function timelineOf(sql: pg.Client): Promise<number> {
  const { rows } = await sql.query(
    `SELECT ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::integer AS timeline`,
  )
  return Number(rows[0].timeline)
}

/** Deletes all but the newest row, as retention does. */
function trimming(tenant: string): readonly [string, unknown[]][] {
  return [
    [
      'DELETE FROM invalidations WHERE tenant = $1 AND revision < (SELECT revision FROM tenants WHERE name = $1)',
      [tenant],
    ],
  ]
}

function bulkEdit(tenant: string, title: string): readonly [string, unknown[]][] {
  return [
    [
      `INSERT INTO items (tenant, id, title) SELECT $1, 'bulk-' || n, $2 FROM generate_series(1, 1050) AS n`,
      [tenant, title],
    ],
  ]
}

const contentOf = (item: Item): Content => `${item.title}|${item.description}`

function resultOf(id: string, item: Item | null | undefined, cache: CacheStatus | undefined): ReadResult {
  const status = {
    ...(cache !== undefined && {
      asOf: Number(cache.asOf),
      tier: nameOf(Tier, cache.tier),
      outcome: nameOf(CacheOutcome, cache.outcome),
      ...staleOf(cache),
    }),
  }
  if (item === undefined) return { id, ...status }
  if (item === null) return { id, content: null, ...status }
  return { id, content: contentOf(item), rowRevision: Number(item.revision), ...status }
}

/** The mark of an answer that is marked. */
function staleOf(cache: CacheStatus | undefined): Pick<ReadResult, 'stale'> {
  if (cache?.outcome !== CacheOutcome.STALE) return {}
  return { stale: nameOf(StaleReason, cache.staleReason) as NonNullable<ReadResult['stale']> }
}

function nameOf(names: Readonly<Record<string, number>>, value: number): string {
  return Object.keys(names).find((name) => names[name] === value) ?? `${value}`
}
