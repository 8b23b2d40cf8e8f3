/**
 * What a team would otherwise write: GetItem and UpdateItem by a grpc-js server over PostgreSQL, without a cache, with Redis
 * beside it, or with a library that does memory and Redis. Each library is set up as its documentation recommends. One looks
 * nowhere and answers at once: no cache behind this edge can be faster. A process of its own.
 */
import { fromBinary } from '@bufbuild/protobuf'
import { BinaryWriter, WireType } from '@bufbuild/protobuf/wire'
import { Server, ServerCredentials, type ServerUnaryCall, type sendUnaryData } from '@grpc/grpc-js'
import KeyvRedis, { createClient } from '@keyv/redis'
import { BentoCache, bentostore } from 'bentocache'
import { memoryDriver } from 'bentocache/drivers/memory'
import { redisDriver } from 'bentocache/drivers/redis'
import { Cacheable, Keyv, KeyvCacheableMemory } from 'cacheable'
import { Redis } from 'ioredis'
import pg from 'pg'
import { encodeItem } from '../../src/codec.ts'
import { GetItemRequestSchema, UpdateItemRequestSchema } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import type { ItemRecord } from '../../src/item.ts'
import { answer } from '../control.ts'

export type Kind = 'an answer at once' | 'no cache' | 'Redis cache-aside' | 'bentocache' | 'cacheable'

export interface EdgeOptions {
  readonly kind: Kind
  readonly databaseUrl: string
  readonly redisSocket: string
  readonly memoryEntries: number
}

/** Rows as JSON: what services keep in Redis, and what both libraries make of an object. */
interface Row {
  readonly id: string
  readonly title: string
  readonly description: string
  readonly category: string
  readonly imageUri: string
  readonly currency: string
  readonly units: number
  readonly nanos: number
  readonly rate: number
  readonly votes: number
  readonly tags: readonly string[]
  readonly revision: number
  readonly createTimeMs: number
  readonly updateTimeMs: number
}

interface Store {
  get(id: string): Promise<Row>
  forget(id: string): Promise<unknown>
  put(row: Row): Promise<unknown>
}

const TTL_S = 3600
const SELECT = `SELECT id, title, description, category, image_uri AS "imageUri", price_currency AS currency,
    price_units::integer AS units, price_nanos AS nanos, rating_rate AS rate, rating_count::integer AS votes, tags,
    revision::float8 AS revision, extract(epoch FROM create_time)::float8 * 1000 AS "createTimeMs",
    extract(epoch FROM update_time)::float8 * 1000 AS "updateTimeMs"
  FROM items WHERE tenant = 'peer'`

let selects = 0

answer({
  listen,
  selects: () => selects,
})

async function listen({ kind, databaseUrl, redisSocket, memoryEntries }: EdgeOptions): Promise<string> {
  const pool = new pg.Pool({ connectionString: databaseUrl, max: 10 })
  const select = async (id: string): Promise<Row> => {
    selects++
    const { rows } = await pool.query({ name: 'get', text: `${SELECT} AND id = $1`, values: [id] })
    return rows[0]
  }
  if (kind === 'an answer at once') {
    const { rows } = await pool.query(`${SELECT} LIMIT 1`)
    const bytes = encoded(rows[0])
    const atOnce = async () => bytes
    return serve({ GetItem: atOnce, UpdateItem: atOnce })
  }
  const store = await newStore(kind, select, redisSocket, memoryEntries)
  if (kind !== 'no cache') {
    const { rows } = await pool.query(SELECT)
    for (let n = 0; n < rows.length; n += 500) {
      await Promise.all(rows.slice(n, n + 500).map((row: Row) => store.put(row)))
    }
  }
  const getItem = async (bytes: Buffer): Promise<Buffer> => {
    const { id } = fromBinary(GetItemRequestSchema, bytes)
    return encoded(await store.get(id))
  }
  const updateItem = async (bytes: Buffer): Promise<Buffer> => {
    const { item } = fromBinary(UpdateItemRequestSchema, bytes)
    const { id = '', title = '' } = item ?? {}
    await pool.query({
      name: 'update',
      text: `UPDATE items SET title = $2 WHERE tenant = 'peer' AND id = $1`,
      values: [id, title],
    })
    await store.forget(id)
    return encoded(await select(id))
  }
  return serve({ GetItem: getItem, UpdateItem: updateItem })
}

