/**
 * Readers with near caches against writers at full speed on two servers, which are killed and started again all the time:
 * no read may be older than an event that its client has seen, than anything shown before, or than the bound.
 *
 *     npm run near-cache -- --seconds 60
 *
 * With `--broken` the near caches do not heed events: a run that finds nothing then would prove nothing.
 */

import { join, resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { startPostgres } from '../../../src/embedded/postgres.ts'
import { Instance } from '../../../test/consistency/servers.ts'
import { makeRunDirectory } from '../../../test/support/run-directory.ts'
import { type Client, connect, ItemCacheError } from '../src/index.ts'

const ROOT = resolve(import.meta.dirname, '..', '..', '..')
const IDS = Array.from({ length: 20 }, (_, i) => `k${i}`)
const TENANT = 'near'
const BOUND_MS = 1500
const WRITERS = 4
const READERS = 2
const KILL_EVERY_MS = 3000
/** How often a reader asks for an item before it goes on to the next: writers soon overtake whatever is read only once. */
const READS_IN_A_ROW = 4

export interface Summary {
  readonly reads: number
  readonly nearHits: number
  readonly failedReads: number
  readonly writes: number
  readonly kills: number
  /** The oldest that a near hit was, in milliseconds: how long before it a write that it lacks had been acknowledged. */
  readonly oldestMs: number
  /** What must not be, in words. */
  readonly violations: readonly string[]
}

interface Acknowledged {
  readonly revision: number
  readonly atMs: number
}

/** Runs for so long on a database of its own. */
export async function run(options: {
  readonly seconds: number
  readonly databaseUrl: string
  readonly directory: string
  /** Near caches that no event concerns: the run must notice. */
  readonly broken?: boolean
  readonly progress?: (line: string) => void
}): Promise<Summary> {
  const { seconds, databaseUrl, directory, progress = () => {} } = options
  await using started = new AsyncDisposableStack()
  const ports = [await freePort(), await freePort()]
  const instances = ports.map((port, i) => {
    const env = {
      DATABASE_URL: databaseUrl,
      REDIS_URL: 'off',
      ORIGIN_URL: 'off',
      ITEMCACHE_LISTEN: `127.0.0.1:${port}`,
      ITEMCACHE_ADMIN_LISTEN: 'off',
      ITEMCACHE_LOG_LEVEL: 'warn',
    }
    return started.use(new Instance(`${i}`, ROOT, env, join(directory, `near-${i}.log`)))
  })
  for (const instance of instances) await instance.start()
  const target = `ipv4:${instances.map(({ address }) => address).join(',')}`
  const newClient = (near: boolean): Client =>
    started.use(
      connect(target, {
        tenant: TENANT,
        timeoutMs: 2000,
        ...(near && { nearCache: { maxEntries: 1000 } }),
        channelOptions: { 'grpc.initial_reconnect_backoff_ms': 100, 'grpc.max_reconnect_backoff_ms': 300 },
      }),
    )
  const violations: string[] = []
  const bad = (text: string) => {
    if (violations.length < 20) violations.push(text)
  }
  const acknowledged = new Map<string, Acknowledged[]>(IDS.map((id) => [id, []]))
  let [reads, nearHits, failedReads, writes, kills, oldestMs] = [0, 0, 0, 0, 0, 0]
  let over = false
  const writer = newClient(false)
  for (const id of IDS) await writer.update({ id, title: '0' }, { allowMissing: true })

  const writing = Array.from({ length: WRITERS }, async (_, n) => {
    for (let i = 0; !over; i++) {
      const id = IDS[(n + i * WRITERS) % IDS.length] ?? ''
      try {
        const { revision } = await writer.update({ id, title: `${n}.${i}` }, { allowMissing: true })
        writes++
        acknowledged.get(id)?.push({ revision: Number(revision), atMs: performance.now() })
      } catch (error) {
        if (!(error instanceof ItemCacheError)) throw error
      }
    }
  })
  const readers = Array.from({ length: READERS }, () => newClient(true))
  if (options.broken) for (const { log } of readers.map((one) => one.nearLog())) log.judge = () => 'current'
  const reading = readers.map(async (client) => {
    const shown = new Map<string, { readonly revision: number; readonly title: string }>()
    for (let i = 0; !over; i++) {
      const id = IDS[Math.floor(i / READS_IN_A_ROW) % IDS.length] ?? ''
      const beganMs = performance.now()
      const seen = Number(client.nearStats()?.position ?? 0n)
      reads++
      try {
        const { item, near, cache } = await client.get(id, { allowStale: false })
        // What is read says which write it is of; its as-of is only what the cache believes.
        const got = Number(item?.revision)
        const from = near ? 'near' : `${cache?.tier}`
        const last = shown.get(id)
        if (last !== undefined && got < last.revision) bad(`${id} (${from}): ${got} after ${last.revision}`)
        if (last?.revision === got && last.title !== item?.title) bad(`${id}: two titles at ${got}`)
        shown.set(id, { revision: got, title: item?.title ?? '' })
        for (const { revision, atMs } of lackedBy(acknowledged.get(id) ?? [], got)) {
          if (revision <= seen) bad(`${id} (${from}): ${got}, and the stream had shown ${revision}`)
          if (atMs >= beganMs) continue
          const lateMs = Math.round(beganMs - atMs)
          if (near) oldestMs = Math.max(oldestMs, lateMs)
          if (lateMs > BOUND_MS + 20) bad(`${id} (${from}): ${got}, ${lateMs} ms after ${revision}`)
        }
        if (near) nearHits++
      } catch (error) {
        if (!(error instanceof ItemCacheError)) throw error
        failedReads++
      }
      if (i % 50 === 0) await sleep(1)
    }
  })
  const startedMs = performance.now()
  const killing = (async () => {
    for (let i = 0; !over; i++) {
      const untilMs = startedMs + (i + 1) * KILL_EVERY_MS
      while (!over && performance.now() < untilMs) await sleep(50)
      if (over) return
      const victim = instances[i % 2]
      await victim?.kill()
      kills++
      await sleep(300)
      if (!over) await victim?.start()
    }
  })()
  const lasted = (times: number) => performance.now() >= startedMs + times * seconds * 1000
  // On a busy machine it takes longer until one was killed, and until something was read before it was written again.
  while (!lasted(1) || ((kills === 0 || nearHits === 0) && !lasted(10))) {
    await sleep(Math.min(5000, seconds * 1000))
    progress(
      `${reads} reads, ${nearHits} of them near, ${writes} writes, ${kills} kills, ${violations.length} violations`,
    )
  }
  over = true
  await Promise.all([...writing, ...reading, killing])
  return { reads, nearHits, failedReads, writes, kills, oldestMs: Math.round(oldestMs), violations }
}

/** Of the writes of one item, which are in order, those that are newer than the one that was `got`. */
function* lackedBy(writes: readonly Acknowledged[], got: number): Generator<Acknowledged> {
  for (let i = writes.length - 1; i >= 0; i--) {
    const write = writes[i]
    if (write === undefined || write.revision <= got) return
    yield write
  }
}

async function freePort(): Promise<number> {
  const { createServer } = await import('node:net')
  const server = createServer()
  await new Promise<void>((done) => server.listen(0, '127.0.0.1', done))
  const { port } = server.address() as { port: number }
  await new Promise((done) => server.close(done))
  return port
}

if (process.argv[1] === import.meta.filename) {
  const { values } = parseArgs({
    options: { seconds: { type: 'string', default: '60' }, broken: { type: 'boolean', default: false } },
  })
  await using directory = makeRunDirectory()
  await using postgres = await startPostgres({ dataDir: directory.path })
  directory.ends(postgres.pid, 'SIGQUIT')
  const summary = await run({
    seconds: Number(values.seconds),
    broken: values.broken,
    databaseUrl: postgres.url,
    directory: directory.path,
    progress: (line) => process.stderr.write(`${line}\n`),
  })
  console.log(JSON.stringify(summary, undefined, 2))
  if (summary.violations.length > 0) process.exitCode = 1
}
