/**
 * What a hot read costs the client and the service together, by way of reading: calls of their own, calls that share a
 * pipeline, calls of one tick that are joined into a batch (which only this program does), one batch, and the near cache;
 * a hundred at a time, and one at a time. `node bench/client/reads.ts [seconds]`, against a service on 127.0.0.1:50051
 * or ITEMCACHE_TARGET.
 */
import { connect } from '../../clients/typescript/src/index.ts'

const SECONDS = Number(process.argv[2] ?? 3)
const TOGETHER = 100
const target = process.env['ITEMCACHE_TARGET'] ?? '127.0.0.1:50051'
const options = { timeoutMs: 10_000, tenant: 'bench' }

await using unary = connect(target, options)
await using piped = connect(target, { ...options, pipeline: true })
await using near = connect(target, { ...options, nearCache: {} })
const ids = Array.from({ length: TOGETHER }, (_, i) => `bench-${i}`)
for (const id of ids) await unary.update({ id, title: id }, { allowMissing: true })
while (near.nearStats()?.state !== 'current') await new Promise((resolve) => setTimeout(resolve, 20))

/** The result for an id, out of the batch of all that are asked for in one tick. */
let tick: { readonly ids: string[]; readonly batch: ReturnType<typeof unary.getMany> } | undefined
async function joined(id: string) {
  if (tick === undefined) {
    const ids: string[] = []
    const batch = Promise.resolve().then(() => {
      tick = undefined
      return unary.getMany(ids)
    })
    tick = { ids, batch }
  }
  tick.ids.push(id)
  return (await tick.batch).get(id)
}

async function measure(name: string, round: () => Promise<unknown>, together = TOGETHER): Promise<void> {
  for (let i = 0; i < 20; i++) await round()
  const beganMs = performance.now()
  let rounds = 0
  while (performance.now() - beganMs < SECONDS * 1000) {
    await round()
    rounds++
  }
  const perSecond = (rounds * together * 1000) / (performance.now() - beganMs)
  console.log(`${name.padEnd(28)}${Math.round(perSecond).toLocaleString('en').padStart(12)} reads/s`)
}

await measure('get, calls of their own', () => Promise.all(ids.map((id) => unary.get(id))))
await measure('get, pipeline', () => Promise.all(ids.map((id) => piped.get(id))))
await measure('get, joined by tick', () => Promise.all(ids.map((id) => joined(id))))
await measure('getMany (one batch)', () => unary.getMany(ids))
await measure('get, near cache', () => Promise.all(ids.map((id) => near.get(id))))

let turn = 0
const next = () => ids[turn++ % TOGETHER] ?? ''
await measure('one at a time, own calls', () => unary.get(next()), 1)
await measure('one at a time, pipeline', () => piped.get(next()), 1)
await measure('one at a time, joined', () => joined(next()), 1)
await measure('one at a time, near cache', () => near.get(next()), 1)
