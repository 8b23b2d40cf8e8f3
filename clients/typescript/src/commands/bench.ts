/** `bench`: a short load of reads. A closed loop: each caller sends its next call when it has its answer. */
import { createHistogram } from 'node:perf_hooks'
import type { Client } from '../client.ts'
import { CancelledError, ItemCacheError, NotFoundError } from '../errors.ts'
import { Ending, EXIT, exitCodeOf, worstExitCode } from '../exit.ts'
import { count, formatDuration, percent, rate, tierName } from '../format.ts'
import type { CacheStatus } from '../gen/itemcache/v1/item_cache_pb.ts'
import { changingLine, type Io } from '../terminal.ts'

export interface BenchFlags {
  readonly duration: number
  readonly concurrency: number
  readonly connections: number
  /** Ids per BatchGetItems; `undefined`: one GetItem per id. */
  readonly batch?: number
  readonly pipeline?: true
  readonly json?: true
}

/** Reads ids by chance for `duration` milliseconds, after each was read once. */
export async function bench(
  client: Client,
  ids: readonly string[],
  flags: BenchFlags,
  io: Io,
): Promise<void> {
  const { duration, concurrency, connections, batch, pipeline = false, json } = flags
  const signal = io.interruption?.()
  const latency = createHistogram()
  const tiers = new Map<string, number>()
  const errors = new Map<string, number>()
  const codes = new Set<number>()
  let calls = 0
  let reads = 0
  const read = (cache: CacheStatus | undefined) => {
    reads++
    const tier = tierName(cache)
    tiers.set(tier, (tiers.get(tier) ?? 0) + 1)
  }
  const failed = (error: ItemCacheError) => {
    const name = error.reason ?? error.code
    errors.set(name, (errors.get(name) ?? 0) + 1)
    codes.add(exitCodeOf(error))
  }
  const anywhere = () => Math.floor(Math.random() * ids.length)
  const idAt = (i: number) => ids[i % ids.length] ?? ''
  const call =
    batch === undefined
      ? async () => {
          try {
            read((await client.get(idAt(anywhere()), { signal })).cache)
          } catch (error) {
            // That an item is absent is an answer.
            if (!(error instanceof NotFoundError)) throw error
            read(error.cache)
          }
        }
      : async () => {
          const from = anywhere()
          const wanted = Array.from({ length: Math.min(batch, ids.length) }, (_, i) => idAt(from + i))
          for (const { error, cache } of (await client.getMany(wanted, { signal })).values()) {
            if (error === undefined || error instanceof NotFoundError) read(cache)
            else failed(error)
          }
        }

  await client.getMany(ids, { signal }).catch((error: unknown) => {
    if (!(error instanceof CancelledError && signal?.aborted)) throw error
  })
  using line = changingLine(io.stderr)
  const began = performance.now()
  const left = () => duration - (performance.now() - began)
  const show = () =>
    line.show(`reading for ${formatDuration(Math.max(0, left()))} more: ${count(calls)} calls`)
  const ticking = setInterval(show, 200)
  try {
    show()
    const work = async () => {
      while (left() > 0 && !signal?.aborted) {
        const sent = performance.now()
        try {
          await call()
        } catch (error) {
          if (!(error instanceof ItemCacheError)) throw error
          if (error instanceof CancelledError && signal?.aborted) return
          failed(error)
        }
        calls++
        latency.record(Math.max(1, Math.round((performance.now() - sent) * 1e6)))
      }
    }
    await Promise.all(Array.from({ length: concurrency }, work))
  } finally {
    clearInterval(ticking)
  }
  const seconds = (performance.now() - began) / 1000
  line[Symbol.dispose]()

  const at = (share: number) => (calls === 0 ? 0 : latency.percentile(share) / 1e6)
  const max = calls === 0 ? 0 : latency.max / 1e6
  if (json) {
    const latencyMs = { p50: at(50), p90: at(90), p99: at(99), p999: at(99.9), max }
    const setting = { concurrency, connections, batch: batch ?? 1, pipeline, ids: ids.length }
    const result = { seconds, calls, callsPerSecond: calls / seconds, reads, readsPerSecond: reads / seconds }
    const counts = { tiers: Object.fromEntries(tiers), errors: Object.fromEntries(errors) }
    io.stdout.write(`${JSON.stringify({ ...result, latencyMs, ...counts, ...setting })}\n`)
  } else {
    const each = batch === undefined ? '' : ` (${rate(reads / seconds)} ids/s in batches of ${batch})`
    const way = `${count(concurrency)} callers, ${count(connections)} ${connections === 1 ? 'connection' : 'connections'}${pipeline ? ', pipelined' : ''}, ${count(ids.length)} ids`
    const times = [
      ...([50, 90, 99, 99.9] as const).map((share) => `p${share} ${formatDuration(at(share))}`),
      `max ${formatDuration(max)}`,
    ]
    const shares = [...tiers]
      .toSorted(([, a], [, b]) => b - a)
      .map(([tier, times]) => `${tier} ${percent(times / reads)}`)
    io.stdout.write(
      [
        `calls    ${count(calls)} in ${formatDuration(seconds * 1000)}: ${rate(calls / seconds)}/s${each}`,
        `with     ${way}`,
        `latency  ${times.join('   ')}`,
        `from     ${shares.join('   ') || 'nowhere'}`,
        `errors   ${[...errors].map(([name, times]) => `${name} ${count(times)}`).join('   ') || 'none'}\n`,
      ].join('\n'),
    )
  }
  if (signal?.aborted) throw new Ending(EXIT.interrupted)
  if (codes.size > 0) throw new Ending(worstExitCode(codes))
}
