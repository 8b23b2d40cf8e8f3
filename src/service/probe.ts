/**
 * The consistency probe: the service checks itself in production. One in so many cache hits is compared, behind the
 * answer, with what PostgreSQL holds.
 *
 * - `consistent`: the same.
 * - `within bound`: not the same, but the change is so young that the copy was still allowed to be served.
 * - `violation`: the copy should not have been served. Either the log has no row after the copy's as-of that explains the
 *   difference, or the row was committed too long before. Logged with both positions.
 */
import { HEARD_BOUND_MS, LISTED } from '../invalidation/view.ts'
import type { Logger } from '../observe/log.ts'
import type { Metrics } from '../observe/metrics.ts'
import type { Copy, LogEntry, LogSource, Snapshot, StoreTier } from '../tiers/tier.ts'

/** Scheduling and the database's own time: what may pass between a commit and its row being seen, besides the bound. */
const SLACK_MS = 1000
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

  /** A hit was served. At most one comparison runs at a time. */
  served(tenant: string, copy: Copy): void {
    if (--this.#left > 0 || this.#running || this.#options.oneIn === 0 || copy.id.startsWith(LISTED)) return
    this.#left = this.#pick()
    this.#running = true
    const servedAtMs = this.#options.now()
    this.#compare(tenant, copy, servedAtMs)
      // PostgreSQL did not answer: nothing is learnt.
      .catch(() => {})
      .finally(() => {
        this.#running = false
      })
  }

  async #compare(tenant: string, copy: Copy, servedAtMs: number): Promise<void> {
    const { postgres, metrics, log, now } = this.#options
    const { id } = copy
    const snapshot = (await postgres.read(tenant, [id])).get(id)
    if (snapshot === undefined || isSame(copy, snapshot)) {
      metrics.probes.consistent++
      return
    }
    const page = (await postgres.after(new Map([[tenant, copy.asOf]]), WINDOW)).get(tenant)
    const change = page?.rows.find((row) => concerns(row, copy))
    if (change === undefined && page?.complete !== true) return
    const ageMs = change === undefined ? Number.POSITIVE_INFINITY : change.ageMs - (now() - servedAtMs)
    if (ageMs <= HEARD_BOUND_MS + SLACK_MS) {
      metrics.probes.withinBound++
      return
    }
    metrics.probes.violation++
    log.error(
      {
        tenant,
        id,
        served_as_of: copy.asOf,
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
