/** The near cache against a model of the log, with arbitrary interleavings of reads, events, gaps and lost streams. */
import { setImmediate } from 'node:timers/promises'
import { create } from '@bufbuild/protobuf'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { NotFoundError, UnavailableError } from '../src/errors.ts'
import type { FollowMessage } from '../src/follow.ts'
import {
  CacheOutcome,
  CacheStatusSchema,
  type Item,
  ItemSchema,
} from '../src/gen/itemcache/v1/item_cache_pb.ts'
import { NearCache } from '../src/near-cache.ts'
import { BOUND_MS } from '../src/near-log.ts'
import type { GetManyOptions, GetManyResult, GetOptions, GetResult } from '../src/reads.ts'

const KEYS = ['a', 'b', 'c']
const TAGS = ['x', 'y']
const SERVER_BOUND_MS = 1500
const MAX_STALE_MS = 5000

/** Ways to read. */
const HOW = {
  plain: {},
  fields: { fields: ['title'] },
  'cache-only': { freshness: 'cache-only' },
  fresh: { freshness: 'fresh' },
  past: { near: false },
  strict: { allowStale: false },
  young: { maxStalenessMs: 500 },
} as const satisfies Record<string, GetOptions>
const HOWS = Object.keys(HOW) as (keyof typeof HOW)[]

interface Row {
  readonly revision: number
  readonly event: 'upserted' | 'deleted' | 'keys-invalidated' | 'tags-invalidated' | 'tenant-invalidated'
  readonly mode: 'expire' | 'remove'
  readonly ids: readonly string[]
  readonly tags: readonly string[]
  readonly atMs: number
  /** The tag of each item that exists after the row, and the revision that wrote it. */
  readonly state: ReadonlyMap<string, { readonly tag: string; readonly revision: number }>
}

const op = fc.oneof(
  {
    weight: 4,
    arbitrary: fc.record({
      do: fc.constant('write' as const),
      key: fc.constantFrom(...KEYS),
      tag: fc.constantFrom(...TAGS),
    }),
  },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('delete' as const), key: fc.constantFrom(...KEYS) }) },
  {
    weight: 2,
    arbitrary: fc.record({
      do: fc.constant('invalidate' as const),
      what: fc.constantFrom('key', 'tag', 'all'),
      mode: fc.constantFrom('expire', 'remove'),
      own: fc.boolean(),
    }),
  },
  {
    weight: 2,
    arbitrary: fc.record({
      do: fc.constant('own-write' as const),
      key: fc.constantFrom(...KEYS),
      tag: fc.constantFrom(...TAGS),
    }),
  },
  {
    weight: 5,
    arbitrary: fc.record({ do: fc.constant('deliver' as const), rows: fc.integer({ min: 1, max: 3 }) }),
  },
  { weight: 5, arbitrary: fc.record({ do: fc.constant('heartbeat' as const) }) },
  { weight: 5, arbitrary: fc.record({ do: fc.constant('sync' as const) }) },
  {
    weight: 1,
    arbitrary: fc.record({ do: fc.constant('gap' as const), rows: fc.integer({ min: 1, max: 3 }) }),
  },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('reconnect' as const) }) },
  {
    weight: 4,
    arbitrary: fc.record({ do: fc.constant('wait' as const), ms: fc.constantFrom(1, 100, 700, 1600) }),
  },
  {
    weight: 9,
    arbitrary: fc.record({
      do: fc.constant('read' as const),
      key: fc.constantFrom(...KEYS),
      behind: fc.nat(4),
      /** Whether its load begins before anything else happens. */
      begins: fc.boolean(),
      how: fc.oneof({ weight: 5, arbitrary: fc.constant('plain' as const) }, fc.constantFrom(...HOWS)),
    }),
  },
  {
    weight: 3,
    arbitrary: fc.record({
      do: fc.constant('read-many' as const),
      behind: fc.nat(4),
      how: fc.constantFrom(...HOWS),
    }),
  },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('outage' as const), is: fc.boolean() }) },
  { weight: 6, arbitrary: fc.record({ do: fc.constant('answer' as const), which: fc.nat(5) }) },
)

type Answer = Pick<GetResult, 'item' | 'cache' | 'near' | 'revision'>

function absence(error: unknown): Answer {
  if (!(error instanceof NotFoundError)) throw error
  return { item: undefined, cache: error.cache, near: false, revision: error.cache?.asOf ?? -1n }
}

