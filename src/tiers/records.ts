/**
 * Records of bytes outside of V8's heap, where nothing marks, moves or sweeps them: with objects instead, every full
 * collection of garbage would take longer by what is cached.
 *
 * Log-structured, which wastes little whatever the sizes are: records are appended to segments of 256 KiB, and what is removed
 * leaves a hole. When the segments are more than an eighth larger than what lives in them, the segment with the
 * least life in it is emptied: its records are appended anew. A large record has a segment of its own.
 * Rumble, Kejriwal, Ousterhout: Log-structured Memory for DRAM-based Storage, FAST 2014.
 *
 * Records move, so they go by a handle: a number that is theirs until they are removed. What `at` points to is good until the next
 * `add` or `clear`.
 */

const SEGMENT_BYTES = 2 ** 18
/** What cannot be filled at the end of a segment is less than this, so that it is always less than what may be empty. */
const LARGE_BYTES = SEGMENT_BYTES / 16
/** Of what lives, how much may be empty besides; and so many segments, of which one is being filled. */
export const MAX_EMPTY = 1 / 8
const SPARE_SEGMENTS = 2
/** In front of a record: its handle and how many bytes it takes with this. */
const HEADER_BYTES = 8
const FIRST_CAPACITY = 16
const NONE = -1

/** Bytes of several records, seen as bytes, as words of 4, and as floats of 8. */
class Segment {
  readonly bytes: Buffer
  readonly words: Uint32Array
  readonly floats: Float64Array
  /** From here on it is empty. */
  used = 0
  /** What its records take that have not been removed. */
  live = 0

  constructor(size: number) {
    this.bytes = Buffer.from(new ArrayBuffer(size))
    this.words = new Uint32Array(this.bytes.buffer)
    this.floats = new Float64Array(this.bytes.buffer)
  }

  get size(): number {
    return this.bytes.byteLength
  }
}

// Handles come from `add`, and what they index is there: that is what `as` says below.
export class Records {
  /** By number; those that were given back are `undefined`, and their numbers in `#unnumbered`. */
  #segments: (Segment | undefined)[] = []
  #unnumbered: number[] = []
  /** The number of the segment that is being filled. */
  #head = NONE
  /** One that was given back: most often another one is wanted soon. */
  #spare: Segment | undefined
  /** By handle: its segment's number, and the record's first byte there. */
  #segmentOf = new Uint32Array(FIRST_CAPACITY)
  #offsetOf = new Uint32Array(FIRST_CAPACITY)
  #handles = 0
  #free: number[] = []
  #live = 0
  #allocated = 0

  /** Bytes of all segments with something in them. */
  get allocated(): number {
    return this.#allocated
  }

  /** What a record of so many bytes takes, without what may be empty. */
  static sizeOf(length: number): number {
    return HEADER_BYTES + ((length + 7) & ~7)
  }

  /** A record of so many bytes, which are whatever was there before. */
  add(length: number): number {
    const handle = this.#free.pop() ?? this.#handles++
    if (handle === this.#segmentOf.length) this.#grow()
    const size = Records.sizeOf(length)
    if (size > LARGE_BYTES) this.#put(handle, size, this.#open(size))
    else this.#append(handle, size, true)
    return handle
  }

  remove(handle: number): void {
    const number = this.#segmentOf[handle] as number
    const segment = this.#segments[number] as Segment
    const size = segment.words[((this.#offsetOf[handle] as number) - HEADER_BYTES) / 4 + 1] as number
    this.#free.push(handle)
    // No record begins there, so that whoever empties the segment sees that this one is gone.
    this.#offsetOf[handle] = 0
    this.#live -= size
    segment.live -= size
    if (segment.live === 0 && number !== this.#head) this.#close(number)
  }

  /** Removes all, and gives the memory back. */
  clear(): void {
    this.#segments = []
    this.#unnumbered = []
    this.#head = NONE
    this.#spare = undefined
    this.#segmentOf = new Uint32Array(FIRST_CAPACITY)
    this.#offsetOf = new Uint32Array(FIRST_CAPACITY)
    this.#handles = 0
    this.#free = []
    this.#live = 0
    this.#allocated = 0
  }

  /** Where a record's bytes are. */
  segment(handle: number): Segment {
    return this.#segments[this.#segmentOf[handle] as number] as Segment
  }

  /** The first of them there: a multiple of 8. */
  at(handle: number): number {
    return this.#offsetOf[handle] as number
  }

  /** Puts a record behind the last one of all. */
  #append(handle: number, size: number, mayCompact: boolean): void {
    const full = this.#head
    const head = this.#segments[full]
    if (head === undefined || head.used + size > SEGMENT_BYTES) {
      this.#head = this.#open(SEGMENT_BYTES)
      if (head?.live === 0) this.#close(full)
      if (mayCompact) this.#compact()
    }
    this.#put(handle, size, this.#head)
  }

  #put(handle: number, size: number, number: number): void {
    const segment = this.#segments[number] as Segment
    segment.words[segment.used / 4] = handle
    segment.words[segment.used / 4 + 1] = size
    this.#segmentOf[handle] = number
    this.#offsetOf[handle] = segment.used + HEADER_BYTES
    segment.used += size
    segment.live += size
    this.#live += size
  }

  /** Empties segments until what is empty is within its bound. */
  #compact(): void {
    while (this.#allocated > this.#live * (1 + MAX_EMPTY) + SPARE_SEGMENTS * SEGMENT_BYTES) {
      this.#empty(this.#leastLive())
    }
  }

  /** The segment, other than the one that is being filled and those of large records, with the least life in it. */
  #leastLive(): number {
    let least = this.#head
    let live = Number.POSITIVE_INFINITY
    for (const [number, segment] of this.#segments.entries()) {
      if (segment === undefined || segment.size !== SEGMENT_BYTES || number === this.#head) continue
      if (segment.live < live) [least, live] = [number, segment.live]
    }
    return least
  }

  /** Moves what lives in a segment elsewhere, and gives it back. */
  #empty(number: number): void {
    const { bytes, words, used } = this.#segments[number] as Segment
    let size = 0
    for (let at = 0; at < used; at += size) {
      const handle = words[at / 4] as number
      size = words[at / 4 + 1] as number
      if (this.#segmentOf[handle] !== number || this.#offsetOf[handle] !== at + HEADER_BYTES) continue
      this.#live -= size
      this.#append(handle, size, false)
      bytes.copy(this.segment(handle).bytes, this.at(handle), at + HEADER_BYTES, at + size)
    }
    this.#close(number)
  }

  #open(size: number): number {
    const number = this.#unnumbered.pop() ?? this.#segments.length
    const spare = size === SEGMENT_BYTES ? this.#spare : undefined
    if (spare !== undefined) this.#spare = undefined
    this.#segments[number] = spare ?? new Segment(size)
    this.#allocated += size
    return number
  }

  #close(number: number): void {
    const segment = this.#segments[number] as Segment
    this.#allocated -= segment.size
    this.#segments[number] = undefined
    this.#unnumbered.push(number)
    if (segment.size !== SEGMENT_BYTES) return
    segment.used = 0
    segment.live = 0
    this.#spare = segment
  }

  #grow(): void {
    const { segmentOf, offsetOf } = { segmentOf: this.#segmentOf, offsetOf: this.#offsetOf }
    this.#segmentOf = new Uint32Array(segmentOf.length * 2)
    this.#offsetOf = new Uint32Array(segmentOf.length * 2)
    this.#segmentOf.set(segmentOf)
    this.#offsetOf.set(offsetOf)
  }
}
