import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { type AddressInfo, connect, createServer as createTcpServer, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createServer as createTlsServer } from 'node:tls'
import { Redis } from 'ioredis'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { REDIS_OFF, RedisTier, type RedisTierOptions } from '../../src/tiers/redis.ts'
import { lockKey, redisKey } from '../../src/tiers/redis-format.ts'
import { parseRedisUrl } from '../../src/tiers/redis-url.ts'
import type { Copy } from '../../src/tiers/tier.ts'
import { freshRedis, type OwnServer } from '../support/servers.ts'

function now(): number {
  return performance.now()
}

function copyOf(id: string, asOf: number, text = `item ${id}`): Copy {
  const [verifiedAtMs, freshUntilMs] = [now() - 100, now() + 60_000]
  return {
    id,
    asOf,
    bytes: new TextEncoder().encode(text),
    revision: asOf,
    tags: ['red'],
    verifiedAtMs,
    freshUntilMs,
  }
}

/** A tier that is connected, or has found that it cannot be, with the changes of state that it reported. */
async function tierAt(url: string, options: Partial<RedisTierOptions> = {}) {
  const reports: string[] = []
  let changed = Promise.withResolvers<void>()
  const tier = new RedisTier({
    url,
    prefix: 'test',
    now,
    random: () => 0.5,
    // Long enough for a busy machine: a hit must not become a miss where a test is about something else.
    commandTimeoutMs: 2_000,
    onStateChange: (state, reason) => {
      reports.push(reason === '' ? state : `${state}: ${reason}`)
      changed.resolve()
      changed = Promise.withResolvers()
    },
    ...options,
  })
  await tier.settled()
  return {
    tier,
    reports,
    async until(state: 'ready' | 'down'): Promise<void> {
      while (tier.state !== state) await changed.promise
    },
    text: async (id: string): Promise<string | undefined> => {
      const bytes = (await tier.read('t', [id])).copies.get(id)?.bytes
      return bytes === undefined ? undefined : new TextDecoder().decode(bytes)
    },
    [Symbol.asyncDispose]: () => tier[Symbol.asyncDispose](),
  }
}

/** A connection of the test's own, to do to Redis what the tier never would. */
function raw(url: string) {
  const { path, nodes } = parseRedisUrl(url)
  const client = new Redis({ ...(path === undefined ? nodes[0] : { path }) })
  return Object.assign(client, { [Symbol.dispose]: () => client.disconnect() })
}

/** Stands before a Redis on a TCP port, with TLS if there is a certificate, and notes what clients say. */
async function proxy(url: string, tls?: { readonly cert: string; readonly key: string }) {
  const { path, nodes } = parseRedisUrl(url)
  const said: string[] = []
  const sockets = new Set<Socket>()
  const forward = (client: Socket): void => {
    const server = connect(path === undefined ? { ...nodes[0], port: nodes[0]?.port ?? 0 } : { path })
    for (const socket of [client, server]) {
      sockets.add(socket)
      socket
        .on('error', () => socket.destroy())
        .on('close', () => [client, server].map((each) => each.destroy()))
    }
    client.on('data', (data) => said.push(data.toString('latin1'))).pipe(server)
    server.pipe(client)
  }
  const listener = tls === undefined ? createTcpServer(forward) : createTlsServer(tls, forward)
  const listening = Promise.withResolvers<void>()
  listener.listen(0, '127.0.0.1', listening.resolve)
  await listening.promise
  return {
    port: (listener.address() as AddressInfo).port,
    said,
    [Symbol.dispose]() {
      listener.close()
      for (const socket of sockets) socket.destroy()
    },
  }
}