class World {
  nowMs = 10_000
  readonly near: NearCache
  readonly rows: Row[] = []
  /** What the stream has brought, and what the process was told: revisions that count. */
  readonly known = new Set<Row>()
  readonly waiting: { readonly answer: () => void }[] = []
  readonly reads: Promise<void>[] = []
  sent = 0
  /** The newest as-of that a read of a key has shown. */
  readonly shown = new Map<string, number>()
  hits = 0
  stale = 0
  isOut = false

  constructor(maxEntries: number) {
    this.near = new NearCache({ maxEntries, maxStaleMs: MAX_STALE_MS }, () => this.nowMs)
    this.near.follow({ kind: 'started', position: 0n, oldestResumable: 0n })
  }

  get last(): Row | undefined {
    return this.rows.at(-1)
  }

  commit(
    row: Pick<Row, 'event' | 'mode' | 'ids' | 'tags'>,
    change: (state: Map<string, { tag: string; revision: number }>, revision: number) => void = () => {},
  ): Row {
    const revision = this.rows.length + 1
    const state = new Map(this.last?.state ?? [])
    change(state, revision)
    const committed = { ...row, revision, atMs: this.nowMs, state }
    this.rows.push(committed)
    return committed
  }

  write(key: string, tag: string): Row {
    const before = this.last?.state.get(key)?.tag
    const tags = [...new Set(before === undefined ? [tag] : [before, tag])]
    return this.commit({ event: 'upserted', mode: 'expire', ids: [key], tags }, (state, revision) => {
      state.set(key, { tag, revision })
    })
  }

  invalidate(what: string, mode: 'expire' | 'remove', isOwn: boolean): void {
    const [event, ids, tags] =
      what === 'key'
        ? (['keys-invalidated', ['a'], []] as const)
        : what === 'tag'
          ? (['tags-invalidated', [], ['x']] as const)
          : (['tenant-invalidated', [], []] as const)
    const row = this.commit({ event, mode, ids, tags })
    if (!isOwn) return
    this.known.add(row)
    const kinds = {
      'keys-invalidated': 'KEYS_INVALIDATED',
      'tags-invalidated': 'TAGS_INVALIDATED',
      'tenant-invalidated': 'TENANT_INVALIDATED',
    } as const
    const told = mode === 'remove' ? 'REMOVE' : 'EXPIRE'
    this.near.log.acknowledge({ revision: row.revision, kind: kinds[event], mode: told, ids, tags })
  }

  deliver(rows: number): void {
    for (const row of this.rows.slice(this.sent, this.sent + rows)) {
      this.sent = row.revision
      this.known.add(row)
      const { revision, event, mode, ids, tags } = row
      const rest = { items: [], committedAt: new Date(0), clientId: '' }
      this.follow({ kind: 'event', revision: BigInt(revision), event, mode, ids, tags, ...rest })
    }
  }

  /** Everything is sent that was committed before the first row that is not. */
  heartbeat(): void {
    const heardAtMs = Math.min(this.nowMs, this.rows[this.sent]?.atMs ?? Number.POSITIVE_INFINITY)
    this.follow({ kind: 'heartbeat', revision: BigInt(this.sent), heardAtMs })
  }

  follow(message: FollowMessage): void {
    this.near.follow(message)
  }

  itemAt(key: string, revision: number): Item | undefined {
    const found = this.rows[revision - 1]?.state.get(key)
    if (found === undefined) return undefined
    return create(ItemSchema, { id: key, category: found.tag, revision: BigInt(found.revision) })
  }

  concerns({ event, ids, tags }: Row, key: string, tag: string | undefined): boolean {
    switch (event) {
      case 'upserted':
      case 'deleted':
      case 'keys-invalidated':
        return ids.includes(key)
      case 'tags-invalidated':
        return tag !== undefined && tags.includes(tag)
      case 'tenant-invalidated':
        return true
    }
  }

