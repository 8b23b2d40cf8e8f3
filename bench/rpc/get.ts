/** What a hot GetItem costs the server, beside a bare handler that answers the same bytes. */
import type { Measured } from '../report.ts'
import type { Run } from '../rows.ts'
import { getItemRequest, startHot, targetOf, warm } from './hot.ts'
import { compare, cpuPerCall, startBare } from './unary.ts'

const CALLS = 20_000

export async function run({ full, progress }: Run): Promise<readonly Measured[]> {
  await using hot = await startHot(1000)
  await warm(hot.instance, 0, 1000)
  const target = await targetOf(hot.instance, 'getItem', getItemRequest(7))
  const bare = await startBare(target.answer)
  await using _bare = bare.process
  const compared = await compare(
    full ? 15 : 5,
    () => cpuPerCall(target, { calls: CALLS }),
    () => cpuPerCall(bare.target, { calls: CALLS }),
    progress,
  )
  return [{ row: 'get', ...compared }]
}
