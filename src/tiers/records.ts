/**
 * Records of bytes outside of V8's heap, where nothing marks, moves or sweeps them: as objects, they would make every full
 * collection of garbage take longer.
 *
 * A log, which wastes little whatever the sizes are: records are appended to segments of 256 KiB, and what is freed leaves a
 * hole. When the segments are more than an eighth and two segments larger than what lives in them, a cleaner empties those
 * with the least life in them: it appends what lives to the head of the log. A large record has a segment of its own.
 * Rumble, Kejriwal, Ousterhout: Log-structured Memory for DRAM-based Storage, FAST 2014.
 *
 * Records move, so they go by a handle: a number that is theirs until they are freed. What `segment` and `at` say is good until the
 * next `allocate`, or until the record is freed.
 */

const SEGMENT_BYTES = 2 ** 18
/**
 * Records up to this size share segments, so that a full segment is never emptier than by a sixteenth: less than what may be
 * empty on the whole. So while that is more, the cleaner finds a segment with holes, and gains something.
 */
const MAX_SHARED_BYTES = SEGMENT_BYTES / 16
/** Of what lives, how much may be empty besides, and how many segments: the head and its successor. */
export const MAX_EMPTY = 1 / 8
const SPARE_SEGMENTS = 2
/**
 * For each segment's worth that is allocated, or a part of it, so many are emptied at most, for nobody should wait: some tenths of a
 * millisecond. Allocations that follow go on with the rest.
 */
const CLEANED_AT_ONCE = 4
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
  /** What its records take that have not been freed. */
  live = 0
  /** In the list of those that are shared. */
  place = 0

  constructor(size: number) {
    this.bytes = Buffer.from(new ArrayBuffer(size))
    this.words = new Uint32Array(this.bytes.buffer)
    this.floats = new Float64Array(this.bytes.buffer)
  }

  get size(): number {
    return this.bytes.byteLength
  }
}

// Handles come from `allocate`, and what they index is there: that is what `as` says below.
export class Records {
  /** By number; those that were given back are `undefined`, and their numbers free. */
  readonly #segments: (Segment | undefined)[] = []
  readonly #freeNumbers: number[] = []
  /** The numbers of those that are not one large record's, in any order. */
  readonly #shared: number[] = []
  /** The number of the segment that is being filled. */
  #head = NONE
  /** One that was given back: most often another one is wanted soon. */
  #spare: Segment | undefined
  /** By handle: its segment's number, and the record's first byte there. */
  #segmentOf = new Uint32Array(FIRST_CAPACITY)
  #offsetOf = new Uint32Array(FIRST_CAPACITY)
  #handles = 0
  readonly #freeHandles: number[] = []
  #live = 0
  #allocated = 0

  /** What the records take that have not been freed. */
  get live(): number {
    return this.#live
  }

  /** Bytes of all segments with something in them. */
  get allocated(): number {
    return this.#allocated
  }

  /** What a record of so many bytes takes, without what may be empty. */
  static sizeOf(length: number): number {
    return HEADER_BYTES + ((length + 7) & ~7)
  }

  /** A record of so many bytes, which are whatever was there before. Returns its handle. */
  allocate(length: number): number {
    const handle = this.#freeHandles.pop() ?? this.#handles++
    if (handle === this.#segmentOf.length) this.#grow()
    const size = Records.sizeOf(length)
    if (size > MAX_SHARED_BYTES) this.#put(handle, size, this.#open(size))
    else this.#append(handle, size)
    this.#clean(CLEANED_AT_ONCE * Math.ceil(size / SEGMENT_BYTES))
    return handle
  }

  free(handle: number): void {
    const number = this.#segmentOf[handle] as number
    const segment = this.#segments[number] as Segment
    const size = segment.words[((this.#offsetOf[handle] as number) - HEADER_BYTES) / 4 + 1] as number
    this.#freeHandles.push(handle)
    // No record begins there, so that the cleaner sees that this one is gone.
    this.#offsetOf[handle] = 0
    this.#live -= size
    segment.live -= size
    if (segment.live === 0 && number !== this.#head) this.#close(number)
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
  #append(handle: number, size: number): void {
    const full = this.#head
    const head = this.#segments[full]
    if (head === undefined || head.used + size > SEGMENT_BYTES) {
      this.#head = this.#open(SEGMENT_BYTES)
      if (head?.live === 0) this.#close(full)
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

  #clean(most: number): void {
    for (let n = 0; n < most; n++) {
      if (this.#allocated <= this.#live * (1 + MAX_EMPTY) + SPARE_SEGMENTS * SEGMENT_BYTES) return
      const number = this.#leastLive()
      if (number === NONE) return
      this.#empty(number)
    }
  }

  /** The segment with the least life in it, of those that are full and shared. */
  #leastLive(): number {
    let least = NONE
    let live = SEGMENT_BYTES
    for (const number of this.#shared) {
      const segment = this.#segments[number] as Segment
      if (segment.live >= live || number === this.#head) continue
      least = number
      live = segment.live
    }
    return least
  }

  /** Moves what lives in a segment to the head, and gives it back. */
  #empty(number: number): void {
    const { bytes, words, used } = this.#segments[number] as Segment
    let size = 0
    for (let at = 0; at < used; at += size) {
      const handle = words[at / 4] as number
      size = words[at / 4 + 1] as number
      if (this.#segmentOf[handle] !== number || this.#offsetOf[handle] !== at + HEADER_BYTES) continue
      this.#live -= size
      this.#append(handle, size)
      bytes.copy(this.segment(handle).bytes, this.at(handle), at + HEADER_BYTES, at + size)
    }
    this.#close(number)
  }

  #open(size: number): number {
    const number = this.#freeNumbers.pop() ?? this.#segments.length
    const spare = size === SEGMENT_BYTES ? this.#spare : undefined
    if (spare !== undefined) this.#spare = undefined
    const segment = spare ?? new Segment(size)
    this.#segments[number] = segment
    this.#allocated += size
    if (size === SEGMENT_BYTES) segment.place = this.#shared.push(number) - 1
    return number
  }

  #close(number: number): void {
    const segment = this.#segments[number] as Segment
    this.#allocated -= segment.size
    this.#segments[number] = undefined
    this.#freeNumbers.push(number)
    if (segment.size !== SEGMENT_BYTES) return
    const last = this.#shared.pop() as number
    if (last !== number) {
      this.#shared[segment.place] = last
      const moved = this.#segments[last] as Segment
      moved.place = segment.place
    }
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
