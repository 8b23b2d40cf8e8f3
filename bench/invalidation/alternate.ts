/**
 * Writes at one instance and reads at another in turn, once with `min_revision` and once without it: how many reads were
 * older than the write before them. With `min_revision` none may be; without it, those of the first milliseconds are.
 *
 *     node bench/invalidation/alternate.ts [--count 10000] [--json FILE]
 */
import { options, progress, report, round, startBed } from '../bed.ts'
import { percentile } from '../report.ts'

const { count = 10_000 } = options()
const tenant = 'alternate'

await using bed = await startBed()
const [a, b] = [await bed.instance(), await bed.instance()]

const rows = []
for (const carried of [true, false]) {
  let older = 0
  const tookMs: number[] = []
  for (let n = 0; n < count; n++) {
    if (n % 1000 === 0) progress(`${carried ? 'with' : 'without'} min_revision: ${n} of ${count}`)
    const id = `k${n % 100}`
    const title = `${carried} ${n}`
    const written = await a.call('updateItem', { item: { id, title }, allowMissing: true }, tenant)
    const startedMs = performance.now()
    const read = (await b.call(
      'getItem',
      { id, options: carried ? { minRevision: written.revision } : {} },
      tenant,
    )) as unknown as { result: { value: { title: string } } }
    tookMs.push(performance.now() - startedMs)
    if (read.result.value.title !== title) older++
  }
  rows.push({
    min_revision: carried ? 'yes' : 'no',
    reads: count,
    older,
    'p50 ms': round(percentile(tookMs, 0.5)),
    'p99 ms': round(percentile(tookMs, 0.99)),
  })
}
report('alternate', bed, rows)
if (rows.some(({ min_revision, older }) => min_revision === 'yes' && older > 0)) process.exitCode = 1
