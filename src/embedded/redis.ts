/**
 * The private Redis of a bare start: `redis-server` or `valkey-server` from the PATH, else an unpacked copy that only
 * ItemCache uses, on a Unix socket that only one user can open. Nothing is installed and no service is started. It is
 * not part of our process group, so that it outlives the drain; it writes its copies out when it stops, so that they
 * are there after a restart.
 */
import { execFile } from 'node:child_process'
import { existsSync, mkdirSync, realpathSync, renameSync, writeFileSync } from 'node:fs'
import { connect } from 'node:net'
import { join, resolve } from 'node:path'
import { promisify } from 'node:util'
import { contentOf, unpackPackage } from './debian.ts'
import {
  claimDataDir,
  endProcess,
  lastLines,
  readProcessFile,
  removeSockets,
  type Server,
  socketDir,
  startServer,
  until,
  writeProcessFile,
} from './processes.ts'

/** A running private Redis. */
export interface EmbeddedRedis extends AsyncDisposable {
  /** `unix:` and the path of its socket. */
  readonly url: string
  /** Such as `Redis 7.0.15` or `Valkey 8.1.1`. */
  readonly version: string
  readonly pid: number
  /** Lets it save its copies and waits until it is gone: at most about 7 s. */
  stop(): Promise<void>
}

/** There is no Redis. `unavailable` says why and how to turn the tier on, for the start banner. */
export interface NoRedis {
  readonly unavailable: string
}

/** A server program that has been seen to run. */
export interface RedisProgram {
  readonly file: string
  readonly env: NodeJS.ProcessEnv
  readonly version: string
}

interface Options {
  readonly dataDir: string
  /** Where the unpacked copy is kept; default `<dataDir>/cache`. */
  readonly cacheDir?: string
  readonly log?: (line: string) => void
}

const SAVE_THEN_KILL = [
  ['SIGTERM', 6000],
  ['SIGKILL', 1000],
] as const

/** The oldest Redis whose commands the Redis tier can do with. */
const OLDEST = [6, 2] as const

/**
 * Starts the private Redis of `dataDir`. A machine where that cannot be done is no error: the tier is off then.
 * Throws `unavailable` when another process owns the data directory.
 */
export async function startRedis(options: Options): Promise<EmbeddedRedis | NoRedis> {
  const { dataDir, cacheDir = join(dataDir, 'cache'), log = () => undefined } = options
  await using started = new AsyncDisposableStack()
  started.use(await claimDataDir(dataDir))
  try {
    const program = await findRedis(resolve(cacheDir), log)
    const home = join(realpathSync(dataDir), 'redis')
    mkdirSync(home, { recursive: true, mode: 0o700 })
    const leftBehind = readProcessFile(join(home, 'process'))
    if (leftBehind !== undefined) {
      log(`Stopping the Redis that an earlier run left behind (process ${leftBehind.pid})`)
      await endProcess(leftBehind, SAVE_THEN_KILL)
    }
    const user = { uid: process.getuid?.() ?? 0, gid: process.getgid?.() ?? 0 }
    const sockets = socketDir(dataDir, user)
    started.defer(() => removeSockets(sockets, ['redis.sock']))
    const socket = join(sockets, 'redis.sock')
    const server = await run(program, home, socket)
    started.defer(() => endProcess(server.id, SAVE_THEN_KILL))
    const running = started.move()
    const stop = () => running.disposeAsync()
    const { version } = program
    return { url: `unix:${socket}`, version, pid: server.id.pid, stop, [Symbol.asyncDispose]: stop }
  } catch (error) {
    return {
      unavailable: `${(error as Error).message} Install Redis 6.2 or newer (or Valkey), or set REDIS_URL.`,
    }
  }
}

/**
 * The server program to use: from the PATH, else the private copy in `cacheDir`, fetched first if need be. Throws an
 * error whose message is a sentence.
 */
