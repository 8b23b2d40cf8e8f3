/** The bridge between an item as the domain knows it and its wire form, the generated `itemcache.v1.Item`. */
import { create, fromBinary, type JsonObject as ProtobufJson, toBinary } from '@bufbuild/protobuf'
import { timestampFromMs, timestampMs } from '@bufbuild/protobuf/wkt'
import { ItemCacheError } from './errors.ts'
import { type Item, ItemSchema, ItemSource } from './gen/itemcache/v1/item_cache_pb.ts'
import { etagOf, type ItemRecord } from './item.ts'

/** The item's bytes as every tier holds them and every answer carries them. */
export function encodeItem(item: ItemRecord): Uint8Array {
  return toBinary(
    ItemSchema,
    create(ItemSchema, {
      id: item.id,
      title: item.title,
      description: item.description,
      category: item.category,
      imageUri: item.imageUri,
      ...(item.price && { price: { ...item.price } }),
      ...(item.rating && { rating: { ...item.rating } }),
      tags: [...item.tags],
      // The two types differ in `readonly` only.
      ...(item.attributes && { attributes: item.attributes as ProtobufJson }),
      etag: etagOf(item.revision),
      revision: BigInt(item.revision),
      createTime: timestampFromMs(item.createTimeMs),
      updateTime: timestampFromMs(item.updateTimeMs),
      source: item.source === 'ORIGIN' ? ItemSource.ORIGIN : ItemSource.LOCAL,
    }),
  )
}

/** Throws `internal` when the bytes are no item: they are only ever our own. */
export function decodeItem(bytes: Uint8Array): ItemRecord {
  let item: Item
  try {
    item = fromBinary(ItemSchema, bytes)
  } catch (cause) {
    throw new ItemCacheError('internal', 'a stored item could not be decoded', { cause })
  }
  return {
    id: item.id,
    title: item.title,
    description: item.description,
    category: item.category,
    imageUri: item.imageUri,
    price: item.price && {
      currencyCode: item.price.currencyCode,
      units: item.price.units,
      nanos: item.price.nanos,
    },
    rating: item.rating && { rate: item.rating.rate, count: item.rating.count },
    tags: item.tags,
    attributes: item.attributes,
    source: item.source === ItemSource.ORIGIN ? 'ORIGIN' : 'LOCAL',
    revision: Number(item.revision),
    createTimeMs: item.createTime ? timestampMs(item.createTime) : 0,
    updateTimeMs: item.updateTime ? timestampMs(item.updateTime) : 0,
  }
}
