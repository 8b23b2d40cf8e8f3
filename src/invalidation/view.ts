/**
 * What one reader of a tenant's log knows, and the one rule that decides whether a copy may be served. An instance
 * has a view for every tenant that it serves; a client's near cache has one too, so this file imports nothing but the LRU.
 *
 * A **revision** numbers each committed change and each explicit invalidation of a tenant, without a gap. A copy
 * carries its **as-of**: the revision of the snapshot that it was read from. A **floor** is the newest
 * invalidation known for a key, for a tag (a category counts as a tag), or for the whole tenant. The **position** is
 * how far the log has been applied. **Heard** is when the last poll was sent whose complete answer has been applied.
 *
 * > A copy may be served as current iff `asOf >= max(tenant floor, key floor, floors of the copy's tags)` and heard is
 * > at most 1.5 s old. Otherwise only a SELECT that was sent after the reader began is current.
 *
 * No clock of another machine takes part, and neither does the order in which messages arrive: a slow load that comes
 * back with an old value, a refresh that overtakes a write, a Redis that was restored from a dump all end the same
 * way, with a copy that does not pass.
 *
 * ## Marks
 *
 * A floor is three marks, because a copy that is not current may still be useful:
 * - `changed`: the content changed. Older copies are *superseded*: served, as stale, only when the tiers below are down.
 * - `expired`: somebody asked for a reload (mode EXPIRE). A copy that passes every other mark is *expired*: it may be
 *   served as stale while the reload is under way.
 * - `removed`: the item was deleted or removed (mode REMOVE). Older copies are never served, not even as stale. The
 *   tenant's removed mark speaks of stale answers only: an old copy may lack the tag by which its item was removed, so
 *   a REMOVE by tag raises it for every copy that is not current.
 *
 * ## Rules
 *
 * - **Floors before position.** A row raises its floors first; a reader that sees the position sees the floors.
 * - **Stamping.** A copy that passes is the state at `max(asOf, position)`: it is stamped with that as-of in the same
 *   synchronous step, so that hot copies survive a rising tenant floor.
 * - **Forgetting.** Key and tag floors are bounded maps; forgetting one raises the tenant's to it, so that it can make
 *   copies look older than they are, never newer.
 * - **Activation.** A new view starts from the newest rows of the log; what is older is covered by the tenant floor.
 * - **Holes.** Rows that are not position + 1, + 2, … to the log's end mean that something was missed: the tenant floor,
 *   then the position, become the log's revision.
 * - **Known before applied.** A write that this reader acknowledges, and a copy newer than the position that it serves
 *   or stores, raise the floors at once: the reader never goes back behind what it has shown.
 * - **Timelines.** A revision is `timeline * 2^40 + n`. The first sign of a newer timeline (a PostgreSQL that failed over)
 *   raises the tenant floor to its start: copies of commits that the failover lost cannot pass.
 */

import { Lru } from '../tiers/lru.ts'

/** What the rule looks at in a copy. */
export interface Dated {
  readonly id: string
  readonly asOf: number
  readonly tags: readonly string[]
}

/** What may be done with a copy as far as the floors go; see "Marks". */
export type Verdict = 'current' | 'expired' | 'superseded' | 'removed'

/** What an invalidation does to older copies. */
export type Mark = 'changed' | 'expired' | 'removed'

/** One row of the log, as far as floors go. */
export interface LogRow {
  readonly revision: number
  readonly kind: 'UPSERTED' | 'DELETED' | 'KEYS_INVALIDATED' | 'TAGS_INVALIDATED' | 'TENANT_INVALIDATED'
  readonly mode: 'EXPIRE' | 'REMOVE'
  readonly ids: readonly string[]
  readonly tags: readonly string[]
}

/** How long a view may go without news of the log and still call copies current, in milliseconds. */
export const HEARD_BOUND_MS = 1500

/** A timeline's revisions: `timeline * TIMELINE_SPAN + n`. */
export const TIMELINE_SPAN = 2 ** 40

/**
 * The tag of every list page, and, with a tag behind it, of the pages that list that tag or category. Real tags
 * hold no control characters. A change of an item, before or after image, raises the floors of these.
 */
export const LISTED = '\u0001'

interface Floor {
  changed: number
  expired: number
  removed: number
}

const newFloor = (): Floor => ({ changed: 0, expired: 0, removed: 0 })

/**
 * Floors by name; beyond `maxFloors` the one that was raised longest ago is forgotten. Not in a `Map`: V8 keeps the old tables of one for an
 * iterator that stands in them, and puts each name that one is asked for into its table of strings.
 */
