/** What can grow and has no test of its own elsewhere: docs/limits.md names all of it. */
import { setImmediate as turn } from 'node:timers/promises'
import { describe, expect, test } from 'vitest'
import { ItemCacheError } from '../../src/errors.ts'
import { Subscriptions } from '../../src/invalidation/subscriptions.ts'
import { type Follower, Tail } from '../../src/invalidation/tail.ts'
import { type LogRow, View } from '../../src/invalidation/view.ts'
import { createLogger } from '../../src/observe/log.ts'
import { Metrics } from '../../src/observe/metrics.ts'
import { Flights, type Group } from '../../src/service/flights.ts'
import { Probe, type ProbeOptions } from '../../src/service/probe.ts'
import type { Copy, LogPage, LogSource, Snapshot } from '../../src/tiers/tier.ts'
import { watched } from '../support/watched.ts'

const busy = (action: () => unknown): string | undefined => {
  try {
    action()
    return undefined
  } catch (error) {
    return error instanceof ItemCacheError ? `${error.code} ${error.reason}` : 'another error'
  }
}

describe('flights', () => {
  test('are refused beyond their bound; callers of a key that has one share it all the same', async () => {
    const groups: Group[] = []
    const flights = new Flights((group) => groups.push(group), 2)
    const [first, second] = ['a', 'b'].map((id) => flights.join('t', id, 'cached', {}).flight)
    expect(busy(() => flights.join('t', 'c', 'cached', {}))).toBe('exhausted LOADS_BUSY')
    expect(busy(() => flights.join('t', 'a', 'direct', {}))).toBe('exhausted LOADS_BUSY')
    expect(flights.join('t', 'b', 'cached', {})).toEqual({ flight: second, joined: true })
    expect(flights.hasRoom).toBe(false)
    first?.fail(new Error('over'))
    expect(flights.join('t', 'c', 'cached', {}).joined).toBe(false)
    expect(flights.size).toBe(2)
    await expect.poll(() => groups.flatMap((group) => group.flights.map(({ id }) => id))).toEqual(['b', 'c'])
  })

  test('of a reader who comes in the tick in which all before have left are not given up with theirs', async () => {
    const groups: Group[] = []
    const flights = new Flights((group) => groups.push(group))
    const { flight: left } = flights.join('t', 'a', 'cached', {})
    left.board()
    left.leave()
    flights.join('t', 'b', 'cached', {}).flight.board()
    await expect
      .poll(() => groups.map(({ flights: left, signal }) => [left.map(({ id }) => id), signal.aborted]))
      .toEqual([[['b'], false]])
  })
})

const row = (revision: number, more: Partial<LogRow> = {}): LogRow => ({
  revision,
  kind: 'UPSERTED',
  mode: 'EXPIRE',
  ids: [`k${revision}`],
  tags: [`t${revision}`],
  ...more,
})

const unused = () => {
  throw new Error('not asked')
}

describe('floors', () => {
  test('that are forgotten make copies look older than they are, never newer', () => {
    const view = new View(100)
    view.activate(0, [], 0)
    view.apply(row(1))
    view.apply(row(2, { kind: 'DELETED', mode: 'REMOVE', ids: ['gone'] }))
    // A write that is acknowledged before the log has been applied so far.
    view.acknowledge(row(9))
    view.forget()
    expect(view.floors).toBe(0)
    const verdict = (asOf: number) => view.judge({ id: 'other', asOf, tags: [] })
    expect([verdict(1), verdict(2), verdict(8), verdict(9)]).toEqual([
      'removed',
      'superseded',
      'superseded',
      'current',
    ])
    // Those that come later are remembered again, and bounded again.
    for (let n = 10; n < 200; n++) view.apply(row(n))
    expect(view.floors).toBeLessThanOrEqual(200)
    expect(view.judge({ id: 'k199', asOf: 198, tags: [] })).toBe('superseded')
  })

  test('of many tenants are bounded together, also when every tenant is watched', async () => {
    const page: LogPage = {
      revision: 50,
      rows: Array.from({ length: 50 }, (_, i) => ({
        ...row(i + 1),
        writer: '',
        committedAtMs: 0,
        ageMs: 1e6,
      })),
      complete: true,
    }
    let polled = 0
    const source: LogSource = {
      newest: async () => page,
      after: async (positions) => {
        polled++
        return new Map([...positions.keys()].map((tenant) => [tenant, { ...page, rows: [] }]))
      },
      listen: async () => ({ [Symbol.asyncDispose]: async () => {} }),
      seen: () => {},
      bounds: unused,
      trim: unused,
    }
    const watcher: Follower = { applied: () => {}, jumped: () => {}, needs: () => true }
    await using tail = new Tail({
      source,
      metrics: new Metrics({ methods: [] }),
      log: createLogger({ level: 'silent', version: '0' }),
      now: () => performance.now(),
      pollMs: 5,
      maxTenants: 10,
      maxFloors: 100,
      maxTotalFloors: 300,
      idleMs: 1e9,
      exclusive: async (_, section) => section(),
    })
    tail.follow(watcher)
    await tail.start()
    for (let n = 0; n < 9; n++) await tail.activated(`tenant ${n}`)
    await expect.poll(() => tail.held().floors, { timeout: 20_000 }).toBeLessThanOrEqual(300)
    await expect.poll(() => polled, { timeout: 20_000 }).toBeGreaterThan(3)
    expect(tail.held()).toMatchObject({ tenants: 9, waiters: 0 })
  })
})

