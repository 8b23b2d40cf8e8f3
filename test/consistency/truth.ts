/**
 * What really happened, as the databases testify: every state of every item, and the log. A revision names a state of each
 * item, on its timeline; a timeline that replaced another shares its past up to the fork.
 */
import type { AuditRow, LogRow, Testimony } from './audit.ts'
import { type Content, TIMELINE_SPAN, timelineOf } from './history.ts'

/** A promise that was broken, by whom, and the events that show it. */
export interface Violation {
  readonly property: string
  readonly text: string
  readonly events: readonly unknown[]
}

/** Sorted revisions at which an item changed, and what it was from then on. */
export interface Changes {
  readonly revisions: number[]
  readonly contents: Content[]
  readonly tags: (readonly string[])[]
}

export interface Key {
  /** Every change, and every explicit invalidation that the audit shows in the content. */
  readonly all: Changes
  /** Without what mode EXPIRE did. */
  readonly content: number[]
  /** Deletes, and what mode REMOVE did. */
  readonly removed: number[]
  /** Those that went through the triggers: revision of the row, in order. */
  readonly rows: number[]
}

export interface Tenant {
  readonly keys: Map<string, Key>
  readonly log: readonly LogRow[]
  readonly revisions: readonly number[]
  readonly byRevision: Map<number, LogRow>
  /** The last revision that this timeline has in common with the one before it. */
  readonly fork: number
  readonly head: number
}

export type Depth = 'all' | 'content' | 'removed'

/** Index of the last element that is at most `value`; -1: none. */
export function lastAtMost(sorted: readonly number[], value: number): number {
  let [low, high] = [0, sorted.length]
  while (low < high) {
    const middle = (low + high) >>> 1
    if ((sorted[middle] ?? 0) <= value) low = middle + 1
    else high = middle
  }
  return low - 1
}

export class Truth {
  readonly #timelines = new Map<number, Map<string, Tenant>>()
  readonly #order: number[] = []

  constructor(
    testimonies: readonly ({ readonly timeline: number } & Testimony)[],
    report: (violation: Violation) => void,
  ) {
    for (const testimony of testimonies) {
      this.#order.push(testimony.timeline)
      this.#timelines.set(testimony.timeline, tenantsOf(testimony, report))
    }
    this.#checkForks(report)
  }

  tenant(timeline: number, name: string): Tenant | undefined {
    return this.#timelines.get(timeline)?.get(name)
  }

  get timelines(): readonly number[] {
    return this.#order
  }

  knows(timeline: number): boolean {
    return this.#timelines.has(timeline)
  }

  /** The content as of a revision. */
  contentAt(tenant: string, id: string, revision: number): Content {
    const changes = this.tenant(timelineOf(revision), tenant)?.keys.get(id)?.all
    if (changes === undefined) return null
    return changes.contents[lastAtMost(changes.revisions, revision)] ?? null
  }

  /** The revision at which an item last changed, up to `revision`, as `timeline` has it. */
  need(timeline: number, tenant: string, id: string, revision: number, depth: Depth): number {
    const key = this.tenant(timeline, tenant)?.keys.get(id)
    if (key === undefined) return 0
    const list = depth === 'all' ? key.all.revisions : key[depth]
    return list[lastAtMost(list, revision)] ?? 0
  }

  /** Whether an item's state as of one revision is at least as new as that as of another. */
  isAsNew(tenant: string, id: string, asOf: number, than: number, depth: Depth): boolean {
    const [own, wanted] = [timelineOf(asOf), timelineOf(than)]
    const need = this.need(wanted, tenant, id, than, depth)
    if (own > wanted) return true
    if (own === wanted) return asOf >= need
    let fork = Number.POSITIVE_INFINITY
    for (const timeline of this.#order) {
      if (timeline > own && timeline <= wanted)
        fork = Math.min(fork, this.tenant(timeline, tenant)?.fork ?? fork)
    }
    if (depth !== 'removed' && this.need(own, tenant, id, asOf, 'all') > fork) return false
    return Math.min(asOf, fork) >= need
  }

  /** A timeline goes on where the one before it was cut off, and never uses a revision again. */
  #checkForks(report: (violation: Violation) => void): void {
    for (const [i, timeline] of this.#order.entries()) {
      const before = this.#order[i - 1]
      if (before === undefined) continue
      for (const [name, tenant] of this.#timelines.get(timeline) ?? []) {
        const former = this.tenant(before, name)
        if (former === undefined) continue
        for (const row of tenant.log) {
          const known = former.byRevision.get(row.revision)
          if (known === undefined ? row.revision <= former.head : !isSameRow(known, row)) {
            report({ property: 'revision-reused', text: `${name} ${row.revision}`, events: [known, row] })
            break
          }
        }
      }
    }
  }
}

