/**
 * Subscriptions: the log of a tenant as streams, one for each watcher.
 *
 * A watcher is a **cursor**, never a queue: it is asked for its next message only when it has taken the last one. While
 * it keeps up it is served from the tenant's **ring** of newest rows; when it falls behind the ring, from
 * PostgreSQL; and what PostgreSQL no longer holds it is told of as a **gap**. So a watcher that never reads
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
  readonly sleeping: Set<Sleeper>
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
   * The tenant's log as messages, until the consumer breaks off or the signal aborts (when the server drains: after a
   * last `draining`). Throws `ahead-of-log`, `exhausted`, `unavailable`.
   */
  async *watch(
    request: WatchRequest,
    signal: AbortSignal,
    draining: AbortSignal,
  ): AsyncGenerator<WatchMessage> {
    const { tenant, connection, heartbeatMs, maxBatchDelayMs } = request
    let view = await this.#tail.activated(tenant, signal)
    // It may have been dropped since; from here on it is needed.
    while (view !== this.#tail.view(tenant)) view = await this.#tail.activated(tenant, signal)
    const watched = this.#enter(tenant, connection, view)
    using entered = new DisposableStack()
    entered.defer(() => this.#leave(tenant, connection, watched))
    const position = view.position
    let cursor = request.resumeAfter ?? position
    // Only a watcher that may be ahead of the log needs an answer of its own: of the others many may begin at once.
    const { revision, oldest } =
      cursor > position ? await this.#source.bounds(tenant, signal) : await this.#boundsOf(tenant, watched)
    if (cursor > Math.max(position, revision)) {
      throw aheadOfLog('resume_after', cursor, revision)
    }
    const startedMs = this.#tail.now()
    const sleeper = entered.use(new Sleeper(watched.sleeping, [signal, draining]))
    yield { kind: 'started', position: cursor, oldestResumable: oldest - 1, heartbeatMs }
    // Timers run in real time, so what paces them does too; the view's clock decides what a heartbeat may claim.
    let beatAtMs = performance.now()
    // When the view had last heard of the log, as of the last moment at which the cursor had reached its position.
    let provenMs = Number.NEGATIVE_INFINITY
    for (;;) {
      if (draining.aborted) {
        yield { kind: 'draining', position: cursor }
        throw draining.reason
      }
      signal.throwIfAborted()
      const { position: end } = view
      if (cursor >= end) provenMs = view.heardMs
      // No batch puts a heartbeat off: it alone tells how current the stream is. There is none while this instance does
      // not hear of the log itself, or the watcher has fallen behind.
      const dueInMs = beatAtMs + heartbeatMs - performance.now()
      if (dueInMs <= 0 && this.#tail.now() - provenMs <= HEARD_BOUND_MS) {
        yield { kind: 'heartbeat', revision: cursor, heardMs: provenMs - startedMs }
        beatAtMs = performance.now()
        continue
      }
      if (cursor >= end) {
        const woken = await sleeper.sleep(Math.max(dueInMs, MIN_PAUSE_MS))
        if (woken && maxBatchDelayMs > 0) await pause(maxBatchDelayMs, signal, draining)
        continue
      }
      const rows: readonly LogEntry[] =
        cursor >= watched.ring.base
          ? watched.ring.after(cursor)
          : await this.#behind(tenant, cursor, end, signal)
      const next = rows[0]
      if (next === undefined || next.revision > cursor + 1) {
        const through = next === undefined ? end : next.revision - 1
        this.#metrics.gapsSent++
        yield { kind: 'gap', after: cursor, through }
        cursor = through
        continue
      }
      cursor = rows.at(-1)?.revision ?? cursor
      if (cursor >= view.position) provenMs = view.heardMs
      const wanted = select(rows, request)
      if (wanted.length === 0) continue
      yield { kind: 'batch', rows: wanted }
    }
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

  #wake({ sleeping }: Watched): void {
    for (const sleeper of sleeping) sleeper.wake()
  }

  #enter(tenant: string, connection: string, view: View): Watched {
    const { watchersPerTenant, watchersPerConnection } = this.#limits
    const watched = this.#tenants.get(tenant) ?? {
      ring: new Ring(view.position, this.#limits),
      watchers: 0,
      bounds: undefined,
      sleeping: new Set(),
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
  if (all && exceptWriter === undefined) return rows
  return rows.filter((row) => {
    if (exceptWriter !== undefined && row.writer === exceptWriter) return false
    if (all || row.kind === 'TENANT_INVALIDATED') return true
    if (row.kind === 'TAGS_INVALIDATED') return ids.size > 0 || row.tags.some((tag) => tags.has(tag))
    if (row.kind === 'KEYS_INVALIDATED' && tags.size > 0) return true
    return row.ids.some((id) => ids.has(id)) || row.tags.some((tag) => tags.has(tag))
  })
}

/**
 * What one watcher waits with. Its timer and its listeners outlive a wait, since watchers are woken for every row: the
 * signals are those of many, and to leave one of them means to look through all who listen to it.
 */
class Sleeper implements Disposable {
  readonly #sleeping: Set<Sleeper>
  readonly #signals: readonly AbortSignal[]
  #wake: ((woken: boolean) => void) | undefined
  #timer: NodeJS.Timeout | undefined
  /** When the timer goes off, by `performance.now()`. */
  #dueMs = 0
  readonly #aborted = () => this.wake()

  /** `sleeping`: all who sleep, this one among them while it does. */
  constructor(sleeping: Set<Sleeper>, signals: readonly AbortSignal[]) {
    this.#sleeping = sleeping
    this.#signals = signals
    for (const signal of signals) signal.addEventListener('abort', this.#aborted, { once: true })
  }

  /** Resolves with true when woken, or aborted; with false after `ms` milliseconds, or sooner. */
  sleep(ms: number): Promise<boolean> {
    if (this.#signals.some(({ aborted }) => aborted)) return Promise.resolve(true)
    const dueMs = performance.now() + ms
    if (this.#timer === undefined || this.#dueMs > dueMs) {
      clearTimeout(this.#timer)
      this.#dueMs = dueMs
      this.#timer = setTimeout(() => {
        this.#timer = undefined
        this.#end(false)
      }, ms)
    }
    this.#sleeping.add(this)
    return new Promise((resolve) => {
      this.#wake = resolve
    })
  }

  wake(): void {
    this.#end(true)
  }

  #end(woken: boolean): void {
    this.#sleeping.delete(this)
    this.#wake?.(woken)
    this.#wake = undefined
  }

  [Symbol.dispose](): void {
    clearTimeout(this.#timer)
    this.#end(true)
    for (const signal of this.#signals) signal.removeEventListener('abort', this.#aborted)
  }
}

/** Resolves after `ms` milliseconds, or when one of the signals aborts. */
function pause(ms: number, ...signals: readonly AbortSignal[]): Promise<void> {
  return new Promise((resolve) => {
    const end = () => {
      clearTimeout(timer)
      for (const signal of signals) signal.removeEventListener('abort', end)
      resolve()
    }
    const timer = setTimeout(end, ms)
    for (const signal of signals) {
      if (signal.aborted) return end()
      signal.addEventListener('abort', end, { once: true })
    }
  })
}
