/**
 * The streams of an HTTP/2 session, in place of the `Map` and the `Set` that Node keeps them in. V8 replaces the table of these
 * every so many additions, and leaves in the old one what was held then. Once such a table is in the old generation, which it is
 * as long as its session, the streams in it outlive every young collection, however short they were
 * (docs/performance.md#what-garbage-collection-costs).
 */
import type { Http2Session, Http2Stream } from 'node:http2'

const FIRST_PLACES = 32

/** The open streams by id: what Node asks of its `Map`. */
export class OpenStreams {
  /** 0: the place is free. The length is a power of two. */
  #ids = new Uint32Array(FIRST_PLACES)
  /** Streams that come and go have neighbouring ids, so that each has a place of its own, and a later one takes it again. */
  #places: (Http2Stream | undefined)[] = new Array(FIRST_PLACES).fill(undefined)
  /** Streams that stayed until as many others had come as there are places. */
  readonly #displaced = new Map<number, Http2Stream>()
  #size = 0

  get size(): number {
    return this.#size
  }

  /** How many open streams are in a `Map` after all. */
  get displaced(): number {
    return this.#displaced.size
  }

  get(id: number): Http2Stream | undefined {
    const place = this.#placeOf(id)
    return this.#ids[place] === id ? this.#places[place] : this.#displaced.get(id)
  }

  set(id: number, stream: Http2Stream): this {
    this.delete(id)
    this.#size++
    if (2 * this.#size > this.#ids.length) this.#grow()
    const place = this.#placeOf(id)
    const stayed = this.#places[place]
    if (stayed !== undefined) this.#displaced.set(this.#ids[place] as number, stayed)
    this.#put(place, id, stream)
    return this
  }

  delete(id: number): boolean {
    if (this.get(id) === undefined) return false
    const place = this.#placeOf(id)
    if (this.#ids[place] === id) this.#put(place, 0, undefined)
    else this.#displaced.delete(id)
    this.#size--
    return true
  }

  /** Calls back for each stream that is open now, in no particular order; it may delete any of them. */
  forEach(callback: (stream: Http2Stream) => void): void {
    for (const stream of [...this.#places, ...this.#displaced.values()]) {
      if (stream !== undefined) callback(stream)
    }
  }

  /** The lowest bit says which side opened a stream: one side's ids are all odd or all even. */
  #placeOf(id: number): number {
    return (id >>> 1) & (this.#ids.length - 1)
  }

  #put(place: number, id: number, stream: Http2Stream | undefined): void {
    this.#ids[place] = id
    this.#places[place] = stream
  }

  #grow(): void {
    const [ids, places] = [this.#ids, this.#places]
    this.#ids = new Uint32Array(2 * ids.length)
    this.#places = new Array(this.#ids.length).fill(undefined)
    for (const [at, id] of ids.entries()) if (id !== 0) this.#put(this.#placeOf(id), id, places[at])
  }
}

/** Those that have no id yet: what Node asks of its `Set`. On a server each is here for a moment, one after the other. */
export class PendingStreams {
  readonly #streams: Http2Stream[] = []

  get size(): number {
    return this.#streams.length
  }

  add(stream: Http2Stream): this {
    if (!this.#streams.includes(stream)) this.#streams.push(stream)
    return this
  }

  delete(stream: Http2Stream): boolean {
    const at = this.#streams.lastIndexOf(stream)
    if (at !== -1) this.#streams.splice(at, 1)
    return at !== -1
  }

  forEach(callback: (stream: Http2Stream) => void): void {
    for (const stream of [...this.#streams]) callback(stream)
  }
}

/** What of Node's own state of a session is replaced. */
interface SessionState {
  streams?: { readonly size: number }
  pendingStreams?: { readonly size: number }
}

/** Gives a session that has no streams yet tables of ours. A Node that keeps them elsewhere is left alone: the answer is false. */
export function replaceStreams(session: Http2Session): boolean {
  const symbol = Object.getOwnPropertySymbols(session).find(({ description }) => description === 'state')
  if (symbol === undefined) return false
  const state = (session as unknown as Record<symbol, SessionState>)[symbol]
  if (state?.streams?.size !== 0 || state.pendingStreams?.size !== 0) return false
  state.streams = new OpenStreams()
  state.pendingStreams = new PendingStreams()
  return true
}
