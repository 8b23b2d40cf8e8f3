/**
 * Responses put together from bytes: memory holds items as encoded messages, so an answer is those bytes with a
 * small status around them, and no item is encoded twice. The field numbers are those of item_cache.proto; a
 * test decodes every form with the generated code.
 */
import { fromBinary, toBinary } from '@bufbuild/protobuf'
import { type ItemCacheError, itemNotFound } from '../errors.ts'
import { CacheOutcome, ItemSchema, SkipReason, StaleReason, Tier } from '../gen/itemcache/v1/item_cache_pb.ts'
import type { Page } from '../service/list.ts'
import type { Answer, AsciiIds } from '../service/read.ts'
import type { Copy, SkipReason as DomainSkipReason, TierName } from '../tiers/tier.ts'
import { cut, type ItemMask } from './field-mask.ts'
import { codeOf } from './status.ts'
import {
  FieldWriter,
  type Framed,
  fieldBytes,
  HEADER_BYTES,
  MAX_UTF8_BYTES,
  MIN_LENT_BYTES,
  NUMBER_BYTES,
  utf8Bytes,
} from './wire.ts'

export const TIERS: Readonly<Record<TierName, Tier>> = {
  memory: Tier.MEMORY,
  redis: Tier.REDIS,
  postgres: Tier.POSTGRES,
  origin: Tier.ORIGIN,
}

export const SKIP_REASONS: Readonly<Record<DomainSkipReason, SkipReason>> = {
  off: SkipReason.OFF,
  down: SkipReason.DOWN,
  timeout: SkipReason.TIMEOUT,
}

/** No function here is called while another one writes. */
const WRITER = new FieldWriter()
const STATUS = new FieldWriter()
const LENT = new FieldWriter()

/** No encoded `CacheStatus` is longer, so that its length is one byte. */
const CACHE_STATUS_BYTES = 127

/** Two enums, two durations and an as-of. */
const PLAIN_STATUS_BYTES = 7 * NUMBER_BYTES + 2 * HEADER_BYTES

/** Where an answer came from: an encoded `CacheStatus`. `nowMs` is the reader's clock. */
export function cacheStatus(answer: Answer, nowMs: number): Uint8Array {
  const writer = STATUS.start(CACHE_STATUS_BYTES)
  putCacheStatus(writer, answer, nowMs)
  return writer.finish()
}

function putCacheStatus(writer: FieldWriter, answer: Answer, nowMs: number): void {
  const { copy, tier, outcome, staleReason } = answer
  if (tier !== undefined) writer.number(1, TIERS[tier])
  writer.number(2, CacheOutcome[outcome])
  if (staleReason !== undefined) writer.number(3, StaleReason[staleReason])
  if (answer.coalesced) writer.number(4, 1)
  if (copy !== undefined) {
    putDuration(writer, 5, nowMs - copy.verifiedAtMs)
    if (outcome !== 'STALE') putDuration(writer, 6, copy.freshUntilMs - nowMs)
  }
  for (const skipped of answer.skipped) {
    writer.header(7, 4).number(1, TIERS[skipped.tier]).number(2, SKIP_REASONS[skipped.reason])
  }
  if (copy !== undefined && copy.asOf !== 0) writer.number(8, copy.asOf)
}

/** Milliseconds as a `Duration`; negative ones as zero. */
function putDuration(writer: FieldWriter, field: number, ms: number): void {
  const whole = Math.max(0, ms)
  const seconds = Math.floor(whole / 1000)
  const nanos = Math.floor((whole - seconds * 1000) * 1e6)
  const at = writer.begin(field)
  if (seconds !== 0) writer.number(1, seconds)
  if (nanos !== 0) writer.number(2, nanos)
  writer.end(at)
}

/** The encoded item, cut to a mask when there is one. */
export function masked(bytes: Uint8Array, mask: ItemMask | undefined): Uint8Array {
  if (mask === undefined) return bytes
  return toBinary(ItemSchema, cut(fromBinary(ItemSchema, bytes), mask))
}

/** What GetItem answers with. */
export type GetItemResult =
  | { readonly kind: 'item'; readonly bytes: Uint8Array }
  | { readonly kind: 'not-modified' }
  | { readonly kind: 'none' }

