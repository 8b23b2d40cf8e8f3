/** Field masks over Item: which fields to return, and which to change. */
import { create } from '@bufbuild/protobuf'
import { type Item, ItemSchema } from '../gen/itemcache/v1/item_cache_pb.ts'
import type { ItemDraft, Money, Rating } from '../item.ts'

/** For each named field of Item, by its proto name, the sub-fields to take; `'all'` for the whole of it. */
export type ItemMask = ReadonlyMap<string, 'all' | ReadonlySet<string>>

const SUB_FIELDS: Readonly<Record<string, readonly string[]>> = {
  price: ['currency_code', 'units', 'nanos'],
  rating: ['rate', 'count'],
}
const FIELDS: ReadonlySet<string> = new Set(ItemSchema.fields.map((field) => field.name))

/** Reads paths; `unknown` are those that name nothing. A `*` anywhere gives `undefined`: every field. */
export function parseMask(paths: readonly string[]): {
  readonly parsed: ItemMask | undefined
  readonly unknown: readonly string[]
} {
  const mask = new Map<string, 'all' | Set<string>>()
  const unknown: string[] = []
  for (const path of paths) {
    if (path === '*') continue
    const [field = '', sub, ...rest] = path.split('.')
    if (sub === undefined && FIELDS.has(field)) {
      mask.set(field, 'all')
      continue
    }
    if (
      sub === undefined ||
      rest.length > 0 ||
      !Object.hasOwn(SUB_FIELDS, field) ||
      !SUB_FIELDS[field]?.includes(sub)
    ) {
      unknown.push(path)
      continue
    }
    const subs = mask.get(field) ?? new Set()
    if (subs !== 'all') mask.set(field, subs.add(sub))
  }
  return { parsed: paths.includes('*') ? undefined : mask, unknown }
}

/** The item with the named fields only. */
export function cut(item: Item, mask: ItemMask): Item {
  const result = create(ItemSchema) as unknown as Record<string, unknown>
  const from = item as unknown as Record<string, unknown>
  for (const field of ItemSchema.fields) {
    const taken = mask.get(field.name)
    if (taken === undefined) continue
    const value = from[field.localName]
    if (taken === 'all' || value === undefined || field.fieldKind !== 'message') {
      result[field.localName] = value
      continue
    }
    const part = create(field.message) as unknown as Record<string, unknown>
    for (const sub of field.message.fields) {
      if (taken.has(sub.name)) part[sub.localName] = (value as Record<string, unknown>)[sub.localName]
    }
    result[field.localName] = part
  }
  return result as unknown as Item
}

const EMPTY: ItemDraft = {
  title: '',
  description: '',
  category: '',
  imageUri: '',
  price: undefined,
  rating: undefined,
  tags: [],
  attributes: undefined,
}
const NO_MONEY: Money = { currencyCode: '', units: 0n, nanos: 0 }
const NO_RATING: Rating = { rate: 0, count: 0n }

/** A draft into which any part of a price or rating can be merged: what is wrong then is the part's own fault. */
export const WHOLE: ItemDraft = { ...EMPTY, price: { ...NO_MONEY, currencyCode: 'XXX' }, rating: NO_RATING }

/** The fields that callers write, by their proto names. */
const WRITABLE = {
  title: 'title',
  description: 'description',
  category: 'category',
  image_uri: 'imageUri',
  price: 'price',
  rating: 'rating',
  tags: 'tags',
  attributes: 'attributes',
} as const satisfies Record<string, keyof ItemDraft>

/** Names in the mask that only the server sets, except `id`, `etag` and those that callers often send along. */
export function readOnlyFields(mask: ItemMask): readonly string[] {
  return [...mask.keys()].filter(
    (field) => !Object.hasOwn(WRITABLE, field) && field !== 'id' && field !== 'etag',
  )
}

/** The fields that are set in a draft: what an update without a mask changes. */
export function setFields(draft: ItemDraft): ItemMask {
  const mask = new Map<string, 'all'>()
  for (const [name, key] of Object.entries(WRITABLE)) {
    const value = draft[key]
    const set = Array.isArray(value) ? value.length > 0 : value !== '' && value !== undefined
    if (set) mask.set(name, 'all')
  }
  return mask
}

/** `current` with the named fields taken from `next`; `undefined` takes all of them. */
export function merge(
  current: ItemDraft | undefined,
  next: ItemDraft,
  mask: ItemMask | undefined,
): ItemDraft {
  if (mask === undefined) return next
  const base = current ?? EMPTY
  const merged: Record<string, unknown> = { ...base }
  for (const [name, key] of Object.entries(WRITABLE)) {
    const taken = mask.get(name)
    if (taken === 'all') merged[key] = next[key]
  }
  const price = mask.get('price')
  if (price !== undefined && price !== 'all') {
    const [from, into] = [next.price ?? NO_MONEY, base.price ?? NO_MONEY]
    merged['price'] = {
      currencyCode: price.has('currency_code') ? from.currencyCode : into.currencyCode,
      units: price.has('units') ? from.units : into.units,
      nanos: price.has('nanos') ? from.nanos : into.nanos,
    } satisfies Money
  }
  const rating = mask.get('rating')
  if (rating !== undefined && rating !== 'all') {
    const [from, into] = [next.rating ?? NO_RATING, base.rating ?? NO_RATING]
    merged['rating'] = {
      rate: rating.has('rate') ? from.rate : into.rate,
      count: rating.has('count') ? from.count : into.count,
    } satisfies Rating
  }
  return merged as unknown as ItemDraft
}
