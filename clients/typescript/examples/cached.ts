/** Keeps what is made out of items, and makes it anew when they change. `node examples/cached.ts [target]` */
import { cached, connect } from '@itemcache/client'

const target = process.argv[2] ?? '127.0.0.1:50051'
await using client = connect(target, { nearCache: {}, timeoutMs: 5000 })
while (client.nearStats()?.state !== 'current') await new Promise((resolve) => setTimeout(resolve, 20))

let rendered = 0
const page = cached(
  async (id) => {
    rendered++
    const { item } = await client.get(id)
    return `<h1>${item?.title}</h1>`
  },
  { client },
)

await Promise.all([page('1'), page('1'), page('1')])
console.log(await page('1'), `rendered ${rendered} time(s)`)
await client.invalidate({ ids: ['1'] })
await page('1')
console.log(`after an invalidation: rendered ${rendered} time(s)`)
