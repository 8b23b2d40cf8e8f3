/** What a hot look-up on a StreamItems stream costs the server, beside a bare unary call. */
import { join } from 'node:path'
import { LOAD_CORE, start } from '../control.ts'
import type { Measured } from '../report.ts'
import type { Run } from '../rows.ts'
import { getItemRequest, startHot, targetOf, warm } from './hot.ts'
import type { Pipeline } from './stream-load.ts'
import { compare, cpuPerCall, startBare } from './unary.ts'

const LOOKUPS = 80_000
const CALLS = 20_000

export async function run({ full, progress }: Run): Promise<readonly Measured[]> {
  await using hot = await startHot(1000)
  await warm(hot.instance, 0, 1000)
  const { instance } = hot
  const { answer } = await targetOf(instance, 'getItem', getItemRequest(7))
  const bare = await startBare(answer)
  await using _bare = bare.process
  await using load = start(join(import.meta.dirname, 'stream-load.ts'), { core: LOAD_CORE })
  const pipeline: Pipeline = {
    address: instance.address,
    streams: 8,
    window: 64,
    lookups: LOOKUPS,
    ids: 1000,
  }
  const compared = await compare(
    full ? 15 : 5,
    async () => {
      const before = await instance.cpuUs()
      await load.ask('run', pipeline)
      return ((await instance.cpuUs()) - before) / LOOKUPS
    },
    () => cpuPerCall(bare.target, { calls: CALLS }),
    progress,
  )
  return [
    {
      row: 'stream',
      ...compared,
      note: '8 streams, 64 under way on each',
    },
  ]
}
