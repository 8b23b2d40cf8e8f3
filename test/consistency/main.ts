/**
 * `npm run consistency -- --minutes N | --histories N [--seed S]`: runs histories with fresh seeds and checks each. On a
 * violation it prints the seed and the events that show it, keeps the history, and exits with 1.
 */
import { copyFileSync, rmSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { parseArgs } from 'node:util'
import { makeRunDirectory } from '../support/run-directory.ts'
import { check } from './checker.ts'
import { runHistory, startWorld } from './driver.ts'
import { planOf } from './plan.ts'
import type { Violation } from './truth.ts'

const ROOT = resolve(import.meta.dirname, '../..')

const { values } = parseArgs({
  options: {
    minutes: { type: 'string' },
    histories: { type: 'string' },
    seed: { type: 'string' },
    seconds: { type: 'string', default: '10' },
    root: { type: 'string', default: ROOT },
    keep: { type: 'boolean', default: false },
  },
})
const untilMs =
  values.minutes === undefined
    ? Number.POSITIVE_INFINITY
    : performance.now() + Number(values.minutes) * 60_000
const most =
  values.histories === undefined
    ? values.minutes === undefined
      ? 10
      : Number.POSITIVE_INFINITY
    : Number(values.histories)
const first = values.seed === undefined ? Math.floor(Math.random() * 1e9) : Number(values.seed)

const cache = join(ROOT, '.itemcache', 'cache')
await using directory = makeRunDirectory()
await using world = await startWorld(directory.path, join(directory.path, 'cache'), cache)
const violated: number[] = []
let calls = 0
let histories = 0
for (; histories < most && performance.now() < untilMs && violated.length < 3; histories++) {
  const seed = first + histories
  const startedAt = performance.now()
  const plan = planOf(seed, { ms: Number(values.seconds) * 1000 })
  const { events, file, calls: made } = await runHistory(world, plan, resolve(values.root))
  const ranMs = performance.now() - startedAt
  const violations = check(events)
  calls += made
  const faults = new Set(plan.faults.map(({ kind }) => kind))
  console.log(
    `seed ${seed}: ${made} calls, ${events.length} events, ${plan.faults.length} faults of ${faults.size} kinds` +
      `${plan.failover ? ' and a failover' : ''}, ${(ranMs / 1000).toFixed(1)} s, checked in ${Math.round(performance.now() - startedAt - ranMs)} ms: ` +
      (violations.length === 0 ? 'no violation' : `${violations.length} VIOLATIONS`),
  )
  const kept = resolve(`consistency-${seed}.log`)
  if (violations.length > 0 || values.keep) copyFileSync(file, kept)
  rmSync(file, { force: true })
  if (violations.length === 0) continue
  violated.push(seed)
  show(violations)
  console.log(`The history is ${kept}; again: npm run consistency -- --histories 1 --seed ${seed}`)
}
console.log(
  `${histories} histories, ${calls} calls, ${violated.length} with violations${violated.length > 0 ? `: seeds ${violated.join(', ')}` : ''}`,
)
process.exitCode = violated.length === 0 ? 0 : 1

function show(violations: readonly Violation[]): void {
  const kinds = Map.groupBy(violations, ({ property }) => property)
  for (const [property, all] of kinds) {
    console.log(`  ${property}: ${all.length}`)
    for (const { text, events } of all.slice(0, 3)) {
      console.log(`    ${text}`)
      for (const event of events) console.log(`      ${JSON.stringify(event)}`)
    }
  }
}
