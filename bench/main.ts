/**
 * Measures what ItemCache promises of its speed, beside what people would use instead.
 *
 *     npm run bench                    a representative set, within 10 minutes on two cores
 *     npm run bench -- NAME...         these cases alone
 *     npm run bench -- NAME --full     the whole of a case, where the representative run shortens it
 *     npm run bench -- --list          what there is
 *     npm run bench -- --json FILE     where the results go as JSON (default: .itemcache/bench.json)
 *     npm run bench -- --write         and put them into bench/README.md, bench/results.json and docs/performance.svg
 *
 * Progress goes to stderr, one table to stdout. A target that is missed is shown and is no failure of the run; a case that
 * cannot be measured is.
 */
import { spawnSync } from 'node:child_process'
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { cpus, totalmem } from 'node:os'
import { dirname, join } from 'node:path'
import { parseArgs } from 'node:util'
import { picture } from './picture.ts'
import { judge, markdownTable, type Result, textTable } from './report.ts'
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
const ROOT = join(import.meta.dirname, '..')
const BEGIN = '<!-- results: written by npm run bench -- --write -->'
const END = '<!-- end of results -->'
const PEERS = [
  '@grpc/grpc-js',
  'pg',
  'ioredis',
  'lru-cache',
  'mnemonist',
  'quick-lru',
  'tiny-lru',
  'bentocache',
  'cacheable',
]
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
  const command = [
    'npm run bench',
    ...(process.argv.length > 2 ? ['--', ...process.argv.slice(2)] : []),
  ].join(' ')
  const outcome: Outcome = { at: new Date().toISOString(), command, machine: machine(), results }
  const file = values.json ?? join(ROOT, '.itemcache', 'bench.json')
  mkdirSync(dirname(file), { recursive: true })
  writeFileSync(file, `${JSON.stringify(outcome, undefined, 2)}\n`)
  if (values.write) write(outcome)
}

interface Outcome {
  readonly at: string
  readonly command: string
  readonly machine: string
  readonly results: readonly Result[]
}

/** What the figures were measured on and with. */
function machine(): string {
  const { model = '?' } = cpus()[0] ?? {}
  const { dependencies, devDependencies } = JSON.parse(readFileSync(join(ROOT, 'package-lock.json'), 'utf8'))
    .packages['']
  const version = (name: string) =>
    JSON.parse(readFileSync(join(ROOT, 'node_modules', name, 'package.json'), 'utf8')).version
  const peers = PEERS.filter((name) => name in { ...dependencies, ...devDependencies })
  const { stdout: commit } = spawnSync('git', ['-C', ROOT, 'rev-parse', '--short', 'HEAD'], {
    encoding: 'utf8',
  })
  return [
    `${cpus().length} cores of ${model}, ${Math.round(totalmem() / 2 ** 30)} GiB`,
    `Node ${process.versions.node}`,
    ...peers.map((name) => `${name} ${version(name)}`),
    `commit ${commit?.trim() || 'unknown'}`,
  ].join(', ')
}

/** Puts results into the repository: a row that was measured now takes the place of the one that was there. */
function write(outcome: Outcome): void {
  const jsonFile = join(ROOT, 'bench', 'results.json')
  const rows = new Map<string, Result>()
  for (const result of readResults(jsonFile)) rows.set(result.row, result)
  for (const result of outcome.results) rows.set(result.row, result)
  const results = CASES.flatMap((each) => each.rows).flatMap(({ id }) => rows.get(id) ?? [])
  writeFileSync(jsonFile, `${JSON.stringify({ ...outcome, results }, undefined, 2)}\n`)
  writeFileSync(join(ROOT, 'docs', 'performance.svg'), picture(results))
  const page = join(ROOT, 'bench', 'README.md')
  const text = readFileSync(page, 'utf8')
  const from = text.indexOf(BEGIN)
  const to = text.indexOf(END)
  if (from === -1 || to < from) throw new Error(`${page} has no place for the table: ${BEGIN}`)
  const table = `${BEGIN}\n\n${markdownTable(results)}\n\n\`${outcome.command}\` on ${outcome.at.slice(0, 10)}: ${outcome.machine}.\n\n`
  writeFileSync(page, text.slice(0, from) + table + text.slice(to))
}

function readResults(file: string): readonly Result[] {
  try {
    return JSON.parse(readFileSync(file, 'utf8')).results
  } catch {
    return []
  }
}