describe('what many tenants make an instance keep', () => {
  const ROW_BYTES = 64 + 8 + 128
  const LIMITS = {
    tenants: 15,
    watchersPerTenant: 100,
    watchersPerConnection: 1000,
    ringRows: 1000,
    ringBytes: 50 * ROW_BYTES,
  }

  /** A log with the same rows for every tenant, `revision` of them, as an instance with watchers follows it. */
  async function follow() {
    const log = { revision: 0 }
    const rows = (after: number) =>
      Array.from({ length: log.revision - after }, (_, i) => ({
        ...row(after + i + 1, { ids: [`${after + i + 1}`.padStart(128, 'k')], tags: [] }),
        writer: '',
        committedAtMs: 0,
        ageMs: 1e6,
      }))
    const page = (after: number): LogPage => ({ revision: log.revision, rows: rows(after), complete: true })
    const source: LogSource = {
      newest: async () => page(log.revision),
      after: async (positions) =>
        new Map([...positions].map(([tenant, position]) => [tenant, page(position)])),
      listen: async () => ({ [Symbol.asyncDispose]: async () => {} }),
      seen: () => {},
      bounds: async () => ({ revision: log.revision, oldest: 1 }),
      trim: unused,
    }
    const metrics = new Metrics({ methods: [] })
    const tail = new Tail({
      source,
      metrics,
      log: createLogger({ level: 'silent', version: '0' }),
      now: () => performance.now(),
      pollMs: 5,
      maxTenants: 15,
      maxFloors: 1000,
      maxTotalFloors: 1e6,
      idleMs: 1e9,
      exclusive: async (_, section) => section(),
    })
    const subscriptions = new Subscriptions({ tail, source, metrics, limits: LIMITS })
    await tail.start()
    const gone = new AbortController()
    const watch = async (tenant: string, resumeAfter?: number) => {
      const stream = watched(
        subscriptions,
        {
          tenant,
          resumeAfter,
          ids: new Set(),
          tags: new Set(),
          heartbeatMs: 60_000,
          maxBatchDelayMs: 0,
          exceptWriter: undefined,
          connection: 'one',
        },
        gone.signal,
        new AbortController().signal,
      )
      await stream.next()
      return stream
    }
    /** Every tenant gets so many rows, and this instance has applied them. */
    const commit = async (count: number) => {
      log.revision += count
      const tenants = Array.from({ length: tail.held().tenants }, (_, n) => `tenant ${n}`)
      await Promise.all(
        tenants.map((tenant) => tail.reached(tenant, log.revision, AbortSignal.timeout(20_000))),
      )
    }
    return {
      tail,
      subscriptions,
      watch,
      commit,
      [Symbol.asyncDispose]: async () => {
        gone.abort(new Error('the test is over'))
        await tail[Symbol.asyncDispose]()
      },
    }
  }

  test('the state of those who were here most recently, and of no more', async () => {
    await using bed = await follow()
    for (let n = 0; n < 100; n++) {
      await bed.tail.activated(`tenant ${n}`)
      expect(bed.tail.held().tenants).toBeLessThanOrEqual(15)
    }
    expect(bed.tail.view('tenant 99')).toBeDefined()
    expect(bed.tail.view('tenant 0')).toBeUndefined()
  })

  test('rings for watchers of so many tenants; those who come later are refused', async () => {
    await using bed = await follow()
    const streams = []
    for (let n = 0; n < 15; n++) streams.push(await bed.watch(`tenant ${n}`))
    const refused = { code: 'exhausted', reason: 'TOO_MANY_WATCHERS' }
    await expect(bed.watch('one more')).rejects.toMatchObject(refused)
    await bed.watch('tenant 3')
    await streams[7]?.return(undefined)
    await bed.watch('one more')
    expect(bed.subscriptions.held().rings).toBe(15)
  })

  test('rings as large as ten full ones, all together, and every watcher gets every row', async () => {
    await using bed = await follow()
    const streams = []
    for (let n = 0; n < 15; n++) streams.push(await bed.watch(`tenant ${n}`))
    for (let n = 0; n < 30; n++) {
      await bed.commit(7)
      const { ring_bytes, ring_rows } = bed.subscriptions.held()
      expect(ring_bytes).toBeLessThanOrEqual(10 * LIMITS.ringBytes)
      expect(ring_bytes).toBe(ring_rows * ROW_BYTES)
    }
    for (const stream of streams) {
      let last = 0
      while (last < 30 * 7) {
        const { value } = await stream.next()
        if (value?.kind !== 'batch') throw new Error(`expected a batch, got ${value?.kind}`)
        expect(value.rows[0]?.revision).toBe(last + 1)
        last = value.rows.at(-1)?.revision ?? Number.NaN
      }
      await stream.return(undefined)
    }
    expect(bed.subscriptions.held()).toEqual({
      rings: 0,
      ring_rows: 0,
      ring_bytes: 0,
      batch_bytes: 0,
      watching_connections: 0,
    })
  })

  test('batches for watchers at many places that are together no larger than their ring', async () => {
    await using bed = await follow()
    await bed.watch('tenant 0')
    await bed.commit(40)
    for (let after = 0; after < 40; after++) {
      const stream = await bed.watch('tenant 0', after)
      await stream.next()
      const { batch_bytes, ring_bytes } = bed.subscriptions.held()
      expect(batch_bytes).toBeGreaterThan(0)
      expect(batch_bytes).toBeLessThanOrEqual(ring_bytes)
    }
  })
})

