/**
 * `npm run soak -- --minutes N`: one instance under load for a long time, and whether it grows.
 *
 * Several tenants are read by Zipf's law, written, invalidated, listed and read in batches; Redis is killed and started
 * again; subscribers hardly read, or not at all; connections come and go, some without a word; strangers make up tenants. The
 * bounds of the service are set low, so that each is reached within the first minutes. Every ten seconds there is a line,
 * and at the end a verdict: exit code 1 when resident memory or descriptors grew over the second half, when unexpected
 * errors came, or when something is still held after the load has ended.
 */
import { mkdirSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import type { MessageInitShape } from '@bufbuild/protobuf'
import { status } from '@grpc/grpc-js'
import type pg from 'pg'
import { startCatalogue } from '../../src/embedded/catalogue.ts'
import { startPostgres } from '../../src/embedded/postgres.ts'
import type { InvalidateItemsRequestSchema } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { Caller, isFailed } from '../consistency/client.ts'
import { connectSql, Instance, RedisServer } from '../consistency/servers.ts'
import { CallerConnection } from '../support/http2-calls.ts'
import { makeRunDirectory } from '../support/run-directory.ts'
import { seededRandom, zipfTrace } from '../support/zipf.ts'

type InvalidationTarget = NonNullable<MessageInitShape<typeof InvalidateItemsRequestSchema>['target']>

const ROOT = resolve(import.meta.dirname, '../..')

const TENANTS = Array.from({ length: 6 }, (_, i) => `soak-${i}`)
const KEYS = 5_000
const READERS = 6
const WRITERS = 2
const WATCHERS_PER_TENANT = 3
const SLOW_WATCHERS = 24
/** What a slow watcher takes at a time, and how often. */
const SIP = { bytes: 512, everyMs: 2_000 }
const REDIS = { upMs: 12_000, downMs: 4_000 }
const LINE_MS = 10_000

/** Low bounds, so that a soak sees the service at all of them, and what it holds when it is full. */
const BOUNDS = {
  ITEMCACHE_MEMORY_MAX_ENTRIES: '2000',
  ITEMCACHE_MEMORY_MAX_BYTES: '3MiB',
  ITEMCACHE_MAX_TENANTS: '40',
  ITEMCACHE_MAX_FLOORS: '500',
  ITEMCACHE_RING_ROWS: '200',
  ITEMCACHE_RING_BYTES: '64KiB',
  ITEMCACHE_RATE_LIMIT: '100000:100000',
  ITEMCACHE_FRESH_FOR: '5s',
  ITEMCACHE_MAX_STALE: '1m',
}
/** So that resident memory is what is held, and not what V8 has not collected yet. */
const NODE_ARGUMENTS = ['--max-old-space-size=160', '--max-semi-space-size=8']

/** What a caller has to expect: items that are not there, and writers who meet. */
const EXPECTED: ReadonlySet<number> = new Set([status.NOT_FOUND])
/** What a machine that is too busy may cause; more than this share of all calls is a failure. */
const TOLERATED: ReadonlySet<number> = new Set([
  status.DEADLINE_EXCEEDED,
  status.UNAVAILABLE,
  status.ABORTED,
  status.RESOURCE_EXHAUSTED,
])
const TOLERATED_SHARE = 0.001

/** One line of the log. Megabytes and milliseconds. */
export interface Sample {
  readonly atMs: number
  readonly residentMb: number
  readonly heapMb: number
  readonly descriptors: number
  readonly loopP99Ms: number
  readonly perSecond: number
}

export interface Summary {
  readonly calls: number
  readonly errors: ReadonlyMap<string, number>
  readonly redisKills: number
  /** Growth over the second half, by a straight line through its samples; `undefined`: too few. */
  readonly growth: { readonly residentMb: number; readonly descriptors: number } | undefined
  /** What was held before the load, and what after it. */
  readonly base: Held
  readonly after: Held
  /** What must not be, in words. */
  readonly problems: readonly string[]
}

/** What the service holds, by `itemcache_held`, with its descriptors. */
export interface Held {
  readonly descriptors: number
  readonly subscribers: number
  readonly [what: string]: number
}

export interface SoakOptions {
  readonly seconds: number
  /** A database of its own, and the same as a superuser, to whom the items of every tenant are open. */
  readonly databaseUrl: string
  readonly superuserUrl: string
  readonly directory: string
  /** Where an unpacked Redis is kept. */
  readonly redisCache: string
  readonly progress: (line: string) => void
  readonly seed?: number
  /** Most growth over the second half; `undefined`: growth is not judged. */
  readonly tolerance?: { readonly residentMb: number; readonly descriptors: number }
  /** Calls may fail for want of time: what is held is judged, and that nothing unexpected comes. */
  readonly busyMachine?: boolean
  /** From one line to the next, and how long Redis is up and down. */
  readonly pace?: { readonly lineMs: number; readonly redisUpMs: number; readonly redisDownMs: number }
}

export async function soak(options: SoakOptions): Promise<Summary> {
  const { seconds, databaseUrl, directory, progress, seed = 1 } = options
  const { lineMs, redisUpMs, redisDownMs } = options.pace ?? {
    lineMs: LINE_MS,
    redisUpMs: REDIS.upMs,
    redisDownMs: REDIS.downMs,
  }
  await using started = new AsyncDisposableStack()
  mkdirSync(directory, { recursive: true })
  const redis = started.use(await RedisServer.start(directory, options.redisCache))
  const catalogue = started.use(await startCatalogue())
  const service = started.use(
    new Instance(
      'service',
      ROOT,
      {
        DATABASE_URL: databaseUrl,
        REDIS_URL: `unix:${redis.target.path}`,
        ORIGIN_URL: catalogue.url,
        ITEMCACHE_LISTEN: '127.0.0.1:0',
        ITEMCACHE_ADMIN_LISTEN: '127.0.0.1:0',
        ITEMCACHE_LOG_LEVEL: 'warn',
        ...BOUNDS,
      },
      join(directory, 'service.log'),
      NODE_ARGUMENTS,
    ),
  )
  await service.start()
  await fill(options.superuserUrl)
  const base = await heldBy(service.admin)
  const load = new Load(service.address, seed, options.busyMachine ? 1 : TOLERATED_SHARE)
  const samples: Sample[] = []
  const startedMs = performance.now()
  const endsMs = startedMs + seconds * 1000
  let redisKills = 0

  const flapping = (async () => {
    while (!load.over) {
      await load.pause(redisUpMs)
      if (load.over) return
      await redis.kill()
      redisKills++
      await load.pause(redisDownMs)
      await redis.restart('empty')
    }
  })()
  const working = load.run()
  let last = { calls: 0, atMs: startedMs }
  while (performance.now() < endsMs && service.running) {
    await sleep(Math.max(0, Math.min(lineMs, endsMs - performance.now())))
    const now = { calls: load.calls, atMs: performance.now() }
    const perMs = (now.calls - last.calls) / (now.atMs - last.atMs)
    const sample = await sampled(service.admin, now.atMs - startedMs, perMs)
    last = now
    samples.push(sample)
    progress(lineOf(sample, load.errors))
  }
  load.over = true
  await Promise.all([working, flapping])

  const problems = [...load.problems]
  if (!service.running) problems.push('the service ended')
  const after = await heldAfter(service.admin, base)
  for (const what of ['descriptors', 'subscribers', ...MUST_END] as const) {
    // A pool may keep connections that it opened under load: there are ten at most, and three for the log.
    const most = (base[what] ?? 0) + (what === 'descriptors' ? 13 : 0)
    if ((after[what] ?? 0) > most) {
      problems.push(`${what}: ${after[what]} after the load, at most ${most} expected`)
    }
  }
  const growth = growthOf(samples.filter(({ atMs }) => atMs >= (seconds * 1000) / 2))
  if (options.tolerance !== undefined) {
    for (const what of ['residentMb', 'descriptors'] as const) {
      const most = options.tolerance[what]
      if (growth === undefined) problems.push('there are too few samples to judge growth by')
      else if (growth[what] > most) {
        problems.push(`${what} grew by ${growth[what].toFixed(1)}; ${most} are tolerated`)
      }
    }
  }
  return { calls: load.calls, errors: load.errors, redisKills, growth, base, after, problems }
}

/** What ends with the load, of what `itemcache_held` tells. */
const MUST_END = [
  'calls',
  'flights',
  'background',
  'waiters',
  'rings',
  'watching_connections',
  'tenant_locks',
]

/** Everything that uses the service, until it is over. */
class Load {
  readonly #address: string
  readonly #random: () => number
  readonly #keys: Uint32Array
  readonly #toleratedShare: number
  #next = 0
  calls = 0
  over = false
  readonly errors = new Map<string, number>()
  readonly #unexpected: string[] = []

  constructor(address: string, seed: number, toleratedShare: number) {
    this.#address = address
    this.#toleratedShare = toleratedShare
    this.#random = seededRandom(seed)
    this.#keys = zipfTrace({ keys: KEYS, length: 100_000, exponent: 0.9, random: this.#random })
  }

  async run(): Promise<void> {
    await Promise.all([
      ...Array.from({ length: READERS }, () => this.#reads()),
      ...Array.from({ length: WRITERS }, () => this.#writes()),
      this.#invalidations(),
      this.#lists(),
      this.#batches(),
      this.#strangers(),
      this.#comersAndGoers(),
      ...TENANTS.flatMap((tenant) =>
        Array.from({ length: WATCHERS_PER_TENANT }, () => this.#watches(tenant)),
      ),
      this.#slowWatchers(),
    ])
  }

  get problems(): readonly string[] {
    const problems = [...this.#unexpected.slice(0, 10)]
    let tolerated = 0
    for (const [code, count] of this.errors) {
      if (TOLERATED.has(status[code as keyof typeof status])) tolerated += count
    }
    if (tolerated > Math.max(5, this.calls * this.#toleratedShare)) {
      problems.push(`${tolerated} of ${this.calls} calls failed in ways that only few may`)
    }
    return problems
  }

  /** Ends early when the load is over. */
  async pause(ms: number): Promise<void> {
    const untilMs = performance.now() + ms
    while (!this.over && performance.now() < untilMs) {
      await sleep(Math.max(0, Math.min(100, untilMs - performance.now())))
    }
  }

  #tenant(): string {
    return TENANTS[Math.floor(this.#random() * TENANTS.length)] ?? ''
  }

  /** Small numbers are products of the catalogue, or none. */
  #key(): string {
    this.#next = (this.#next + 1) % this.#keys.length
    return `${(this.#keys[this.#next] ?? 0) + 1}`
  }

  #note(code: number, text: string): void {
    const name = status[code] ?? `${code}`
    this.errors.set(name, (this.errors.get(name) ?? 0) + 1)
    if (!EXPECTED.has(code) && !TOLERATED.has(code)) this.#unexpected.push(text)
  }

  async #call<Name extends Parameters<Caller['call']>[0]>(
    caller: Caller,
    name: Name,
    request: Parameters<typeof Caller.prototype.call<Name>>[1],
    tenant: string,
  ) {
    const answer = await caller.call(name, request, {
      metadata: { 'x-tenant-id': tenant },
      timeoutMs: 10_000,
    })
    this.calls++
    if (!isFailed(answer)) return answer
    this.#note(answer.code, `${name}: ${answer.text}`)
    return undefined
  }

  async #loop(pauseMs: number, body: (caller: Caller) => Promise<unknown>): Promise<void> {
    const caller = new Caller(this.#address)
    while (!this.over) {
      await body(caller)
      if (pauseMs > 0) await sleep(pauseMs * (0.5 + this.#random()))
    }
    caller.close()
  }

  #reads(): Promise<void> {
    return this.#loop(20, async (caller) => {
      const tenant = this.#tenant()
      await Promise.all(
        Array.from({ length: 8 }, () => this.#call(caller, 'getItem', { id: this.#key() }, tenant)),
      )
    })
  }

  #writes(): Promise<void> {
    let written = 0
    return this.#loop(60, async (caller) => {
      const id = this.#key()
      written++
      if (written % 20 === 0) {
        await this.#call(caller, 'deleteItem', { id, allowMissing: true }, this.#tenant())
        return
      }
      await this.#call(
        caller,
        'updateItem',
        {
          item: {
            id,
            title: `Number ${written}`,
            description: 'd'.repeat(Math.floor(this.#random() * 2_000)),
            category: `c${written % 30}`,
            tags: [`t${written % 100}`, `u${written % 7}`],
          },
          allowMissing: true,
          requestId: `${this.#random()}`,
        },
        this.#tenant(),
      )
    })
  }

  #invalidations(): Promise<void> {
    let made = 0
    return this.#loop(250, async (caller) => {
      made++
      const ids = Array.from({ length: 20 }, () => this.#key())
      const target: InvalidationTarget =
        made % 60 === 0
          ? { case: 'all', value: true }
          : made % 3 === 0
            ? { case: 'tags', value: { tags: [`t${made % 100}`] } }
            : { case: 'ids', value: { ids } }
      await this.#call(caller, 'invalidateItems', { target, mode: made % 5 === 0 ? 2 : 1 }, this.#tenant())
    })
  }

  #lists(): Promise<void> {
    return this.#loop(300, async (caller) => {
      const tenant = this.#tenant()
      const filter = this.#random() < 0.5 ? { tag: 'u3' } : { category: 'c5' }
      const page = await this.#call(caller, 'listItems', { pageSize: 50, ...filter }, tenant)
      if (page === undefined || page.nextPageToken === '') return
      await this.#call(
        caller,
        'listItems',
        { pageSize: 50, ...filter, pageToken: page.nextPageToken },
        tenant,
      )
    })
  }

  #batches(): Promise<void> {
    return this.#loop(150, (caller) =>
      this.#call(
        caller,
        'batchGetItems',
        { ids: Array.from({ length: 50 }, () => this.#key()) },
        this.#tenant(),
      ),
    )
  }

  /** Tenants that come once and never again. */
  #strangers(): Promise<void> {
    return this.#loop(200, (caller) =>
      this.#call(caller, 'getItem', { id: 'x' }, `stranger-${Math.floor(this.#random() * 1e9)}`),
    )
  }

  /** Connections that are opened, used and left: with a farewell, in the middle of calls, or without a word. */
  async #comersAndGoers(): Promise<void> {
    let came = 0
    while (!this.over) {
      came++
      const tenant = this.#tenant()
      if (came % 2 === 0) {
        using connection = new CallerConnection(this.#address)
        for (let i = 0; i < 5; i++) {
          connection.open('getItem', { id: this.#key() }, tenant).resume()
          connection.open('watchInvalidations', {}, tenant).resume()
          const lookUps = connection.open('streamItems', { id: this.#key(), correlationId: 1n }, tenant)
          if (i % 2 === 0) lookUps.resume()
        }
        connection.begin('updateItem', tenant)
        connection.begin('watchMetrics', tenant)
        await sleep(100 * this.#random())
      } else {
        const caller = new Caller(this.#address)
        await this.#call(caller, 'getItem', { id: this.#key() }, tenant)
        caller.close()
      }
      await this.pause(150)
    }
  }

  /** A subscriber who keeps up, and comes back now and then where it left off. */
  async #watches(tenant: string): Promise<void> {
    const caller = new Caller(this.#address)
    let resumeAfter: bigint | undefined
    while (!this.over) {
      const call = caller.watch(
        { ...(resumeAfter !== undefined && { resumeAfter }), includeItems: this.#random() < 0.3 },
        { 'x-tenant-id': tenant },
      )
      call.on('data', ({ event }) => {
        if (event.case === 'batch') resumeAfter = event.value.events.at(-1)?.revision
        else if (event.case === 'gap') resumeAfter = event.value.through
      })
      let left = false
      call.on('error', ({ code, message }: Error & { code: number }) => {
        if (!left) this.#note(code, `watch: ${message}`)
      })
      await this.pause(5_000 + 25_000 * this.#random())
      left = true
      call.cancel()
    }
    caller.close()
  }

  /** Subscribers of all rows with their items, who take a sip now and then, or nothing at all; replaced every minute. */
  async #slowWatchers(): Promise<void> {
    while (!this.over) {
      using connections = new DisposableStack()
      const streams = Array.from({ length: SLOW_WATCHERS }, (_, i) => {
        const connection = connections.use(new CallerConnection(this.#address))
        return connection.open('watchInvalidations', { includeItems: i % 2 === 0 }, TENANTS[i % 2] ?? '')
      })
      const sips = setInterval(() => {
        for (const [i, stream] of streams.entries()) if (i % 3 > 0) stream.read(SIP.bytes)
      }, SIP.everyMs)
      await this.pause(60_000)
      clearInterval(sips)
    }
  }
}

/** Every other key of each tenant is an item; the rest are not there until somebody writes them. */
async function fill(superuserUrl: string): Promise<void> {
  await using sql = await connectSql(superuserUrl)
  const insert: pg.QueryConfig & Pick<pg.ClientConfig, 'query_timeout'> = {
    text: `INSERT INTO items (tenant, id, title, description, category)
      SELECT tenant, (2 * n)::text, 'Item ' || n, repeat('d', n % 1500), 'c' || n % 30
      FROM unnest($1::text[]) AS tenant CROSS JOIN generate_series(11, $2::integer) AS n`,
    values: [TENANTS, KEYS / 2],
    // Of many rows, on a machine that may be busy.
    query_timeout: 60_000,
  }
  await sql.query(insert)
}

async function exposition(admin: string): Promise<ReadonlyMap<string, number>> {
  const text = await (await fetch(`http://${admin}/metrics`)).text()
  const lines = text.split('\n').filter((line) => line !== '' && !line.startsWith('#'))
  return new Map(
    lines.map((line) => [line.slice(0, line.lastIndexOf(' ')), Number(line.slice(line.lastIndexOf(' ')))]),
  )
}

async function sampled(admin: string, atMs: number, perMs: number): Promise<Sample> {
  const values = await exposition(admin)
  const value = (name: string) => values.get(name) ?? Number.NaN
  return {
    atMs,
    residentMb: value('process_resident_memory_bytes') / 2 ** 20,
    heapMb: value('nodejs_heap_size_used_bytes') / 2 ** 20,
    descriptors: value('process_open_fds'),
    loopP99Ms: value('nodejs_eventloop_lag_p99_seconds') * 1000,
    perSecond: perMs * 1000,
  }
}

async function heldBy(admin: string): Promise<Held> {
  const values = await exposition(admin)
  const held = [...values].flatMap(([name, value]) => {
    const [, what] = /^itemcache_held\{what="(\w+)"\}$/.exec(name) ?? []
    return what === undefined ? [] : [[what, value] as const]
  })
  return {
    ...Object.fromEntries(held),
    descriptors: values.get('process_open_fds') ?? 0,
    subscribers: values.get('itemcache_subscribers') ?? 0,
  }
}

/** What is held once it does not become less any more: connections take a moment to be noticed as gone. */
async function heldAfter(admin: string, base: Held): Promise<Held> {
  const giveUpMs = performance.now() + 60_000
  for (;;) {
    const held = await heldBy(admin)
    const done =
      held.descriptors <= base.descriptors + 13 &&
      held.subscribers <= base.subscribers &&
      MUST_END.every((what) => (held[what] ?? 0) <= (base[what] ?? 0))
    if (done || performance.now() > giveUpMs) return held
    await sleep(200)
  }
}

function lineOf(sample: Sample, errors: ReadonlyMap<string, number>): string {
  const { atMs, residentMb, heapMb, descriptors, loopP99Ms, perSecond } = sample
  return [
    `${(atMs / 1000).toFixed(0)} s`,
    `resident ${residentMb.toFixed(0)} MB`,
    `heap ${heapMb.toFixed(0)} MB`,
    `descriptors ${descriptors}`,
    `event loop p99 ${loopP99Ms.toFixed(0)} ms`,
    `${perSecond.toFixed(0)} calls/s`,
    `errors ${[...errors].map(([code, count]) => `${code} ${count}`).join(', ') || 'none'}`,
  ].join(' · ')
}

/** How much the straight line that fits best rises from the first sample to the last. */
function growthOf(samples: readonly Sample[]): Summary['growth'] {
  if (samples.length < 4) return undefined
  const mean = (values: readonly number[]) => values.reduce((sum, one) => sum + one, 0) / values.length
  const times = samples.map(({ atMs }) => atMs)
  const meanTime = mean(times)
  const span = (times.at(-1) ?? 0) - (times[0] ?? 0)
  const rise = (values: readonly number[]) => {
    const meanValue = mean(values)
    let [above, below] = [0, 0]
    for (const [i, time] of times.entries()) {
      above += (time - meanTime) * ((values[i] ?? 0) - meanValue)
      below += (time - meanTime) ** 2
    }
    return (above / below) * span
  }
  return {
    residentMb: rise(samples.map(({ residentMb }) => residentMb)),
    descriptors: rise(samples.map(({ descriptors }) => descriptors)),
  }
}

if (process.argv[1] === import.meta.filename) {
  const { values } = parseArgs({
    options: {
      minutes: { type: 'string', default: '20' },
      seed: { type: 'string', default: '1' },
      /** Most growth over the second half. The descriptors of those who come and go are 20 more or less by chance. */
      'max-mb': { type: 'string', default: '10' },
      'max-descriptors': { type: 'string', default: '30' },
    },
  })
  const tolerance = {
    residentMb: Number(values['max-mb']),
    descriptors: Number(values['max-descriptors']),
  }
  await using directory = makeRunDirectory()
  await using postgres = await startPostgres({ dataDir: directory.path })
  directory.ends(postgres.pid, 'SIGQUIT')
  const { calls, errors, redisKills, growth, after, problems } = await soak({
    seconds: Number(values.minutes) * 60,
    databaseUrl: postgres.serviceUrl,
    superuserUrl: postgres.url,
    directory: join(directory.path, 'soak'),
    redisCache: join(ROOT, '.itemcache', 'cache'),
    progress: console.log,
    seed: Number(values.seed),
    tolerance,
  })
  console.log(
    `${values.minutes} minutes, ${calls} calls, Redis killed ${redisKills} times, errors: ${JSON.stringify(Object.fromEntries(errors))}`,
  )
  console.log(
    `growth over the second half: resident memory ${growth?.residentMb.toFixed(1)} MB (at most ` +
      `${tolerance.residentMb}), descriptors ${growth?.descriptors.toFixed(1)} (at most ${tolerance.descriptors})`,
  )
  console.log(`held after the load: ${JSON.stringify(after)}`)
  for (const problem of problems) console.log(`PROBLEM: ${problem}`)
  console.log(problems.length === 0 ? 'verdict: it does not grow' : 'verdict: FAILED')
  process.exitCode = problems.length === 0 ? 0 : 1
}
