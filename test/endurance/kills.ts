/**
 * `npm run kills -- --times N`: an instance is killed with SIGKILL, N times, in the middle of writes, and started again.
 * Every write that was acknowledged must be there: its revision in the log, its item as new as that, for SQL and for who
 * asks the next instance. Writers whose call broke off repeat it with its request id until they are told the outcome:
 * each write must have happened once.
 */
import { mkdirSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { status } from '@grpc/grpc-js'
import { startPostgres } from '../../src/embedded/postgres.ts'
import { Caller, isFailed } from '../consistency/client.ts'
import { connectSql, Instance, RedisServer } from '../consistency/servers.ts'
import { makeRunDirectory } from '../support/run-directory.ts'
import { seededRandom } from '../support/zipf.ts'

const ROOT = resolve(import.meta.dirname, '../..')
const TENANT = 'kills'
const WRITERS = 8
/** Items that all writers update in turn; the others are created, each once. */
const SHARED = ['shared-1', 'shared-2', 'shared-3']
/** Acknowledged writes of an incarnation before it may be killed, and how much later that is at most. */
const BEFORE_KILL = { writes: 10, moreMs: 150 }

interface Acknowledged {
  readonly id: string
  readonly revision: number
}

export interface Kills {
  readonly kills: number
  readonly acknowledged: number
  /** Calls that a kill broke off, and of these how many had been committed all the same, as their retries told. */
  readonly brokenOff: number
  readonly committedUnheard: number
  /** What must not be, in words. */
  readonly problems: readonly string[]
}

export async function kills(options: {
  readonly times: number
  /** A database of its own, and the same as a superuser. */
  readonly databaseUrl: string
  readonly superuserUrl: string
  readonly redisUrl: string
  readonly directory: string
  readonly seed?: number
  readonly progress?: (line: string) => void
}): Promise<Kills> {
  const { times, databaseUrl, superuserUrl, redisUrl, directory, seed = 1, progress = () => {} } = options
  const random = seededRandom(seed)
  mkdirSync(directory, { recursive: true })
  const env = {
    DATABASE_URL: databaseUrl,
    REDIS_URL: redisUrl,
    ORIGIN_URL: 'off',
    ITEMCACHE_LISTEN: '127.0.0.1:0',
    ITEMCACHE_ADMIN_LISTEN: 'off',
    ITEMCACHE_LOG_LEVEL: 'warn',
  }
  await using instance = new Instance('service', ROOT, env, join(directory, 'service.log'))
  const acknowledged: Acknowledged[] = []
  const problems: string[] = []
  let [brokenOff, committedUnheard, over] = [0, 0, false]
  let caller: Caller | undefined
  let alive = Promise.withResolvers<void>()
  await using sql = await connectSql(superuserUrl)

  let asking: Promise<unknown> = Promise.resolve()
  /** A connection takes one question at a time. */
  const isCommitted = (requestId: string): Promise<boolean> => {
    const answer = asking.then(async () => {
      const values = [TENANT, requestId]
      const { rowCount } = await sql.query(
        'SELECT FROM requests WHERE tenant = $1 AND request_id = $2',
        values,
      )
      return rowCount === 1
    })
    asking = answer.catch(() => {})
    return answer
  }
  const write = async (id: string, title: string): Promise<void> => {
    const requestId = `${id}-${title}`
    for (;;) {
      await alive.promise
      if (caller === undefined) return
      const answer = await caller.call(
        'updateItem',
        { item: { id, title }, allowMissing: true, requestId },
        { metadata: { 'x-tenant-id': TENANT }, timeoutMs: 30_000 },
      )
      if (!isFailed(answer)) {
        const revision = Number(answer.revision)
        acknowledged.push({ id, revision })
        if (answer.item?.title !== title) problems.push(`${requestId}: acknowledged as ${answer.item?.title}`)
        return
      }
      if (answer.code !== status.UNAVAILABLE && answer.code !== status.ABORTED) {
        problems.push(`${requestId}: ${answer.text}`)
        return
      }
      brokenOff++
      // Whether it was committed is asked before it is repeated.
      if (await isCommitted(requestId)) committedUnheard++
      await sleep(20)
    }
  }
  const writing = Array.from({ length: WRITERS }, async (_, n) => {
    for (let i = 0; !over; i++) {
      const shared = SHARED[(n + i) % SHARED.length] ?? ''
      await write(i % 4 === 0 ? shared : `own-${n}-${i}`, `${n}.${i}`)
    }
  })

  let checked = 0
  for (let killed = 0; ; killed++) {
    await instance.start()
    const own = new Caller(instance.address)
    // What was acknowledged before the last kill is what the next instance answers.
    for (const { id, revision } of acknowledged.slice(checked)) {
      const answer = await own.call(
        'getItem',
        { id, options: { minRevision: BigInt(revision) } },
        { metadata: { 'x-tenant-id': TENANT }, timeoutMs: 30_000 },
      )
      if (isFailed(answer)) problems.push(`${id}: acknowledged at ${revision}, then ${answer.text}`)
      else if (Number(answer.revision) < revision) problems.push(`${id}: older than ${revision}`)
    }
    checked = acknowledged.length
    caller = own
    alive.resolve()
    if (killed === times) break
    const goal = acknowledged.length + BEFORE_KILL.writes
    while (acknowledged.length < goal && instance.running && problems.length < 10) await sleep(5)
    await sleep(random() * BEFORE_KILL.moreMs)
    alive = Promise.withResolvers()
    if (!instance.running) problems.push('the service ended by itself')
    await instance.kill()
    own.close()
    if ((killed + 1) % 10 === 0) {
      progress(
        `${killed + 1} kills, ${acknowledged.length} writes acknowledged, ${brokenOff} broken off, ${problems.length} problems`,
      )
    }
    if (problems.length >= 10) break
  }
  over = true
  if (problems.length >= 10) caller = undefined
  alive.resolve()
  await Promise.all(writing)
  caller?.close()

  problems.push(...(await missing(sql, acknowledged)))
  return {
    kills: instance.incarnation - 1,
    acknowledged: acknowledged.length,
    brokenOff,
    committedUnheard,
    problems,
  }
}

/** What of the acknowledged writes is not in the database, or is there more than once. */
async function missing(
  sql: Awaited<ReturnType<typeof connectSql>>,
  acknowledged: readonly Acknowledged[],
): Promise<string[]> {
  const problems: string[] = []
  const { rows: log } = await sql.query<{ revision: number; ids: string[] }>(
    'SELECT revision, ids FROM invalidations WHERE tenant = $1 ORDER BY revision',
    [TENANT],
  )
  const { rows: items } = await sql.query<Acknowledged>(
    'SELECT id, revision FROM items WHERE tenant = $1 AND NOT deleted',
    [TENANT],
  )
  const logged = new Map(log.map(({ revision, ids }) => [revision, ids]))
  const newest = new Map(items.map(({ id, revision }) => [id, revision]))
  for (const { id, revision } of acknowledged) {
    if (!logged.get(revision)?.includes(id)) problems.push(`${id}: revision ${revision} is not in the log`)
    if ((newest.get(id) ?? 0) < revision)
      problems.push(`${id}: acknowledged at ${revision}, ${newest.get(id)} is there`)
  }
  const revisions = new Set(acknowledged.map(({ revision }) => revision))
  for (const { revision, ids } of log) {
    // Every writer was told the outcome in the end.
    if (!revisions.has(revision)) problems.push(`${ids}: revision ${revision} was acknowledged to nobody`)
  }
  if (revisions.size !== acknowledged.length) problems.push('two writes were acknowledged with one revision')
  return problems
}

if (process.argv[1] === import.meta.filename) {
  const { values } = parseArgs({
    options: { times: { type: 'string', default: '100' }, seed: { type: 'string', default: '1' } },
  })
  await using directory = makeRunDirectory()
  await using postgres = await startPostgres({ dataDir: directory.path })
  directory.ends(postgres.pid, 'SIGQUIT')
  await using redis = await RedisServer.start(directory.path, join(ROOT, '.itemcache', 'cache'))
  const result = await kills({
    times: Number(values.times),
    databaseUrl: postgres.serviceUrl,
    superuserUrl: postgres.url,
    redisUrl: `unix:${redis.target.path}`,
    directory: join(directory.path, 'kills'),
    seed: Number(values.seed),
    progress: console.log,
  })
  console.log(
    `${result.kills} kills, ${result.acknowledged} writes acknowledged; ${result.brokenOff} calls broken off, of which ` +
      `${result.committedUnheard} had been committed; ${result.problems.length} problems`,
  )
  for (const problem of result.problems.slice(0, 20)) console.log(`PROBLEM: ${problem}`)
  process.exitCode = result.problems.length === 0 ? 0 : 1
}
