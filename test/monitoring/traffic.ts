/** What callers of a service do all day, a little of everything: so that each metric has something to count. */
import { setTimeout as sleep } from 'node:timers/promises'
import { status } from '@grpc/grpc-js'
import { Freshness } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import type { TestClient } from '../support/service.ts'

/** Those of the bundled catalogue. */
const IDS = Array.from({ length: 20 }, (_, i) => `${i + 1}`)
const PAUSE_MS = 5

export interface Traffic {
  readonly calls: number
  /** How often calls failed with each status, NOT_FOUND left out, which is asked for. */
  readonly failures: Readonly<Record<string, number>>
}

/** Calls until the signal aborts: nine reads of ten are of items that the caches may have. */
export async function callUntil(client: TestClient, signal: AbortSignal): Promise<Traffic> {
  let calls = 0
  const failures: Record<string, number> = {}
  const make = async (call: Promise<unknown>) => {
    calls++
    try {
      await call
    } catch (error) {
      const { code } = error as { code: number }
      if (code === status.NOT_FOUND) return
      const name = status[code] ?? `${error}`
      failures[name] = (failures[name] ?? 0) + 1
    }
  }
  const watching = watch(client, signal)
  for (let round = 0; !signal.aborted; round++) {
    const id = IDS[round % IDS.length] ?? '1'
    for (const each of IDS) {
      await make(client.call('getItem', { id: each }))
      await sleep(PAUSE_MS)
    }
    await make(client.call('batchGetItems', { ids: IDS }))
    await make(client.call('listItems', { pageSize: 10 }))
    await make(client.call('getItem', { id: `missing-${round}` }))
    await make(client.call('getItem', { id, options: { freshness: Freshness.FRESH } }))
    await make(
      client.call('updateItem', {
        item: { id: `written-${round % 5}`, title: `${round}` },
        allowMissing: true,
      }),
    )
    // What is expired is served once more, while it is refreshed.
    await make(client.call('invalidateItems', { target: { case: 'ids', value: { ids: [id] } } }))
  }
  await watching
  return { calls, failures }
}

/** A watcher that comes again when its stream ends. */
async function watch(client: TestClient, signal: AbortSignal): Promise<void> {
  while (!signal.aborted) {
    const stream = client.stream('watchInvalidations', {})
    const leave = () => void stream.return(undefined).catch(() => {})
    signal.addEventListener('abort', leave, { once: true })
    try {
      for await (const _ of stream) if (signal.aborted) break
    } catch {
      await sleep(100)
    } finally {
      signal.removeEventListener('abort', leave)
    }
  }
}
