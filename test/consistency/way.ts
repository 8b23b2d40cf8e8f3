/**
 * A TCP way to a server that misbehaves on command: what one instance sees of PostgreSQL or Redis. The server itself stays
 * well. A byte that was swallowed is never made up for, so the connections that lost one are broken when the fault ends.
 */
import { once } from 'node:events'
import { type AddressInfo, connect, createServer, type NetConnectOpts, type Socket } from 'node:net'

/** What happens to bytes. `up`: to the server; `down`: to the client. */
export interface Fault {
  /** Connections are broken and new ones refused. */
  readonly cut?: boolean
  /** Bytes are swallowed: a half-open connection when it is one direction, a black hole when it is both. */
  readonly dropUp?: boolean
  readonly dropDown?: boolean
  /** Bytes arrive so much later, in milliseconds. */
  readonly delayUpMs?: number
  readonly delayDownMs?: number
}

export const NO_FAULT: Fault = {}

interface Pair {
  readonly near: Socket
  readonly far: Socket
  lossy: boolean
}

export class Way implements AsyncDisposable {
  readonly port: number
  readonly #server: ReturnType<typeof createServer>
  readonly #pairs = new Set<Pair>()
  #target: NetConnectOpts | undefined
  #fault: Fault = NO_FAULT

  private constructor(server: ReturnType<typeof createServer>) {
    this.#server = server
    this.port = (server.address() as AddressInfo).port
    server.on('connection', (near) => this.#accept(near))
  }

  static async to(target: NetConnectOpts): Promise<Way> {
    const server = createServer()
    server.listen(0, '127.0.0.1')
    await once(server, 'listening')
    const proxy = new Way(server)
    proxy.#target = target
    return proxy
  }

  /** For new connections; those that are open are broken unless they are to be kept. `undefined`: none for now. */
  retarget(target: NetConnectOpts | undefined, keepsOpen = false): void {
    this.#target = target
    if (keepsOpen) return
    for (const pair of this.#pairs) destroy(pair)
  }

  /** Returns what ends the fault, unless another has replaced it by then. */
  setFault(fault: Fault): () => void {
    const healed = !fault.dropUp && !fault.dropDown
    this.#fault = fault
    for (const pair of this.#pairs) if (fault.cut || (healed && pair.lossy)) destroy(pair)
    return () => {
      if (this.#fault === fault) this.setFault(NO_FAULT)
    }
  }

  /** Breaks what is open now; new connections are taken. */
  breakAll(): void {
    for (const pair of this.#pairs) destroy(pair)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    const closed = once(this.#server, 'close')
    this.#server.close()
    this.breakAll()
    await closed
  }

  #accept(near: Socket): void {
    if (this.#fault.cut || this.#target === undefined) {
      near.destroy()
      return
    }
    const pair: Pair = { near, far: connect(this.#target), lossy: false }
    this.#pairs.add(pair)
    this.#pump(pair, near, pair.far, 'up')
    this.#pump(pair, pair.far, near, 'down')
  }

  #pump(pair: Pair, from: Socket, to: Socket, way: 'up' | 'down'): void {
    let last = Promise.resolve()
    const after = (ms: number, act: () => void) => {
      // Each waits for the one before it, so that a shorter delay overtakes nothing.
      const slept = ms > 0 ? new Promise<void>((done) => setTimeout(done, ms)) : undefined
      if (slept === undefined && idle) return act()
      idle = false
      const mine = Promise.all([last, slept]).then(() => {
        act()
        if (last === mine) idle = true
      })
      last = mine
    }
    let idle = true
    from.setNoDelay(true)
    from.on('data', (bytes: Buffer) => {
      const { dropUp, dropDown, delayUpMs = 0, delayDownMs = 0 } = this.#fault
      if (way === 'up' ? dropUp : dropDown) {
        pair.lossy = true
        return
      }
      after(way === 'up' ? delayUpMs : delayDownMs, () => {
        if (pair.lossy) return
        if (!to.destroyed) to.write(bytes)
      })
    })
    from.on('error', () => {})
    from.on('close', () => {
      this.#pairs.delete(pair)
      // What was sent before the end arrives before it, a SET whose sender has given up, say.
      after(0, () => (to.writable ? to.end() : to.destroy()))
      setTimeout(() => to.destroy(), 2000).unref()
    })
  }
}

function destroy(pair: Pair): void {
  pair.lossy = true
  pair.near.destroy()
  pair.far.destroy()
}
