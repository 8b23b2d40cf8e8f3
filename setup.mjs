/**
 * Installs what package-lock.json names, when that changed: the first half of `npm start` and `npm test`. The runtime
 * is one of these packages, so this file itself runs on Node 20 and needs nothing.
 *
 * `--quiet` prints nothing unless there is something to install.
 */
import { createHash } from 'node:crypto'
import {
  existsSync,
  linkSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  unlinkSync,
  writeFileSync,
} from 'node:fs'
import { basename, delimiter, dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const ROOT = dirname(fileURLToPath(import.meta.url))
const STATE = join(ROOT, '.itemcache')
const STAMP = join(ROOT, 'node_modules', '.itemcache-setup')
const LOCK = join(STATE, 'setup.lock')
const RUNTIME = join(ROOT, 'node_modules', '.bin', 'node')
const NEEDED = [24, 17]

/** An end with one sentence and without a stack. */
class Refusal extends Error {}

async function main() {
  const quiet = process.argv.includes('--quiet')
  if (Number(process.versions.node.split('.')[0]) < 20) {
    throw new Refusal(
      `ItemCache needs Node 20 or newer to set itself up, and this is Node ${process.versions.node}.`,
    )
  }
  if (isDone()) return
  const { spawnSync } = await import('node:child_process')
  const release = await lock()
  try {
    // Whoever had the lock before may have done it.
    if (isDone()) return
    const pid = runningService()
    if (pid !== undefined) {
      // The command line is there to talk to it, and runs with the packages that the service runs with.
      if (quiet && existsSync(RUNTIME)) return
      throw new Refusal(
        `The packages must be installed anew, but ItemCache is running from them: stop process ${pid} first.`,
      )
    }
    say('Installing the packages that package-lock.json names, about half a minute')
    install(spawnSync)
    checkRuntime(spawnSync)
    writeFileSync(STAMP, fingerprint())
    if (!quiet) say('The packages are installed')
  } finally {
    release()
  }
}

function say(line) {
  process.stderr.write(`setup: ${line}\n`)
}

/** A digest of everything that decides what is installed. */
function fingerprint() {
  const hash = createHash('sha256').update(`${process.platform} ${process.arch}\n`)
  return hash.update(readFileSync(join(ROOT, 'package-lock.json'))).digest('hex')
}

function isDone() {
  try {
    return (
      readFileSync(STAMP, 'utf8') === fingerprint() && (existsSync(RUNTIME) || isNewEnough(process.version))
    )
  } catch (error) {
    if (error.code === 'ENOENT' && error.path === STAMP) return false
    throw error
  }
}

function isNewEnough(version) {
  const [, major, minor] = /^v(\d+)\.(\d+)\./.exec(version) ?? []
  return Number(major) > NEEDED[0] || (Number(major) === NEEDED[0] && Number(minor) >= NEEDED[1])
}

/** The start time of a process where /proc tells it, else `''`; `undefined` when there is no such process. */
function startTimeOf(pid) {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8')
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ')
    return fields[0] === 'Z' ? undefined : fields[19]
  } catch {
    if (existsSync('/proc/self/stat')) return undefined
  }
  try {
    process.kill(pid, 0)
    return ''
  } catch (error) {
    return error.code === 'EPERM' ? '' : undefined
  }
}

/** The process that a file names (id, start time), while it runs. */
function runningIn(file) {
  try {
    const [, pid, startTime] = /^(\d+) (.*)\n$/.exec(readFileSync(file, 'utf8')) ?? []
    const found = startTimeOf(Number(pid))
    return found !== undefined && (found === '' || found === startTime) ? Number(pid) : undefined
  } catch {
    return undefined
  }
}

/** The service that runs from this checkout: it registers itself in `.itemcache/run` (src/embedded/processes.ts). */
function runningService() {
  const dir = join(STATE, 'run')
  for (const name of existsSync(dir) ? readdirSync(dir) : []) {
    const pid = runningIn(join(dir, name))
    if (pid !== undefined) return pid
    rmSync(join(dir, name), { force: true })
  }
  return undefined
}

