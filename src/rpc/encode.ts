/**
 * Responses put together from bytes: memory holds items as encoded messages, so an answer is those bytes with a
 * small status around them, and no item is encoded twice. The field numbers are those of item_cache.proto; a
 * test decodes every form with the generated code.
 */
import { fromBinary, toBinary } from '@bufbuild/protobuf'
import type { ItemCacheError } from '../errors.ts'
import { CacheOutcome, ItemSchema, SkipReason, StaleReason, Tier } from '../gen/itemcache/v1/item_cache_pb.ts'
import type { Page } from '../service/list.ts'
import type { Answer } from '../service/read.ts'
import type { SkipReason as DomainSkipReason, TierName } from '../tiers/tier.ts'
import { cut, type ItemMask } from './field-mask.ts'
import { codeOf } from './status.ts'
import { FieldWriter, fieldBytes, HEADER_BYTES, NUMBER_BYTES, varintBytes } from './wire.ts'

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

/** No encoded `CacheStatus` is longer. */
const CACHE_STATUS_BYTES = 127

/** Where an answer came from: an encoded `CacheStatus`. `nowMs` is the reader's clock. */
export function cacheStatus(answer: Answer, nowMs: number): Uint8Array {
  const { copy, tier, outcome, staleReason } = answer
  const writer = new FieldWriter(CACHE_STATUS_BYTES)
  if (tier !== undefined) writer.number(1, TIERS[tier])
  writer.number(2, CacheOutcome[outcome])
  if (staleReason !== undefined) writer.number(3, StaleReason[staleReason])
  if (answer.coalesced) writer.number(4, 1)
  if (copy !== undefined) {
    duration(writer, 5, nowMs - copy.verifiedAtMs)
    if (outcome !== 'STALE') duration(writer, 6, copy.freshUntilMs - nowMs)
  }
  for (const skipped of answer.skipped) {
    writer.header(7, 4).number(1, TIERS[skipped.tier]).number(2, SKIP_REASONS[skipped.reason])
  }
  if (copy !== undefined && copy.asOf !== 0) writer.number(8, copy.asOf)
  return writer.finish()
}

