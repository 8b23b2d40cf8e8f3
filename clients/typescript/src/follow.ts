/**
 * A watch that goes on: the stream of invalidations, resumed by its last bookmark on any instance whenever it breaks off.
 * What comes twice is left out, and what is missing without the service's word is named as a gap: so revisions come in
 * order, each once, and none is passed over in silence.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import type { MessageInitShape } from '@bufbuild/protobuf'
import { timestampMs } from '@bufbuild/protobuf/wkt'
import { toMs } from './duration.ts'
import { CancelledError, ItemCacheError, UnavailableError } from './errors.ts'
import {
  InvalidationKind,
  InvalidationMode,
  type Item,
  ItemCacheService,
  type InvalidationEvent as Row,
  type WatchInvalidationsRequestSchema,
  type WatchInvalidationsResponse,
} from './gen/itemcache/v1/item_cache_pb.ts'
import type { Transport } from './transport.ts'

/** One row of the tenant's log. */
export interface InvalidationEvent {
  readonly revision: bigint
  readonly event: 'upserted' | 'deleted' | 'keys-invalidated' | 'tags-invalidated' | 'tenant-invalidated'
  /** `expire`: older copies may be served as stale; `remove`: they may not. */
  readonly mode: 'expire' | 'remove'
  /** At most 1,000. Empty for invalidations by tag and of the whole tenant. */
  readonly ids: readonly string[]
  /** What the items have or had, categories among them; for an invalidation by tag, the tags themselves. */
  readonly tags: readonly string[]
  /** With `includeItems`: the items, as of the event or later; absent ones are left out. */
  readonly items: readonly Item[]
  /** The database's clock when the change was made. */
  readonly committedAt: Date
  /** Who wrote; empty when unknown. */
  readonly clientId: string
}

/** What a watch yields. */
export type WatchMessage =
  /** Before all else but `disconnected`: events after `position` follow. */
  | { readonly kind: 'started'; readonly position: bigint; readonly oldestResumable: bigint }
  | ({ readonly kind: 'event' } & InvalidationEvent)
  /** Everything up to `revision` has been yielded: it can be given as `resumeAfter`. */
  | { readonly kind: 'heartbeat'; readonly revision: bigint }
  /** The revisions after `after` up to `through` are lost: distrust every copy older than `through`. */
  | { readonly kind: 'gap'; readonly after: bigint; readonly through: bigint }
  /**
   * The stream is lost, or cannot be had yet. The watch goes on trying, and `resumed`, or `started` if it has not come yet,
   * follows when it has succeeded.
   */
  | { readonly kind: 'disconnected'; readonly error: ItemCacheError }
  /** The watch goes on after this revision; without `disconnected` before it when a stream was only renewed. */
  | { readonly kind: 'resumed'; readonly after: bigint }

/** With what the near cache needs besides: when, by this process's clock, a heartbeat is true of. */
export type FollowMessage =
  | Exclude<WatchMessage, { kind: 'heartbeat' }>
  | { readonly kind: 'heartbeat'; readonly revision: bigint; readonly heardAtMs: number | undefined }

export interface FollowOptions {
  readonly request: MessageInitShape<typeof WatchInvalidationsRequestSchema>
  readonly metadata: Readonly<Record<string, string>>
  readonly signal?: AbortSignal | undefined
  /** Monotonic, milliseconds. */
  readonly now: () => number
}

const FIRST_BACKOFF_MS = 50
const MAX_BACKOFF_MS = 2000
/** A stream from which nothing has come for so many heartbeats, and so long, is taken for dead. */
const SILENT_HEARTBEATS = 5
const MIN_SILENCE_MS = 2000
/** After so long a stream is begun anew: the rates of two clocks are alike, but not equal. */
const MAX_STREAM_MS = 600_000
/** The answer to a request that took longer leaves heartbeats that prove too little; another stream may do better. */
const SLOW_START_MS = 300

