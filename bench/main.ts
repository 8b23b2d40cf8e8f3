/**
 * Measures what ItemCache promises of its speed, beside what people would use instead.
 *
 *     npm run bench                    a representative set, within 10 minutes on two cores
 *     npm run bench -- NAME...         these cases alone
 *     npm run bench -- NAME --full     the whole of a case, where the representative run shortens it
 *     npm run bench -- --list          what there is
 *     npm run bench -- --json FILE     results also as JSON (default: bench/results.json)
 *     npm run bench -- --write         and put them into bench/README.md and docs/performance.svg
 *
 * Progress goes to stderr, one table to stdout. A target that is missed is shown and is no failure of the run; a case that
 * cannot be measured is.
 */
import { parseArgs } from 'node:util'
import { judge, type Result, textTable } from './report.ts'
import { CASES } from './rows.ts'
import { has, INSTALL } from './tools.ts'

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    list: { type: 'boolean' },
    full: { type: 'boolean' },
    json: { type: 'string' },
    write: { type: 'boolean' },
  },
})
const progress = (line: string) => void process.stderr.write(`${line}\n`)

if (values.list) list()
else await measure()

function list(): void {
  for (const { name, rows, representative } of CASES) {
    console.log(`${name}${representative ? '' : '   (only when named)'}`)
    for (const { work, peer, target } of rows) {
      console.log(`    ${work}${peer === '' ? '' : `, beside ${peer}`}${target === '' ? '' : `: ${target}`}`)
    }
  }
}

async function measure(): Promise<void> {
  const unknown = positionals.filter((name) => !CASES.some((each) => each.name === name))
  if (unknown.length > 0) {
    progress(`there is no ${unknown.join(', ')}: npm run bench -- --list`)
    process.exitCode = 2
    return
  }
  const chosen = CASES.filter(({ name, representative }) =>
    positionals.length === 0 ? representative : positionals.includes(name),
  )
  const results: Result[] = []
  for (const [n, { name, rows, needs, load }] of chosen.entries()) {
    const missing = needs.filter((tool) => !has(tool))
    if (missing.length > 0) {
      for (const tool of missing) progress(`${name} is left out: it needs ${tool}: ${INSTALL[tool]}`)
      process.exitCode = 1
      continue
    }
    const startedMs = performance.now()
    progress(`${n + 1}/${chosen.length} ${name}`)
    try {
      const { run } = await load()
      const measured = await run({ full: values.full ?? false, progress: (line) => progress(`  ${line}`) })
      for (const row of rows) {
        const own = measured.find((each) => each.row === row.id)
        if (own === undefined) throw new Error(`${name} has no figure for ${row.id}`)
        results.push(judge(row, own))
      }
    } catch (error) {
      progress(`${name} could not be measured: ${error instanceof Error ? error.stack : error}`)
      process.exitCode = 1
    }
    progress(`  ${Math.round((performance.now() - startedMs) / 1000)} s`)
  }
  console.log(textTable(results))
}