class Floors {
  readonly #byName: Lru<Floor>
  #forgotten: Floor | undefined

  constructor(maxFloors: number) {
    this.#byName = new Lru({
      maxEntries: maxFloors,
      now: () => 0,
      dropped: (floor) => {
        this.#forgotten = floor
      },
    })
  }

  get size(): number {
    return this.#byName.size
  }

  get(name: string): Floor | undefined {
    return this.#byName.peek(name)
  }

  values(): Iterable<Floor> {
    return this.#byName.entries().map(([, floor]) => floor)
  }

  clear(): void {
    this.#byName.clear()
  }

  /** Raises a floor, and returns the marks of the one that is forgotten for it. */
  raise(name: string, mark: Mark, revision: number): Floor | undefined {
    const raised = this.#byName.get(name)
    const floor = raised ?? newFloor()
    if (mark === 'expired') floor.expired = Math.max(floor.expired, revision)
    else floor.changed = Math.max(floor.changed, revision)
    if (mark === 'removed') floor.removed = Math.max(floor.removed, revision)
    if (raised !== undefined) return undefined
    this.#forgotten = undefined
    this.#byName.set(name, floor, 0)
    return this.#forgotten
  }
}

/** A view of one tenant's log. */
export class View {
  readonly #tenant = newFloor()
  readonly #keys: Floors
  readonly #tags: Floors
  readonly #maxFloors: number
  /** No mark of any floor is higher. A hot copy has reached it, and then no floor needs to be looked up. */
  #highest = 0
  #position = 0
  #heardMs = Number.NEGATIVE_INFINITY

  /** `maxFloors` bounds the key floors and the tag floors, each; a positive integer. */
  constructor(maxFloors: number) {
    this.#maxFloors = maxFloors
    this.#keys = new Floors(maxFloors)
    this.#tags = new Floors(maxFloors)
  }

  /** How many floors the view holds. */
  get floors(): number {
    return this.#keys.size + this.#tags.size
  }

  /** The revision up to which the log has been applied. */
  get position(): number {
    return this.#position
  }

  /** When the view last heard of the log: everything committed before has been applied. */
  get heardMs(): number {
    return this.#heardMs
  }

