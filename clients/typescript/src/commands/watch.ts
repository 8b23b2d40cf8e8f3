/** `watch`: invalidations as they happen. */
import { create, type JsonObject, toJson } from '@bufbuild/protobuf'
import { timestampFromDate } from '@bufbuild/protobuf/wkt'
import type { Client } from '../client.ts'
import { CancelledError, type ItemCacheError } from '../errors.ts'
import type { InvalidationEvent, WatchMessage } from '../follow.ts'
import { formatEvent, printable, type Style } from '../format.ts'
import {
  InvalidationEventSchema,
  InvalidationKind,
  InvalidationMode,
} from '../gen/itemcache/v1/item_cache_pb.ts'
import type { Io } from '../terminal.ts'

export interface WatchFlags {
  readonly resumeAfter?: bigint
  readonly tag?: readonly string[]
  readonly items?: true
  readonly count?: number
}

/** Writes until `count` events were written or the program is interrupted. */
export async function watch(
  client: Client,
  ids: readonly string[],
  { resumeAfter, tag, items, count = Number.POSITIVE_INFINITY, json }: WatchFlags & { readonly json?: true },
  io: Io,
  style: Style,
): Promise<void> {
  await reach(client)
  const signal = io.interruption?.()
  const messages = client.watch({ resumeAfter, ids, tags: tag, includeItems: items ?? false, signal })
  const say = (text: string) => void io.stdout.write(`${text}\n`)
  const note = (text: string) => void io.stderr.write(`itemcache: ${text}\n`)
  let position = resumeAfter
  let left = count
  let started = false
  try {
    for await (const message of messages) {
      // A service that cannot be reached is an error; one that goes away later is waited for.
      if (message.kind === 'disconnected' && !started) throw message.error
      started = true
      if (json) {
        const document = documentOf(message)
        if (document !== undefined) say(JSON.stringify(document))
      }
      switch (message.kind) {
        case 'started':
          position = message.position
          if (!json) note(`watching what comes after revision ${position}`)
          break
        case 'event':
          position = message.revision
          if (!json) say(formatEvent(message, style))
          left--
          break
        case 'heartbeat':
          position = message.revision
          break
        case 'gap':
          position = message.through
          if (!json) say(`gap: ${message.after} to ${message.through} are lost, distrust what is older`)
          break
        case 'disconnected':
          if (!json) note(`the connection is lost (${printable(message.error.message)}), trying again`)
          break
        case 'resumed':
          if (!json) note(`resumed after revision ${message.after}`)
          break
      }
      if (left <= 0) break
    }
  } catch (error) {
    if (!(error instanceof CancelledError && signal?.aborted)) throw error
  }
  if (!json && position !== undefined) note(`to go on: --resume-after ${position}`)
}

/** Fails as other commands do, and within their deadline, when nobody answers; a stream waits longer and says less. */
async function reach(client: Client): Promise<void> {
  try {
    await client.metrics()
  } catch (error) {
    const { code, reason } = error as ItemCacheError
    if (reason === undefined && (code === 'UNAVAILABLE' || code === 'DEADLINE_EXCEEDED')) throw error
    // Somebody answers, and may refuse this call and yet allow the watch.
  }
}

/** One document per message; heartbeats are none. */
function documentOf(message: WatchMessage): JsonObject | undefined {
  switch (message.kind) {
    case 'event':
      return { event: toJson(InvalidationEventSchema, rowOf(message)) }
    case 'started':
      return {
        started: { position: `${message.position}`, oldestResumable: `${message.oldestResumable}` },
      }
    case 'gap':
      return { gap: { after: `${message.after}`, through: `${message.through}` } }
    case 'disconnected':
      return { disconnected: { code: message.error.code, message: message.error.message } }
    case 'resumed':
      return { resumed: { after: `${message.after}` } }
    case 'heartbeat':
      return undefined
  }
}

const KINDS: Readonly<Record<InvalidationEvent['event'], InvalidationKind>> = {
  upserted: InvalidationKind.UPSERTED,
  deleted: InvalidationKind.DELETED,
  'keys-invalidated': InvalidationKind.KEYS_INVALIDATED,
  'tags-invalidated': InvalidationKind.TAGS_INVALIDATED,
  'tenant-invalidated': InvalidationKind.TENANT_INVALIDATED,
}

function rowOf({ revision, event, mode, ids, tags, items, committedAt, clientId }: InvalidationEvent) {
  return create(InvalidationEventSchema, {
    revision,
    kind: KINDS[event],
    mode: mode === 'remove' ? InvalidationMode.REMOVE : InvalidationMode.EXPIRE,
    ids: [...ids],
    tags: [...tags],
    items: [...items],
    commitTime: timestampFromDate(committedAt),
    clientId,
  })
}
