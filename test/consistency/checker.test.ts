import { describe, expect, test } from 'vitest'
import type { AuditRow, LogRow } from './audit.ts'
import { check } from './checker.ts'
import {
  type HistoryEvent,
  type ListEvent,
  type ReadEvent,
  type ReadResult,
  type StreamMessage,
  TIMELINE_SPAN,
  type WriteEvent,
} from './history.ts'

const S = TIMELINE_SPAN
const T = 'tenant'

/** A history in the making: what is committed goes into the testimony, what is called into the events. */
class Story {
  readonly events: HistoryEvent[] = []
  readonly log: LogRow[] = []
  readonly audit: AuditRow[] = []
  readonly replaced: HistoryEvent[] = []
  timeline = 1

  /** What PostgreSQL commits: an item's new content, or null for a delete. */
  commit(revision: number, id: string, content: string | null, more: Partial<LogRow> = {}): void {
    const { tags = [] } = more
    const row = this.logOnly(revision, {
      kind: content === null ? 'DELETED' : 'UPSERTED',
      ids: [id],
      ...more,
    })
    const mode = content === null ? 'REMOVE' : 'EXPIRE'
    this.log[this.log.length - 1] = { ...row, mode: more.mode ?? mode }
    this.audit.push({
      tenant: T,
      id,
      revision,
      content,
      row_revision: revision,
      silent: false,
      tags,
      xid: row.xid,
    })
  }

  /** An explicit invalidation, which the audit shows in the content. */
  invalidate(revision: number, id: string, content: string, mode: 'EXPIRE' | 'REMOVE', writer = 'x'): void {
    const { xid } = this.logOnly(revision, { kind: 'KEYS_INVALIDATED', mode, ids: [id], writer })
    this.audit.push({ tenant: T, id, revision, content, row_revision: null, silent: true, tags: [], xid })
  }

  logOnly(revision: number, more: Partial<LogRow> = {}): LogRow {
    const row = {
      tenant: T,
      revision,
      kind: 'UPSERTED',
      mode: 'EXPIRE',
      ids: [],
      tags: [],
      writer: 'x',
      xid: `${revision}`,
      ...more,
    }
    this.log.push(row)
    return row
  }

  write(at: string, [start, end]: readonly [number, number], more: Partial<WriteEvent>): void {
    const call = { t: 'write', op: 'x', client: '0', tenant: T, kind: 'update', ids: ['a'] } as const
    this.events.push({ ...call, at, start, end, ...more })
  }

  read(
    at: string,
    [start, end]: readonly [number, number],
    result: Partial<ReadResult>,
    more: Partial<ReadEvent> = {},
  ): void {
    const call = { t: 'read', op: 'r', client: '0', tenant: T, freshness: 'DEFAULT', min: 0 } as const
    this.events.push({ ...call, at, start, end, results: [{ id: 'a', ...result }], ...more })
  }

  list(
    at: string,
    [start, end]: readonly [number, number],
    asOf: number,
    more: Partial<ListEvent> = {},
  ): void {
    const call = { t: 'list', op: 'l', client: '0', tenant: T, tag: '', items: [] } as const
    this.events.push({ ...call, at, start, end, asOf, ...more })
  }

  watch(time: number, message: StreamMessage, at = 'A'): void {
    this.events.push({ t: 'watch', watcher: 'w', at, tenant: T, time, message })
  }

  /** The primary dies, and the standby knows nothing after `fork`. */
  failOver(fork: number): void {
    this.replaced.push({
      t: 'testimony',
      timeline: this.timeline,
      log: [...this.log],
      audit: [...this.audit],
    })
    this.timeline++
    const keep = <R extends { readonly revision: number | null }>(rows: R[]) => {
      const kept = rows.filter(({ revision }) => (revision ?? 0) <= fork)
      rows.splice(0, rows.length, ...kept)
    }
    keep(this.log)
    keep(this.audit)
  }

