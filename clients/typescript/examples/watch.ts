/** Writes an item and watches what happens. `node examples/watch.ts [target]` */
import { connect } from '@itemcache/client'

const target = process.argv[2] ?? '127.0.0.1:50051'
await using client = connect(target, { clientId: 'the-example', timeoutMs: 5000 })

for await (const message of client.watch()) {
  switch (message.kind) {
    case 'started':
      await client.update({ id: 'watched', title: 'Watched' }, { allowMissing: true })
      await client.delete('watched')
      continue
    case 'event':
      console.log(message.event, message.ids.join(' '), 'by', message.clientId)
      break
    case 'gap':
      console.log('everything older than', message.through, 'is in doubt')
      break
    case 'disconnected':
      console.log('disconnected, and trying again:', message.error.message)
  }
  if (message.kind === 'event' && message.event === 'deleted') break
}
