/**
 * What a hot read costs the client and the service together, by way of reading: calls of their own, calls that share a
 * pipeline, one batch, and the near cache. `node bench/client/reads.ts [seconds]`, against a service on 127.0.0.1:50051
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

async function measure(name: string, round: () => Promise<unknown>): Promise<void> {
  await round()
  const beganMs = performance.now()
  let rounds = 0
  while (performance.now() - beganMs < SECONDS * 1000) {
    await round()
    rounds++
  }
  const perSecond = (rounds * TOGETHER * 1000) / (performance.now() - beganMs)
  console.log(`${name.padEnd(28)}${Math.round(perSecond).toLocaleString('en').padStart(12)} reads/s`)
}

await measure('get, calls of their own', () => Promise.all(ids.map((id) => unary.get(id))))
await measure('get, pipeline', () => Promise.all(ids.map((id) => piped.get(id))))
await measure('getMany (one batch)', () => unary.getMany(ids))
await measure('get, near cache', () => Promise.all(ids.map((id) => near.get(id))))