test('the consistency probe compares one copy at a time, however many are served', async () => {
  const asked: PromiseWithResolvers<ReadonlyMap<string, Snapshot>>[] = []
  const metrics = new Metrics({ methods: [] })
  const read = () => {
    const answer = Promise.withResolvers<ReadonlyMap<string, Snapshot>>()
    asked.push(answer)
    return answer.promise
  }
  const probe = new Probe({
    postgres: { read } as unknown as ProbeOptions['postgres'],
    metrics,
    log: createLogger({ level: 'silent', version: '0' }),
    now: () => 0,
    random: () => 0,
    oneIn: 1,
  })
  const copy: Copy = {
    id: 'a',
    asOf: 1,
    revision: 0,
    bytes: undefined,
    tags: [],
    verifiedAtMs: 0,
    freshUntilMs: 0,
  }
  for (let n = 0; n < 100; n++) probe.served('t', copy, new View(10))
  expect(asked).toHaveLength(1)
  asked[0]?.resolve(new Map())
  await turn()
  expect(metrics.probes.consistent).toBe(1)
  probe.served('t', copy, new View(10))
  expect(asked).toHaveLength(2)
})

describe('lines of the log', () => {
  function capture() {
    const clock = { ms: 0 }
    const lines: { readonly msg: string; readonly lines?: number }[] = []
    const log = createLogger({
      level: 'debug',
      version: '0',
      now: () => clock.ms,
      destination: { write: (line) => void lines.push(JSON.parse(line)) },
    })
    return { clock, lines, log }
  }

  test('are a thousand at once and a hundred a second; how many were left out is told', () => {
    const { clock, lines, log } = capture()
    for (let n = 0; n < 5000; n++) log.error('again')
    expect(lines).toHaveLength(1000)
    clock.ms += 1000
    for (let n = 0; n < 5000; n++) log.warn('again')
    expect(lines).toHaveLength(1000 + 1 + 100)
    expect(lines[1000]).toMatchObject({ msg: 'lines of the log were left out', lines: 4000 })
    clock.ms += 1e9
    for (let n = 0; n < 5000; n++) log.info('again')
    expect(lines).toHaveLength(1000 + 1 + 100 + 1 + 1000)
  })

  test('that are fatal, or that an operator asked for with debug, are always there', () => {
    const { lines, log } = capture()
    for (let n = 0; n < 1500; n++) log.error('again')
    for (let n = 0; n < 2000; n++) log.debug('request')
    log.fatal('the end')
    expect(lines).toHaveLength(1000 + 2000 + 1)
    expect(lines.at(-1)?.msg).toBe('the end')
  })
})
