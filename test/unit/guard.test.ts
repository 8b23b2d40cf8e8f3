import { once } from 'node:events'
import { type AddressInfo, connect, createServer, type Socket } from 'node:net'
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest'
import { ItemCacheError } from '../../src/errors.ts'
import {
  type BreakerState,
  Guard,
  type GuardableRedis,
  GuardedOrigin,
  GuardedRedis,
  GuardedStore,
} from '../../src/tiers/guard.ts'
import type {
  CacheAnswer,
  CacheTier,
  Copy,
  LoadLocks,
  LockClaim,
  OriginTier,
  StoreTier,
} from '../../src/tiers/tier.ts'

const down = () => new ItemCacheError('unavailable', 'down', { reason: 'POSTGRES_TIMEOUT' })
const left = () => new ItemCacheError('cancelled', 'the caller left')
const fails = (error: Error) => () => Promise.reject(error)
const succeeds = async () => 'good'

beforeEach(() => {
  vi.useFakeTimers({ now: 1_000_000 })
})
afterEach(() => {
  vi.useRealTimers()
})

function guardOf({ probe, maxCalls = 100 }: { probe?: () => Promise<unknown>; maxCalls?: number } = {}) {
  const states: BreakerState[] = []
  const guard = new Guard(
    { maxCalls, onStateChange: (state) => states.push(state) },
    (error) => error instanceof ItemCacheError && error.code === 'unavailable',
    probe,
  )
  /** So many calls, a share of which fail. */
  const calls = async (good: number, bad: number, error: Error = down()) => {
    for (let i = 0; i < good; i++) await guard.run(succeeds)
    for (let i = 0; i < bad; i++) await guard.run(fails(error)).catch(() => {})
  }
  const open = async () => {
    await calls(0, 50)
    expect(guard.state).toBe('OPEN')
  }
  return { guard, states, calls, open }
}

const refused = (why: string) => expect.objectContaining({ why })

describe('a circuit breaker', () => {
  test('opens when more than 2 % of enough calls have failed, and not before', async () => {
    const { guard, calls } = guardOf()
    await calls(98, 2)
    expect(guard.state).toBe('CLOSED')
    await calls(0, 1)
    expect(guard.state).toBe('OPEN')
    const called = vi.fn(succeeds)
    await expect(guard.run(called)).rejects.toEqual(refused('open'))
    expect(called).not.toHaveBeenCalled()
  })

  test('stays closed while there are few calls, and forgets what is old', async () => {
    const { guard, calls } = guardOf()
    await calls(0, 49)
    expect(guard.state).toBe('CLOSED')
    for (let s = 0; s < 12; s++) {
      vi.advanceTimersByTime(1000)
      await calls(1, 0)
    }
    await calls(0, 30)
    expect(guard.state).toBe('CLOSED')
  })

  test('does not count what is not the fault of the tier', async () => {
    const { guard, calls } = guardOf()
    await calls(0, 200, new ItemCacheError('conflict', 'somebody was faster'))
    await calls(0, 200, left())
    expect(guard.state).toBe('CLOSED')
  })

  test('lets one call through after a second, and closes when that succeeds', async () => {
    const { guard, states, open } = guardOf()
    await open()
    vi.advanceTimersByTime(1000)
    const answer = Promise.withResolvers<string>()
    const probing = guard.run(() => answer.promise)
    expect(guard.state).toBe('HALF_OPEN')
    // Nobody waits for a probe that may hang.
    await expect(guard.run(succeeds)).rejects.toEqual(refused('open'))
    answer.resolve('good')
    expect(await probing).toBe('good')
    expect(await guard.run(succeeds)).toBe('good')
    expect(states).toEqual(['OPEN', 'HALF_OPEN', 'CLOSED'])
  })

  test('opens again when the probe fails or is given up, and then tries again', async () => {
    const { guard, open } = guardOf()
    await open()
    for (const error of [down(), left()]) {
      vi.advanceTimersByTime(1000)
      await expect(guard.run(fails(error))).rejects.toBe(error)
      expect(guard.state).toBe('OPEN')
    }
    vi.advanceTimersByTime(1000)
    expect(await guard.run(succeeds)).toBe('good')
    expect(guard.state).toBe('CLOSED')
  })

  test('closes by itself when the tier is back, although nobody calls', async () => {
    let isBack = false
    const probe = vi.fn(async () => {
      if (!isBack) throw down()
    })
    const { guard, open } = guardOf({ probe })
    await open()
    await vi.advanceTimersByTimeAsync(5000)
    expect(guard.state).toBe('OPEN')
    expect(probe.mock.calls.length).toBeGreaterThanOrEqual(4)
    isBack = true
    await vi.advanceTimersByTimeAsync(2000)
    expect(guard.state).toBe('CLOSED')
    const calls = probe.mock.calls.length
    await vi.advanceTimersByTimeAsync(5000)
    expect(probe).toHaveBeenCalledTimes(calls)
  })

  test('of a tier that is probed is closed by nobody else: no caller hangs in its stead', async () => {
    const probe = vi.fn(fails(down()))
    const { guard, open } = guardOf({ probe })
    await open()
    const called = vi.fn(succeeds)
    for (let ms = 0; ms < 5000; ms += 500) {
      await vi.advanceTimersByTimeAsync(500)
      await expect(guard.run(called)).rejects.toEqual(refused('open'))
    }
    expect(called).not.toHaveBeenCalled()
    probe.mockImplementation(succeeds as never)
    await vi.advanceTimersByTimeAsync(2000)
    expect(await guard.run(called)).toBe('good')
  })

  test('is not stuck when a probe hangs for a while', async () => {
    const hanging = Promise.withResolvers<never>()
    const probe = vi.fn<() => Promise<unknown>>(succeeds).mockReturnValueOnce(hanging.promise)
    const { guard, open } = guardOf({ probe })
    await open()
    await vi.advanceTimersByTimeAsync(10_000)
    expect(guard.state).toBe('HALF_OPEN')
    hanging.reject(down())
    await vi.advanceTimersByTimeAsync(0)
    expect(guard.state).toBe('OPEN')
    await vi.advanceTimersByTimeAsync(2000)
    expect(guard.state).toBe('CLOSED')
  })
})

