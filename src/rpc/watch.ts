/** WatchInvalidations: the log as a stream of messages. */
import { create, type MessageInitShape, toBinary } from '@bufbuild/protobuf'
import { BinaryWriter, WireType } from '@bufbuild/protobuf/wire'
import { type DurationSchema, timestampFromMs } from '@bufbuild/protobuf/wkt'
import {
  InvalidationEventSchema,
  InvalidationKind,
  InvalidationMode,
  type WatchInvalidationsRequest,
  WatchInvalidationsResponseSchema,
} from '../gen/itemcache/v1/item_cache_pb.ts'
import type { Subscriptions, Watcher, WatchMessage, WatchRequest } from '../invalidation/subscriptions.ts'
import { LIMITS } from '../item.ts'
import { DEFAULT_READ, type Reader } from '../service/read.ts'
import type { LogEntry } from '../tiers/tier.ts'
import type { CallContext, Messages, StreamHandler } from './call.ts'
import { toDuration } from './status.ts'
import {
  checkId,
  checkListSize,
  checkOptionalName,
  checkTag,
  durationMs,
  toRevision,
  Violations,
} from './validate.ts'
import { type Framed, framed } from './wire.ts'

const DEFAULT_HEARTBEAT_MS = 500
/** `include_items` adds items to a batch up to this many bytes, so that a message stays below a client's 4 MiB. */
const MAX_ITEMS_BYTES = 2 * 1024 * 1024
/** For reading the items of a batch. */
const ITEMS_TIMEOUT_MS = 30_000

/** `maxUntakenBytes`: what all batches with items may take that watchers have not taken yet; then batches go without items. */
export function watchInvalidations(
  subscriptions: Subscriptions,
  reader: Reader,
  maxUntakenBytes: number,
): StreamHandler<WatchInvalidationsRequest> {
  // Watchers that wake together at the same cursor share what is being read and encoded for them.
  const underWay = new Map<readonly LogEntry[], Promise<Framed>>()
  let untakenBytes = 0
  const withItems = (tenant: string, rows: readonly LogEntry[]): Promise<Framed> => {
    const bytes =
      underWay.get(rows) ?? itemsOf(rows, tenant, reader).then((items) => encodeBatch(rows, items))
    if (!underWay.has(rows)) {
      underWay.set(rows, bytes)
      const forget = () => underWay.delete(rows)
      bytes.then(forget, forget)
    }
    return bytes
  }
  return async (request, context, signals) => {
    const watch = watchRequest(request, context)
    const watcher = await subscriptions.watch(watch, signals)
    if (!request.includeItems) return new Encoded(watcher)
    let batch: Batch | undefined
    /** What it was made, once its items have been read. */
    let carrying: { readonly reply: Framed } | { readonly error: unknown } | undefined
    /** Of the batch that was given last. */
    let givenBytes = 0
    const take = () => {
      untakenBytes -= givenBytes
      givenBytes = 0
    }
    return {
      next() {
        take()
        if (batch === undefined) {
          const message = watcher.next()
          if (message?.kind !== 'batch') return message && encode(message)
          batch = message
          withItems(watch.tenant, message.rows)
            .then(
              (reply) => {
                carrying = { reply }
              },
              (error) => {
                carrying = { error }
              },
            )
            .then(signals.wake)
        }
        if (carrying === undefined) return undefined
        if ('error' in carrying) throw carrying.error
        const [{ reply }, bare] = [carrying, batch]
        batch = undefined
        carrying = undefined
        if (untakenBytes + reply.byteLength > maxUntakenBytes) return encode(bare)
        givenBytes = reply.byteLength
        untakenBytes += givenBytes
        return reply
      },
      [Symbol.dispose]() {
        take()
        watcher[Symbol.dispose]()
      },
    }
  }
}

function watchRequest(request: WatchInvalidationsRequest, context: CallContext): WatchRequest {
  const violations = new Violations()
  const { resumeAfter, ids, tags, heartbeatInterval, maxBatchDelay, clientId, excludeOwnWrites } = request
  if (resumeAfter !== undefined) {
    violations.check(resumeAfter >= 0n, 'resume_after', `must not be negative, got ${resumeAfter}`)
  }
  checkListSize(ids.length, [0, LIMITS.batchIds], 'ids', violations)
  for (const [i, id] of ids.slice(0, LIMITS.batchIds).entries()) checkId(id, `ids[${i}]`, violations)
  checkListSize(tags.length, [0, LIMITS.tagsPerItem], 'tags', violations)
  for (const [i, tag] of tags.slice(0, LIMITS.tagsPerItem).entries()) checkTag(tag, `tags[${i}]`, violations)
  const heartbeatMs =
    heartbeatInterval === undefined
      ? DEFAULT_HEARTBEAT_MS
      : durationMs(heartbeatInterval, 'heartbeat_interval', violations)
  violations.check(
    heartbeatMs >= 100 && heartbeatMs <= 60_000,
    'heartbeat_interval',
    'must be 100 ms to 1 min',
  )
  const maxBatchDelayMs =
    maxBatchDelay === undefined ? 0 : durationMs(maxBatchDelay, 'max_batch_delay', violations)
  violations.check(maxBatchDelayMs >= 0 && maxBatchDelayMs <= 1000, 'max_batch_delay', 'must be 0 to 1 s')
  checkOptionalName(clientId, 'client_id', LIMITS.requestIdBytes, violations)
  violations.check(!excludeOwnWrites || clientId !== '', 'client_id', 'is required with exclude_own_writes')
  violations.throwIfAny()
  return {
    tenant: context.tenant,
    resumeAfter: resumeAfter === undefined ? undefined : toRevision(resumeAfter),
    ids: new Set(ids),
    tags: new Set(tags),
    heartbeatMs,
    maxBatchDelayMs,
    exceptWriter: excludeOwnWrites ? clientId : undefined,
    connection: context.peer,
  }
}

