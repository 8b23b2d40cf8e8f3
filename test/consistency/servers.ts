/**
 * The servers of a history: a PostgreSQL that can be crashed and failed over, a Redis that can be robbed and put back in
 * time, and instances of ItemCache as processes of their own.
 */
import { type ChildProcess, execFile, spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import {
  appendFileSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { connect } from 'node:net'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'
import { Redis } from 'ioredis'
import pg from 'pg'
import { type EmbeddedPostgres, startPostgres } from '../../src/embedded/postgres.ts'
import { findRedis } from '../../src/embedded/redis.ts'

/** A connection that is closed when disposed, and whose errors outside of a query are nobody's. */
export async function connectSql(url: string): Promise<pg.Client & AsyncDisposable> {
  const client = new pg.Client({
    connectionString: url,
    connectionTimeoutMillis: 5000,
    query_timeout: 10_000,
    types: { getTypeParser },
  })
  client.on('error', () => {})
  await client.connect()
  return Object.assign(client, { [Symbol.asyncDispose]: () => client.end().catch(() => {}) })
}

function getTypeParser(oid: number, format?: 'text' | 'binary') {
  // int8 and xid8: a revision fits into a double.
  if ((oid === 20 || oid === 5069) && format !== 'binary') return Number
  return pg.types.getTypeParser(oid, 'text')
}

const urlOf = ({ url }: EmbeddedPostgres, database: string) => url.replace('/itemcache?', `/${database}?`)

const SETTINGS = {
  // Nothing of these crashes is a loss of power.
  fsync: 'off',
  synchronous_commit: 'on',
  // Writers of a few keys meet all the time: a deadlock should not cost a second.
  deadlock_timeout: '50ms',
  wal_keep_size: '128MB',
  // A stopped instance must not hold locks for the rest of the history.
  idle_in_transaction_session_timeout: '3s',
}

/** The primary, and what a failover needs. One at a time is the primary; it may have a standby. */
export class Postgres implements AsyncDisposable {
  readonly #dir: string
  readonly #cacheDir: string
  #nodes = 0
  #primaryDir = ''
  #primary: EmbeddedPostgres | undefined
  #standby: { readonly dir: string; readonly server: EmbeddedPostgres } | undefined

  private constructor(dir: string, cacheDir: string) {
    this.#dir = dir
    this.#cacheDir = cacheDir
  }

  static async start(dir: string, cacheDir: string): Promise<Postgres> {
    const postgres = new Postgres(dir, cacheDir)
    postgres.#primaryDir = postgres.#newDir()
    postgres.#primary = await startPostgres({ dataDir: postgres.#primaryDir, cacheDir })
    await using sql = await connectSql(postgres.url('postgres'))
    for (const [name, value] of Object.entries(SETTINGS))
      await sql.query(`ALTER SYSTEM SET ${name} = '${value}'`)
    await sql.query('SELECT pg_reload_conf()')
    return postgres
  }

  /** A direct way in, by the socket. */
  url(database: string): string {
    if (this.#primary === undefined) throw new Error('PostgreSQL does not run')
    return urlOf(this.#primary, database)
  }

  /** Where a proxy finds the primary's socket. */
  get target(): { path: string } {
    const host = new URL(this.url('x')).searchParams.get('host')
    return { path: `${host}/.s.PGSQL.5432` }
  }

  /** A crash, and the same data again. */
  async crash(): Promise<void> {
    await this.#kill()
    this.#primary = await startPostgres({ dataDir: this.#primaryDir, cacheDir: this.#cacheDir })
  }

  /** A standby that follows the primary asynchronously. */
  async addStandby(): Promise<void> {
    if (this.#primary === undefined || this.#standby !== undefined) return
    const dir = this.#newDir()
    const from = join(this.#primaryDir, 'postgres', 'data')
    const to = join(dir, 'postgres', 'data')
    const host = new URL(this.#primary.url).searchParams.get('host')
    await using sql = await connectSql(this.url('postgres'))
    await sql.query(`SELECT pg_backup_start('standby', true)`)
    mkdirSync(join(dir, 'postgres'), { recursive: true })
    // Files may vanish while they are copied; recovery does without them.
    await promisify(execFile)('cp', ['-a', from, to]).catch(() => undefined)
    const { rows } = await sql.query('SELECT labelfile FROM pg_backup_stop(false)')
    for (const gone of ['postmaster.pid', 'postmaster.opts']) rmSync(join(to, gone), { force: true })
    writeFileSync(join(to, 'backup_label'), rows[0].labelfile)
    writeFileSync(join(to, 'standby.signal'), '')
    appendFileSync(
      join(to, 'postgresql.auto.conf'),
      `primary_conninfo = 'host=${host} port=5432 user=postgres'\n`,
    )
    await promisify(execFile)('chown', ['-R', '--reference', join(to, 'PG_VERSION'), to])
    this.#standby = { dir, server: await startPostgres({ dataDir: dir, cacheDir: this.#cacheDir }) }
  }

  /** From now on the standby misses every commit. */
  async cutStandby(): Promise<void> {
    if (this.#standby === undefined) return
    await using sql = await connectSql(urlOf(this.#standby.server, 'postgres'))
    await sql.query(`ALTER SYSTEM SET primary_conninfo = ''`)
    await sql.query('SELECT pg_reload_conf()')
  }

  /**
   * The standby takes over from a primary that dies, or that lives on until `endOld` ends it. Returns where the old
   * primary's data are.
   */
  async failOver(livesOn: boolean): Promise<{ readonly dir: string; readonly endOld: () => Promise<void> }> {
    if (this.#standby === undefined) throw new Error('there is no standby')
    const old = { dir: this.#primaryDir, server: this.#primary }
    this.#primary = undefined
    if (!livesOn) await crash(old.server)
    const { dir, server } = this.#standby
    this.#standby = undefined
    await using sql = await connectSql(urlOf(server, 'postgres'))
    await sql.query('SELECT pg_promote(true, 20)')
    await sql.query(`ALTER SYSTEM RESET primary_conninfo`)
    this.#primaryDir = dir
    this.#primary = server
    return { dir: old.dir, endOld: () => crash(livesOn ? old.server : undefined) }
  }

  /** Runs `read` on a primary that was replaced, which is started again for it alone, and removes its data. */
  async autopsy<T>(dir: string, database: string, read: (sql: pg.Client) => Promise<T>): Promise<T> {
    await using server = await startPostgres({ dataDir: dir, cacheDir: this.#cacheDir })
    await using sql = await connectSql(urlOf(server, database))
    return await read(sql)
  }

  async dropStandby(): Promise<void> {
    const standby = this.#standby
    this.#standby = undefined
    if (standby === undefined) return
    await standby.server.stop()
    rmSync(standby.dir, { recursive: true, force: true })
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.dropStandby()
    await this.#primary?.stop()
  }

  #newDir(): string {
    const dir = join(this.#dir, `pg${++this.#nodes}`)
    mkdirSync(dir, { recursive: true })
    return dir
  }

  async #kill(): Promise<void> {
    const server = this.#primary
    this.#primary = undefined
    await crash(server)
  }
}

async function crash(server: EmbeddedPostgres | undefined): Promise<void> {
  if (server === undefined) return
  process.kill(server.pid, 'SIGKILL')
  // Its backends notice at their next wait.
  await sleep(200)
  await server.stop()
}

/** A private Redis, with a dump of an earlier time. */
export class RedisServer implements AsyncDisposable {
  readonly #dir: string
  readonly #file: string
  readonly #env: NodeJS.ProcessEnv
  #process: ChildProcess | undefined
  #admin: Redis | undefined

  private constructor(dir: string, file: string, env: NodeJS.ProcessEnv) {
    this.#dir = dir
    this.#file = file
    this.#env = env
  }

  static async start(dir: string, cacheDir: string): Promise<RedisServer> {
    const { file, env } = await findRedis(cacheDir, console.log)
    const home = join(dir, 'redis')
    mkdirSync(home, { recursive: true })
    const redis = new RedisServer(home, file, env)
    await redis.restart('empty')
    return redis
  }

  get target(): { path: string } {
    return { path: join(this.#dir, 'redis.sock') }
  }

  async flush(): Promise<void> {
    await this.#admin?.flushall().catch(() => {})
  }

  /** Takes away each key with this probability. */
  async evict(random: () => number, share: number): Promise<void> {
    const keys = (await this.#admin?.keys('*').catch(() => [])) ?? []
    const gone = keys.filter(() => random() < share)
    if (gone.length > 0) await this.#admin?.del(...gone).catch(() => {})
  }

  /** What `restart('dump')` brings back. */
  async dump(): Promise<void> {
    await this.#admin?.save().catch(() => {})
    if (existsSync(join(this.#dir, 'dump.rdb')))
      copyFileSync(join(this.#dir, 'dump.rdb'), join(this.#dir, 'old.rdb'))
  }

  /** Kills it, and starts it again with nothing or with the dump. */
  async restart(content: 'empty' | 'dump'): Promise<void> {
    await this.kill()
    rmSync(join(this.#dir, 'dump.rdb'), { force: true })
    const old = join(this.#dir, 'old.rdb')
    if (content === 'dump' && existsSync(old)) copyFileSync(old, join(this.#dir, 'dump.rdb'))
    const { path } = this.target
    rmSync(path, { force: true })
    const args = [
      '--port',
      '0',
      '--unixsocket',
      'redis.sock',
      '--save',
      '',
      '--appendonly',
      'no',
      '--loglevel',
      'warning',
    ]
    this.#process = spawn(this.#file, args, { cwd: this.#dir, env: this.#env, stdio: 'ignore' })
    while (!(await answers(path))) await sleep(10)
    this.#admin = new Redis({
      path,
      maxRetriesPerRequest: 0,
      retryStrategy: () => null,
      commandTimeout: 3000,
    })
    this.#admin.on('error', () => {})
  }

  signal(signal: 'SIGSTOP' | 'SIGCONT'): void {
    this.#process?.kill(signal)
  }

  async kill(): Promise<void> {
    this.#admin?.disconnect()
    const child = this.#process
    this.#process = undefined
    if (child === undefined || child.exitCode !== null || child.signalCode !== null) return
    const gone = new Promise((done) => child.once('exit', done))
    child.kill('SIGKILL')
    await gone
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.kill()
  }
}

function answers(path: string): Promise<boolean> {
  return new Promise((done) => {
    const socket = connect(path, () => socket.write('PING\r\n'))
    socket.once('data', (bytes) => {
      done(`${bytes}`.startsWith('+PONG'))
      socket.destroy()
    })
    socket.once('error', () => done(false))
  })
}

/** One instance, which may die and come back: its address changes with its incarnation. */
export class Instance implements AsyncDisposable {
  readonly name: string
  readonly #root: string
  readonly #env: Readonly<Record<string, string>>
  readonly #logFile: string
  readonly #nodeArguments: readonly string[]
  #process: ChildProcess | undefined
  address = ''
  /** Of health and metrics over HTTP. */
  admin = ''
  incarnation = 0
  stopped = false

  constructor(
    name: string,
    root: string,
    env: Readonly<Record<string, string>>,
    logFile: string,
    nodeArguments: readonly string[] = ['--max-semi-space-size=8'],
  ) {
    this.name = name
    this.#root = root
    this.#env = env
    this.#logFile = logFile
    this.#nodeArguments = nodeArguments
  }

  /** Starts it; resolves when it serves. Throws when it ends or takes too long. */
  async start(): Promise<void> {
    const { promise, resolve, reject } = Promise.withResolvers<{ grpc: string; admin: string }>()
    const child = spawn(process.execPath, [...this.#nodeArguments, join(this.#root, 'src', 'main.ts')], {
      cwd: this.#root,
      env: { PATH: process.env['PATH'] ?? '', HOME: process.env['HOME'] ?? '/tmp', ...this.#env },
      stdio: ['ignore', 'pipe', 'pipe'],
    })
    this.#process = child
    let out = ''
    child.stdout?.on('data', (bytes) => {
      out += bytes
      const [, grpc, admin] = /"ready":true,"grpc":"([^"]+)","admin":"([^"]+)"/.exec(out) ?? []
      if (grpc !== undefined && admin !== undefined) resolve({ grpc, admin })
    })
    child.stderr?.on('data', (bytes) => appendFileSync(this.#logFile, bytes))
    child.once('exit', (code, signal) =>
      reject(new Error(`${this.name} ended (${code ?? signal}): ${lastOf(this.#logFile)}`)),
    )
    const timer = setTimeout(() => reject(new Error(`${this.name} did not start within 60 s`)), 60_000)
    try {
      const { grpc, admin } = await promise
      this.address = grpc
      this.admin = admin
      this.incarnation++
    } finally {
      clearTimeout(timer)
    }
  }

  /** The process's id; 0 while there is none. */
  get pid(): number {
    return this.#process?.pid ?? 0
  }

  get running(): boolean {
    return this.#process !== undefined && this.#process.exitCode === null && this.#process.signalCode === null
  }

  stop(): void {
    this.stopped = true
    this.#process?.kill('SIGSTOP')
  }

  resume(): void {
    this.stopped = false
    this.#process?.kill('SIGCONT')
  }

  /** Resolves when it is gone. */
  async kill(signal: 'SIGKILL' | 'SIGTERM' = 'SIGKILL'): Promise<void> {
    const child = this.#process
    this.#process = undefined
    if (child === undefined || child.exitCode !== null || child.signalCode !== null) return
    const gone = new Promise((done) => child.once('exit', done))
    child.kill(signal)
    if (this.stopped) this.resume()
    await gone
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.kill()
  }
}

function lastOf(file: string): string {
  return existsSync(file) ? readFileSync(file, 'utf8').trimEnd().split('\n').slice(-3).join(' / ') : ''
}

/** A short name for a directory of sources, for databases and directories. */
export const digestOf = (text: string) => createHash('sha256').update(text).digest('hex').slice(0, 8)
