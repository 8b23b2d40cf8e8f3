/** A service whose memory holds items of 320 bytes, and calls that ask for them. */
import { create, toBinary } from '@bufbuild/protobuf'
import { Client, credentials } from '@grpc/grpc-js'
import {
  BatchGetItemsRequestSchema,
  GetItemRequestSchema,
  ItemCacheService,
} from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { type Bed, fillItems, type Instance, startBed } from '../bed.ts'
import { SERVER_CORE } from '../control.ts'
import type { Target } from './unary.ts'

export const ITEM_BYTES = 320
const TENANT = 'default'

/** Copies stay fresh, and in memory, for as long as a run takes. */
export const LASTING = {
  ITEMCACHE_FRESH_FOR: '12h',
  ITEMCACHE_MAX_STALE: '24h',
  ITEMCACHE_REDIS_TTL: '24h',
  ITEMCACHE_MEMORY_MAX_BYTES: '4GiB',
  ITEMCACHE_MEMORY_MAX_ENTRIES: '1100000',
}

export interface Hot extends AsyncDisposable {
  readonly bed: Bed
  readonly instance: Instance
}

/** A service on the server's core, and `items` items in PostgreSQL of which memory holds none yet. */
export async function startHot(
  items: number,
  options: {
    readonly env?: Readonly<Record<string, string>>
    readonly execArgv?: readonly string[]
  } = {},
): Promise<Hot> {
  await using started = new AsyncDisposableStack()
  const bed = started.use(await startBed())
  const instance = await bed.instance(
    { ...LASTING, ...options.env },
    { core: SERVER_CORE, execArgv: options.execArgv ?? [] },
  )
  // The instance has made the tables.
  const sql = await bed.sql()
  await fillItems(sql, TENANT, items, ITEM_BYTES)
  const running = started.move()
  return { bed, instance, [Symbol.asyncDispose]: () => running.disposeAsync() }
}

export const idOf = (n: number): string => `k${1 + n}`

/** Reads items until memory holds them. */
export async function warm(instance: Instance, from: number, to: number): Promise<void> {
  const BATCH = 500
  for (let n = from; n < to; n += BATCH) {
    await instance.batchGet(
      Array.from({ length: Math.min(BATCH, to - n) }, (_, i) => idOf(n + i)),
      TENANT,
    )
  }
}

export function getItemRequest(n: number): Uint8Array {
  return toBinary(GetItemRequestSchema, create(GetItemRequestSchema, { id: idOf(n) }))
}

export function batchRequest(from: number, amount: number): Uint8Array {
  const ids = Array.from({ length: amount }, (_, n) => idOf(from + n))
  return toBinary(BatchGetItemsRequestSchema, create(BatchGetItemsRequestSchema, { ids }))
}

/** A call's target, and its answer as the service gives it now. */
export async function targetOf(
  instance: Instance,
  method: 'getItem' | 'batchGetItems',
  request: Uint8Array,
): Promise<Target & { readonly answer: Buffer }> {
  const path = `/${ItemCacheService.typeName}/${ItemCacheService.method[method].name}`
  const answer = await answerOf(instance.address, path, request)
  return {
    address: instance.address,
    path,
    request,
    answer,
    answerBytes: answer.byteLength,
    cpuUs: instance.cpuUs,
  }
}

async function answerOf(address: string, path: string, request: Uint8Array): Promise<Buffer> {
  const client = new Client(address, credentials.createInsecure())
  const identity = (bytes: Buffer) => bytes
  const { promise, resolve, reject } = Promise.withResolvers<Buffer>()
  client.makeUnaryRequest(path, identity, identity, Buffer.from(request), (error, bytes) =>
    error === null && bytes !== undefined ? resolve(bytes) : reject(error),
  )
  try {
    return await promise
  } finally {
    client.close()
  }
}
