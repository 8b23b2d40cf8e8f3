/**
 * A TCP way to a server that misbehaves on command: what one instance sees of PostgreSQL, Redis or the catalogue. The
 * server itself stays well. A byte that was swallowed is never made up for, so the connections that lost one are broken
 * when the fault ends, or stay dead for good.
 */
import { once } from 'node:events'
import { type AddressInfo, connect, createServer, type NetConnectOpts, Socket } from 'node:net'

/** What happens to bytes. `up`: to the server; `down`: to the client. */
export interface Fault {
  /** Connections are broken and new ones refused. */
  readonly cut?: boolean
  /** The same, by TCP resets. */
  readonly reset?: boolean
  /** Bytes are swallowed: a half-open connection when it is one direction, a black hole when it is both. */
  readonly dropUp?: boolean
  readonly dropDown?: boolean
  /** Bytes arrive so much later, in milliseconds. */
  readonly delayUpMs?: number
  readonly delayDownMs?: number
  /** So many pass in each direction of each connection. */
  readonly bytesPerSecond?: number
  /** Connections that lost bytes stay as they are when the fault ends: dead, and neither side is told. */
  readonly forGood?: boolean
}

export const NO_FAULT: Fault = {}

interface Pair {
  readonly near: Socket
  readonly far: Socket
  lossy: boolean
  forGood: boolean
}

export class Way implements AsyncDisposable {
  readonly port: number
  readonly #server: ReturnType<typeof createServer>
  readonly #pairs = new Set<Pair>()
  #target: NetConnectOpts | undefined
  #fault: Fault = NO_FAULT
  #changed = Promise.withResolvers<void>()

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
    this.#changed.resolve()
    this.#changed = Promise.withResolvers()
    for (const pair of this.#pairs) {
      if (fault.reset) pair.near.resetAndDestroy()
      if (fault.cut || fault.reset || (healed && pair.lossy && !pair.forGood)) destroy(pair)
    }
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
    const { cut, reset, dropUp, dropDown, forGood = false } = this.#fault
    if (reset) {
      near.on('error', () => {}).resetAndDestroy()
      return
    }
    if (cut || this.#target === undefined) {
      near.destroy()
      return
    }
    // Where nothing passes the server does not hear of the connection.
    const silent = dropUp === true && dropDown === true
    const pair: Pair = { near, far: silent ? new Socket() : connect(this.#target), lossy: silent, forGood }
    this.#pairs.add(pair)
    this.#pump(pair, near, pair.far, 'up')
    this.#pump(pair, pair.far, near, 'down')
  }

  #pump(pair: Pair, from: Socket, to: Socket, way: 'up' | 'down'): void {
    let last: Promise<void> = Promise.resolve()
    let idle = true
    const after = (ms: number, act: () => void | Promise<void>) => {
      // Each waits for the one before it, so that a shorter delay overtakes nothing.
      const slept = ms > 0 ? new Promise<void>((done) => setTimeout(done, ms)) : undefined
      const { bytesPerSecond } = this.#fault
      if (slept === undefined && idle && bytesPerSecond === undefined) return void act()
      idle = false
      const mine = Promise.all([last, slept])
        .then(() => act())
        .then(() => {
          if (last === mine) idle = true
        })
      last = mine
    }
    from.setNoDelay(true)
    from.on('data', (bytes: Buffer) => {
      const { dropUp, dropDown, delayUpMs = 0, delayDownMs = 0, forGood = false } = this.#fault
      if (pair.lossy || (way === 'up' ? dropUp : dropDown)) {
        pair.lossy = true
        pair.forGood ||= forGood
        return
      }
      after(way === 'up' ? delayUpMs : delayDownMs, () => {
        if (pair.lossy || to.destroyed) return
        if (this.#fault.bytesPerSecond === undefined) to.write(bytes)
        else return this.#trickle(bytes, from, to)
      })
    })
    from.on('error', () => {})
    from.on('close', () => {
      if (pair.lossy && pair.forGood && !to.destroyed) return
      this.#pairs.delete(pair)
      if (pair.lossy) return void to.destroy()
      // What was sent before the end arrives before it, a SET whose sender has given up, say.
      after(0, () => void (to.writable ? to.end() : to.destroy()))
      setTimeout(() => to.destroy(), 2000).unref()
    })
  }

  /** Byte by byte for as long as the fault says so; meanwhile the sender is held up. */
  async #trickle(bytes: Buffer, from: Socket, to: Socket): Promise<void> {
    from.pause()
    for (let at = 0; at < bytes.length && !to.destroyed; at++) {
      const { bytesPerSecond } = this.#fault
      if (bytesPerSecond === undefined) {
        to.write(bytes.subarray(at))
        break
      }
      to.write(bytes.subarray(at, at + 1))
      const { promise: due, resolve } = Promise.withResolvers<void>()
      const timer = setTimeout(resolve, 1000 / bytesPerSecond)
      await Promise.race([due, this.#changed.promise])
      clearTimeout(timer)
    }
    from.resume()
  }
}

function destroy(pair: Pair): void {
  pair.lossy = true
  pair.near.destroy()
  pair.far.destroy()
}
