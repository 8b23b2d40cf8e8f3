/**
 * Schedules of the read path: the real reader, writer, tail and memory tier, over a database and a Redis that answer
 * when fast-check says so. Every step of every call (a statement is run, its answer arrives, a notification is
 * delivered, a late store lands) is one task of the scheduler, so each run is one interleaving, and a failing one shrinks.
 */
import fc from 'fast-check'
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest'
import { ItemCacheError } from '../../src/errors.ts'
import { Tail, untilAborted } from '../../src/invalidation/tail.ts'
import type { LogRow } from '../../src/invalidation/view.ts'
import type { ItemDraft } from '../../src/item.ts'
import { createLogger } from '../../src/observe/log.ts'
import { Metrics } from '../../src/observe/metrics.ts'
import { Flights, type Group } from '../../src/service/flights.ts'
import { Probe } from '../../src/service/probe.ts'
import {
  type Answer,
  DEFAULT_READ,
  Reader,
  type ReaderOptions,
  type ReadOptions,
} from '../../src/service/read.ts'
import { type Write, Writer } from '../../src/service/write.ts'
import { MemoryTier } from '../../src/tiers/memory.ts'
import type {
  CacheTier,
  Copy,
  InvalidationMode,
  InvalidationTarget,
  LoadLocks,
  LockState,
  LogEntry,
  LogListener,
  LogPage,
  LogSource,
  OriginTier,
  Revision,
  Snapshot,
  StoreTier,
  Written,
} from '../../src/tiers/tier.ts'

const TENANT = 'tenant'
const IDS = ['a', 'b'] as const
type Id = (typeof IDS)[number]
const TAGS = ['t', 'u'] as const
const NEVER_MS = 2 ** 30
/** Longer than any pause between two looks. */
const PAUSE_MS = 100

/** Resolves when the scheduler says so. */
type Gate = (what: string) => Promise<void>

/** A tenant's items and log, revision by revision. What an item holds is the revision that wrote it. */
class Database implements StoreTier, LogSource {
  readonly name = 'postgres'
  /** How often each id was selected. */
  readonly selects = new Map<string, number>()
  /** This many SELECTs fail. */
  failing = 0
  readonly #gate: Gate
  readonly #rows: LogEntry[] = []
  /** `tags` are `undefined` when the item was deleted. */
  readonly #changes: { id: string; revision: Revision; tags: readonly string[] | undefined }[] = []
  readonly #listeners: LogListener[] = []

  constructor(gate: Gate) {
    this.#gate = gate
  }

  get revision(): Revision {
    return this.#rows.length
  }

  /** The item as of a revision. */
  at(id: string, asOf: Revision): Snapshot {
    const change = this.#changes.findLast((one) => one.id === id && one.revision <= asOf)
    if (change === undefined) {
      return { id, asOf, state: 'unknown', bytes: undefined, revision: 0, tags: [] }
    }
    const { revision, tags } = change
    return tags === undefined
      ? { id, asOf, state: 'deleted', bytes: undefined, revision, tags: [] }
      : { id, asOf, state: 'present', bytes: Buffer.of(revision), revision, tags }
  }