describe('a bulkhead', () => {
  test('sheds the call that is too many, and takes calls again when others are over', async () => {
    const { guard } = guardOf({ maxCalls: 2 })
    const answer = Promise.withResolvers<string>()
    const under = [guard.run(() => answer.promise), guard.run(() => answer.promise)]
    await expect(guard.run(succeeds)).rejects.toEqual(refused('full'))
    answer.resolve('good')
    expect(await Promise.all(under)).toEqual(['good', 'good'])
    expect(await guard.run(succeeds)).toBe('good')
  })

  test('of writers keeps no reader out', async () => {
    const { guard } = guardOf({ maxCalls: 1 })
    const never = new Promise<string>(() => {})
    void guard.run(() => never, undefined, 'write')
    await expect(guard.run(succeeds, undefined, 'write')).rejects.toEqual(refused('full'))
    expect(await guard.run(succeeds)).toBe('good')
  })
})

describe('Redis behind a guard', () => {
  const tier = (answered: () => Promise<Partial<CacheAnswer>>, minimumCalls = 50) => {
    const read = vi.fn(async (): Promise<CacheAnswer> => ({ copies: new Map(), ...(await answered()) }))
    const unused = async () => undefined as never
    const redis: CacheTier & LoadLocks = {
      name: 'redis',
      read,
      store: unused,
      inspect: unused,
      acquire: unused,
      renew: unused,
      release: unused,
    }
    const guarded = new GuardedRedis(redis, { maxCalls: 10, slowMs: 100, minimumCalls })
    return { guarded, read }
  }
  const after =
    (ms: number, answer: Partial<CacheAnswer> = {}) =>
    () =>
      new Promise<Partial<CacheAnswer>>((resolve) => setTimeout(() => resolve(answer), ms))

  test.each([
    ['answers slowly', {}, 101, 'OPEN'],
    ['answers in time', {}, 99, 'CLOSED'],
    ['does not answer', { skipped: 'timeout' }, 0, 'OPEN'],
    ['cannot be reached', { skipped: 'down' }, 0, 'OPEN'],
  ] as const)(
    'that %s: every answer is used, and the breaker ends up as it should',
    async (_, answer, tookMs, state) => {
      using guarded = tier(after(tookMs, answer)).guarded
      for (let i = 0; i < 5; i++) {
        const answers = Array.from({ length: 10 }, () => guarded.read('t', ['a']))
        await vi.advanceTimersByTimeAsync(tookMs)
        expect(await Promise.all(answers)).toEqual(Array(10).fill({ copies: new Map(), ...answer }))
      }
      expect(guarded.state).toBe(state)
    },
  )

  test('stays alone for as long as it does not answer, and not a second longer', async () => {
    let answer: Partial<CacheAnswer> = { skipped: 'down' }
    const { guarded, read } = tier(async () => answer)
    using _ = guarded
    for (let i = 0; i < 50; i++) await guarded.read('t', ['a'])
    const calls = read.mock.calls.length
    await vi.advanceTimersByTimeAsync(10_000)
    expect(guarded.state).toBe('OPEN')
    // One probe a second.
    expect(read.mock.calls.length - calls).toBeGreaterThanOrEqual(8)
    expect(read.mock.calls.length - calls).toBeLessThanOrEqual(11)
    answer = {}
    await vi.advanceTimersByTimeAsync(1000)
    expect(guarded.state).toBe('CLOSED')
  })

  test('is not slow when it has answered, and this process was too busy to look', async () => {
    vi.useRealTimers()
    const server = createServer()
    server.listen(0, '127.0.0.1')
    await once(server, 'listening')
    const accepted = once(server, 'connection') as Promise<[Socket]>
    const near = connect((server.address() as AddressInfo).port, '127.0.0.1')
    const [far] = await accepted
    try {
      const { guarded } = tier(async () => {
        const answer = once(near, 'data')
        // On loopback it is in the reader's buffer when this returns.
        far.write('x')
        await answer
        return {}
      }, 5)
      using _ = guarded
      for (let i = 0; i < 6; i++) {
        const reading = guarded.read('t', ['a'])
        for (const until = performance.now() + 120; performance.now() < until; );
        await reading
      }
      expect(guarded.state).toBe('CLOSED')
    } finally {
      near.destroy()
      far.destroy()
      server.close()
    }
  })

  test('is not asked while the breaker is open: copies are missing, and nobody waits for a lock', async () => {
    const { guarded, read } = tier(async () => ({ skipped: 'timeout' }))
    using _ = guarded
    for (let i = 0; i < 50; i++) await guarded.read('t', ['a'])
    const calls = read.mock.calls.length
    expect(await guarded.read('t', ['a'])).toEqual({ copies: new Map(), skipped: 'down' })
    expect(await guarded.acquire('t', [{ id: 'a', token: 'x' }])).toEqual(new Map([['a', 'free']]))
    await guarded.store('t', [])
    expect(read).toHaveBeenCalledTimes(calls)
  })
})

