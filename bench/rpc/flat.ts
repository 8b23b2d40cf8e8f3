/** Whether a hot read costs the same however much memory holds and however many connections there are. */
import { join } from 'node:path'
import { LOAD_CORE, SERVER_CORE, start } from '../control.ts'
import type { Measured } from '../report.ts'
import type { Run } from '../rows.ts'
import { getItemRequest, LASTING, startHot, targetOf, warm } from './hot.ts'
import type { Mix } from './mixed-load.ts'
import { compare, cpuPerCall, startBare } from './unary.ts'

const FEW = 1000
const CALLS = 8000
/** To open a connection costs as much as some calls, which should not show. */
const CALLS_OF_CROWD = 16_000

export async function run({ full, progress }: Run): Promise<readonly Measured[]> {
  const many = full ? 1_000_000 : 50_000
  const rounds = full ? 9 : 3
  // Many short rounds say more than few long ones: what else the machine does comes and goes in seconds.
  const [callsOfAny, roundsOfAny] = full ? [CALLS, rounds] : [4000, 7]
  progress(`writing ${many} items`)
  await using hot = await startHot(many)
  const { instance: large } = hot
  const small = await hot.bed.instance(LASTING, { core: SERVER_CORE })
  progress('reading them into memory')
  await warm(large, 0, many)
  await warm(small, 0, FEW)
  await using load = start(join(import.meta.dirname, 'mixed-load.ts'), { core: LOAD_CORE })
  let runs = 0
  const anyItem = async (of: typeof large, items: number) => {
    const before = await of.cpuUs()
    const mix: Mix = {
      address: of.address,
      calls: callsOfAny,
      items,
      zipf: 0,
      writes: 0,
      connections: 8,
      concurrent: 64,
      // Other items each time: those of the time before are in the processor's caches.
      seed: ++runs,
    }
    const { failed } = await load.ask<{ failed: number }>('run', mix)
    if (failed > 0) throw new Error(`${failed} calls failed`)
    return ((await of.cpuUs()) - before) / callsOfAny
  }
  const entries = await compare(
    roundsOfAny,
    () => anyItem(large, many),
    () => anyItem(small, FEW),
    progress,
  )
  const target = await targetOf(small, 'getItem', getItemRequest(7))
  const crowd = { calls: CALLS_OF_CROWD, connections: 200, concurrent: 1 }
  const alone = { calls: CALLS, connections: 1, concurrent: 200 }
  const connections = await compare(
    rounds,
    () => cpuPerCall(target, crowd),
    () => cpuPerCall(target, alone),
    progress,
  )
  progress('the same, one call at a time on each connection')
  const oneEach = await compare(
    full ? rounds : 2,
    () => cpuPerCall(target, crowd),
    () => cpuPerCall(target, { ...alone, concurrent: 1 }),
    progress,
  )
  const bare = await startBare(target.answer)
  await using _bare = bare.process
  progress('200 calls at a time, of a bare handler')
  const ofBare = await compare(
    full ? rounds : 2,
    () => cpuPerCall(bare.target, crowd),
    () => cpuPerCall(bare.target, alone),
    progress,
  )
  return [
    { row: 'flat-entries', ...entries, note: `${many.toLocaleString('en')} entries` },
    { row: 'flat-connections', ...connections, note: `a bare handler's ratio: ${ofBare.ratio.toFixed(2)}` },
    { row: 'flat-connections-one-each', ...oneEach },
  ]
}
