/** How many statements and round trips 500 calls take that arrive together and that only PostgreSQL can answer. */
import { connect } from 'node:http2'
import { setTimeout as sleep } from 'node:timers/promises'
import { fillItems, startBed } from '../bed.ts'
import { type Measured, median } from '../report.ts'
import type { Run } from '../rows.ts'
import { ITEM_BYTES, idOf } from '../rpc/hot.ts'
import { sendItemCall } from '../rpc/send.ts'
import { RoundTrips, Statements, startProxy } from './proxy.ts'

const CALLS = 500

export async function run({ full, progress }: Run): Promise<readonly Measured[]> {
  const rounds = full ? 20 : 5
  await using bed = await startBed()
  const sql = new Statements()
  const redis = new RoundTrips()
  await using sqlProxy = await startProxy(bed.databaseSocket, () => {
    const read = sql.reader()
    return { asked: read, answered: () => {} }
  })
  await using redisProxy = await startProxy(bed.redisSocket, () => redis.reader())
  const instance = await bed.instance({
    DATABASE_URL: `postgresql://postgres@127.0.0.1:${sqlProxy.port}/itemcache`,
    REDIS_URL: `redis://127.0.0.1:${redisProxy.port}`,
    ITEMCACHE_MAX_CONCURRENT_STREAMS: '1000',
  })
  await fillItems(await bed.sql(), 'default', CALLS * (rounds + 1), ITEM_BYTES)
  // The tenant's log is known from its first reader on, and commands are known to Redis.
  await instance.batchGet([idOf(0)], 'default')
  const session = connect(`http://${instance.address}`)
  await new Promise((resolve) => session.once('remoteSettings', resolve))
  const found: { readonly statements: number; readonly trips: number }[] = []
  for (let round = 0; round <= rounds; round++) {
    // Stores and timers of the round before have had their time.
    await sleep(300)
    const before = { statements: sql.executed.length, trips: redis.count }
    const calls = Array.from({ length: CALLS }, (_, n) =>
      sendItemCall(session, 'GetItem', { id: idOf(round * CALLS + n) }),
    )
    const answers = await Promise.all(calls)
    if (!answers.every(Boolean)) throw new Error('a call failed')
    // Until here: the answers have come. What is stored behind them is not waited for.
    const statements = sql.executed.slice(before.statements).filter(readsItems).length
    const trips = redis.count - before.trips
    progress(`round ${round}: ${statements} statements, ${trips} round trips`)
    if (round > 0) found.push({ statements, trips })
  }
  session.close()
  return [
    { row: 'tick-sql', ours: median(found.map(({ statements }) => statements)) },
    { row: 'tick-redis', ours: median(found.map(({ trips }) => trips)) },
  ]
}

/** A statement that looks items up. */
export function readsItems(text: string): boolean {
  return /\bitems\b/.test(text) && !/^\s*(INSERT|UPDATE|DELETE)/i.test(text)
}
