import type { IncomingMessage, ServerResponse } from 'node:http'
import { gzipSync } from 'node:zlib'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { startCatalogue } from '../../src/embedded/catalogue.ts'
import { ItemCacheError } from '../../src/errors.ts'
import { type FakeStoreOptions, FakeStoreOrigin } from '../../src/tiers/origin.ts'

type Intercept = (request: IncomingMessage, response: ServerResponse) => boolean

/** A real catalogue and an origin that pauses between attempts for no time at all, but tells how long it would. */
async function start(intercept: Intercept, options: Partial<FakeStoreOptions> = {}) {
  const catalogue = await startCatalogue({ intercept })
  const pauses: number[] = []
  const origin = new FakeStoreOrigin({
    url: catalogue.url,
    random: () => 0.5,
    sleep: async (ms) => {
      pauses.push(ms)
    },
    ...options,
  })
  return { catalogue, origin, pauses, [Symbol.asyncDispose]: () => catalogue[Symbol.asyncDispose]() }
}

function asIs(): boolean {
  return false
}

function reply(body: string | Uint8Array, status = 200, headers: Record<string, string> = {}): Intercept {
  return (_request, response) => {
    response.writeHead(status, headers).end(body)
    return true
  }
}

/** Answers the first requests as listed and the rest from the catalogue. */
function first(...faults: Intercept[]): Intercept {
  return (request, response) => faults.shift()?.(request, response) ?? false
}

const lamp = {
  id: 1,
  title: 'Lamp',
  price: 109.95,
  description: '',
  category: 'lighting',
  image: '',
  more: [1],
}

function product(fields: object): Intercept {
  return reply(JSON.stringify({ ...lamp, ...fields }))
}

async function failure(promise: Promise<unknown>): Promise<ItemCacheError> {
  const error = await promise.then(
    (value) => expect.fail(`resolved to ${JSON.stringify(value)}`),
    (reason: unknown) => reason,
  )
  expect(error).toBeInstanceOf(ItemCacheError)
  return error as ItemCacheError
}

describe('a product of the catalogue', () => {
  test('becomes an item with an exact price', async () => {
    await using it = await start(asIs)
    expect(await it.origin.fetch('10')).toEqual({
      title: 'Chef knife, 20 cm',
      description: expect.stringContaining('carbon steel'),
      category: 'kitchen',
      imageUri: 'https://catalogue.example/images/10.svg',
      price: { currencyCode: 'USD', units: 109n, nanos: 950_000_000 },
      rating: { rate: 4.7, count: 664n },
      tags: [],
      attributes: undefined,
    })
  })

  test.each([
    [0, 0n, 0],
    [22.3, 22n, 300_000_000],
    [123456789.95, 123456789n, 950_000_000],
    [0.1 + 0.2, 0n, 300_000_000],
    [0.9999999999, 1n, 0],
    [4e-9, 0n, 4],
    [1e-300, 0n, 0],
    [Number.MAX_SAFE_INTEGER, 9007199254740991n, 0],
  ])('that costs %d has no float dust in its price', async (price, units, nanos) => {
    await using it = await start(product({ price }))
    expect((await it.origin.fetch('1'))?.price).toEqual({ currencyCode: 'USD', units, nanos })
  })

  test('keeps every price of whole cents to the cent', async () => {
    let price = 0
    await using it = await start((request, response) => product({ price })(request, response))
    await fc.assert(
      fc.asyncProperty(fc.nat({ max: 100_000_000_000 }), async (cents) => {
        price = cents / 100
        const { units = 0n, nanos = 0 } = (await it.origin.fetch('1'))?.price ?? {}
        expect(units * 100n + BigInt(nanos) / 10_000_000n).toBe(BigInt(cents))
        expect(nanos % 10_000_000).toBe(0)
      }),
      { numRuns: 50 },
    )
  })

  test('may leave out everything but id, title and price', async () => {
    await using it = await start(reply('{"id":"1","title":"Lamp","price":1,"rating":null}'))
    expect(await it.origin.fetch('1')).toMatchObject({
      title: 'Lamp',
      description: '',
      category: '',
      rating: undefined,
    })
  })

  test('that the catalogue does not have is undefined, however it says so', async () => {
    await using it = await start(first(reply('null'), reply(''), reply(' \n null\n'), reply('gone', 404)))
    for (let times = 0; times < 4; times += 1) expect(await it.origin.fetch('1')).toBeUndefined()
    expect(await it.origin.fetch('999')).toBeUndefined()
    expect(it.pauses).toEqual([])
  })

  test('is never asked for by an id that is not a positive integer', async () => {
    await using it = await start(asIs)
    for (const id of [
      '0',
      '01',
      '-1',
      '1.0',
      '1e3',
      '12345678901',
      '../1',
      '1/',
      '1?',
      '@host',
      '',
      ' 1',
      '1\n',
      '١',
    ]) {
      expect(it.origin.serves(id), id).toBe(false)
      expect(await it.origin.fetch(id), id).toBeUndefined()
    }
    expect(it.catalogue.requests.size).toBe(0)
    expect(it.origin.serves('1') && it.origin.serves('9999999999')).toBe(true)
  })
})

