/**
 * The tail: keeps a view of every tenant that this instance serves as close behind the log as it can.
 *
 * LISTEN wakes it when something was committed; a poll every 500 ms is heartbeat and safety net, so that a lost
 * notification costs half a second and nothing else. Of commits that follow each other closely only some notify (see
 * `itemcache_take_revisions`), so a tenant that has just changed is **hot**: it is polled every 10 ms. One statement
 * asks for the rows of many tenants. The rows of a tenant are applied in order, some at a time under its mutex and each
 * whole, so that readers and writers get their turns in between.
 *
 * A tenant is **activated** by its first reader and dropped when nobody has used it for a while. Until then nothing is
 * known of its log, and nothing that is cached may be served.
 */
import { ItemCacheError } from '../errors.ts'
import type { Logger } from '../observe/log.ts'
import type { Metrics } from '../observe/metrics.ts'
import type { Tracing } from '../observe/tracing.ts'
import { afterSilence } from '../silence.ts'
import type { LogEntry, LogPage, LogSource, Revision } from '../tiers/tier.ts'
import { TIMELINE_SPAN, View } from './view.ts'

/** What a tail is told and what it tells. Durations in milliseconds. */
export interface TailOptions {
  readonly source: LogSource
  readonly metrics: Metrics
  readonly log: Logger
  /** Monotonic clock. */
  readonly now: () => number
  /** Between two polls of a tenant that nothing is heard of. */
  readonly pollMs: number
  /** Views that are kept at once; the one that was used longest ago makes room. */
  readonly maxTenants: number
  readonly maxFloors: number
  /** Floors of all views together. */
  readonly maxTotalFloors: number
  /** A view that nobody has used for this long is dropped. */
  readonly idleMs: number
  /** `undefined`: tracing is off. */
  readonly tracing?: Tracing | undefined
  /** Runs a section while no other of the tenant runs. */
  readonly exclusive: <T>(tenant: string, section: () => Promise<T> | T) => Promise<T>
}

/** Who wants to know what has been applied. Called in the order of the log, for active tenants. */
export interface Follower {
  /** A row has just been applied: it is at the view's position. */
  applied(tenant: string, row: LogEntry): void
  /** The revisions up to `through` that were not applied yet never will be, one by one. */
  jumped(tenant: string, through: Revision): void
  /** Whether somebody needs the tenant's view although no reader uses it. */
  needs(tenant: string): boolean
}

interface Tailed {
  readonly view: View
  /** Resolves when the view has been activated. */
  readonly activated: Promise<void>
  active: boolean
  usedAtMs: number
  /** Those who wait for the position, by the revision that they wait for. */
  readonly waiting: Set<{ readonly revision: Revision; readonly resolve: () => void }>
  hearing: Hearing | undefined
}

/** What all those share who wait until a log has been heard of again. */
interface Hearing {
  readonly promise: Promise<void>
  readonly resolve: () => void
  readonly timer: NodeJS.Timeout
  over: boolean
}

/** The floors of so many newest rows are set at activation; copies older than these rows are not trusted. */
const ACTIVATION_ROWS = 1000
/** Most rows of one tenant in one answer. */
const PAGE_ROWS = 200
/** About the most ids and tags in the answers for all tenants of a statement; each gets one row at least. */
const PAGE_NAMES = 50_000
/** Most tenants in one statement. */
const POLL_TENANTS = 100
/** A poll that takes longer is given up; the next one uses another connection. */
const POLL_TIMEOUT_MS = 1000
/** A hot tenant is polled this often, until so long after the last notification or row: longer than those are apart. */
const HOT_POLL_MS = 10
const HOT_MS = 300
/** Readers get a turn after so many floors. */
const FLOORS_PER_TURN = 5000

export class Tail implements AsyncDisposable {
  readonly #options: TailOptions
  readonly #tenants = new Map<string, Tailed>()
  readonly #followers: Follower[] = []
  /** Tenants that somebody has changed since the last poll left. */
  #notified = new Set<string>()
  #pollAll = false
  /** Until when each tenant is hot. */
  readonly #hot = new Map<string, number>()
  #hotTimer: NodeJS.Timeout | undefined
  #polling: Promise<void> | undefined
  #timer: NodeJS.Timeout | undefined
  #listening: AsyncDisposable | undefined
  #closed = false
  #timeline = 0
  #failing = false

