/** Reads through a near cache, and shows what it does. `node examples/near-cache.ts [target]` */
import { connect } from '@itemcache/client'

const target = process.argv[2] ?? '127.0.0.1:50051'
await using client = connect(target, {
  nearCache: { maxEntries: 10_000, maxBytes: 16 * 1024 * 1024 },
  timeoutMs: 5000,
})

// Until the invalidation stream has begun, every read goes to the service.
while (client.nearStats()?.state !== 'current') await new Promise((resolve) => setTimeout(resolve, 20))

for (let i = 1, isNear = false; !isNear; i++) {
  const { item, near } = await client.get('1')
  console.log(`read ${i}: ${item?.title}, from the ${near ? 'near cache' : 'service'}`)
  isNear = near
}
await client.invalidate({ ids: ['1'] })
console.log(`after an invalidation: from the ${(await client.get('1')).near ? 'near cache' : 'service'}`)
const { hits, misses, state } = client.nearStats() ?? {}
console.log(`${hits} hits, ${misses} misses, ${state}`)
