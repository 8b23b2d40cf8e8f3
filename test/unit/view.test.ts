import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { LISTED, type LogRow, TIMELINE_SPAN, type Verdict, View } from '../../src/invalidation/view.ts'

const copy = (asOf: number, id = 'a', tags: string[] = []) => ({ id, asOf, tags })
const row = (revision: number, more: Partial<LogRow> = {}): LogRow => ({
  revision,
  kind: 'UPSERTED',
  mode: 'EXPIRE',
  ids: [],
  tags: [],
  ...more,
})

/** A view that has followed the log from its beginning. */
function fresh(maxFloors = 10): View {
  const view = new View(maxFloors)
  view.activate(0, [], 0)
  return view
}

describe('the rule', () => {
  test('a copy as new as every invalidation that concerns it is current', () => {
    const view = fresh()
    view.apply(row(1, { ids: ['a'] }))
    view.apply(row(2, { kind: 'TAGS_INVALIDATED', tags: ['red'] }))
    expect(view.judge(copy(1))).toBe('current')
    expect(view.judge(copy(0))).toBe('superseded')
    expect(view.judge(copy(1, 'a', ['red']))).toBe('expired')
    expect(view.judge(copy(2, 'a', ['red']))).toBe('current')
    expect(view.judge(copy(0, 'other'))).toBe('current')
  })

  test('an expired copy may be served as stale, one that changed only in need, a removed one never', () => {
    const view = fresh()
    view.apply(row(1, { kind: 'KEYS_INVALIDATED', ids: ['a'] }))
    expect(view.judge(copy(0))).toBe('expired')
    view.apply(row(2, { ids: ['a'] }))
    expect(view.judge(copy(0))).toBe('superseded')
    view.apply(row(3, { kind: 'DELETED', mode: 'REMOVE', ids: ['a'] }))
    expect(view.judge(copy(2))).toBe('removed')
    expect(view.judge(copy(3))).toBe('current')
  })

  test('a REMOVE by tag keeps old copies that lack the tag from being served as stale, and no current one', () => {
    const view = fresh()
    view.apply(row(1, { ids: ['a'], tags: ['red'] }))
    view.apply(row(2, { kind: 'TAGS_INVALIDATED', mode: 'REMOVE', tags: ['red'] }))
    expect(view.judge(copy(0))).toBe('removed')
    expect(view.judge(copy(0, 'unconcerned'))).toBe('current')
  })

  test('an invalidation of everything concerns everything', () => {
    const view = fresh()
    view.apply(row(1, { kind: 'TENANT_INVALIDATED' }))
    expect(view.judge(copy(0))).toBe('expired')
    view.apply(row(2, { kind: 'TENANT_INVALIDATED', mode: 'REMOVE' }))
    expect(view.judge(copy(1))).toBe('removed')
  })

  test('a change of an item concerns the lists of its category and tags, before and after, and the list of all', () => {
    const view = fresh()
    const listed = (asOf: number, tag = '') => copy(asOf, `${LISTED}page`, [LISTED + tag])
    view.apply(row(1, { ids: ['a'], tags: ['red', 'lamps'] }))
    expect(view.judge(listed(0, 'red'))).toBe('superseded')
    expect(view.judge(listed(0, 'blue'))).toBe('current')
    expect(view.judge(listed(0))).toBe('superseded')
    expect(view.judge(listed(1))).toBe('current')
    // Another item with the same tag is as it was.
    expect(view.judge(copy(0, 'b', ['red']))).toBe('current')
  })

  test('a view that has not heard of the log for 1.5 s calls nothing current', () => {
    const view = new View(10)
    view.activate(5, [], 1000)
    expect(view.hasHeard(2500)).toBe(true)
    expect(view.hasHeard(2501)).toBe(false)
    view.heard(2000)
    view.heard(1500)
    expect(view.hasHeard(3500)).toBe(true)
  })
})