  /** The broken promises, each named once. */
  verdict(): readonly string[] {
    const { timeline, log, audit } = this
    const testimony: HistoryEvent = { t: 'testimony', timeline, log, audit }
    const found = check([...this.events, ...this.replaced, testimony])
    return [...new Set(found.map(({ property }) => property))].sort()
  }
}

/** Two versions of item a, the second acknowledged at A from 100 to 110 ms. */
function twoVersions(): Story {
  const story = new Story()
  story.commit(S + 1, 'a', 'v1|')
  story.commit(S + 2, 'a', 'v2|', { writer: 'v2' })
  story.write('A', [100, 110], { op: 'v2', revision: S + 2, content: 'v2|' })
  return story
}

const OLD = { content: 'v1|', asOf: S + 1 }
const NEW = { content: 'v2|', asOf: S + 2 }

describe('the checker accepts', () => {
  test('an old answer of another instance within the bound, and the new one at the writer', () => {
    const story = twoVersions()
    story.read('A', [120, 121], NEW)
    story.read('B', [120, 121], OLD)
    story.read('B', [1600, 1601], OLD)
    expect(story.verdict()).toEqual([])
  })

  test('an old answer of the writer to a reader who began before the acknowledgement', () => {
    const story = twoVersions()
    story.read('A', [105, 130], OLD)
    expect(story.verdict()).toEqual([])
  })

  test('a marked old answer while the tiers below are down', () => {
    const story = twoVersions()
    story.read('A', [9000, 9001], { ...OLD, stale: 'TIER_DOWN' })
    expect(story.verdict()).toEqual([])
  })

  test('the loss of an acknowledged write by a failover', () => {
    const story = twoVersions()
    story.failOver(S + 1)
    story.read('A', [200, 201], { content: 'v1|', asOf: 2 * S })
    story.commit(2 * S + 1, 'a', 'v3|', { writer: 'v3' })
    story.write('B', [300, 310], { op: 'v3', revision: 2 * S + 1 })
    story.read('A', [2000, 2001], { content: 'v3|', asOf: 2 * S + 1 })
    expect(story.verdict()).toEqual([])
  })

  test('a stream that stops and goes on elsewhere', () => {
    const story = twoVersions()
    story.watch(1, { kind: 'open', ids: [], tags: [] })
    story.watch(2, { kind: 'started', position: S, oldest: S })
    story.watch(3, event(story, 0))
    story.watch(4, { kind: 'heartbeat', revision: S + 1 })
    story.watch(5, { kind: 'open', ids: [], tags: [], resumeAfter: S + 1 })
    story.watch(6, { kind: 'started', position: S + 1, oldest: S }, 'B')
    story.watch(7, event(story, 1), 'B')
    expect(story.verdict()).toEqual([])
  })
})

function event(story: Story, index: number): StreamMessage {
  const { tenant, xid, ...row } = story.log[index] as LogRow
  return { kind: 'event', row }
}