describe('an answer that is not a product', () => {
  test.each<[string, Intercept]>([
    ['another id', product({ id: 2 })],
    ['an id that only looks alike', product({ id: [1] })],
    ['no title', product({ title: '' })],
    ['a title that is no text', product({ title: 7 })],
    ['a title that PostgreSQL cannot hold', product({ title: 'a\0b' })],
    ['a title with half a character', reply('{"id":1,"title":"\\ud800","price":1}')],
    ['a description that is no text', product({ description: {} })],
    ['a category too long to be a tag', product({ category: 'é'.repeat(33) })],
    ['more text than an item may have', product({ description: 'x'.repeat(256 * 1024) })],
    ['no price', product({ price: undefined })],
    ['a negative price', product({ price: -0.01 })],
    ['a price as text', product({ price: '9' })],
    ['an infinite price', reply('{"id":1,"title":"Lamp","price":1e999}')],
    ['a price beyond all money', product({ price: 1e300 })],
    ['a rating above five', product({ rating: { rate: 5.1, count: 1 } })],
    ['a rating by half a vote', product({ rating: { rate: 5, count: 0.5 } })],
    ['a rating that is no object', product({ rating: 5 })],
    ['a list', reply('[]')],
    ['a number', reply('1')],
    ['no JSON', reply('<html>')],
    ['no UTF-8', reply(Buffer.from('{"id":1,"title":"\xff","price":1}', 'latin1'))],
  ])('is refused once and for all: %s', async (_name, intercept) => {
    await using it = await start(intercept)
    expect(await failure(it.origin.fetch('1'))).toMatchObject({
      code: 'unavailable',
      reason: 'ORIGIN_INVALID',
      id: '1',
    })
    expect(it.catalogue.requests.get('/products/1')).toBe(1)
  })

  test('is never a crash, whatever JSON it is', async () => {
    let body = ''
    await using it = await start((request, response) => reply(body)(request, response))
    const anything = fc.oneof(
      fc.json(),
      fc.json().map((json) => `{"id":1,"title":"x","price":1,"rating":${json}}`),
    )
    await fc.assert(
      fc.asyncProperty(anything, async (json) => {
        body = json
        const outcome = await it.origin.fetch('1').catch((error: unknown) => error)
        if (outcome instanceof Error) expect(outcome).toMatchObject({ reason: 'ORIGIN_INVALID' })
      }),
      { numRuns: 100 },
    )
  })

  test('is not read beyond the limit, even when it names no length and is compressed', async () => {
    const bomb = gzipSync(Buffer.alloc(8 * 1024 * 1024, 32))
    await using it = await start(reply(bomb, 200, { 'content-encoding': 'gzip' }))
    expect(await failure(it.origin.fetch('1'))).toMatchObject({ reason: 'ORIGIN_INVALID' })

    const written = Promise.withResolvers<void>()
    await using endless = await start((_request, response) => {
      const more = (): void => {
        while (!response.destroyed && response.write(Buffer.alloc(65_536, 32)));
      }
      response.on('drain', more).on('close', written.resolve)
      more()
      return true
    })
    expect(await failure(endless.origin.fetch('1'))).toMatchObject({ reason: 'ORIGIN_INVALID' })
    await written.promise
  })
})