  /** Commits a change. Listeners hear of it some time later. */
  commit(row: Omit<LogRow, 'revision'>): Revision {
    const revision = this.revision + 1
    this.#rows.push({ ...row, revision, committedAtMs: 0, ageMs: 0, writer: '' })
    void this.#gate('notification').then(() => {
      for (const listener of this.#listeners) listener.changed(TENANT)
    })
    return revision
  }

  /** Writes an item; with `undefined` for its tags, deletes it. */
  put(id: string, tags: readonly string[] | undefined): Revision {
    const former = this.at(id, this.revision).tags
    const revision =
      tags === undefined
        ? this.commit({ kind: 'DELETED', mode: 'REMOVE', ids: [id], tags: former })
        : this.commit({ kind: 'UPSERTED', mode: 'EXPIRE', ids: [id], tags: [...former, ...tags] })
    this.#changes.push({ id, revision, tags })
    return revision
  }

  async read(_: string, ids: readonly string[]): Promise<ReadonlyMap<string, Snapshot>> {
    for (const id of ids) this.selects.set(id, (this.selects.get(id) ?? 0) + 1)
    await this.#gate(`select ${ids}`)
    const found = new Map(ids.map((id) => [id, this.at(id, this.revision)]))
    const fails = this.failing > 0
    if (fails) this.failing--
    await this.#gate(`rows ${ids}`)
    if (fails) throw new ItemCacheError('unavailable', 'the database cannot be reached')
    return found
  }

  /** Keeps the tags. */
  async update(_: Write, id: string): Promise<Written> {
    return this.#written(id, () => this.put(id, this.at(id, this.revision).tags))
  }

  async replaceKnown(): Promise<ReadonlyMap<string, Written>> {
    return new Map()
  }

  async delete(_: Write, id: string): Promise<Written> {
    return this.#written(id, () => this.put(id, undefined))
  }

  async invalidate(_: Write, target: InvalidationTarget, mode: InvalidationMode): Promise<Revision> {
    await this.#gate('commit')
    const revision = this.commit(rowOf(target, mode))
    await this.#gate('committed')
    return revision
  }

  async insertLoaded(
    _: string,
    loaded: ReadonlyMap<string, unknown>,
  ): Promise<ReadonlyMap<string, Snapshot>> {
    const ids = [...loaded.keys()]
    await this.#gate(`insert ${ids}`)
    for (const of of ids) if (this.at(of, this.revision).state === 'unknown') this.put(of, [])
    await this.#gate(`inserted ${ids}`)
    return this.read('', ids)
  }

  seen(): void {}

  async outcomeOf(): Promise<undefined> {}

  async newest(): Promise<LogPage> {
    return this.#page(0, 'newest')
  }

  async after(positions: ReadonlyMap<string, Revision>): Promise<ReadonlyMap<string, LogPage>> {
    return new Map([[TENANT, await this.#page(positions.get(TENANT) ?? 0, 'poll')]])
  }

  async listen(listener: LogListener): Promise<AsyncDisposable> {
    this.#listeners.push(listener)
    return { [Symbol.asyncDispose]: async () => {} }
  }

  async #page(after: Revision, what: string): Promise<LogPage> {
    await this.#gate(what)
    const page = { revision: this.revision, rows: this.#rows.slice(after), complete: true }
    await this.#gate(`${what} answered`)
    return page
  }

  async #written(id: string, commit: () => Revision): Promise<Written> {
    await this.#gate('commit')
    const formerTags = this.at(id, this.revision).tags
    const revision = commit()
    const snapshot = this.at(id, revision)
    await this.#gate('committed')
    return { snapshot, revision, replayed: false, formerTags }
  }

  bounds = unused
  trim = unused
  list = unused
  create = unused
  refetched = unused
  inspect = unused
  ping = unused
}

function unused(): never {
  throw new Error('the read path has no use for this')
}

function rowOf(target: InvalidationTarget, mode: InvalidationMode): Omit<LogRow, 'revision'> {
  return target.kind === 'ids'
    ? { kind: 'KEYS_INVALIDATED', mode, ids: target.ids, tags: [] }
    : target.kind === 'tags'
      ? { kind: 'TAGS_INVALIDATED', mode, ids: [], tags: target.tags }
      : { kind: 'TENANT_INVALIDATED', mode, ids: [], tags: [] }
}

/** Keeps what the memory tier keeps, but reads and stores take effect late. */
function gatedRedis(copies: MemoryTier, gate: Gate): CacheTier {
  return {
    name: 'redis',
    async read(tenant, ids) {
      await gate('redis read')
      const answer = await copies.read(tenant, ids)
      await gate('redis answered')
      return answer
    },
    async store(tenant, stored) {
      await gate('redis store')
      await copies.store(tenant, stored)
    },
    inspect: unused,
  }
}

/** Locks that are given and taken late, like everything else. What is lost is as if their time were over. */
class Locks implements LoadLocks {
  readonly held = new Map<string, string>()
  readonly #handedOn = new Set<string>()
  readonly #gate: Gate

  constructor(gate: Gate) {
    this.#gate = gate
  }

  async acquire(_: string, claims: readonly { id: string; token: string }[]) {
    await this.#gate('lock')
    const states = new Map<string, LockState>()
    for (const { id, token } of claims) {
      const holder = this.held.get(id) ?? token
      const isHandedOn = !this.held.has(id) && this.#handedOn.delete(id)
      this.held.set(id, holder)
      states.set(id, isHandedOn ? 'handed-on' : holder === token ? 'ours' : NEVER_MS)
    }
    await this.#gate('lock answered')
    return states
  }

  async release(_: string, { id, token }: { id: string; token: string }) {
    await this.#gate('unlock')
    if (this.held.get(id) !== token) return
    this.held.delete(id)
    this.#handedOn.add(id)
  }

  async renew() {}
}

/** Notes which copies were stored that do not pass. */
class WatchedMemory extends MemoryTier {
  readonly unfit: Copy[] = []
  passes: (copy: Copy) => boolean = () => true

  override set(tenant: string, copy: Copy): boolean {
    if (!this.passes(copy)) this.unfit.push(copy)
    return super.set(tenant, copy)
  }
}

/** What instances have in common. */
function surroundings(gate: Gate) {
  const options = { maxBytes: 1e6, maxStaleMs: NEVER_MS, now: () => 0, random: () => 0 }
  const origin: OriginTier | undefined = undefined
  return {
    postgres: new Database(gate),
    shared: new MemoryTier({ ...options, maxEntries: 100 }),
    locks: new Locks(gate),
    origin: origin as OriginTier | undefined,
  }
}

function instance(
  gate: Gate,
  {
    maxFloors = 1000,
    maxEntries = 100,
    around = surroundings(gate),
    settings = {} as Partial<ReaderOptions>,
  } = {},
) {
  const clock = { nowMs: 0 }
  const now = () => clock.nowMs
  const random = () => 0
  const options = { maxBytes: 1e6, maxStaleMs: settings.maxStaleMs ?? NEVER_MS, now, random }
  const memory = new WatchedMemory({ ...options, maxEntries })
  const { postgres, shared, locks, origin } = around
  const metrics = new Metrics({ methods: [] })
  const log = createLogger({ level: 'silent', version: '0' })
  const tail = new Tail({
    source: postgres,
    metrics,
    log,
    now,
    pollMs: NEVER_MS,
    maxTenants: 10,
    maxTotalFloors: NEVER_MS,
    maxFloors,
    idleMs: NEVER_MS,
    exclusive: (tenant, section) => memory.exclusive(tenant, section),
  })
  // To store a copy may make the view forget a floor, which may fail the copy at once: the next reader will see.
  if (maxFloors > IDS.length) memory.passes = (copy) => tail.raising(TENANT)?.judge(copy) === 'current'
  const probe = new Probe({ postgres, metrics, log, now, random, oneIn: 0 })
  const redis = gatedRedis(shared, gate)
  const parts = { memory, redis, postgres, origin, locks, tail, probe, metrics }
  const reader = new Reader(parts, {
    freshForMs: NEVER_MS,
    negativeTtlMs: NEVER_MS,
    jitter: 0,
    maxStaleMs: NEVER_MS,
    softTimeoutMs: NEVER_MS,
    refreshTimeoutMs: NEVER_MS,
    failureTtlMs: 0,
    lockTtlMs: NEVER_MS,
    earlyRefresh: 0,
    largeReads: 1,
    rolloutPercent: 100,
    now,
    random,
    ...settings,
  })
  const writer = new Writer({ reader, postgres, origin, tail })
  return { clock, memory, shared, locks, postgres, metrics, tail, reader, writer }
}

type Instance = ReturnType<typeof instance>

const signal = new AbortController().signal
const write: Write = { tenant: TENANT, requestId: '', fingerprint: '', clientId: '', signal }
// No timer of the code runs unless a test says so.
beforeAll(() => {
  vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout', 'setInterval', 'clearInterval'] })
})
afterAll(() => {
  vi.useRealTimers()
})

const turn = () => new Promise<void>((resolve) => setImmediate(resolve))

/**
 * The steps of one run, in the order that fast-check chooses. `turns` says after which of them the event loop comes
 * round, which is when flights leave.
 */
class Schedule implements AsyncDisposable {
  readonly #scheduler: fc.Scheduler
  readonly #turns: Iterator<boolean>
  #over = false

  constructor(scheduler: fc.Scheduler, turns: Iterator<boolean>) {
    this.#scheduler = scheduler
    this.#turns = turns
  }

  readonly gate: Gate = async (what) => {
    if (!this.#over) await this.#scheduler.schedule(Promise.resolve(), what)
  }

  /** Takes step after step until `work` is done, checking in between. */
  async untilDone<T>(work: Promise<T>, check: () => void = () => {}): Promise<T> {
    let done = false
    const end = () => {
      done = true
    }
    work.then(end, end)
    for (let idle = 0; !done; check()) {
      // Who waits for another instance looks again after a while.
      if (this.#scheduler.count() === 0) vi.advanceTimersByTime(PAUSE_MS)
      if (this.#scheduler.count() === 0 || this.#turns.next().value === true) await turn()
      if (this.#scheduler.count() > 0) {
        await this.#scheduler.waitOne()
        idle = 0
      } else if (++idle > 100) throw new Error('nothing is left to happen, and the work is not done')
    }
    return work
  }

  /** Takes all steps that are left. */
  async untilQuiet(): Promise<void> {
    for (let idle = 0; idle < 5; idle++) {
      await turn()
      if (this.#scheduler.count() === 0) continue
      await this.#scheduler.waitOne()
      idle = 0
    }
  }

  /** Lets everything happen that still waits, so that what was started can end. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#over = true
    while (this.#scheduler.count() > 0) await this.#scheduler.waitOne()
  }
}

const READS = {
  default: {},
  strict: { allowStale: false },
  fresh: { freshness: 'FRESH' },
  verified: { maxStalenessMs: 0 },
  cached: { freshness: 'CACHE_ONLY' },
} as const satisfies Record<string, Partial<ReadOptions>>

type Op =
  | {
      readonly op: 'read'
      readonly id: Id
      readonly as: keyof typeof READS | 'at-least'
      /** The caller may go away before there is an answer. */
      readonly leaves: boolean
    }
  | { readonly op: 'update' | 'delete'; readonly id: Id }
  | { readonly op: 'foreign'; readonly id: Id; readonly tags: readonly string[] }
  | {
      readonly op: 'invalidate' | 'foreign-invalidate'
      readonly target: InvalidationTarget
      readonly mode: InvalidationMode
    }
  | { readonly op: 'silence' | 'tick' | 'fail' }
  /** Another instance has a lock, or loses it. */
  | { readonly op: 'lock' | 'unlock'; readonly id: Id }

// Most of it happens to one item.
const id = fc.oneof({ weight: 4, arbitrary: fc.constant('a' as const) }, fc.constantFrom(...IDS))
const tags = fc.subarray([...TAGS])
const target: fc.Arbitrary<InvalidationTarget> = fc.oneof(
  fc.record({ kind: fc.constant('ids' as const), ids: fc.subarray([...IDS], { minLength: 1 }) }),
  fc.record({ kind: fc.constant('tags' as const), tags: fc.subarray([...TAGS], { minLength: 1 }) }),
  fc.record({ kind: fc.constant('all' as const) }),
)
const as = fc.oneof(
  { weight: 3, arbitrary: fc.constant('default' as const) },
  fc.constantFrom('strict', 'fresh', 'verified', 'cached', 'at-least' as const),
)
const leaves = fc.integer({ min: 0, max: 3 }).map((one) => one === 0)
const weighted = (failures: number): fc.Arbitrary<Op> =>
  fc.oneof(
    { weight: 8, arbitrary: fc.record({ op: fc.constant('read' as const), id, as, leaves }) },
    { weight: 2, arbitrary: fc.record({ op: fc.constantFrom('lock', 'unlock'), id }) },
    { weight: 2, arbitrary: fc.record({ op: fc.constantFrom('update', 'delete'), id }) },
    { weight: 2, arbitrary: fc.record({ op: fc.constant('foreign' as const), id, tags }) },
    {
      weight: 3,
      arbitrary: fc.record({
        op: fc.constantFrom('invalidate', 'foreign-invalidate'),
        target,
        mode: fc.constantFrom('EXPIRE', 'REMOVE'),
      }),
    },
    { weight: 2, arbitrary: fc.record({ op: fc.constantFrom('silence', 'tick') }) },
    { weight: failures, arbitrary: fc.constant({ op: 'fail' as const }) },
  )

/** For each id the greatest revision of a kind. */
class Marks {
  readonly #marks = new Map<string, Revision>()

  get(of: string): Revision {
    return this.#marks.get(of) ?? 0
  }

  raise(ids: readonly string[], revision: Revision): void {
    for (const one of ids) this.#marks.set(one, Math.max(this.get(one), revision))
  }
}

/** Runs operations on an instance and checks each answer against what was acknowledged when its reader began. */
class History {
  readonly #instance: Instance
  /** Acknowledged writes of the content, EXPIRE and REMOVE; and what readers have been shown. */
  readonly #written = new Marks()
  readonly #expired = new Marks()
  readonly #removed = new Marks()
  readonly #shown = new Marks()
  /** What was committed so long ago that every instance must know of it. */
  #beforeSilence: Revision = 0

  readonly #gate: Gate

  constructor(of: Instance, gate: Gate) {
    this.#instance = of
    this.#gate = gate
  }

  async run(one: Op): Promise<void> {
    const { writer, postgres, clock } = this.#instance
    switch (one.op) {
      case 'read':
        return this.#read(one.id, one.as, one.leaves)
      case 'update':
      case 'delete': {
        const precondition = { etag: '', allowMissing: true }
        const { revision } =
          one.op === 'update'
            ? await writer.update(write, one.id, precondition, unused)
            : await writer.delete(write, one.id, precondition)
        this.#written.raise([one.id], revision)
        if (one.op === 'delete') this.#removed.raise([one.id], revision)
        return
      }
      case 'invalidate': {
        const revision = await writer.invalidate(write, one.target, one.mode, false)
        const marks = one.mode === 'REMOVE' ? this.#removed : this.#expired
        return marks.raise(this.#concerned(one.target, revision), revision)
      }
      case 'foreign':
        postgres.put(one.id, one.tags)
        return
      case 'foreign-invalidate':
        postgres.commit(rowOf(one.target, one.mode))
        return
      case 'silence':
        // Longer than anything may be called current without news of the log.
        clock.nowMs += 2000
        this.#beforeSilence = postgres.revision
        return
      case 'tick':
        // The tail asks again by itself after a change.
        vi.advanceTimersByTime(10)
        return
      case 'lock':
        this.#instance.locks.held.set(one.id, 'another instance')
        return
      case 'unlock':
        this.#instance.locks.held.delete(one.id)
        return
      case 'fail':
        postgres.failing++
    }
  }

  #concerned(target: InvalidationTarget, revision: Revision): readonly string[] {
    if (target.kind === 'ids') return target.ids
    if (target.kind === 'all') return IDS
    const { postgres } = this.#instance
    return IDS.filter((one) => postgres.at(one, revision).tags.some((tag) => target.tags.includes(tag)))
  }

  async #read(of: Id, as: keyof typeof READS | 'at-least', leaves: boolean): Promise<void> {
    const { reader, postgres, tail } = this.#instance
    const [written, expired, removed] = [this.#written.get(of), this.#expired.get(of), this.#removed.get(of)]
    const [shown, committed] = [this.#shown.get(of), postgres.revision]
    const applied = postgres.at(of, tail.raising(TENANT)?.position ?? 0).revision
    const old = postgres.at(of, this.#beforeSilence).revision
    const minRevision = as === 'at-least' ? committed : 0
    const options: ReadOptions = { ...DEFAULT_READ, ...(as === 'at-least' ? { minRevision } : READS[as]) }
    const caller = new AbortController()
    const gone = new ItemCacheError('cancelled', 'the caller cancelled')
    if (leaves) void this.#gate('leave').then(() => caller.abort(gone))
    let answer: Answer
    try {
      answer = await reader.read(TENANT, of, options, caller.signal)
    } catch (error) {
      if (error === gone) return
      if (error instanceof ItemCacheError && error.code === 'unavailable') return
      throw error
    }
    const { copy, outcome, staleReason } = answer
    if (copy === undefined) return expect(as).toBe('cached')
    const { asOf } = copy
    const truth = postgres.at(of, asOf)
    const about = JSON.stringify({ of, as, outcome, staleReason, asOf, revision: copy.revision })
    const least = (actual: Revision, bound: Revision, why: string) =>
      expect(actual, `${about} ${why}`).toBeGreaterThanOrEqual(bound)

    // A copy is the state at its as-of, whatever way it took.
    expect(asOf).toBeLessThanOrEqual(postgres.revision)
    expect(copy.bytes, about).toEqual(truth.bytes)
    least(asOf, minRevision, 'is older than min_revision')
    least(asOf, removed, 'was removed')
    if (outcome === 'STALE') expect(options.allowStale).toBe(true)
    if (staleReason === 'TIER_DOWN') return
    least(asOf, written, 'is older than a write that was acknowledged here')
    least(truth.revision, applied, 'is older than what was applied here')
    if (outcome !== 'STALE') {
      least(asOf, expired, 'was expired')
      least(truth.revision, old, 'is older than what everybody knows')
      least(truth.revision, shown, 'is older than what was shown here')
    }
    if (as === 'fresh' || as === 'verified') least(asOf, committed, 'is not fresh')
    this.#shown.raise([of], truth.revision)
  }

  /** What memory and Redis hold is the truth of some time, and nothing was kept that did not pass. */
  checkCopies(): void {
    const { memory, shared, postgres } = this.#instance
    expect(memory.unfit).toEqual([])
    for (const of of IDS) {
      for (const copy of [memory.peek(TENANT, of), shared.peek(TENANT, of)]) {
        if (copy !== undefined) expect(copy.bytes).toEqual(postgres.at(of, copy.asOf).bytes)
      }
    }
  }
}

const schedule = fc
  .tuple(fc.scheduler(), fc.infiniteStream(fc.boolean()))
  .map(([scheduler, turns]) => new Schedule(scheduler, turns))

describe('whatever the order in which answers arrive', () => {
  const explore = (failures: number) =>
    fc.asyncProperty(
      schedule,
      fc.array(weighted(failures), { minLength: 2, maxLength: 14 }),
      fc.constantFrom(1, 2, 1000),
      fc.constantFrom(1, 100),
      async (scheduled, list, maxFloors, maxEntries) => {
        const tested = instance(scheduled.gate, { maxFloors, maxEntries })
        await using tail = tested.tail
        await using steps = scheduled
        await tail.start()
        for (const of of IDS) tested.postgres.put(of, ['t'])
        const history = new History(tested, steps.gate)
        const running = list.map(async (one) => {
          await steps.gate(JSON.stringify(one))
          await history.run(one)
        })
        await steps.untilDone(Promise.all(running), () => history.checkCopies())
        if (failures > 0) return
        await steps.untilQuiet()
        // When all is quiet, everybody reads the newest.
        for (const of of IDS) {
          const options = { ...DEFAULT_READ, allowStale: false }
          const { copy } = await steps.untilDone(tested.reader.read(TENANT, of, options, signal))
          expect(copy?.bytes).toEqual(tested.postgres.at(of, tested.postgres.revision).bytes)
        }
      },
    )

  test('nobody gets a value that is older than what was acknowledged here, and nothing stale is kept', {
    timeout: 300_000,
  }, async () => {
    await fc.assert(explore(0), { numRuns: 1000 })
  })

  test('not even when the database fails now and then', { timeout: 300_000 }, async () => {
    await fc.assert(explore(3), { numRuns: 600 })
  })
})

describe('readers of one key at the same time', () => {
  const patient = (reader: Reader, of: string, until = signal) => reader.read(TENANT, of, DEFAULT_READ, until)

  test('share one load, however they come', async () => {
    const readers = fc.array(id, { minLength: 1, maxLength: 12 })
    await fc.assert(
      fc.asyncProperty(schedule, readers, async (scheduled, ids) => {
        const { reader, postgres, metrics, tail } = instance(scheduled.gate)
        await using _tail = tail
        await using steps = scheduled
        for (const of of IDS) postgres.put(of, [])
        const reading = ids.map((of) => steps.gate(`read ${of}`).then(() => patient(reader, of)))
        const answers = await steps.untilDone(Promise.all(reading))
        const distinct = new Set(ids)
        for (const of of distinct) expect(postgres.selects.get(of)).toBe(1)
        expect(metrics.snapshot()).toMatchObject({
          loads: distinct.size,
          coalescedLoads: answers.filter(({ coalesced }) => coalesced).length,
          hits: answers.filter(({ outcome }) => outcome === 'HIT').length,
        })
        const loaded = answers.filter(({ outcome, coalesced }) => outcome === 'MISS' && !coalesced)
        expect(loaded).toHaveLength(distinct.size)
      }),
      { numRuns: 300 },
    )
  })

  test('are answered although others go away, also the one who came first', async () => {
    const readers = fc.array(fc.boolean(), { minLength: 1, maxLength: 8 })
    await fc.assert(
      fc.asyncProperty(schedule, readers, async (scheduled, leaves) => {
        const { reader, postgres, tail } = instance(scheduled.gate)
        await using _tail = tail
        await using steps = scheduled
        postgres.put('a', [])
        const gone = new ItemCacheError('cancelled', 'the caller cancelled')
        const reading = leaves.map(async (leave) => {
          const controller = new AbortController()
          await steps.gate('read')
          if (leave) void steps.gate('leave').then(() => controller.abort(gone))
          return patient(reader, 'a', controller.signal)
        })
        const outcomes = await steps.untilDone(Promise.allSettled(reading))
        for (const [i, outcome] of outcomes.entries()) {
          if (outcome.status === 'rejected') expect(outcome.reason).toBe(gone)
          if (!leaves[i]) expect(outcome.status).toBe('fulfilled')
        }
        // Only a load that all have left is done again.
        const left = leaves.filter(Boolean).length
        expect(postgres.selects.get('a') ?? 0).toBeLessThanOrEqual(left + 1)
        if (left === 0) expect(postgres.selects.get('a')).toBe(1)
      }),
      { numRuns: 300 },
    )
  })

  test('that all leave take the load along, and it leaves nothing behind', async () => {
    const { promise: opened, resolve: open } = Promise.withResolvers<void>()
    const signals: (AbortSignal | undefined)[] = []
    const { reader, postgres, memory, metrics, tail } = instance(async () => {})
    await using _tail = tail
    postgres.put('a', [])
    const select = postgres.read.bind(postgres)
    postgres.read = async (tenant, ids, until?: AbortSignal) => {
      signals.push(until)
      await untilAborted(opened, until ?? signal)
      return select(tenant, ids)
    }
    const callers = [new AbortController(), new AbortController()]
    const reading = callers.map((caller) => patient(reader, 'a', caller.signal))
    while (signals.length === 0) await turn()
    callers[0]?.abort(new ItemCacheError('timeout', 'the deadline has passed'))
    await expect(reading[0]).rejects.toMatchObject({ code: 'timeout' })
    expect(signals[0]?.aborted).toBe(false)
    callers[1]?.abort(new ItemCacheError('cancelled', 'the caller cancelled'))
    await expect(reading[1]).rejects.toMatchObject({ code: 'cancelled' })
    expect(signals[0]?.aborted).toBe(true)
    await reader.settled()
    expect(metrics.tiers.postgres.errors).toBe(0)
    expect(memory.peek(TENANT, 'a')).toBeUndefined()
    open()
    expect(await patient(reader, 'a')).toMatchObject({ outcome: 'MISS', coalesced: false })
    expect(signals).toHaveLength(2)
  })

  test('share a failure, and the next one tries again', async () => {
    const failures = fc.integer({ min: 1, max: 3 })
    await fc.assert(
      fc.asyncProperty(
        schedule,
        fc.integer({ min: 1, max: 8 }),
        failures,
        async (scheduled, count, failing) => {
          const { reader, postgres, tail, memory } = instance(scheduled.gate)
          await using _tail = tail
          await using steps = scheduled
          postgres.put('a', [])
          postgres.failing = failing
          const reading = Array.from({ length: count }, () =>
            steps.gate('read').then(() => patient(reader, 'a')),
          )
          const outcomes = await steps.untilDone(Promise.allSettled(reading))
          const failed = outcomes.filter((outcome) => outcome.status === 'rejected')
          for (const { reason } of failed) expect(reason).toMatchObject({ code: 'unavailable' })
          // Every load but a successful last one has failed somebody.
          const succeeded = failed.length < count
          expect(postgres.selects.get('a')).toBe(failing - postgres.failing + (succeeded ? 1 : 0))
          expect(memory.peek(TENANT, 'a') !== undefined).toBe(succeeded)

          postgres.failing = 0
          const { copy } = await steps.untilDone(patient(reader, 'a'))
          expect(copy?.bytes).toEqual(Buffer.of(1))
        },
      ),
      { numRuns: 300 },
    )
  })

  test('that ask for FRESH get a SELECT that was sent after they came', async () => {
    const { promise: opened, resolve: open } = Promise.withResolvers<void>()
    let held = true
    const gate: Gate = (what) => (held && what.startsWith('rows') ? opened : Promise.resolve())
    const { reader, postgres, tail } = instance(gate)
    await using _tail = tail
    postgres.put('a', [])
    const fresh = { ...DEFAULT_READ, freshness: 'FRESH' } as const
    const first = reader.read(TENANT, 'a', fresh, signal)
    while (postgres.selects.get('a') === undefined) await turn()
    postgres.put('a', [])
    held = false
    const second = await reader.read(TENANT, 'a', fresh, signal)
    expect(second.copy).toMatchObject({ asOf: 2, bytes: Buffer.of(2) })
    open()
    expect((await first).copy).toMatchObject({ asOf: 1 })
    // What came late is not kept over what came before.
    const third = await patient(reader, 'a')
    expect(third).toMatchObject({ outcome: 'HIT', copy: { asOf: 2 } })
  })
})

describe('two instances with readers of one item that only the origin has', () => {
  const plan = fc.record({
    /** For each reader the instance, and whether it goes away. */
    readers: fc.array(fc.record({ at: fc.constantFrom(0, 1), leaves: fc.boolean() }), {
      minLength: 1,
      maxLength: 8,
    }),
    /** How often a lock's time is over while its holder lives. */
    losses: fc.integer({ min: 0, max: 2 }),
  })

  test('it is fetched once, and once more at most for each lock that is lost and each reader who leaves', async () => {
    await fc.assert(
      fc.asyncProperty(schedule, plan, async (scheduled, { readers, losses }) => {
        const around = surroundings(scheduled.gate)
        let fetches = 0
        around.origin = {
          name: 'origin',
          serves: () => true,
          fetch: async (_, until) => {
            fetches++
            await untilAborted(scheduled.gate('fetch'), until ?? signal)
            return DRAFT
          },
        }
        const tested = [instance(scheduled.gate, { around }), instance(scheduled.gate, { around })]
        await using _one = tested[0]?.tail
        await using _two = tested[1]?.tail
        await using steps = scheduled
        for (const { tail } of tested) await tail.start()
        const gone = new ItemCacheError('cancelled', 'the caller cancelled')
        const reading = readers.map(async ({ at, leaves }) => {
          const caller = new AbortController()
          await steps.gate('read')
          if (leaves) void steps.gate('leave').then(() => caller.abort(gone))
          return tested[at]?.reader.read(TENANT, '1', DEFAULT_READ, caller.signal) as Promise<Answer>
        })
        for (let lost = 0; lost < losses; lost++)
          void steps.gate('loss').then(() => around.locks.held.clear())
        const outcomes = await steps.untilDone(Promise.allSettled(reading))
        const left = readers.filter(({ leaves }) => leaves).length
        for (const [i, outcome] of outcomes.entries()) {
          if (outcome.status === 'fulfilled') expect(outcome.value.copy?.bytes).toEqual(Buffer.of(1))
          else expect([readers[i]?.leaves, outcome.reason]).toEqual([true, gone])
        }
        expect(fetches).toBeLessThanOrEqual(1 + losses + left)
        // Whatever happened to the locks, nobody holds one when all is over.
        await steps.untilQuiet()
        expect(around.locks.held.size).toBe(0)
      }),
      { numRuns: 500 },
    )
  })
})

const DRAFT: ItemDraft = {
  title: 'A thing',
  description: '',
  category: '',
  imageUri: '',
  price: undefined,
  rating: undefined,
  tags: [],
  attributes: undefined,
}

describe('a load behind an answer', () => {
  /** Holds the rows of SELECTs while it is shut. */
  function door() {
    let shut = false
    let opened = Promise.withResolvers<void>()
    const gate: Gate = async (what) => {
      if (shut && /^(rows|poll)/.test(what)) await opened.promise
    }
    return {
      gate,
      shut: () => {
        shut = true
        opened = Promise.withResolvers()
      },
      open: () => {
        shut = false
        opened.resolve()
      },
    }
  }
  const read = ({ reader }: Instance) => reader.read(TENANT, 'a', DEFAULT_READ, signal)
  const selected = async ({ postgres }: Instance, times: number) => {
    while ((postgres.selects.get('a') ?? 0) < times) await turn()
  }

  test('is one for all, ends after its own time when nobody comes, and the next answer starts another', async () => {
    const { gate, shut, open } = door()
    const tested = instance(gate, { settings: { freshForMs: 1000, refreshTimeoutMs: 5000 } })
    await using _tail = tested.tail
    tested.postgres.put('a', [])
    await read(tested)
    await tested.reader.settled()
    tested.clock.nowMs = 1001
    shut()
    for (let n = 0; n < 10; n++) {
      expect(await read(tested)).toMatchObject({ outcome: 'STALE', staleReason: 'REVALIDATING' })
    }
    await selected(tested, 2)
    vi.advanceTimersByTime(4999)
    await turn()
    expect(tested.metrics).toMatchObject({ refreshesOk: 0, refreshesFailed: 0 })
    vi.advanceTimersByTime(1)
    await expect.poll(() => tested.metrics.refreshesFailed).toBe(1)
    expect(await read(tested)).toMatchObject({ outcome: 'STALE' })
    await selected(tested, 3)
    open()
    await tested.reader.settled()
    expect(tested.metrics).toMatchObject({ refreshesOk: 1, refreshesFailed: 1 })
    expect(await read(tested)).toMatchObject({ outcome: 'HIT' })
  })

  test('waits for another instance that does the same, but no reader waits for that', async () => {
    const tested = instance(async () => {}, { settings: { freshForMs: 1000 } })
    await using _tail = tested.tail
    tested.postgres.put('a', [])
    await read(tested)
    await tested.reader.settled()
    tested.clock.nowMs = 1001
    tested.locks.held.set('a', 'another instance')
    expect(await read(tested)).toMatchObject({ outcome: 'STALE' })
    for (let looks = 0; looks < 5; looks++) {
      await turn()
      vi.advanceTimersByTime(PAUSE_MS)
    }
    expect(tested.postgres.selects.get('a')).toBe(1)
    const strict = { ...DEFAULT_READ, allowStale: false }
    expect(await tested.reader.read(TENANT, 'a', strict, signal)).toMatchObject({
      outcome: 'MISS',
      coalesced: true,
    })
    expect(tested.postgres.selects.get('a')).toBe(2)
    expect(tested.locks.held.get('a')).toBe('another instance')
    await tested.reader.settled()
  })

  test('goes on after the soft timeout of the only reader', async () => {
    const { gate, shut, open } = door()
    const tested = instance(gate, { settings: { softTimeoutMs: 100 } })
    await using _tail = tested.tail
    tested.postgres.put('a', [])
    await read(tested)
    // Nothing was heard of the log for so long that the copy is no answer by itself.
    tested.clock.nowMs = 2000
    shut()
    const reading = read(tested)
    // It waits for the log first, and then for the tiers, half of the time each.
    await turn()
    expect(tested.postgres.selects.get('a')).toBe(1)
    tested.clock.nowMs += 50
    vi.advanceTimersByTime(50)
    await selected(tested, 2)
    vi.advanceTimersByTime(50)
    expect(await reading).toMatchObject({ outcome: 'STALE', staleReason: 'UNVERIFIED' })
    open()
    await tested.reader.settled()
    expect(tested.metrics).toMatchObject({ refreshesOk: 1, refreshesFailed: 0 })
    expect(tested.memory.peek(TENANT, 'a')).toMatchObject({ verifiedAtMs: 2050 })
  })

  test('comes early for a hit whose draw says so, does not take the same copy from Redis, and spoils no hit', async () => {
    let draw = 0
    const settings = { freshForMs: 1000, earlyRefresh: 5, random: () => draw }
    const tested = instance(async () => {}, { settings })
    await using _tail = tested.tail
    tested.postgres.put('a', [])
    await read(tested)
    await tested.reader.settled()
    const hit = async (nowMs: number, drawn: number) => {
      draw = drawn
      tested.clock.nowMs = nowMs
      expect(await read(tested)).toMatchObject({ outcome: 'HIT', tier: 'memory' })
      await tested.reader.settled()
      return tested.postgres.selects.get('a')
    }
    // The mean of the draws is 20 ms here, a fiftieth of the copy's life: with 0.5 drawn, the last 14 ms count.
    expect(await hit(600, 1 - 1e-12)).toBe(1)
    expect(await hit(980, 0.5)).toBe(1)
    expect(await hit(990, 0.1)).toBe(1)
    expect(await hit(990, 0.5)).toBe(2)
    expect(await hit(991, 0.5)).toBe(2)
    expect(tested.memory.peek(TENANT, 'a')).toMatchObject({ verifiedAtMs: 990 })
    expect(tested.metrics).toMatchObject({ refreshesOk: 1 })
  })

  test('that fails leaves the copy in place up to the age that stale answers may have, and no longer', async () => {
    const tested = instance(async () => {}, { settings: { freshForMs: 1000, maxStaleMs: 60_000 } })
    await using _tail = tested.tail
    tested.postgres.put('a', [])
    await read(tested)
    await tested.reader.settled()
    tested.postgres.failing = 100
    for (const nowMs of [1200, 2000, 59_999]) {
      tested.clock.nowMs = nowMs
      expect(await read(tested)).toMatchObject({ outcome: 'STALE', copy: { revision: 1 } })
      await tested.reader.settled()
    }
    expect(tested.metrics.refreshesFailed).toBe(3)
    tested.clock.nowMs = 60_001
    await expect(read(tested)).rejects.toMatchObject({ code: 'unavailable' })
  })
})

describe('an instance to which no notification comes', () => {
  const deaf: Gate = (what) => (what === 'notification' ? new Promise(() => {}) : Promise.resolve())
  const read = ({ reader }: Instance, of: Id, options: Partial<ReadOptions> = {}) =>
    reader.read(TENANT, of, { ...DEFAULT_READ, ...options }, signal)

  /** Both items are cached, in memory and in Redis. */
  async function warm(options = {}): Promise<Instance> {
    const tested = instance(deaf, options)
    for (const of of IDS) {
      tested.postgres.put(of, [])
      await read(tested, of)
    }
    await tested.reader.settled()
    return tested
  }
  /** Memory has room for one: it forgets the other. */
  const forget = (tested: Instance) => read(tested, 'b')

  test('asks for the log once for all hot items after a standstill, and for no item that did not change', async () => {
    const polled = vi.fn()
    const tested = instance(async (what) => {
      if (what === 'notification') await new Promise(() => {})
      if (what === 'poll') polled()
    })
    await using _tail = tested.tail
    for (const of of IDS) {
      tested.postgres.put(of, [])
      await read(tested, of)
    }
    await tested.reader.settled()
    tested.clock.nowMs += 2000
    const selects = tested.postgres.selects.get('a')
    const { hits, misses } = tested.metrics.tiers.memory
    const measured = tested.metrics.cachedReads.count
    const answers = await Promise.all([read(tested, 'a'), read(tested, 'a'), read(tested, 'b')])
    for (const answer of answers) expect(answer).toMatchObject({ outcome: 'HIT', tier: 'memory' })
    expect(polled).toHaveBeenCalledTimes(1)
    expect(tested.postgres.selects.get('a')).toBe(selects)
    // Memory could not answer at first. Each is one read all the same.
    expect(tested.metrics.tiers.memory).toMatchObject({ hits, misses: misses + 3 })
    expect(tested.metrics.cachedReads.count).toBe(measured + 3)
    // Who takes no stale answer waits as well; who asks for the database, or for no more than the caches, does not.
    tested.clock.nowMs += 2000
    expect(await read(tested, 'a', { freshness: 'CACHE_ONLY' })).toMatchObject({ staleReason: 'UNVERIFIED' })
    expect(await read(tested, 'b', { freshness: 'FRESH' })).toMatchObject({ outcome: 'BYPASS' })
    expect(polled).toHaveBeenCalledTimes(1)
    expect(await read(tested, 'a', { allowStale: false })).toMatchObject({ outcome: 'HIT', tier: 'memory' })
    expect(polled).toHaveBeenCalledTimes(2)
    // What has changed meanwhile is loaded.
    tested.clock.nowMs += 2000
    tested.postgres.put('a', [])
    expect(await read(tested, 'a')).toMatchObject({ outcome: 'MISS', copy: { revision: 3 } })
  })

  test('waits for the log for 50 ms, and then for the tiers with what is left, however long it was kept from running', async () => {
    let shut = false
    const opened = Promise.withResolvers<void>()
    const tested = instance(
      async (what) => {
        if (what === 'notification') await new Promise(() => {})
        if (shut && /^(rows|poll)/.test(what)) await opened.promise
      },
      { settings: { softTimeoutMs: 1000 } },
    )
    await using _tail = tested.tail
    tested.postgres.put('a', [])
    await read(tested, 'a')
    await tested.reader.settled()
    tested.clock.nowMs += 2000
    shut = true
    const answered = vi.fn()
    const reading = read(tested, 'a').finally(answered)
    vi.advanceTimersByTime(49)
    await turn()
    expect(tested.postgres.selects.get('a')).toBe(1)
    tested.clock.nowMs += 5000
    vi.advanceTimersByTime(1)
    while (tested.postgres.selects.get('a') === 1) await turn()
    vi.advanceTimersByTime(949)
    await turn()
    expect(answered).not.toHaveBeenCalled()
    opened.resolve()
    expect(await reading).toMatchObject({ outcome: 'MISS', tier: 'postgres' })
  })

  test('serves what it has for as long as it may, and then asks the database', async () => {
    const tested = await warm()
    await using _tail = tested.tail
    tested.postgres.put('a', [])
    tested.clock.nowMs += 1500
    expect(await read(tested, 'a')).toMatchObject({ outcome: 'HIT', tier: 'memory', copy: { revision: 1 } })
    tested.clock.nowMs += 1
    expect(await read(tested, 'b', { freshness: 'CACHE_ONLY', allowStale: false })).toMatchObject({
      outcome: 'MISS',
    })
    expect(await read(tested, 'a')).toMatchObject({
      outcome: 'MISS',
      tier: 'postgres',
      copy: { revision: 3 },
    })
  })

  test('does not go back to what is in Redis once it has shown something newer', async () => {
    const tested = await warm({ maxEntries: 1 })
    await using _tail = tested.tail
    tested.postgres.put('a', [])
    const stores = tested.shared.set.bind(tested.shared)
    tested.shared.set = () => false
    expect(await read(tested, 'a', { freshness: 'FRESH' })).toMatchObject({ copy: { revision: 3 } })
    await tested.reader.settled()
    tested.shared.set = stores
    await forget(tested)
    expect(await read(tested, 'a')).toMatchObject({ tier: 'postgres', copy: { revision: 3 } })
  })

  test('knows the tags that others have just given an item, when they are invalidated here', async () => {
    const tested = await warm()
    await using tail = tested.tail
    await tail.start()
    tested.postgres.put('a', ['t'])
    await tested.writer.invalidate(write, { kind: 'tags', tags: ['t'] }, 'REMOVE', false)
    expect(await read(tested, 'a')).toMatchObject({ tier: 'postgres', copy: { revision: 3 } })
  })

  test('serves what was removed not even while the database is down', async () => {
    const unavailable = { code: 'unavailable' }
    for (const remove of [
      ({ writer }: Instance) => writer.invalidate(write, { kind: 'ids', ids: ['a'] }, 'REMOVE', false),
      ({ writer }: Instance) => writer.invalidate(write, { kind: 'all' }, 'REMOVE', false),
      ({ writer }: Instance) => writer.delete(write, 'a', { etag: '', allowMissing: false }),
    ]) {
      const tested = await warm({ maxEntries: 1 })
      await using _tail = tested.tail
      // What is served below comes from Redis, where the old copy still is.
      tested.shared.set = () => false
      await remove(tested)
      await forget(tested)
      tested.postgres.failing = 10
      await expect(read(tested, 'a')).rejects.toMatchObject(unavailable)
    }
  })

  test('serves what was changed, marked, while the database is down', async () => {
    const tested = await warm({ maxEntries: 1 })
    await using _tail = tested.tail
    tested.shared.set = () => false
    await tested.writer.update(write, 'a', { etag: '', allowMissing: false }, unused)
    await forget(tested)
    tested.postgres.failing = 10
    expect(await read(tested, 'a')).toMatchObject({
      outcome: 'STALE',
      staleReason: 'TIER_DOWN',
      tier: 'redis',
      copy: { revision: 1 },
    })
    await expect(read(tested, 'a', { allowStale: false })).rejects.toMatchObject({ code: 'unavailable' })
    tested.postgres.failing = 0
    expect(await read(tested, 'a')).toMatchObject({ tier: 'postgres', copy: { revision: 3 } })
  })
})

test('a reader who comes after all others have left, before their load began, is not cancelled with them', async () => {
  const departed = Promise.withResolvers<Group>()
  const flights = new Flights(departed.resolve)
  const { flight: left } = flights.join(TENANT, 'a', 'cached', {})
  left.board()
  left.leave()
  const { flight } = flights.join(TENANT, 'a', 'cached', {})
  flight.board()
  const group = await departed.promise
  expect(group.flights).toEqual([flight])
  expect(group.signal.aborted).toBe(false)
})

describe('flights that are started', () => {
  const TURNS = 12
  /** The groups that depart, by the number of their flights, after each turn of the event loop in which some are started. */
  async function groupsOf(...starts: readonly number[]): Promise<number[][]> {
    const departed: number[] = []
    const flights = new Flights((group) => departed.push(group.flights.length))
    let ids = 0
    const after: number[][] = []
    for (const start of [...starts, ...Array<number>(TURNS).fill(0)]) {
      for (let i = 0; i < start; i++) flights.join(TENANT, `${++ids}`, 'cached', {}).flight.board()
      await turn()
      after.push(departed.splice(0))
    }
    return after.slice(0, after.findLastIndex((groups) => groups.length > 0) + 1)
  }

  test('alone leave at once', async () => {
    expect(await groupsOf(1)).toEqual([[1]])
    expect(await groupsOf(1, 1, 1)).toEqual([[1], [1], [1]])
  })

  test('together wait for one turn more, and for as long as each turn doubles them, and leave together', async () => {
    expect(await groupsOf(2)).toEqual([[], [2]])
    expect(await groupsOf(10, 82, 408)).toEqual([[], [], [500]])
    expect(await groupsOf(2, 2, 4, 8, 16)).toEqual([[], [], [], [], [], [32]])
  })

  test('one after the other, turn by turn, wait for two turns at most', async () => {
    expect(await groupsOf(5, 5, 5, 5, 5, 5)).toEqual([[], [], [15], [], [], [15]])
  })

  test('by the hundreds leave 500 at a time', async () => {
    expect(await groupsOf(1200)).toEqual([[500, 500], [200]])
  })

  test('for the same id by two tenants, or for names that read the same together, are not one', () => {
    const flights = new Flights(() => {})
    const joined = ([tenant, id]: readonly [string, string]) => flights.join(tenant, id, 'cached', {}).joined
    const keys = [['one', 'a'] as const, ['two', 'a'] as const, ['on', 'ea'] as const]
    expect(keys.map(joined)).toEqual([false, false, false])
    expect(keys.map(joined)).toEqual([true, true, true])
  })

  test('by one tenant keep nobody else’s waiting', async () => {
    const departed: Group[] = []
    const flights = new Flights((group) => departed.push(group))
    for (let i = 0; i < 100; i++) flights.join('many', `${i}`, 'cached', {}).flight.board()
    flights.join('one', 'a', 'cached', {}).flight.board()
    await turn()
    expect(departed.map(({ tenant }) => tenant)).toEqual(['one'])
  })
})
