/**
 * Turns of what is large: so many at a time, and those who wait take turns by tenant. Whoever reads little does not
 * queue here, and so finds a connection, however much others want.
 */

export interface TurnsOptions {
  /** At most so many at a time; 1 or more. */
  readonly most: number
  /** Nobody waits longer than this, in milliseconds: then it is for the tier to say that it has too much to do. */
  readonly patienceMs: number
}

export class Turns {
  readonly #options: TurnsOptions
  #underWay = 0
  /** In the order in which the tenants' turns come. */
  readonly #waiting = new Map<string, (() => void)[]>()

  constructor(options: TurnsOptions) {
    this.#options = options
  }

  /** Does the work when its turn has come. Throws the signal's reason when that aborts before. */
  async take<T>(tenant: string, signal: AbortSignal, work: () => Promise<T>): Promise<T> {
    if (this.#underWay < this.#options.most) this.#underWay += 1
    else await this.#turn(tenant, signal)
    try {
      return await work()
    } finally {
      this.#underWay -= 1
      if (this.#underWay < this.#options.most) this.#next()
    }
  }

  /** Waits, and is counted as under way from then on. */
  async #turn(tenant: string, signal: AbortSignal): Promise<void> {
    signal.throwIfAborted()
    const { promise, resolve, reject } = Promise.withResolvers<void>()
    const begin = () => {
      this.#underWay += 1
      resolve()
    }
    const queue = this.#waiting.get(tenant) ?? []
    this.#waiting.set(tenant, queue)
    queue.push(begin)
    const leave = () => {
      queue.splice(queue.indexOf(begin), 1)
      if (queue.length === 0) this.#waiting.delete(tenant)
    }
    const timer = setTimeout(() => {
      leave()
      begin()
    }, this.#options.patienceMs)
    const abort = () => {
      if (queue.includes(begin)) leave()
      reject(signal.reason)
    }
    signal.addEventListener('abort', abort, { once: true })
    try {
      await promise
    } finally {
      clearTimeout(timer)
      signal.removeEventListener('abort', abort)
    }
  }

  /** The first who waits, of the tenant whose turn it is, which is then the last. */
  #next(): void {
    const [first] = this.#waiting
    if (first === undefined) return
    const [tenant, queue] = first
    const begin = queue.shift()
    this.#waiting.delete(tenant)
    if (queue.length > 0) this.#waiting.set(tenant, queue)
    begin?.()
  }
}
