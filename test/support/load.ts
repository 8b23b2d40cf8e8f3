/** Callers of all kinds, for pages and dashboards that should have something to show. */
import { setTimeout as sleep } from 'node:timers/promises'
import { callerAs } from './caller.ts'
import type { TestClient } from './service.ts'
import { seededRandom, zipfTrace } from './zipf.ts'

export interface Load extends AsyncDisposable {
  /** Calls that have ended, by whether they failed; "not found" is an answer. */
  readonly ended: { well: number; badly: number }
}

/** The bundled catalogue has the first twenty. */
const ITEMS = 24
const NOT_FOUND = 5

/**
 * Reads of popular and rare items of two tenants, single and in batches, some of items that nobody has; writes and
 * invalidations now and then. `perSecond` calls are begun a second, at most 100 at once.
 */
export function startLoad(client: TestClient, perSecond = 100): Load {
  const random = seededRandom(7)
  const trace = zipfTrace({ keys: ITEMS, length: 10_000, exponent: 0.9, random })
  const callers = ['shop', 'outlet'].map((tenant) => callerAs({ client }, tenant))
  const ended = { well: 0, badly: 0 }
  const pending = new Set<Promise<void>>()
  let stopped = false
  let next = 0
  const id = () => `${(trace[next++ % trace.length] ?? 0) + 1}`
  const created = (n: number) => `lamp-${n % 40}`

  const one = async () => {
    const { call } = callers[random() < 0.8 ? 0 : 1] ?? callerAs({ client }, 'shop')
    const kind = random()
    if (kind < 0.86) await call('getItem', { id: kind < 0.3 ? created(next++) : id() })
    else if (kind < 0.93) await call('batchGetItems', { ids: [id(), id(), id(), id()] })
    else if (kind < 0.97) {
      const item = { id: created(Math.floor(random() * 40)), title: `Lamp ${next}`, tags: ['lamp'] }
      await call('updateItem', { item, updateMask: { paths: ['title', 'tags'] }, allowMissing: true })
    } else if (kind < 0.99) {
      await call('invalidateItems', { target: { case: 'ids', value: { ids: [id(), created(next)] } } })
    } else if (kind < 0.995) {
      await call('invalidateItems', { target: { case: 'tags', value: { tags: ['lamp'] } } })
    } else await call('listItems', { pageSize: 10 })
  }
  const begin = () => {
    const call = one().then(
      () => {
        ended.well++
      },
      (error: { code?: number }) => {
        if (error.code === NOT_FOUND) ended.well++
        else ended.badly++
      },
    )
    const tracked = call.finally(() => pending.delete(tracked))
    pending.add(tracked)
  }
  const running = (async () => {
    while (!stopped) {
      for (let i = 0; i < perSecond / 20 && pending.size < 100; i++) begin()
      await sleep(50)
    }
  })()
  return {
    ended,
    async [Symbol.asyncDispose]() {
      stopped = true
      await running
      await Promise.allSettled(pending)
    },
  }
}
