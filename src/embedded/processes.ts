/**
 * Processes and who they belong to: the owner of a data directory, the service that runs from a checkout, and the
 * servers that the embedded default starts. A process is known by its id and its start time, because ids are
 * used again.
 */
import { execFileSync, spawn } from 'node:child_process'
import { createHash, randomUUID } from 'node:crypto'
import {
  chownSync,
  closeSync,
  existsSync,
  linkSync,
  lstatSync,
  mkdirSync,
  openSync,
  readFileSync,
  realpathSync,
  renameSync,
  rmdirSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { join, resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { ItemCacheError } from '../errors.ts'

/** One process. `startTime` is comparable on this machine only, and `''` where it cannot be learnt. */
export interface ProcessId {
  readonly pid: number
  readonly startTime: string
}

/** A user and group by number. */
export interface User {
  readonly uid: number
  readonly gid: number
}

/** The process that has this id now; `undefined` when there is none, or only a zombie. */
export function findProcess(pid: number): ProcessId | undefined {
  if (existsSync('/proc/self/stat')) {
    try {
      const stat = readFileSync(`/proc/${pid}/stat`, 'utf8')
      // The second field is the program's name in parentheses and may hold anything: count from its end.
      const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ')
      const [state, startTime = ''] = [fields[0], fields[19]]
      return state === 'Z' || state === 'X' ? undefined : { pid, startTime }
    } catch {
      return undefined
    }
  }
  try {
    const [state = '', ...start] = ps(pid, 'stat=,lstart=').split(/\s+/)
    return state === '' || state.startsWith('Z') ? undefined : { pid, startTime: start.join(' ') }
  } catch {
    return undefined
  }
}

/** Whether that very process still runs. */
export function isAlive({ pid, startTime }: ProcessId): boolean {
  return findProcess(pid)?.startTime === startTime
}

/** The command line of a process, or `''`. */
export function commandOf(pid: number): string {
  try {
    if (!existsSync('/proc/self/stat')) return ps(pid, 'command=')
    return readFileSync(`/proc/${pid}/cmdline`, 'utf8').replaceAll('\0', ' ')
  } catch {
    return ''
  }
}

function ps(pid: number, format: string): string {
  const stdio = ['ignore', 'pipe', 'ignore'] as const
  const env = { ...process.env, LC_ALL: 'C', TZ: 'UTC' }
  return execFileSync('ps', ['-ww', '-o', format, '-p', `${pid}`], {
    encoding: 'utf8',
    stdio: [...stdio],
    env,
  }).trim()
}

/** The process that a file of ours names, while it runs. */
export function readProcessFile(file: string): ProcessId | undefined {
  let text: string
  try {
    text = readFileSync(file, 'utf8')
  } catch {
    return undefined
  }
  const id = parseProcess(text)
  return id !== undefined && isAlive(id) ? id : undefined
}

/** Names a process in a file, for `readProcessFile`. */
export function writeProcessFile(file: string, { pid, startTime }: ProcessId): void {
  writeFileSync(file, `${pid} ${startTime}\n`)
}

function parseProcess(text: string): ProcessId | undefined {
  const [, pid, startTime = ''] = /^(\d+) (.*)\n$/.exec(text) ?? []
  return pid === undefined ? undefined : { pid: Number(pid), startTime }
}

function self(): ProcessId {
  return findProcess(process.pid) ?? { pid: process.pid, startTime: '' }
}

/**
 * Says that a service runs from the checkout at `root`, so that setup.mjs does not replace the packages under it.
 * A checkout that cannot be written to cannot be set up either, so failing to say it is no error.
 */
export function registerRunning(root: string): Disposable {
  const file = join(root, '.itemcache', 'run', `${process.pid}`)
  try {
    mkdirSync(join(root, '.itemcache', 'run'), { recursive: true })
    writeProcessFile(file, self())
  } catch {
    return { [Symbol.dispose]: () => undefined }
  }
  return { [Symbol.dispose]: () => rmSync(file, { force: true }) }
}

/** The directories that this process has claimed, and how often. */
const claims = new Map<string, { count: number; readonly taken: Promise<void> }>()

/**
 * Makes this process the one owner of a data directory, until disposed. A claim whose process has died is taken
 * over; within one process a directory may be claimed several times. Throws `unavailable` when another process
 * has it, or when it cannot be written to.
 */
export async function claimDataDir(dataDir: string): Promise<AsyncDisposable> {
  let dir = resolve(dataDir)
  try {
    mkdirSync(dir, { recursive: true })
    dir = realpathSync(dir)
    const claim = claims.get(dir) ?? { count: 0, taken: takeOwnership(dir) }
    claims.set(dir, claim)
    claim.count++
    await claim.taken
  } catch (error) {
    claims.delete(dir)
    if (error instanceof ItemCacheError) throw error
    const { code = 'error' } = error as NodeJS.ErrnoException
    const message =
      `The data directory ${dir} cannot be written to (${code}). ` +
      'Set ITEMCACHE_DATA_DIR to a directory that can, or both DATABASE_URL and REDIS_URL.'
    throw new ItemCacheError('unavailable', message, { reason: 'DATA_DIR_UNUSABLE', cause: error })
  }
  let held = true
  return {
    [Symbol.asyncDispose]: async () => {
      const claim = claims.get(dir)
      if (!held || claim === undefined) return
      held = false
      if (--claim.count > 0) return
      claims.delete(dir)
      rmSync(join(dir, 'owner'), { force: true })
    },
  }
}

/** Puts this process's name into `<dir>/owner`, in one step: by a hard link, which fails when there is one. */
async function takeOwnership(dir: string): Promise<void> {
  const owner = join(dir, 'owner')
  const mine = `${owner}.${randomUUID()}`
  writeProcessFile(mine, self())
  // A starter that loses the race to another must not take that one's fresh claim for the stale one it saw.
  let tookOver = false
  try {
    for (;;) {
      try {
        linkSync(mine, owner)
        if (tookOver) await sleep(50)
        if (readFileSync(owner, 'utf8') === readFileSync(mine, 'utf8')) return
      } catch (error) {
        const { code } = error as NodeJS.ErrnoException
        if (code !== 'EEXIST' && code !== 'ENOENT') throw error
      }
      const other = readProcessFile(owner)
      if (other !== undefined) throw ownedBy(other, dir)
      const aside = `${owner}.${randomUUID()}`
      try {
        renameSync(owner, aside)
      } catch {
        continue // Somebody else has moved it.
      }
      if (readProcessFile(aside) !== undefined) linkSync(aside, owner)
      rmSync(aside, { force: true })
      tookOver = true
    }
  } finally {
    rmSync(mine, { force: true })
  }
}

function ownedBy({ pid }: ProcessId, dir: string): ItemCacheError {
  const message =
    `Another ItemCache (process ${pid}) uses the data directory ${dir}. Stop that one, or set ITEMCACHE_DATA_DIR ` +
    'to another directory, or let both share servers by DATABASE_URL and REDIS_URL.'
  return new ItemCacheError('unavailable', message, { reason: 'DATA_DIR_IN_USE' })
}

/**
 * A directory for the Unix sockets of one data directory, open to `user` only. It lies below /tmp, because a socket's
 * path may have no more than 103 bytes (107 on Linux), and is the same at every start.
 */
export function socketDir(dataDir: string, user: User): string {
  const hash = createHash('sha256').update(realpathSync(dataDir)).digest('hex').slice(0, 12)
  const dir = `/tmp/itemcache-${user.uid}-${hash}`
  try {
    mkdirSync(dir, { mode: 0o700 })
    if (user.uid !== process.getuid?.()) chownSync(dir, user.uid, user.gid)
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error
  }
  const found = lstatSync(dir)
  if (found.isDirectory() && found.uid === user.uid && (found.mode & 0o077) === 0) return dir
  throw new ItemCacheError('unavailable', `${dir} is not a directory of user ${user.uid} alone: remove it.`)
}

/** Removes what a server leaves in its socket directory, and the directory when no other server uses it. */
export function removeSockets(dir: string, names: readonly string[]): void {
  for (const name of names) rmSync(join(dir, name), { force: true })
  try {
    rmdirSync(dir)
  } catch {
    // Another server's socket is there.
  }
}

/** A server that was started here. It is no part of our process group, so that Ctrl-C reaches it only through us. */
export interface Server {
  readonly id: ProcessId
  /** Whether it has ended, or could not be started at all. */
  readonly ended: () => boolean
}

/** Servers that run, and the signal that stops each. */
const servers = new Map<ProcessId, NodeJS.Signals>()

// Whatever ends this process in a hurry, its servers end on their own.
process.on('exit', () => {
  for (const [id, signal] of servers) {
    try {
      if (isAlive(id)) process.kill(id.pid, signal)
    } catch {
      // It has ended meanwhile.
    }
  }
})

/** Starts a server whose output goes to `logFile`; the log of the run before is kept as `logFile`.1. */
export async function startServer(
  file: string,
  args: readonly string[],
  options: {
    readonly cwd: string
    readonly env: NodeJS.ProcessEnv
    readonly logFile: string
    /** Stops it in an orderly way. It is sent when this process exits first. */
    readonly stopSignal: NodeJS.Signals
    readonly user?: User
  },
): Promise<Server> {
  const { cwd, env, logFile, stopSignal, user } = options
  if (existsSync(logFile)) renameSync(logFile, `${logFile}.1`)
  const log = openSync(logFile, 'w', 0o600)
  try {
    const child = spawn(file, args, { cwd, env, ...user, detached: true, stdio: ['ignore', log, log] })
    let ended = false
    let id: ProcessId = { pid: child.pid ?? 0, startTime: '' }
    child.once('exit', () => {
      ended = true
      servers.delete(id)
    })
    await new Promise<void>((done, failed) => child.once('spawn', done).once('error', failed))
    child.unref()
    id = findProcess(id.pid) ?? id
    if (!ended) servers.set(id, stopSignal)
    return { id, ended: () => ended }
  } finally {
    closeSync(log)
  }
}

/** Polls until `condition` holds; `false` when it did not within `timeoutMs`. */
export async function until(
  condition: () => boolean | Promise<boolean>,
  timeoutMs: number,
): Promise<boolean> {
  const deadline = performance.now() + timeoutMs
  while (!(await condition())) {
    if (performance.now() > deadline) return false
    await sleep(10)
  }
  return true
}

/** Ends a process: each signal in turn, until it is gone. Throws `internal` when none ended it. */
export async function endProcess(
  id: ProcessId,
  signals: readonly (readonly [NodeJS.Signals, waitMs: number])[],
): Promise<void> {
  for (const [signal, waitMs] of signals) {
    if (!isAlive(id)) return
    try {
      process.kill(id.pid, signal)
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error
    }
    if (await until(() => !isAlive(id), waitMs)) return
  }
  throw new ItemCacheError('internal', `Process ${id.pid} could not be ended.`)
}

/** The last lines of a server's log, for an error. */
export function lastLines(logFile: string, count = 5): string {
  try {
    return readFileSync(logFile, 'utf8').trimEnd().split('\n').slice(-count).join('\n')
  } catch {
    return ''
  }
}