  check(
    key: string,
    answer: { item: Item | undefined; revision: bigint },
    known: Iterable<Row>,
    shown: number,
    what: string,
  ): void {
    const asOf = Number(answer.revision)
    const tag = answer.item?.category
    // The answer is the state that it claims to be.
    expect(answer.item?.revision ?? 0n, `${what}: content`).toBe(this.itemAt(key, asOf)?.revision ?? 0n)
    for (const row of known) {
      if (this.concerns(row, key, tag))
        expect(asOf, `${what}: event ${row.revision}`).toBeGreaterThanOrEqual(row.revision)
    }
    for (const { revision, event, ids } of this.rows.slice(0, shown)) {
      if ((event === 'upserted' || event === 'deleted') && ids.includes(key)) {
        expect(asOf, `${what}: ${revision} was shown before`).toBeGreaterThanOrEqual(revision)
      }
    }
    this.shown.set(key, Math.max(asOf, this.shown.get(key) ?? 0))
    for (const row of this.rows) {
      if (row.atMs < this.nowMs - BOUND_MS && this.concerns(row, key, tag)) {
        expect(asOf, `${what}: older than the bound, ${row.revision}`).toBeGreaterThanOrEqual(row.revision)
      }
    }
  }

  /** What an instance answers that lags, but not by more than it may, and not below what it is asked for. */
  async serve(key: string, behind: number, { minRevision = 0n, freshness }: GetOptions): Promise<GetResult> {
    const allowed = this.rows.findLast(({ atMs }) => atMs < this.nowMs - SERVER_BOUND_MS)?.revision ?? 0
    const asOf = Math.max(
      freshness === 'fresh' ? this.rows.length : this.rows.length - behind,
      allowed,
      Number(minRevision),
    )
    const item = this.itemAt(key, asOf)
    const cache = create(CacheStatusSchema, {
      outcome: CacheOutcome.MISS,
      asOf: BigInt(asOf),
      freshFor: { seconds: 60n },
    })
    if (item === undefined) throw new NotFoundError('absent', { cache })
    return { item, notModified: false, cache, near: false, revision: BigInt(asOf) }
  }

  async held<T>(answer: () => Promise<T>): Promise<T> {
    const { promise, resolve } = Promise.withResolvers<void>()
    const isOut = this.isOut
    const given = answer()
    given.catch(() => {})
    this.waiting.push({ answer: resolve })
    await promise
    if (isOut) throw new UnavailableError('away')
    return given
  }

  isHit(key: string, options: GetOptions, check?: (answer: Answer, isHit: boolean) => void): boolean {
    let hit: Answer | undefined
    try {
      hit = this.near.hit(key, options)
    } catch (error) {
      hit = absence(error)
    }
    if (hit === undefined) return false
    this.hits++
    check?.(hit, true)
    return true
  }

  read(key: string, behind: number, how: keyof typeof HOW): void {
    const options = HOW[how]
    const check = this.checked(key, how)
    if (this.isHit(key, options, check)) return
    const fetch = (asked: GetOptions) => this.held(() => this.serve(key, behind, asked))
    const done = this.near.load(key, { ...options, timeoutMs: 1e9 }, fetch).then(
      (answer) => check(answer, false),
      (error: unknown) => {
        if (!(error instanceof UnavailableError)) check(absence(error), false)
      },
    )
    this.reads.push(done)
    done.catch(() => {})
  }

  readMany(behind: number, how: keyof typeof HOW): void {
    const options = HOW[how]
    const checks = new Map(KEYS.map((key) => [key, this.checked(key, how)]))
    const rest = KEYS.filter((key) => !this.isHit(key, options, checks.get(key)))
    const fetch = (
      ids: readonly string[],
      asked: GetManyOptions,
      take: (result: GetManyResult) => void,
    ): Promise<void> =>
      this.held(async () => {
        const rows = ids.map(async (id): Promise<GetManyResult> => {
          try {
            const { item, cache } = await this.serve(id, behind, asked)
            return { id, item, error: undefined, cache, near: false }
          } catch (error) {
            if (!(error instanceof NotFoundError)) throw error
            return { id, item: undefined, error, cache: error.cache, near: false }
          }
        })
        return Promise.all(rows)
      }).then((rows) => rows.forEach(take))
    const results = new Map<string, GetManyResult>()
    const done = this.near.loadMany(results, rest, options, fetch).then(
      () => {
        for (const [id, { item, error, cache, near }] of results) {
          if (error instanceof UnavailableError) continue
          checks.get(id)?.({ item, cache, near, revision: cache?.asOf ?? -1n }, false)
        }
      },
      (error: unknown) => {
        if (!(error instanceof UnavailableError)) throw error
      },
    )
    this.reads.push(done)
    done.catch(() => {})
  }