export async function findRedis(cacheDir: string, log: (line: string) => void): Promise<RedisProgram> {
  let reason = 'There is no redis-server on the PATH'
  for (const dir of (process.env['PATH'] ?? '').split(':')) {
    for (const name of ['redis-server', 'valkey-server']) {
      const file = join(dir, name)
      if (dir === '' || !existsSync(file)) continue
      try {
        return await probe(file)
      } catch (error) {
        reason = `${file} cannot be used (${(error as Error).message})`
      }
    }
  }
  const copy = join(cacheDir, 'redis')
  try {
    return await probeCopy(copy)
  } catch {
    // There is none, or it is that of another system.
  }
  try {
    log('Fetching a private copy of Redis; nothing is installed on this machine')
    await unpackPackage(copy, ['redis-server', 'valkey-server'], probeCopy)
    return await probeCopy(copy)
  } catch (error) {
    throw new Error(`${reason}, and no private copy could be fetched (${(error as Error).message}).`)
  }
}

/** Runs `<file> --version`. Throws when it does not run, or is too old. */
async function probe(file: string, libraries: readonly string[] = []): Promise<RedisProgram> {
  const env: NodeJS.ProcessEnv = { ...process.env, LC_ALL: 'C', TZ: 'UTC' }
  if (libraries.length > 0) env['LD_LIBRARY_PATH'] = libraries.join(':')
  const { stdout } = await promisify(execFile)(file, ['--version'], { env, timeout: 10_000 })
  const [, name, version = '', major, minor] = /^(\w+) server v=((\d+)\.(\d+)[\w.-]*)/.exec(stdout) ?? []
  if (name === undefined) throw new Error('it does not say its version')
  const isOld = Number(major) < OLDEST[0] || (Number(major) === OLDEST[0] && Number(minor) < OLDEST[1])
  if (isOld) throw new Error(`version ${version} is older than ${OLDEST.join('.')}`)
  return { file, env, version: `${name} ${version}` }
}

function probeCopy(copy: string): Promise<RedisProgram> {
  const { files, libraries } = contentOf(copy)
  const server = files.find((file) => /^usr\/bin\/(redis|valkey)-server$/.test(file))
  if (server === undefined) throw new Error('the package holds no server')
  return probe(join(copy, server), libraries)
}

/** Starts the server and waits until it answers. */
async function run({ file, env }: RedisProgram, home: string, socket: string): Promise<Server> {
  const settings = [
    'port 0',
    `unixsocket ${socket}`,
    'unixsocketperm 700',
    'daemonize no',
    'maxmemory 256mb',
    'maxmemory-policy allkeys-lru',
    'lazyfree-lazy-eviction yes',
    'lazyfree-lazy-expire yes',
    'lazyfree-lazy-server-del yes',
    'lazyfree-lazy-user-del yes',
    'lazyfree-lazy-user-flush yes',
    // Every save point makes it save when it stops, too. A full disk must not stop a cache.
    'save 900 1',
    'stop-writes-on-bgsave-error no',
    'appendonly no',
  ]
  writeFileSync(join(home, 'redis.conf'), [...settings, ''].join('\n'))
  const logFile = join(home, 'server.log')
  for (let attempt = 1; ; attempt++) {
    // It keeps its data in the working directory.
    const server = await startServer(file, ['redis.conf'], { cwd: home, env, logFile, stopSignal: 'SIGTERM' })
    writeProcessFile(join(home, 'process'), server.id)
    const answers = async () => server.ended() || (await ping(socket))
    if ((await until(answers, 30_000)) && !server.ended()) return server
    await endProcess(server.id, SAVE_THEN_KILL)
    const dump = join(home, 'dump.rdb')
    if (attempt > 1 || !existsSync(dump)) {
      throw new Error(`The private Redis ended at once (the end of ${logFile} is: ${lastLines(logFile, 2)}).`)
    }
    // Copies that cannot be read, of a newer Redis perhaps, can be done without.
    renameSync(dump, `${dump}.unreadable`)
  }
}

/** Whether the server at `socket` answers. */
function ping(socket: string): Promise<boolean> {
  return new Promise((done) => {
    const connection = connect(socket, () => connection.write('PING\r\n'))
    connection.setTimeout(1000, () => connection.destroy())
    connection.once('data', (answer) => {
      done(`${answer}`.startsWith('+PONG'))
      connection.destroy()
    })
    connection.once('error', () => done(false))
    connection.once('close', () => done(false))
  })
}
