/** A listener in front of a server that passes bytes on and counts what clients ask. */
import { type AddressInfo, connect, createServer, type Socket } from 'node:net'

export interface Proxy extends AsyncDisposable {
  readonly port: number
}

/** `asked` gets what a client sends, per connection; `answered` is told of each piece that comes back. */
export async function startProxy(
  socketPath: string,
  newConnection: () => { asked(chunk: Buffer): void; answered(): void },
): Promise<Proxy> {
  const open = new Set<Socket>()
  const server = createServer((client) => {
    const connection = newConnection()
    const behind = connect(socketPath)
    for (const socket of [client, behind]) {
      open.add(socket)
      socket.setNoDelay(true)
      socket.on('error', () => {})
      socket.on('close', () => {
        open.delete(socket)
        client.destroy()
        behind.destroy()
      })
    }
    client.on('data', (chunk) => {
      connection.asked(chunk as Buffer)
      behind.write(chunk)
    })
    behind.on('data', (chunk) => {
      connection.answered()
      client.write(chunk)
    })
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  return {
    port: (server.address() as AddressInfo).port,
    async [Symbol.asyncDispose]() {
      for (const socket of open) socket.destroy()
      await new Promise((resolve) => server.close(resolve))
    },
  }
}

/** Counts the statements that PostgreSQL is sent, by their text. https://www.postgresql.org/docs/current/protocol-message-formats.html */
export class Statements {
  readonly executed: string[] = []

  /** The reader of one connection. */
  reader(): (chunk: Buffer) => void {
    const texts = new Map<string, string>()
    let rest: Buffer = Buffer.alloc(0)
    let started = false
    return (chunk) => {
      rest = rest.byteLength === 0 ? chunk : Buffer.concat([rest, chunk])
      for (;;) {
        // The first message has no type.
        const head = started ? 1 : 0
        if (rest.byteLength < head + 4 || rest.byteLength < head + rest.readUInt32BE(head)) return
        const end = head + rest.readUInt32BE(head)
        if (started) this.#message(rest[0] ?? 0, rest.subarray(5, end), texts)
        started = true
        rest = rest.subarray(end)
      }
    }
  }

  #message(type: number, body: Buffer, texts: Map<string, string>): void {
    const text = (from: number) => body.toString('utf8', from, body.indexOf(0, from))
    const kind = String.fromCharCode(type)
    if (kind === 'Q') this.executed.push(text(0))
    else if (kind === 'P') texts.set(text(0), text(body.indexOf(0) + 1))
    else if (kind === 'B') this.executed.push(texts.get(text(body.indexOf(0) + 1)) ?? '?')
  }
}

/** Between two questions that do not belong together. */
const QUIET_MS = 2

/** Counts round trips: what is sent without a pause, while answers may come already, is one. */
export class RoundTrips {
  count = 0

  reader(): { asked(): void; answered(): void } {
    let latestMs = Number.NEGATIVE_INFINITY
    return {
      asked: () => {
        const nowMs = performance.now()
        if (nowMs - latestMs > QUIET_MS) this.count++
        latestMs = nowMs
      },
      answered: () => {},
    }
  }
}
