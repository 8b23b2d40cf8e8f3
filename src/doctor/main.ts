/**
 * `npm run doctor`: connects to everything that the environment names, as the service would, and says what is wrong and
 * how to mend it. Changes nothing. Exit codes: 0 no fault, 1 faults, 2 wrong usage.
 */
import { parseArgs } from 'node:util'
import { examine } from './examine.ts'
import { exitCodeOf, formatReport, reportJson } from './report.ts'

const HELP = `Usage: npm run doctor [-- --json] [--instances N] [--strict]

Connects to everything that the environment names (as npm start does), looks at versions, settings, permissions,
migrations, clocks and limits, and says what is wrong and how to mend it. Changes nothing.

  --instances N  how many instances are to share PostgreSQL and Redis (default: 1)
  --strict       warnings are faults, too
  --json         print JSON

Exit codes: 0 no fault, 1 faults, 2 wrong usage.
`

const WRONG_USAGE = 2

interface Flags {
  readonly json: boolean
  readonly strict: boolean
  readonly instances: number
}

function flagsOf(argv: readonly string[]): Flags | 'help' {
  const { values } = parseArgs({
    args: [...argv],
    options: {
      json: { type: 'boolean', default: false },
      strict: { type: 'boolean', default: false },
      instances: { type: 'string', default: '1' },
      help: { type: 'boolean', short: 'h', default: false },
    },
  })
  if (values.help) return 'help'
  if (!/^[1-9]\d{0,5}$/.test(values.instances))
    throw new Error('--instances must be a whole number from 1 on')
  return { json: values.json, strict: values.strict, instances: Number(values.instances) }
}

try {
  const flags = flagsOf(process.argv.slice(2))
  if (flags === 'help') process.stdout.write(HELP)
  else {
    const { findings } = await examine({ instances: flags.instances })
    process.stdout.write(flags.json ? reportJson(findings) : formatReport(findings))
    process.exitCode = exitCodeOf(findings, flags)
  }
  // A driver may still hold a connection open.
  process.exit()
} catch (error) {
  process.stderr.write(`itemcache doctor: ${error instanceof Error ? error.message : error}\n`)
  process.exit(WRONG_USAGE)
}