describe('the checker notices', () => {
  test('an answer whose content is not what the item was as of its revision', () => {
    const story = twoVersions()
    story.read('B', [120, 121], { content: 'v1|', asOf: S + 2 })
    expect(story.verdict()).toContain('as-of-untrue')
  })

  test('an absence that was none, and an item that was absent', () => {
    const story = twoVersions()
    story.commit(S + 3, 'a', null)
    story.read('B', [120, 121], { content: null, asOf: S + 2 })
    story.read('B', [120, 121], { content: 'v2|', asOf: S + 3 })
    expect(
      check([...story.events, { t: 'testimony', timeline: 1, log: story.log, audit: story.audit }]),
    ).toHaveLength(2)
  })

  test('an item of another key', () => {
    const story = twoVersions()
    story.commit(S + 3, 'b', 'v3|')
    story.read('B', [120, 121], { content: 'v3|', asOf: S + 3 })
    expect(story.verdict()).toEqual(['as-of-untrue'])
  })

  test('an answer without a date, and one dated on a timeline that never was', () => {
    const story = twoVersions()
    story.read('B', [120, 121], { content: 'v2|' })
    story.read('B', [120, 121], { content: 'v2|', asOf: 7 * S })
    expect(story.verdict()).toEqual(['as-of-untrue', 'undated'])
  })

  test('an answer from ahead of the log, and one that shows a write before it began', () => {
    const ahead = twoVersions()
    ahead.read('B', [120, 121], { content: 'v2|', asOf: S + 9 })
    expect(ahead.verdict()).toEqual(['from-the-future'])
    const early = twoVersions()
    early.read('B', [50, 60], NEW)
    expect(early.verdict()).toEqual(['from-the-future'])
  })

  test('an instance that is behind its own acknowledgement, what it has shown, or what it has streamed', () => {
    const acknowledged = twoVersions()
    acknowledged.read('A', [120, 121], OLD)
    expect(acknowledged.verdict()).toEqual(['behind-itself'])
    const shown = twoVersions()
    shown.read('B', [120, 121], NEW)
    shown.read('B', [122, 123], OLD)
    expect(shown.verdict()).toEqual(['behind-itself'])
    const streamed = twoVersions()
    streamed.watch(1, { kind: 'open', ids: [], tags: [] })
    streamed.watch(2, { kind: 'started', position: S + 1, oldest: S })
    streamed.watch(120, event(streamed, 1))
    streamed.read('A', [130, 131], OLD)
    expect(streamed.verdict()).toEqual(['behind-itself'])
  })

  test('an answer that misses, after the bound, what another instance or psql was told', () => {
    const other = twoVersions()
    other.read('B', [1700, 1701], OLD)
    expect(other.verdict()).toEqual(['beyond-bound'])
    const psql = new Story()
    psql.commit(S + 1, 'a', 'v1|')
    psql.commit(S + 2, 'a', 'v2|', { writer: 'psql.1' })
    psql.write('psql', [100, 110], { op: 'psql.1', kind: 'sql', ids: ['?'], revision: S + 2 })
    psql.read('B', [1700, 1701], OLD)
    expect(psql.verdict()).toEqual(['beyond-bound'])
  })

  test('an answer below min_revision, marked or not', () => {
    const story = twoVersions()
    story.read('B', [120, 121], { ...OLD, stale: 'TIER_DOWN' }, { min: S + 2 })
    expect(story.verdict()).toEqual(['min-revision'])
  })

  test('a FRESH answer that misses what was acknowledged anywhere', () => {
    const story = twoVersions()
    story.read('B', [120, 121], OLD, { freshness: 'FRESH' })
    expect(story.verdict()).toEqual(['not-fresh'])
  })

  test('a removed item, even when it is marked as stale', () => {
    const story = twoVersions()
    story.commit(S + 3, 'a', null, { writer: 'd' })
    story.write('A', [200, 210], { op: 'd', kind: 'delete', revision: S + 3 })
    story.read('A', [300, 301], { ...NEW, stale: 'TIER_DOWN' })
    expect(story.verdict()).toEqual(['resurrected'])
    const removed = twoVersions()
    removed.invalidate(S + 3, 'a', 'v2|r', 'REMOVE', 'i')
    removed.write('A', [200, 210], { op: 'i', kind: 'invalidate', mode: 'REMOVE', revision: S + 3 })
    removed.read('A', [300, 301], { ...NEW, stale: 'TIER_DOWN' })
    expect(removed.verdict()).toEqual(['resurrected'])
  })

  test('a superseded copy that is served while it reloads; an expired one may be', () => {
    const superseded = twoVersions()
    superseded.read('A', [120, 121], { ...OLD, stale: 'REVALIDATING' })
    expect(superseded.verdict()).toEqual(['stale-superseded'])
    const expired = twoVersions()
    expired.invalidate(S + 3, 'a', 'v2|r', 'EXPIRE', 'i')
    expired.write('A', [200, 210], { op: 'i', kind: 'invalidate', mode: 'EXPIRE', revision: S + 3 })
    expired.read('A', [300, 301], { ...NEW, stale: 'REVALIDATING' })
    expect(expired.verdict()).toEqual([])
    expired.read('A', [300, 301], NEW)
    expect(expired.verdict()).toEqual(['behind-itself'])
  })

  test('a copy of a commit that a failover has lost, after the instance has shown the new timeline', () => {
    const story = twoVersions()
    story.failOver(S + 1)
    story.read('B', [200, 201], { content: 'v1|', asOf: 2 * S })
    story.read('B', [210, 211], NEW)
    expect(story.verdict()).toEqual(['behind-itself'])
  })

  test('internal errors, and a revision that was shown and is called ahead of the log', () => {
    const story = twoVersions()
    story.read('B', [120, 121], { error: '13 INTERNAL' })
    story.read('B', [120, 121], { error: '11 REVISION_AHEAD_OF_LOG' })
    story.write('B', [120, 121], { op: 'y', error: '13 INTERNAL' })
    expect(story.verdict()).toEqual(['ahead-of-log', 'internal-error'])
  })

  test('an acknowledged write that is not in PostgreSQL', () => {
    const story = twoVersions()
    story.write('B', [300, 310], { op: 'v3', revision: S + 3 })
    expect(story.verdict()).toEqual(['write-lost'])
    const invalidation = twoVersions()
    invalidation.write('B', [300, 310], { op: 'i', kind: 'invalidate', mode: 'EXPIRE', revision: S + 3 })
    expect(invalidation.verdict()).toContain('write-lost')
    const sql = twoVersions()
    sql.write('psql', [300, 310], { op: 'psql.1', kind: 'sql', ids: ['?'], revision: S + 3 })
    expect(sql.verdict()).toContain('write-lost')
    const undone = twoVersions()
    undone.commit(S + 3, 'b', 'v1|')
    undone.commit(S + 4, 'b', 'v2|')
    undone.write('B', [300, 310], { op: 'd', kind: 'delete', ids: ['b'], revision: S + 4 })
    expect(undone.verdict()).toContain('write-lost')
  })

  test('a request that was applied twice, and one that was refused and applied', () => {
    const twice = twoVersions()
    twice.commit(S + 3, 'a', 'v2|', { writer: 'v2' })
    expect(twice.verdict()).toEqual(['applied-twice'])
    const refused = twoVersions()
    refused.commit(S + 3, 'a', 'v3|', { writer: 'v3' })
    refused.write('A', [300, 310], { op: 'v3', error: '6 ALREADY_EXISTS' })
    expect(refused.verdict()).toEqual(['refused-but-applied'])
  })

  test('a write with an etag that overwrote another version', () => {
    const story = twoVersions()
    story.commit(S + 3, 'a', 'v3|', { writer: 'v3' })
    story.write('A', [300, 310], { op: 'v3', revision: S + 3, etagRevision: S + 1 })
    expect(story.verdict()).toEqual(['lost-update'])
  })

  test('an origin that overwrites what was written here, or brings back what was deleted here', () => {
    const overwrites = twoVersions()
    overwrites.commit(S + 3, 'a', 'o1|', { writer: '' })
    expect(overwrites.verdict()).toEqual(['lost-update'])
    const revives = twoVersions()
    revives.commit(S + 3, 'a', null, { writer: 'd' })
    revives.commit(S + 4, 'a', 'o1|', { writer: '' })
    expect(revives.verdict()).toEqual(['resurrected'])
    const byHand = twoVersions()
    byHand.commit(S + 3, 'a', null, { writer: 'psql.1' })
    byHand.commit(S + 4, 'a', 'o1|', { writer: '' })
    expect(byHand.verdict()).toEqual([])
  })

  test('a log with a hole or with a row that is too long', () => {
    const hole = twoVersions()
    hole.logOnly(S + 4)
    expect(hole.verdict()).toEqual(['log-hole'])
    const long = twoVersions()
    long.logOnly(S + 3, { ids: Array.from({ length: 1001 }, (_, i) => `${i}`) })
    expect(long.verdict()).toEqual(['row-too-long'])
  })

  test('a change that has no row in the log', () => {
    const story = twoVersions()
    const change = { tenant: T, id: 'b', row_revision: null, silent: false, tags: [], xid: '99' }
    story.audit.push({ ...change, revision: null, content: 'v9|' })
    expect(story.verdict()).toEqual(['unlogged-change'])
    const vanished = twoVersions()
    vanished.audit.push({ ...change, id: 'a', revision: null, content: null })
    expect(vanished.verdict()).toEqual(['unlogged-change'])
  })

  test('a revision that a failover has let be used again', () => {
    const story = twoVersions()
    story.failOver(S + 1)
    story.commit(S + 2, 'a', 'v3|', { writer: 'v3' })
    expect(story.verdict()).toContain('revision-reused')
  })

  test.each<[string, StreamMessage[]]>([
    ['stream-started', [{ kind: 'heartbeat', revision: S }]],
    ['stream-started', [start(S), start(S)]],
    ['stream-repeated', [start(S + 2), { kind: 'event', row: rowOf(S + 2) }]],
    ['stream-missed', [start(S), { kind: 'event', row: rowOf(S + 2) }]],
    ['stream-untrue', [start(S + 1), { kind: 'event', row: { ...rowOf(S + 2), ids: ['b'] } }]],
    ['stream-heartbeat', [start(S), { kind: 'heartbeat', revision: S + 1 }]],
    ['stream-heartbeat', [start(S + 2), { kind: 'heartbeat', revision: S + 1 }]],
    ['stream-gap', [start(S), { kind: 'gap', after: S, through: S + 2 }]],
    ['ahead-of-log', [{ kind: 'end', error: '11 REVISION_AHEAD_OF_LOG' }]],
  ])('a stream that breaks its word: %s %#', (property, messages) => {
    const story = twoVersions()
    story.watch(1, { kind: 'open', ids: [], tags: [] })
    for (const [i, message] of messages.entries()) story.watch(2 + i, message)
    expect(story.verdict()).toEqual([property])
  })

  test('a stream that resumes elsewhere than it was asked to', () => {
    const story = twoVersions()
    story.watch(1, { kind: 'open', ids: [], tags: [] })
    story.watch(2, start(S))
    story.watch(3, event(story, 0))
    story.watch(4, { kind: 'open', ids: [], tags: [], resumeAfter: S + 1 })
    story.watch(5, start(S + 2))
    expect(story.verdict()).toEqual(['stream-started'])
  })

  test('a stream with selectors that leaves out what it should send', () => {
    const story = twoVersions()
    story.commit(S + 3, 'b', 'v3|')
    story.watch(1, { kind: 'open', ids: ['a'], tags: [] })
    story.watch(2, start(S + 1))
    story.watch(3, { kind: 'heartbeat', revision: S + 3 })
    expect(story.verdict()).toEqual(['stream-heartbeat'])
  })

  test('an instance that does not recover', () => {
    const story = twoVersions()
    story.events.push({ t: 'final', what: 'A', ok: false, afterMs: 30_000 })
    expect(story.verdict()).toEqual(['no-recovery'])
  })
})