/** A watcher's messages, as they are sent. */
class Encoded implements Messages {
  readonly #watcher: Watcher

  constructor(watcher: Watcher) {
    this.#watcher = watcher
  }

  get isWaiting(): boolean {
    return this.#watcher.isWaiting
  }

  next(): Framed | undefined {
    const message = this.#watcher.next()
    return message && encode(message)
  }

  [Symbol.dispose](): void {
    this.#watcher[Symbol.dispose]()
  }
}

type Batch = OfKind<'batch'>

/** Batches that were encoded before: watchers at the same cursor share the array of rows, and so the bytes that are written. */
const encoded = new WeakMap<readonly LogEntry[], Framed>()

type OfKind<Kind> = WatchMessage & { readonly kind: Kind }

/**
 * Batches are most of what there is. In one function V8 would optimise the rare kinds together with them, and throw the code away each time
 * since the shape of a rare one has changed (docs/performance.md#where-each-microsecond-of-a-delivery-goes).
 */
const ENCODERS: { readonly [Kind in WatchMessage['kind']]: (message: OfKind<Kind>) => Framed } = {
  batch({ rows }) {
    let bytes = encoded.get(rows)
    if (bytes === undefined) {
      bytes = encodeBatch(rows, undefined)
      encoded.set(rows, bytes)
    }
    return bytes
  },
  started: ({ position, oldestResumable, heartbeatMs }) =>
    event({
      case: 'started',
      value: {
        position: BigInt(position),
        oldestResumable: BigInt(oldestResumable),
        heartbeatInterval: toDuration(heartbeatMs),
      },
    }),
  heartbeat: ({ revision, heardMs }) =>
    event({
      case: 'heartbeat',
      value: { revision: BigInt(revision), heardAfter: signedDuration(heardMs) },
    }),
  gap: ({ after, through }) =>
    event({ case: 'gap', value: { after: BigInt(after), through: BigInt(through) } }),
  draining: ({ position }) => event({ case: 'draining', value: { position: BigInt(position) } }),
}

const encode = (message: WatchMessage): Framed =>
  (ENCODERS[message.kind] as (message: WatchMessage) => Framed)(message)

function event(
  init: NonNullable<MessageInitShape<typeof WatchInvalidationsResponseSchema>['event']>,
): Framed {
  const message = create(WatchInvalidationsResponseSchema, { event: init })
  return framed(toBinary(WatchInvalidationsResponseSchema, message))
}

/** Rounded down, also below zero: a heartbeat must not claim more than is known. */
function signedDuration(ms: number): MessageInitShape<typeof DurationSchema> {
  const whole = Math.floor(ms)
  return { seconds: BigInt(Math.trunc(whole / 1000)), nanos: (whole % 1000) * 1_000_000 }
}

const BATCH_FIELD = 2
const EVENTS_FIELD = 1
const ITEMS_FIELD = 6

function encodeBatch(rows: readonly LogEntry[], items: ReadonlyMap<string, Uint8Array> | undefined): Framed {
  const newest = items === undefined ? undefined : newestRows(rows)
  const writer = new BinaryWriter()
  writer.tag(BATCH_FIELD, WireType.LengthDelimited).fork()
  for (const row of rows) {
    writer.tag(EVENTS_FIELD, WireType.LengthDelimited).fork()
    writer.raw(toBinary(InvalidationEventSchema, create(InvalidationEventSchema, eventInit(row))))
    for (const id of newest === undefined ? [] : row.ids) {
      const item = newest?.get(id) === row ? items?.get(id) : undefined
      if (item !== undefined) writer.tag(ITEMS_FIELD, WireType.LengthDelimited).bytes(item)
    }
    writer.join()
  }
  return framed(writer.join().finish())
}

/** The last row that has written each item. */
function newestRows(rows: readonly LogEntry[]): ReadonlyMap<string, LogEntry> {
  const newest = new Map<string, LogEntry>()
  for (const row of rows) {
    if (row.kind === 'UPSERTED') for (const id of row.ids) newest.set(id, row)
  }
  return newest
}

function eventInit(row: LogEntry): MessageInitShape<typeof InvalidationEventSchema> {
  return {
    revision: BigInt(row.revision),
    kind: InvalidationKind[row.kind],
    mode: InvalidationMode[row.mode],
    ids: [...row.ids],
    tags: [...row.tags],
    commitTime: timestampFromMs(row.committedAtMs),
    clientId: row.writer,
  }
}

/** The items that a batch has written, as of the batch or later; as many as fit. Absent ones are left out. */
async function itemsOf(
  rows: readonly LogEntry[],
  tenant: string,
  reader: Reader,
): Promise<ReadonlyMap<string, Uint8Array>> {
  const minRevision = rows.at(-1)?.revision ?? 0
  const ids = [...newestRows(rows).keys()]
  const signal = AbortSignal.timeout(ITEMS_TIMEOUT_MS)
  const items = new Map<string, Uint8Array>()
  let bytes = 0
  for (let i = 0; i < ids.length && bytes < MAX_ITEMS_BYTES; i += LIMITS.batchIds) {
    const answers = await Promise.all(
      ids
        .slice(i, i + LIMITS.batchIds)
        .map((id) => reader.read(tenant, id, { ...DEFAULT_READ, minRevision, allowStale: false }, signal)),
    )
    for (const { copy } of answers) {
      if (copy?.bytes === undefined) continue
      bytes += copy.bytes.byteLength
      if (bytes < MAX_ITEMS_BYTES) items.set(copy.id, copy.bytes)
    }
  }
  return items
}
