/** Whether a full memory makes reads wait for the garbage collector: the longest waits with a million entries and with few. */
import { join } from 'node:path'
import { LOAD_CORE, SERVER_CORE, start } from '../control.ts'
import { type Measured, median, percentile } from '../report.ts'
import type { Run } from '../rows.ts'
import { machineStalls } from '../stalls.ts'
import { LASTING, startHot, warm } from './hot.ts'
import type { Arrivals, Latencies } from './open-loop.ts'

const FEW = 10_000
const PER_S = 2000

export async function run({ full, progress }: Run): Promise<readonly Measured[]> {
  const many = full ? 1_000_000 : 50_000
  const seconds = full ? 30 : 8
  const rounds = full ? 7 : 2
  const stalls = await machineStalls()
  progress(`writing ${many} items`)
  await using hot = await startHot(many)
  const { instance: large } = hot
  const small = await hot.bed.instance(LASTING, { core: SERVER_CORE })
  progress(`reading ${many} items into memory`)
  await warm(large, 0, many)
  await warm(small, 0, FEW)
  // What the generator's own collections take would count as waits for the server.
  const options = { core: LOAD_CORE, execArgv: ['--max-semi-space-size=2'] }
  await using load = start(join(import.meta.dirname, 'open-loop.ts'), options)
  const tail = async (address: string, items: number) => {
    const arrivals: Arrivals = { address, perS: PER_S, seconds, connections: 8, items }
    const { ms, failed } = await load.ask<Latencies>('run', arrivals)
    if (failed > 0) throw new Error(`${failed} calls failed`)
    return percentile([...ms], 0.999)
  }
  const pairs: { readonly ours: number; readonly peer: number }[] = []
  for (let round = 0; round <= rounds; round++) {
    const pair = { peer: await tail(small.address, FEW), ours: await tail(large.address, many) }
    progress(`round ${round}: p99.9 ${pair.ours.toFixed(2)} ms, with few ${pair.peer.toFixed(2)} ms`)
    if (round > 0) pairs.push(pair)
  }
  return [
    {
      row: 'gc',
      ours: median(pairs.map(({ ours }) => ours)),
      peer: median(pairs.map(({ peer }) => peer)),
      ratio: median(pairs.map(({ ours, peer }) => ours / peer)),
      note: `${many.toLocaleString('en')} entries, ${PER_S.toLocaleString('en')} reads/s, open loop; ${stalls}`,
    },
  ]
}
