/** What is recorded of a run: one JSON object a line, in the order in which things ended. Times are the driver's clock, ms. */
import type { Testimony } from './audit.ts'

/** What an item's content looks like from outside: `title|description`; null when it is absent. */
export type Content = string | null

interface Call {
  /** Unique; all attempts of one write share it. It is the writer in the log, and the title of what is written. */
  readonly op: string
  readonly client: string
  /** The instance that was asked; `psql` for edits by hand. */
  readonly at: string
  readonly tenant: string
  readonly start: number
  readonly end: number
}

/** One answer for one item. */
export interface ReadResult {
  readonly id: string
  /** Left out: neither an item nor an absence was answered. */
  readonly content?: Content
  readonly rowRevision?: number
  readonly asOf?: number
  /** Left out: the answer is not marked. */
  readonly stale?: 'REVALIDATING' | 'SOFT_TIMEOUT' | 'TIER_DOWN' | 'UNVERIFIED' | 'UNSPECIFIED'
  readonly tier?: string
  readonly outcome?: string
  readonly error?: string
}

export interface ReadEvent extends Call {
  readonly t: 'read'
  readonly freshness: 'DEFAULT' | 'CACHE_ONLY' | 'FRESH'
  /** 0: none. */
  readonly min: number
  readonly results: readonly ReadResult[]
}

/** One page of a list; the page is the first one. */
export interface ListEvent extends Call {
  readonly t: 'list'
  /** '': all items. */
  readonly tag: string
  readonly items: readonly { readonly id: string; readonly title: string }[]
  readonly asOf?: number
  /** The last id of the page, when there are more. */
  readonly upTo?: string
  readonly stale?: ReadResult['stale']
  readonly error?: string
}

export interface WriteEvent extends Call {
  readonly t: 'write'
  readonly kind: 'update' | 'create' | 'delete' | 'invalidate' | 'sql'
  readonly ids: readonly string[]
  /** For an invalidation that is not by ids. */
  readonly tags?: readonly string[]
  readonly all?: boolean
  readonly mode?: 'EXPIRE' | 'REMOVE'
  readonly refreshOrigin?: boolean
  /** The row revision that the etag of the request names. */
  readonly etagRevision?: number
  /** The acknowledged revision; left out when the call failed. */
  readonly revision?: number
  readonly content?: Content
  readonly error?: string
}

export type StreamMessage =
  | {
      readonly kind: 'open'
      readonly resumeAfter?: number
      readonly ids: readonly string[]
      readonly tags: readonly string[]
    }
  | { readonly kind: 'started'; readonly position: number; readonly oldest: number }
  | { readonly kind: 'event'; readonly row: StreamRow }
  | { readonly kind: 'heartbeat'; readonly revision: number }
  | { readonly kind: 'gap'; readonly after: number; readonly through: number }
  | { readonly kind: 'draining'; readonly position: number }
  | { readonly kind: 'end'; readonly error?: string }

export interface StreamRow {
  readonly revision: number
  readonly kind: string
  readonly mode: string
  readonly ids: readonly string[]
  readonly tags: readonly string[]
  readonly writer: string
}

export interface WatchEvent {
  readonly t: 'watch'
  readonly watcher: string
  readonly at: string
  readonly tenant: string
  readonly time: number
  readonly message: StreamMessage
}

export interface FaultEvent {
  readonly t: 'fault'
  readonly time: number
  readonly what: string
}

/** After all faults ended: what an instance answered last for an item, and whether that is what PostgreSQL holds. */
export interface FinalEvent {
  readonly t: 'final'
  readonly what: string
  readonly ok: boolean
  readonly afterMs: number
}

/** What one PostgreSQL held in the end; the last one is the primary, those before it were replaced. */
export interface TestimonyEvent extends Testimony {
  readonly t: 'testimony'
  readonly timeline: number
}

/** What the checker must know of how a history was made. */
export interface PlanEvent {
  readonly t: 'plan'
  /** Old rows of the log are deleted now and then. */
  readonly trims: boolean
  /** A replaced primary lived on for a while: who can only reach that one cannot know what the new one was told. */
  readonly split: boolean
}

export type HistoryEvent =
  | PlanEvent
  | ReadEvent
  | ListEvent
  | WriteEvent
  | WatchEvent
  | FaultEvent
  | FinalEvent
  | TestimonyEvent

export const TIMELINE_SPAN = 2 ** 40
export const timelineOf = (revision: number): number => Math.floor(revision / TIMELINE_SPAN)

/** A copy may be served for this long without news of the log, in milliseconds. */
export const BOUND_MS = 1500
/** Clocks of two processes on one machine run alike; this is for rounding. */
export const SLACK_MS = 20
