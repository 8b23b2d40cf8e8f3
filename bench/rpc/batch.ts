/** What an item of a hot batch of 100 costs the server, beside a whole bare unary call that answers one. */
import type { Measured } from '../report.ts'
import type { Run } from '../rows.ts'
import { batchRequest, getItemRequest, startHot, targetOf, warm } from './hot.ts'
import { compare, cpuPerCall, startBare } from './unary.ts'

const ITEMS = 100
const CALLS = 2000

export async function run({ full, progress }: Run): Promise<readonly Measured[]> {
  await using hot = await startHot(1000)
  await warm(hot.instance, 0, 1000)
  const { answer } = await targetOf(hot.instance, 'getItem', getItemRequest(7))
  const bare = await startBare(answer)
  await using _bare = bare.process
  const target = await targetOf(hot.instance, 'batchGetItems', batchRequest(0, ITEMS))
  const compared = await compare(
    full ? 15 : 7,
    async () => (await cpuPerCall(target, { calls: CALLS })) / ITEMS,
    () => cpuPerCall(bare.target, { calls: 5 * CALLS }),
    progress,
  )
  return [{ row: 'batch', ...compared }]
}