describe('a lock', () => {
  const claim = (id: string, token: string) => ({ id, token })
  const takes = async ({ tier }: Awaited<ReturnType<typeof tierAt>>, id: string, token: string) =>
    (await tier.acquire('t', [claim(id, token)])).get(id)
  let redis: OwnServer
  beforeAll(async () => {
    redis = await freshRedis()
  })
  afterAll(() => redis[Symbol.asyncDispose]())

  test('belongs to one token until that gives it up, and is given to the same token again; who gets it then is told', async () => {
    await using one = await tierAt(redis.url)
    await using two = await tierAt(redis.url)
    const states = await one.tier.acquire('t', [claim('1', 'mine'), claim('2', 'mine, too')])
    expect([...states]).toEqual([
      ['1', 'ours'],
      ['2', 'ours'],
    ])
    expect(await takes(two, '1', 'yours')).toBeGreaterThan(0)
    expect(await takes(two, '1', 'yours')).toBeLessThanOrEqual(2_000)
    expect(await takes(one, '1', 'mine')).toBe('ours')
    await two.tier.release('t', claim('1', 'yours'), 0)
    expect(await takes(two, '1', 'yours')).toBeTypeOf('number')
    await one.tier.release('t', claim('1', 'mine'), 0)
    expect(await takes(two, '1', 'yours')).toBe('handed-on')
    expect(await takes(two, '1', 'yours')).toBe('ours')
    expect(await takes(one, '1', 'mine')).toBeGreaterThan(0)
    // Another tenant, another lock.
    expect((await one.tier.acquire('other', [claim('1', 'mine')])).get('1')).toBe('ours')
  })

  test('ends by itself unless its own token renews it', async () => {
    await using one = await tierAt(redis.url, { lockTtlMs: 60_000 })
    await using short = await tierAt(redis.url, { lockTtlMs: 50 })
    await takes(one, 'renewed', 'mine')
    // Whoever renews for another token changes nothing; the own token's renewal says how long from now.
    await short.tier.renew('t', [claim('renewed', 'yours')])
    expect(await takes(short, 'renewed', 'yours')).toBeGreaterThan(50_000)
    await short.tier.renew('t', [claim('renewed', 'mine')])
    expect(await takes(one, 'renewed', 'yours')).toSatisfy((state) => state === 'ours' || Number(state) <= 50)
    await expect.poll(() => takes(one, 'renewed', 'yours')).toBe('ours')
  })

  test('stays open for a while after a failure', async () => {
    await using one = await tierAt(redis.url)
    await takes(one, 'failed', 'mine')
    await one.tier.release('t', claim('failed', 'mine'), 60_000)
    expect(await takes(one, 'failed', 'yours')).toBe('free')
    expect(await takes(one, 'failed', 'theirs')).toBe('free')
  })

  test('keeps nobody waiting when it has no end, or is no lock at all, or Redis does not answer', async () => {
    await using one = await tierAt(redis.url)
    using client = raw(redis.url)
    await client.set(lockKey('test', 't', 'endless'), 'somebody')
    expect(await takes(one, 'endless', 'mine')).toBe('ours')
    await client.lpush(lockKey('test', 't', 'list'), 'x')
    expect(await takes(one, 'list', 'mine')).toBe('free')
    await redis.kill()
    expect(await takes(one, '9', 'mine')).toBe('free')
    await one.tier.renew('t', [claim('9', 'mine')])
    await one.tier.release('t', claim('9', 'mine'), 0)
  })
})

