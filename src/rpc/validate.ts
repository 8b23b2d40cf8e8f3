/** Requests in, domain values out. All broken rules of a request are reported together. */
import type { Duration, FieldMask } from '@bufbuild/protobuf/wkt'
import { ItemCacheError, type Violation } from '../errors.ts'
import {
  Freshness,
  type Item,
  type ReadOptions as ReadOptionsMessage,
} from '../gen/itemcache/v1/item_cache_pb.ts'
import { type ItemDraft, type Json, LIMITS, type Money } from '../item.ts'
import { DEFAULT_READ, type ReadOptions } from '../service/read.ts'
import { type ItemMask, parseMask } from './field-mask.ts'

/** Collects what is wrong with one request. */
export class Violations {
  readonly #found: Violation[] = []

  add(field: string, description: string): void {
    this.#found.push({ field, description })
  }

  /** Adds a violation unless `holds`. */
  check(holds: boolean, field: string, description: string): void {
    if (!holds) this.add(field, description)
  }

  /** Throws `invalid` when something was found. */
  throwIfAny(): void {
    if (this.#found.length === 0) return
    const [first] = this.#found
    const more = this.#found.length > 1 ? ` (and ${this.#found.length - 1} more)` : ''
    throw new ItemCacheError('invalid', `${first?.field}: ${first?.description}${more}`, {
      reason: 'INVALID_FIELD',
      violations: this.#found,
    })
  }
}

// biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is looked for
const CONTROL = /[\u0000-\u001f\u007f-\u009f]/

/** Whether `text` has 1 to `maxBytes` bytes and no control characters. */
function isName(text: string, maxBytes: number): boolean {
  // A character has at most three bytes for each UTF-16 unit, so short ASCII needs no counting.
  if (text.length === 0 || text.length > maxBytes) return false
  if (text.length * 3 > maxBytes && Buffer.byteLength(text) > maxBytes) return false
  return !CONTROL.test(text) && text.isWellFormed()
}

const nameRule = (maxBytes: number) => `must be 1 to ${maxBytes} bytes without control characters`

export function checkId(id: string, field: string, violations: Violations): void {
  if (!isName(id, LIMITS.idBytes)) violations.add(field, nameRule(LIMITS.idBytes))
}

/** Ids of one request. */
export function checkIds(ids: readonly string[], field: string, violations: Violations): void {
  checkListSize(ids.length, [1, LIMITS.batchIds], field, violations)
  for (let i = 0; i < ids.length && i < LIMITS.batchIds; i++) {
    if (!isName(ids[i] ?? '', LIMITS.idBytes)) violations.add(`${field}[${i}]`, nameRule(LIMITS.idBytes))
  }
}

/** A tag or category that is set. */
export function checkTag(tag: string, field: string, violations: Violations): void {
  violations.check(isName(tag, LIMITS.tagBytes), field, nameRule(LIMITS.tagBytes))
}

/** A request id, client id or the like; empty is allowed. */
export function checkOptionalName(
  text: string,
  field: string,
  maxBytes: number,
  violations: Violations,
): void {
  if (text !== '') violations.check(isName(text, maxBytes), field, nameRule(maxBytes))
}

export function checkListSize(
  size: number,
  [least, most]: readonly [number, number],
  field: string,
  violations: Violations,
): void {
  violations.check(size >= least && size <= most, field, `must have ${least} to ${most} entries, got ${size}`)
}

/** A duration in milliseconds; violations for one out of the message's own range. */
export function durationMs(duration: Duration, field: string, violations: Violations): number {
  const seconds = Number(duration.seconds)
  const sane = Math.abs(seconds) <= 315_576_000_000 && Math.abs(duration.nanos) < 1e9
  violations.check(sane, field, 'is not a valid duration')
  return seconds * 1000 + duration.nanos / 1e6
}

/** Options of a read with all defaults filled in. */
export function readOptions(message: ReadOptionsMessage | undefined, violations: Violations): ReadOptions {
  if (message === undefined) return DEFAULT_READ
  const { freshness, minRevision, maxStaleness, allowStale } = message
  violations.check(freshness in FRESHNESS, 'options.freshness', `has the unknown value ${freshness}`)
  violations.check(minRevision >= 0n, 'options.min_revision', `must not be negative, got ${minRevision}`)
  const maxStalenessMs =
    maxStaleness === undefined
      ? DEFAULT_READ.maxStalenessMs
      : durationMs(maxStaleness, 'options.max_staleness', violations)
  violations.check(maxStalenessMs >= 0, 'options.max_staleness', 'must not be negative')
  return {
    freshness: FRESHNESS[freshness] ?? 'DEFAULT',
    minRevision: toRevision(minRevision),
    maxStalenessMs,
    allowStale: allowStale ?? DEFAULT_READ.allowStale,
  }
}

/** A revision that a caller has sent. What no revision can be is ahead of every log, and so is the greatest one. */
export const toRevision = (revision: bigint): number => Math.min(Number(revision), Number.MAX_SAFE_INTEGER)

const FRESHNESS: Readonly<Record<Freshness, ReadOptions['freshness']>> = {
  [Freshness.UNSPECIFIED]: 'DEFAULT',
  [Freshness.DEFAULT]: 'DEFAULT',
  [Freshness.CACHE_ONLY]: 'CACHE_ONLY',
  [Freshness.FRESH]: 'FRESH',
}

/** A mask over the fields of Item; `undefined` for all of them. */
export function itemMask(
  mask: FieldMask | undefined,
  field: string,
  violations: Violations,
): ItemMask | undefined {
  if (mask === undefined || mask.paths.length === 0) return undefined
  violations.check(mask.paths.length <= 64, field, 'must have at most 64 paths')
  const { parsed, unknown } = parseMask(mask.paths.slice(0, 64))
  for (const path of unknown)
    violations.add(field, `names no field of Item: ${JSON.stringify(path.slice(0, 64))}`)
  return parsed
}

/** The content of an item that a caller wants written, not checked yet; duplicate tags are dropped. */
export function itemDraft(item: Item): ItemDraft {
  const { title, description, category, imageUri, price, rating, attributes } = item
  return {
    title,
    description,
    category,
    imageUri,
    price: price && { currencyCode: price.currencyCode, units: price.units, nanos: price.nanos },
    rating: rating && { rate: rating.rate, count: rating.count },
    tags: [...new Set(item.tags)],
    attributes,
  }
}

/** The rules for an item's content: also for what a merge of two valid ones gives. */
export function checkDraft(draft: ItemDraft, violations: Violations): void {
  const { title, description, category, imageUri, price, rating, tags, attributes } = draft
  violations.check(!title.includes('\0'), 'item.title', NO_NUL)
  violations.check(!description.includes('\0'), 'item.description', NO_NUL)
  violations.check(!imageUri.includes('\0'), 'item.image_uri', NO_NUL)
  if (category !== '') checkTag(category, 'item.category', violations)
  violations.check(
    tags.length <= LIMITS.tagsPerItem,
    'item.tags',
    `must have at most ${LIMITS.tagsPerItem} entries, got ${tags.length}`,
  )
  for (const [i, tag] of tags.slice(0, LIMITS.tagsPerItem).entries()) {
    checkTag(tag, `item.tags[${i}]`, violations)
  }
  if (price !== undefined) checkMoney(price, violations)
  if (rating !== undefined) {
    const { rate, count } = rating
    violations.check(rate >= 0 && rate <= 5, 'item.rating.rate', `must be 0 to 5, got ${rate}`)
    violations.check(count >= 0n, 'item.rating.count', 'must not be negative')
  }
  if (attributes !== undefined) checkJson(attributes, 'item.attributes', violations)
}

const NO_NUL = 'must not contain a NUL character'

function checkMoney({ currencyCode, units, nanos }: Money, violations: Violations): void {
  violations.check(
    /^[A-Z]{3}$/.test(currencyCode),
    'item.price.currency_code',
    'must be three capital letters (ISO 4217)',
  )
  violations.check(Math.abs(nanos) < 1e9, 'item.price.nanos', 'must be -999999999 to 999999999')
  violations.check(
    units === 0n || nanos === 0 || units > 0n === nanos > 0,
    'item.price.nanos',
    'must have the sign of units',
  )
}

const MAX_JSON_DEPTH = 32

/** What PostgreSQL's jsonb and JSON itself can hold. */
function checkJson(value: Json | undefined, field: string, violations: Violations, depth = 0): void {
  if (depth > MAX_JSON_DEPTH) {
    violations.add(field, `must be at most ${MAX_JSON_DEPTH} levels deep`)
  } else if (typeof value === 'string') {
    violations.check(!value.includes('\0'), field, NO_NUL)
  } else if (typeof value === 'number') {
    violations.check(Number.isFinite(value), field, `must be a finite number, got ${value}`)
  } else if (Array.isArray(value)) {
    for (const one of value as readonly Json[]) checkJson(one, field, violations, depth + 1)
  } else if (value !== null && typeof value === 'object') {
    for (const [key, one] of Object.entries(value)) {
      violations.check(!key.includes('\0'), field, 'must not have a key with a NUL character')
      checkJson(one, field, violations, depth + 1)
    }
  }
}
