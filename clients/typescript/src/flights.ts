/** One load at a time for each id, shared by those who ask while it is under way. */

interface Flight<T> {
  begun: boolean
  readonly result: Promise<T>
}

/** Loads of `T`. */
export class Flights<T> {
  readonly #byId = new Map<string, Flight<T>>()

  /**
   * The result of a load of this id, and whether another call had started it. What began before this call is taken iff it
   * `passes` when it comes; then the next load is, and `passes` is told that it `isLater`. So of any number of calls
   * at most two loads come. `wait` gives up for this call alone.
   */
  async share(
    id: string,
    load: () => Promise<T>,
    passes: (result: T, isLater: boolean) => boolean,
    wait: (result: Promise<T>) => Promise<T> = (result) => result,
  ): Promise<{ readonly result: T; readonly shared: boolean }> {
    for (let isFirst = true; ; isFirst = false) {
      const found = this.#byId.get(id)
      // Who has waited for one flight finds only such as were started after that.
      const isLater = !isFirst || found?.begun === false
      const flight = found ?? this.#start(id, load)
      const result = await wait(flight.result)
      if (found === undefined || passes(result, isLater)) return { result, shared: found !== undefined }
    }
  }

  /** Calls of the same tick share it, whatever they know: it has not begun yet. */
  #start(id: string, load: () => Promise<T>): Flight<T> {
    const run = async () => {
      await undefined
      flight.begun = true
      try {
        return await load()
      } finally {
        this.#byId.delete(id)
      }
    }
    const flight: Flight<T> = { begun: false, result: run() }
    this.#byId.set(id, flight)
    return flight
  }
}