/** Milliseconds as a `Duration`; negative ones as zero. */
function duration(writer: FieldWriter, field: number, ms: number): void {
  const whole = Math.max(0, ms)
  const seconds = Math.floor(whole / 1000)
  const nanos = Math.floor((whole - seconds * 1000) * 1e6)
  writer.header(
    field,
    (seconds === 0 ? 0 : 1 + varintBytes(seconds)) + (nanos === 0 ? 0 : 1 + varintBytes(nanos)),
  )
  if (seconds !== 0) writer.number(1, seconds)
  if (nanos !== 0) writer.number(2, nanos)
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

/** A `GetItemResponse`. `cache` is an encoded `CacheStatus`. */
export function encodeGetItem(result: GetItemResult, cache: Uint8Array, revision: number): Uint8Array {
  const itemBytes = result.kind === 'item' ? result.bytes.byteLength : 0
  const writer = new FieldWriter(fieldBytes(itemBytes) + fieldBytes(cache.byteLength) + 2 * NUMBER_BYTES)
  if (result.kind === 'item') writer.bytes(1, result.bytes)
  else if (result.kind === 'not-modified') writer.number(2, 1)
  writer.bytes(3, cache)
  if (revision !== 0) writer.number(4, revision)
  return writer.finish()
}

/** A `StreamItemsResponse`. `cache` is an encoded `CacheStatus`, and `error` an encoded `ItemError`. */
export function encodeStreamItem(
  correlationId: bigint,
  result: GetItemResult | { readonly kind: 'error'; readonly error: Uint8Array },
  cache: Uint8Array | undefined,
  revision: number,
): Uint8Array {
  const bytes = result.kind === 'item' ? result.bytes : result.kind === 'error' ? result.error : NOTHING
  const writer = new FieldWriter(fieldBytes(bytes.byteLength) + optionalBytes(cache) + 3 * NUMBER_BYTES)
  if (correlationId !== 0n) writer.uint64(1, correlationId)
  if (result.kind === 'item') writer.bytes(2, bytes)
  else if (result.kind === 'not-modified') writer.number(3, 1)
  else if (result.kind === 'error') writer.bytes(4, bytes)
  if (cache !== undefined) writer.bytes(5, cache)
  if (revision !== 0) writer.number(6, revision)
  return writer.finish()
}

const NOTHING = new Uint8Array()

/** One `BatchGetItemsResult`, in encoded parts; neither an item nor an error for a miss with CACHE_ONLY. */
export interface BatchResult {
  readonly id: string
  readonly item: Uint8Array | undefined
  /** An `ItemError`. */
  readonly error: Uint8Array | undefined
  /** A `CacheStatus`. */
  readonly cache: Uint8Array | undefined
}

/** A `BatchGetItemsResponse`. */
export function encodeBatch(results: readonly BatchResult[]): Uint8Array {
  const lengths = results.map(
    ({ id, item, error, cache }) =>
      fieldBytes(Buffer.byteLength(id)) + optionalBytes(item) + optionalBytes(error) + optionalBytes(cache),
  )
  const writer = new FieldWriter(lengths.reduce((sum, length) => sum + fieldBytes(length), 0))
  for (const [i, { id, item, error, cache }] of results.entries()) {
    writer.header(1, lengths[i] ?? 0).string(1, id)
    if (item !== undefined) writer.bytes(2, item)
    if (error !== undefined) writer.bytes(3, error)
    if (cache !== undefined) writer.bytes(4, cache)
  }
  return writer.finish()
}

const optionalBytes = (field: Uint8Array | undefined) =>
  field === undefined ? 0 : fieldBytes(field.byteLength)

/** An `ItemError`. */
export function encodeItemError(error: ItemCacheError): Uint8Array {
  const { reason, retryAfterMs } = error
  const message = error.message.toWellFormed()
  const writer = new FieldWriter(
    NUMBER_BYTES + 3 * HEADER_BYTES + 2 * NUMBER_BYTES + 3 * (reason.length + message.length),
  )
  writer.number(1, codeOf(error))
  if (reason !== '') writer.string(2, reason)
  if (message !== '') writer.string(3, message)
  if (retryAfterMs !== undefined) duration(writer, 4, retryAfterMs)
  return writer.finish()
}

/** The part of a `ListItemsResponse` that is the same for everybody: what is cached of a page. */
export function encodePage({ items, nextPageToken }: Page): Uint8Array {
  const token = Buffer.from(nextPageToken)
  const present = items.flatMap(({ bytes }) => bytes ?? [])
  const maxBytes = present.reduce(
    (sum, { byteLength }) => sum + fieldBytes(byteLength),
    fieldBytes(token.length),
  )
  const writer = new FieldWriter(maxBytes)
  for (const bytes of present) writer.bytes(1, bytes)
  if (token.length > 0) writer.bytes(2, token)
  return writer.finish()
}

/** A `ListItemsResponse`: a page and where it came from, an encoded `CacheStatus`. */
export function encodeList(page: Uint8Array, revision: number, cache: Uint8Array): Uint8Array {
  const writer = new FieldWriter(page.byteLength + NUMBER_BYTES + fieldBytes(cache.byteLength)).raw(page)
  if (revision !== 0) writer.number(3, revision)
  writer.bytes(4, cache)
  return writer.finish()
}

/** A message whose field 1 is an item and whose field 2 is a revision: the answers of create and update. */
export function encodeWritten(item: Uint8Array, revision: number): Uint8Array {
  return new FieldWriter(fieldBytes(item.byteLength) + NUMBER_BYTES)
    .bytes(1, item)
    .number(2, revision)
    .finish()
}
