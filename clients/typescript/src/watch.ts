/**
 * Following a tenant's invalidations over any disconnect: the stream is opened again, on whichever instance, right after the
 * last revision that was delivered.
 */
import type { MessageInitShape } from '@bufbuild/protobuf'
import { toDuration, toMs } from './duration.ts'
import { CancelledError, ItemCacheError, UnavailableError } from './errors.ts'
import {
  type InvalidationEvent,
  ItemCacheService,
  type WatchInvalidationsRequestSchema,
} from './gen/itemcache/v1/item_cache_pb.ts'
import type { CallOptions, Transport } from './transport.ts'

/** What a watcher is told, in the order of revisions. */
export type WatchMessage =
  /** The stream begins, or goes on after a disconnect: events after `position` follow. */
  | {
      readonly kind: 'started'
      readonly position: bigint
      /** The smallest `resumeAfter` for which nothing is missing. */
      readonly oldestResumable: bigint
      /** When the call was made, by the clock of `performance.now`. */
      readonly calledMs: number
    }
  | { readonly kind: 'event'; readonly event: InvalidationEvent }
  /**
   * Everything up to `revision` has been delivered, and so was everything that was committed until `heardMs`, by the clock
   * of `performance.now`; `undefined`: the service is too old to say.
   */
  | { readonly kind: 'heartbeat'; readonly revision: bigint; readonly heardMs: number | undefined }
  /** The revisions after `after` and up to `through` are not known any more: distrust every copy that is older. */
  | { readonly kind: 'gap'; readonly after: bigint; readonly through: bigint }
  /** The stream ended; it is opened again by itself. */
  | { readonly kind: 'disconnected'; readonly error: ItemCacheError }

/** Which invalidations, and how. */
export interface WatchOptions {
  /** Continue right after this revision. Default: start now. */
  readonly resumeAfter?: bigint | undefined
  /** Only events that may concern one of these items (at most 500) or of `tags` (at most 32). Default: all. */
  readonly ids?: readonly string[] | undefined
  readonly tags?: readonly string[] | undefined
  /** Milliseconds between two heartbeats: 100 to 60,000. Default: 500. */
  readonly heartbeatMs?: number | undefined
  /** Milliseconds for which events may wait for others, for fewer messages: up to 1,000. Default: 0. */
  readonly maxBatchDelayMs?: number | undefined
  /** Whether events of changed items bring them along. Default: false. */
  readonly includeItems?: boolean | undefined
  /** Leave out what was written with this `clientId`. Default: nothing. */
  readonly exceptClientId?: string | undefined
  /** Ends the watch with CancelledError. */
  readonly signal?: AbortSignal | undefined
}

/** A stream that is silent for so many heartbeats, and for this long at least, is given up and opened again. */
const SILENT_BEATS = 10
const SILENT_MS = 5_000
/** Between two attempts, jittered; doubled for each that fails, up to the second. */
const PAUSE_MS = [50, 2_000] as const

/** What following needs of the world. */
export interface FollowParts {
  readonly transport: Pick<Transport, 'serverStream'>
  readonly metadata: CallOptions['metadata']
  /** Monotonic, milliseconds. */
  readonly now: () => number
  /** Uniform in [0, 1). */
  readonly random: () => number
  readonly sleep: (ms: number, signal: AbortSignal | undefined) => Promise<void>
}

/**
 * Messages until the caller breaks off or the signal aborts. Each revision comes once and in order. Throws ItemCacheError for
 * what to try again would not mend; OutOfRangeError: `resumeAfter` is ahead of the log, which is another one than it was.
 */
export async function* follow(
  { transport, metadata, now, random, sleep }: FollowParts,
  options: WatchOptions,
): AsyncGenerator<WatchMessage, void, undefined> {
  const { heartbeatMs = 500, maxBatchDelayMs, signal } = options
  const request: MessageInitShape<typeof WatchInvalidationsRequestSchema> = {
    ids: [...(options.ids ?? [])],
    tags: [...(options.tags ?? [])],
    heartbeatInterval: toDuration(heartbeatMs),
    maxBatchDelay: maxBatchDelayMs === undefined ? undefined : toDuration(maxBatchDelayMs),
    includeItems: options.includeItems ?? false,
    clientId: options.exceptClientId ?? '',
    excludeOwnWrites: options.exceptClientId !== undefined,
  }
  let { resumeAfter } = options
  for (let failures = 0; ; ) {
    const silence = new AbortController()
    const calledMs = now()
    const stream = transport.serverStream(
      ItemCacheService.method.watchInvalidations,
      { ...request, resumeAfter },
      { metadata, signal: signal ? AbortSignal.any([signal, silence.signal]) : silence.signal },
    )
    let error: ItemCacheError = new UnavailableError('the stream ended')
    try {
      const patienceMs = Math.max(SILENT_BEATS * heartbeatMs, SILENT_MS)
      for (;;) {
        // Runs only while something is awaited: a slow consumer is not silence.
        const timer = setTimeout(() => silence.abort(new Error('the stream is silent')), patienceMs)
        const next = await stream.next().finally(() => clearTimeout(timer))
        if (next.done) break
        const { event } = next.value
        switch (event.case) {
          case 'started': {
            failures = 0
            const { position, oldestResumable } = event.value
            resumeAfter = position
            yield { kind: 'started', position, oldestResumable, calledMs }
            break
          }
          case 'batch':
            for (const one of event.value.events) {
              resumeAfter = one.revision
              yield { kind: 'event', event: one }
            }
            break
          case 'heartbeat': {
            const { revision, heardAfter } = event.value
            resumeAfter = revision
            yield { kind: 'heartbeat', revision, heardMs: heardAfter && calledMs + toMs(heardAfter) }
            break
          }
          case 'gap': {
            const { after, through } = event.value
            resumeAfter = through
            yield { kind: 'gap', after, through }
          }
        }
      }
    } catch (thrown) {
      if (!(thrown instanceof ItemCacheError)) throw thrown
      if (signal?.aborted || !(mayPass(thrown) || silence.signal.aborted)) throw thrown
      error = thrown
    } finally {
      await stream.return()
    }
    yield { kind: 'disconnected', error }
    const pauseMs = Math.min(PAUSE_MS[0] * 2 ** failures++, PAUSE_MS[1])
    await sleep(Math.max(pauseMs * (0.5 + random() / 2), error.retryAfterMs ?? 0), signal)
    if (signal?.aborted) throw new CancelledError('the watch was cancelled', { cause: signal.reason })
  }
}

/** Whether it may be mended by trying again: an instance is gone or draining, or has too many watchers. */
function mayPass({ code }: ItemCacheError): boolean {
  return code === 'UNAVAILABLE' || code === 'RESOURCE_EXHAUSTED' || code === 'INTERNAL' || code === 'UNKNOWN'
}