  /** Checks an answer to a read that begins now. */
  checked(key: string, how: keyof typeof HOW) {
    const known = [...this.known]
    const shown = this.shown.get(key) ?? 0
    return (answer: Answer, isHit: boolean): void => {
      if (answer.cache?.outcome === CacheOutcome.STALE) {
        this.stale++
        expect(['plain', 'cache-only', 'young'], 'stale').toContain(how)
        this.checkStale(key, answer, known)
      } else if (isHit) {
        expect(['plain', 'cache-only', 'strict', 'young'], 'hit').toContain(how)
        this.check(key, answer, known, shown, `hit ${how}`)
      } else this.checkLoaded(key, answer, known, shown)
    }
  }

  /** A stale answer is what it claims to be, and nothing that was removed. */
  checkStale(key: string, { item, revision }: Answer, known: readonly Row[]): void {
    const asOf = Number(revision)
    expect(item?.revision, 'stale: content').toBe(this.itemAt(key, asOf)?.revision)
    for (const row of known) {
      if (row.mode === 'remove' && this.concerns(row, key, item?.category)) {
        expect(asOf, `stale: removed at ${row.revision}`).toBeGreaterThanOrEqual(row.revision)
      }
    }
  }

  /** While a load was under way time has passed: only what was known when it began is sure. */
  checkLoaded(
    key: string,
    answer: { item: Item | undefined; revision: bigint },
    known: readonly Row[],
    shown: number,
  ): void {
    const nowMs = this.nowMs
    this.nowMs = Number.NEGATIVE_INFINITY
    try {
      this.check(key, answer, known, shown, 'load')
    } finally {
      this.nowMs = nowMs
    }
  }
}

const runs = Number(process.env['PROPERTY_RUNS'] ?? 2000)

test('nothing is served that is older than what the stream has shown, or than the bound', {
  timeout: 120_000,
}, async () => {
  let hits = 0
  let stale = 0
  await fc.assert(
    fc.asyncProperty(
      fc.array(op, { minLength: 5, maxLength: 60, size: 'max' }),
      fc.constantFrom(2, 100),
      async (ops, maxEntries) => {
        const world = new World(maxEntries)
        for (const one of ops) {
          switch (one.do) {
            case 'write':
              world.write(one.key, one.tag)
              break
            case 'own-write': {
              const { revision, tags } = world.write(one.key, one.tag)
              const row = world.last
              if (row !== undefined) world.known.add(row)
              world.near.log.acknowledge({ revision, kind: 'UPSERTED', mode: 'EXPIRE', ids: [one.key], tags })
              break
            }
            case 'delete':
              world.commit({ event: 'deleted', mode: 'remove', ids: [one.key], tags: [] }, (state) =>
                state.delete(one.key),
              )
              break
            case 'invalidate':
              world.invalidate(one.what, one.mode === 'remove' ? 'remove' : 'expire', one.own)
              break
            case 'deliver':
              world.deliver(one.rows)
              break
            case 'sync':
              world.deliver(world.rows.length)
              world.heartbeat()
              for (const { answer } of world.waiting.splice(0)) answer()
              await setImmediate()
              break
            case 'gap': {
              const skipped = world.rows.slice(world.sent, world.sent + one.rows)
              const through = skipped.at(-1)?.revision
              if (through === undefined) break
              for (const row of skipped) world.known.add(row)
              world.follow({ kind: 'gap', after: BigInt(world.sent), through: BigInt(through) })
              world.sent = through
              break
            }
            case 'heartbeat':
              world.heartbeat()
              break
            case 'reconnect':
              world.follow({ kind: 'resumed', after: BigInt(world.sent) })
              break
            case 'wait':
              world.nowMs += one.ms
              break
            case 'read':
              world.read(one.key, one.behind, one.how)
              if (one.begins) await setImmediate()
              break
            case 'read-many':
              world.readMany(one.behind, one.how)
              break
            case 'outage':
              world.isOut = one.is
              break
            case 'answer':
              world.waiting.splice(one.which % Math.max(1, world.waiting.length), 1)[0]?.answer()
              await setImmediate()
              break
          }
        }
        await setImmediate()
        while (world.waiting.length > 0) {
          world.waiting.shift()?.answer()
          await setImmediate()
        }
        await Promise.all(world.reads)
        hits += world.hits
        stale += world.stale
      },
    ),
    { numRuns: runs },
  )
  // A cache that serves nothing would keep every promise.
  expect(hits).toBeGreaterThan(runs / 4)
  expect(stale).toBeGreaterThan(runs / 100)
})
