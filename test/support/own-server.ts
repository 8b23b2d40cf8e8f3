/** Servers that may be killed, stopped and started again on the same data. */
import { spawnSync } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { findProcess } from '../../src/embedded/processes.ts'
import { startRedis } from '../../src/embedded/redis.ts'
import { makeRunDirectory } from './run-directory.ts'

/** A server that belongs to one test. Its URL stays the same over restarts. */
export interface OwnServer extends AsyncDisposable {
  readonly url: string
  /** Ends it as a crash would: nothing is written out, connections break. */
  kill(): Promise<void>
  /** It stops answering, but stays connected and takes connections. */
  pause(): void
  resume(): void
  /** Ends it in an orderly way. */
  stop(): Promise<void>
  /** Starts it again on the same data, after `stop` or `kill`; stops it first when it runs. */
  restart(): Promise<void>
}

interface Started {
  readonly url: string
  readonly pid: number
  stop(): Promise<void>
}

/** Starts a server in a directory of its own. */
export async function ownServer(start: (dataDir: string) => Promise<Started>): Promise<OwnServer> {
  await using held = new AsyncDisposableStack()
  const directory = held.use(makeRunDirectory())
  let server = await start(directory.path)
  directory.ends(server.pid, 'SIGKILL')
  const signalAll = (signal: NodeJS.Signals) => {
    for (const pid of [server.pid, ...childrenOf(server.pid)]) signalIfAlive(pid, signal)
  }
  const stop = async () => {
    if (findProcess(server.pid) !== undefined) signalAll('SIGCONT')
    await server.stop()
  }
  held.defer(stop)
  const kept = held.move()
  return {
    url: server.url,
    kill: async () => {
      signalAll('SIGKILL')
      while (findProcess(server.pid) !== undefined) await sleep(5)
    },
    pause: () => signalAll('SIGSTOP'),
    resume: () => signalAll('SIGCONT'),
    stop,
    restart: async () => {
      await stop()
      server = await start(directory.path)
      directory.ends(server.pid, 'SIGKILL')
    },
    [Symbol.asyncDispose]: () => kept.disposeAsync(),
  }
}

/** A Redis of one's own. */
export function ownRedis(cacheDir: string): Promise<OwnServer> {
  return ownServer(async (dataDir) => {
    const server = await startRedis({ dataDir, cacheDir })
    if ('unavailable' in server) throw new Error(server.unavailable)
    return server
  })
}

/** A child may end between being found and being told. */
function signalIfAlive(pid: number, signal: NodeJS.Signals): void {
  try {
    process.kill(pid, signal)
  } catch (error) {
    if (!(error instanceof Error && 'code' in error && error.code === 'ESRCH')) throw error
  }
}

/** PostgreSQL works in child processes, each in a process group of its own. */
function childrenOf(pid: number): number[] {
  const list = existsSync('/proc/self/stat')
    ? readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8')
    : spawnSync('pgrep', ['-P', `${pid}`], { encoding: 'utf8' }).stdout
  return list.split(/\s/).filter(Boolean).map(Number)
}
