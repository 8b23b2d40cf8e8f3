/**
 * The near cache over a service that lags, a stream that is held up, breaks and forgets, and answers that come late: whatever
 * happens, a copy that it serves is the state that it says it is, and new enough.
 */
import { create } from '@bufbuild/protobuf'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { toDuration } from '../../clients/typescript/src/duration.ts'
import { CancelledError, OutOfRangeError, UnavailableError } from '../../clients/typescript/src/errors.ts'
import {
  InvalidationKind,
  InvalidationMode,
  ItemSchema,
  type WatchInvalidationsRequest,
  type WatchInvalidationsResponse,
  WatchInvalidationsResponseSchema,
} from '../../clients/typescript/src/gen/itemcache/v1/item_cache_pb.ts'
import { type Copy, NearCache, type NearCacheOptions } from '../../clients/typescript/src/near-cache.ts'
import type { FollowParts } from '../../clients/typescript/src/watch.ts'

const IDS = ['a', 'b'] as const
const TAGS = ['t', 'u'] as const
const BOUND_MS = 1500
const ANY = { minRevision: 0, maxStalenessMs: Number.POSITIVE_INFINITY }

const turn = () => new Promise<void>((resolve) => setImmediate(resolve))

interface Row {
  readonly revision: number
  readonly atMs: number
  readonly kind: 'UPSERTED' | 'DELETED' | 'KEYS_INVALIDATED' | 'TAGS_INVALIDATED' | 'TENANT_INVALIDATED'
  readonly mode: 'EXPIRE' | 'REMOVE'
  readonly ids: readonly string[]
  readonly tags: readonly string[]
  /** Of an item that is written. */
  readonly content?: { readonly title: string; readonly tags: readonly string[] }
}

/** One tenant's log, and an instance that follows it late. */
class Service {
  nowMs = 0
  readonly rows: Row[] = []
  /** How far the instance has applied the log, and when it last heard of it. */
  position = 0
  heardMs = 0
  /** Revisions up to here are trimmed. */
  trimmed = 0
  stream: Stream | undefined
  /** The clock of the instance is another one. */
  readonly #clockMs = 5_000_000

  get revision(): number {
    return this.rows.length
  }

  commit(row: Omit<Row, 'revision' | 'atMs'>): number {
    this.rows.push({ ...row, revision: this.revision + 1, atMs: this.nowMs })
    return this.revision
  }

  write(id: string, tags: readonly string[] | undefined): number {
    const former = this.at(id, this.revision)?.tags ?? []
    if (tags === undefined) return this.commit({ kind: 'DELETED', mode: 'REMOVE', ids: [id], tags: former })
    const content = { title: `${this.revision + 1}`, tags }
    return this.commit({ kind: 'UPSERTED', mode: 'EXPIRE', ids: [id], tags: [...former, ...tags], content })
  }

  at(id: string, revision: number): Row['content'] {
    return this.rows.findLast(
      (row) => row.revision <= revision && row.ids.includes(id) && !row.kind.endsWith('INVALIDATED'),
    )?.content
  }

  /** The last revision up to `revision` that concerned an item. */
  concerned(id: string, revision: number, isOld: (row: Row) => boolean = () => true): number {
    const row = this.rows.findLast(
      (row) =>
        row.revision <= revision &&
        isOld(row) &&
        (row.kind === 'TENANT_INVALIDATED' ||
          row.ids.includes(id) ||
          (row.kind === 'TAGS_INVALIDATED' &&
            row.tags.some((tag) => this.at(id, row.revision)?.tags.includes(tag)))),
    )
    return row?.revision ?? 0
  }

  poll(): void {
    this.position = this.revision
    this.heardMs = this.nowMs
  }

