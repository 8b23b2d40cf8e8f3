/** A way to PostgreSQL and one to Redis on which a test can count what goes over the wire, and when. */
import { once } from 'node:events'
import { type AddressInfo, connect, createServer, type NetConnectOpts, type Socket } from 'node:net'
import { Client } from 'pg'
import { parseRedisUrl } from '../../src/tiers/redis-url.ts'

interface Way extends AsyncDisposable {
  /** The server's URL by this way. */
  readonly url: string
}

export interface SqlWay extends Way {
  /** The statements that were executed, in the order in which they were sent, with their parameters. */
  readonly statements: readonly Statement[]
}

export interface Statement {
  readonly text: string
  readonly values: readonly string[]
}

export interface RedisWay extends Way {
  readonly commands: readonly Sent[]
  /** How often commands were sent while no reply was owed: whatever follows before it has come is part of it. */
  readonly roundTrips: number
}

/** A command that was sent. `keys` and `values` count those of a script, and are 0 for all else. */
export interface Sent {
  readonly name: string
  readonly keys: number
  readonly values: number
}

export async function wayToPostgres(databaseUrl: string): Promise<SqlWay> {
  const { host, port, user, password, database } = new Client(databaseUrl)
  const statements: Statement[] = []
  const way = await proxy(
    host.startsWith('/') ? { path: `${host}/.s.PGSQL.${port}` } : { host, port },
    () => {
      const prepared = new Map<string, string>()
      let isStarted = false
      const fromClient = framed((buffer) => {
        // The first message has no type.
        const at = isStarted ? 1 : 0
        if (buffer.length < at + 4) return 0
        const end = at + buffer.readUInt32BE(at)
        if (buffer.length < end) return 0
        const text = (from: number) => buffer.toString('utf8', from, buffer.indexOf(0, from))
        const type = isStarted ? String.fromCharCode(buffer[0] ?? 0) : ''
        const name = text(5)
        if (type === 'P') prepared.set(name, text(6 + Buffer.byteLength(name)))
        if (type === 'B') {
          const at = 6 + Buffer.byteLength(name)
          const statement = text(at)
          const values = parameters(buffer, at + Buffer.byteLength(statement) + 1)
          statements.push({ text: prepared.get(statement) ?? '', values })
        }
        if (type === 'Q') statements.push({ text: name, values: [] })
        isStarted = true
        return end
      })
      return { fromClient, fromServer: () => {} }
    },
  )
  const credentials = [user, password].map((part) => encodeURIComponent(part ?? '')).join(':')
  return {
    ...way,
    url: `postgres://${credentials}@127.0.0.1:${way.port}/${database}`,
    statements,
  }
}

/** The parameters of a Bind message, from its parameters' formats on. */
function parameters(buffer: Buffer, formatsAt: number): string[] {
  let at = formatsAt + 2 + 2 * buffer.readUInt16BE(formatsAt)
  const count = buffer.readUInt16BE(at)
  at += 2
  return Array.from({ length: count }, () => {
    const size = Math.max(0, buffer.readInt32BE(at))
    at += 4 + size
    return buffer.toString('utf8', at - size, at)
  })
}

export async function wayToRedis(redisUrl: string): Promise<RedisWay> {
  const { path, nodes } = parseRedisUrl(redisUrl)
  const [node = { host: '127.0.0.1', port: 6379 }] = nodes
  const commands: Sent[] = []
  let roundTrips = 0
  const way = await proxy(path === undefined ? node : { path }, () => {
    let owed = 0
    const fromClient = framed((buffer) => {
      const parts = request(buffer)
      if (parts === undefined) return 0
      const { words } = parts
      const name = words[0]?.toLowerCase() ?? ''
      const keys = name.startsWith('eval') ? Number(words[2]) : 0
      commands.push({ name, keys, values: keys === 0 ? 0 : words.length - 3 - keys })
      if (owed === 0) roundTrips += 1
      owed += 1
      return parts.end
    })
    const fromServer = framed((buffer) => {
      const end = replyEnd(buffer, 0)
      if (end > 0) owed -= 1
      return end
    })
    return { fromClient, fromServer }
  })
  return {
    ...way,
    url: `redis://127.0.0.1:${way.port}`,
    commands,
    get roundTrips() {
      return roundTrips
    },
  }
}

/** Hands over whole messages: `take` says how long the first one is, 0 when it is not all there. */
function framed(take: (buffer: Buffer) => number): (chunk: Buffer) => void {
  let rest: Buffer = Buffer.alloc(0)
  return (chunk) => {
    rest = Buffer.concat([rest, chunk])
    for (let end = take(rest); end > 0; end = take(rest)) rest = rest.subarray(end)
  }
}

/** An array of strings, which is what clients of Redis send. */
function request(buffer: Buffer): { words: string[]; end: number } | undefined {
  let at = buffer.indexOf('\r\n') + 2
  if (at < 2) return undefined
  const words: string[] = []
  for (let left = Number(buffer.toString('latin1', 1, at - 2)); left > 0; left -= 1) {
    const start = buffer.indexOf('\r\n', at) + 2
    if (start < 2) return undefined
    const end = start + Number(buffer.toString('latin1', at + 1, start - 2))
    if (buffer.length < end + 2) return undefined
    words.push(buffer.toString('latin1', start, end))
    at = end + 2
  }
  return { words, end: at }
}

/** Where the reply that begins at `at` ends; 0 when it is not all there. */
function replyEnd(buffer: Buffer, at: number): number {
  const line = buffer.indexOf('\r\n', at) + 2
  if (line < 2) return 0
  const type = String.fromCharCode(buffer[at] ?? 0)
  const size = Number(buffer.toString('latin1', at + 1, line - 2))
  if (type === '$') {
    const end = size < 0 ? line : line + size + 2
    return end <= buffer.length ? end : 0
  }
  if (type !== '*') return line
  let end = line
  for (let left = size; left > 0 && end > 0; left -= 1) end = replyEnd(buffer, end)
  return end
}

async function proxy(
  target: NetConnectOpts,
  listenTo: () => { fromClient: (chunk: Buffer) => void; fromServer: (chunk: Buffer) => void },
): Promise<{ port: number } & AsyncDisposable> {
  const sockets = new Set<Socket>()
  const server = createServer((near) => {
    const far = connect(target)
    const { fromClient, fromServer } = listenTo()
    for (const [from, to, listen] of [
      [near, far, fromClient],
      [far, near, fromServer],
    ] as const) {
      sockets.add(from)
      from
        .on('error', () => {})
        .on('close', () => {
          sockets.delete(from)
          to.destroy()
        })
        .on('data', (chunk: Buffer) => {
          listen(chunk)
          to.write(chunk)
        })
    }
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  return {
    port: (server.address() as AddressInfo).port,
    [Symbol.asyncDispose]: async () => {
      const closed = once(server, 'close')
      server.close()
      for (const socket of sockets) socket.destroy()
      await closed
    },
  }
}