function tenantsOf(
  { timeline, log, audit }: Testimony & { readonly timeline: number },
  report: (violation: Violation) => void,
): Map<string, Tenant> {
  const logs = Map.groupBy(log, (row) => row.tenant)
  const states = Map.groupBy(audit, (row) => row.tenant)
  const tenants = new Map<string, Tenant>()
  for (const name of new Set([...logs.keys(), ...states.keys()])) {
    const rows = logs.get(name) ?? []
    checkLog(timeline, rows, report)
    const byXid = Map.groupBy(rows, (row) => row.xid)
    const byRevision = new Map(rows.map((row) => [row.revision, row]))
    const keys = new Map<string, Key>()
    for (const [id, own] of Map.groupBy(states.get(name) ?? [], (row) => row.id)) {
      keys.set(id, keyOf(own, byXid, byRevision, report))
    }
    const forkAt = rows.findLast((row) => timelineOf(row.revision) < timeline)
    tenants.set(name, {
      keys,
      log: rows,
      revisions: rows.map((row) => row.revision),
      byRevision,
      fork: forkAt?.revision ?? 0,
      head: rows.at(-1)?.revision ?? 0,
    })
  }
  return tenants
}

/** The log has no hole, but where a timeline begins, and no row is too long. */
function checkLog(timeline: number, rows: readonly LogRow[], report: (violation: Violation) => void): void {
  for (const [i, row] of rows.entries()) {
    const before = rows[i - 1]
    if (row.ids.length > 1000 || row.tags.length > 32_000) {
      report({ property: 'row-too-long', text: `${row.ids.length} ids in ${row.revision}`, events: [] })
    }
    if (before === undefined || row.revision === before.revision + 1) continue
    const start = timelineOf(row.revision) * TIMELINE_SPAN
    if (timelineOf(before.revision) < timelineOf(row.revision) && row.revision === start + 1) continue
    report({ property: 'log-hole', text: `timeline ${timeline}`, events: [before, row] })
  }
}

/** The states of one item, in order; each at the revision that the log gives it. */
function keyOf(
  rows: readonly AuditRow[],
  byXid: ReadonlyMap<string, readonly LogRow[]>,
  byRevision: ReadonlyMap<number, LogRow>,
  report: (violation: Violation) => void,
): Key {
  const key: Key = { all: { revisions: [], contents: [], tags: [] }, content: [], removed: [], rows: [] }
  const add = (
    revision: number,
    { content, tags, silent }: Pick<AuditRow, 'content' | 'tags' | 'silent'>,
    row: LogRow | undefined,
  ) => {
    key.all.revisions.push(revision)
    key.all.contents.push(content)
    key.all.tags.push(tags)
    if (!silent || row?.mode === 'REMOVE') key.content.push(revision)
    if (silent ? row?.mode === 'REMOVE' : content === null) key.removed.push(revision)
    if (!silent) key.rows.push(revision)
  }
  for (const [i, row] of rows.entries()) {
    if (row.revision !== null) {
      const logged = byRevision.get(row.revision)
      if (!row.silent && !logged?.ids.includes(row.id)) {
        report({ property: 'unlogged-change', text: `${row.id} at ${row.revision}`, events: [row, logged] })
      }
      // A second statement of the audit's own at one revision (the origin's mark, say) is the same state.
      if (key.all.revisions.at(-1) === row.revision) {
        key.all.contents[key.all.contents.length - 1] = row.content
        key.all.tags[key.all.tags.length - 1] = row.tags
      } else add(row.revision, row, logged)
      continue
    }
    const former = key.all.contents.at(-1) ?? null
    if (row.content === null) {
      const logged = byXid.get(row.xid)?.findLast((one) => one.ids.includes(row.id))
      if (logged !== undefined) add(logged.revision, { content: null, tags: [], silent: false }, logged)
      else if (former !== null)
        report({ property: 'unlogged-change', text: `${row.id} vanished`, events: [row] })
    } else if (row.content !== former) {
      // What the triggers under test see they stamp in the same transaction.
      const stamped = rows
        .slice(i + 1, i + 8)
        .some((later) => later.xid === row.xid && (later.revision !== null || later.content === null))
      if (!stamped) report({ property: 'unlogged-change', text: `${row.id} = ${row.content}`, events: [row] })
    }
  }
  return key
}

export function isSameRow(a: LogRow, b: LogRow): boolean {
  return (
    a.kind === b.kind &&
    a.mode === b.mode &&
    a.writer === b.writer &&
    isSameList(a.ids, b.ids) &&
    isSameList(a.tags, b.tags)
  )
}

const isSameList = (a: readonly string[], b: readonly string[]) =>
  a.length === b.length && a.every((one, i) => one === b[i])

/** The title in a content. */
export const titleOf = (content: string): string => content.slice(0, content.lastIndexOf('|'))