describe('a Redis of several servers behind guards', () => {
  /** Ids `a…` are on the server a, and so on. */
  const sharded = () => {
    const servers = new Map<string, 'up' | 'down'>([
      ['a', 'up'],
      ['b', 'up'],
    ])
    const shardOf = (_tenant: string, id: string) => id.charAt(0)
    const read = vi.fn(async (_tenant: string, ids: readonly string[]): Promise<CacheAnswer> => {
      const isDown = ids.some((id) => servers.get(shardOf('', id)) !== 'up')
      return isDown
        ? { copies: new Map(), skipped: 'down' }
        : { copies: new Map(ids.map((id) => [id, copy(id)])) }
    })
    const copy = (id: string) => ({ id }) as Copy
    const acquire = async (_tenant: string, claims: readonly LockClaim[]) =>
      new Map(claims.map(({ id }) => [id, 'ours' as const]))
    const idOn = (shard: string) => (servers.has(shard) ? `${shard}-probe` : undefined)
    const states: string[] = []
    const guarded = new GuardedRedis({ read, acquire, shardOf, idOn } as unknown as GuardableRedis, {
      maxCalls: 10,
      slowMs: 100,
      onStateChange: (state, shard) => states.push(`${shard} ${state}`),
    })
    return { guarded, read, servers, states }
  }

  test('asks the others when one is lost, and says which one it leaves alone', async () => {
    const { guarded, read, servers, states } = sharded()
    using _ = guarded
    servers.set('b', 'down')
    for (let i = 0; i < 50; i++) await guarded.read('t', ['b1'])
    expect([guarded.state, states]).toEqual(['OPEN', ['b OPEN']])
    read.mockClear()
    const answer = await guarded.read('t', ['a1', 'b1', 'a2'])
    expect([...answer.copies.keys()]).toEqual(['a1', 'a2'])
    expect(answer.skipped).toBeUndefined()
    expect(read.mock.calls).toEqual([['t', ['a1', 'a2']]])
    expect(await guarded.read('t', ['b1'])).toEqual({ copies: new Map(), skipped: 'down' })
    const claims = ['a1', 'b1'].map((id) => ({ id, token: 'x' }))
    expect([...(await guarded.acquire('t', claims))]).toEqual([
      ['a1', 'ours'],
      ['b1', 'free'],
    ])
    servers.set('b', 'up')
    await vi.advanceTimersByTimeAsync(1_000)
    expect(guarded.state).toBe('CLOSED')
    expect((await guarded.read('t', ['b1'])).copies.size).toBe(1)
  })

  test('forgets one that holds nothing any more, because another has taken over', async () => {
    const { guarded, read, servers } = sharded()
    using _ = guarded
    servers.set('b', 'down')
    for (let i = 0; i < 50; i++) await guarded.read('t', ['b1'])
    servers.delete('b')
    read.mockClear()
    await vi.advanceTimersByTimeAsync(1_000)
    expect(guarded.state).toBe('CLOSED')
    await vi.advanceTimersByTimeAsync(5_000)
    expect(read).not.toHaveBeenCalled()
  })
})

