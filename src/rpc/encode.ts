/**
 * Responses put together from bytes: memory holds items as encoded messages, so an answer is those bytes with a
 * small status around them, and no item is encoded twice. The field numbers are those of item_cache.proto; a
 * test decodes every form with the generated code.
 */
import { create, fromBinary, type MessageInitShape, toBinary } from '@bufbuild/protobuf'
import { BinaryWriter, WireType } from '@bufbuild/protobuf/wire'
import type { ItemCacheError } from '../errors.ts'
import {
  CacheOutcome,
  type CacheStatus,
  CacheStatusSchema,
  ItemErrorSchema,
  ItemSchema,
  SkipReason,
  StaleReason,
  Tier,
} from '../gen/itemcache/v1/item_cache_pb.ts'
import type { Page } from '../service/list.ts'
import type { Answer } from '../service/read.ts'
import type { SkipReason as DomainSkipReason, TierName } from '../tiers/tier.ts'
import { cut, type ItemMask } from './field-mask.ts'
import { codeOf, toDuration } from './status.ts'

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

/** Where an answer came from, as the message. `nowMs` is the reader's clock. */
export function cacheStatus(answer: Answer, nowMs: number): CacheStatus {
  const { copy, tier } = answer
  const init: MessageInitShape<typeof CacheStatusSchema> = {
    tier: tier === undefined ? Tier.UNSPECIFIED : TIERS[tier],
    outcome: CacheOutcome[answer.outcome],
    staleReason: StaleReason[answer.staleReason ?? 'UNSPECIFIED'],
    coalesced: answer.coalesced,
    skippedTiers: answer.skipped.map(({ tier: skipped, reason }) => ({
      tier: TIERS[skipped],
      reason: SKIP_REASONS[reason],
    })),
  }
  if (copy !== undefined) {
    init.age = toDuration(nowMs - copy.verifiedAtMs)
    if (answer.outcome !== 'STALE') init.freshFor = toDuration(copy.freshUntilMs - nowMs)
    init.asOf = BigInt(copy.asOf)
  }
  return create(CacheStatusSchema, init)
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

/** A `GetItemResponse`. */
export function encodeGetItem(result: GetItemResult, cache: CacheStatus, revision: number): Uint8Array {
  const writer = new BinaryWriter()
  if (result.kind === 'item') writer.tag(1, WireType.LengthDelimited).bytes(result.bytes)
  else if (result.kind === 'not-modified') writer.tag(2, WireType.Varint).bool(true)
  writer.tag(3, WireType.LengthDelimited).bytes(toBinary(CacheStatusSchema, cache))
  if (revision !== 0) writer.tag(4, WireType.Varint).int64(revision)
  return writer.finish()
}

/** A `StreamItemsResponse`. */
export function encodeStreamItem(
  correlationId: bigint,
  result: GetItemResult | { readonly kind: 'error'; readonly error: ItemCacheError },
  cache: CacheStatus | undefined,
  revision: number,
): Uint8Array {
  const writer = new BinaryWriter()
  if (correlationId !== 0n) writer.tag(1, WireType.Varint).uint64(correlationId)
  if (result.kind === 'item') writer.tag(2, WireType.LengthDelimited).bytes(result.bytes)
  else if (result.kind === 'not-modified') writer.tag(3, WireType.Varint).bool(true)
  else if (result.kind === 'error')
    writer.tag(4, WireType.LengthDelimited).bytes(encodeItemError(result.error))
  if (cache !== undefined) writer.tag(5, WireType.LengthDelimited).bytes(toBinary(CacheStatusSchema, cache))
  if (revision !== 0) writer.tag(6, WireType.Varint).int64(revision)
  return writer.finish()
}

/** One `BatchGetItemsResult`. */
export interface BatchResult {
  readonly id: string
  /** `undefined`: neither an item nor an error, for a miss with CACHE_ONLY. */
  readonly result: Uint8Array | ItemCacheError | undefined
  readonly cache: CacheStatus | undefined
}

/** A `BatchGetItemsResponse`. */
export function encodeBatch(results: readonly BatchResult[]): Uint8Array {
  const writer = new BinaryWriter()
  for (const { id, result, cache } of results) {
    writer.tag(1, WireType.LengthDelimited).fork()
    writer.tag(1, WireType.LengthDelimited).string(id)
    if (result instanceof Uint8Array) writer.tag(2, WireType.LengthDelimited).bytes(result)
    else if (result !== undefined) writer.tag(3, WireType.LengthDelimited).bytes(encodeItemError(result))
    if (cache !== undefined) writer.tag(4, WireType.LengthDelimited).bytes(toBinary(CacheStatusSchema, cache))
    writer.join()
  }
  return writer.finish()
}

function encodeItemError(error: ItemCacheError): Uint8Array {
  const { reason, message, retryAfterMs } = error
  const init: MessageInitShape<typeof ItemErrorSchema> = { code: codeOf(error), reason, message }
  if (retryAfterMs !== undefined) init.retryDelay = toDuration(retryAfterMs)
  return toBinary(ItemErrorSchema, create(ItemErrorSchema, init))
}

/** The part of a `ListItemsResponse` that is the same for everybody: what is cached of a page. */
export function encodePage({ items, nextPageToken }: Page): Uint8Array {
  const writer = new BinaryWriter()
  for (const { bytes } of items) {
    if (bytes !== undefined) writer.tag(1, WireType.LengthDelimited).bytes(bytes)
  }
  if (nextPageToken !== '') writer.tag(2, WireType.LengthDelimited).string(nextPageToken)
  return writer.finish()
}

/** A `ListItemsResponse`: a page and where it came from. */
export function encodeList(page: Uint8Array, revision: number, cache: CacheStatus): Uint8Array {
  const writer = new BinaryWriter().raw(page)
  if (revision !== 0) writer.tag(3, WireType.Varint).int64(revision)
  writer.tag(4, WireType.LengthDelimited).bytes(toBinary(CacheStatusSchema, cache))
  return writer.finish()
}

/** A message whose field 1 is an item and whose field 2 is a revision: the answers of create and update. */
export function encodeWritten(item: Uint8Array, revision: number): Uint8Array {
  return new BinaryWriter()
    .tag(1, WireType.LengthDelimited)
    .bytes(item)
    .tag(2, WireType.Varint)
    .int64(revision)
    .finish()
}
