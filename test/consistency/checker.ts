/**
 * Verifies a recorded history, in time n log n.
 *
 * The truth is what the databases testify: every state of every item, and the log. A revision names a state of
 * each item, on its timeline; a timeline that replaced another shares its past up to the fork. So every answer, which
 * says as of which revision it is true, can be looked up; and whether it is new enough is a comparison of revisions.
 *
 * What an answer must know is a revision too: the greatest of what its instance has acknowledged, shown or streamed before
 * the read began; of what anybody has acknowledged longer ago than the bound; of the caller's `min_revision`.
 */
import type { AuditRow, LogRow, Testimony } from './audit.ts'
import {
  type Content,
  type HistoryEvent,
  type ReadEvent,
  type ReadResult,
  type StreamRow,
  TIMELINE_SPAN,
  timelineOf,
  type WatchEvent,
  type WriteEvent,
} from './history.ts'

/** A promise that was broken, by whom, and the events that show it. */
export interface Violation {
  readonly property: string
  readonly text: string
  readonly events: readonly unknown[]
}

/** A copy may be served for this long without news of the log, in milliseconds. */
const BOUND_MS = 1500
/** Clocks of two processes on one machine run alike; this is for rounding. */
const SLACK_MS = 20

/** Sorted revisions at which an item changed, and what it was from then on. */
interface Changes {
  readonly revisions: number[]
  readonly contents: Content[]
}

interface Key {
  /** Every change, and every explicit invalidation that the audit shows in the content. */
  readonly all: Changes
  /** Without what mode EXPIRE did. */
  readonly content: number[]
  /** Deletes, and what mode REMOVE did. */
  readonly removed: number[]
  /** Those that went through the triggers: revision of the row, in order. */
  readonly rows: number[]
}

interface Tenant {
  readonly keys: Map<string, Key>
  readonly log: readonly LogRow[]
  readonly revisions: readonly number[]
  readonly byRevision: Map<number, LogRow>
  /** The last revision that this timeline has in common with the one before it. */
  readonly fork: number
  readonly head: number
}

type Depth = 'all' | 'content' | 'removed'

/** Index of the last element that is at most `value`; -1: none. */
function lastAtMost(sorted: readonly number[], value: number): number {
  let [low, high] = [0, sorted.length]
  while (low < high) {
    const middle = (low + high) >>> 1
    if ((sorted[middle] ?? 0) <= value) low = middle + 1
    else high = middle
  }
  return low - 1
}

