/**
 * Subscriptions: the log of a tenant as streams, one for each watcher.
 *
 * A watcher is a **cursor**, never a queue: it is asked for its next message only when it has taken the last one. While
 * it keeps up it is served from the tenant's **ring** of newest rows, as soon as there is a row; when it falls behind the
 * ring, from PostgreSQL; and what PostgreSQL no longer holds it is told of as a **gap**. So a watcher that never reads
 * costs what its cursor costs.
 *
 * What a watcher may rely on: `started` comes first; revisions come in order, each once, a row never split; a heartbeat
 * proves that everything up to its revision has been sent, and comes only while this instance itself has heard of
 * the log; `gap` names every revision that is left out; `resumeAfter` continues exactly after a revision, on
 * whichever instance.
 */
import { Semaphore } from 'async-mutex'
import { ItemCacheError } from '../errors.ts'
import type { Metrics } from '../observe/metrics.ts'
import type { LogEntry, LogSource, Revision } from '../tiers/tier.ts'
import { aheadOfLog, type Follower, type Tail } from './tail.ts'
import { HEARD_BOUND_MS, type View } from './view.ts'

/** What a watcher wants. Durations in milliseconds. */
export interface WatchRequest {
  readonly tenant: string
  /** Continue after this revision; `undefined`: start now. */
  readonly resumeAfter: Revision | undefined
  /** Only rows that may concern one of these; both empty: all rows. */
  readonly ids: ReadonlySet<string>
  readonly tags: ReadonlySet<string>
  readonly heartbeatMs: number
  /** How long rows may wait for others to be sent with. */
  readonly maxBatchDelayMs: number
  /** Leave out what this writer wrote; `undefined`: leave out nothing. */
  readonly exceptWriter: string | undefined
  /** What is counted against the limit per connection. */
  readonly connection: string
}

/** Who takes a watcher's messages. */
export interface WatchSignals {
  /** Aborts when nobody wants them any more. */
  readonly gone: AbortSignal
  /** Aborts when the server is about to drain. */
  readonly draining: AbortSignal
  /** Called when there may be a message again, or the reason of an end. */
  readonly wake: () => void
}

/** One message to a watcher. */
export type WatchMessage =
  | {
      readonly kind: 'started'
      readonly position: Revision
      readonly oldestResumable: Revision
      readonly heartbeatMs: number
    }
  /** Watchers that are sent the same rows are given the same array, so that it can be encoded once. */
  | { readonly kind: 'batch'; readonly rows: readonly LogEntry[] }
  /** `heardMs`: what was committed earlier has been sent; milliseconds since `started` was made, maybe negative. */
  | { readonly kind: 'heartbeat'; readonly revision: Revision; readonly heardMs: number }
  | { readonly kind: 'gap'; readonly after: Revision; readonly through: Revision }
  | { readonly kind: 'draining'; readonly position: Revision }

/** Bounds of what all watchers together may cost. */
export interface SubscriptionLimits {
  readonly watchersPerTenant: number
  readonly watchersPerConnection: number
  /** Most tenants with watchers. */
  readonly tenants: number
  /**
   * Most rows that a ring holds, and about how many bytes. There is one ring for each tenant with watchers, and all of
   * them together hold at most `RINGS_IN_ALL` times as many bytes.
   */
  readonly ringRows: number
  readonly ringBytes: number
}

/** A batch ends after the row with which it exceeds one of these. */
const BATCH_ROWS = 500
const BATCH_BYTES = 128 * 1024
/** Rows that are fetched from PostgreSQL at once for a watcher that fell behind. */
const HISTORY = { rows: 200, names: 20_000 }
/** Before a heartbeat is tried again that could not be given. */
const MIN_PAUSE_MS = 50
/** Watchers that are told of news before others have their turn: each costs some microseconds. */
const TOLD_PER_TURN = 256
/** Batches whose array is remembered for other watchers at the same cursor; together no larger than the ring. */
const SHARED_BATCHES = 16
/** All rings together may be as large as so many that are full. */
const RINGS_IN_ALL = 10

/** The newest rows of a tenant, without a hole. */
class Ring {
  /** The rows are those after this revision. */
  base: Revision
  readonly #rows: LogEntry[] = []
  #bytes = 0
  readonly #maxRows: number
  readonly #maxBytes: number
  readonly #batches = new Map<Revision, readonly LogEntry[]>()
  #batchBytes = 0

