/**
 * The consistency probe: the service checks itself in production. One in so many cache hits is compared, behind the
 * answer, with what PostgreSQL holds.
 *
 * - `consistent`: the same.
 * - `within bound`: not the same, but the change was not known here yet, and the log had been heard of lately enough.
 * - `violation`: the copy should not have been served. Either the log has no row after the copy's as-of that explains the
 *   difference, or the row had been applied, or the log had not been heard of for too long. Logged with both positions.
 *
 * No clock of the database takes part: a row carries the time at which it was written, and its transaction may commit
 * much later. That a poll which was sent when the log was last heard of did not bring the row proves that it was not
 * committed then.
 */
import { HEARD_BOUND_MS, LISTED, type View } from '../invalidation/view.ts'
import type { Logger } from '../observe/log.ts'
import type { Metrics } from '../observe/metrics.ts'
import type { Copy, LogEntry, LogSource, Revision, Snapshot, StoreTier } from '../tiers/tier.ts'
import { untabled } from '../untabled.ts'

/** More log rows than this after the copy's as-of are not looked through. */
const WINDOW = { rows: 500, names: 100_000 }

export interface ProbeOptions {
  readonly postgres: StoreTier & LogSource
  readonly metrics: Metrics
  readonly log: Logger
  /** Monotonic clock. */
  readonly now: () => number
  /** Uniform in [0, 1). */
  readonly random: () => number
  /** 0: the probe is off. */
  readonly oneIn: number
}

export class Probe {
  readonly #options: ProbeOptions
  #left: number
  #running = false

  constructor(options: ProbeOptions) {
    this.#options = options
    this.#left = this.#pick()
  }

  /** A hit was served by this view. At most one comparison runs at a time. */
  served(tenant: string, copy: Copy, { position, heardMs }: View): void {
    if (--this.#left > 0 || this.#running || this.#options.oneIn === 0 || copy.id.startsWith(LISTED)) return
    this.#left = this.#pick()
    this.#running = true
    this.#compare(tenant, copy, position, this.#options.now() - heardMs)
      // PostgreSQL did not answer: nothing is learnt.
      .catch(() => {})
      .finally(() => {
        this.#running = false
      })
  }

  /** `silentMs`: how long the log had not been heard of when the copy was served at `position`. */
  async #compare(tenant: string, copy: Copy, position: Revision, silentMs: number): Promise<void> {
    const { postgres, metrics, log } = this.#options
    const id = untabled(copy.id)
    const snapshot = (await postgres.read(tenant, [id])).get(id)
    if (snapshot === undefined || isSame(copy, snapshot)) {
      metrics.probes.consistent++
      return
    }
    const page = (await postgres.after(new Map([[tenant, copy.asOf]]), WINDOW)).get(tenant)
    const change = page?.rows.find((row) => concerns(row, copy))
    if (change === undefined && page?.complete !== true) return
    if (change !== undefined && change.revision > position && silentMs <= HEARD_BOUND_MS) {
      metrics.probes.withinBound++
      return
    }
    metrics.probes.violation++
    log.error(
      {
        tenant,
        id,
        served_as_of: copy.asOf,
        served_at: position,
        served_revision: copy.revision,
        revision: snapshot.revision,
        as_of: snapshot.asOf,
      },
      'the consistency probe found a copy that should not have been served',
    )
  }

  #pick(): number {
    return 1 + Math.floor(this.#options.random() * 2 * this.#options.oneIn)
  }
}

function isSame(copy: Copy, snapshot: Snapshot): boolean {
  if (copy.bytes === undefined || snapshot.bytes === undefined) return copy.bytes === snapshot.bytes
  return copy.revision === snapshot.revision
}

function concerns(row: LogEntry, copy: Copy): boolean {
  return (
    row.kind === 'TENANT_INVALIDATED' ||
    row.ids.includes(copy.id) ||
    (row.kind === 'TAGS_INVALIDATED' && row.tags.some((tag) => copy.tags.includes(tag)))
  )
}