/** A `GetItemResponse`. `nowMs` is the reader's clock. */
export function encodeGetItem(result: GetItemResult, answer: Answer, nowMs: number): Framed {
  const itemBytes = result.kind === 'item' ? result.bytes.byteLength : 0
  const writer = WRITER.start(fieldBytes(itemBytes) + SHORT_BYTES)
  if (result.kind === 'item') writer.bytes(1, result.bytes)
  else if (result.kind === 'not-modified') writer.number(2, 1)
  const cache = writer.begin(3)
  putCacheStatus(writer, answer, nowMs)
  writer.end(cache)
  const revision = answer.copy?.asOf ?? 0
  if (revision !== 0) writer.number(4, revision)
  return writer.finishFramed()
}

/** A `StreamItemsResponse`. `nowMs` is the reader's clock. */
export function encodeStreamItem(
  correlationId: bigint,
  result: GetItemResult | { readonly kind: 'not-found' },
  answer: Answer,
  nowMs: number,
): Uint8Array {
  const bytes = result.kind === 'item' ? result.bytes : result.kind === 'not-found' ? ITEM_NOT_FOUND : NOTHING
  const writer = WRITER.start(fieldBytes(bytes.byteLength) + SHORT_BYTES)
  if (correlationId !== 0n) writer.uint64(1, correlationId)
  if (result.kind === 'item') writer.bytes(2, bytes)
  else if (result.kind === 'not-modified') writer.number(3, 1)
  else if (result.kind === 'not-found') writer.bytes(4, bytes)
  const cache = writer.begin(5)
  putCacheStatus(writer, answer, nowMs)
  writer.end(cache)
  const revision = answer.copy?.asOf ?? 0
  if (revision !== 0) writer.number(6, revision)
  return writer.finish()
}

/** A `StreamItemsResponse` of a look-up that failed. */
export function encodeStreamFailure(correlationId: bigint, error: ItemCacheError): Uint8Array {
  const bytes = encodeItemError(error)
  const writer = WRITER.start(fieldBytes(bytes.byteLength) + NUMBER_BYTES)
  if (correlationId !== 0n) writer.uint64(1, correlationId)
  return writer.bytes(4, bytes).finish()
}

const NOTHING = new Uint8Array()
/** Everything in a response but the item: a status, an id of the look-up, a revision, a flag. */
const SHORT_BYTES = fieldBytes(CACHE_STATUS_BYTES) + 3 * NUMBER_BYTES

/** What became of one id of a batch: an answer, or an encoded `ItemError` that no tier gave. */
export type BatchResult = Answer | Uint8Array

/** A `BatchGetItemsResponse`, with a result for each id. `nowMs` is the reader's clock. */
export function encodeBatch(
  ids: readonly string[],
  results: readonly BatchResult[],
  mask: ItemMask | undefined,
  nowMs: number,
): Framed {
  let maxBytes = 0
  for (const [i, result] of results.entries()) {
    const value = result instanceof Uint8Array ? result : result.copy?.bytes
    const valueBytes = Math.max(value?.byteLength ?? 0, ITEM_NOT_FOUND.byteLength)
    maxBytes += 4 * HEADER_BYTES + MAX_UTF8_BYTES * (ids[i]?.length ?? 0) + valueBytes + CACHE_STATUS_BYTES
  }
  const writer = WRITER.start(maxBytes)
  for (const [i, result] of results.entries()) {
    const id = ids[i] ?? ''
    const idBytes = utf8Bytes(id)
    const failed = result instanceof Uint8Array
    const copy = failed ? undefined : result.copy
    const item = copy?.bytes && masked(copy.bytes, mask)
    const error = failed ? result : copy !== undefined && item === undefined ? ITEM_NOT_FOUND : undefined
    STATUS.start(CACHE_STATUS_BYTES)
    if (!failed) putCacheStatus(STATUS, result, nowMs)
    const statusBytes = failed ? 0 : fieldBytes(STATUS.length)
    writer.header(1, fieldBytes(idBytes) + optionalBytes(item) + optionalBytes(error) + statusBytes)
    writer.string(1, id, idBytes)
    if (item !== undefined) writer.bytes(2, item)
    if (error !== undefined) writer.bytes(3, error)
    if (!failed) writer.message(4, STATUS)
  }
  return writer.finishFramed()
}