  constructor(base: Revision, { ringRows, ringBytes }: SubscriptionLimits) {
    this.base = base
    this.#maxRows = ringRows
    this.#maxBytes = ringBytes
  }

  get rows(): number {
    return this.#rows.length
  }

  get bytes(): number {
    return this.#bytes
  }

  /** Of the batches that are remembered. */
  get batchBytes(): number {
    return this.#batchBytes
  }

  push(row: LogEntry): void {
    this.#rows.push(row)
    this.#bytes += sizeOf(row)
    if (this.#rows.length <= this.#maxRows && this.#bytes <= this.#maxBytes) return
    // Dropping a half at a time costs each row once.
    this.#shrink(this.#maxRows / 2, this.#maxBytes / 2)
  }

  /** Drops the older half. */
  halve(): void {
    this.#shrink(this.#rows.length / 2, this.#bytes / 2)
  }

  #shrink(maxRows: number, maxBytes: number): void {
    let dropped = 0
    while (this.#rows.length - dropped > maxRows || this.#bytes > maxBytes) {
      const row = this.#rows[dropped]
      if (row === undefined) break
      this.#bytes -= sizeOf(row)
      this.base = row.revision
      dropped++
    }
    this.#rows.splice(0, dropped)
    this.#forgetBatches()
  }

  reset(base: Revision): void {
    this.#rows.length = 0
    this.#bytes = 0
    this.#forgetBatches()
    this.base = base
  }

  /** The next batch after a cursor that is not before `base`. */
  after(cursor: Revision): readonly LogEntry[] {
    const shared = this.#batches.get(cursor)
    if (shared !== undefined) return shared
    const batch = firstBatch(this.#rows, cursor - this.base)
    if (batch.length === 0) return batch
    this.#batches.set(cursor, batch)
    for (const row of batch) this.#batchBytes += sizeOf(row)
    while (this.#batches.size > SHARED_BATCHES || this.#batchBytes > this.#bytes) {
      const [oldest] = this.#batches
      if (oldest === undefined) break
      for (const row of oldest[1]) this.#batchBytes -= sizeOf(row)
      this.#batches.delete(oldest[0])
    }
    return batch
  }

  #forgetBatches(): void {
    this.#batches.clear()
    this.#batchBytes = 0
  }
}

/** About what a row takes in memory and in a message. */
function sizeOf(row: LogEntry): number {
  let bytes = 64
  for (const id of row.ids) bytes += 8 + id.length
  for (const tag of row.tags) bytes += 8 + tag.length
  return bytes
}

function firstBatch(rows: readonly LogEntry[], from: number): readonly LogEntry[] {
  let bytes = 0
  let to = from
  while (to < rows.length && to - from < BATCH_ROWS && bytes < BATCH_BYTES) {
    const row = rows[to]
    if (row === undefined) break
    bytes += sizeOf(row)
    to++
  }
  return rows.slice(from, to)
}

interface Watched {
  readonly ring: Ring
  watchers: number
  /** Asked by watchers that began while it was under way. */
  bounds: ReturnType<LogSource['bounds']> | undefined
  /** Those who have begun. Not those who wait: V8 replaces the table of a set every so many additions. */
  readonly following: Set<Watcher>
  /** There are rows that not all who follow have been told of. */
  news: boolean
  telling: boolean
}

export class Subscriptions implements Follower {
  readonly #tail: Tail
  readonly #source: LogSource
  readonly #metrics: Metrics
  readonly #limits: SubscriptionLimits
  readonly #tenants = new Map<string, Watched>()
  readonly #connections = new Map<string, number>()
  /** Of all rings together. */
  #ringBytes = 0
  /** Watchers that fell behind take turns, so that the tail need not wait for them. */
  readonly #history = new Semaphore(1)

  constructor(parts: { tail: Tail; source: LogSource; metrics: Metrics; limits: SubscriptionLimits }) {
    this.#tail = parts.tail
    this.#source = parts.source
    this.#metrics = parts.metrics
    this.#limits = parts.limits
    this.#tail.follow(this)
  }

  /** How much of what can grow there is now. */
  held(): {
    readonly rings: number
    readonly ring_rows: number
    readonly ring_bytes: number
    readonly batch_bytes: number
    readonly watching_connections: number
  } {
    let [rows, batchBytes] = [0, 0]
    for (const { ring } of this.#tenants.values()) {
      rows += ring.rows
      batchBytes += ring.batchBytes
    }
    return {
      rings: this.#tenants.size,
      ring_rows: rows,
      ring_bytes: this.#ringBytes,
      batch_bytes: batchBytes,
      watching_connections: this.#connections.size,
    }
  }