/** Throws OutOfRangeError when the bookmark is ahead of the log, CancelledError by the signal, and what is not worth a retry. */
export async function* follow(
  transport: Transport,
  { request, metadata, signal, now }: FollowOptions,
): AsyncGenerator<FollowMessage, void, undefined> {
  let cursor = request.resumeAfter
  const dense =
    (request.ids?.length ?? 0) === 0 && (request.tags?.length ?? 0) === 0 && !request.excludeOwnWrites
  let started = false
  let failures = 0
  let slowStarts = 0
  for (;;) {
    let beganMs = now()
    let established = false
    let renewAtMs = Number.POSITIVE_INFINITY
    try {
      using silence = new Silence(signal)
      const messages = transport.serverStream(
        ItemCacheService.method.watchInvalidations,
        { ...request, ...(cursor !== undefined && { resumeAfter: cursor }) },
        { metadata, signal: silence.signal, onBegin: () => (beganMs = now()) },
      )
      for await (const { event } of watched(messages, silence)) {
        switch (event.case) {
          case 'started': {
            const { position, oldestResumable, heartbeatInterval } = event.value
            established = true
            failures = 0
            silence.maxMs = Math.max(MIN_SILENCE_MS, SILENT_HEARTBEATS * (toMs(heartbeatInterval) ?? 0))
            if (now() - beganMs > SLOW_START_MS) slowStarts++
            else slowStarts = 0
            renewAtMs =
              now() + (slowStarts > 0 ? Math.min(MAX_STREAM_MS, 1000 * 2 ** slowStarts) : MAX_STREAM_MS)
            if (started) yield { kind: 'resumed', after: position }
            else yield { kind: 'started', position, oldestResumable }
            started = true
            cursor ??= position
            break
          }
          case 'batch':
            for (const row of event.value.events) {
              if (cursor !== undefined && row.revision <= cursor) continue
              if (dense && cursor !== undefined && row.revision > cursor + 1n) {
                const after = cursor
                cursor = row.revision - 1n
                yield { kind: 'gap', after, through: cursor }
              }
              cursor = row.revision
              yield { kind: 'event', ...eventOf(row) }
            }
            break
          case 'heartbeat': {
            const { revision, heardAfter } = event.value
            if (cursor !== undefined && revision > cursor) {
              const after = cursor
              cursor = revision
              if (dense) yield { kind: 'gap', after, through: revision }
            }
            const heardAtMs = heardAfter === undefined ? undefined : beganMs + toMs(heardAfter)
            yield { kind: 'heartbeat', revision: cursor ?? revision, heardAtMs }
            break
          }
          case 'gap': {
            const { after, through } = event.value
            if (cursor !== undefined && through <= cursor) break
            cursor = through
            yield { kind: 'gap', after, through }
            break
          }
          case 'draining':
            // UNAVAILABLE follows; another instance can have the watch at once.
            break
        }
        if (now() >= renewAtMs) break
      }
      if (established && now() >= renewAtMs) continue
      throw new UnavailableError('the stream has ended')
    } catch (caught) {
      if (signal?.aborted) throw new CancelledError('the watch was cancelled', { cause: signal.reason })
      if (!(caught instanceof ItemCacheError)) throw caught
      const error =
        caught instanceof CancelledError && caught.cause === SILENT
          ? new UnavailableError('nothing has come for too long')
          : caught
      if (!established && !isWorthARetry(error, started)) throw error
      if (established || failures === 0) yield { kind: 'disconnected', error }
      const backoffMs = Math.min(MAX_BACKOFF_MS, FIRST_BACKOFF_MS * 2 ** failures++)
      try {
        await sleep(Math.random() * backoffMs, undefined, { signal })
      } catch (cause) {
        throw new CancelledError('the watch was cancelled', { cause })
      }
    }
  }
}

/**
 * Once a watch has begun, too many watchers on an instance is as much a reason to try another as its end, and a token that
 * cannot be had now may be had later.
 */
function isWorthARetry({ code, reason }: ItemCacheError, started: boolean): boolean {
  if (code === 'UNAVAILABLE') return true
  if (code === 'RESOURCE_EXHAUSTED' || reason === 'NO_TOKEN') return started
  // What the service itself says has a reason; without one a connection broke.
  return reason === undefined && (code === 'INTERNAL' || code === 'UNKNOWN' || code === 'DEADLINE_EXCEEDED')
}

const SILENT = Symbol('silent')

/** Aborts when nothing has come for `maxMs`, counted only while somebody waits for it. */
class Silence implements Disposable {
  maxMs = 10_000
  readonly #controller = new AbortController()
  readonly #outer: AbortSignal | undefined
  readonly #abort = () => this.#controller.abort(this.#outer?.reason)
  #timer: NodeJS.Timeout | undefined

  constructor(outer: AbortSignal | undefined) {
    this.#outer = outer
    if (outer?.aborted) this.#abort()
    outer?.addEventListener('abort', this.#abort, { once: true })
  }

  get signal(): AbortSignal {
    return this.#controller.signal
  }

  begin(): void {
    this.#timer = setTimeout(() => this.#controller.abort(SILENT), this.maxMs)
  }

  end(): void {
    clearTimeout(this.#timer)
  }

  [Symbol.dispose](): void {
    this.end()
    this.#outer?.removeEventListener('abort', this.#abort)
  }
}

async function* watched(
  messages: AsyncGenerator<WatchInvalidationsResponse, void, undefined>,
  silence: Silence,
): AsyncGenerator<WatchInvalidationsResponse, void, undefined> {
  try {
    for (;;) {
      silence.begin()
      const { value, done } = await messages.next()
      silence.end()
      if (done || value === undefined) return
      yield value
    }
  } finally {
    await messages.return()
  }
}

const EVENTS: Readonly<Record<number, InvalidationEvent['event']>> = {
  [InvalidationKind.UNSPECIFIED]: 'tenant-invalidated',
  [InvalidationKind.UPSERTED]: 'upserted',
  [InvalidationKind.DELETED]: 'deleted',
  [InvalidationKind.KEYS_INVALIDATED]: 'keys-invalidated',
  [InvalidationKind.TAGS_INVALIDATED]: 'tags-invalidated',
  [InvalidationKind.TENANT_INVALIDATED]: 'tenant-invalidated',
}

/** A kind that this release does not know might concern anything, so it counts as an invalidation of everything. */
function eventOf(row: Row): InvalidationEvent {
  return {
    revision: row.revision,
    event: EVENTS[row.kind] ?? 'tenant-invalidated',
    mode: row.mode === InvalidationMode.EXPIRE ? 'expire' : 'remove',
    ids: row.ids,
    tags: row.tags,
    items: row.items,
    committedAt: new Date(row.commitTime === undefined ? 0 : timestampMs(row.commitTime)),
    clientId: row.clientId,
  }
}
