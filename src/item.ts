/** The item as the domain knows it. The wire form is the generated `itemcache.v1.Item`; `codec.ts` is the bridge. */

/** A value that JSON can hold. */
export type Json = null | boolean | number | string | readonly Json[] | JsonObject
/** A JSON object. */
export interface JsonObject {
  readonly [key: string]: Json
}

/** An amount of money: `units` whole units and `nanos` (10^-9 units, same sign, |nanos| < 10^9). */
export interface Money {
  /** ISO 4217, three capital letters. */
  readonly currencyCode: string
  readonly units: bigint
  readonly nanos: number
}

/** What buyers think: `rate` 0 to 5, from `count` votes. */
export interface Rating {
  readonly rate: number
  readonly count: bigint
}

/** Where the item's content came from: the external catalogue, or a write through this service. */
export type ItemSource = 'ORIGIN' | 'LOCAL'

/** What a caller or the catalogue provides of an item. Empty string, `undefined` and `[]` mean "not set". */
export interface ItemDraft {
  readonly title: string
  readonly description: string
  readonly category: string
  readonly imageUri: string
  readonly price: Money | undefined
  readonly rating: Rating | undefined
  readonly tags: readonly string[]
  readonly attributes: JsonObject | undefined
}

/** An item as PostgreSQL holds it. Times are milliseconds since 1970 of the database's clock. */
export interface ItemRecord extends ItemDraft {
  readonly id: string
  readonly source: ItemSource
  /** The tenant revision of the item's last change. */
  readonly revision: number
  readonly createTimeMs: number
  readonly updateTimeMs: number
}

/** Limits of the contract, in bytes of UTF-8 unless named otherwise. */
export const LIMITS = {
  idBytes: 128,
  tagBytes: 64,
  tagsPerItem: 32,
  itemBytes: 256 * 1024,
  batchIds: 500,
  pageSize: 500,
  requestIdBytes: 128,
} as const

/** The etag of an item whose last change was `revision`; `''` for an item that never existed. */
export function etagOf(revision: number): string {
  return revision === 0 ? '' : `"${revision.toString(36)}"`
}

/** The tags whose invalidation concerns an item: its tags and, as one more tag, its category. */
export function floorTags(item: Pick<ItemDraft, 'tags' | 'category'>): readonly string[] {
  if (item.category === '' || item.tags.includes(item.category)) return item.tags
  return [...item.tags, item.category]
}

/** Of an item's fields besides its texts. */
const FIELDS_BYTES = 256
/** In front of a tag. */
const TAG_BYTES = 8

/**
 * As many bytes as an item may take when it is encoded, or more: a character is three bytes at most, and what is two
 * characters of JSON (`1,`) eleven bytes of an attribute.
 */
export function mostItemBytes({
  title,
  description,
  category,
  imageUri,
  tags,
  attributes,
}: ItemDraft): number {
  const texts = title.length + description.length + category.length + imageUri.length + LIMITS.idBytes
  const ofAttributes = attributes === undefined ? 0 : 8 * JSON.stringify(attributes).length
  return tags.reduce((sum, tag) => sum + 3 * tag.length + TAG_BYTES, FIELDS_BYTES + 3 * texts + ofAttributes)
}
