/** Subscriptions on a real log. The tail is not started: it looks only when a test says so. */
import { setImmediate as turn } from 'node:timers/promises'
import { create } from '@bufbuild/protobuf'
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest'
import { WatchInvalidationsRequestSchema } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import {
  type SubscriptionLimits,
  Subscriptions,
  type WatchMessage,
  type WatchRequest,
} from '../../src/invalidation/subscriptions.ts'
import { Tail } from '../../src/invalidation/tail.ts'
import { createLogger } from '../../src/observe/log.ts'
import { Metrics } from '../../src/observe/metrics.ts'
import type { CallContext } from '../../src/rpc/call.ts'
import { watchInvalidations } from '../../src/rpc/watch.ts'
import { Framed } from '../../src/rpc/wire.ts'
import type { Reader } from '../../src/service/read.ts'
import type { LogEntry, Revision } from '../../src/tiers/tier.ts'
import { watched } from '../support/watched.ts'
import { newTenant, openStore, type Store } from './postgres-fixture.ts'

let store: Store
beforeAll(async () => {
  store = await openStore()
})
afterAll(() => store?.[Symbol.asyncDispose]())

const ROOMY = {
  tenants: 1000,
  watchersPerTenant: 10,
  watchersPerConnection: 10,
  ringRows: 1000,
  ringBytes: 1e6,
}

class Bed implements AsyncDisposable {
  readonly tenant = newTenant()
  readonly metrics = new Metrics({ methods: [] })
  readonly draining = new AbortController()
  readonly gone = new AbortController()
  readonly tail: Tail
  readonly subscriptions: Subscriptions
  nowMs = 0

  constructor(limits: Partial<SubscriptionLimits> = {}) {
    const { metrics } = this
    this.tail = new Tail({
      source: store.tier,
      metrics,
      log: createLogger({ level: 'silent', version: '0' }),
      now: () => this.nowMs,
      pollMs: 500,
      maxTenants: 10,
      maxFloors: 1000,
      maxTotalFloors: 1_000_000,
      idleMs: 1e6,
      exclusive: async (_tenant, section) => section(),
    })
    this.subscriptions = new Subscriptions({
      tail: this.tail,
      source: store.tier,
      metrics,
      limits: { ...ROOMY, ...limits },
    })
  }

  request(request: Partial<WatchRequest> = {}): WatchRequest {
    return {
      tenant: this.tenant,
      resumeAfter: undefined,
      ids: new Set(),
      tags: new Set(),
      heartbeatMs: 60_000,
      maxBatchDelayMs: 0,
      exceptWriter: undefined,
      connection: 'one',
      ...request,
    }
  }

  /** A watcher that is asked by hand, and how often it wakes. */
  async follow(request: Partial<WatchRequest> = {}) {
    const { gone, draining } = this
    const wake = vi.fn()
    const signals = { gone: gone.signal, draining: draining.signal, wake }
    return { watcher: await this.subscriptions.watch(this.request(request), signals), wake }
  }

  watch(request: Partial<WatchRequest> = {}) {
    return watched(this.subscriptions, this.request(request), this.gone.signal, this.draining.signal)
  }

  /** A watcher that has been told `started`. */
  async watching(request: Partial<WatchRequest> = {}) {
    const stream = this.watch(request)
    const started = await next(stream)
    if (started.kind !== 'started') throw new Error(`expected started, got ${started.kind}`)
    return { stream, position: started.position }
  }

  /** Commits so many revisions at once and returns the last. */
  async commit(rows: number, also = ''): Promise<Revision> {
    await store.sql(`BEGIN;
      SELECT itemcache_invalidate('${this.tenant}', 'KEYS_INVALIDATED', 'EXPIRE', ARRAY['k' || n])
        FROM generate_series(1, ${rows}) AS n; ${also} COMMIT`)
    const [row] = await store.sql('SELECT revision FROM tenants WHERE name = $1', [this.tenant])
    return Number(row?.['revision'])
  }

  applied(revision: Revision): Promise<void> {
    return this.tail.reached(this.tenant, revision, AbortSignal.timeout(5000))
  }

  async write(rows: number): Promise<Revision> {
    const revision = await this.commit(rows)
    await this.applied(revision)
    return revision
  }

  async [Symbol.asyncDispose]() {
    this.gone.abort(new Error('the test is over'))
    await this.tail[Symbol.asyncDispose]()
  }
}

async function next(stream: AsyncGenerator<WatchMessage>): Promise<WatchMessage> {
  const { value, done } = await stream.next()
  if (done) throw new Error('the stream has ended')
  return value
}

async function batch(stream: AsyncGenerator<WatchMessage>): Promise<readonly LogEntry[]> {
  const message = await next(stream)
  if (message.kind !== 'batch') throw new Error(`expected a batch, got ${JSON.stringify(message)}`)
  return message.rows
}

async function revisions(stream: AsyncGenerator<WatchMessage>, count: number): Promise<Revision[]> {
  const all: Revision[] = []
  while (all.length < count) all.push(...(await batch(stream)).map(({ revision }) => revision))
  return all
}

