/**
 * Verifies a recorded history, in time n log n.
 *
 * Every answer says as of which revision it is true, so it can be looked up in the truth; and whether it is new enough is
 * a comparison of revisions.
 *
 * What an answer must know is a revision too: the greatest of what its instance has acknowledged, shown or streamed before
 * the read began; of what anybody has acknowledged longer ago than the bound; of the caller's `min_revision`.
 */
import {
  BOUND_MS,
  type HistoryEvent,
  type ReadEvent,
  type ReadResult,
  SLACK_MS,
  type StreamRow,
  TIMELINE_SPAN,
  timelineOf,
  type WatchEvent,
  type WriteEvent,
} from './history.ts'
import { checkLists } from './lists.ts'
import { type Depth, isSameRow, lastAtMost, Truth, titleOf, type Violation } from './truth.ts'

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
  checkLists(events, truth, report)
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
