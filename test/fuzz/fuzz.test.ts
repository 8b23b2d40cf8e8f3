/**
 * Generated input for everything that reads what others have written: a fixed number of runs from a fixed seed, or, by
 * `npm run fuzz`, any seed for as long as asked.
 */
import { Writable } from 'node:stream'
import { type DescMethod, fromBinary, toBinary } from '@bufbuild/protobuf'
import { status } from '@grpc/grpc-js'
import fc, { type Arbitrary } from 'fast-check'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { decodeItem, encodeItem } from '../../src/codec.ts'
import { startCatalogue } from '../../src/embedded/catalogue.ts'
import { ItemCacheError } from '../../src/errors.ts'
import { ItemCacheService, ItemSchema } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import type { ItemDraft } from '../../src/item.ts'
import { grpcDefinition, Malformed } from '../../src/rpc/service-definition.ts'
import { checkDraft, itemDraft, Violations } from '../../src/rpc/validate.ts'
import { FakeStoreOrigin } from '../../src/tiers/origin.ts'
import { decodeCopy, encodeCopy, lockKey, redisKey } from '../../src/tiers/redis-format.ts'
import { FRAME, frame, grpcMessage, hpack, RawConnection, requestFields } from '../support/http2-frames.ts'
import { type ServiceProcess, startProcess } from '../support/process.ts'
import { seed } from '../support/seed.ts'
import { freshDatabase, redisUrl } from '../support/servers.ts'
import { failureOf } from '../support/service.ts'
import { catalogueAnswer, damaged, encoded, text } from './arbitraries.ts'

const PATIENCE = { timeout: 20_000, interval: 1 }
/** For each test; without it, each makes the runs that it names. */
const FUZZ_MS = Number(process.env['FUZZ_MS'] ?? 0)

const started = new AsyncDisposableStack()
const log: string[] = []
let service: ServiceProcess
let answer: Uint8Array = new Uint8Array()
let origin: FakeStoreOrigin

beforeAll(async () => {
  const database = started.use(await freshDatabase())
  const catalogue = started.use(await startCatalogue())
  const env = { DATABASE_URL: database.url, REDIS_URL: redisUrl(), ORIGIN_URL: catalogue.url }
  service = started.use(await startProcess({ ...env, ITEMCACHE_LOG_LEVEL: 'warn' }, { log }))
  const fuzzed = started.use(
    await startCatalogue({
      intercept: (_, response) => {
        response.writeHead(200, { 'content-type': 'application/json' }).end(answer)
        return true
      },
    }),
  )
  origin = new FakeStoreOrigin({ url: fuzzed.url, retries: 0, timeoutMs: 60_000, overallMs: 60_000 })
})
afterAll(() => started.disposeAsync())

/** A test of a property of all inputs. */
function holds<T>(
  title: string,
  runs: number,
  inputs: Arbitrary<T>,
  property: (input: T) => void | Promise<void>,
) {
  test(title, { timeout: FUZZ_MS * 2 + 120_000 }, async () => {
    let count = 0
    const counted = fc.asyncProperty(inputs, async (input) => {
      count++
      await property(input)
    })
    const much = { numRuns: 2 ** 31 - 1, interruptAfterTimeLimit: FUZZ_MS }
    await fc.assert(counted, { seed, ...(FUZZ_MS > 0 ? much : { numRuns: runs }) })
    if (FUZZ_MS > 0) console.info(`${count} inputs: ${title}`)
  })
}

const definition = grpcDefinition(ItemCacheService)
const requests: Arbitrary<readonly [DescMethod, Uint8Array]> = fc.oneof(
  ...ItemCacheService.methods.map((method) => fc.tuple(fc.constant(method), encoded(method.input))),
)

holds(
  'any bytes are a request or are malformed, and a request survives being sent on',
  1500,
  requests,
  ([method, bytes]) => {
    const decode = definition[method.name]?.requestDeserialize
    const request = decode?.(Buffer.from(bytes))
    if (request instanceof Malformed) return
    const again = toBinary(method.input, request as never)
    expect(Buffer.from(toBinary(method.input, fromBinary(method.input, again))).equals(again)).toBe(true)
  },
)

holds(
  'any item is refused by name of its fields, or is stored and read as it is',
  1000,
  encoded(ItemSchema),
  (bytes) => {
    let draft: ItemDraft
    try {
      draft = itemDraft(fromBinary(ItemSchema, bytes))
    } catch {
      return
    }
    const violations = new Violations()
    checkDraft(draft, violations)
    try {
      violations.throwIfAny()
    } catch (error) {
      expect(error).toMatchObject({ code: 'invalid', reason: 'INVALID_FIELD' })
      return
    }
    storable(draft)
  },
)

