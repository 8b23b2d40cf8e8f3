/**
 * Verifies list pages. A page is a copy of many items: it must be what the tenant held as of its revision, and a page
 * that is not marked must know every change of the list that its instance has acknowledged or streamed, and that
 * anybody was told longer ago than the bound.
 *
 * Explicit invalidations do not count: they concern copies, and a page is one only of its own tag.
 */
import {
  BOUND_MS,
  type HistoryEvent,
  type ListEvent,
  SLACK_MS,
  TIMELINE_SPAN,
  timelineOf,
} from './history.ts'
import { type Changes, lastAtMost, type Tenant, type Truth, titleOf, type Violation } from './truth.ts'

/** What an instance must know of a tenant's rows: of every item, and of single ones, up to which revision. */
interface Known {
  everything: number
  readonly keys: Map<string, number>
  /** The newest page of each list that was shown unmarked. */
  readonly pages: Map<string, number>
}

export function checkLists(
  events: readonly HistoryEvent[],
  truth: Truth,
  report: (violation: Violation) => void,
): void {
  const known = new Map<string, Known>()
  const knownAt = (at: string, tenant: string): Known => {
    const name = `${at} ${tenant}`
    const found = known.get(name) ?? { everything: 0, keys: new Map(), pages: new Map() }
    known.set(name, found)
    return found
  }
  const isSplit = events.some((event) => event.t === 'plan' && event.split)
  const acknowledged = new Map<string, { times: number[]; revisions: number[] }>()
  const moments: { readonly time: number; readonly order: 0 | 1; readonly act: () => void }[] = []
  const learn = (time: number, act: () => void) => moments.push({ time, order: 0, act })
  for (const event of events) {
    if (event.t === 'write' && event.revision !== undefined && event.kind !== 'invalidate') {
      const { revision, at, tenant, end, ids } = event
      learn(end, () => {
        const acks = acknowledged.get(tenant) ?? { times: [], revisions: [] }
        acknowledged.set(tenant, acks)
        acks.times.push(end)
        acks.revisions.push(Math.max(revision, acks.revisions.at(-1) ?? 0))
        if (event.kind === 'sql') return
        const { keys } = knownAt(at, tenant)
        for (const id of ids) keys.set(id, Math.max(revision, keys.get(id) ?? 0))
      })
    } else if (event.t === 'watch') {
      const { message, at, tenant, time } = event
      const proven =
        message.kind === 'event' ? message.row.revision : message.kind === 'gap' ? message.through : 0
      learn(time, () => {
        const here = knownAt(at, tenant)
        here.everything = Math.max(here.everything, proven)
      })
    } else if (event.t === 'list') {
      const { at, tenant, asOf, stale, tag } = event
      moments.push({
        time: event.start,
        order: 1,
        act: () => {
          const { everything, keys, pages } = knownAt(at, tenant)
          const acks = acknowledged.get(tenant)
          const old = acks?.revisions[lastAtMost(acks.times, event.start - BOUND_MS - SLACK_MS)] ?? 0
          checkPage(
            event,
            { everything, keys: new Map(keys), page: pages.get(tag) ?? 0, everybody: isSplit ? 0 : old },
            truth,
            report,
          )
        },
      })
      if (asOf === undefined || stale !== undefined) continue
      learn(event.end, () => {
        const { pages } = knownAt(at, tenant)
        pages.set(tag, Math.max(asOf, pages.get(tag) ?? 0))
      })
    }
  }
  moments.sort((a, b) => a.time - b.time || b.order - a.order)
  for (const { act } of moments) act()
}

interface Required {
  readonly everything: number
  readonly keys: ReadonlyMap<string, number>
  /** The newest page of this list that the instance has shown. */
  readonly page: number
  readonly everybody: number
}

