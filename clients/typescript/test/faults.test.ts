/**
 * Two servers, one of which is killed again and again, under a writer at full speed, a near cache, a watch, and a
 * pipeline. `FAULT_SECONDS` (default 8) is how long it takes.
 */
import { setImmediate, setTimeout as sleep } from 'node:timers/promises'
import { expect, test } from 'vitest'
import { type Client, connect, ItemCacheError } from '../src/index.ts'
import { startTwoServers } from './two-servers.ts'

const SECONDS = Number(process.env['FAULT_SECONDS'] ?? 8)
const KEYS = Array.from({ length: 20 }, (_, i) => `key-${i}`)

interface Written {
  readonly revision: bigint
  readonly ackedMs: number
}

const now = () => performance.now()

/** The service did not answer; what it says itself has a reason. */
function isUnanswered(error: unknown): boolean {
  if (!(error instanceof ItemCacheError)) return false
  if (error.code === 'UNAVAILABLE' || error.code === 'DEADLINE_EXCEEDED') return true
  return error.reason === undefined && (error.code === 'INTERNAL' || error.code === 'UNKNOWN')
}

test('the near cache, a watch and a pipeline keep their promises while servers die', {
  timeout: SECONDS * 1000 + 120_000,
}, async () => {
  await using two = await startTwoServers()
  const options = { tenant: 'faults', timeoutMs: 10_000 }
  await using writer = connect(two.targets, options)
  await using near = connect(two.targets, { ...options, nearCache: { maxEntries: 100, maxBytes: 1e6 } })
  await using piped = connect(two.targets, { ...options, pipeline: true, connections: 2 })

  const writes = new Map<string, Written[]>(KEYS.map((id) => [id, []]))
  for (const id of KEYS) {
    const { revision } = await writer.create({ id, title: '0' })
    writes.get(id)?.push({ revision, ackedMs: now() })
  }
  const over = new AbortController()
  const counts = {
    writes: 0,
    failedWrites: 0,
    reads: 0,
    failedReads: 0,
    piped: 0,
    pipedFailed: 0,
    events: 0,
    resumed: 0,
    kills: 0,
  }

  const write = async () => {
    while (!over.signal.aborted) {
      const id = KEYS[Math.floor(Math.random() * KEYS.length)] ?? ''
      try {
        const { revision } = await writer.update({ id, title: `${counts.writes}` }, { fields: ['title'] })
        writes.get(id)?.push({ revision, ackedMs: now() })
        counts.writes++
      } catch (error) {
        if (!(error instanceof ItemCacheError)) throw error
        counts.failedWrites++
      }
    }
  }

  /** The newest write of a key that a read that begins now must see. */
  const mustSee = (id: string, client: Client): bigint => {
    const position = client.nearStats()?.position ?? 0n
    const beforeMs = now() - 1500
    const must = (writes.get(id) ?? []).findLast(
      ({ revision, ackedMs }) => revision <= position || ackedMs < beforeMs,
    )
    return must?.revision ?? 0n
  }

  const read = async () => {
    while (!over.signal.aborted) {
      const id = KEYS[Math.floor(Math.random() * KEYS.length)] ?? ''
      const must = mustSee(id, near)
      const answer = await near.get(id).catch((error: unknown) => {
        // With both servers away, or a machine that stalls, there may be no answer; there is never a wrong one.
        if (!isUnanswered(error)) throw error
        counts.failedReads++
      })
      if (answer === undefined) continue
      const { item, near: hit } = answer
      if ((item?.revision ?? 0n) < must) {
        expect.fail(`${id}: revision ${item?.revision} instead of ${must}, ${hit ? 'a hit' : 'a miss'}`)
      }
      // Hits never leave this tick by themselves.
      if (++counts.reads % 10 === 0) await setImmediate()
    }
  }

  const pipe = async () => {
    while (!over.signal.aborted) {
      const ids = Array.from({ length: 50 }, (_, i) => KEYS[i % KEYS.length] ?? '')
      const results = await Promise.allSettled(ids.map((id) => piped.get(id)))
      for (const { status } of results) {
        if (status === 'fulfilled') counts.piped++
        else counts.pipedFailed++
      }
      await sleep(5)
    }
  }

  let last: bigint | undefined
  const watch = async () => {
    for await (const message of writer.watch({ heartbeatMs: 100, signal: over.signal })) {
      if (message.kind === 'started') last = message.position
      if (message.kind === 'gap') expect.fail(`a gap from ${message.after} to ${message.through}`)
      if (message.kind === 'resumed') counts.resumed++
      if (message.kind !== 'event') continue
      if (last !== undefined) expect(message.revision).toBe(last + 1n)
      last = message.revision
      counts.events++
    }
  }

  const kill = async () => {
    while (!over.signal.aborted) {
      await sleep(1500, undefined, { signal: over.signal }).catch(() => {})
      if (over.signal.aborted) return
      const server = two.servers[counts.kills++ % 2]
      await server?.kill()
      await server?.start()
    }
  }

  const stop = (error: unknown) => {
    over.abort()
    throw error
  }
  const watching = watch().catch((error: unknown) => {
    if (!over.signal.aborted) stop(error)
  })
  const work = [...Array.from({ length: 8 }, write), read(), read(), pipe(), kill()].map((one) =>
    one.catch(stop),
  )
  // On a busy machine it takes longer until there is something to tell.
  const startedMs = now()
  const timer = setInterval(() => {
    const elapsedS = (now() - startedMs) / 1000
    const isTold = counts.kills > 1 && counts.events > 0 && (near.nearStats()?.hits ?? 0) > 0
    if ((isTold && elapsedS >= SECONDS) || elapsedS > SECONDS + 60) over.abort()
  }, 100)
  try {
    await Promise.all(work)
    await watching
  } finally {
    clearInterval(timer)
    over.abort()
  }
  const stats = near.nearStats()
  console.log(
    JSON.stringify({ ...counts, hits: stats?.hits, misses: stats?.misses, refused: stats?.refused }),
  )
  expect(counts.kills).toBeGreaterThan(1)
  expect(counts.events).toBeGreaterThan(0)
  expect(counts.failedReads).toBeLessThan(counts.reads / 20)
  expect(counts.pipedFailed).toBeLessThan(counts.piped / 20)
  expect(stats?.hits).toBeGreaterThan(0)
})
