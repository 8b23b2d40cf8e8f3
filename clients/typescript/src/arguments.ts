/** What the command line's words mean. Everything here throws InvalidArgumentError of commander: exit code 2. */
import { fromJson, type JsonObject } from '@bufbuild/protobuf'
import { InvalidArgumentError } from 'commander'
import type { ItemInit } from './client.ts'
import { ItemSchema } from './gen/itemcache/v1/item_cache_pb.ts'
import { parseMoney } from './money.ts'

const UNITS_MS: Readonly<Record<string, number>> = { ms: 1, s: 1000, m: 60_000, h: 3_600_000 }

/** `150ms`, `5s`, `2m`, `1h` in milliseconds. */
export function parseDuration(text: string): number {
  const [, number, unit = ''] = /^(\d+(?:\.\d+)?)(ms|s|m|h)$/.exec(text) ?? []
  const factor = UNITS_MS[unit]
  if (factor === undefined) throw new InvalidArgumentError('A duration looks like 150ms, 5s, 2m or 1h.')
  return Number(number) * factor
}

/** A duration of at least 1 ms. */
export function parseTimeout(text: string): number {
  const ms = parseDuration(text)
  if (ms < 1) throw new InvalidArgumentError('It must be at least 1ms.')
  return ms
}

/** A whole number from 0 to 2^63 - 1. */
export function parseRevision(text: string): bigint {
  const revision = /^\d{1,19}$/.test(text) ? BigInt(text) : -1n
  if (revision < 0n || revision >= 1n << 63n) throw new InvalidArgumentError('A revision is a whole number.')
  return revision
}

/** A whole number within bounds. */
export function parseWhole(min: number, max = Number.MAX_SAFE_INTEGER): (text: string) => number {
  return (text) => {
    const whole = /^\d{1,15}$/.test(text) ? Number(text) : -1
    if (whole >= min && whole <= max) return whole
    const range = max === Number.MAX_SAFE_INTEGER ? `at least ${min}` : `${min} to ${max}`
    throw new InvalidArgumentError(`It must be ${range}.`)
  }
}

/** A duration within bounds in milliseconds. */
export function parseSpan(minMs: number, maxMs: number): (text: string) => number {
  return (text) => {
    const ms = parseDuration(text)
    if (ms >= minMs && ms <= maxMs) return ms
    throw new InvalidArgumentError(`It must be ${shown(minMs)} to ${shown(maxMs)}.`)
  }
}

/** As `parseDuration` reads it. */
function shown(ms: number): string {
  const [unit = 'ms', factor = 1] =
    Object.entries(UNITS_MS).findLast(([, factor]) => ms >= factor && ms % factor === 0) ?? []
  return `${ms / factor}${unit}`
}

/** Ids, one per line; empty lines are none. */
export function parseIds(text: string): string[] {
  return text.split(/\r?\n/).filter((line) => line !== '')
}

/** `title,price` as `['title', 'price']`. */
export function parseFields(text: string): string[] {
  const fields = text.split(',').map((field) => field.trim())
  if (fields.includes('')) throw new InvalidArgumentError('Fields look like title,price.')
  return fields
}

/** For options that may come several times. */
export function append(text: string, before: readonly string[] = []): string[] {
  return [...before, text]
}

/** `19.99 USD`. */
export function parsePrice(text: string): ReturnType<typeof parseMoney> {
  try {
    return parseMoney(text)
  } catch {
    throw new InvalidArgumentError('An amount looks like "19.99 USD".')
  }
}

/** A JSON object. */
export function parseAttributes(text: string): JsonObject {
  return parseObject(text, 'It')
}

/** `what`: how messages call it. */
function parseObject(text: string, what: string): JsonObject {
  const value = parseJson(text, what)
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw new InvalidArgumentError(`${what} must be a JSON object.`)
  }
  return value as JsonObject
}

function parseJson(text: string, what: string): unknown {
  try {
    return JSON.parse(text)
  } catch (cause) {
    throw new InvalidArgumentError(`${what} must be JSON: ${(cause as Error).message}.`)
  }
}

/** The flags that describe an item. */
export interface ItemFlags {
  readonly title?: string
  readonly description?: string
  readonly category?: string
  readonly price?: ReturnType<typeof parseMoney>
  readonly tag?: readonly string[]
  readonly image?: string
  readonly attributes?: JsonObject
  readonly clear?: readonly string[]
}

/** The fields of an item that callers may write, by their names in JSON. */
const WRITABLE = {
  title: 'title',
  description: 'description',
  category: 'category',
  imageUri: 'image_uri',
  price: 'price',
  rating: 'rating',
  tags: 'tags',
  attributes: 'attributes',
} as const

/** Names for `--clear`. */
export const CLEARABLE: readonly string[] = [...Object.values(WRITABLE), 'image']

/**
 * The item that flags and JSON describe, and which of its fields they name. Flags win over the JSON. Of the JSON's
 * fields, those that only the service sets are left alone; its etag is kept.
 */
export function describeItem(
  id: string | undefined,
  flags: ItemFlags,
  json?: string,
): { readonly item: ItemInit; readonly fields: readonly string[] } {
  const given = json === undefined ? {} : parseObject(json, 'The item')
  const fields = new Set<string>()
  for (const [jsonName, name] of Object.entries(WRITABLE)) {
    if (jsonName in given || name in given) fields.add(name)
  }
  const item = itemOf(given)
  if (id === undefined && item.id === '') {
    throw new InvalidArgumentError('The item has no id: name one, or put it into the JSON.')
  }
  if (id !== undefined && item.id !== '' && item.id !== id) {
    throw new InvalidArgumentError(
      `The JSON is about item ${JSON.stringify(item.id)}, not ${JSON.stringify(id)}.`,
    )
  }
  item.id = id ?? item.id
  for (const name of flags.clear ?? []) fields.add(name === 'image' ? 'image_uri' : name)
  const set = <T>(name: string, value: T | undefined, assign: (value: T) => void) => {
    if (value === undefined) return
    assign(value)
    fields.add(name)
  }
  set('title', flags.title, (title) => (item.title = title))
  set('description', flags.description, (description) => (item.description = description))
  set('category', flags.category, (category) => (item.category = category))
  set('price', flags.price, (price) => (item.price = price))
  set('tags', flags.tag, (tags) => (item.tags = [...tags]))
  set('image_uri', flags.image, (uri) => (item.imageUri = uri))
  set('attributes', flags.attributes, (attributes) => (item.attributes = attributes))
  return { item, fields: [...fields] }
}

function itemOf(json: JsonObject) {
  try {
    return fromJson(ItemSchema, json)
  } catch (cause) {
    throw new InvalidArgumentError(`The JSON is not an item: ${(cause as Error).message}.`)
  }
}
