/** The toolchains of the Go and the Python client: whether this machine has them, and what they need fetched. */
import { spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { copyFileSync, existsSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

export const ROOT = join(import.meta.dirname, '..')
const CACHE = join(ROOT, '.cache', 'clients')

/** What a command printed, and its exit code; -1 when it could not be started, or was late and so ended. */
export interface Output {
  readonly status: number
  readonly text: string
  readonly isLate: boolean
}

/** Why nothing can be done for a language on this machine. That is not a failure. */
export class NotHere extends Error {}

/** One of the languages. */
export interface Language {
  readonly name: 'go' | 'python'
  /** What `buf generate` writes, below the root. */
  readonly generated: readonly string[]
  /** Where the published service config is copied to, below the root, since a package holds only its own files. */
  readonly serviceConfig: string
  /**
   * Finds the toolchain, fetches what the client and its tests need, and builds them. Throws NotHere when this machine
   * cannot, or not in this time; the next attempt goes on where this one was.
   */
  prepare(limitMs: number): void
  /** Whether `preparePlugins` has been here. */
  hasPlugins(): boolean
  /** Fetches what `generate` and `check` need. After `prepare`. Throws NotHere when this machine cannot. */
  preparePlugins(limitMs: number): void
  /** Lint and types: what they object to. After `preparePlugins`. */
  check(): Output[]
  /** Runs the tests. `passed` is undefined when they did not run to their end. */
  test(): Output & { passed: number | undefined; failed: number }
}

/** Longer than anything here takes. */
export const MINUTES_10 = 600_000

interface Circumstances {
  readonly cwd?: string
  readonly env?: Readonly<Record<string, string>>
  readonly timeoutMs?: number
}

function execute(argv: readonly string[], how: Circumstances = {}): Output {
  const { cwd = ROOT, env = {}, timeoutMs = MINUTES_10 } = how
  const [command = '', ...rest] = argv
  const { status, stdout, stderr, error } = spawnSync(command, rest, {
    cwd,
    env: { ...process.env, ...env },
    encoding: 'utf8',
    maxBuffer: 64 * 1024 * 1024,
    timeout: timeoutMs,
  })
  const text = `${stdout ?? ''}${stderr ?? ''}${error?.message ?? ''}`
  return { status: status ?? -1, text, isLate: (error as NodeJS.ErrnoException)?.code === 'ETIMEDOUT' }
}

/** Tells again and again how much is left of a time. */
function countdown(limitMs: number): () => number {
  const end = performance.now() + limitMs
  // spawnSync takes 0 for no limit.
  return () => Math.max(1, Math.round(end - performance.now()))
}

/**
 * How Go and pip say that the network, or what is behind it, is not there. 404 and a version that is not among those that
 * were found are no such words: they are what a registry answers when it is asked for what has never been.
 */
const UNREACHABLE =
  /dial tcp|no such host|i\/o timeout|connection re(?:set|fused)|TLS handshake|proxyconnect|module lookup disabled|\b(?:403 Forbidden|407|50[0-9] [A-Z])|context deadline exceeded|Failed to establish|Temporary failure|Max retries|Read timed out|ProxyError|SSLError|from versions: none/i

function built(what: string, { status, text, isLate }: Output): void {
  if (isLate) throw new NotHere(`${what} would take too long`)
  if (status !== 0) throw new Error(`${what} failed:\n${text}`)
}

/** The line of what Go or pip printed that says so. */
export function unreachable(text: string): string | undefined {
  return text.split('\n').find((one) => UNREACHABLE.test(one))
}

function fetched(what: string, output: Output): void {
  const { status, text } = output
  if (status === 0) return
  const line = unreachable(text)
  if (line !== undefined) throw new NotHere(`${what} cannot be fetched (${line.trim().slice(0, 200)})`)
  built(`fetching ${what}`, output)
}

const isAtLeast = (found: string, [major, minor]: readonly [number, number]): boolean => {
  const [, a, b] = /(\d+)\.(\d+)/.exec(found) ?? []
  return Number(a) > major || (Number(a) === major && Number(b) >= minor)
}

const count = (text: string, pattern: RegExp) => [...text.matchAll(pattern)].length

const GO_DIR = join(ROOT, 'clients', 'go')
const GO_BIN = join(CACHE, 'go')

/** Runs the Go that is here, and not one that it would fetch, as if it had no settings. */
const inGo = (argv: readonly string[], timeoutMs = MINUTES_10) =>
  execute(['go', ...argv], {
    cwd: GO_DIR,
    // A C compiler is not needed, so it need not be there.
    env: { GOTOOLCHAIN: 'local', GOFLAGS: '', GOWORK: 'off', CGO_ENABLED: '0', GOBIN: GO_BIN },
    timeoutMs,
  })
const GO_TESTS = join(GO_BIN, 'client.test')

export const go: Language = {
  name: 'go',
  generated: [
    'clients/go/itemcachev1/item_cache.pb.go',
    'clients/go/itemcachev1/item_cache_grpc.pb.go',
    'clients/go/service_config.json',
  ],
  serviceConfig: 'clients/go/service_config.json',
  prepare(limitMs) {
    const { status, text } = inGo(['env', 'GOVERSION'])
    if (status !== 0 || !isAtLeast(text, [1, 24])) throw new NotHere('no Go 1.24 or newer in PATH')
    const left = countdown(limitMs)
    fetched('its modules', inGo(['mod', 'download'], left()))
    // Without its symbols it is linked in half the time.
    built('building it', inGo(['test', '-c', '-ldflags=-s -w', '-o', GO_TESTS, '.'], left()))
  },
  hasPlugins: () =>
    existsSync(join(GO_BIN, 'protoc-gen-go')) && existsSync(join(GO_BIN, 'protoc-gen-go-grpc')),
  preparePlugins: (limitMs) => fetched('the plugins', inGo(['-C', 'tools', 'install', 'tool'], limitMs)),
  check: () => [inGo(['vet', './...'])],
  test() {
    const output = execute([GO_TESTS, '-test.v', '-test.timeout=8m'], { cwd: GO_DIR })
    const passed = count(output.text, /^--- PASS: /gm)
    const failed = count(output.text, /^--- FAIL: /gm)
    const isComplete = (output.status === 0 && passed > 0) || failed > 0
    return { ...output, passed: isComplete ? passed : undefined, failed }
  },
}

const PYTHON_DIR = join(ROOT, 'clients', 'python')
const VENV = join(CACHE, 'python')
const VENV_BIN = join(VENV, 'bin')
const PYTHON = join(VENV_BIN, 'python')
const VERSION = 'import sys, venv, ensurepip; print("%d.%d" % sys.version_info[:2])'

type Requirements = 'requirements-test.txt' | 'requirements-dev.txt'

/** A file in the virtual environment that says what was installed there. */
const stampOf = (requirements: Requirements) => join(VENV, `${requirements}.sha256`)

function digestOf(requirements: Requirements): string {
  const hash = createHash('sha256')
  for (const file of new Set<Requirements>(['requirements-test.txt', requirements])) {
    hash.update(readFileSync(join(PYTHON_DIR, file)))
  }
  return hash.digest('hex')
}

const isInstalled = (requirements: Requirements) =>
  existsSync(stampOf(requirements)) && readFileSync(stampOf(requirements), 'utf8') === digestOf(requirements)

function install(requirements: Requirements, timeoutMs: number): void {
  if (isInstalled(requirements)) return
  const pip = [PYTHON, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', '--no-compile']
  // A package that would have to be built here takes minutes and a C++ compiler.
  const argv = [...pip, '--only-binary', ':all:', '-r', join(PYTHON_DIR, requirements)]
  fetched('its packages', execute(argv, { timeoutMs }))
  writeFileSync(stampOf(requirements), digestOf(requirements))
}

const inPython = (program: string, ...argv: readonly string[]) =>
  execute([join(VENV_BIN, program), ...argv], {
    cwd: PYTHON_DIR,
    env: { PYTHONPATH: 'src', PYTHONDONTWRITEBYTECODE: '1' },
  })

export const python: Language = {
  name: 'python',
  generated: [
    ...['_pb2.py', '_pb2.pyi', '_pb2_grpc.py', '_pb2_grpc.pyi'].map(
      (end) => `clients/python/src/itemcache/v1/item_cache${end}`,
    ),
    'clients/python/src/itemcache/service_config.json',
  ],
  serviceConfig: 'clients/python/src/itemcache/service_config.json',
  prepare(limitMs) {
    const found = ['python3', 'python']
      .map((command) => ({ command, ...execute([command, '-c', VERSION]) }))
      .find(({ status, text }) => status === 0 && isAtLeast(text, [3, 9]))
    if (found === undefined) throw new NotHere('no Python 3.9 or newer with venv in PATH')
    const madeBy = join(VENV, 'made-by')
    if (!existsSync(madeBy) || readFileSync(madeBy, 'utf8') !== found.text) {
      rmSync(VENV, { recursive: true, force: true })
      built('making a virtual environment', execute([found.command, '-m', 'venv', VENV]))
      writeFileSync(madeBy, found.text)
    }
    install('requirements-test.txt', limitMs)
  },
  hasPlugins: () => isInstalled('requirements-dev.txt'),
  preparePlugins: (limitMs) => install('requirements-dev.txt', limitMs),
  check: () => [inPython('ruff', 'check', '.'), inPython('ruff', 'format', '--check', '.'), inPython('mypy')],
  test() {
    const output = inPython('python', '-m', 'unittest', '-v')
    const [, ran] = /^Ran (\d+) tests? in /m.exec(output.text) ?? []
    const [, failures = ''] = /^FAILED \((.*)\)$/m.exec(output.text) ?? []
    const failed = [...failures.matchAll(/(?:failures|errors)=(\d+)/g)].reduce(
      (sum, [, number]) => sum + Number(number),
      0,
    )
    const isComplete = ran !== undefined && (output.status === 0 || failed > 0)
    return { ...output, passed: isComplete ? Number(ran) - failed : undefined, failed }
  },
}

export const languages: readonly Language[] = [go, python]

/** Writes the generated files below `out`, which is the root of this project or looks like it. */
export function generate({ name, serviceConfig }: Language, out: string): void {
  const template = `clients/${name}/buf.gen.yaml`
  const buf = join(ROOT, 'node_modules', '.bin', 'buf')
  const { status, text } = execute([buf, 'generate', '--template', template, '-o', out])
  if (status !== 0) throw new Error(text)
  copyFileSync(
    join(ROOT, 'proto', 'itemcache', 'v1', 'service_config_with_request_ids.json'),
    join(out, serviceConfig),
  )
}
