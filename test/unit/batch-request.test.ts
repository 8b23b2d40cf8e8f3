import { create, fromBinary, toBinary } from '@bufbuild/protobuf'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import {
  type BatchGetItemsRequest,
  BatchGetItemsRequestSchema,
  Freshness,
} from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { LIMITS } from '../../src/item.ts'
import { BatchRequest } from '../../src/rpc/batch-request.ts'
import { Malformed } from '../../src/rpc/service-definition.ts'
import { checkIds, Violations } from '../../src/rpc/validate.ts'

function decode(bytes: Uint8Array): BatchGetItemsRequest | Malformed {
  try {
    return fromBinary(BatchGetItemsRequestSchema, bytes, { readUnknownFields: false })
  } catch (error) {
    return new Malformed(error)
  }
}

const encoded = (init: Parameters<typeof create<typeof BatchGetItemsRequestSchema>>[1]) =>
  Buffer.from(toBinary(BatchGetItemsRequestSchema, create(BatchGetItemsRequestSchema, init)))

/** The ids as strings, or `undefined` when the request is none that is used as it came. */
function asciiIdsOf(message: Buffer): readonly string[] | undefined {
  const ids = new BatchRequest(message, decode).asciiIds()
  return (
    ids &&
    Array.from({ length: ids.length }, (_, n) =>
      Buffer.from(ids.bytes.subarray(ids.bounds[2 * n], ids.bounds[2 * n + 1])).toString(),
    )
  )
}

/** Whatever is used as it came is a valid request that says exactly this, by the generated code and the rules for ids. */
function agrees(message: Buffer): boolean {
  const ids = asciiIdsOf(message)
  if (ids === undefined) return false
  expect(decode(message)).toEqual(create(BatchGetItemsRequestSchema, { ids: [...ids] }))
  const violations = new Violations()
  checkIds(ids, 'ids', violations)
  violations.throwIfAny()
  return true
}

const printable = fc.string({ unit: 'grapheme-ascii', minLength: 1, maxLength: 127 })

describe('a batch whose ids are used where they lie', () => {
  test('has the ids that the generated code decodes', () => {
    fc.assert(
      fc.property(fc.array(printable, { minLength: 1, maxLength: 20 }), (ids) => {
        expect(asciiIdsOf(encoded({ ids }))).toEqual(ids)
      }),
    )
    const most = Array.from({ length: LIMITS.batchIds }, (_, n) => `id-${n}`)
    expect(asciiIdsOf(encoded({ ids: most }))).toEqual(most)
  })

  test('is never one that the generated code refuses, or reads in another way, whatever its bytes are', () => {
    let used = 0
    // Bytes of whole requests with some of them changed, cut off or added: more of them are nearly right.
    const damaged = fc
      .tuple(
        fc.array(fc.string({ unit: 'binary', maxLength: 6 }), { maxLength: 4 }),
        fc.array(fc.tuple(fc.nat(40), fc.nat(255)), { maxLength: 2 }),
        fc.nat(40),
        fc.uint8Array({ maxLength: 3 }),
      )
      .map(([ids, changes, end, more]) => {
        const bytes = encoded({ ids }).subarray(0, end)
        for (const [at, byte] of changes) if (at < bytes.byteLength) bytes[at] = byte
        return Buffer.concat([bytes, more])
      })
    const wellMade = fc.array(printable, { maxLength: 4 }).map((ids) => encoded({ ids }))
    const any = fc.uint8Array({ maxLength: 24 }).map((bytes) => Buffer.from(bytes))
    fc.assert(
      fc.property(fc.oneof(damaged, wellMade, any), (message) => {
        if (agrees(message)) used++
      }),
      { numRuns: 5000 },
    )
    expect(used).toBeGreaterThan(500)
  })

  test.each([
    ['nothing', {}],
    ['an empty id', { ids: ['a', ''] }],
    ['a control character', { ids: ['a\n'] }],
    ['a DEL', { ids: ['a\u007f'] }],
    ['a character that is not ASCII', { ids: ['a', 'é'] }],
    ['an id of 128 bytes', { ids: ['a'.repeat(128)] }],
    ['one id too many', { ids: Array.from({ length: LIMITS.batchIds + 1 }, () => 'a') }],
    ['options', { ids: ['a'], options: { freshness: Freshness.FRESH } }],
    ['a mask', { ids: ['a'], readMask: { paths: ['title'] } }],
  ])('has none of what must be decoded: %s', (_, init) => {
    expect(asciiIdsOf(encoded(init))).toBeUndefined()
  })

  test('is not one with invalid UTF-8, a wrong wire type, or an id that is cut off', () => {
    for (const bytes of [
      [0x0a, 1, 0xff],
      [0x0a, 2, 0xc3, 0x28],
      [0x08, 1],
      [0x0a, 3, 0x61],
      [0x0a],
      [0x0a, 1, 0x61, 0x0a],
    ]) {
      const message = Buffer.from(bytes)
      expect(asciiIdsOf(message)).toBeUndefined()
      expect(new BatchRequest(message, decode).decoded()).toBeInstanceOf(Malformed)
    }
  })
})
