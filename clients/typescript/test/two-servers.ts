/** Two servers as processes of their own, on one database and on addresses that they keep: one can be killed and started again. */
import { once } from 'node:events'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { Instance } from '../../../test/consistency/servers.ts'
import { makeRunDirectory } from '../../../test/support/run-directory.ts'
import { freshDatabase, redisUrl } from '../../../test/support/servers.ts'

export interface TwoServers extends AsyncDisposable {
  readonly targets: readonly [string, string]
  readonly servers: readonly [Instance, Instance]
}

export async function startTwoServers(): Promise<TwoServers> {
  await using started = new AsyncDisposableStack()
  const directory = started.use(makeRunDirectory())
  const database = started.use(await freshDatabase())
  const start = async (name: string) => {
    const target = `127.0.0.1:${await freePort()}`
    const env = {
      DATABASE_URL: database.url,
      REDIS_URL: redisUrl(),
      ORIGIN_URL: 'off',
      ITEMCACHE_LISTEN: target,
      ITEMCACHE_ADMIN_LISTEN: 'off',
      ITEMCACHE_DATA_DIR: join(directory.path, name),
    }
    const root = join(import.meta.dirname, '..', '..', '..')
    const server = started.use(new Instance(name, root, env, join(directory.path, `${name}.log`)))
    await server.start()
    return { target, server }
  }
  const a = await start('a')
  const b = await start('b')
  const running = started.move()
  return {
    targets: [a.target, b.target],
    servers: [a.server, b.server],
    [Symbol.asyncDispose]: () => running.disposeAsync(),
  }
}

async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const address = server.address()
  server.close()
  await once(server, 'close')
  if (address === null || typeof address === 'string') throw new Error('there is no free port')
  return address.port
}
