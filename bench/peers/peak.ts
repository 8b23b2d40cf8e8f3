/** A cold start until it is hot, and twice the usual peak with the caches off, then on. Calls come at a fixed rate. */
import { join } from 'node:path'
import { LOAD_CORE, SERVER_CORE, start } from '../control.ts'
import { figure, type Measured, percentile } from '../report.ts'
import type { Run } from '../rows.ts'
import { LASTING, startHot } from '../rpc/hot.ts'
import type { Arrivals, Latencies } from '../rpc/open-loop.ts'

const USUAL_PER_S = 600

export async function run({ full, progress }: Run): Promise<readonly Measured[]> {
  const items = full ? 1_000_000 : 20_000
  const seconds = full ? 60 : 12
  progress(`writing ${items} items`)
  await using hot = await startHot(items)
  const off = await hot.bed.instance(
    { ...LASTING, ITEMCACHE_MEMORY: 'off', REDIS_URL: 'off' },
    { core: SERVER_CORE },
  )
  await using load = start(join(import.meta.dirname, '..', 'rpc', 'open-loop.ts'), { core: LOAD_CORE })
  const during = (address: string, perS: number) =>
    load.ask<Latencies>('run', {
      ...{ address, perS, seconds, connections: 8, items, zipf: 0.99 },
    } satisfies Arrivals)
  const p99 = (ms: Iterable<number>) => percentile([...ms], 0.99)
  const sqlReads = async () => Number((await hot.instance.metrics()).loads)

  const before = await sqlReads()
  const cold = await during(hot.instance.address, USUAL_PER_S)
  const steps = 6
  const step = Math.floor(cold.calls / steps)
  const series = Array.from({ length: steps }, (_, n) => p99(cold.ms.subarray(n * step, (n + 1) * step)))
  const loads = (await sqlReads()) - before
  progress(`cold start: p99 ${series.map(figure).join(', ')} ms, ${loads} SQL reads for ${cold.calls} calls`)

  const without = await during(off.address, 2 * USUAL_PER_S)
  progress(`double the peak, caches off: p99 ${p99(without.ms).toFixed(1)} ms, ${without.failed} failed`)
  const hotBefore = await sqlReads()
  const withCaches = await during(hot.instance.address, 2 * USUAL_PER_S)
  const hotLoads = (await sqlReads()) - hotBefore
  progress(`the same, caches on: p99 ${p99(withCaches.ms).toFixed(1)} ms, ${withCaches.failed} failed`)
  return [
    {
      row: 'cold',
      ours: series.at(-1) ?? Number.NaN,
      peer: series[0] ?? Number.NaN,
      note: `${USUAL_PER_S} calls/s, Zipf 0.99, ${items.toLocaleString('en')} ids; sixths of ${seconds} s: ${series.map(figure).join(', ')} ms; ${loads} loads for ${cold.calls} calls, ${cold.failed} failed`,
    },
    {
      row: 'peak',
      ours: p99(withCaches.ms),
      peer: p99(without.ms),
      note: `${2 * USUAL_PER_S} calls/s; failed ${withCaches.failed} with, ${without.failed} without; ${hotLoads} loads for ${withCaches.calls} calls`,
    },
  ]
}