/** What was accepted can be encoded, and is the same when it is decoded. */
function storable(draft: ItemDraft): void {
  for (const part of [draft.title, draft.description, draft.category, draft.imageUri, ...draft.tags]) {
    expect(part.isWellFormed() && !part.includes('\0')).toBe(true)
  }
  const record = {
    id: '1',
    revision: 1,
    createTimeMs: 1,
    updateTimeMs: 1,
    source: 'ORIGIN',
    ...draft,
  } as const
  const bytes = encodeItem(record)
  expect(Buffer.from(encodeItem(decodeItem(bytes))).equals(bytes)).toBe(true)
}

const owned = fc.tuple(text, text).filter((names) => names.every((name) => name.isWellFormed()))
holds(
  'two items never share a key in Redis, nor one with a lock',
  1500,
  fc.tuple(owned, owned),
  ([one, other]) => {
    const same = one[0] === other[0] && one[1] === other[1]
    expect(redisKey('p', ...one) === redisKey('p', ...other)).toBe(same)
    expect(lockKey('p', ...one)).not.toBe(redisKey('p', ...other))
    // Nothing in it chooses a slot of a cluster, or ends a line.
    expect(redisKey('p', ...one)).toMatch(/^[\x21-\x7a]+$/)
  },
)

const copies = fc.record({
  id: fc.constant('1'),
  asOf: fc.maxSafeNat(),
  revision: fc.maxSafeNat(),
  tags: fc.array(
    text.filter((tag) => tag.isWellFormed()),
    { maxLength: 4 },
  ),
  bytes: fc.option(fc.uint8Array({ maxLength: 20 }), { nil: undefined }),
  verifiedAtMs: fc.integer({ min: -1e9, max: 0 }),
  freshUntilMs: fc.oneof(fc.integer({ min: 0, max: 1e9 }), fc.constant(Infinity)),
})
holds(
  'a copy in Redis is read as it was written, and not at all when it was damaged',
  1000,
  fc.tuple(copies, fc.infiniteStream(fc.nat(255))),
  ([copy, noise]) => {
    const value = encodeCopy(copy, 0, 1000)
    expect(decodeCopy('1', value, 1000, 0)).toEqual(copy)
    const [place = 0, more = 0, byte = 0] = noise.take(3)
    const at = (place * 256 + more) % value.length
    if (value[at] === byte) return
    value[at] = byte
    expect(decodeCopy('1', value, 1000, 0)).toBeUndefined()
  },
)
holds(
  'any bytes in Redis are a copy or none',
  1000,
  damaged(copies.map((copy) => new Uint8Array(encodeCopy(copy, 0, 1000)))),
  (bytes) => {
    expect(() => decodeCopy('1', Buffer.from(bytes), 1000, 0)).not.toThrow()
  },
)

holds(
  'whatever the catalogue answers is an item that can be stored, none, or ORIGIN_INVALID',
  1000,
  catalogueAnswer,
  async (body) => {
    answer = body
    try {
      const draft = await origin.fetch('1')
      if (draft !== undefined) storable(draft)
    } catch (error) {
      if (!(error instanceof ItemCacheError)) throw error
      expect(error.reason).toBe('ORIGIN_INVALID')
    }
  },
)

const TOKENS = 'tokens'
const token = fc
  .oneof(
    fc.base64String(),
    text,
    damaged(fc.constant(new Uint8Array(Buffer.from('page token')))).map((bytes) =>
      Buffer.from(bytes).toString('base64url'),
    ),
  )
  .filter((one) => one !== '')
const harm = fc.record({ at: fc.nat(200), letter: fc.constantFrom(...'AZaz09-_=+/ \u0000'), kind: fc.nat(3) })
holds(
  'a page token that was not given out for the list is INVALID_ARGUMENT',
  100,
  fc.tuple(token, harm),
  async ([forged, { at, letter, kind }]) => {
    const list = { tag: 'page', pageSize: 1 }
    const metadata = { metadata: { 'x-tenant-id': TOKENS } }
    const given = await tokenOf()
    const place = at % given.length
    const changed =
      given.slice(0, place) +
      (kind === 0 ? '' : letter + (kind === 1 ? given.slice(place) : given.slice(place + 1)))
    const other = { metadata: { 'x-tenant-id': 'somebody-else' } }
    const attempts = [
      [{ ...list, pageToken: forged }, metadata],
      ...(changed === given || changed === '' ? [] : [[{ ...list, pageToken: changed }, metadata] as const]),
      [{ ...list, pageToken: given }, other],
      [{ tag: 'other', pageToken: given }, metadata],
    ] as const
    for (const [request, options] of attempts) {
      const { code } = await service.client.failure('listItems', request, { ...options, timeoutMs: 60_000 })
      expect(code).toBe(status.INVALID_ARGUMENT)
    }
  },
)