describe('a catalogue in trouble', () => {
  const broken: Intercept = (request) => {
    request.socket.destroy()
    return true
  }

  test.each<[string, Intercept]>([
    ['an error of the server', reply('', 500)],
    ['a connection that breaks', broken],
    ['a request to come back later', reply('', 429)],
  ])('is asked again after %s', async (_name, intercept) => {
    await using it = await start(first(intercept, intercept))
    expect(await it.origin.fetch('1')).toMatchObject({ title: 'Brass desk lamp with dimmer' })
    expect(it.catalogue.requests.get('/products/1')).toBe(3)
    expect(it.pauses).toEqual([50, 100])
  })

  test('is unavailable when it does not recover', async () => {
    await using it = await start(reply('', 503))
    expect(await failure(it.origin.fetch('1'))).toMatchObject({
      code: 'unavailable',
      reason: 'ORIGIN_STATUS',
    })
    expect(it.catalogue.requests.get('/products/1')).toBe(3)
    await it.catalogue[Symbol.asyncDispose]()
    expect(await failure(it.origin.fetch('1'))).toMatchObject({
      code: 'unavailable',
      reason: 'ORIGIN_UNREACHABLE',
    })
  })

  test('is not asked again after a refusal', async () => {
    await using it = await start(reply('', 403))
    expect(await failure(it.origin.fetch('1'))).toMatchObject({
      code: 'unavailable',
      reason: 'ORIGIN_STATUS',
    })
    expect(it.catalogue.requests.get('/products/1')).toBe(1)
  })

  test('is waited for as long as it asks, within reason', async () => {
    await using it = await start(first(reply('', 429, { 'retry-after': '2' })))
    expect(await it.origin.fetch('1')).toBeDefined()
    expect(it.pauses).toEqual([2_000])

    await using long = await start(reply('', 503, { 'retry-after': '3600' }), { overallMs: 7_200_000 })
    expect(await failure(long.origin.fetch('1'))).toMatchObject({
      reason: 'ORIGIN_STATUS',
      retryAfterMs: 3_600_000,
    })
    expect(long.pauses).toEqual([])
  })

  test('costs one attempt its timeout, whether it is silent at once or halfway', async () => {
    const halfway: Intercept = (_request, response) => {
      response.write('{"id":1,')
      return true
    }
    await using it = await start(
      first(() => true, halfway),
      { timeoutMs: 500 },
    )
    expect(await it.origin.fetch('1')).toBeDefined()
    expect(it.catalogue.requests.get('/products/1')).toBe(3)

    await using silent = await start(() => true, { timeoutMs: 20, retries: 1 })
    expect(await failure(silent.origin.fetch('1'))).toMatchObject({
      code: 'unavailable',
      reason: 'ORIGIN_TIMEOUT',
    })
    // One pause: there were two attempts, whether or not they reached a busy catalogue within their time.
    expect(silent.pauses).toHaveLength(1)
  })

  test('costs a fetch no more than its overall bound, attempts and pauses together', async () => {
    await using it = await start(() => true, { timeoutMs: 5_000, overallMs: 50 })
    expect(await failure(it.origin.fetch('1'))).toMatchObject({
      code: 'unavailable',
      reason: 'ORIGIN_TIMEOUT',
    })

    let nowMs = 0
    await using paused = await start(reply('', 500), {
      overallMs: 1_000,
      backoffMs: 1_200,
      now: () => nowMs,
      sleep: async (ms) => {
        nowMs += ms
      },
    })
    await failure(paused.origin.fetch('1'))
    // A first pause of 600 ms fits into the second, another of 1,200 ms does not.
    expect(nowMs).toBe(600)
    expect(paused.catalogue.requests.get('/products/1')).toBe(2)
  })
})

describe('a redirection', () => {
  function redirect(location: string): Intercept {
    return reply('', 302, { location })
  }

  test('is followed within the host', async () => {
    await using it = await start(first(redirect('/products/2'), reply('{"id":1,"title":"Moved","price":1}')))
    expect(await it.origin.fetch('1')).toMatchObject({ title: 'Moved' })
    expect([...it.catalogue.requests.keys()]).toEqual(['/products/1', '/products/2'])
  })

  test('is not followed elsewhere, nor round in circles', async () => {
    await using other = await startCatalogue()
    await using it = await start(first(redirect(`${other.url}/products/1`), redirect('file:///etc/passwd')))
    for (let times = 0; times < 2; times += 1) {
      expect(await failure(it.origin.fetch('1'))).toMatchObject({
        code: 'unavailable',
        reason: 'ORIGIN_REDIRECT',
      })
    }
    expect(other.requests.size).toBe(0)

    await using circle = await start(redirect('/products/1'))
    expect(await failure(circle.origin.fetch('1'))).toMatchObject({ reason: 'ORIGIN_REDIRECT' })
    expect(circle.catalogue.requests.get('/products/1')).toBe(4)
  })
})

