/** What can grow and has no test of its own elsewhere: docs/limits.md names all of it. */
import { setImmediate as turn } from 'node:timers/promises'
import { describe, expect, test } from 'vitest'
import { ItemCacheError } from '../../src/errors.ts'
import { type Follower, Tail } from '../../src/invalidation/tail.ts'
import { type LogRow, View } from '../../src/invalidation/view.ts'
import { createLogger } from '../../src/observe/log.ts'
import { Metrics } from '../../src/observe/metrics.ts'
import { Flights, type Group } from '../../src/service/flights.ts'
import type { LogPage, LogSource } from '../../src/tiers/tier.ts'

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
    await turn()
    expect(groups.flatMap((group) => group.flights.map(({ id }) => id))).toEqual(['b', 'c'])
  })

  test('of a reader who comes in the tick in which all before have left are not given up with theirs', async () => {
    const groups: Group[] = []
    const flights = new Flights((group) => groups.push(group))
    flights.join('t', 'a', 'cached', {}).flight.board()[Symbol.dispose]()
    using _waiting = flights.join('t', 'b', 'cached', {}).flight.board()
    await turn()
    expect(groups.map(({ flights: left, signal }) => [left.map(({ id }) => id), signal.aborted])).toEqual([
      [['b'], false],
    ])
  })
})

describe('floors', () => {
  const row = (revision: number, more: Partial<LogRow> = {}): LogRow => ({
    revision,
    kind: 'UPSERTED',
    mode: 'EXPIRE',
    ids: [`k${revision}`],
    tags: [`t${revision}`],
    ...more,
  })

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
    const unused = () => {
      throw new Error('not asked')
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
