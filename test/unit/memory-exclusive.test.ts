/** Sections that span an await, under every order of events that fast-check can think of. */
import { Mutex } from 'async-mutex'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { MemoryTier } from '../../src/tiers/memory.ts'
import type { Copy } from '../../src/tiers/tier.ts'

const OPTIONS = { maxEntries: 2, maxBytes: 2 ** 20, maxStaleMs: 1_000, now: () => 0 }

function copyOf(id: string, asOf: number): Copy {
  return {
    id,
    asOf,
    bytes: new Uint8Array([asOf]),
    revision: asOf,
    tags: [],
    verifiedAtMs: 0,
    freshUntilMs: 100,
  }
}

type Operation =
  /** Checks that the copy is there, waits, and evicts what it saw. */
  | { readonly kind: 'evict'; readonly tenant: string; readonly id: string }
  /** The port's `store`. */
  | { readonly kind: 'store'; readonly tenant: string; readonly id: string; readonly asOf: number }
  /** A section that fails after a wait. */
  | { readonly kind: 'fail'; readonly tenant: string }

const tenants = fc.constantFrom('t', 'u')
const ids = fc.constantFrom('a', 'b')
const operations = fc.array(
  fc.oneof(
    { weight: 3, arbitrary: fc.record({ kind: fc.constant('evict' as const), tenant: tenants, id: ids }) },
    {
      weight: 2,
      arbitrary: fc.record({
        kind: fc.constant('store' as const),
        tenant: tenants,
        id: ids,
        asOf: fc.integer({ min: 1, max: 9 }),
      }),
    },
    { weight: 1, arbitrary: fc.record({ kind: fc.constant('fail' as const), tenant: tenants }) },
  ),
  { minLength: 2, maxLength: 10 },
)

/** Runs the operations, each begun when the scheduler says so, and checks what exclusion promises. */
async function explore(tier: MemoryTier, scheduler: fc.Scheduler, todo: readonly Operation[]): Promise<void> {
  const running = new Map<string, number>()
  const begun: { readonly tenant: string; readonly number: number }[] = []
  const entered: { readonly tenant: string; readonly number: number }[] = []
  let failures = 0

  async function section<T>(tenant: string, number: number, work: () => Promise<T>): Promise<T> {
    begun.push({ tenant, number })
    return tier.exclusive(tenant, async () => {
      entered.push({ tenant, number })
      running.set(tenant, (running.get(tenant) ?? 0) + 1)
      expect(running.get(tenant), 'sections of a tenant at once').toBe(1)
      try {
        return await work()
      } finally {
        running.set(tenant, (running.get(tenant) ?? 0) - 1)
      }
    })
  }

  async function perform(operation: Operation, number: number): Promise<void> {
    await scheduler.schedule(Promise.resolve(), `begin ${number}: ${JSON.stringify(operation)}`)
    const { tenant } = operation
    if (operation.kind === 'store') {
      await tier.store(tenant, [copyOf(operation.id, operation.asOf)])
    } else if (operation.kind === 'fail') {
      const failed = section(tenant, number, async () => {
        await scheduler.schedule(Promise.resolve(), `fail ${number}`)
        throw new Error(`section ${number}`)
      })
      await expect(failed).rejects.toThrow(`section ${number}`)
      failures += 1
    } else {
      await section(tenant, number, async () => {
        const seen = tier.peek(tenant, operation.id)
        await scheduler.schedule(Promise.resolve(), `evict ${number}`)
        expect(tier.peek(tenant, operation.id), 'what was seen before the wait').toEqual(seen)
        expect(tier.delete(tenant, operation.id), 'evicted exactly what was seen').toBe(seen !== undefined)
      })
    }
  }

  for (const tenant of ['t', 'u']) tier.set(tenant, copyOf('a', 1))
  // All of them end, whatever fails, so that nothing of this run is left in the scheduler.
  const outcomes = await scheduler.waitFor(Promise.allSettled(todo.map(perform)))
  const failed = outcomes.find(({ status }) => status === 'rejected')
  if (failed?.status === 'rejected') throw failed.reason

  for (const tenant of ['t', 'u']) {
    const own = (list: typeof begun) =>
      list.filter((entry) => entry.tenant === tenant).map(({ number }) => number)
    expect(own(entered), 'sections run in the order of the calls').toEqual(own(begun))
  }
  expect(failures).toBe(todo.filter(({ kind }) => kind === 'fail').length)
  const stats = tier.stats()
  expect(stats.tenantsInUse).toBe(0)
  const { insertions, evictions, expirations, deletions, entries } = stats
  expect(insertions).toBe(entries + evictions.entries + evictions.bytes + expirations + deletions)
}

function exploreAll(makeTier: () => MemoryTier, numRuns: number) {
  return fc.check(
    fc.asyncProperty(fc.scheduler(), operations, (scheduler, todo) => explore(makeTier(), scheduler, todo)),
    { numRuns },
  )
}

const EXCLUSION_BROKEN = {
  message: expect.stringMatching(/sections of a tenant at once|what was seen before/),
}

