/**
 * `npm run test:clients`: the Go and the Python client. Is the generated code what the proto says, do the linters and type
 * checkers agree, and do the tests pass, which call real servers?
 *
 * With `--quick`, as CI calls it, only the tests, and the generated code where the plugins are on hand; and what must be
 * fetched and built has a minute for each language. With `--prepare` that is fetched and built, with more time, and nothing
 * else is done: so CI begins while other tests run.
 *
 * A language whose toolchain is not on this machine, or whose packages cannot be fetched, is no failure: a line that begins
 * with `not run: ` or `not checked: ` says so. The last line is `N passed, N failed`.
 */
import { mkdtempDisposableSync, readFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { generate, type Language, languages, MINUTES_10, NotHere, ROOT } from './toolchains.ts'

const isQuick = process.argv.includes('--quick')
const limitMs = isQuick ? 60_000 : MINUTES_10
let passed = 0
let failed = 0

const say = (line: string) => process.stdout.write(`${line}\n`)

if (process.argv.includes('--prepare')) {
  for (const language of languages)
    reported(`not prepared: clients/${language.name}`, () => language.prepare(180_000))
  process.exit()
}
for (const language of languages) {
  const name = `clients/${language.name}`
  const began = performance.now()
  try {
    if (!reported(`not run: ${name}`, () => language.prepare(limitMs))) continue
    if (isQuick && !language.hasPlugins()) {
      say(`not checked: the generated code of ${name}: \`npm run generate:clients\` has not been run here`)
    } else if (reported(`not checked: ${name}`, () => language.preparePlugins(limitMs))) {
      checkGenerated(language)
      if (!isQuick) checkSources(language)
    }
    test(language)
  } catch (error) {
    say(`${name}: ${(error as Error).message}`)
    failed += 1
  }
  say(`${name}: done in ${Math.round((performance.now() - began) / 1000)} s`)
}
say(`${passed} passed, ${failed} failed`)
process.exitCode = failed === 0 ? 0 : 1

/** Does something that this machine may not be able to do; says so, and returns false, when it is not. */
function reported(what: string, act: () => void): boolean {
  try {
    act()
    return true
  } catch (error) {
    if (!(error instanceof NotHere)) throw error
    say(`${what}: ${error.message}`)
    return false
  }
}

function checkGenerated(language: Language): void {
  using out = mkdtempDisposableSync(join(tmpdir(), 'itemcache-generated-'))
  generate(language, out.path)
  const differ = language.generated.filter(
    (file) => !readFileSync(join(out.path, file)).equals(readFileSync(join(ROOT, file))),
  )
  if (differ.length === 0) return
  say(`${differ.join(', ')}: not what the proto says: run \`npm run generate:clients\` and commit`)
  failed += 1
}

function checkSources(language: Language): void {
  for (const { status, text } of language.check()) {
    if (status === 0) continue
    say(text)
    failed += 1
  }
}

function test(language: Language): void {
  const result = language.test()
  passed += result.passed ?? 0
  failed += result.passed === undefined ? 1 : result.failed
  if (result.passed === undefined || result.failed > 0) say(result.text)
  say(`clients/${language.name}: ${result.passed ?? 0} tests passed, ${result.failed} failed`)
}