  applied(tenant: string, row: LogEntry): void {
    const watched = this.#tenants.get(tenant)
    if (watched === undefined) return
    const before = watched.ring.bytes
    watched.ring.push(row)
    this.#ringBytes += watched.ring.bytes - before
    this.#boundRings()
    this.#wake(watched)
  }

  jumped(tenant: string, through: Revision): void {
    const watched = this.#tenants.get(tenant)
    if (watched === undefined) return
    this.#ringBytes -= watched.ring.bytes
    watched.ring.reset(through)
    this.#wake(watched)
  }

  /** The largest rings give way: their watchers who are far behind are then served from PostgreSQL. */
  #boundRings(): void {
    while (this.#ringBytes > RINGS_IN_ALL * this.#limits.ringBytes) {
      let largest: Ring | undefined
      for (const { ring } of this.#tenants.values()) {
        if (largest === undefined || ring.bytes > largest.bytes) largest = ring
      }
      if (largest === undefined || largest.bytes === 0) return
      const before = largest.bytes
      largest.halve()
      this.#ringBytes -= before - largest.bytes
    }
  }

  needs(tenant: string): boolean {
    return this.#tenants.has(tenant)
  }

  /**
   * Begins to follow the tenant's log. What is returned must be disposed of. Throws `ahead-of-log`, `exhausted`,
   * `unavailable`, and why `gone` has aborted.
   */
  async watch(request: WatchRequest, signals: WatchSignals): Promise<Watcher> {
    const { tenant, connection } = request
    const { gone } = signals
    let view = await this.#tail.activated(tenant, gone)
    // It may have been dropped since; from here on it is needed.
    while (view !== this.#tail.view(tenant)) view = await this.#tail.activated(tenant, gone)
    const watched = this.#enter(tenant, connection, view)
    using entered = new DisposableStack()
    entered.defer(() => this.#leave(tenant, connection, watched))
    const position = view.position
    const from = request.resumeAfter ?? position
    // Only a watcher that may be ahead of the log needs an answer of its own: of the others many may begin at once.
    const { revision, oldest } =
      from > position ? await this.#source.bounds(tenant, gone) : await this.#boundsOf(tenant, watched)
    if (from > Math.max(position, revision)) {
      throw aheadOfLog('resume_after', from, revision)
    }
    const left = entered.move()
    const watcher = new Watcher(request, signals, {
      from,
      oldestResumable: oldest - 1,
      view,
      ring: watched.ring,
      now: () => this.#tail.now(),
      metrics: this.#metrics,
      behind: (cursor, end) => this.#behind(tenant, cursor, end, gone),
      leave: () => {
        watched.following.delete(watcher)
        left.dispose()
      },
    })
    watched.following.add(watcher)
    return watcher
  }

  #boundsOf(tenant: string, watched: Watched): ReturnType<LogSource['bounds']> {
    watched.bounds ??= this.#source.bounds(tenant).finally(() => {
      watched.bounds = undefined
    })
    return watched.bounds
  }

  /** Rows from PostgreSQL for a cursor that the ring has left behind; up to the first hole, none if all are gone. */
  async #behind(
    tenant: string,
    cursor: Revision,
    position: Revision,
    signal: AbortSignal,
  ): Promise<readonly LogEntry[]> {
    const pages = await this.#history.runExclusive(() =>
      this.#source.after(new Map([[tenant, cursor]]), HISTORY, signal),
    )
    const { rows } = pages.get(tenant) ?? { rows: [] }
    const known = rows.filter((row) => row.revision <= position)
    const hole = known.findIndex((row, i) => i > 0 && row.revision !== (known[i - 1]?.revision ?? 0) + 1)
    return firstBatch(hole < 0 ? known : known.slice(0, hole), 0)
  }

  /** At the end of the turn, so that rows that are applied together travel together. */
  #wake(watched: Watched): void {
    watched.news = true
    if (watched.telling) return
    watched.telling = true
    setImmediate(() => this.#tell(watched, NOBODY))
  }

  /** Tells the rest of those who follow, and then, when there is news again, all of them. */
  #tell(watched: Watched, rest: Iterator<Watcher, undefined>): void {
    let left = rest
    for (let told = 0; told < TOLD_PER_TURN; told++) {
      let { value } = left.next()
      if (value === undefined) {
        watched.telling = watched.news
        if (!watched.news) return
        watched.news = false
        left = watched.following.values()
        value = left.next().value
      }
      value?.tell()
    }
    setImmediate(() => this.#tell(watched, left))
  }

  #enter(tenant: string, connection: string, view: View): Watched {
    const { watchersPerTenant, watchersPerConnection } = this.#limits
    const watched = this.#tenants.get(tenant) ?? {
      ring: new Ring(view.position, this.#limits),
      watchers: 0,
      bounds: undefined,
      following: new Set<Watcher>(),
      news: false,
      telling: false,
    }
    const onConnection = this.#connections.get(connection) ?? 0
    const tooManyTenants = watched.watchers === 0 && this.#tenants.size >= this.#limits.tenants
    if (watched.watchers >= watchersPerTenant || onConnection >= watchersPerConnection || tooManyTenants) {
      throw new ItemCacheError('exhausted', 'too many invalidation streams are open', {
        reason: 'TOO_MANY_WATCHERS',
        retryAfterMs: 5000,
      })
    }
    watched.watchers++
    this.#tenants.set(tenant, watched)
    this.#connections.set(connection, onConnection + 1)
    this.#metrics.subscribers++
    return watched
  }

  #leave(tenant: string, connection: string, watched: Watched): void {
    watched.watchers--
    if (watched.watchers === 0) {
      this.#tenants.delete(tenant)
      this.#ringBytes -= watched.ring.bytes
    }
    const onConnection = (this.#connections.get(connection) ?? 1) - 1
    if (onConnection === 0) this.#connections.delete(connection)
    else this.#connections.set(connection, onConnection)
    this.#metrics.subscribers--
  }
}

