/** A way to a PostgreSQL that a test can cut: what the service sees is a server that is gone, and comes back. */
import { once } from 'node:events'
import { type AddressInfo, connect, createServer, type Socket } from 'node:net'
import { Client } from 'pg'

export interface Gateway extends AsyncDisposable {
  /** The database's URL by this way. */
  readonly url: string
  /** Breaks all connections and refuses new ones. */
  cut(): Promise<void>
  restore(): Promise<void>
}

export async function gatewayTo(databaseUrl: string): Promise<Gateway> {
  const { host, port, user, password, database } = new Client(databaseUrl)
  const target = host.startsWith('/') ? { path: `${host}/.s.PGSQL.${port}` } : { host, port }
  const sockets = new Set<Socket>()
  const server = createServer((near) => {
    const far = connect(target)
    for (const [from, to] of [
      [near, far],
      [far, near],
    ] as const) {
      sockets.add(from)
      from
        .on('error', () => {})
        .on('close', () => {
          sockets.delete(from)
          to.destroy()
        })
      from.pipe(to)
    }
  })
  const listen = async (at: number) => {
    server.listen(at, '127.0.0.1')
    await once(server, 'listening')
  }
  const cut = async () => {
    if (!server.listening) return
    const closed = once(server, 'close')
    server.close()
    for (const socket of sockets) socket.destroy()
    await closed
  }
  await listen(0)
  const own = (server.address() as AddressInfo).port
  const credentials = [user, password].map((part) => encodeURIComponent(part ?? '')).join(':')
  return {
    url: `postgres://${credentials}@127.0.0.1:${own}/${database}`,
    cut,
    restore: () => listen(own),
    [Symbol.asyncDispose]: cut,
  }
}
