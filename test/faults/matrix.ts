/**
 * The fault matrix: each dependency, broken in each way, while the service is nearly idle and under load. A cell says what
 * callers saw, and what of it must not be.
 */
import { readFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { status } from '@grpc/grpc-js'
import { BreakerState, CacheOutcome, StaleReason, Tier } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { isFailed } from '../consistency/client.ts'
import { type Fault, NO_FAULT } from '../consistency/way.ts'
import { type Crowd, type Ended, KINDS, type Kind, seed, TENANT, Traffic, warmIds } from './traffic.ts'
import type { Dependency, DependencyName, World } from './world.ts'

export const DEPENDENCIES: readonly DependencyName[] = ['redis', 'postgres', 'origin']

const TIERS: Readonly<Record<DependencyName, Tier>> = {
  redis: Tier.REDIS,
  postgres: Tier.POSTGRES,
  origin: Tier.ORIGIN,
}

/** Breaks a dependency; returns what heals it, and resolves when the dependency itself is well. */
type Break = (dependency: Dependency) => Promise<() => Promise<void>>

const onTheWay =
  (fault: Fault): Break =>
  async ({ way }) => {
    way.setFault(fault)
    return async () => void way.setFault(NO_FAULT)
  }

export const FAULTS = {
  killed: async (dependency) => {
    await dependency.kill()
    return () => dependency.restart()
  },
  stopped: async (dependency) => {
    dependency.pause()
    return async () => dependency.resume()
  },
  // Connections that lost a byte never work again, and nobody is told.
  'packets dropped': onTheWay({ dropUp: true, dropDown: true, forGood: true }),
  'connections reset': onTheWay({ reset: true }),
  '500 ms delay': onTheWay({ delayDownMs: 500 }),
  '1 byte/s': onTheWay({ bytesPerSecond: 1 }),
  'reply lost': onTheWay({ dropDown: true, forGood: true }),
} satisfies Record<string, Break>

export type FaultName = keyof typeof FAULTS
export const FAULT_NAMES = Object.keys(FAULTS) as readonly FaultName[]

export const CROWDS = {
  idle: {
    callers: { warm: 1, stored: 1, catalogue: 1, hurried: 1, create: 1, update: 1 },
    pauseMs: 100,
  },
  busy: {
    callers: { warm: 40, stored: 8, catalogue: 4, hurried: 4, create: 2, update: 2 },
    pauseMs: 200,
  },
} satisfies Record<string, Crowd>

export type CrowdName = keyof typeof CROWDS

export interface CellName {
  readonly dependency: DependencyName
  readonly fault: FaultName
  readonly crowd: CrowdName
}

/** What the callers of one kind saw. */
export interface Seen {
  /** By `Ended.text`. */
  readonly ended: Map<string, number>
  readonly tookMs: number[]
}

export interface Cell extends CellName {
  readonly seen: Readonly<Record<Kind, Seen>>
  /** From healing until everything was well again, and no call failed that was made later; in milliseconds. */
  readonly convergedMs: number
  /** From a change by SQL to its being seen, after that, in milliseconds. */
  readonly lagMs: number
  readonly acknowledged: number
  /** What must not be, in words. */
  readonly violations: readonly string[]
}

export interface Bounds {
  /** How long a fault lasts, in milliseconds. */
  readonly faultMs: number
  /** Everything must be well again within so many milliseconds. */
  readonly convergesWithinMs: number
  /** Callers go on for so long after healing, so that what comes late is seen, in milliseconds. */
  readonly watchedMs: number
  /** A call may take so much longer than its deadline, in milliseconds: the scheduler's share. */
  readonly slackMs: number
}

/** So many items are made that nobody has read. */
const STORED = 50_000
/** A cell that has not converged after this time never will, in milliseconds. */
const GIVE_UP_MS = 30_000
const metadata = { 'x-tenant-id': TENANT }

/** A world with traffic, on which one cell after the other is run. */
export class Matrix implements Disposable {
  readonly #world: World
  readonly #traffic: Traffic
  readonly #bounds: Bounds

  constructor(world: World, bounds: Bounds, stored = STORED) {
    this.#world = world
    this.#bounds = bounds
    this.#traffic = new Traffic(world.address, stored)
  }

  static async start(world: World, bounds: Bounds, stored = STORED): Promise<Matrix> {
    await using sql = await world.connectSql()
    await seed(sql, stored)
    return new Matrix(world, bounds, stored)
  }

  async run(name: CellName): Promise<Cell> {
    const { faultMs, convergesWithinMs, watchedMs } = this.#bounds
    const traffic = this.#traffic
    const seen = seenByKind()
    const violations = new Map<string, number>()
    const violated = (text: string) => violations.set(text, (violations.get(text) ?? 0) + 1)
    for (const id of warmIds) {
      const answer = await traffic.caller.call('getItem', { id }, { metadata, timeoutMs: 10_000 })
      if (isFailed(answer)) throw new Error(`${id} cannot be read before the fault: ${answer.text}`)
    }
    const acknowledgedBefore = traffic.acknowledged
    let healedMs = Number.POSITIVE_INFINITY
    let lastFailed: Ended | undefined
    traffic.onEnd = (ended) => {
      if (!hasGoneWell(ended) && ended.startedMs > healedMs) lastFailed = later(lastFailed, ended)
      const { ended: texts, tookMs } = seen[ended.kind]
      texts.set(ended.text, (texts.get(ended.text) ?? 0) + 1)
      tookMs.push(ended.tookMs)
      const wrong = wrongness(name.dependency, ended, this.#bounds.slackMs)
      if (wrong !== undefined) violated(wrong)
    }
    traffic.start(CROWDS[name.crowd])
    let convergedMs: number
    let lagMs = Number.NaN
    try {
      const heal = await FAULTS[name.fault](this.#world.dependencies[name.dependency])
      await sleep(faultMs)
      await heal()
      healedMs = performance.now()
      const sinceHealed = () => performance.now() - healedMs
      const isWell = await this.#becomesWell(violated, [TIERS[name.dependency]])
      convergedMs = sinceHealed()
      if (isWell) {
        lagMs = await this.#lag()
        await sleep(Math.max(0, watchedMs - sinceHealed()))
        await this.#becomesWell(violated, Object.values(TIERS))
      }
    } finally {
      await traffic.stop()
    }
    if (lastFailed !== undefined && lastFailed.startedMs - healedMs > convergedMs) {
      convergedMs = lastFailed.startedMs - healedMs
      this.#lastWrong = `${lastFailed.kind} failed: ${lastFailed.text}`
    }
    if (convergedMs > convergesWithinMs)
      violated(`well again only after ${seconds(convergedMs)} s; until then ${this.#lastWrong}`)
    await using sql = await this.#world.connectSql()
    for (const id of await traffic.lost(sql)) violated(`an acknowledged write of ${id} is lost`)
    return {
      ...name,
      seen,
      convergedMs,
      lagMs,
      acknowledged: traffic.acknowledged - acknowledgedBefore,
      violations: Array.from(violations, ([text, times]) => (times === 1 ? text : `${times} times: ${text}`)),
    }
  }

  #lastWrong = ''

  /** Resolves when every call succeeds and these tiers are asked again, or with `false` when that takes too long. */
  async #becomesWell(violated: (text: string) => void, tiers: readonly Tier[]): Promise<boolean> {
    const endMs = performance.now() + GIVE_UP_MS
    for (;;) {
      const wrong = await this.#whatIsWrong(tiers)
      if (wrong === undefined) return true
      this.#lastWrong = wrong
      if (performance.now() > endMs) {
        violated(`not well after ${GIVE_UP_MS / 1000} s: ${wrong}`)
        return false
      }
      await sleep(50)
    }
  }

  /** What is not as it should be with nothing broken; `undefined`: all is well. */
  async #whatIsWrong(tiers: readonly Tier[]): Promise<string | undefined> {
    const { caller } = this.#traffic
    const options = { metadata, timeoutMs: 5_000 }
    const read = async (what: string, id: string, outcomes: readonly CacheOutcome[]) => {
      const answer = await caller.call('getItem', { id }, options)
      if (isFailed(answer)) return `${what} cannot be read: ${answer.text}`
      const { outcome = CacheOutcome.UNSPECIFIED, staleReason, skippedTiers = [] } = answer.cache ?? {}
      if (!outcomes.includes(outcome) && staleReason !== StaleReason.REVALIDATING)
        return `${what} is read with outcome ${outcome}`
      const skipped = skippedTiers.find(({ tier }) => tiers.includes(tier))
      return skipped === undefined ? undefined : `${what} is read without asking tier ${skipped.tier}`
    }
    const cold = [CacheOutcome.MISS]
    const wrong =
      (await read('a stored item', this.#traffic.newStoredId(), cold)) ??
      (await read('an item of the catalogue', this.#traffic.newProductId(), cold)) ??
      (await read('a warm item', warmIds[0] ?? '', [CacheOutcome.HIT, CacheOutcome.MISS]))
    if (wrong !== undefined) return wrong
    const written = await caller.call('updateItem', { item: { id: 'lag', title: 'x' } }, options)
    if (isFailed(written)) return `nothing can be written: ${written.text}`
    const metrics = await caller.call('getMetrics', {}, options)
    if (isFailed(metrics)) return `GetMetrics fails: ${metrics.text}`
    const open = metrics.snapshot?.tiers.find(
      ({ tier, breaker }) =>
        tiers.includes(tier) && (breaker === BreakerState.OPEN || breaker === BreakerState.HALF_OPEN),
    )
    if (open !== undefined) return `the breaker of tier ${open.tier} is not closed`
    const { ok } = await fetch(`http://${this.#world.admin}/readyz`)
    return ok ? undefined : 'the service is not ready'
  }

  /** How long a change by SQL takes until it is seen. */
  async #lag(): Promise<number> {
    await using sql = await this.#world.connectSql()
    await sql.query(`SELECT set_config('itemcache.tenant', $1, false)`, [TENANT])
    const title = `${performance.now()}`
    await sql.query(`UPDATE items SET title = $2 WHERE tenant = $1 AND id = 'lag'`, [TENANT, title])
    const changedMs = performance.now()
    for (;;) {
      const answer = await this.#traffic.caller.call('getItem', { id: 'lag' }, { metadata, timeoutMs: 5_000 })
      const lagMs = performance.now() - changedMs
      if (!isFailed(answer) && answer.result.case === 'item' && answer.result.value.title === title)
        return lagMs
      if (lagMs > GIVE_UP_MS) return lagMs
      await sleep(2)
    }
  }

  [Symbol.dispose](): void {
    this.#traffic[Symbol.dispose]()
  }
}

/** What a caller may not see while a dependency is broken, in words. */
function wrongness(broken: DependencyName, ended: Ended, slackMs: number): string | undefined {
  const { kind, code, text, tookMs, deadlineMs } = ended
  if (tookMs > deadlineMs + slackMs) return `${kind}: ended long after its deadline (${text})`
  if (hasGoneWell(ended)) return undefined
  if (kind === 'warm') return `a warm read failed: ${text}`
  const needs: Readonly<Record<DependencyName, readonly Kind[]>> = {
    redis: [],
    postgres: ['stored', 'hurried', 'catalogue', 'create', 'update'],
    origin: ['catalogue'],
  }
  if (!needs[broken].includes(kind)) return `${kind}: failed although it does without ${broken}: ${text}`
  if (code !== status.UNAVAILABLE && code !== status.RESOURCE_EXHAUSTED) return `${kind}: failed with ${text}`
  return ended.hasRetryInfo ? undefined : `${kind}: does not say when to retry: ${text}`
}

/** Who has little time may run out of it whenever the machine is busy. */
function hasGoneWell({ kind, code }: Ended): boolean {
  return code === status.OK || (kind === 'hurried' && code === status.DEADLINE_EXCEEDED)
}

function later(one: Ended | undefined, other: Ended): Ended {
  return one !== undefined && one.startedMs > other.startedMs ? one : other
}

function seenByKind(): Record<Kind, Seen> {
  const empty = (): Seen => ({ ended: new Map(), tookMs: [] })
  return Object.fromEntries(KINDS.map((kind) => [kind, empty()])) as Record<Kind, Seen>
}

/** The value below which so many of a hundred are. */
export function percentile(values: readonly number[], percent: number): number {
  const sorted = values.toSorted((a, b) => a - b)
  return sorted[Math.max(0, Math.ceil((sorted.length * percent) / 100) - 1)] ?? Number.NaN
}

const seconds = (ms: number) => (ms / 1000).toFixed(1)

/** A line for those who wait. */
export function describeCell(cell: Cell): string {
  const { dependency, fault, crowd, seen, convergedMs, lagMs, violations } = cell
  const kinds = KINDS.map((kind) => {
    const { ended, tookMs } = seen[kind]
    const codes = Array.from(ended, ([text, times]) => `${text} ${times}`).join(', ')
    return `${kind} ${codes} (p99 ${Math.round(percentile(tookMs, 99))}, max ${Math.round(Math.max(...tookMs))} ms)`
  })
  return [
    `${dependency}, ${fault}, ${crowd}: well again after ${seconds(convergedMs)} s, lag ${Math.round(lagMs)} ms`,
    ...kinds.map((line) => `    ${line}`),
    ...violations.map((line) => `  VIOLATED: ${line}`),
  ].join('\n')
}

/** The last lines of the service's log, when something has gone wrong. */
export function endOfLog({ logFile }: World, lines = 20): string {
  return readFileSync(logFile, 'utf8').trimEnd().split('\n').slice(-lines).join('\n')
}
