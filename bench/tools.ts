/** The load generators that are programs of others: on the PATH, where Go puts them, or in a container. */
import { execFile, spawnSync } from 'node:child_process'
import { accessSync, constants } from 'node:fs'
import { homedir, tmpdir } from 'node:os'
import { delimiter, join } from 'node:path'
import { LOAD_CORE } from './control.ts'

export type ToolName = 'h2load' | 'ghz'

/** One command for each that installs it. */
export const INSTALL: Readonly<Record<ToolName, string>> = {
  h2load: 'apt-get install -y nghttp2-client   (brew install nghttp2)',
  ghz: 'go install github.com/bojand/ghz/cmd/ghz@latest',
}

/** `docker build` of bench/tools makes it: both programs, and nothing else. */
const IMAGE = 'itemcache-bench-tools'

const ROOT = join(import.meta.dirname, '..')

const found = new Map<ToolName, readonly string[] | undefined>()

/** The command that runs a tool, pinned to the core of the load; undefined when there is none. */
function commandOf(name: ToolName): readonly string[] | undefined {
  if (!found.has(name)) found.set(name, find(name))
  return found.get(name)
}

function find(name: ToolName): readonly string[] | undefined {
  const places = [...(process.env['PATH'] ?? '').split(delimiter), join(homedir(), 'go', 'bin')]
  for (const place of places) {
    const file = join(place, name)
    try {
      accessSync(file, constants.X_OK)
      return LOAD_CORE === undefined ? [file] : ['taskset', '-c', `${LOAD_CORE}`, file]
    } catch {
      // Not there.
    }
  }
  if (spawnSync('docker', ['image', 'inspect', IMAGE], { stdio: 'ignore' }).status !== 0) return undefined
  const core = LOAD_CORE === undefined ? [] : ['--cpuset-cpus', `${LOAD_CORE}`]
  // Files are named by their paths here: requests are temporary files, configurations the repository's.
  return [
    'docker',
    'run',
    '--rm',
    '--network',
    'host',
    ...core,
    '-v',
    `${tmpdir()}:${tmpdir()}`,
    '-v',
    `${ROOT}:${ROOT}:ro`,
    IMAGE,
    name,
  ]
}

export function has(name: ToolName): boolean {
  return commandOf(name) !== undefined
}

/** Runs a tool to its end. Throws with what it printed when it fails. */
export function runTool(name: ToolName, args: readonly string[]): Promise<string> {
  const [program, ...rest] = commandOf(name) ?? []
  if (program === undefined) throw new Error(`${name} is missing: ${INSTALL[name]}`)
  const { promise, resolve, reject } = Promise.withResolvers<string>()
  execFile(program, [...rest, ...args], { maxBuffer: 1 << 28 }, (error, stdout, stderr) => {
    if (error === null) resolve(stdout)
    else reject(new Error(`${name} failed: ${error.message}\n${stdout}${stderr}`))
  })
  return promise
}