class Truth {
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
  const key: Key = { all: { revisions: [], contents: [] }, content: [], removed: [], rows: [] }
  const add = (revision: number, content: Content, row: LogRow | undefined, silent: boolean) => {
    key.all.revisions.push(revision)
    key.all.contents.push(content)
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
      } else add(row.revision, row.content, logged, row.silent)
      continue
    }
    const former = key.all.contents.at(-1) ?? null
    if (row.content === null) {
      const logged = byXid.get(row.xid)?.findLast((one) => one.ids.includes(row.id))
      if (logged !== undefined) add(logged.revision, null, logged, false)
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

function isSameRow(a: LogRow, b: LogRow): boolean {
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

/**
 * What one instance must know of one tenant: for every item and for single ones, up to which revision. By depth, because
 * one that has acknowledged a reload, say, need not know of the delete before it.
 */
type Known = Readonly<Record<Depth, { everything: number; readonly keys: Map<string, number> }>>

const ALL: readonly Depth[] = ['all']
const CONTENT: readonly Depth[] = ['all', 'content']
const REMOVED: readonly Depth[] = ['all', 'content', 'removed']

/** All violations of a history, in no particular order, at most about a hundred. */
export function check(events: readonly HistoryEvent[]): readonly Violation[] {
  const violations: Violation[] = []
  const report = (violation: Violation) => {
    if (violations.length < 100) violations.push(violation)
  }
  const testimonies = events.filter((event) => event.t === 'testimony')
  const truth = new Truth(testimonies, report)
  const writes = events.filter((event) => event.t === 'write')
  checkReads(events, truth, report)
  checkWrites(writes, truth, report)
  checkOrigin(writes, truth, report)
  checkStreams(events, truth, report)
  for (const event of events) {
    if (event.t === 'final' && !event.ok)
      report({
        property: 'no-recovery',
        text: `${event.what} after ${Math.round(event.afterMs)} ms`,
        events: [event],
      })
  }
  return violations
}

type Moment =
  | { readonly time: number; readonly order: 0; readonly learn: () => void }
  | { readonly time: number; readonly order: 1; readonly begin: () => void }

/** Sweeps over time: what is known when a read begins is what its answer must show. */
function checkReads(
  events: readonly HistoryEvent[],
  truth: Truth,
  report: (violation: Violation) => void,
): void {
  const known = new Map<string, Known>()
  const knownAt = (at: string, tenant: string): Known => {
    const name = `${at} ${tenant}`
    let found = known.get(name)
    if (found === undefined) {
      const nothing = () => ({ everything: 0, keys: new Map<string, number>() })
      found = { all: nothing(), content: nothing(), removed: nothing() }
      known.set(name, found)
    }
    return found
  }
  const raise = (
    at: string,
    tenant: string,
    id: string | undefined,
    revision: number,
    depths: readonly Depth[],
  ) => {
    const found = knownAt(at, tenant)
    for (const depth of depths) {
      const { keys } = found[depth]
      if (id === undefined) found[depth].everything = Math.max(found[depth].everything, revision)
      else keys.set(id, Math.max(keys.get(id) ?? 0, revision))
    }
  }
  const isSplit = events.some((event) => event.t === 'plan' && event.split)
  const started = new Map<string, number>()
  /** Per tenant: times of acknowledgements, and the greatest revision acknowledged until then. */
  const acknowledged = new Map<string, { times: number[]; revisions: number[] }>()
  const moments: Moment[] = []
  const learn = (time: number, act: () => void) => moments.push({ time, order: 0, learn: act })

  for (const event of events) {
    if (event.t === 'write') {
      started.set(event.op, Math.min(event.start, started.get(event.op) ?? Number.POSITIVE_INFINITY))
      const { revision, at, tenant } = event
      if (revision === undefined) continue
      learn(event.end, () => {
        const acks = acknowledged.get(tenant) ?? { times: [], revisions: [] }
        acknowledged.set(tenant, acks)
        acks.times.push(event.end)
        acks.revisions.push(Math.max(revision, acks.revisions.at(-1) ?? 0))
        if (event.kind === 'sql') return
        for (const id of event.ids) raise(at, tenant, id, revision, depthsOf(event, id, revision, truth))
        // One by tag is acknowledged when the log has been applied; one of everything raises a floor for everything.
        if (event.tags !== undefined) raise(at, tenant, undefined, revision, REMOVED)
        if (event.all) raise(at, tenant, undefined, revision, event.mode === 'REMOVE' ? REMOVED : ALL)
      })
    } else if (event.t === 'watch') {
      const { message, at, tenant } = event
      // An instance sends rows that it has applied.
      const proven =
        message.kind === 'event' ? message.row.revision : message.kind === 'gap' ? message.through : 0
      if (proven > 0) {
        learn(event.time, () => raise(at, tenant, undefined, proven, REMOVED))
      }
    } else if (event.t === 'read') {
      const { at, tenant } = event
      moments.push({
        time: event.start,
        order: 1,
        begin: () => {
          const here = knownAt(at, tenant)
          const knownHere = (id: string, depth: Depth) =>
            Math.max(here[depth].everything, here[depth].keys.get(id) ?? 0)
          const acks = acknowledged.get(tenant)
          const ackedBy = (time: number) => acks?.revisions[lastAtMost(acks.times, time)] ?? 0
          const everybody = isSplit ? 0 : ackedBy(event.start - BOUND_MS - SLACK_MS)
          const fresh = isSplit ? 0 : ackedBy(event.start - 0.001)
          for (const result of event.results) {
            const { id } = result
            const here = {
              all: knownHere(id, 'all'),
              content: knownHere(id, 'content'),
              removed: knownHere(id, 'removed'),
            }
            checkResult(event, result, { here, everybody, fresh }, started, truth, report)
          }
        },
      })
      for (const { id, asOf, stale } of event.results) {
        if (asOf !== undefined && stale === undefined)
          learn(event.end, () => raise(at, tenant, id, asOf, CONTENT))
      }
    }
  }
  // What ends at the moment at which a read begins has not happened before it.
  moments.sort((a, b) => a.time - b.time || b.order - a.order)
  for (const moment of moments) moment.order === 0 ? moment.learn() : moment.begin()
}

/** How much of an item's past an instance knows that acknowledged a write of it. */
function depthsOf(write: WriteEvent, id: string, revision: number, truth: Truth): readonly Depth[] {
  if (write.kind === 'invalidate') return write.mode === 'REMOVE' ? REMOVED : ALL
  const isRemoval = truth.need(timelineOf(revision), write.tenant, id, revision, 'removed') === revision
  return isRemoval ? REMOVED : CONTENT
}

interface Required {
  /** What the instance has acknowledged, shown or streamed. */
  readonly here: Readonly<Record<Depth, number>>
  /** What anybody was told longer ago than the bound. */
  readonly everybody: number
  /** What anybody was told. */
  readonly fresh: number
}

function checkResult(
  event: ReadEvent,
  result: ReadResult,
  required: Required,
  started: ReadonlyMap<string, number>,
  truth: Truth,
  report: (violation: Violation) => void,
): void {
  const { tenant, min } = event
  const { id, content, asOf, stale } = result
  const bad = (property: string, text: string) =>
    report({
      property,
      text: `${tenant}/${id} at ${event.at}: ${text}`,
      events: [{ ...event, results: [result] }, required],
    })
  if (result.error !== undefined) {
    if (/^(2|13) /.test(result.error)) bad('internal-error', result.error)
    if (/^11 /.test(result.error)) bad('ahead-of-log', `min_revision ${min} had been shown`)
    return
  }
  if (content === undefined) return
  if (asOf === undefined) return void bad('undated', 'the answer has no as-of')
  if (!truth.knows(timelineOf(asOf)))
    return void bad('as-of-untrue', `there is no timeline ${timelineOf(asOf)}`)
  const { head = 0 } = truth.tenant(timelineOf(asOf), tenant) ?? {}
  if (asOf > Math.max(head, timelineOf(asOf) * TIMELINE_SPAN))
    bad('from-the-future', `as of ${asOf}, head ${head}`)
  if (content !== null) {
    const begun = started.get(titleOf(content))
    if (begun !== undefined && begun > event.end) bad('from-the-future', `${content} was written later`)
  }
  const actual = truth.contentAt(tenant, id, asOf)
  if (actual !== content) return void bad('as-of-untrue', `${content} as of ${asOf}, when it was ${actual}`)

  const isAsNew = (than: number, depth: Depth) => truth.isAsNew(tenant, id, asOf, than, depth)
  if (min > 0 && (asOf < min || !isAsNew(min, 'all'))) bad('min-revision', `as of ${asOf}, asked for ${min}`)
  if (!isAsNew(required.here.removed, 'removed'))
    bad('resurrected', `as of ${asOf}, removed by ${required.here.removed}`)
  if (stale === 'TIER_DOWN') return
  if (stale === 'REVALIDATING' || stale === 'SOFT_TIMEOUT') {
    if (!isAsNew(required.here.content, 'content'))
      bad('stale-superseded', `as of ${asOf}, known here ${required.here.content}`)
    return
  }
  if (!isAsNew(required.here.all, 'all'))
    bad('behind-itself', `as of ${asOf}, known here ${required.here.all}`)
  if (stale !== undefined) return
  if (!isAsNew(required.everybody, 'all'))
    bad('beyond-bound', `as of ${asOf}, known for long ${required.everybody}`)
  if (event.freshness === 'FRESH' && !isAsNew(required.fresh, 'all'))
    bad('not-fresh', `as of ${asOf}, acknowledged ${required.fresh}`)
}

const titleOf = (content: string): string => content.slice(0, content.lastIndexOf('|'))

/** Refusals after which nothing has been written. */
const isRefusal = (error: string) => /^(3|5|6|9|10|11) /.test(error)

function checkWrites(
  writes: readonly WriteEvent[],
  truth: Truth,
  report: (violation: Violation) => void,
): void {
  const transactions = new Map<string, Set<string>>()
  for (const timeline of truth.timelines) {
    for (const tenant of new Set(writes.map((write) => write.tenant))) {
      for (const row of truth.tenant(timeline, tenant)?.log ?? []) {
        if (row.writer === '') continue
        const name = `${timeline} ${row.writer}`
        const xids = transactions.get(name)
        if (xids === undefined) transactions.set(name, new Set([row.xid]))
        else xids.add(row.xid)
      }
    }
  }
  for (const [op, attempts] of Map.groupBy(writes, (write) => write.op)) {
    const bad = (property: string, text: string) =>
      report({ property, text: `${op}: ${text}`, events: attempts })
    for (const timeline of truth.timelines) {
      const times = transactions.get(`${timeline} ${op}`)?.size ?? 0
      if (times > 1) bad('applied-twice', `${times} transactions`)
      if (times > 0 && attempts.every(({ error }) => error !== undefined && isRefusal(error))) {
        bad('refused-but-applied', attempts[0]?.error ?? '')
      }
    }
    for (const attempt of attempts) {
      if (attempt.error !== undefined && /^(2|13) /.test(attempt.error)) bad('internal-error', attempt.error)
      if (attempt.revision !== undefined) checkAcknowledged(attempt, attempt.revision, truth, bad)
    }
  }
}

/** An acknowledged write is in the log of its timeline; what follows from that for later timelines, the forks say. */
function checkAcknowledged(
  write: WriteEvent,
  revision: number,
  truth: Truth,
  bad: (property: string, text: string) => void,
): void {
  const { op, tenant, kind } = write
  const own = truth.tenant(timelineOf(revision), tenant)
  const row = own?.byRevision.get(revision)
  if (kind === 'sql') {
    if (write.ids.length > 0 && row === undefined) bad('write-lost', `no row ${revision}`)
    return
  }
  if (kind === 'invalidate') {
    if (row === undefined || (row.writer !== op && !write.refreshOrigin))
      bad('write-lost', `no row ${revision} of it`)
    return
  }
  const [id = ''] = write.ids
  const content = truth.contentAt(tenant, id, revision)
  if (kind === 'delete') {
    // One that found nothing changes nothing; somebody may have created the item by the time it was answered.
    const foundNothing = row?.writer !== op && truth.contentAt(tenant, id, revision - 1) === null
    if (content !== null && !foundNothing) bad('write-lost', `${id} is ${content} at ${revision}`)
    return
  }
  if (row?.writer !== op || content === null || titleOf(content) !== op) {
    bad('write-lost', `${id} is ${content} at ${revision}, written by ${row?.writer}`)
  }
  if (write.content != null && write.content !== content)
    bad('as-of-untrue', `answered ${write.content}, wrote ${content}`)
  if (write.etagRevision !== undefined) {
    const rows = own?.keys.get(id)?.rows ?? []
    const before = rows[lastAtMost(rows, revision - 1)]
    if (before !== write.etagRevision)
      bad('lost-update', `etag of ${write.etagRevision}, overwrote ${before}`)
  }
}

/**
 * The origin never overwrites what was written here, and what was deleted here comes back only when somebody asks for it.
 * Rows of the log without a writer are the origin's.
 */
function checkOrigin(
  writes: readonly WriteEvent[],
  truth: Truth,
  report: (violation: Violation) => void,
): void {
  const refreshes = Map.groupBy(
    writes.filter((write) => write.refreshOrigin),
    (write) => write.tenant,
  )
  for (const timeline of truth.timelines) {
    for (const name of new Set(writes.map((write) => write.tenant))) {
      const tenant = truth.tenant(timeline, name)
      if (tenant === undefined) continue
      const asked = new Map((refreshes.get(name) ?? []).map((write) => [write.op, write]))
      for (const [id, { rows, all }] of tenant.keys) {
        for (const [i, revision] of rows.entries()) {
          const row = tenant.byRevision.get(revision)
          const before = tenant.byRevision.get(rows[i - 1] ?? 0)
          if (row?.writer !== '' || before === undefined || before.writer === '') continue
          const was = all.contents[lastAtMost(all.revisions, revision - 1)] ?? null
          const bad = (property: string) =>
            report({ property, text: `${name}/${id}: the origin, after ${was}`, events: [before, row] })
          if (was !== null) bad('lost-update')
          // Deleted by hand, it is forgotten, and the origin may know it.
          else if (!before.writer.startsWith('psql')) {
            const refreshed = tenant.log.some(
              (one) =>
                one.revision < revision &&
                one.revision > before.revision &&
                asked.get(one.writer)?.ids.includes(id),
            )
            const underWay = [...asked.values()].some(
              (write) =>
                write.ids.includes(id) && (write.revision ?? Number.POSITIVE_INFINITY) >= before.revision,
            )
            if (!refreshed && !underWay) bad('resurrected')
          }
        }
      }
    }
  }
}

/** Each watcher, over all its connections: every revision once and in order, or a gap that names it. */
function checkStreams(
  events: readonly HistoryEvent[],
  truth: Truth,
  report: (violation: Violation) => void,
): void {
  const watches = events.filter((event) => event.t === 'watch')
  const hasHoles = truth.timelines.length > 1 || events.some((event) => event.t === 'plan' && event.trims)
  for (const [watcher, own] of Map.groupBy(watches, (watch) => watch.watcher))
    checkStream(watcher, own, hasHoles, truth, report)
}

function checkStream(
  watcher: string,
  events: readonly WatchEvent[],
  /** Whether the log has lost rows, by a failover or by trimming. */
  hasHoles: boolean,
  truth: Truth,
  report: (violation: Violation) => void,
): void {
  let cursor: number | undefined
  let wanted: { readonly ids: readonly string[]; readonly tags: readonly string[] } = { ids: [], tags: [] }
  let isStarted = false

  for (const event of events) {
    const { message, tenant } = event
    const bad = (property: string, text: string) =>
      report({ property, text: `${watcher} at ${event.at}: ${text}`, events: [event, { cursor }] })
    if (message.kind === 'open') {
      isStarted = false
      wanted = message
      if (message.resumeAfter !== cursor)
        throw new Error(`${watcher} resumed after another revision than its own`)
      continue
    }
    if (message.kind === 'end') {
      if (message.error !== undefined && /^(2|13) /.test(message.error)) bad('internal-error', message.error)
      if (message.error !== undefined && /^11 /.test(message.error))
        bad('ahead-of-log', `resume after ${cursor}`)
      continue
    }
    if (message.kind === 'started') {
      if (isStarted) bad('stream-started', 'started twice')
      if (cursor !== undefined && message.position !== cursor)
        bad('stream-started', `resumed after ${cursor}, started at ${message.position}`)
      isStarted = true
      cursor = message.position
      continue
    }
    if (!isStarted || cursor === undefined) {
      bad('stream-started', `${message.kind} came first`)
      return
    }
    switch (message.kind) {
      case 'event': {
        const { row } = message
        const logged = truth.tenant(timelineOf(row.revision), tenant)?.byRevision.get(row.revision)
        if (row.revision <= cursor) bad('stream-repeated', `${row.revision} after ${cursor}`)
        if (logged === undefined || !isSameRow(logged, { ...row, tenant, xid: '' }))
          bad('stream-untrue', `${JSON.stringify(row)} is logged as ${JSON.stringify(logged)}`)
        const missed = missing(truth, tenant, cursor, row.revision - 1, wanted)
        if (missed !== undefined) bad('stream-missed', `${missed} before ${row.revision}`)
        cursor = Math.max(cursor, row.revision)
        break
      }
      case 'heartbeat': {
        const missed = missing(truth, tenant, cursor, message.revision, wanted)
        if (missed !== undefined)
          bad('stream-heartbeat', `${missed} was not sent before heartbeat ${message.revision}`)
        if (message.revision < cursor) bad('stream-heartbeat', `${message.revision} after ${cursor}`)
        cursor = Math.max(cursor, message.revision)
        break
      }
      case 'gap':
        if (isPlain(wanted) && message.after !== cursor)
          bad('stream-gap', `after ${message.after}, sent up to ${cursor}`)
        if (!hasHoles) bad('stream-gap', `${message.after} to ${message.through}, although the log is whole`)
        cursor = Math.max(cursor, message.through)
        break
      case 'draining':
        break
    }
  }
}

type Wanted = { readonly ids: readonly string[]; readonly tags: readonly string[] }

const isPlain = ({ ids, tags }: Wanted) => ids.length === 0 && tags.length === 0

/** The first row after `from` and up to `to` that a watcher wants. */
function missing(truth: Truth, tenant: string, from: number, to: number, wanted: Wanted): number | undefined {
  if (to <= from) return undefined
  const own = truth.tenant(timelineOf(to), tenant)
  if (own === undefined) return undefined
  if (isPlain(wanted) && timelineOf(from) === timelineOf(to)) return from + 1
  for (let i = lastAtMost(own.revisions, from) + 1; i < own.log.length; i++) {
    const row = own.log[i]
    if (row === undefined || row.revision > to) return undefined
    if (isWanted(row, wanted)) return row.revision
  }
  return undefined
}

/** Whether a row is one that a watcher with these selectors must be sent. */
function isWanted(row: StreamRow, { ids, tags }: Wanted): boolean {
  if (ids.length === 0 && tags.length === 0) return true
  if (row.kind === 'TENANT_INVALIDATED') return true
  return row.ids.some((id) => ids.includes(id)) || row.tags.some((tag) => tags.includes(tag))
}