/** The rows that may concern the watcher: one that invalidates by tag may concern any id, and the other way round. */
function select(rows: readonly LogEntry[], request: WatchRequest): readonly LogEntry[] {
  const { ids, tags, exceptWriter } = request
  const all = ids.size === 0 && tags.size === 0
  return rows.filter((row) => {
    if (exceptWriter !== undefined && row.writer === exceptWriter) return false
    if (all || row.kind === 'TENANT_INVALIDATED') return true
    if (row.kind === 'TAGS_INVALIDATED') return ids.size > 0 || row.tags.some((tag) => tags.has(tag))
    if (row.kind === 'KEYS_INVALIDATED' && tags.size > 0) return true
    return row.ids.some((id) => ids.has(id)) || row.tags.some((tag) => tags.has(tag))
  })
}

const wantsAll = ({ ids, tags, exceptWriter }: WatchRequest): boolean =>
  ids.size === 0 && tags.size === 0 && exceptWriter === undefined

const NOBODY: Iterator<Watcher, undefined> = new Set<Watcher>().values()

/** Of the log, as one watcher sees it. */
interface WatchedLog {
  readonly from: Revision
  readonly oldestResumable: Revision
  readonly view: View
  readonly ring: Ring
  readonly now: () => number
  readonly metrics: Metrics
  /** Rows that the ring has left behind. */
  readonly behind: (cursor: Revision, end: Revision) => Promise<readonly LogEntry[]>
  readonly leave: () => void
}

/**
 * One watcher. It is asked for a message when the last one has been taken, and answers at once: with a message, or with none,
 * and then it wakes who has asked. Who was given the last message there is need not ask again. So an event costs a watcher that
 * keeps up two function calls, and no promise.
 */
export class Watcher implements Disposable {
  readonly #request: WatchRequest
  readonly #signals: WatchSignals
  readonly #log: WatchedLog
  // What every event needs, where it is found with as few looks as can be: a thousand watchers are not in the processor's cache.
  readonly #view: View
  readonly #ring: Ring
  readonly #wantsAll: boolean
  readonly #isDelayed: boolean
  readonly #startedMs: number
  /** What was sent last, or was of no concern. */
  #cursor: Revision
  /** When the view had last heard of the log, as of the last moment at which the cursor had reached its position. */
  #provenMs = Number.NEGATIVE_INFINITY
  #started = false
  #saidDraining = false
  /** Has nothing more, and will wake. */
  #waiting = false
  /** Lets rows wait for others. */
  #delay: NodeJS.Timeout | undefined
  /** Until the next heartbeat is due, or is tried again. */
  #timer: NodeJS.Timeout | undefined
  /** `taken`: the last one has only just been, so that the time begins anew. */
  #heartbeat: 'taken' | 'coming' | 'due' = 'taken'
  /** Rows are being fetched that the ring has left behind. */
  #fetching = false
  /** They, and where the log ended when they were asked for. */
  #fetched: { readonly rows: readonly LogEntry[]; readonly end: Revision } | undefined
  #failure: { readonly error: unknown } | undefined

