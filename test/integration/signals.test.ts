/** SIGHUP, on a real process. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { status } from '@grpc/grpc-js'
import { expect, test } from 'vitest'
import { bearing, newToken, temporaryFiles, tokenLine } from '../support/credentials.ts'
import { makeRunDirectory } from '../support/run-directory.ts'
import { freshDatabase, redisUrl } from '../support/servers.ts'
import { TestClient } from '../support/service.ts'

async function startProcess(env: Record<string, string>) {
  await using started = new AsyncDisposableStack()
  const directory = started.use(makeRunDirectory())
  const database = started.use(await freshDatabase())
  const child = spawn(process.execPath, [join(import.meta.dirname, '..', '..', 'src', 'main.ts')], {
    cwd: directory.path,
    env: {
      PATH: process.env['PATH'],
      DATABASE_URL: database.url,
      REDIS_URL: redisUrl(),
      ITEMCACHE_LISTEN: '127.0.0.1:0',
      ITEMCACHE_ADMIN_LISTEN: 'off',
      ITEMCACHE_DATA_DIR: directory.path,
      ...env,
    },
    stdio: ['ignore', 'pipe', 'ignore'],
  })
  if (child.pid !== undefined) directory.ends(child.pid, 'SIGTERM')
  const exited = once(child, 'exit')
  started.defer(async () => {
    child.kill('SIGKILL')
    await exited
  })
  let address = ''
  for await (const line of createInterface({ input: child.stdout })) {
    if (!line.startsWith('{')) continue
    address = JSON.parse(line).grpc
    break
  }
  const client = started.use(new TestClient(address))
  const running = started.move()
  return { child, client, exited, [Symbol.asyncDispose]: () => running.disposeAsync() }
}

test('SIGHUP has the file of tokens read again, and the service goes on', async () => {
  using files = temporaryFiles()
  const [first, second] = [newToken(), newToken()]
  const path = files.write('tokens', tokenLine(first, 'acme', 'reader'))
  await using service = await startProcess({ ITEMCACHE_AUTH: `tokens:${path}` })
  const answer = (token: string) =>
    service.client.call('getItem', { id: '1' }, bearing(token)).then(
      () => status.OK,
      ({ code }) => code,
    )
  expect([await answer(first), await answer(second)]).toEqual([status.OK, status.UNAUTHENTICATED])
  files.write('tokens', tokenLine(second, 'acme', 'reader'))
  service.child.kill('SIGHUP')
  await expect.poll(() => answer(second), { timeout: 20_000 }).toBe(status.OK)
  expect(await answer(first)).toBe(status.UNAUTHENTICATED)
  service.child.kill('SIGTERM')
  expect(await service.exited).toEqual([0, null])
})

test('SIGHUP stops a service that has no such files', async () => {
  await using service = await startProcess({})
  service.child.kill('SIGHUP')
  expect(await service.exited).toEqual([0, null])
})