const following = (position: Revision, count: number) =>
  Array.from({ length: count }, (_, i) => position + 1 + i)

describe('a watcher', () => {
  test('gets every revision once and in order, however they are committed and whenever it asks', async () => {
    await using bed = new Bed()
    const { stream, position } = await bed.watching()
    for (const rows of [1, 3, 250, 1]) await bed.write(rows)
    const first = await revisions(stream, 255)
    await bed.write(2)
    expect([...first, ...(await revisions(stream, 2))]).toEqual(following(position, 257))
  })

  test('that asks first is woken by what is applied', async () => {
    await using bed = new Bed()
    const { stream, position } = await bed.watching()
    const waiting = batch(stream)
    await bed.write(1)
    expect((await waiting).map(({ revision }) => revision)).toEqual([position + 1])
  })

  test('at the same place as another is given the same array, so that it is encoded once', async () => {
    await using bed = new Bed()
    const { stream: one } = await bed.watching()
    const { stream: two } = await bed.watching()
    await bed.write(5)
    expect(await batch(one)).toBe(await batch(two))
    await bed.write(5)
    expect(await batch(two)).toBe(await batch(one))
  })

  test('is sent the same bytes as another at the same place, gRPC’s prefix among them', async () => {
    await using bed = new Bed()
    const handler = watchInvalidations(bed.subscriptions, {} as Reader, 1e6)
    const begin = () =>
      handler(
        create(WatchInvalidationsRequestSchema, { heartbeatInterval: { seconds: 60n } }),
        { tenant: bed.tenant, peer: 'one' } as CallContext,
        { gone: bed.gone.signal, draining: bed.draining.signal, wake: () => {} },
      )
    using one = await begin()
    using two = await begin()
    for (const messages of [one, two]) expect(messages.next()).toBeInstanceOf(Framed)
    await bed.write(3)
    const sent = one.next()
    expect(sent).toBeInstanceOf(Framed)
    expect(two.next()).toBe(sent)
    expect(one.next()).toBeUndefined()
  })

  test('is woken, among hundreds, for whatever comes whenever it comes, and gets each revision once', async () => {
    const WATCHERS = 600
    await using bed = new Bed({ watchersPerTenant: WATCHERS, watchersPerConnection: WATCHERS })
    const watching = await Promise.all(Array.from({ length: WATCHERS }, () => bed.watching()))
    const position = watching[0]?.position ?? Number.NaN
    const received = watching.map(({ stream }) => revisions(stream, 60))
    for (let n = 0; n < 20; n++) await bed.write(3)
    for (const one of await Promise.all(received)) expect(one).toEqual(following(position, 60))
  })

  test('is woken once for what is applied together', async () => {
    await using bed = new Bed()
    const { watcher: followed, wake } = await bed.follow()
    using watcher = followed
    expect(watcher.next()).toMatchObject({ kind: 'started' })
    expect(watcher.next()).toBeUndefined()
    await bed.write(50)
    await expect.poll(() => wake.mock.calls.length).toBe(1)
    expect(watcher.next()).toMatchObject({ kind: 'batch', rows: { length: 50 } })
    watcher[Symbol.dispose]()
    await bed.write(1)
    await turn()
    expect(wake).toHaveBeenCalledTimes(1)
  })

  test('that was given all there is need not ask again to be woken; one that was given a part is not waiting', async () => {
    await using bed = new Bed()
    const { watcher: followed, wake } = await bed.follow()
    using watcher = followed
    expect(watcher.next()).toMatchObject({ kind: 'started' })
    await bed.write(501)
    await turn()
    expect([watcher.isWaiting, wake.mock.calls.length]).toEqual([false, 0])
    expect(watcher.next()).toMatchObject({ kind: 'batch', rows: { length: 500 } })
    await bed.write(1)
    await turn()
    expect([watcher.isWaiting, wake.mock.calls.length]).toEqual([false, 0])
    expect(watcher.next()).toMatchObject({ kind: 'batch', rows: { length: 2 } })
    expect(watcher.isWaiting).toBe(true)
    await bed.write(1)
    await expect.poll(() => wake.mock.calls.length).toBe(1)
    expect(watcher.next()).toMatchObject({ kind: 'batch', rows: { length: 1 } })
    expect(watcher.next()).toBeUndefined()
    expect(watcher.isWaiting).toBe(true)
  })

  test('that falls behind the ring is served from PostgreSQL, and then from the ring again', async () => {
    await using bed = new Bed({ ringRows: 10 })
    const { stream, position } = await bed.watching()
    const before = store.tier.stats.statements.read
    for (let i = 0; i < 50; i++) await bed.write(10)
    expect(await revisions(stream, 500)).toEqual(following(position, 500))
    expect(store.tier.stats.statements.read).toBeGreaterThan(before)
    await bed.write(1)
    expect(await revisions(stream, 1)).toEqual([position + 501])
    expect(bed.metrics.gapsSent).toBe(0)
  })

  test('that falls behind by bytes is served from PostgreSQL, too', async () => {
    await using bed = new Bed({ ringBytes: 500 })
    const { stream, position } = await bed.watching()
    await bed.write(100)
    expect(await revisions(stream, 100)).toEqual(following(position, 100))
  })

  test('is told of a gap when this instance itself has missed revisions that are gone', async () => {
    await using bed = new Bed()
    const { stream, position } = await bed.watching()
    await bed.write(2)
    const revision = await bed.commit(
      5,
      `DELETE FROM invalidations WHERE tenant = '${bed.tenant}' AND revision <= ${position + 4};`,
    )
    await bed.applied(revision)
    // The instance jumped to the end; the rows that are still there are served all the same.
    expect(await next(stream)).toEqual({ kind: 'gap', after: position, through: position + 4 })
    expect(await revisions(stream, 3)).toEqual(following(position + 4, 3))
    await bed.write(1)
    expect(await revisions(stream, 1)).toEqual([position + 8])
    expect(bed.metrics.gapsSent).toBe(1)
  })

  test('resumes in the middle of what the ring holds, and before it', async () => {
    await using bed = new Bed({ ringRows: 10 })
    const { position } = await bed.watching()
    await bed.write(50)
    const { stream: late } = await bed.watching({ resumeAfter: position + 47 })
    expect(await revisions(late, 3)).toEqual(following(position + 47, 3))
    const { stream: early } = await bed.watching({ resumeAfter: position + 1 })
    expect(await revisions(early, 49)).toEqual(following(position + 1, 49))
  })

  test('that resumes ahead of the log is refused', async () => {
    await using bed = new Bed()
    const revision = await bed.write(1)
    await expect(next(bed.watch({ resumeAfter: revision + 1 }))).rejects.toMatchObject({
      code: 'ahead-of-log',
    })
    expect(bed.metrics.subscribers).toBe(0)
  })

  test('gets heartbeats only while the instance itself hears of the log', async () => {
    await using bed = new Bed()
    const revision = await bed.write(1)
    const { stream } = await bed.watching({ heartbeatMs: 100 })
    bed.nowMs += 100
    expect(await next(stream)).toMatchObject({ kind: 'heartbeat', revision })
    bed.nowMs += 2000
    // A heartbeat would come long before the row.
    const waiting = next(stream)
    await bed.write(1)
    expect(await waiting).toMatchObject({ kind: 'batch' })
  })

  test('that is owed a heartbeat asks for it behind the rows that had to come first', async () => {
    await using bed = new Bed()
    await bed.write(1)
    const { watcher: followed, wake } = await bed.follow({ heartbeatMs: 100 })
    using watcher = followed
    expect(watcher.next()).toMatchObject({ kind: 'started' })
    expect(watcher.next()).toBeUndefined()
    bed.nowMs += 2000
    await expect.poll(() => wake.mock.calls.length).toBe(1)
    await bed.write(1)
    expect(watcher.next()).toMatchObject({ kind: 'batch' })
    expect(watcher.isWaiting).toBe(false)
    expect(watcher.next()).toMatchObject({ kind: 'heartbeat' })
  })

  test('gets heartbeats also when there is always something to send, each with how current it is', async () => {
    await using bed = new Bed()
    const { stream } = await bed.watching({ heartbeatMs: 100 })
    const deadlineMs = performance.now() + 10_000
    let heartbeats = 0
    while (heartbeats < 3 && performance.now() < deadlineMs) {
      bed.nowMs += 40
      const askedMs = bed.nowMs
      await bed.write(1)
      for (let message = await next(stream); message.kind !== 'batch'; message = await next(stream)) {
        if (message.kind !== 'heartbeat') throw new Error(`expected a heartbeat, got ${message.kind}`)
        // The fake clock began at 0, and so did the stream.
        expect(message.heardMs).toBeLessThanOrEqual(askedMs)
        heartbeats++
      }
    }
    expect(heartbeats).toBe(3)
  })

  test('is told where it stands when the server drains', async () => {
    await using bed = new Bed()
    const { stream, position } = await bed.watching()
    await bed.write(3)
    await batch(stream)
    const waiting = next(stream)
    const why = new Error('draining')
    bed.draining.abort(why)
    expect(await waiting).toEqual({ kind: 'draining', position: position + 3 })
    await expect(stream.next()).rejects.toBe(why)
    expect(bed.metrics.subscribers).toBe(0)
  })
})

describe('the number of watchers', () => {
  test('is bounded for a tenant and for a connection, and a place is free again when one leaves', async () => {
    await using bed = new Bed({ watchersPerTenant: 3, watchersPerConnection: 2 })
    const { stream: first } = await bed.watching({ connection: 'one' })
    await bed.watching({ connection: 'one' })
    const refused = { code: 'exhausted', reason: 'TOO_MANY_WATCHERS' }
    await expect(next(bed.watch({ connection: 'one' }))).rejects.toMatchObject(refused)
    await bed.watching({ connection: 'two' })
    await expect(next(bed.watch({ connection: 'two' }))).rejects.toMatchObject(refused)
    expect(bed.metrics.subscribers).toBe(3)
    await first.return(undefined)
    await bed.watching({ connection: 'one' })
    expect(bed.metrics.subscribers).toBe(3)
  })
})