function start(position: number): StreamMessage {
  return { kind: 'started', position, oldest: S }
}

function rowOf(revision: number) {
  const writer = revision === S + 2 ? 'v2' : 'x'
  return { revision, kind: 'UPSERTED', mode: 'EXPIRE', ids: ['a'], tags: [], writer }
}

/** Item a has the tag, loses it in the second version, acknowledged at A from 100 to 110 ms, and is deleted in the third. */
function taggedVersions(): Story {
  const story = new Story()
  story.commit(S + 1, 'a', 'v1|', { tags: ['t'] })
  story.commit(S + 2, 'a', 'v2|', { writer: 'v2' })
  story.write('A', [100, 110], { op: 'v2', revision: S + 2, content: 'v2|' })
  return story
}

const LISTED_OLD = { items: [{ id: 'a', title: 'v1' }] }
const LISTED_NEW = { items: [{ id: 'a', title: 'v2' }] }

describe('of list pages the checker accepts', () => {
  test('the old one elsewhere within the bound, and the new one where it was written', () => {
    const story = taggedVersions()
    story.list('A', [120, 121], S + 2, LISTED_NEW)
    story.list('B', [120, 121], S + 1, LISTED_OLD)
    story.list('B', [122, 123], S + 1, { tag: 't', ...LISTED_OLD })
    story.list('A', [122, 123], S + 2, { tag: 't' })
    story.list('A', [9000, 9001], S + 1, { ...LISTED_OLD, stale: 'TIER_DOWN' })
    expect(story.verdict()).toEqual([])
  })

  test('an old one in which nothing has changed since', () => {
    const story = taggedVersions()
    story.list('A', [120, 121], S + 1, { tag: 'u' })
    story.list('B', [2000, 2001], S, { tag: 'u' })
    expect(story.verdict()).toEqual([])
  })

  test('one that ends before the item that has changed', () => {
    const story = taggedVersions()
    story.commit(S + 3, 'A', 'v|')
    story.list('A', [120, 121], S + 3, { items: [{ id: 'A', title: 'v' }], upTo: 'A' })
    expect(story.verdict()).toEqual([])
  })
})