/** The same of ids that all are plain hits (`Reader.plainHits`), with all fields of their items. */
export function encodePlainHits(
  { bytes, bounds, length }: AsciiIds,
  copies: readonly Copy[],
  nowMs: number,
): Framed {
  let maxBytes = bytes.byteLength + length * (3 * HEADER_BYTES + PLAIN_STATUS_BYTES)
  for (const copy of copies) maxBytes += copy.bytes?.byteLength ?? 0
  const isLarge = maxBytes >= MIN_LENT_BYTES
  const writer = isLarge ? LENT.startLent(maxBytes) : WRITER.start(maxBytes)
  STATUS.start(CACHE_STATUS_BYTES)
  // The part of the status that is the same for all copies of one SELECT.
  let verifiedAtMs = Number.NaN
  let common = 0
  for (let n = 0; n < length; n++) {
    const copy = copies[n] as Copy
    const item = copy.bytes ?? NOTHING
    if (copy.verifiedAtMs !== verifiedAtMs) {
      verifiedAtMs = copy.verifiedAtMs
      STATUS.rewind(0).number(1, Tier.MEMORY).number(2, CacheOutcome.HIT)
      putDuration(STATUS, 5, nowMs - verifiedAtMs)
      common = STATUS.length
    }
    STATUS.rewind(common)
    putDuration(STATUS, 6, copy.freshUntilMs - nowMs)
    if (copy.asOf !== 0) STATUS.number(8, copy.asOf)
    // The id's field in the request is the one in the result.
    const from = (bounds[2 * n] as number) - 2
    const to = bounds[2 * n + 1] as number
    writer.header(1, to - from + fieldBytes(item.byteLength) + fieldBytes(STATUS.length))
    writer.rawPart(bytes, from, to).bytes(2, item).message(4, STATUS)
  }
  return isLarge ? writer.finishLent() : writer.finishFramed()
}

const optionalBytes = (field: Uint8Array | undefined) =>
  field === undefined ? 0 : fieldBytes(field.byteLength)

/** An `ItemError`. */
export function encodeItemError(error: ItemCacheError): Uint8Array {
  const { reason, retryAfterMs } = error
  const message = error.message.toWellFormed()
  const writer = WRITER.start(
    NUMBER_BYTES + 3 * HEADER_BYTES + 2 * NUMBER_BYTES + MAX_UTF8_BYTES * (reason.length + message.length),
  )
  writer.number(1, codeOf(error))
  if (reason !== '') writer.string(2, reason)
  if (message !== '') writer.string(3, message)
  if (retryAfterMs !== undefined) putDuration(writer, 4, retryAfterMs)
  return writer.finish()
}

/** What results of many say of an item that does not exist. */
export const ITEM_NOT_FOUND = encodeItemError(itemNotFound(''))

/** The part of a `ListItemsResponse` that is the same for everybody: what is cached of a page. */
export function encodePage({ items, nextPageToken }: Page): Uint8Array {
  const token = Buffer.from(nextPageToken)
  const present = items.flatMap(({ bytes }) => bytes ?? [])
  const maxBytes = present.reduce(
    (sum, { byteLength }) => sum + fieldBytes(byteLength),
    fieldBytes(token.length),
  )
  const writer = WRITER.start(maxBytes)
  for (const bytes of present) writer.bytes(1, bytes)
  if (token.length > 0) writer.bytes(2, token)
  return writer.finish()
}

/** A `ListItemsResponse`: a page and where it came from. `nowMs` is the reader's clock. */
export function encodeList(page: Uint8Array, answer: Answer, nowMs: number): Framed {
  const writer = WRITER.start(page.byteLength + SHORT_BYTES).raw(page)
  const revision = answer.copy?.asOf ?? 0
  if (revision !== 0) writer.number(3, revision)
  const cache = writer.begin(4)
  putCacheStatus(writer, answer, nowMs)
  writer.end(cache)
  return writer.finishFramed()
}

/** A message whose field 1 is an item and whose field 2 is a revision: the answers of create and update. */
export function encodeWritten(item: Uint8Array, revision: number): Framed {
  return WRITER.start(fieldBytes(item.byteLength) + NUMBER_BYTES)
    .bytes(1, item)
    .number(2, revision)
    .finishFramed()
}