describe('a view', () => {
  test('starts from the newest rows, and distrusts what is older than them', () => {
    const view = new View(10)
    view.activate(8, [row(7, { ids: ['a'] }), row(8, { ids: ['b'] })], 0)
    expect(view.position).toBe(8)
    expect(view.judge(copy(6, 'quiet'))).toBe('current')
    expect(view.judge(copy(5, 'quiet'))).toBe('removed')
    expect(view.judge(copy(6, 'a'))).toBe('superseded')
  })

  test('that finds a hole in the log distrusts everything from before it', () => {
    const view = fresh()
    view.jump(9)
    expect(view.position).toBe(9)
    expect(view.judge(copy(8))).toBe('removed')
    expect(view.judge(copy(9))).toBe('current')
  })

  test('stamps what passes with its position, so that it survives a floor that is forgotten', () => {
    const view = fresh(1)
    view.apply(row(1, { ids: ['x'] }))
    const stamped = copy(view.stamp(0))
    view.apply(row(2, { ids: ['y'] }))
    expect(view.judge(copy(0))).toBe('superseded')
    expect(view.judge(stamped)).toBe('current')
    expect(view.stamp(5)).toBe(5)
  })

  test('never goes back behind a write that it has acknowledged, or a copy that it has shown', () => {
    const view = fresh()
    view.acknowledge(row(4, { ids: ['a'] }))
    expect(view.position).toBe(0)
    expect(view.judge(copy(3))).toBe('superseded')
    view.ahead(copy(6, 'b'))
    expect(view.judge(copy(5, 'b'))).toBe('superseded')
    expect(view.judge(copy(6, 'b'))).toBe('current')
  })

  test('that shows an item ahead of the log takes no older list page for current that might lack it', () => {
    const view = fresh()
    const page = (asOf: number, tag = '') => copy(asOf, `${LISTED}page`, [LISTED + tag])
    view.ahead(copy(6, 'b', ['t']))
    expect(view.judge(page(5))).toBe('superseded')
    expect(view.judge(page(5, 't'))).toBe('superseded')
    expect(view.judge(page(5, 'another'))).toBe('current')
    expect(view.judge(page(6))).toBe('current')
  })

  test('that learns of a newer timeline distrusts every copy of the older one', () => {
    const view = fresh()
    view.apply(row(1, { ids: ['a'] }))
    view.seen(2 * TIMELINE_SPAN + 3)
    expect(view.judge(copy(1))).toBe('superseded')
    expect(view.judge(copy(2 * TIMELINE_SPAN))).toBe('current')
  })

  test('never lowers a floor, whatever comes late', () => {
    const view = fresh()
    view.acknowledge(row(9, { ids: ['a'] }))
    view.acknowledge(row(3, { ids: ['a'] }))
    expect(view.judge(copy(8))).toBe('superseded')
  })

  test('forgets first the floor that was raised longest ago', () => {
    const view = fresh(2)
    view.acknowledge(row(1, { ids: ['a'] }))
    view.acknowledge(row(2, { ids: ['b'] }))
    view.acknowledge(row(3, { ids: ['a'] }))
    view.acknowledge(row(4, { ids: ['c'] }))
    expect(view.describe('a', []).keyFloor).toBe(3)
    expect(view.describe('b', [])).toMatchObject({ keyFloor: 0, tenantFloor: 2 })
  })

  test('takes no more memory however often the same floors are raised', () => {
    setFlagsFromString('--expose-gc')
    const gc: () => void = runInNewContext('gc')
    const view = fresh(1000)
    let revision = 0
    const raise = (times: number) => {
      for (let n = 0; n < times; n++) view.apply(row(++revision, { ids: [`${n % 500}`] }))
      gc()
      return process.memoryUsage().heapUsed
    }
    const before = raise(1000)
    expect(raise(100_000) - before).toBeLessThan(2 * 2 ** 20)
  })

  test('that forgets, starts late or finds holes never serves what one that followed the whole log would refuse', () => {
    const rank: Record<Verdict, number> = { current: 0, expired: 1, superseded: 2, removed: 3 }
    const name = fc.constantFrom('a', 'b', 'c', '__proto__')
    const logRow = fc.record({
      kind: fc.constantFrom<LogRow['kind']>(
        'UPSERTED',
        'DELETED',
        'KEYS_INVALIDATED',
        'TAGS_INVALIDATED',
        'TENANT_INVALIDATED',
      ),
      mode: fc.constantFrom<LogRow['mode']>('EXPIRE', 'REMOVE'),
      ids: fc.array(name, { maxLength: 3 }),
      tags: fc.array(name, { maxLength: 2 }),
    })
    const scenario = fc.record({
      log: fc.array(logRow, { maxLength: 20 }),
      start: fc.nat(20),
      known: fc.nat(5),
      hole: fc.option(fc.nat(20)),
      asOf: fc.nat(20),
      id: name,
      tags: fc.array(name, { maxLength: 2 }),
    })
    fc.assert(
      fc.property(scenario, ({ log, start, known, hole, asOf, id, tags }) => {
        const rows = log.map((one, i) =>
          row(i + 1, {
            ...one,
            mode: one.kind === 'DELETED' ? 'REMOVE' : one.kind === 'UPSERTED' ? 'EXPIRE' : one.mode,
          }),
        )
        const oracle = fresh(1000)
        for (const one of rows) oracle.apply(one)
        const view = new View(2)
        const at = Math.min(start, rows.length)
        view.activate(at, rows.slice(Math.max(0, at - known), at), 0)
        for (let i = at; i < rows.length; i++) {
          const next = rows[i]
          if (hole === i) {
            view.jump(rows.length)
            break
          }
          if (next !== undefined) view.apply(next)
        }
        expect(view.position).toBe(rows.length)
        const dated = copy(Math.min(asOf, rows.length), id, tags)
        expect(rank[view.judge(dated)]).toBeGreaterThanOrEqual(rank[oracle.judge(dated)])
        // What is as new as the log passes, whatever was forgotten.
        expect(view.judge(copy(rows.length, id, tags))).toBe('current')
      }),
      { numRuns: 5000 },
    )
  })
})