/** Room for all copies: what disappears was evicted by a section. */
const roomy = { ...OPTIONS, maxEntries: 100 }

describe('in every schedule of evictors, stores and failing sections', () => {
  test('no copy is evicted twice, and no section acts on what another has changed', {
    timeout: 60_000,
  }, async () => {
    const run = await exploreAll(() => new MemoryTier(roomy), 2_000)
    expect(run.failed, fc.defaultReportMessage(run) ?? '').toBe(false)
  })

  test('a lock that is forgotten while others wait for it would be found', { timeout: 60_000 }, async () => {
    class Forgetful extends MemoryTier {
      readonly #mutexes = new Map<string, Mutex>()

      override async exclusive<T>(tenant: string, section: () => Promise<T> | T): Promise<T> {
        const mutex = this.#mutexes.get(tenant) ?? new Mutex()
        this.#mutexes.set(tenant, mutex)
        try {
          return await mutex.runExclusive(section)
        } finally {
          this.#mutexes.delete(tenant)
        }
      }
    }
    expect((await exploreAll(() => new Forgetful(roomy), 2_000)).errorInstance).toMatchObject(
      EXCLUSION_BROKEN,
    )
  })

  test('no lock at all would be found', { timeout: 60_000 }, async () => {
    class Unguarded extends MemoryTier {
      override async exclusive<T>(_tenant: string, section: () => Promise<T> | T): Promise<T> {
        return section()
      }
    }
    expect((await exploreAll(() => new Unguarded(roomy), 2_000)).errorInstance).toMatchObject(
      EXCLUSION_BROKEN,
    )
  })

  test('a copy that a bound evicts or a reader deletes in the middle of a section is merely gone', async () => {
    await fc.assert(
      fc.asyncProperty(fc.scheduler(), async (scheduler) => {
        const tier = new MemoryTier(OPTIONS)
        tier.set('t', copyOf('a', 1))
        let evicted = 0
        const evictor = (name: string) =>
          tier.exclusive('t', async () => {
            await scheduler.schedule(Promise.resolve(), name)
            if (tier.delete('t', 'a')) evicted += 1
          })
        const others = async () => {
          for (const id of ['b', 'c', 'd']) {
            await scheduler.schedule(Promise.resolve(), `store ${id}`)
            tier.set('u', copyOf(id, 1))
          }
          tier.delete('t', 'a')
        }
        await scheduler.waitFor(Promise.all([evictor('first'), evictor('second'), others()]))
        expect(tier.peek('t', 'a')).toBeUndefined()
        expect(evicted).toBeLessThanOrEqual(1)
        const { entries, evictions, deletions } = tier.stats()
        expect([entries, evictions.entries + deletions]).toEqual([2, 2])
      }),
      { numRuns: 500 },
    )
  })
})

describe('an exclusive section', () => {
  test('waits for its own tenant only', async () => {
    const tier = new MemoryTier(OPTIONS)
    const gate = Promise.withResolvers<void>()
    const held = tier.exclusive('t', () => gate.promise)
    const order: string[] = []
    const waiting = tier.exclusive('t', () => order.push('t'))
    await tier.exclusive('u', () => order.push('u'))
    expect(order).toEqual(['u'])
    expect(tier.stats().tenantsInUse).toBe(1)
    gate.resolve()
    await Promise.all([held, waiting])
    expect(order).toEqual(['u', 't'])
    expect(tier.stats().tenantsInUse).toBe(0)
  })

  test('does not hold up a hit', async () => {
    const tier = new MemoryTier(OPTIONS)
    tier.set('t', copyOf('a', 1))
    const gate = Promise.withResolvers<void>()
    const held = tier.exclusive('t', () => gate.promise)
    expect(tier.get('t', 'a')?.asOf).toBe(1)
    expect((await tier.read('t', ['a'])).copies.size).toBe(1)
    gate.resolve()
    await held
  })

  test('holds up a store of its tenant', async () => {
    const tier = new MemoryTier(OPTIONS)
    const gate = Promise.withResolvers<void>()
    const held = tier.exclusive('t', () => gate.promise)
    const stored = tier.store('t', [copyOf('a', 1)])
    await tier.store('u', [copyOf('a', 1)])
    expect(tier.peek('t', 'a')).toBeUndefined()
    gate.resolve()
    await Promise.all([held, stored])
    expect(tier.peek('t', 'a')?.asOf).toBe(1)
  })

  test('answers what it returns, throws what it throws, and lets the next one run', async () => {
    const tier = new MemoryTier(OPTIONS)
    await expect(tier.exclusive('t', () => 7)).resolves.toBe(7)
    await expect(tier.exclusive('t', async () => 'later')).resolves.toBe('later')
    const broken = new Error('broken')
    const thrown = tier.exclusive('t', () => {
      throw broken
    })
    const next = tier.exclusive('t', () => 'next')
    await expect(thrown).rejects.toBe(broken)
    await expect(next).resolves.toBe('next')
    expect(tier.stats().tenantsInUse).toBe(0)
  })
})
