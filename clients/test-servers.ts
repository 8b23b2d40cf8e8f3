/**
 * Real servers for tests that are not written in TypeScript: two that share a database and keep their addresses while they
 * are killed and started again, and one that asks for TLS and a token.
 *
 * When all are ready it prints a line of JSON. Each line of stdin is a command (`kill 0`, `start 0`, `kill 1`, `start 1`) and
 * is answered by one, `{"done": …}`. The end of stdin ends everything.
 */
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import pg from 'pg'
import { Instance } from '../test/consistency/servers.ts'
import { Way } from '../test/consistency/way.ts'
import { newAuthority, newToken, temporaryFiles, tokenLine } from '../test/support/credentials.ts'
import { findPostgres, findRedis } from '../test/support/global-setup.ts'
import { makeRunDirectory } from '../test/support/run-directory.ts'
import { ROOT } from './toolchains.ts'

const DATABASE = `itemcache_clients_${process.pid}`

await using started = new AsyncDisposableStack()
const directory = started.use(makeRunDirectory())
const [postgres, redis] = await Promise.all([findPostgres(started, directory), findRedis(started, directory)])
await administer(`CREATE DATABASE ${DATABASE}`)
started.defer(() => administer(`DROP DATABASE ${DATABASE} WITH (FORCE)`))
const databaseUrl = new URL(postgres.url)
databaseUrl.pathname = `/${DATABASE}`

/** Without a time limit: a busy machine takes its time. */
async function administer(statement: string): Promise<void> {
  const client = new pg.Client(postgres.url)
  await client.connect()
  try {
    await client.query(statement)
  } finally {
    await client.end()
  }
}

function instance(name: string, env: Readonly<Record<string, string>> = {}): Instance {
  const common = {
    DATABASE_URL: databaseUrl.href,
    REDIS_URL: redis.url,
    ORIGIN_URL: 'off',
    ITEMCACHE_LISTEN: '127.0.0.1:0',
    ITEMCACHE_ADMIN_LISTEN: 'off',
    ITEMCACHE_DATA_DIR: join(directory.path, name),
  }
  return started.use(new Instance(name, ROOT, { ...common, ...env }, join(directory.path, `${name}.log`)))
}

/** An instance behind an address that stays, whatever port it gets. */
class Server {
  readonly way: Way
  readonly #instance: Instance

  constructor(way: Way, behind: Instance) {
    this.way = way
    this.#instance = behind
  }

  async start(): Promise<void> {
    await this.#instance.start()
    const [, port] = /:(\d+)$/.exec(this.#instance.address) ?? []
    this.way.retarget({ host: '127.0.0.1', port: Number(port) })
  }

  async kill(): Promise<void> {
    await this.#instance.kill('SIGKILL')
    this.way.retarget(undefined)
  }
}

async function server(name: string): Promise<Server> {
  const way = started.use(await Way.to({ host: '127.0.0.1', port: 1 }))
  way.retarget(undefined)
  return new Server(way, instance(name))
}

const files = started.use(temporaryFiles())
const authority = await newAuthority('Tests')
const { cert, key } = await authority.issue('localhost')
const [writer, reader] = [newToken(), newToken()]
const secure = instance('secure', {
  ITEMCACHE_AUTH: `tokens:${files.write('tokens', tokenLine(writer, 'acme', 'writer') + tokenLine(reader, 'acme', 'reader'))}`,
  ITEMCACHE_TLS_CERT: files.write('cert.pem', cert),
  ITEMCACHE_TLS_KEY: files.write('key.pem', key),
})

const servers = [await server('a'), await server('b')]
// The first one makes the tables.
await servers[0]?.start()
await Promise.all([servers[1]?.start(), secure.start()])

const say = (message: object) => process.stdout.write(`${JSON.stringify(message)}\n`)
say({
  targets: servers.map(({ way }) => `127.0.0.1:${way.port}`),
  secure: { target: secure.address, ca: authority.cert, writer, reader },
})
for await (const line of createInterface({ input: process.stdin })) {
  const [, command, index] = /^(kill|start) ([01])$/.exec(line) ?? []
  const chosen = servers[Number(index)]
  if (chosen === undefined) throw new Error(`no such command: ${line}`)
  await (command === 'kill' ? chosen.kill() : chosen.start())
  say({ done: line })
}