describe('of list pages the checker notices', () => {
  test.each([
    ['lacks an item', S + 2, {}],
    ['holds an old title', S + 2, LISTED_OLD],
    ['holds an item without the tag', S + 2, { tag: 't', ...LISTED_NEW }],
    ['holds an item that never was', S + 2, { items: [...LISTED_NEW.items, { id: 'z', title: 'z' }] }],
    ['is of no timeline', 7 * S, LISTED_NEW],
  ])('one that %s', (_, asOf, page) => {
    const story = taggedVersions()
    story.list('B', [120, 121], asOf, page)
    expect(story.verdict()).toEqual(['as-of-untrue'])
  })

  test('one that is older than what its instance has acknowledged, streamed or listed', () => {
    const written = taggedVersions()
    written.list('A', [120, 121], S + 1, LISTED_OLD)
    expect(written.verdict()).toEqual(['behind-itself'])

    const left = taggedVersions()
    left.list('A', [120, 121], S + 1, { tag: 't', ...LISTED_OLD })
    expect(left.verdict()).toEqual(['behind-itself'])

    const streamed = taggedVersions()
    streamed.watch(111, event(streamed, 1), 'B')
    streamed.list('B', [120, 121], S + 1, LISTED_OLD)
    expect(streamed.verdict()).toContain('behind-itself')

    const listed = taggedVersions()
    listed.list('B', [120, 121], S + 2, LISTED_NEW)
    listed.list('B', [122, 123], S + 1, LISTED_OLD)
    expect(listed.verdict()).toEqual(['behind-itself'])
  })

  test('one that misses what anybody was told longer ago than the bound', () => {
    const story = taggedVersions()
    story.list('B', [2000, 2001], S + 1, LISTED_OLD)
    expect(story.verdict()).toEqual(['beyond-bound'])
  })

  test('one that shows what its instance knows to be deleted, even as stale', () => {
    const story = taggedVersions()
    story.commit(S + 3, 'a', null, { writer: 'gone' })
    story.write('A', [200, 210], { op: 'gone', kind: 'delete', revision: S + 3, content: null })
    story.list('A', [220, 221], S + 2, { ...LISTED_NEW, stale: 'TIER_DOWN' })
    expect(story.verdict()).toEqual(['resurrected'])
  })

  test('an instance that fails', () => {
    const story = taggedVersions()
    story.list('A', [120, 121], S + 2, { error: '13 INTERNAL' })
    expect(story.verdict()).toEqual(['internal-error'])
  })
})
