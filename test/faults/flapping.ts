/** Many callers of warm items while Redis is killed and started again all the time. */
import { setTimeout as sleep } from 'node:timers/promises'
import { status } from '@grpc/grpc-js'
import { Caller, isFailed } from '../consistency/client.ts'
import { percentile } from './matrix.ts'
import { seed, TENANT, warmIds } from './traffic.ts'
import type { World } from './world.ts'

export interface FlappingOptions {
  readonly callers: number
  readonly seconds: number
  /** Redis is killed every so many seconds, and is down for half of them. */
  readonly everySeconds: number
  /** Between two reads of a caller, in milliseconds. */
  readonly pauseMs: number
}

export interface Flapped {
  readonly reads: number
  readonly kills: number
  /** By code. */
  readonly failed: ReadonlyMap<string, number>
  readonly p50Ms: number
  readonly p99Ms: number
  readonly maxMs: number
}

const CONNECTIONS = 4
const metadata = { 'x-tenant-id': TENANT }

export async function flapRedis(world: World, options: FlappingOptions): Promise<Flapped> {
  const { callers, seconds, everySeconds, pauseMs } = options
  await using sql = await world.connectSql()
  await seed(sql, 0)
  const clients = Array.from(
    { length: CONNECTIONS },
    () => new Caller(world.address, { 'grpc.use_local_subchannel_pool': 1 }),
  )
  const read = async (caller: number, turn: number) => {
    const id = warmIds[(caller + turn) % warmIds.length] ?? 'warm-0'
    const client = clients[caller % CONNECTIONS] ?? new Caller(world.address)
    return client.call('getItem', { id }, { metadata, timeoutMs: 10_000 })
  }
  for (let i = 0; i < warmIds.length; i++) {
    const answer = await read(0, i)
    if (isFailed(answer)) throw new Error(`nothing can be read: ${answer.text}`)
  }
  const tookMs: number[] = []
  const failed = new Map<string, number>()
  const over = new AbortController()
  const loops = Array.from({ length: callers }, async (_, caller) => {
    for (let turn = 0; !over.signal.aborted; turn++) {
      const startedMs = performance.now()
      const answer = await read(caller, turn)
      tookMs.push(performance.now() - startedMs)
      const code = isFailed(answer) ? status[answer.code] : undefined
      if (code !== undefined) failed.set(code, (failed.get(code) ?? 0) + 1)
      await sleep(pauseMs * (0.5 + Math.random()), undefined, { signal: over.signal }).catch(() => {})
    }
  })
  const { redis } = world.dependencies
  const endMs = performance.now() + seconds * 1000
  let kills = 0
  try {
    while (performance.now() < endMs) {
      await redis.kill()
      kills++
      await sleep(everySeconds * 500)
      await redis.restart()
      await sleep(everySeconds * 500)
    }
  } finally {
    over.abort()
    await Promise.all(loops)
    for (const client of clients) client.close()
  }
  return {
    reads: tookMs.length,
    kills,
    failed,
    p50Ms: percentile(tookMs, 50),
    p99Ms: percentile(tookMs, 99),
    maxMs: tookMs.reduce((max, ms) => Math.max(max, ms), 0),
  }
}
