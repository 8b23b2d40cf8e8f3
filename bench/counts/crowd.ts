/** What 10,000 callers of one item that nobody has yet cost the tiers below, over three instances. */
import { once } from 'node:events'
import { createServer } from 'node:http'
import { type ClientHttp2Session, connect } from 'node:http2'
import type { AddressInfo } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { startBed } from '../bed.ts'
import { type Measured, median } from '../report.ts'
import type { Run } from '../rows.ts'
import { sendItemCall } from '../rpc/send.ts'
import { Statements, startProxy } from './proxy.ts'
import { readsItems } from './tick.ts'

const CALLERS = 10_000
const INSTANCES = 3
const CONNECTIONS = 34
const ORIGIN_MS = 200

export async function run({ full, progress }: Run): Promise<readonly Measured[]> {
  const rounds = full ? 10 : 3
  await using bed = await startBed()
  let asked = 0
  const origin = createServer((request, response) => {
    asked++
    const id = Number(request.url?.split('/').at(-1))
    const product = { id, title: 'Lamp', price: 1, description: '', category: 'lighting', image: '' }
    setTimeout(
      () => response.setHeader('content-type', 'application/json').end(JSON.stringify(product)),
      ORIGIN_MS,
    )
  })
  await new Promise<void>((resolve) => origin.listen(0, '127.0.0.1', resolve))
  const sql = new Statements()
  await using proxy = await startProxy(bed.databaseSocket, () => {
    const read = sql.reader()
    return { asked: read, answered: () => {} }
  })
  const env = {
    DATABASE_URL: `postgresql://postgres@127.0.0.1:${proxy.port}/itemcache`,
    ORIGIN_URL: `http://127.0.0.1:${(origin.address() as AddressInfo).port}`,
    ITEMCACHE_MAX_CALLS: '100000',
  }
  const sessions: ClientHttp2Session[] = []
  const ready: Promise<unknown>[] = []
  for (let n = 0; n < INSTANCES; n++) {
    const { address, batchGet } = await bed.instance(env)
    await batchGet(['none'], 'default')
    for (let each = 0; each < CONNECTIONS; each++) {
      const session = connect(`http://${address}`)
      sessions.push(session)
      ready.push(once(session, 'remoteSettings'))
    }
  }
  await Promise.all(ready)
  const client = await bed.sql()
  const found: { readonly origin: number; readonly rows: number; readonly reads: number }[] = []
  for (let round = 0; round < rounds; round++) {
    await sleep(500)
    const id = `${1000 + round}`
    const before = { asked, executed: sql.executed.length }
    const answers = await Promise.all(
      Array.from({ length: CALLERS }, (_, n) => {
        const session = sessions[n % sessions.length]
        return session === undefined ? false : sendItemCall(session, 'GetItem', { id })
      }),
    )
    if (!answers.every(Boolean)) throw new Error(`${answers.filter((ok) => !ok).length} calls failed`)
    const { rows } = await client.query('SELECT count(*)::integer AS count FROM items WHERE id = $1', [id])
    found.push({
      origin: asked - before.asked,
      rows: rows[0].count,
      reads: sql.executed.slice(before.executed).filter(readsItems).length,
    })
    progress(`round ${round + 1}: ${JSON.stringify(found.at(-1))}`)
  }
  for (const session of sessions) session.close()
  origin.close()
  return [
    { row: 'crowd-origin', ours: median(found.map((each) => each.origin)) },
    { row: 'crowd-rows', ours: median(found.map(({ rows }) => rows)) },
    { row: 'crowd-sql', ours: median(found.map(({ reads }) => reads)) },
  ]
}