  constructor(request: WatchRequest, signals: WatchSignals, log: WatchedLog) {
    this.#request = request
    this.#signals = signals
    this.#log = log
    this.#view = log.view
    this.#ring = log.ring
    this.#wantsAll = wantsAll(request)
    this.#isDelayed = request.maxBatchDelayMs > 0
    this.#cursor = log.from
    this.#startedMs = log.now()
  }

  /** True: there is no message after the one just given; it wakes when there may be. */
  get isWaiting(): boolean {
    return this.#waiting
  }

  /**
   * The next message, or `undefined`: there is none, and it wakes when there may be. When the server drains, a last
   * `draining` comes. Throws what ends the stream.
   */
  next(): WatchMessage | undefined {
    const view = this.#view
    this.#waiting = false
    if (!this.#started) {
      this.#started = true
      const { oldestResumable } = this.#log
      return {
        kind: 'started',
        position: this.#cursor,
        oldestResumable,
        heartbeatMs: this.#request.heartbeatMs,
      }
    }
    if (this.#heartbeat === 'taken') {
      this.#heartbeat = 'coming'
      this.#wakeIn(this.#request.heartbeatMs)
    }
    for (;;) {
      const cursor = this.#cursor
      if (this.#signals.draining.aborted) {
        if (this.#saidDraining) throw this.#signals.draining.reason
        this.#saidDraining = true
        return { kind: 'draining', position: cursor }
      }
      if (this.#failure !== undefined) throw this.#failure.error
      if (this.#fetching) return undefined
      const { position: end } = view
      if (cursor >= end) this.#provenMs = view.heardMs
      // No batch puts a heartbeat off: it alone tells how current the stream is. There is none while this instance does
      // not hear of the log itself, or the watcher has fallen behind.
      if (this.#heartbeat === 'due' && this.#log.now() - this.#provenMs <= HEARD_BOUND_MS) {
        this.#heartbeat = 'taken'
        return { kind: 'heartbeat', revision: cursor, heardMs: this.#provenMs - this.#startedMs }
      }
      if (cursor >= end) {
        this.#waiting = true
        if (this.#heartbeat === 'due') this.#wakeIn(MIN_PAUSE_MS)
        return undefined
      }
      const fetched = this.#fetched
      if (fetched === undefined && cursor < this.#ring.base) {
        void this.#fetch(cursor, end)
        return undefined
      }
      this.#fetched = undefined
      const rows = fetched?.rows ?? this.#ring.after(cursor)
      const next = rows[0]
      if (next === undefined || next.revision > cursor + 1) {
        const through = next === undefined ? (fetched?.end ?? end) : next.revision - 1
        this.#log.metrics.gapsSent++
        this.#cursor = through
        return { kind: 'gap', after: cursor, through }
      }
      this.#cursor = rows.at(-1)?.revision ?? cursor
      const isLast = this.#cursor >= view.position
      if (isLast) this.#provenMs = view.heardMs
      const wanted = this.#wantsAll ? rows : select(rows, this.#request)
      if (wanted.length === 0) continue
      this.#waiting = isLast && this.#heartbeat !== 'due'
      return { kind: 'batch', rows: wanted }
    }
  }

  /** There are new rows. */
  tell(): void {
    if (!this.#waiting || this.#delay !== undefined) return
    if (this.#isDelayed) this.#delay = setTimeout(this.#delayed, this.#request.maxBatchDelayMs)
    else this.#signals.wake()
  }

  readonly #delayed = () => {
    this.#delay = undefined
    this.#signals.wake()
  }

  /** After the time that is left to the next heartbeat, or of a pause before it is tried again. */
  #wakeIn(ms: number): void {
    clearTimeout(this.#timer)
    this.#timer = setTimeout(() => {
      this.#heartbeat = 'due'
      if (this.#waiting && this.#delay === undefined) this.#signals.wake()
    }, ms)
  }

  async #fetch(cursor: Revision, end: Revision): Promise<void> {
    this.#fetching = true
    try {
      this.#fetched = { rows: await this.#log.behind(cursor, end), end }
    } catch (error) {
      this.#failure = { error }
    }
    this.#fetching = false
    this.#signals.wake()
  }

  [Symbol.dispose](): void {
    clearTimeout(this.#timer)
    clearTimeout(this.#delay)
    this.#waiting = false
    this.#log.leave()
  }
}