function checkPage(
  event: ListEvent,
  required: Required,
  truth: Truth,
  report: (violation: Violation) => void,
): void {
  const { tenant, at, tag, asOf, stale, items, upTo, error } = event
  const bad = (property: string, text: string) =>
    report({ property, text: `list '${tag}' of ${tenant} at ${at}: ${text}`, events: [event, required] })
  if (error !== undefined) {
    if (/^(2|13) /.test(error)) bad('internal-error', error)
    return
  }
  if (asOf === undefined) return void bad('undated', 'the page has no revision')
  const timeline = timelineOf(asOf)
  if (!truth.knows(timeline)) return void bad('as-of-untrue', `there is no timeline ${timeline}`)
  const own = truth.tenant(timeline, tenant)
  if (asOf > Math.max(own?.head ?? 0, timeline * TIMELINE_SPAN)) bad('from-the-future', `as of ${asOf}`)

  const listed = new Map(items.map(({ id, title }) => [id, title]))
  for (const [id, { all }] of own?.keys ?? []) {
    if (upTo !== undefined && id > upTo) continue
    const title = titleIn(all, lastAtMost(all.revisions, asOf), tag)
    if (listed.get(id) !== title) {
      return void bad('as-of-untrue', `${id} is ${listed.get(id)} as of ${asOf}, when it was ${title}`)
    }
    listed.delete(id)
  }
  for (const [id] of listed) return void bad('as-of-untrue', `${id} as of ${asOf}, when there was none`)

  const knownOf = (id: string) => Math.max(required.everything, required.keys.get(id) ?? 0)
  for (const { id } of items) {
    if (isDeletedBetween(own, id, asOf, knownOf(id))) {
      bad('resurrected', `${id} as of ${asOf}, deleted before ${knownOf(id)}`)
    }
  }
  if (stale === 'TIER_DOWN') return
  const changed = (than: (id: string) => number) => {
    for (const wanted of truth.timelines) {
      for (const id of truth.tenant(wanted, tenant)?.keys.keys() ?? []) {
        if (upTo !== undefined && id > upTo) continue
        const bound = than(id)
        if (timelineOf(bound) === wanted && isListChanged(truth, tenant, id, asOf, bound, tag)) return id
      }
    }
    return undefined
  }
  if (stale !== undefined) return
  const here = changed((id) => Math.max(knownOf(id), required.page))
  if (here !== undefined) bad('behind-itself', `as of ${asOf}, and ${here} changed by ${knownOf(here)}`)
  const late = changed(() => required.everybody)
  if (late !== undefined) bad('beyond-bound', `as of ${asOf}, and ${late} changed by ${required.everybody}`)
}

/** What a list shows of one state of an item; `undefined`: the item is not in it. */
function titleIn({ contents, tags }: Changes, index: number, tag: string): string | undefined {
  const content = contents[index] ?? null
  if (content === null || (tag !== '' && !tags[index]?.includes(tag))) return undefined
  return titleOf(content)
}

/** Whether a list that was read as of one revision shows something else of an item than as of a later one of `than`'s timeline. */
function isListChanged(
  truth: Truth,
  tenant: string,
  id: string,
  asOf: number,
  than: number,
  tag: string,
): boolean {
  const [own, wanted] = [timelineOf(asOf), timelineOf(than)]
  if (own > wanted) return false
  const there = truth.tenant(wanted, tenant)
  const key = there?.keys.get(id)
  if (there === undefined || key === undefined) return false
  let from = asOf
  if (own < wanted) {
    for (const timeline of truth.timelines) {
      if (timeline > own && timeline <= wanted)
        from = Math.min(from, truth.tenant(timeline, tenant)?.fork ?? from)
    }
  }
  const { all, rows } = key
  const last = rows[lastAtMost(rows, than)] ?? 0
  if (last <= from) return false
  const before = titleIn(all, lastAtMost(all.revisions, from), tag)
  return before !== titleIn(all, lastAtMost(all.revisions, last), tag)
}

function isDeletedBetween(tenant: Tenant | undefined, id: string, asOf: number, known: number): boolean {
  const all = tenant?.keys.get(id)?.all
  if (all === undefined || timelineOf(asOf) !== timelineOf(known)) return false
  for (let i = lastAtMost(all.revisions, known); i >= 0 && (all.revisions[i] ?? 0) > asOf; i--) {
    if (all.contents[i] === null) return true
  }
  return false
}