describe('while Redis runs', () => {
  let redis: OwnServer
  beforeAll(async () => {
    redis = await freshRedis()
  })
  afterAll(() => redis[Symbol.asyncDispose]())

  test('a copy that one instance stores is read by another and aged on the clock of the reader', async () => {
    await using writer = await tierAt(redis.url, { now: () => 1_000 })
    await using reader = await tierAt(redis.url, { now: () => -5_000 })
    const stored = { ...copyOf('shared', 2 ** 41 + 3), verifiedAtMs: 400, freshUntilMs: 61_000 }
    await writer.tier.store('t', [stored])
    const found = (await reader.tier.read('t', ['shared', 'unknown'])).copies
    expect([...found.keys()]).toEqual(['shared'])
    const { verifiedAtMs = 0, freshUntilMs = 0, ...rest } = found.get('shared') ?? {}
    expect(rest).toEqual({
      id: 'shared',
      asOf: 2 ** 41 + 3,
      bytes: stored.bytes,
      revision: 2 ** 41 + 3,
      tags: ['red'],
    })
    // 600 ms old and fresh for 60 s at the write; what Redis held it for comes on top.
    expect(verifiedAtMs).toBeLessThanOrEqual(-5_600)
    expect(verifiedAtMs).toBeGreaterThan(-7_600)
    expect(freshUntilMs - verifiedAtMs).toBe(60_600)
  })

  test.each([
    [1, 2],
    [255, 256],
    [2 ** 40 + 7, 2 ** 41],
    [Number.MAX_SAFE_INTEGER - 1, Number.MAX_SAFE_INTEGER],
  ])('a copy as of %d never replaces one as of %d, but the other way round it does', async (older, newer) => {
    await using it = await tierAt(redis.url)
    const id = `order-${newer}`
    await it.tier.store('t', [copyOf(id, older, 'older')])
    expect(await it.text(id)).toBe('older')
    await it.tier.store('t', [copyOf(id, newer, 'newer')])
    await it.tier.store('t', [copyOf(id, older, 'older')])
    expect(await it.text(id)).toBe('newer')
    await it.tier.store('t', [copyOf(id, newer, 'the same again')])
    expect(await it.text(id)).toBe('the same again')
  })

  test('copies expire after the TTL, a tenth earlier or later', async () => {
    for (const [random, ttlMs] of [
      [0, 270_000],
      [0.5, 300_000],
      [1, 330_000],
    ] as const) {
      await using it = await tierAt(redis.url, { random: () => random })
      await it.tier.store('t', [copyOf(`ttl-${ttlMs}`, 1)])
      const inspection = await it.tier.inspect('t', `ttl-${ttlMs}`)
      expect(inspection).toMatchObject({
        present: true,
        negative: false,
        asOf: 1,
        sizeBytes: expect.any(Number),
      })
      expect(inspection.ttlMs).toBeGreaterThan(ttlMs - 10_000)
      expect(inspection.ttlMs).toBeLessThanOrEqual(ttlMs)
      expect(inspection.ageMs).toBeGreaterThanOrEqual(100)
      expect(inspection.ageMs).toBeLessThan(10_000)
    }
  })

  test('451 items take one round trip to read and one to store, in commands of a hundred items', async () => {
    using middle = await proxy(redis.url)
    await using it = await tierAt(`redis://127.0.0.1:${middle.port}`)
    const copies = Array.from({ length: 451 }, (_, index) => copyOf(`many-${index}`, 1))
    await it.tier.store('t', copies)
    expect(it.tier.counters.roundTrips).toBe(1)
    const answer = await it.tier.read('t', ['absent', ...copies.slice(1).map(({ id }) => id)])
    expect(answer.copies.size).toBe(450)
    expect(it.tier.counters).toMatchObject({ roundTrips: 2, hits: 450, misses: 1, errors: 0, timeouts: 0 })
    const commands = middle.said.join('').match(/\r\neval(sha)?\r\n/g)
    expect(commands).toHaveLength(10)
  })

  test('a value that is damaged, of another kind or without a TTL is a miss, and the next store replaces it', async () => {
    using own = raw(redis.url)
    await using it = await tierAt(redis.url)
    const keys = ['empty', 'noise', 'future', 'list', 'persistent'].map(
      (id) => [id, redisKey('test', 't', id)] as const,
    )
    const [empty = '', noise = '', future = '', list = '', persistent = ''] = keys.map(([, key]) => key)
    await own.set(empty, '', 'EX', 60)
    await own.set(noise, 'noise that is longer than a header of forty-six bytes', 'EX', 60)
    // Claims an as-of above every possible one.
    await own.set(future, Buffer.concat([Buffer.of(1, 0), Buffer.alloc(60, 0xff)]), 'EX', 60)
    await own.rpush(list, 'a')
    await it.tier.store('t', [copyOf('persistent', 1)])
    await own.persist(persistent)
    const ids = keys.map(([id]) => id)
    expect(await it.tier.read('t', ids)).toEqual({ copies: new Map() })
    expect(it.tier.counters).toMatchObject({ corrupt: 5, misses: 5 })
    expect(await it.tier.inspect('t', 'list')).toEqual({ present: false })
    await it.tier.store(
      't',
      ids.map((id) => copyOf(id, 1)),
    )
    expect((await it.tier.read('t', ids)).copies.size).toBe(5)
  })

  test('a Redis that has forgotten the script learns it again', async () => {
    using own = raw(redis.url)
    await using it = await tierAt(redis.url)
    await it.tier.store('t', [copyOf('script', 1, 'one')])
    await own.script('FLUSH')
    await it.tier.store('t', [copyOf('script', 2, 'two')])
    expect(await it.text('script')).toBe('two')
    expect(it.tier.counters.errors).toBe(0)
  })

  test('a primary that was demoted is left, and found again as soon as it may be written', async () => {
    using own = raw(redis.url)
    await using it = await tierAt(redis.url)
    await own.replicaof('127.0.0.1', 1)
    await it.tier.store('t', [copyOf('demoted', 1)])
    await it.until('down')
    await own.replicaof('NO', 'ONE')
    await it.until('ready')
    await it.tier.store('t', [copyOf('demoted', 1)])
    expect(await it.text('demoted')).toBe('item demoted')
    expect(it.tier.counters.errors).toBe(1)
  })

  test('another tenant, prefix or database does not see a copy', async () => {
    using middle = await proxy(redis.url)
    await using it = await tierAt(`redis://127.0.0.1:${middle.port}/3`)
    await it.tier.store('t', [copyOf('mine', 1)])
    expect(await it.text('mine')).toBe('item mine')
    expect((await it.tier.read('u', ['mine'])).copies.size).toBe(0)
    await using otherPrefix = await tierAt(`redis://127.0.0.1:${middle.port}/3`, { prefix: 'test2' })
    expect(await otherPrefix.text('mine')).toBeUndefined()
    await using otherDatabase = await tierAt(`redis://127.0.0.1:${middle.port}/0`)
    expect(await otherDatabase.text('mine')).toBeUndefined()
  })

  test('ids that look like commands, patterns or separators are ids like any other', async () => {
    await using it = await tierAt(redis.url)
    const ids = [
      '*',
      '__proto__',
      'constructor',
      '{x}',
      '../..',
      'a\r\nFLUSHALL\r\n',
      '😀',
      ' ',
      ':',
      '%',
      '%3A',
    ]
    await it.tier.store(
      't',
      ids.map((id) => copyOf(id, 1)),
    )
    const { copies } = await it.tier.read('t', ids)
    expect(ids.map((id) => new TextDecoder().decode(copies.get(id)?.bytes))).toEqual(
      ids.map((id) => `item ${id}`),
    )
  })
})