describe('many fetches', () => {
  /** A catalogue that holds every request until it is let go. */
  function gate() {
    const held: (() => void)[] = []
    let peak = 0
    let arrived = Promise.withResolvers<void>()
    const intercept: Intercept = (request, response) => {
      held.push(() =>
        reply(JSON.stringify({ ...lamp, id: Number(request.url?.split('/')[2]) }))(request, response),
      )
      peak = Math.max(peak, held.length)
      arrived.resolve()
      arrived = Promise.withResolvers()
      return true
    }
    return {
      intercept,
      get peak() {
        return peak
      },
      async next(): Promise<void> {
        while (held.length === 0) await arrived.promise
        held.shift()?.()
      },
    }
  }

  test('reach the catalogue a few at a time, and all get their answer', async () => {
    const door = gate()
    await using it = await start(door.intercept, { maxConcurrent: 3 })
    const all = Promise.all(Array.from({ length: 12 }, (_, index) => it.origin.fetch(`${index + 1}`)))
    for (let times = 0; times < 12; times += 1) await door.next()
    expect(await all).toHaveLength(12)
    expect(door.peak).toBeLessThanOrEqual(3)
  })

  test('are refused at once when too many wait', async () => {
    const door = gate()
    await using it = await start(door.intercept, { maxConcurrent: 1, maxQueued: 1 })
    const running = it.origin.fetch('1')
    const waiting = it.origin.fetch('2')
    expect(await failure(it.origin.fetch('3'))).toMatchObject({ code: 'exhausted', reason: 'ORIGIN_BUSY' })
    await door.next()
    await door.next()
    expect(await Promise.all([running, waiting])).toMatchObject([{ title: 'Lamp' }, { title: 'Lamp' }])
    expect(it.catalogue.requests.get('/products/3')).toBeUndefined()
  })

  test('give up their place when their caller goes away', async () => {
    const door = gate()
    await using it = await start(door.intercept, { maxConcurrent: 1, maxQueued: 1 })
    const running = it.origin.fetch('1')
    const caller = new AbortController()
    const waiting = failure(it.origin.fetch('2', caller.signal))
    caller.abort()
    expect(await waiting).toMatchObject({ code: 'cancelled', id: '2' })
    const next = it.origin.fetch('3')
    await door.next()
    await door.next()
    expect(await Promise.all([running, next])).toHaveLength(2)
    expect(it.catalogue.requests.get('/products/2')).toBeUndefined()
  })
})

describe('a caller that goes away', () => {
  test('ends the request, and is told so in its own words', async () => {
    const closed = Promise.withResolvers<void>()
    const arrived = Promise.withResolvers<void>()
    await using it = await start((_request, response) => {
      response.on('close', closed.resolve)
      arrived.resolve()
      return true
    })
    const caller = new AbortController()
    const fetching = failure(it.origin.fetch('1', caller.signal))
    await arrived.promise
    const deadline = new ItemCacheError('timeout', 'the deadline has passed')
    caller.abort(deadline)
    expect(await fetching).toBe(deadline)
    await closed.promise
    expect(it.catalogue.requests.get('/products/1')).toBe(1)
  })

  test('before the fetch began causes no request', async () => {
    await using it = await start(asIs)
    expect(await failure(it.origin.fetch('1', AbortSignal.abort()))).toMatchObject({ code: 'cancelled' })
    expect(it.catalogue.requests.size).toBe(0)
  })

  test('during a pause ends it', async () => {
    const caller = new AbortController()
    const aborting: NonNullable<FakeStoreOptions['sleep']> = (_ms, signal) => {
      const { promise, reject } = Promise.withResolvers<void>()
      signal.addEventListener('abort', () => reject(signal.reason))
      caller.abort()
      return promise
    }
    await using it = await start(reply('', 500), { sleep: aborting })
    expect(await failure(it.origin.fetch('1', caller.signal))).toMatchObject({ code: 'cancelled' })
    expect(it.catalogue.requests.get('/products/1')).toBe(1)
  })
})

test('the real pause between attempts passes, and ends with the overall bound', async () => {
  await using catalogue = await startCatalogue({ intercept: first(reply('', 500)) })
  const origin = new FakeStoreOrigin({ url: catalogue.url, backoffMs: 1 })
  expect(await origin.fetch('1')).toBeDefined()

  await using hopeless = await startCatalogue({ intercept: reply('', 503, { 'retry-after': '4' }) })
  // The clock jumps back after the first look, so that only the timer can end the pause.
  const clock = [1_000_000]
  const bound = new FakeStoreOrigin({ url: hopeless.url, overallMs: 2000, now: () => clock.pop() ?? 0 })
  expect(await failure(bound.fetch('1'))).toMatchObject({ code: 'unavailable', reason: 'ORIGIN_TIMEOUT' })
  expect(hopeless.requests.get('/products/1')).toBe(1)
})

test.each(['ftp://h', 'not a url', 'http://user:pw@h', 'http://h/?q=1', ''])(
  'a catalogue address that cannot work is refused at the start: %s',
  (url) => {
    expect(() => new FakeStoreOrigin({ url })).toThrow(/^must/)
  },
)

test('a catalogue below a path is found there', async () => {
  await using it = await start(product({}))
  const origin = new FakeStoreOrigin({ url: `${it.catalogue.url}/shop/v1` })
  await origin.fetch('1')
  expect([...it.catalogue.requests.keys()]).toEqual(['/shop/v1/products/1'])
})
