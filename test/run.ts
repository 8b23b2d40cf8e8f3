/**
 * `npm test`: all suites with coverage. Arguments go to vitest (`npm test -- test/unit`). The last line is
 * `N passed, N failed`, and `, N skipped` if any; a line `not run: …` before it says why. A test file that could not run
 * counts as one failure.
 */
import { parseCLI, startVitest, type TestModule, type TestResult } from 'vitest/node'

const { filter, options } = parseCLI(['vitest', 'run', ...process.argv.slice(2)])
const vitest = await startVitest(filter, {
  ...options,
  run: true,
  coverage: { enabled: true, ...options.coverage },
})

const modules = vitest.state.getTestModules()
const count = (state: 'passed' | 'failed' | 'skipped') =>
  modules.reduce((sum, module) => sum + [...module.children.allTests(state)].length, 0)
const broken = (module: TestModule) =>
  module.state() === 'failed' && [...module.children.allTests('failed')].length === 0
// What a machine cannot run says why, each reason once.
const notRun = Map.groupBy(
  modules.flatMap((module) => [...module.children.allTests('skipped')]),
  (test) => `${test.module.relativeModuleId}: ${noteOf(test.result())}`,
)
for (const [what, tests] of notRun) process.stdout.write(`not run: ${tests.length} of ${what}\n`)
const exitCode = Number(process.exitCode ?? 0)
const failed = count('failed') + modules.filter(broken).length
const skipped = count('skipped')
// Whatever else went wrong, an error outside of tests say, must not look like success.
const shown = exitCode === 0 ? failed : Math.max(failed, 1)
const line = `${count('passed')} passed, ${shown} failed${skipped > 0 ? `, ${skipped} skipped` : ''}\n`
process.stdout.write(line, () => process.exit(exitCode))

function noteOf(result: TestResult): string {
  return (result.state === 'skipped' && result.note) || 'no reason was given'
}