let pageToken: Promise<string> | undefined
function tokenOf(): Promise<string> {
  pageToken ??= (async () => {
    const metadata = { metadata: { 'x-tenant-id': TOKENS } }
    for (const id of ['one', 'two']) {
      await service.client.call('createItem', { item: { id, title: id, tags: ['page'] } }, metadata)
    }
    return (await service.client.call('listItems', { tag: 'page', pageSize: 1 }, metadata)).nextPageToken
  })()
  return pageToken
}

/** What no input may lead to. */
const NEVER = [
  status.UNKNOWN,
  status.INTERNAL,
  status.UNIMPLEMENTED,
  status.DATA_LOSS,
  status.UNAUTHENTICATED,
]
/** A stream that goes on is left after this time, or at its first message. */
const LISTEN_MS = 100

holds(
  'no request makes the service fail',
  150,
  fc.tuple(fc.array(requests, { minLength: 1, maxLength: 5 })),
  async ([calls]) => {
    const codes = await Promise.all(calls.map(([method, bytes]) => codeOf(method, Buffer.from(bytes))))
    expect(codes.filter((code) => NEVER.includes(code))).toEqual([])
    expect(service.running).toBe(true)
  },
)

async function codeOf(method: DescMethod, bytes: Buffer): Promise<status> {
  const path = `/${ItemCacheService.typeName}/${method.name}`
  const asIs = (value: Buffer) => value
  const { raw } = service.client
  const { promise, resolve } = Promise.withResolvers<status>()
  if (method.methodKind === 'unary') {
    const deadline = Date.now() + 60_000
    raw.makeUnaryRequest(path, asIs, asIs, bytes, { deadline }, (error) =>
      resolve(error === null ? 0 : failureOf(error).code),
    )
    return promise
  }
  const bidi = method.methodKind === 'bidi_streaming'
  const call = bidi
    ? raw.makeBidiStreamRequest(path, asIs, asIs)
    : raw.makeServerStreamRequest(path, asIs, asIs, bytes)
  call.on('error', (error) => resolve(failureOf(error as never).code))
  call.on('status', ({ code }) => resolve(code))
  call.on('data', () => {
    if (!bidi) call.cancel()
  })
  if (call instanceof Writable) call.end(bytes)
  const leave = setTimeout(() => call.cancel(), bidi ? 60_000 : LISTEN_MS)
  return promise.finally(() => clearTimeout(leave))
}

const stream = fc.constantFrom(0, 1, 1, 1, 3, 2, 2 ** 31 - 1)
const field = fc.tuple(
  fc.oneof(fc.constantFrom('te', 'grpc-timeout', 'grpc-encoding', ':path', 'x-bin'), text),
  text,
)
const anyMessage = fc
  .tuple(requests, fc.nat(2), fc.option(fc.nat(2 ** 32 - 1)))
  .map(([[, bytes], compressed, length]) =>
    grpcMessage(bytes, length === null ? { compressed } : { compressed, length }),
  )
const fields = fc.tuple(fc.constantFrom(...ItemCacheService.methods), fc.array(field, { maxLength: 3 }))
const payload = fc.oneof(
  anyMessage,
  fields.map(([method, more]) =>
    hpack([
      ...requestFields(method.name),
      ...more.map(([name, value]) => [name, Buffer.from(value)] as const),
    ]),
  ),
  fc.uint8Array({ maxLength: 40 }),
)
const frames = fc.array(
  fc
    .tuple(
      fc.oneof(fc.constantFrom(0, 0, 1, 1, 1), fc.nat(10)),
      fc.oneof(fc.constantFrom(1, 4, 5), fc.nat(255)),
      stream,
      payload,
    )
    .map((parts) => frame(...parts)),
  { minLength: 1, maxLength: 8 },
)

holds('no frames of HTTP/2 harm the service or another caller', 100, frames, async (sent) => {
  using connection = await RawConnection.greet(service.address)
  connection.send(...sent, frame(FRAME.ping, 0, 0, Buffer.alloc(8, 7)))
  // In the midst of a header block it is no ping, and the connection ends.
  const answered = () => connection.got(FRAME.goAway).length + connection.got(FRAME.ping).length > 0
  await expect.poll(() => connection.closed || answered(), PATIENCE).toBe(true)
  expect((await service.client.call('getItem', { id: '1' }, { timeoutMs: 60_000 })).result.case).toBe('item')
  expect(service.running).toBe(true)
})

test('nothing of it was an internal error, and nothing was logged but what the service says itself', async () => {
  for (const line of log) expect(JSON.parse(line), line).not.toMatchObject({ level: 'fatal' })
  expect(log.filter((line) => line.includes('internal error'))).toEqual([])
})
