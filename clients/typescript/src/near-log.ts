/**
 * What a near cache knows of its tenant's log: the floors and the position of the server's own view, and when it heard of
 * the log last. The rule is the server's too (`src/invalidation/view.ts`): a copy is current iff its as-of has reached all
 * floors that concern it, and the log was heard of at most 1.5 s ago.
 *
 * **Heard.** A heartbeat says: every change committed until `heard_after` past the making of `started` has been sent.
 * `started` was made after this process sent its request, so "the request's sending, plus `heard_after`" is a time, by
 * this process's clock, before which nothing is missing. How long a heartbeat has travelled does not matter, and
 * neither does how long this process was stopped. No two clocks are compared; their rates are taken to be alike.
 *
 * **Losing touch.** When the stream breaks, what was heard only gets older: after 1.5 s nothing is current. Resumed
 * by position in time, nothing is lost at all; later, copies are current again as soon as the first heartbeat comes.
 *
 * **Known before applied.** What this process was told (the revision of its own write, an answer ahead of the
 * stream) raises floors at once.
 */
import {
  type Dated,
  HEARD_BOUND_MS,
  type LogRow,
  type Verdict,
  View,
} from '../../../src/invalidation/view.ts'
import type { ItemCacheError } from './errors.ts'

export type { Dated, LogRow, Verdict } from '../../../src/invalidation/view.ts'

/** How far behind an answer of a near cache may be, in milliseconds. */
export const BOUND_MS = HEARD_BOUND_MS

/** `starting`: the log has not been heard of yet. `lost`: the log was not heard of for 1.5 s. Copies are served while `current`. */
export type NearState = 'starting' | 'current' | 'lost'

export class NearLog {
  readonly #now: () => number
  readonly #maxFloors: number
  #view: View
  #started = false
  #heardAtMs = Number.NEGATIVE_INFINITY
  #told = 0
  #toldOfTags = 0
  /** Raised when the history turned out to be another one: what was loaded before is not to be stored. */
  epoch = 0
  /** Whether the stream stands. */
  connected = false
  /** Why it does not: the last error; `undefined` while it stands. */
  error: ItemCacheError | undefined

  /** `now`: monotonic, milliseconds. */
  constructor({ now, maxFloors }: { readonly now: () => number; readonly maxFloors: number }) {
    this.#now = now
    this.#maxFloors = maxFloors
    this.#view = new View(maxFloors)
  }

  get position(): number {
    return this.#view.position
  }

  /** Milliseconds since the log was heard of for certain; Infinity before that. */
  get lagMs(): number {
    return this.#now() - this.#heardAtMs
  }

  get state(): NearState {
    if (!this.#started || this.#heardAtMs === Number.NEGATIVE_INFINITY) return 'starting'
    return this.isCurrent() ? 'current' : 'lost'
  }

  isCurrent(): boolean {
    return this.#started && this.#view.hasHeard(this.#now())
  }

  judge(copy: Dated): Verdict {
    return this.#view.judge(copy)
  }

  stamp(asOf: number): number {
    return this.#view.stamp(asOf)
  }

  /**
   * What an answer for this id must reach at least. The floors of its tags are known when it is here; but which tags it had
   * when this process invalidated one is not, until the stream has come so far.
   */
  floorOf(id: string): number {
    const { tenantFloor, keyFloor } = this.#view.describe(id, [])
    return Math.max(tenantFloor, keyFloor, this.#toldOfTags)
  }

  /** Activation: what follows is after `position`, and all that is older is distrusted, as is what was told before. */
  started(position: number): void {
    this.#view.jump(Math.max(position, this.#told))
    this.#started = true
  }

  /** The next event. One that has been applied changes nothing; a hole before it is a gap. */
  event(row: LogRow): void {
    if (row.revision <= this.#view.position) return
    if (row.revision > this.#view.position + 1) this.#view.jump(row.revision - 1)
    this.#view.apply(row)
  }

  gap(through: number): void {
    if (through > this.#view.position) this.#view.jump(through)
  }

  /** Everything up to `revision` has been applied, and so has everything that was committed before `heardAtMs`. */
  heartbeat(revision: number, heardAtMs: number | undefined): void {
    if (revision > this.#view.position) this.#view.jump(revision)
    if (heardAtMs === undefined) return
    this.#heardAtMs = Math.max(this.#heardAtMs, heardAtMs)
    this.#view.heard(heardAtMs)
  }

  /** A write of this process was acknowledged, or an event was shown to it. */
  acknowledge(row: LogRow): void {
    this.#told = Math.max(this.#told, row.revision)
    if (row.kind === 'TAGS_INVALIDATED') this.#toldOfTags = Math.max(this.#toldOfTags, row.revision)
    this.#view.seen(row.revision)
    if (row.revision > this.#view.position) this.#view.acknowledge(row)
  }

  /** A copy is about to be shown. */
  shown(copy: Dated): void {
    this.#told = Math.max(this.#told, copy.asOf)
    this.#view.seen(copy.asOf)
    this.#view.ahead(copy)
  }

  /** The log is another one than before (the bookmark is ahead of it): everything is forgotten. */
  reset(): void {
    this.epoch++
    this.#view = new View(this.#maxFloors)
    this.#started = false
    this.#heardAtMs = Number.NEGATIVE_INFINITY
    this.#told = 0
    this.#toldOfTags = 0
  }

  /** The stream stands. */
  stands(): void {
    this.connected = true
    this.error = undefined
  }

  /** The stream has broken, or could not begin. */
  fell(error: ItemCacheError): void {
    this.connected = false
    this.error = error
  }
}