  open(request: WatchInvalidationsRequest, signal: AbortSignal): Stream {
    const from = request.resumeAfter === undefined ? this.position : Number(request.resumeAfter)
    const stream = new Stream(from, this.#clockMs + this.nowMs, signal)
    this.stream = stream
    if (from > this.revision) {
      stream.fail(new OutOfRangeError('resume_after is ahead of the log'))
      return stream
    }
    stream.send({ case: 'started', value: { position: BigInt(from), oldestResumable: BigInt(this.trimmed) } })
    return stream
  }

  /** What the instance has to say next, if anything. */
  say(rows: number): void {
    const { stream } = this
    if (stream === undefined) return
    if (stream.cursor < this.trimmed) {
      const [after, through] = [BigInt(stream.cursor), BigInt(this.trimmed)]
      stream.cursor = this.trimmed
      stream.send({ case: 'gap', value: { after, through } })
    } else if (stream.cursor < this.position) {
      const events = this.rows.slice(stream.cursor, Math.min(stream.cursor + rows, this.position))
      stream.cursor += events.length
      stream.send({
        case: 'batch',
        value: {
          events: events.map(({ revision, kind, mode, ids, tags }) => ({
            revision: BigInt(revision),
            kind: InvalidationKind[kind],
            mode: InvalidationMode[mode],
            ids: [...ids],
            tags: [...tags],
          })),
        },
      })
    } else {
      const heardAfter = toDuration(this.#clockMs + this.heardMs - stream.takenMs)
      stream.send({ case: 'heartbeat', value: { revision: BigInt(stream.cursor), heardAfter } })
    }
  }
}

type Event = NonNullable<Parameters<typeof create<typeof WatchInvalidationsResponseSchema>>[1]>['event']

/** One connection: what is sent arrives when the test says so. */
class Stream {
  cursor: number
  /** When the instance took the call, by its own clock. */
  readonly takenMs: number
  readonly #onTheWay: WatchInvalidationsResponse[] = []
  readonly #arrived: WatchInvalidationsResponse[] = []
  #error: Error | undefined
  #wake = Promise.withResolvers<void>()
  readonly #signal: AbortSignal

  constructor(cursor: number, takenMs: number, signal: AbortSignal) {
    this.cursor = cursor
    this.takenMs = takenMs
    this.#signal = signal
    signal.addEventListener('abort', () => this.fail(new CancelledError('cancelled')))
  }

  send(event: Event): void {
    this.#onTheWay.push(create(WatchInvalidationsResponseSchema, { event: event as never }))
  }

  arrive(): void {
    const message = this.#onTheWay.shift()
    if (message !== undefined) this.#arrived.push(message)
    this.#wake.resolve()
  }

  fail(error: Error): void {
    this.#error ??= error
    this.#wake.resolve()
  }

  async *messages(): AsyncGenerator<WatchInvalidationsResponse, void, undefined> {
    for (;;) {
      if (this.#signal.aborted) throw new CancelledError('cancelled')
      const message = this.#arrived.shift()
      if (message !== undefined) {
        yield message
        continue
      }
      if (this.#error !== undefined) throw this.#error
      await this.#wake.promise
      this.#wake = Promise.withResolvers()
    }
  }
}

class Bed implements AsyncDisposable {
  readonly service = new Service()
  readonly near: NearCache
  #sleeping: (() => void)[] = []

  constructor(options: Partial<NearCacheOptions> = {}) {
    const { service } = this
    const serverStream = ((
      _method: unknown,
      request: WatchInvalidationsRequest,
      { signal }: { signal: AbortSignal },
    ) => service.open(request, signal).messages()) as unknown as FollowParts['transport']['serverStream']
    this.near = new NearCache(
      { maxEntries: 10, ...options },
      {
        transport: { serverStream },
        metadata: {},
        now: () => service.nowMs,
        random: () => 0.5,
        sleep: (_, signal) =>
          new Promise((resolve) => {
            this.#sleeping.push(resolve)
            signal?.addEventListener('abort', () => resolve(), { once: true })
          }),
      },
    )
  }

  /** The pause before the stream is opened again is over. */
  reconnect(): void {
    for (const wake of this.#sleeping.splice(0)) wake()
  }

  /** What the service answers for an item: its state as of a revision that it has reached. */
  answer(id: string, asOf: number): Copy {
    const content = this.service.at(id, asOf)
    return {
      id,
      asOf,
      item: content && create(ItemSchema, { id, title: content.title, tags: [...content.tags] }),
      tags: content?.tags ?? [],
      verifiedAtMs: this.service.nowMs,
      freshUntilMs: this.service.nowMs + 1e9,
    }
  }

  /** Lets the stream say and bring everything, so that the near cache is current. */
  async settle(): Promise<void> {
    const { service } = this
    service.poll()
    this.reconnect()
    await turn()
    while ((service.stream?.cursor ?? 0) < service.revision) service.say(100)
    service.say(1)
    for (let i = 0; i < 100; i++) service.stream?.arrive()
    await turn()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.near.close()
  }
}

const id = fc.constantFrom(...IDS)
const tags = fc.subarray([...TAGS])
const mode = fc.constantFrom('EXPIRE' as const, 'REMOVE' as const)
const op = fc.oneof(
  { weight: 8, arbitrary: fc.record({ op: fc.constant('read' as const), id }) },
  { weight: 4, arbitrary: fc.record({ op: fc.constant('answer' as const), id, lag: fc.nat(3) }) },
  {
    weight: 4,
    arbitrary: fc.record({
      op: fc.constantFrom('write', 'own' as const),
      id,
      tags: fc.option(tags, { nil: undefined }),
    }),
  },
  {
    weight: 1,
    arbitrary: fc.record({
      op: fc.constant('byTag' as const),
      tags: fc.subarray([...TAGS], { minLength: 1 }),
      mode,
    }),
  },
  { weight: 1, arbitrary: fc.record({ op: fc.constant('byId' as const), id, mode }) },
  { weight: 1, arbitrary: fc.record({ op: fc.constant('all' as const), mode }) },
  {
    weight: 8,
    arbitrary: fc.record({ op: fc.constant('say' as const), rows: fc.integer({ min: 1, max: 3 }) }),
  },
  { weight: 8, arbitrary: fc.constant({ op: 'arrive' as const }) },
  { weight: 4, arbitrary: fc.constant({ op: 'poll' as const }) },
  { weight: 8, arbitrary: fc.constant({ op: 'flow' as const }) },
  { weight: 2, arbitrary: fc.constantFrom({ op: 'break' as const }, { op: 'trim' as const }) },
  { weight: 3, arbitrary: fc.constant({ op: 'reconnect' as const }) },
  {
    weight: 3,
    arbitrary: fc.record({ op: fc.constant('tick' as const), ms: fc.constantFrom(50, 100, 400, 400, 1600) }),
  },
)

describe('whatever the order in which things happen', () => {
  test('a copy is what the item was as of its revision, and not older than what was shown, written or promised', async () => {
    let served = 0
    await fc.assert(
      fc.asyncProperty(
        fc.array(op, { minLength: 5, maxLength: 120, size: 'max' }),
        fc.constantFrom(1, 10),
        async (ops, maxEntries) => {
          await using bed = new Bed({ maxEntries })
          const { service, near } = bed
          const shown = new Map<string, number>()
          for (const one of IDS) service.write(one, ['t'])
          await bed.settle()
          for (const of of IDS) near.arrived(bed.answer(of, service.revision), true)
          const check = (of: string, { asOf, item }: Copy, isNear: boolean) => {
            expect(item?.title).toBe(service.at(of, asOf)?.title)
            const needs = [
              service.concerned(of, near.position),
              shown.get(of) ?? 0,
              isNear
                ? service.concerned(of, service.revision, ({ atMs }) => atMs < service.nowMs - BOUND_MS)
                : 0,
            ]
            for (const needed of needs) expect(asOf).toBeGreaterThanOrEqual(needed)
            shown.set(of, service.concerned(of, asOf))
          }
          for (const one of ops) {
            switch (one.op) {
              case 'read': {
                const copy = near.get(one.id, ANY)
                if (copy === undefined) break
                served++
                check(one.id, copy, true)
                break
              }
              case 'answer': {
                const least = near.least(one.id)
                const copy = bed.answer(one.id, Math.max(least, service.revision - one.lag))
                if (near.arrived(copy, true)) check(one.id, copy, false)
                break
              }
              case 'write':
                service.write(one.id, one.tags)
                break
              case 'own': {
                const revision = service.write(one.id, one.tags)
                near.wrote(one.id, one.tags === undefined ? 'REMOVE' : 'EXPIRE', revision)
                shown.set(one.id, revision)
                break
              }
              case 'byTag':
                service.commit({ kind: 'TAGS_INVALIDATED', mode: one.mode, ids: [], tags: one.tags })
                break
              case 'byId':
                service.commit({ kind: 'KEYS_INVALIDATED', mode: one.mode, ids: [one.id], tags: [] })
                break
              case 'all':
                service.commit({ kind: 'TENANT_INVALIDATED', mode: one.mode, ids: [], tags: [] })
                break
              case 'say':
                // An instance that hears nothing claims nothing.
                if (
                  service.nowMs - service.heardMs <= BOUND_MS ||
                  (service.stream?.cursor ?? 0) < service.position
                )
                  service.say(one.rows)
                break
              case 'arrive':
                service.stream?.arrive()
                break
              case 'poll':
                service.poll()
                break
              case 'flow':
                service.poll()
                for (let i = 0; i < 3; i++) service.say(2)
                for (let i = 0; i < 4; i++) service.stream?.arrive()
                break
              case 'break':
                service.stream?.fail(new UnavailableError('gone'))
                service.stream = undefined
                break
              case 'trim':
                service.trimmed = service.position
                break
              case 'reconnect':
                bed.reconnect()
                break
              case 'tick':
                service.nowMs += one.ms
            }
            await turn()
          }
          // When all is quiet, everybody reads the newest, and the second time from here.
          await bed.settle()
          for (const of of IDS) {
            expect(near.arrived(bed.answer(of, service.revision), true)).toBe(true)
            expect(near.get(of, ANY)?.asOf).toBe(service.revision)
            if (near.stats.state !== 'current') throw new Error(`the near cache is ${near.stats.state}`)
          }
        },
      ),
      { numRuns: 300 },
    )
    // A cache that serves nothing would be right, too.
    expect(served).toBeGreaterThan(300)
  })
})

describe('a near cache', () => {
  test('stops calling copies current 1.5 s after what its stream has proved, however late the proof arrives', async () => {
    await using bed = new Bed()
    const { service, near } = bed
    service.write('a', [])
    await bed.settle()
    near.arrived(bed.answer('a', service.revision), true)
    service.say(1)
    service.nowMs += 1500
    expect(near.get('a', ANY)).toBeDefined()
    service.nowMs += 1
    expect(near.get('a', ANY)).toBeUndefined()
    // This heartbeat was sent 1.5 s ago.
    service.stream?.arrive()
    await turn()
    expect(near.stats).toMatchObject({ state: 'unverified', entries: 1 })
    await bed.settle()
    expect(near.get('a', ANY)).toBeDefined()
  })

  test('calls nothing current before its stream has proved anything', async () => {
    await using bed = new Bed()
    const { service, near } = bed
    service.write('a', [])
    near.arrived(bed.answer('a', service.revision), true)
    service.write('a', [])
    service.stream?.arrive()
    await turn()
    // The instance has not heard of either write.
    expect(near.stats).toMatchObject({ state: 'unverified', position: 0n, lagMs: undefined })
    expect(near.get('a', ANY)).toBeUndefined()
  })

  test('distrusts after a gap what is older than its end, and nothing else', async () => {
    await using bed = new Bed()
    const { service, near } = bed
    service.write('a', [])
    service.write('b', [])
    await bed.settle()
    near.arrived(bed.answer('a', service.revision), true)
    service.write('b', [])
    service.poll()
    near.arrived(bed.answer('b', service.revision), true)
    service.trimmed = service.revision
    await bed.settle()
    expect(near.stats).toMatchObject({ gaps: 1, state: 'current' })
    expect(near.get('a', ANY)).toBeUndefined()
    expect(near.get('b', ANY)).toBeDefined()
  })

  test('forgets everything when the log is another one', async () => {
    await using bed = new Bed()
    const { service, near } = bed
    for (let i = 0; i < 5; i++) service.write('a', [])
    await bed.settle()
    near.arrived(bed.answer('a', service.revision), true)
    service.rows.length = 2
    service.position = 2
    service.stream?.fail(new UnavailableError('restored'))
    await turn()
    bed.reconnect()
    await turn()
    await bed.settle()
    expect(near.stats).toMatchObject({ entries: 0, state: 'current', position: 2n })
  })

  test('serves what is no longer current only where that is allowed, for so long, and never what was removed', async () => {
    await using bed = new Bed({ maxStaleMs: 5000 })
    const { service, near } = bed
    service.write('a', [])
    service.write('b', [])
    await bed.settle()
    for (const one of IDS) near.arrived(bed.answer(one, service.revision), true)
    service.write('a', [])
    service.write('b', undefined)
    await bed.settle()
    expect(near.get('a', ANY)).toBeUndefined()
    expect(near.staleInstead('a', ANY)?.item?.title).toBe('1')
    expect(near.staleInstead('a', { ...ANY, minRevision: 99 })).toBeUndefined()
    expect(near.staleInstead('b', ANY)).toBeUndefined()
    service.nowMs += 5001
    expect(near.staleInstead('a', ANY)).toBeUndefined()
  })

  test('holds no more than it may', async () => {
    await using bed = new Bed({ maxEntries: 100, maxBytes: 20_000 })
    const { service, near } = bed
    await bed.settle()
    for (let i = 0; i < 500; i++) near.arrived(bed.answer(`k${i}`, service.revision), true)
    const { entries, bytes } = near.stats
    expect(entries).toBeGreaterThan(0)
    expect(entries).toBeLessThanOrEqual(100)
    expect(bytes).toBeLessThanOrEqual(20_000)
  })
})
