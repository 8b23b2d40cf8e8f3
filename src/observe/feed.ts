/** The newest rows of the log that were applied here, of all tenants: a bounded list for the live page. */
import type { LogEntry, Revision } from '../tiers/tier.ts'
import type { FedInvalidation } from './live-message.ts'

/** Rows that are kept. */
export const FED_ROWS = 100
/** Ids, and as many tags, that are kept of each; it may have a thousand. */
const FED_NAMES = 5

/** Follows the tail (`Follower` in `invalidation/tail.ts`), and keeps no tenant from being dropped. */
export class Feed {
  readonly #now: () => number
  readonly #rows: FedInvalidation[] = []
  #seq = 0

  /** `now` is the wall clock. */
  constructor(now: () => number) {
    this.#now = now
  }

  /** Of the kept rows those with a greater `seq`; the oldest first. */
  after(seq: number): FedInvalidation[] {
    return this.#rows.slice(-FED_ROWS).filter((row) => row.seq > seq)
  }

  /** The `seq` of the newest row; 0 before the first. */
  get seq(): number {
    return this.#seq
  }

  applied(tenant: string, row: LogEntry): void {
    this.#push({
      seq: ++this.#seq,
      tenant,
      revision: row.revision,
      reason: row.kind,
      mode: row.mode,
      ids: row.ids.slice(0, FED_NAMES),
      tags: row.tags.slice(0, FED_NAMES),
      moreIds: Math.max(0, row.ids.length - FED_NAMES),
      moreTags: Math.max(0, row.tags.length - FED_NAMES),
      appliedMs: this.#now(),
      lagMs: row.ageMs,
    })
  }

  jumped(tenant: string, through: Revision): void {
    this.#push({
      seq: ++this.#seq,
      tenant,
      revision: through,
      reason: 'GAP',
      mode: 'EXPIRE',
      ids: [],
      tags: [],
      moreIds: 0,
      moreTags: 0,
      appliedMs: this.#now(),
    })
  }

  needs(): boolean {
    return false
  }

  #push(row: FedInvalidation): void {
    this.#rows.push(row)
    // Dropping many at a time costs each row once.
    if (this.#rows.length >= 2 * FED_ROWS) this.#rows.splice(0, FED_ROWS)
  }
}
