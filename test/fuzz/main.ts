/**
 * `npm run fuzz -- --minutes N [--seed S]`: the tests of fuzz.test.ts, all together for N minutes, with a new seed unless
 * one is given. A failure prints the smallest input that shows it, and the seed.
 */
import { parseArgs } from 'node:util'
import { startVitest } from 'vitest/node'

/** As many tests share the time. */
const TESTS = 9

const { values } = parseArgs({
  options: { minutes: { type: 'string', default: '1' }, seed: { type: 'string', default: 'random' } },
})
const minutes = Number(values.minutes)
if (!(minutes > 0)) throw new Error(`--minutes should be a positive number, got ${values.minutes}`)
process.env['FUZZ_MS'] = String(Math.ceil((minutes * 60_000) / TESTS))
process.env['FC_SEED'] = values.seed
await startVitest(['test/fuzz/'], { run: true, hideSkippedTests: true })
