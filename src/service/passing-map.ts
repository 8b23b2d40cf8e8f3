/**
 * A map whose values come and go all the time. In a long-lived `Map` some of them would outlive every young collection, however
 * short they were (docs/performance.md#what-garbage-collection-costs). Here the `Map` has numbers for values: of their places in a list.
 * What outlives young collections are keys.
 */
export class PassingMap<V> {
  readonly #places = new Map<string, number>()
  readonly #values: (V | undefined)[] = []
  readonly #free: number[] = []

  get size(): number {
    return this.#places.size
  }

  /** The most values that it has had at a time. */
  get places(): number {
    return this.#values.length
  }

  get(key: string): V | undefined {
    const place = this.#places.get(key)
    return place === undefined ? undefined : this.#values[place]
  }

  set(key: string, value: V): this {
    let place = this.#places.get(key)
    if (place === undefined) {
      place = this.#free.pop() ?? this.#values.length
      this.#places.set(key, place)
    }
    this.#values[place] = value
    return this
  }

  /** Whether there was a value to delete. */
  delete(key: string): boolean {
    const place = this.#places.get(key)
    if (place === undefined) return false
    this.#places.delete(key)
    this.#values[place] = undefined
    this.#free.push(place)
    return true
  }
}
