/** TLS in front of a PostgreSQL that has none: it speaks its protocol up to the handshake and passes on what comes then. */
import { once } from 'node:events'
import { type AddressInfo, connect, createServer, type Socket } from 'node:net'
import { createSecureContext, TLSSocket } from 'node:tls'
import { Client } from 'pg'
import type { Pair } from './credentials.ts'

/** Length 8 and the code by which a client asks for TLS. */
const SSL_REQUEST = Buffer.from([0, 0, 0, 8, 4, 210, 22, 47])

export interface PostgresTls extends AsyncDisposable {
  /** The database's URL by this way; `parameters` say how the client is to trust it. */
  url(parameters: Readonly<Record<string, string>>): string
  /** Connections that asked for TLS, and those that did not. */
  readonly asked: { tls: number; plain: number }
}

export async function tlsTo(databaseUrl: string, pair: Pair): Promise<PostgresTls> {
  const { host, port, user, password, database } = new Client(databaseUrl)
  const target = host.startsWith('/') ? { path: `${host}/.s.PGSQL.${port}` } : { host, port }
  const secureContext = createSecureContext(pair)
  const sockets = new Set<Socket>()
  const asked = { tls: 0, plain: 0 }
  const hold = (socket: Socket) => {
    sockets.add(socket)
    return socket.on('error', () => {}).on('close', () => sockets.delete(socket))
  }
  const server = createServer((near) => {
    hold(near).once('data', (first: Buffer) => {
      if (!first.equals(SSL_REQUEST)) {
        asked.plain += 1
        near.destroy()
        return
      }
      asked.tls += 1
      near.write('S')
      const secure = hold(new TLSSocket(near, { isServer: true, secureContext }))
      const far = hold(connect(target))
      secure.pipe(far).pipe(secure)
      secure.on('close', () => far.destroy())
      far.on('close', () => secure.destroy())
    })
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const address = server.address() as AddressInfo
  return {
    asked,
    url(parameters) {
      const url = new URL(`postgres://127.0.0.1:${address.port}/${database}`)
      url.username = user ?? ''
      url.password = `${password ?? ''}`
      for (const [name, value] of Object.entries(parameters)) url.searchParams.set(name, value)
      return url.href
    },
    async [Symbol.asyncDispose]() {
      const closed = once(server, 'close')
      server.close()
      for (const socket of sockets) socket.destroy()
      await closed
    },
  }
}
