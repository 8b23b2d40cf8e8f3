/**
 * `npm run consistency:mutants [-- NAME…] [--histories N] [--amplifiers]`: leaves each rule out once, in a copy of the
 * sources, and runs histories until the checker notices. Prints the table for docs/; exits with 1 when one was not caught.
 */
import { cpSync, mkdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { parseArgs } from 'node:util'
import { makeRunDirectory } from '../support/run-directory.ts'
import { check } from './checker.ts'
import { runHistory, startWorld } from './driver.ts'
import { type Edit, MUTANTS } from './mutant-list.ts'
import { planOf } from './plan.ts'

const ROOT = resolve(import.meta.dirname, '../..')

/** A copy of the sources with these edits. Throws when one does not apply exactly once. */
export function patchedCopy(target: string, edits: readonly Edit[], sources = ROOT): string {
  rmSync(target, { recursive: true, force: true })
  mkdirSync(target, { recursive: true })
  cpSync(join(sources, 'src'), join(target, 'src'), { recursive: true })
  cpSync(join(sources, 'package.json'), join(target, 'package.json'))
  symlinkSync(join(ROOT, 'node_modules'), join(target, 'node_modules'))
  for (const { file, find, put } of edits) {
    const path = join(target, file)
    const parts = readFileSync(path, 'utf8').split(find)
    if (parts.length !== 2) throw new Error(`${file} has ${parts.length - 1} times, not once: ${find}`)
    writeFileSync(path, parts.join(put))
  }
  return target
}

if (process.argv[1] === import.meta.filename) {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      histories: { type: 'string', default: '40' },
      seed: { type: 'string', default: '1' },
      amplifiers: { type: 'boolean', default: false },
      sources: { type: 'string', default: ROOT },
    },
  })
  const chosen = MUTANTS.filter(({ name }) => positionals.length === 0 || positionals.includes(name))
  await using directory = makeRunDirectory()
  const copy = join(directory.path, 'copy')
  // All edits are tried before the first history runs.
  for (const { edits, amplifiers = [] } of chosen)
    patchedCopy(copy, [...amplifiers, ...edits], values.sources)
  await using world = await startWorld(
    directory.path,
    join(directory.path, 'cache'),
    join(ROOT, '.itemcache', 'cache'),
  )
  let missed = 0
  console.log('| mutant | what is left out | caught as | histories |\n|---|---|---|---|')
  for (const { name, rule, edits, amplifiers = [], profile } of chosen) {
    const root = patchedCopy(copy, values.amplifiers ? amplifiers : [...amplifiers, ...edits], values.sources)
    let caught: ReadonlySet<string> = new Set()
    let histories = 0
    while (caught.size === 0 && histories < Number(values.histories)) {
      const plan = planOf(Number(values.seed) + histories, profile)
      histories++
      try {
        const { events, file } = await runHistory(world, plan, root)
        const violations = check(events)
        caught = new Set(violations.map(({ property }) => property))
        for (const [property, [first]] of Map.groupBy(violations, (one) => one.property)) {
          console.error(`  ${name}, seed ${plan.seed}: ${property}: ${first?.text}`)
        }
        rmSync(file, { force: true })
      } catch (error) {
        console.error(`${name}: ${(error as Error).message}`)
      }
    }
    if (caught.size === 0) missed++
    const how = caught.size === 0 ? 'not caught' : [...caught].join(', ')
    console.log(`| ${name} | ${rule} | ${how} | ${histories} |`)
  }
  process.exitCode = missed === 0 || values.amplifiers ? 0 : 1
}