describe('with a password or TLS', () => {
  test('the password of the URL opens Redis, and a wrong one is a miss that betrays nothing', async () => {
    await using redis = await freshRedis()
    using own = raw(redis.url)
    using middle = await proxy(redis.url)
    await own.config('SET', 'requirepass', 'p@ss,word')
    await using it = await tierAt(`redis://:p%40ss%2Cword@127.0.0.1:${middle.port}`)
    await it.tier.store('t', [copyOf('1', 1)])
    expect(await it.text('1')).toBe('item 1')

    await using wrong = await tierAt(`redis://:wr%40ng@127.0.0.1:${middle.port}`)
    expect(await wrong.tier.read('t', ['1'])).toEqual({ copies: new Map(), skipped: 'down' })
    expect(wrong.reports).toEqual([expect.stringMatching(/^down: (?!.*wr@ng).*WRONGPASS/)])
  })

  test('a certificate is checked against the CA of the URL unless it says not to', async () => {
    await using redis = await freshRedis()
    using middle = await proxy(redis.url, { cert: CERTIFICATE, key: KEY })
    const dir = await mkdtemp(join(tmpdir(), 'itemcache-tls-'))
    await using cleanup = new AsyncDisposableStack()
    cleanup.defer(() => rm(dir, { recursive: true }))
    const ca = join(dir, 'ca.pem')
    await writeFile(ca, CERTIFICATE)

    await using trusted = await tierAt(`rediss://localhost:${middle.port}?ca=${encodeURIComponent(ca)}`)
    await trusted.tier.store('t', [copyOf('1', 1)])
    expect(await trusted.text('1')).toBe('item 1')
    await using unknown = await tierAt(`rediss://localhost:${middle.port}`)
    expect(unknown.reports).toEqual([expect.stringMatching(/^down: .*certificate/)])
    await using careless = await tierAt(`rediss://localhost:${middle.port}?insecure=true`)
    expect(await careless.text('1')).toBe('item 1')
  })
})

