/** Repeatable random access traces. */

/** Numbers from 0 up to 1 that depend on the seed alone: a Weyl sequence through an integer mixer. */
export function seededRandom(seed: number): () => number {
  let state = seed | 0
  return () => {
    state = (state + 0x9e37_79b9) | 0
    let mixed = Math.imul(state ^ (state >>> 16), 0x21f0_aaad)
    mixed = Math.imul(mixed ^ (mixed >>> 15), 0x735a_2d97)
    return ((mixed ^ (mixed >>> 15)) >>> 0) / 2 ** 32
  }
}

export interface ZipfOptions {
  readonly keys: number
  readonly length: number
  /** The key of rank r is drawn in proportion to 1 / r ** exponent. */
  readonly exponent: number
  readonly random: () => number
}

/** `length` key numbers from 0 up to `keys`. Popular keys lie anywhere among them. */
export function zipfTrace({ keys, length, exponent, random }: ZipfOptions): Uint32Array {
  const upTo = new Float64Array(keys)
  let total = 0
  for (let rank = 0; rank < keys; rank += 1) {
    total += 1 / (rank + 1) ** exponent
    upTo[rank] = total
  }
  const keyOfRank = Uint32Array.from({ length: keys }, (_, rank) => rank)
  for (let rank = keys - 1; rank > 0; rank -= 1) {
    const other = Math.floor(random() * (rank + 1))
    const key = keyOfRank[rank] as number
    keyOfRank[rank] = keyOfRank[other] as number
    keyOfRank[other] = key
  }
  return Uint32Array.from({ length }, () => {
    const drawn = random() * total
    let [low, high] = [0, keys - 1]
    while (low < high) {
      const middle = (low + high) >>> 1
      if ((upTo[middle] as number) < drawn) low = middle + 1
      else high = middle
    }
    return keyOfRank[low] as number
  })
}
