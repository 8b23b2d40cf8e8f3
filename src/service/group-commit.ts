/**
 * Group commit: writes of one tenant that come while another is being committed go together into the next commit.
 *
 * PostgreSQL commits the writes of a tenant one after the other, since each takes the tenant's next revision, and each waits for
 * the disk. So together they wait once, and cost one statement. Whoever comes alone leaves at the end of the tick.
 */

/** What one commit may hold besides its bounds: no two of these. */
export interface Grouped {
  readonly id: string
  /** `''`: none. */
  readonly requestId: string
}

/** Writes in one commit at most. */
const MAX_WRITES = 100

interface Queue<W extends Grouped> {
  waiting: W[]
}

export class GroupCommit<W extends Grouped> {
  readonly #commit: (tenant: string, writes: readonly W[]) => Promise<void>
  readonly #queues = new Map<string, Queue<W>>()

  /** `commit` takes what has come, in its order, and never rejects. */
  constructor(commit: (tenant: string, writes: readonly W[]) => Promise<void>) {
    this.#commit = commit
  }

  /** Writes that wait for the commit under way. */
  waiting(tenant: string): number {
    return this.#queues.get(tenant)?.waiting.length ?? 0
  }

  add(tenant: string, write: W): void {
    const queue = this.#queues.get(tenant)
    if (queue !== undefined) {
      queue.waiting.push(write)
      return
    }
    const begun: Queue<W> = { waiting: [write] }
    this.#queues.set(tenant, begun)
    setImmediate(() => void this.#commitAll(tenant, begun))
  }

  async #commitAll(tenant: string, queue: Queue<W>): Promise<void> {
    while (queue.waiting.length > 0) {
      const { now, later } = split(queue.waiting)
      queue.waiting = later
      await this.#commit(tenant, now)
    }
    this.#queues.delete(tenant)
  }
}

/** Of an item, or of a request that is repeated, the first write only: the others build on what it leaves. */
function split<W extends Grouped>(writes: readonly W[]): { readonly now: readonly W[]; readonly later: W[] } {
  const ids = new Set<string>()
  const requests = new Set<string>()
  const later: W[] = []
  const now = writes.filter((write) => {
    if (ids.size === MAX_WRITES || ids.has(write.id) || requests.has(write.requestId)) {
      later.push(write)
      return false
    }
    ids.add(write.id)
    if (write.requestId !== '') requests.add(write.requestId)
    return true
  })
  return { now, later }
}
