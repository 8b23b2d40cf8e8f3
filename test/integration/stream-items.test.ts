/** StreamItems: many look-ups over one stream. */
import type { ServerResponse } from 'node:http'
import { create, fromBinary, type MessageInitShape, toBinary } from '@bufbuild/protobuf'
import { type ClientDuplexStream, type ServiceError, status } from '@grpc/grpc-js'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import {
  CacheOutcome,
  ItemCacheService,
  StreamItemsRequestSchema,
  type StreamItemsResponse,
  StreamItemsResponseSchema,
  Tier,
} from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { startService, type TestService } from '../support/service.ts'
import { unlessStalled } from '../support/stalls.ts'

let service: TestService

beforeAll(async () => {
  service = await startService()
})

afterAll(() => service?.[Symbol.asyncDispose]())

type LookUp = MessageInitShape<typeof StreamItemsRequestSchema>

function open(of: TestService): ClientDuplexStream<LookUp, StreamItemsResponse> {
  return of.client.raw.makeBidiStreamRequest(
    `/${ItemCacheService.typeName}/StreamItems`,
    (lookUp: LookUp) =>
      Buffer.from(toBinary(StreamItemsRequestSchema, create(StreamItemsRequestSchema, lookUp))),
    (bytes: Buffer) => fromBinary(StreamItemsResponseSchema, bytes),
  )
}

/** Sends the look-ups, ends its half of the stream, and collects what comes. */
async function lookUp(...lookUps: LookUp[]): Promise<Map<bigint, StreamItemsResponse>> {
  const call = open(service)
  for (const one of lookUps) call.write(one)
  call.end()
  const answers = new Map<bigint, StreamItemsResponse>()
  for await (const answer of call as AsyncIterable<StreamItemsResponse>) {
    expect(answers.has(answer.correlationId)).toBe(false)
    answers.set(answer.correlationId, answer)
  }
  return answers
}

describe('a stream of look-ups', () => {
  test('answers each look-up as GetItem would, and ends when the caller has ended it', async () => {
    await unlessStalled(async () => {
      const { item } = await service.client.call('getItem', { id: '1' }).then(({ result }) => ({
        item: result.case === 'item' ? result.value : undefined,
      }))
      const answers = await lookUp(
        { correlationId: 1n, id: '1' },
        { correlationId: 2n, id: '1', ifNoneMatch: item?.etag ?? '' },
        { correlationId: 3n, id: '1', readMask: { paths: ['title'] } },
        { correlationId: 4n, id: 'never-read', options: { freshness: 2 } },
      )
      expect(answers.get(1n)).toMatchObject({
        result: { case: 'item', value: item },
        cache: { tier: Tier.MEMORY, outcome: CacheOutcome.HIT },
      })
      expect(answers.get(1n)?.revision).toBe(answers.get(1n)?.cache?.asOf)
      expect(answers.get(2n)?.result).toEqual({ case: 'notModified', value: true })
      expect(answers.get(3n)?.result.value).toMatchObject({ title: item?.title, category: '' })
      expect(answers.get(4n)).toMatchObject({
        result: { case: undefined },
        cache: { outcome: CacheOutcome.MISS },
      })
    })
  })

  test('a look-up that fails says why, and the stream goes on', async () => {
    const answers = await lookUp(
      { correlationId: 1n, id: '' },
      { correlationId: 2n, id: 'no-such-item' },
      { correlationId: 3n, id: '2' },
    )
    expect(answers.get(1n)?.result.value).toMatchObject({
      code: status.INVALID_ARGUMENT,
      reason: 'INVALID_FIELD',
    })
    expect(answers.get(2n)).toMatchObject({
      result: { value: { code: status.NOT_FOUND, reason: 'ITEM_NOT_FOUND' } },
      cache: { asOf: expect.anything() },
    })
    expect(answers.get(3n)?.result).toMatchObject({ case: 'item', value: { id: '2' } })
  })

  test('is not held up by a look-up that waits for a slow tier', async () => {
    const held = Promise.withResolvers<ServerResponse>()
    await using slow = await startService({
      catalogue: {
        intercept: ({ url }, response) => {
          if (!url?.endsWith('/7')) return false
          held.resolve(response)
          return true
        },
      },
    })
    await slow.client.call('getItem', { id: '1' })
    const call = open(slow)
    const next = call[Symbol.asyncIterator]()
    call.write({ correlationId: 1n, id: '7' })
    call.write({ correlationId: 2n, id: '1' })
    expect((await next.next()).value.correlationId).toBe(2n)
    const response = await held.promise
    response.setHeader('content-type', 'application/json').end('null')
    expect((await next.next()).value).toMatchObject({ correlationId: 1n, result: { value: { code: 5 } } })
    call.end()
    expect((await next.next()).done).toBe(true)
  })

  test('thousands of look-ups are answered, whoever is slow to take the answers', async () => {
    await service.client.call('getItem', { id: '3' })
    const call = open(service)
    const n = 3_000
    for (let i = 1; i <= n; i++) call.write({ correlationId: BigInt(i), id: '3' })
    call.end()
    let answered = 0
    for await (const answer of call as AsyncIterable<StreamItemsResponse>) {
      expect(answer.result.case).toBe('item')
      if (++answered % 1000 === 0) await new Promise((resolve) => setTimeout(resolve, 20))
    }
    expect(answered).toBe(n)
  })

  test('a message that cannot be decoded ends it as INVALID_ARGUMENT', async () => {
    const identity = (value: Buffer) => value
    const path = `/${ItemCacheService.typeName}/StreamItems`
    const call = service.client.raw.makeBidiStreamRequest(path, identity, identity)
    const { promise, resolve } = Promise.withResolvers<ServiceError>()
    call.on('error', (error) => resolve(error as ServiceError)).on('data', () => {})
    call.write(Buffer.from([0x12, 0xff]))
    expect((await promise).code).toBe(status.INVALID_ARGUMENT)
  })

  test('what was taken is answered when the server drains, and the stream ends as UNAVAILABLE', async () => {
    const draining = await startService()
    await draining.client.call('getItem', { id: '1' })
    const call = open(draining)
    const next = call[Symbol.asyncIterator]()
    call.write({ correlationId: 1n, id: '1' })
    expect((await next.next()).value.correlationId).toBe(1n)
    const ended = next.next().then(
      () => undefined,
      (error: ServiceError) => error.code,
    )
    await draining[Symbol.asyncDispose]()
    expect(await ended).toBe(status.UNAVAILABLE)
  })

  test('is counted as one call', async () => {
    const started = async () => {
      const { snapshot } = await service.client.call('getMetrics', {})
      return snapshot?.rpcs.find(({ method }) => method.endsWith('/StreamItems'))
    }
    const before = await started()
    await lookUp({ correlationId: 1n, id: '1' }, { correlationId: 2n, id: '1' })
    const after = await started()
    expect(Number(after?.started)).toBe(Number(before?.started) + 1)
    expect(Number(after?.finished['OK'])).toBe(Number(before?.finished['OK']) + 1)
  })
})