  constructor(options: TailOptions) {
    this.#options = options
  }

  /** Begins to listen and to poll. */
  async start(): Promise<void> {
    this.#timer = setInterval(() => {
      this.#dropIdle()
      this.#boundFloors()
      this.#pollAll = true
      this.#poll()
    }, this.#options.pollMs)
    this.#listening = await this.#options.source.listen({
      changed: (tenant) => {
        if (!this.#tenants.has(tenant)) return
        this.#heat(tenant)
        this.#notified.add(tenant)
        this.#poll()
      },
      // Without notifications the poll brings the news, half a second late.
      lost: (error) => this.#options.log.warn({ err: error }, 'notifications of the log are not received'),
      // Notifications may have been lost before.
      connected: () => {
        this.#pollAll = true
        this.#poll()
      },
    })
  }

  follow(follower: Follower): void {
    this.#followers.push(follower)
  }

  /** How much of what can grow there is now. */
  held(): { readonly tenants: number; readonly floors: number; readonly waiters: number } {
    let [floors, waiters] = [0, 0]
    for (const { view, waiting } of this.#tenants.values()) {
      floors += view.floors
      waiters += waiting.size
    }
    return { tenants: this.#tenants.size, floors, waiters }
  }

  /** For how long nothing has been heard of the log of an active tenant, of the one for which that is longest. */
  heardAgeMs(): number {
    const nowMs = this.#options.now()
    let ageMs = 0
    for (const { active, view } of this.#tenants.values()) {
      if (active) ageMs = Math.max(ageMs, nowMs - view.heardMs)
    }
    return ageMs
  }

  /** The tail's clock, which `View.hasHeard` wants. */
  now(): number {
    return this.#options.now()
  }

  /** Whether polls have been failing: PostgreSQL does not answer. */
  get failing(): boolean {
    return this.#failing
  }

  /** The tenant's view, if it is active. */
  view(tenant: string): View | undefined {
    const tailed = this.#tenants.get(tenant)
    if (tailed === undefined || !tailed.active) return undefined
    tailed.usedAtMs = this.#options.now()
    return tailed.view
  }

  /** The view that an acknowledged write must raise: also one that is being activated. */
  raising(tenant: string): View | undefined {
    return this.#tenants.get(tenant)?.view
  }

  /** The tenant's view, activated if it was not. Throws `unavailable` when PostgreSQL does not answer. */
  async activated(tenant: string, signal?: Ending): Promise<View> {
    let tailed = this.#tenants.get(tenant)
    if (tailed === undefined) {
      tailed = this.#activate(tenant)
      this.#makeRoom()
    }
    tailed.usedAtMs = this.#options.now()
    await (signal === undefined ? tailed.activated : untilAborted(tailed.activated, signal))
    return tailed.view
  }

  /** Resolves when the tenant's log has been applied up to `revision`. Throws the signal's reason. */
  async reached(tenant: string, revision: Revision, signal: AbortSignal): Promise<void> {
    const view = await this.activated(tenant, signal)
    const tailed = this.#tenants.get(tenant)
    if (view.position >= revision || tailed === undefined) return
    const { promise, resolve, reject } = Promise.withResolvers<void>()
    const waiter = { revision, resolve }
    const abort = () => reject(signal.reason)
    tailed.waiting.add(waiter)
    signal.addEventListener('abort', abort, { once: true })
    this.#notified.add(tenant)
    this.#poll()
    try {
      signal.throwIfAborted()
      await promise
    } finally {
      tailed.waiting.delete(waiter)
      signal.removeEventListener('abort', abort)
    }
  }

  /**
   * Polls a tenant whose log has not been heard of lately. Resolves when it has been, when it cannot be read, or when
   * `withinMs` are over since the first who waits has come: all wait together. `undefined`: that is so already, until it is heard of.
   */
  heardAgain(tenant: string, withinMs: number): Promise<void> | undefined {
    const tailed = this.#tenants.get(tenant)
    if (tailed === undefined || this.#closed || tailed.hearing?.over) return undefined
    if (tailed.hearing !== undefined) return tailed.hearing.promise
    const { promise, resolve } = Promise.withResolvers<void>()
    const hearing: Hearing = {
      promise,
      resolve,
      timer: afterSilence(withinMs, () => end(hearing)),
      over: false,
    }
    tailed.hearing = hearing
    this.#notified.add(tenant)
    this.#poll()
    return promise
  }

  /** Timelines: a revision of a timeline that nobody here has seen raises every tenant's floor at once. */
  seen(revision: Revision): void {
    const timeline = Math.floor(revision / TIMELINE_SPAN)
    if (timeline <= this.#timeline) return
    this.#timeline = timeline
    // So that no answer of an older primary is taken any more.
    this.#options.source.seen(revision)
    for (const { view } of this.#tenants.values()) view.seen(revision)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#closed = true
    clearInterval(this.#timer)
    clearTimeout(this.#hotTimer)
    this.#endHearings()
    await this.#listening?.[Symbol.asyncDispose]()
    await this.#polling
  }

  #activate(tenant: string): Tailed {
    const { source, now, maxFloors } = this.#options
    const view = new View(maxFloors)
    view.seen(this.#timeline * TIMELINE_SPAN)
    const activate = async () => {
      const sentAtMs = now()
      const page = await source.newest(tenant, { rows: ACTIVATION_ROWS, names: PAGE_NAMES })
      this.seen(page.revision)
      view.activate(page.revision, contiguousEnd(page), sentAtMs)
      tailed.active = true
      // The next commit may not notify, if one has just done so.
      if ((page.rows.at(-1)?.ageMs ?? HOT_MS) < HOT_MS) this.#heat(tenant)
      this.#pollHot()
    }
    const activated = activate()
    const tailed: Tailed = {
      view,
      activated,
      active: false,
      usedAtMs: now(),
      waiting: new Set(),
      hearing: undefined,
    }
    this.#tenants.set(tenant, tailed)
    activated.catch(() => {
      this.#options.metrics.tiers.postgres.errors++
      // The next reader tries again.
      if (this.#tenants.get(tenant) === tailed) this.#tenants.delete(tenant)
    })
    return tailed
  }

  #makeRoom(): void {
    if (this.#tenants.size <= this.#options.maxTenants) return
    const idlest = [...this.#tenants]
      .filter(([tenant, { active, waiting }]) => active && waiting.size === 0 && !this.#isNeeded(tenant))
      .sort(([, a], [, b]) => a.usedAtMs - b.usedAtMs)
    for (const [tenant] of idlest.slice(0, Math.ceil(this.#options.maxTenants / 10))) {
      this.#tenants.delete(tenant)
    }
  }

  /**
   * Floors of many tenants together are bounded, too: those of the views that were used longest ago go first. A view that
   * is needed stays, and forgets its floors.
   */
  #boundFloors(): void {
    let floors = 0
    for (const { view } of this.#tenants.values()) floors += view.floors
    if (floors <= this.#options.maxTotalFloors) return
    const idlest = [...this.#tenants].sort(([, a], [, b]) => a.usedAtMs - b.usedAtMs)
    for (const [tenant, { active, view, waiting }] of idlest) {
      if (floors <= this.#options.maxTotalFloors) return
      if (!active || waiting.size > 0 || this.#isNeeded(tenant)) continue
      this.#tenants.delete(tenant)
      floors -= view.floors
    }
    for (const { view } of [...this.#tenants.values()].sort((a, b) => b.view.floors - a.view.floors)) {
      if (floors <= this.#options.maxTotalFloors) return
      floors -= view.floors
      view.forget()
    }
  }

  #dropIdle(): void {
    const sinceMs = this.#options.now() - this.#options.idleMs
    for (const [tenant, { active, usedAtMs, waiting }] of this.#tenants) {
      if (active && usedAtMs < sinceMs && waiting.size === 0 && !this.#isNeeded(tenant)) {
        this.#tenants.delete(tenant)
      }
    }
  }

  #isNeeded(tenant: string): boolean {
    return this.#followers.some((follower) => follower.needs(tenant))
  }

  #poll(): void {
    if (this.#closed) return
    this.#polling ??= this.#pollUntilQuiet().finally(() => {
      this.#polling = undefined
      if (this.#pollAll || this.#notified.size > 0) this.#poll()
      else this.#pollHot()
    })
  }

  #heat(tenant: string): void {
    this.#hot.set(tenant, this.#options.now() + HOT_MS)
  }

  #pollHot(): void {
    if (this.#closed || this.#hotTimer !== undefined || this.#hot.size === 0) return
    this.#hotTimer = setTimeout(() => {
      this.#hotTimer = undefined
      const now = this.#options.now()
      for (const [tenant, untilMs] of this.#hot) {
        if (now < untilMs) this.#notified.add(tenant)
        else this.#hot.delete(tenant)
      }
      if (this.#notified.size > 0) this.#poll()
    }, HOT_POLL_MS)
  }

  async #pollUntilQuiet(): Promise<void> {
    const { log } = this.#options
    try {
      while (!this.#closed && (this.#pollAll || this.#notified.size > 0)) {
        const tenants = this.#pollAll ? [...this.#tenants.keys()] : [...this.#notified]
        this.#pollAll = false
        this.#notified = new Set()
        for (let i = 0; i < tenants.length; i += POLL_TENANTS) {
          await this.#pollTenants(tenants.slice(i, i + POLL_TENANTS))
          if (this.#failing) log.info('the log is followed again')
          this.#failing = false
        }
      }
    } catch (error) {
      if (!this.#failing) log.warn({ err: error }, 'the log cannot be read: copies are not called current')
      this.#failing = true
      this.#endHearings()
    }
  }

  #endHearings(): void {
    for (const { hearing } of this.#tenants.values()) if (hearing !== undefined) end(hearing)
  }

  async #pollTenants(tenants: readonly string[]): Promise<void> {
    const positions = new Map<string, Revision>()
    for (const tenant of tenants) {
      const tailed = this.#tenants.get(tenant)
      if (tailed?.active) positions.set(tenant, tailed.view.position)
    }
    if (positions.size === 0) return
    const sentAtMs = this.#options.now()
    const late = new AbortController()
    const timer = afterSilence(POLL_TIMEOUT_MS, () => late.abort(timedOut()))
    const names = Math.floor(PAGE_NAMES / positions.size)
    const pages = await this.#options.source
      .after(positions, { rows: PAGE_ROWS, names }, late.signal)
      .finally(() => clearTimeout(timer))
    for (const [tenant, page] of pages) {
      await this.#applyPage(tenant, page, positions.get(tenant) ?? 0, sentAtMs)
    }
    if (this.#options.tracing !== undefined) this.#trace(this.#options.tracing, pages, sentAtMs)
  }

  /** Polls that bring nothing, which most are, leave no span. */
  #trace(tracing: Tracing, pages: ReadonlyMap<string, LogPage>, sentAtMs: number): void {
    let rows = 0
    for (const page of pages.values()) rows += page.rows.length
    if (rows > 0) tracing.applied(pages.size, rows, sentAtMs)
  }

  /** Holes, floors before position, heard: see `view.ts`. */
  async #applyPage(tenant: string, page: LogPage, from: Revision, sentAtMs: number): Promise<void> {
    this.seen(page.revision)
    const tailed = this.#tenants.get(tenant)
    if (tailed === undefined) return
    const { view } = tailed
    // While others have their turn the view may be dropped, and another one begun that knows more.
    const isDropped = () => this.#tenants.get(tenant) !== tailed
    // Activated anew meanwhile, or an answer from before what has been seen: neither says anything of this view.
    if (view.position !== from || page.revision < from) return
    if (page.revision > from) this.#heat(tenant)
    const last = page.rows.at(-1)?.revision ?? from
    const whole =
      page.rows.every((row, i) => row.revision === from + 1 + i) && (!page.complete || last === page.revision)
    if (whole) {
      for (let next = 0; next < page.rows.length; ) {
        next = await this.#options.exclusive(tenant, () =>
          isDropped() ? page.rows.length : this.#applySome(tenant, tailed, page.rows, next, sentAtMs),
        )
        // Readers and writers of the tenant get their turn.
        if (next < page.rows.length) await nextTurn()
      }
      if (isDropped()) return
    } else {
      await this.#options.exclusive(tenant, () => view.jump(page.revision))
      if (isDropped()) return
      this.#wake(tailed)
      for (const follower of this.#followers) follower.jumped(tenant, page.revision)
    }
    if (page.complete || !whole) this.#hear(tenant, tailed, sentAtMs)
    // There is more: ask again at once.
    else this.#notified.add(tenant)
  }

  /** Applies rows from `first` on, as many as one turn allows, each whole; returns the first that is left. */
  #applySome(
    tenant: string,
    tailed: Tailed,
    rows: readonly LogEntry[],
    first: number,
    sentAtMs: number,
  ): number {
    let floors = 0
    let next = first
    for (; next < rows.length && floors < FLOORS_PER_TURN; next++) {
      const row = rows[next]
      if (row === undefined) break
      tailed.view.apply(row)
      this.#recordLag(row, sentAtMs)
      this.#wake(tailed)
      for (const follower of this.#followers) follower.applied(tenant, row)
      floors += 1 + row.ids.length + row.tags.length
    }
    return next
  }

  #hear(tenant: string, tailed: Tailed, sentAtMs: number): void {
    tailed.view.heard(sentAtMs)
    if (tailed.hearing === undefined) return
    if (tailed.view.hasHeard(this.#options.now())) {
      end(tailed.hearing)
      tailed.hearing = undefined
    } else {
      // This process stood still during the poll.
      this.#notified.add(tenant)
    }
  }

  #wake({ view, waiting }: Tailed): void {
    for (const waiter of waiting) {
      if (waiter.revision <= view.position) waiter.resolve()
    }
  }

  /** From written to applied: the row's age by the database's clock when it was read, and our time since we asked. */
  #recordLag(row: LogEntry, sentAtMs: number): void {
    const { metrics, now } = this.#options
    metrics.invalidationsApplied++
    metrics.invalidationLag.record(row.ageMs + now() - sentAtMs)
  }
}

/** The newest rows of a page, as far back as they follow each other without a hole from the log's end. */
function contiguousEnd({ revision, rows }: LogPage): readonly LogEntry[] {
  let first = rows.length
  while (first > 0 && rows[first - 1]?.revision === revision - (rows.length - first)) first--
  return rows.slice(first)
}

/** What ends a wait: an `AbortSignal`, or what says the same and is cheaper to make. */
export interface Ending {
  readonly aborted: boolean
  readonly reason: unknown
  throwIfAborted(): void
  addEventListener(type: 'abort', listener: () => void, options?: { readonly once: boolean }): void
  removeEventListener(type: 'abort', listener: () => void): void
}

/** Waits for `promise` until the signal aborts; then throws the signal's reason. The promise goes on, unheard. */
export async function untilAborted<T>(promise: Promise<T>, signal: Ending): Promise<T> {
  const aborted = Promise.withResolvers<never>()
  const abort = () => aborted.reject(signal.reason)
  signal.addEventListener('abort', abort, { once: true })
  if (signal.aborted) abort()
  try {
    return await Promise.race([promise, aborted.promise])
  } finally {
    signal.removeEventListener('abort', abort)
  }
}

function end(hearing: Hearing): void {
  clearTimeout(hearing.timer)
  hearing.over = true
  hearing.resolve()
}

/** What `AbortSignal.timeout` gives for a reason. */
const timedOut = () => new DOMException('no answer in time', 'TimeoutError')

const nextTurn = () => new Promise<void>((resolve) => setImmediate(resolve))

/** A standby that is promoted starts the next timeline; nobody promotes this often before an instance notices. */
const PLAUSIBLE_TIMELINES = 16

/**
 * What a caller is told who asks for a revision that the log, which is at `revision`, has not reached. One of a
 * timeline that may well have begun was most likely given out by an instance that follows a newer primary already.
 */
export function aheadOfLog(field: string, wanted: Revision, revision: Revision): ItemCacheError {
  const timelines = Math.floor(wanted / TIMELINE_SPAN) - Math.floor(revision / TIMELINE_SPAN)
  if (timelines > 0 && timelines <= PLAUSIBLE_TIMELINES) {
    return new ItemCacheError(
      'unavailable',
      `${field} ${wanted} is of a newer timeline than this instance knows`,
      {
        reason: 'NEWER_TIMELINE',
        retryAfterMs: 500,
      },
    )
  }
  return new ItemCacheError('ahead-of-log', `${field} ${wanted} is ahead of the tenant's log`, {
    reason: 'REVISION_AHEAD_OF_LOG',
  })
}

/** What a caller is told who waited for the log and did not live to see it applied. */
export function notAppliedYet(cause: unknown): ItemCacheError {
  return new ItemCacheError('unavailable', 'the invalidation is committed and not yet applied here', {
    reason: 'NOT_APPLIED_YET',
    retryAfterMs: 100,
    cause,
  })
}