/** Waits until no other set-up runs here. The lock of one that died is taken over. Returns the release. */
async function lock() {
  const mine = `${LOCK}.${process.pid}`
  try {
    mkdirSync(STATE, { recursive: true })
    writeFileSync(mine, `${process.pid} ${startTimeOf(process.pid)}\n`)
  } catch (error) {
    throw new Refusal(`The packages must be installed, but ${STATE} cannot be written to (${error.code}).`)
  }
  let waiting = false
  for (;;) {
    try {
      linkSync(mine, LOCK)
      unlinkSync(mine)
      return () => rmSync(LOCK, { force: true })
    } catch (error) {
      if (error.code !== 'EEXIST') throw error
    }
    const pid = runningIn(LOCK)
    if (pid === undefined) {
      discard(`${mine}.stale`)
      continue
    }
    if (!waiting) say(`Waiting for process ${pid}, which is installing the packages`)
    waiting = true
    await new Promise((done) => setTimeout(done, 200))
  }
}

/** Removes a lock whose process has died, unless another process has just replaced it with its own. */
function discard(aside) {
  try {
    renameSync(LOCK, aside)
    if (runningIn(aside) !== undefined) linkSync(aside, LOCK)
  } catch (error) {
    if (error.code !== 'ENOENT' && error.code !== 'EEXIST') throw error
  }
  rmSync(aside, { force: true })
}

/** `npm ci`, by the npm that runs us, whatever its user's settings say about what to leave out. */
function install(spawnSync) {
  const env = { ...process.env }
  for (const name of Object.keys(env)) {
    const setting = /^npm_config_(.*)$/i.exec(name)?.[1]
    if (setting !== undefined && !isAboutNetwork(setting)) delete env[name]
  }
  // The runtime of an older installation is about to be replaced: it must not run npm.
  env.PATH = (env.PATH ?? '')
    .split(delimiter)
    .filter((dir) => dir !== dirname(RUNTIME))
    .join(delimiter)
  const flags = [
    '--ignore-scripts',
    '--include=dev',
    '--include=optional',
    '--engine-strict=false',
    '--no-audit',
    '--no-fund',
    '--loglevel=error',
    '--bin-links=true',
    '--dry-run=false',
    '--global=false',
    '--install-strategy=hoisted',
    '--legacy-peer-deps=false',
    '--package-lock=true',
  ]
  const { npm_execpath: npm = '', npm_node_execpath: node = process.execPath } = process.env
  const [command, ...first] = basename(npm) === 'npm-cli.js' ? [node, npm] : ['npm']
  rmSync(STAMP, { force: true })
  // What npm prints goes to stderr: stdout belongs to the program that starts after us.
  const { status, signal, error } = spawnSync(command, [...first, 'ci', ...flags], {
    cwd: ROOT,
    env,
    stdio: ['ignore', 2, 2],
  })
  if (error !== undefined) throw new Refusal(`npm could not be started (${error.message}).`)
  if (signal !== null) throw new Refusal(`npm ci was ended by ${signal}.`)
  if (status !== 0) throw new Refusal(`npm ci failed (exit code ${status}); what it said is above.`)
}

function isAboutNetwork(setting) {
  return /registry|auth|^(https?_)?-?proxy$|^noproxy$|^ca(file)?$|^cert$|^key$|^strict[_-]ssl$|^(user|global)config$|^cache$|^offline$|^prefer[_-]|^fetch[_-]|^maxsockets$/i.test(
    setting,
  )
}

/** The runtime that was installed must run; a new enough Node of the system's does, too. */
function checkRuntime(spawnSync) {
  const { stdout } = spawnSync(RUNTIME, ['--version'], { encoding: 'utf8' })
  if (stdout && isNewEnough(stdout)) return
  const system = process.env.npm_node_execpath ?? process.execPath
  if (isNewEnough(spawnSync(system, ['--version'], { encoding: 'utf8' }).stdout ?? '')) {
    // It comes first in the PATH and does not run here.
    rmSync(RUNTIME, { force: true })
    return
  }
  throw new Refusal(
    `The packaged Node does not run on this platform (supported: Linux with glibc on x64 and arm64, macOS): install Node ${NEEDED.join('.')} or newer yourself.`,
  )
}

main().catch((error) => {
  process.stderr.write(error instanceof Refusal ? `setup: ${error.message}\n` : `setup: ${error.stack}\n`)
  process.exitCode = 1
})