describe('when Redis is in trouble', () => {
  test('a Redis that dies costs every read a quick miss, and is used again as soon as it is back', async () => {
    await using redis = await freshRedis()
    await using it = await tierAt(redis.url)
    await it.tier.store('t', [copyOf('1', 1)])
    const underWay = Promise.all(Array.from({ length: 100 }, () => it.tier.read('t', ['1'])))
    await redis.kill()
    for (const answer of await underWay) {
      if (!answer.copies.has('1')) expect(answer).toEqual({ copies: new Map(), skipped: 'down' })
    }
    await it.until('down')
    const startMs = now()
    for (let times = 0; times < 100; times += 1) {
      expect(await it.tier.read('t', ['1'])).toEqual({ copies: new Map(), skipped: 'down' })
    }
    expect(await it.tier.inspect('t', '1')).toEqual({ present: false, skipped: 'down' })
    await it.tier.store('t', [copyOf('1', 1)])
    expect(now() - startMs).toBeLessThan(10_000)

    await redis.restart()
    await it.until('ready')
    await it.tier.store('t', [copyOf('1', 2)])
    expect(await it.text('1')).toBe('item 1')
    expect(it.reports).toEqual(['ready', expect.stringMatching(/^down: ./), 'ready'])
  })

  test('a Redis that stops answering costs a read the command timeout, then nothing, until it answers', async () => {
    await using redis = await freshRedis()
    await using it = await tierAt(redis.url, { commandTimeoutMs: 200 })
    await it.tier.store('t', [copyOf('1', 1)])
    redis.pause()
    const startMs = now()
    expect(await it.tier.read('t', ['1'])).toEqual({ copies: new Map(), skipped: 'timeout' })
    expect(now() - startMs).toBeGreaterThan(190)
    expect(now() - startMs).toBeLessThan(10_000)
    const all = await it.tier.read(
      't',
      Array.from({ length: 500 }, (_, index) => `${index}`),
    )
    expect(all).toEqual({ copies: new Map(), skipped: 'timeout' })
    expect(it.tier.counters).toMatchObject({ timeouts: 2, errors: 0 })
    await it.until('down')
    expect(await it.tier.inspect('t', '1')).toEqual({ present: false, skipped: 'down' })

    redis.resume()
    await it.until('ready')
    expect(await it.text('1')).toBe('item 1')
    expect(it.reports).toEqual(['ready', expect.stringMatching(/^down: .*timeout/i), 'ready'])
  })

  test('a tier starts without Redis and connects by itself once there is one', async () => {
    await using redis = await freshRedis()
    await redis.kill()
    await using it = await tierAt(redis.url)
    expect(it.reports).toEqual([expect.stringMatching(/^down: ./)])
    expect((await it.tier.read('t', ['1'])).skipped).toBe('down')
    await redis.restart()
    await it.until('ready')
    expect(await it.tier.read('t', ['1'])).toEqual({ copies: new Map() })
  })

  test('a connection that an operator kills is replaced', async () => {
    await using redis = await freshRedis()
    using own = raw(redis.url)
    await using it = await tierAt(redis.url)
    await own.call('CLIENT', 'KILL', 'TYPE', 'normal', 'SKIPME', 'yes')
    await it.until('down')
    await it.until('ready')
    expect(await it.tier.read('t', ['1'])).toEqual({ copies: new Map() })
  })

  test('a tier is disposed of in bounded time though Redis does not answer, and answers misses after', async () => {
    await using redis = await freshRedis()
    const { tier, reports } = await tierAt(redis.url, { commandTimeoutMs: 200 })
    redis.pause()
    const startMs = now()
    await tier[Symbol.asyncDispose]()
    expect(now() - startMs).toBeLessThan(10_000)
    expect(await tier.read('t', ['1'])).toEqual({ copies: new Map(), skipped: 'down' })
    await tier.store('t', [copyOf('1', 1)])
    redis.resume()
    expect(reports).toEqual(['ready'])
  })
})

test('a tier that is off answers every read with a miss and says so', async () => {
  await REDIS_OFF.store('t', [copyOf('1', 1)])
  expect(await REDIS_OFF.read('t', ['1'])).toEqual({ copies: new Map(), skipped: 'off' })
  expect(await REDIS_OFF.inspect('t', '1')).toEqual({ present: false, skipped: 'off' })
})

// A pair for this test alone: self-signed for localhost, valid from 2020 to 2120, of no use anywhere else.
const CERTIFICATE = `-----BEGIN CERTIFICATE-----
MIIBcDCCARegAwIBAgIBATAKBggqhkjOPQQDAjAZMRcwFQYDVQQDDA5pdGVtY2Fj
aGUtdGVzdDAgFw0yMDAxMDEwMDAwMDBaGA8yMTIwMDEwMTAwMDAwMFowGTEXMBUG
A1UEAwwOaXRlbWNhY2hlLXRlc3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAARC
aZf29SL122PCIIT0Qauf+csBbqsGW5RhxpkuL3MaPo95Qp5+H7DMKcxnATSi2paz
iynx7qxyQZtInvFAfqcto04wTDAPBgNVHRMBAf8EBTADAQH/MBoGA1UdEQQTMBGC
CWxvY2FsaG9zdIcEfwAAATAdBgNVHQ4EFgQU2wJi3LblwMVU7SqWlKPNf2NikUow
CgYIKoZIzj0EAwIDRwAwRAIgM7wFGCDeiFiOSVYDkwugg4jPWU7FkzJMY4e7Yrxb
cc4CIDU4RI+KluucHbRJ9RmNJ8w5XO2fNHs06mpAtXjaqaoP
-----END CERTIFICATE-----
`
const KEY = `-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgIBccxmWSzBGpS/Nr
Jf7t1QYytEbpvqYQA6sSyTzLLkChRANCAARCaZf29SL122PCIIT0Qauf+csBbqsG
W5RhxpkuL3MaPo95Qp5+H7DMKcxnATSi2paziynx7qxyQZtInvFAfqct
-----END PRIVATE KEY-----
`