  /** The rule, but for heard: what the floors say of a copy. */
  judge({ id, asOf, tags }: Dated): Verdict {
    if (asOf >= this.#highest) return 'current'
    const tenant = this.#tenant
    let { changed, expired, removed } = tenant
    const key = this.#keys.get(id)
    if (key !== undefined) {
      if (key.changed > changed) changed = key.changed
      if (key.expired > expired) expired = key.expired
      if (key.removed > removed) removed = key.removed
    }
    if (this.#tags.size > 0) {
      for (const tag of tags) {
        const floor = this.#tags.get(tag)
        if (floor === undefined) continue
        if (floor.changed > changed) changed = floor.changed
        if (floor.expired > expired) expired = floor.expired
        if (floor.removed > removed) removed = floor.removed
      }
    }
    if (asOf >= changed && asOf >= expired) return 'current'
    if (asOf < removed) return 'removed'
    return asOf < changed ? 'superseded' : 'expired'
  }

  /** The rule's other half: whether the view has heard of the log lately enough to call anything current. */
  hasHeard(nowMs: number): boolean {
    return nowMs - this.#heardMs <= HEARD_BOUND_MS
  }

  /** Stamping: the as-of of a copy that has just passed. */
  stamp(asOf: number): number {
    return Math.max(asOf, this.#position)
  }

  /** Activation: the log's revision, and its newest rows in order, which reach it without a hole. */
  activate(revision: number, rows: readonly LogRow[], sentAtMs: number): void {
    // More floors than the view holds would only be forgotten again.
    let first = rows.length
    for (let floors = 0; first > 0; first--) {
      const row = rows[first - 1]
      if (row === undefined) break
      floors += row.ids.length + row.tags.length
      if (floors > this.#maxFloors) break
    }
    const known = rows.slice(first)
    this.#raiseTenant(known[0] === undefined ? revision : known[0].revision - 1)
    for (const row of known) this.#raiseFloors(row)
    this.#position = Math.max(this.#position, revision)
    this.#heardMs = sentAtMs
  }

  /** The next row of the log, at position + 1: floors first, then the position. */
  apply(row: LogRow): void {
    this.#raiseFloors(row)
    this.#position = Math.max(this.#position, row.revision)
  }

  /** A hole in the log: everything older than `revision` may have changed, or been removed. */
  jump(revision: number): void {
    this.#raiseTenant(revision)
    this.#position = Math.max(this.#position, revision)
  }

  /** The complete answer of a poll that was sent at `sentAtMs` has been applied. */
  heard(sentAtMs: number): void {
    this.#heardMs = Math.max(this.#heardMs, sentAtMs)
  }

  /** Timelines: a revision of a timeline that this view has not seen proves a failover. */
  seen(revision: number): void {
    const start = Math.floor(revision / TIMELINE_SPAN) * TIMELINE_SPAN
    if (start <= this.#position) return
    this.#tenant.changed = Math.max(this.#tenant.changed, start)
    this.#highest = Math.max(this.#highest, start)
  }

  /** Known before applied: a copy newer than the position is about to be served or stored. */
  ahead({ id, asOf, tags }: Dated): void {
    if (asOf <= this.#position) return
    this.#raise(this.#keys, id, 'changed', asOf)
    if (id.startsWith(LISTED)) return
    // A page that was read before may lack it.
    this.#raise(this.#tags, LISTED, 'changed', asOf)
    for (const tag of tags) this.#raise(this.#tags, LISTED + tag, 'changed', asOf)
  }

  /** Known before applied: a write is about to be acknowledged. */
  acknowledge(row: LogRow): void {
    this.#raiseFloors(row)
  }

  /** Forgetting, of all floors at once: nothing that is older than the newest of them is current. */
  forget(): void {
    for (const floors of [this.#keys, this.#tags]) {
      for (const floor of floors.values()) this.#raiseTenantTo(floor)
      floors.clear()
    }
  }

  /** What applies to an item now, for people: the highest mark of each floor. */
  describe(id: string, tags: readonly string[]) {
    const key = this.#keys.get(id) ?? newFloor()
    const tagFloors = tags.map((tag) => ({ tag, floor: this.#tags.get(tag) ?? newFloor() }))
    return {
      tenantFloor: top(this.#tenant),
      keyFloor: top(key),
      tagFloors: tagFloors.flatMap(({ tag, floor }) => (top(floor) > 0 ? [{ tag, floor: top(floor) }] : [])),
      removedFloor: Math.max(
        this.#tenant.removed,
        key.removed,
        ...tagFloors.map(({ floor }) => floor.removed),
      ),
    }
  }

  #raiseFloors(row: LogRow): void {
    const { revision } = row
    this.#highest = Math.max(this.#highest, revision)
    const mark: Mark = row.kind === 'UPSERTED' ? 'changed' : row.mode === 'REMOVE' ? 'removed' : 'expired'
    switch (row.kind) {
      case 'UPSERTED':
      case 'DELETED':
        for (const id of row.ids) this.#raise(this.#keys, id, mark, revision)
        // A page from before a delete would show the deleted item, even as stale.
        for (const tag of row.tags) this.#raise(this.#tags, LISTED + tag, mark, revision)
        this.#raise(this.#tags, LISTED, mark, revision)
        break
      case 'KEYS_INVALIDATED':
        for (const id of row.ids) this.#raise(this.#keys, id, mark, revision)
        break
      case 'TAGS_INVALIDATED':
        for (const tag of row.tags) this.#raise(this.#tags, tag, mark, revision)
        if (mark === 'removed') this.#tenant.removed = Math.max(this.#tenant.removed, revision)
        break
      case 'TENANT_INVALIDATED':
        if (mark === 'expired') this.#tenant.expired = Math.max(this.#tenant.expired, revision)
        else this.#raiseTenant(revision)
    }
  }

  /** Nothing older is current, and nothing older that is not current is served. */
  #raiseTenant(revision: number): void {
    this.#highest = Math.max(this.#highest, revision)
    this.#tenant.changed = Math.max(this.#tenant.changed, revision)
    this.#tenant.removed = Math.max(this.#tenant.removed, revision)
  }

  #raise(floors: Floors, name: string, mark: Mark, revision: number): void {
    this.#highest = Math.max(this.#highest, revision)
    const forgotten = floors.raise(name, mark, revision)
    if (forgotten !== undefined) this.#raiseTenantTo(forgotten)
  }

  #raiseTenantTo(forgotten: Floor): void {
    this.#tenant.changed = Math.max(this.#tenant.changed, top(forgotten))
    this.#tenant.removed = Math.max(this.#tenant.removed, forgotten.removed)
  }
}

function top(floor: Floor): number {
  return Math.max(floor.changed, floor.expired, floor.removed)
}
