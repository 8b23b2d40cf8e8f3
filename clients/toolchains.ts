/** The toolchains of the Go and the Python client: whether this machine has them, and what they need fetched. */
import { spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { copyFileSync, existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

export const ROOT = join(import.meta.dirname, '..')
const CACHE = join(ROOT, '.cache', 'clients')

/** What a command printed, and its exit code; -1 when it could not be started. */
export interface Output {
  readonly status: number
  readonly text: string
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
  /** Finds the toolchain and fetches what it needs. Throws NotHere when this machine cannot. */
  prepare(): void
  /** Runs a program of the toolchain in the client's directory. */
  run(argv: readonly string[], env?: Readonly<Record<string, string>>): Output
}

const MINUTES_10 = 600_000

function execute(
  argv: readonly string[],
  { cwd = ROOT, env = {} }: { cwd?: string; env?: Readonly<Record<string, string>> },
): Output {
  const [command = '', ...rest] = argv
  const { status, stdout, stderr, error } = spawnSync(command, rest, {
    cwd,
    env: { ...process.env, ...env },
    encoding: 'utf8',
    maxBuffer: 64 * 1024 * 1024,
    timeout: MINUTES_10,
  })
  const text = `${stdout ?? ''}${stderr ?? ''}${error?.message ?? ''}`
  return { status: status ?? -1, text }
}

/** How Go and pip say that the network, or what is behind it, is not there. */
const UNREACHABLE =
  /dial tcp|no such host|i\/o timeout|connection re(?:set|fused)|TLS handshake|proxyconnect|module lookup disabled|\b(?:403 Forbidden|404 Not Found|407|50[0-9] [A-Z])|context deadline exceeded|Failed to establish|Temporary failure|Max retries|Read timed out|ProxyError|SSLError|No matching distribution/i

function fetched(what: string, { status, text }: Output): void {
  if (status === 0) return
  const line = text.split('\n').find((one) => UNREACHABLE.test(one))
  if (line !== undefined) throw new NotHere(`${what} cannot be fetched (${line.trim().slice(0, 200)})`)
  throw new Error(`${what} cannot be installed:\n${text}`)
}

const isAtLeast = (found: string, [major, minor]: readonly [number, number]): boolean => {
  const [, a, b] = /(\d+)\.(\d+)/.exec(found) ?? []
  return Number(a) > major || (Number(a) === major && Number(b) >= minor)
}

const GO_DIR = join(ROOT, 'clients', 'go')
const GO_BIN = join(CACHE, 'go')

export const go: Language = {
  name: 'go',
  generated: [
    'clients/go/itemcachev1/item_cache.pb.go',
    'clients/go/itemcachev1/item_cache_grpc.pb.go',
    'clients/go/service_config.json',
  ],
  serviceConfig: 'clients/go/service_config.json',
  prepare() {
    const { status, text } = this.run(['go', 'env', 'GOVERSION'])
    if (status !== 0 || !isAtLeast(text, [1, 24])) throw new NotHere('no Go 1.24 or newer in PATH')
    fetched('its modules', this.run(['go', 'mod', 'download']))
    mkdirSync(GO_BIN, { recursive: true })
    fetched('the plugins', this.run(['go', '-C', 'tools', 'install', 'tool'], { GOBIN: GO_BIN }))
  },
  // The Go that is here, and not one that it would fetch.
  run: (argv, env = {}) =>
    execute(argv, { cwd: GO_DIR, env: { GOTOOLCHAIN: 'local', GOFLAGS: '', GOWORK: 'off', ...env } }),
}

const PYTHON_DIR = join(ROOT, 'clients', 'python')
const VENV = join(CACHE, 'python')
const PYTHON = join(VENV, 'bin', 'python')
const VERSION = 'import sys, venv, ensurepip; print("%d.%d" % sys.version_info[:2])'

export const python: Language = {
  name: 'python',
  generated: [
    ...['_pb2.py', '_pb2.pyi', '_pb2_grpc.py', '_pb2_grpc.pyi'].map(
      (end) => `clients/python/src/itemcache/v1/item_cache${end}`,
    ),
    'clients/python/src/itemcache/service_config.json',
  ],
  serviceConfig: 'clients/python/src/itemcache/service_config.json',
  prepare() {
    const found = ['python3', 'python']
      .map((command) => ({ command, ...execute([command, '-c', VERSION], {}) }))
      .find(({ status, text }) => status === 0 && isAtLeast(text, [3, 9]))
    if (found === undefined) throw new NotHere('no Python 3.9 or newer with venv in PATH')
    const requirements = join(PYTHON_DIR, 'requirements-dev.txt')
    const digest = createHash('sha256').update(found.text).update(readFileSync(requirements)).digest('hex')
    const stamp = join(VENV, 'requirements.sha256')
    if (existsSync(PYTHON) && existsSync(stamp) && readFileSync(stamp, 'utf8') === digest) return
    rmSync(VENV, { recursive: true, force: true })
    const made = execute([found.command, '-m', 'venv', VENV], {})
    if (made.status !== 0) throw new Error(`no virtual environment can be made:\n${made.text}`)
    const pip = [PYTHON, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check']
    // A package that would have to be built here takes minutes and a C++ compiler.
    fetched('its packages', execute([...pip, '--only-binary', ':all:', '-r', requirements], {}))
    writeFileSync(stamp, digest)
  },
  run: ([program = '', ...argv], env = {}) =>
    execute([join(VENV, 'bin', program), ...argv], { cwd: PYTHON_DIR, env }),
}

export const languages: readonly Language[] = [go, python]

/** Writes the generated files below `out`, which is the root of this project or looks like it. */
export function generate({ name, serviceConfig }: Language, out: string): void {
  const template = `clients/${name}/buf.gen.yaml`
  const buf = join(ROOT, 'node_modules', '.bin', 'buf')
  const { status, text } = execute([buf, 'generate', '--template', template, '-o', out], {})
  if (status !== 0) throw new Error(text)
  copyFileSync(
    join(ROOT, 'proto', 'itemcache', 'v1', 'service_config_with_request_ids.json'),
    join(out, serviceConfig),
  )
}
