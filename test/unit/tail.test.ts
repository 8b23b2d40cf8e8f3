import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest'
import { Tail, type TailOptions, untilAborted } from '../../src/invalidation/tail.ts'
import { createLogger } from '../../src/observe/log.ts'
import { Metrics } from '../../src/observe/metrics.ts'
import type { LogEntry, LogListener, LogPage, LogSource, Revision } from '../../src/tiers/tier.ts'

const TENANT = 'tenant'
const POLL_MS = 500

/** A log in memory that counts who asks for it. Its database may notify or not. */
class Log implements LogSource {
  polls = 0
  /** What a poll waits for. */
  ready: Promise<void> = Promise.resolve()
  readonly #rows: LogEntry[] = []
  #listener: LogListener | undefined

  commit({ notify, ageMs = 1000 }: { notify: boolean; ageMs?: number }): Revision {
    const revision = this.#rows.length + 1
    const row = { revision, kind: 'UPSERTED', mode: 'EXPIRE', ids: ['a'], tags: [], writer: '' } as const
    this.#rows.push({ ...row, committedAtMs: 0, ageMs })
    if (notify) this.#listener?.changed(TENANT)
    return revision
  }

  async newest(): Promise<LogPage> {
    return { revision: this.#rows.length, rows: this.#rows, complete: true }
  }

  async after(
    positions: ReadonlyMap<string, Revision>,
    _: unknown,
    signal: AbortSignal,
  ): Promise<ReadonlyMap<string, LogPage>> {
    this.polls++
    await untilAborted(this.ready, signal)
    const pages = [...positions].map(([tenant, after]) => {
      return [tenant, { revision: this.#rows.length, rows: this.#rows.slice(after), complete: true }] as const
    })
    return new Map(pages)
  }

  async listen(listener: LogListener): Promise<AsyncDisposable> {
    this.#listener = listener
    return { [Symbol.asyncDispose]: async () => {} }
  }

  seen(): void {}
  bounds = unused
  trim = unused
}

function unused(): never {
  throw new Error('the tail has no use for this')
}

const startTail = async (source: Log, options: Partial<TailOptions> = {}) => {
  const tail = new Tail({
    source,
    metrics: new Metrics({ methods: [] }),
    log: createLogger({ level: 'silent', version: '0' }),
    now: () => performance.now(),
    pollMs: POLL_MS,
    maxTenants: 10,
    maxFloors: 100,
    maxTotalFloors: 1000,
    idleMs: 1e9,
    exclusive: async (_, section) => section(),
    ...options,
  })
  await tail.start()
  return tail
}

/** Promises, and what waits until everything that has arrived was read. */
const settled = async () => {
  for (let n = 0; n < 3; n++) await new Promise((resolve) => setImmediate(resolve))
}

beforeEach(() => {
  vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout', 'setInterval', 'clearInterval', 'performance'] })
})
afterEach(() => {
  vi.useRealTimers()
})

describe('a tenant that has just changed', () => {
  test('is followed closely without further notifications, and then left alone', async () => {
    const log = new Log()
    await using tail = await startTail(log)
    const view = await tail.activated(TENANT)

    log.commit({ notify: true })
    await vi.advanceTimersByTimeAsync(0)
    expect(view.position).toBe(1)

    // The database notifies at most once in 250 ms.
    const second = log.commit({ notify: false })
    await vi.advanceTimersByTimeAsync(20)
    expect(view.position).toBe(second)

    // What was applied keeps it hot: a steady writer is followed although nobody is notified.
    for (let i = 0; i < 10; i++) {
      await vi.advanceTimersByTimeAsync(240)
      const revision = log.commit({ notify: false })
      await vi.advanceTimersByTimeAsync(20)
      expect(view.position).toBe(revision)
    }

    await vi.advanceTimersByTimeAsync(400)
    const before = log.polls
    await vi.advanceTimersByTimeAsync(10 * POLL_MS)
    expect(log.polls - before).toBe(10)
  })

  test('is followed closely from its activation on, if somebody had just been notified', async () => {
    const log = new Log()
    log.commit({ notify: true, ageMs: 100 })
    await using tail = await startTail(log)
    const view = await tail.activated(TENANT)
    const second = log.commit({ notify: false })
    await vi.advanceTimersByTimeAsync(20)
    expect(view.position).toBe(second)
  })
})

describe('who waits until a log is heard of again', () => {
  /** An instance that has been kept from looking for two seconds. */
  async function standstill() {
    const log = new Log()
    let nowMs = 0
    const tail = await startTail(log, { now: () => nowMs })
    const view = await tail.activated(TENANT)
    nowMs = 2000
    expect(view.hasHeard(nowMs)).toBe(false)
    const over: string[] = []
    /** Says whether the log has been heard of when somebody goes on. */
    const wait = (who: string) =>
      void (tail.heardAgain(TENANT, 100) ?? Promise.resolve()).then(() =>
        over.push(view.hasHeard(nowMs) ? `${who} knows` : who),
      )
    const later = () => {
      nowMs += 2000
    }
    const stop = () => tail[Symbol.asyncDispose]()
    return { log, tail, over, wait, later, stop, [Symbol.asyncDispose]: async () => void stop() }
  }

  test('shares one poll with all others, and goes on when it has been answered', async () => {
    await using stood = await standstill()
    const { promise, resolve } = Promise.withResolvers<void>()
    stood.log.ready = promise
    for (const who of ['a', 'b']) stood.wait(who)
    await settled()
    expect([stood.log.polls, stood.over]).toEqual([1, []])
    resolve()
    await settled()
    expect([stood.log.polls, stood.over]).toEqual([1, ['a knows', 'b knows']])
  })

  test('goes on when the log cannot be read', async () => {
    await using stood = await standstill()
    stood.log.ready = Promise.reject(new Error('the database is down'))
    stood.wait('a')
    await settled()
    expect(stood.over).toEqual(['a'])
  })

  test('waits for so long from the first one on, and whoever comes then does not wait until the log has been heard of', async () => {
    await using stood = await standstill()
    const { promise, resolve } = Promise.withResolvers<void>()
    stood.log.ready = promise
    stood.wait('a')
    vi.advanceTimersByTime(99)
    stood.wait('b')
    await settled()
    expect(stood.over).toEqual([])
    vi.advanceTimersByTime(1)
    await settled()
    expect(stood.over).toEqual(['a', 'b'])
    stood.wait('c')
    await settled()
    expect(stood.over).toEqual(['a', 'b', 'c'])
    expect(stood.tail.heardAgain(TENANT, 100)).toBeUndefined()
    resolve()
    await settled()
    // After the next standstill.
    stood.log.ready = new Promise(() => {})
    stood.later()
    stood.wait('d')
    await settled()
    expect(stood.over).toEqual(['a', 'b', 'c'])
  })

  test('knows what has arrived when its time is over', async () => {
    await using stood = await standstill()
    const { promise, resolve } = Promise.withResolvers<void>()
    stood.log.ready = promise
    stood.wait('a')
    vi.advanceTimersByTime(100)
    resolve()
    await settled()
    expect(stood.over).toEqual(['a knows'])
  })

  test('polls again when its process stood still during the poll, too', async () => {
    await using stood = await standstill()
    const { promise, resolve } = Promise.withResolvers<void>()
    stood.log.ready = promise
    stood.wait('a')
    await settled()
    stood.later()
    resolve()
    await settled()
    expect([stood.log.polls, stood.over]).toEqual([2, ['a knows']])
  })

  test('goes on when the instance is stopped', async () => {
    await using stood = await standstill()
    stood.log.ready = new Promise(() => {})
    stood.wait('a')
    void stood.stop()
    await settled()
    expect(stood.over).toEqual(['a'])
    vi.advanceTimersByTime(1000)
  })
})

describe('a poll', () => {
  async function polling() {
    const log = new Log()
    const tail = await startTail(log, { pollMs: 1e9 })
    const view = await tail.activated(TENANT)
    const { promise, resolve } = Promise.withResolvers<void>()
    log.ready = promise
    const revision = log.commit({ notify: true })
    await settled()
    return { tail, view, revision, answer: resolve, [Symbol.asyncDispose]: () => tail[Symbol.asyncDispose]() }
  }

  test('that is not answered within a second is given up', async () => {
    await using polled = await polling()
    vi.advanceTimersByTime(999)
    await settled()
    expect(polled.tail.failing).toBe(false)
    vi.advanceTimersByTime(1)
    await settled()
    expect(polled.tail.failing).toBe(true)
  })

  test('whose answer has come counts, although this process was too busy to look in time', async () => {
    await using polled = await polling()
    // The time is over, and the answer is what is read next.
    vi.advanceTimersByTime(1000)
    polled.answer()
    await settled()
    expect([polled.view.position, polled.tail.failing]).toEqual([polled.revision, false])
  })
})

test('a lost notification costs half a second at most', async () => {
  const log = new Log()
  await using tail = await startTail(log)
  const view = await tail.activated(TENANT)
  const revision = log.commit({ notify: false })
  await vi.advanceTimersByTimeAsync(POLL_MS)
  expect(view.position).toBe(revision)
})

test('rows of a view that was dropped meanwhile are told to nobody: the next view has them already', async () => {
  const log = new Log()
  const held = Promise.withResolvers<void>()
  let holds = false
  const exclusive: TailOptions['exclusive'] = async (tenant, section) => {
    if (holds && tenant === TENANT) await held.promise
    return section()
  }
  await using tail = await startTail(log, { exclusive, idleMs: 5 * POLL_MS })
  const told: Revision[] = []
  tail.follow({
    applied: (_, { revision }) => told.push(revision),
    jumped: (_, through) => told.push(through),
    needs: () => false,
  })
  const first = await tail.activated(TENANT)
  holds = true
  log.commit({ notify: true })
  // Nobody uses the view while its row waits for its turn.
  await vi.advanceTimersByTimeAsync(8 * POLL_MS)
  const second = await tail.activated(TENANT)
  expect(second).not.toBe(first)
  expect(second.position).toBe(1)
  held.resolve()
  await vi.advanceTimersByTimeAsync(0)
  expect(told).toEqual([])
})
