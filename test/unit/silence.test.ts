import { once } from 'node:events'
import { type AddressInfo, connect, createServer, type Socket } from 'node:net'
import { expect, test } from 'vitest'
import { afterSilence } from '../../src/silence.ts'

test('an answer that arrives while this process is busy comes before the end of the time for it', async () => {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const client = connect((server.address() as AddressInfo).port, '127.0.0.1')
  const [[asked]] = (await Promise.all([once(server, 'connection'), once(client, 'connect')])) as [
    [Socket],
    unknown,
  ]
  const seen: string[] = []
  client.on('data', () => seen.push('answer'))
  const { promise: over, resolve } = Promise.withResolvers<void>()
  afterSilence(1, () => {
    seen.push('silence')
    resolve()
  })
  asked.write('an answer')
  const until = performance.now() + 50
  while (performance.now() < until);
  await over
  client.destroy()
  server.close()
  expect(seen).toEqual(['answer', 'silence'])
})