async function newStore(
  kind: Exclude<Kind, 'an answer at once'>,
  select: (id: string) => Promise<Row>,
  path: string,
  memoryEntries: number,
): Promise<Store> {
  if (kind === 'no cache') {
    return { get: select, forget: async () => {}, put: async () => {} }
  }
  if (kind === 'Redis cache-aside') {
    const redis = new Redis({ path })
    const key = (id: string) => `item:${id}`
    const put = (row: Row) => redis.set(key(row.id), JSON.stringify(row), 'EX', TTL_S)
    return {
      async get(id) {
        const cached = await redis.get(key(id))
        if (cached !== null) return JSON.parse(cached)
        const row = await select(id)
        await put(row)
        return row
      },
      forget: (id) => redis.del(key(id)),
      put,
    }
  }
  if (kind === 'bentocache') {
    // https://bentocache.dev/docs/quick-setup: memory, then Redis; stampede protection is always on.
    const bento = new BentoCache({
      default: 'items',
      ttl: `${TTL_S}s`,
      stores: {
        items: bentostore()
          .useL1Layer(memoryDriver({ maxItems: memoryEntries }))
          .useL2Layer(redisDriver({ connection: new Redis({ path }) as never })),
      },
    })
    return {
      get: (id) => bento.getOrSet({ key: id, factory: () => select(id) }),
      forget: (id) => bento.delete({ key: id }),
      put: (row) => bento.set({ key: row.id, value: row }),
    }
  }
  // https://cacheable.org/docs/cacheable: a primary store of bounded size, and Redis as the secondary.
  const client = createClient({ socket: { path, tls: false } })
  const cache = new Cacheable({
    primary: new Keyv({ store: new KeyvCacheableMemory({ lruSize: memoryEntries }) }),
    secondary: new Keyv({ store: new KeyvRedis(client as never) }),
    ttl: TTL_S * 1000,
  })
  return {
    async get(id) {
      const row = await cache.getOrSet<Row>(id, () => select(id))
      if (row === undefined) throw new Error('cacheable has nothing')
      return row
    },
    forget: (id) => cache.delete(id),
    put: (row) => cache.set(row.id, row),
  }
}

/** A response whose field 1 is the item. */
function encoded(row: Row): Buffer {
  const item: ItemRecord = {
    id: row.id,
    title: row.title,
    description: row.description,
    category: row.category,
    imageUri: row.imageUri,
    price: { currencyCode: row.currency, units: BigInt(row.units), nanos: row.nanos },
    rating: { rate: row.rate, count: BigInt(row.votes) },
    tags: row.tags,
    attributes: undefined,
    source: 'LOCAL',
    revision: row.revision,
    createTimeMs: Math.round(row.createTimeMs),
    updateTimeMs: Math.round(row.updateTimeMs),
  }
  return Buffer.from(new BinaryWriter().tag(1, WireType.LengthDelimited).bytes(encodeItem(item)).finish())
}

function serve(methods: Readonly<Record<string, (bytes: Buffer) => Promise<Buffer>>>): Promise<string> {
  const identity = (bytes: Buffer) => bytes
  const server = new Server()
  for (const [name, method] of Object.entries(methods)) {
    server.addService(
      {
        [name]: {
          path: `/itemcache.v1.ItemCacheService/${name}`,
          requestStream: false,
          responseStream: false,
          requestSerialize: identity,
          requestDeserialize: identity,
          responseSerialize: identity,
          responseDeserialize: identity,
        },
      },
      {
        [name]: (call: ServerUnaryCall<Buffer, Buffer>, callback: sendUnaryData<Buffer>) => {
          method(call.request).then(
            (bytes) => callback(null, bytes),
            (error) => callback(error),
          )
        },
      },
    )
  }
  const { promise, resolve, reject } = Promise.withResolvers<string>()
  server.bindAsync('127.0.0.1:0', ServerCredentials.createInsecure(), (error, port) =>
    error === null ? resolve(`127.0.0.1:${port}`) : reject(error),
  )
  return promise
}
