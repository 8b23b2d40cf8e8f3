/** 200 callers at once with the standard load generator, and then calls at half of the rate that these got. */
import type { Measured } from '../report.ts'
import type { Run } from '../rows.ts'
import { idOf, startHot, warm } from '../rpc/hot.ts'
import { machineStalls } from '../stalls.ts'
import { failures, ghz, percentileOf } from './ghz.ts'

const CALLERS = 200
const CONNECTIONS = 20
const ITEMS = 1000
/** Of calls at the fixed rate, that do not count: ghz opens its connections meanwhile, and stops for a moment. */
const FIRST_S = 2

export async function run({ full, progress }: Run): Promise<readonly Measured[]> {
  const seconds = full ? 60 : 15
  const stalls = await machineStalls()
  await using hot = await startHot(ITEMS)
  await warm(hot.instance, 0, ITEMS)
  const call = [
    ...['--call', 'itemcache.v1.ItemCacheService.GetItem', '-d', JSON.stringify({ id: idOf(7) })],
    ...['--connections', `${CONNECTIONS}`],
  ]
  const crowd = ['-c', `${CALLERS}`, ...call]
  await ghz(hot.instance.address, [...crowd, '-n', '20000'])
  progress(`${CALLERS} callers, ${seconds} s`)
  const full200 = await ghz(hot.instance.address, [...crowd, '-z', `${seconds}s`, '--duration-stop', 'wait'])
  const rate = Math.round(full200.rps / 2)
  progress(`${Math.round(full200.rps)} calls/s; now ${rate} calls/s, open loop`)
  const half = await ghz(hot.instance.address, [
    ...call,
    ...['--async', '-c', `${CALLERS}`, '--rps', `${rate}`],
    ...['-n', `${rate * (FIRST_S + seconds)}`, '--skipFirst', `${rate * FIRST_S}`],
  ])
  const lost = failures(full200) + failures(half)
  return [
    {
      row: 'callers-failed',
      ours: lost,
      note: `${seconds} s, ${full200.count.toLocaleString('en')} calls, p99 ${percentileOf(full200, 99).toFixed(1)} ms at full speed`,
    },
    {
      row: 'callers-p99',
      ours: percentileOf(half, 99),
      note: `${rate.toLocaleString('en')} calls/s, open loop; ${stalls}`,
    },
  ]
}