test('PostgreSQL behind an open breaker is unavailable at once, and says when to try again', async () => {
  const read = vi.fn<StoreTier['read']>(fails(down()))
  const ping = async () => {
    throw down()
  }
  using store = new GuardedStore({ name: 'postgres', read, ping } as unknown as StoreTier, { maxCalls: 10 })
  for (let i = 0; i < 50; i++) await store.read('t', ['a']).catch(() => {})
  expect(read).toHaveBeenCalledTimes(50)
  await expect(store.read('t', ['a'])).rejects.toMatchObject({
    code: 'unavailable',
    reason: 'POSTGRES_UNAVAILABLE',
    retryAfterMs: 1000,
  })
  expect(read).toHaveBeenCalledTimes(50)
})

test.each(['POSTGRES_LOCK_TIMEOUT', 'POSTGRES_QUEUE_TIMEOUT'])(
  'writers that are in each other’s way (%s) do not close PostgreSQL for readers',
  async (reason) => {
    const create = fails(new ItemCacheError('unavailable', 'others were faster', { reason }))
    const read = async () => new Map()
    using store = new GuardedStore({ name: 'postgres', create, read } as unknown as StoreTier, {
      maxCalls: 10,
    })
    const write = { tenant: 't', clientId: '', requestId: '', fingerprint: '' }
    for (let i = 0; i < 60; i++) await store.create(write, 'a', {} as never).catch(() => {})
    expect(store.state).toBe('CLOSED')
    expect(await store.read('t', ['a'])).toEqual(new Map())
  },
)

test('PostgreSQL with too many calls sheds the next', async () => {
  const never = new Promise<never>(() => {})
  const tier = { name: 'postgres', read: () => never } as unknown as StoreTier
  using store = new GuardedStore(tier, { maxCalls: 1 })
  void store.read('t', ['a'])
  await expect(store.read('t', ['b'])).rejects.toMatchObject({
    code: 'exhausted',
    reason: 'POSTGRES_BUSY',
    retryAfterMs: 1000,
  })
})

test.each([
  ['ORIGIN_TIMEOUT', 'OPEN'],
  ['ORIGIN_UNREACHABLE', 'OPEN'],
  ['ORIGIN_STATUS', 'OPEN'],
  ['ORIGIN_INVALID', 'CLOSED'],
])('a catalogue that fails with %s leaves its breaker %s', async (reason, state) => {
  const fetch = fails(new ItemCacheError('unavailable', 'no', { reason }))
  using origin = new GuardedOrigin({ name: 'origin', serves: () => true, fetch } as OriginTier, {})
  for (let i = 0; i < 60; i++) await origin.fetch('1').catch(() => {})
  expect(origin.state).toBe(state)
})
