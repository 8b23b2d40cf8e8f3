/**
 * What the live page is sent. Types only, and without imports: the page's own scripts, which run in a browser, are
 * checked against them.
 */

export type TierName = 'memory' | 'redis' | 'postgres' | 'origin'

/** What may fail. `log`: the ordered log of changes, which PostgreSQL holds. */
export type PartName = TierName | 'log'

/** Milliseconds since 1970, by the service's clock. */
export type TimeMs = number

/**
 * One second of the service: a number for each of `History.columns`; `null` where there was nothing to measure. Times in
 * milliseconds, rates per second, shares from 0 to 1.
 */
export type Sample = readonly (number | null)[]

export interface Part {
  readonly name: PartName
  /** `on`: nothing but the circuit breaker tells whether it answers. */
  readonly state: 'ready' | 'on' | 'connecting' | 'down' | 'off'
  /** Absent: it has no circuit breaker. */
  readonly breaker?: 'CLOSED' | 'HALF_OPEN' | 'OPEN'
}

/** A time in which a part was not well: it was down, or its circuit breaker was not closed. */
export interface Outage {
  readonly part: PartName
  readonly what: 'down' | 'failing'
  readonly sinceMs: TimeMs
  /** Absent: it lasts. */
  readonly untilMs?: TimeMs
}

/** One row of the log that was applied, or `gap`: rows that were skipped. `seq` counts what was applied here. */
export interface FedInvalidation {
  readonly seq: number
  readonly tenant: string
  readonly revision: number
  readonly reason:
    | 'UPSERTED'
    | 'DELETED'
    | 'KEYS_INVALIDATED'
    | 'TAGS_INVALIDATED'
    | 'TENANT_INVALIDATED'
    | 'GAP'
  readonly mode: 'EXPIRE' | 'REMOVE'
  /** The first of them. */
  readonly ids: readonly string[]
  readonly tags: readonly string[]
  /** How many more there are. */
  readonly moreIds: number
  readonly moreTags: number
  readonly appliedMs: TimeMs
  /** How long ago it had been written then, in milliseconds and by the database's clock; absent for a gap. */
  readonly lagMs?: number
}

/** Calls of one method in the last 30 to 60 s. */
export interface RpcRow {
  readonly method: string
  readonly perSecond: number
  /** Calls per second that ended with another status than OK, by status. */
  readonly failed: Readonly<Record<string, number>>
  /** Of the calls that ended; absent when none did. */
  readonly p50Ms?: number
  readonly p99Ms?: number
}

/** Bytes, but for entries. What cannot be told is absent. */
export interface MemoryUse {
  readonly memory: {
    readonly on: boolean
    readonly entries: number
    readonly maxEntries: number
    readonly bytes: number
    readonly maxBytes: number
    readonly evictions: number
  }
  /** `maxBytes` is absent where Redis has no maximum. */
  readonly redis?: { readonly usedBytes: number; readonly maxBytes?: number }
  readonly process: { readonly residentBytes: number; readonly heapBytes: number }
  /** Answers that callers have not taken. */
  readonly unsentBytes: number
  /** Newest rows of the log, kept for invalidation streams. */
  readonly ringBytes: number
}

/** How the service is at this moment. */
export interface Now {
  readonly timeMs: TimeMs
  readonly startMs: TimeMs
  readonly ready: boolean
  readonly draining: boolean
  readonly parts: readonly Part[]
  /** The oldest first. */
  readonly outages: readonly Outage[]
  /** What the consistency probe has found wrong since the start. */
  readonly violations: number
  readonly openCalls: number
  readonly subscribers: number
  readonly memory: MemoryUse
  /** The busiest first. */
  readonly rpcs: readonly RpcRow[]
}

/** The event `history`: the first that a page gets. */
export interface History {
  readonly version: string
  readonly columns: readonly string[]
  /** The oldest first. */
  readonly samples: readonly Sample[]
  /** How long the page should look back. */
  readonly seconds: number
  /** The oldest first. */
  readonly invalidations: readonly FedInvalidation[]
  readonly now: Now
}

/** The event `second`. It comes between two seconds, too, without a sample, when a part has changed its state. */
export interface Second {
  readonly sample: Sample | null
  /** Since the last event; the oldest first. */
  readonly invalidations: readonly FedInvalidation[]
  readonly now: Now
}
