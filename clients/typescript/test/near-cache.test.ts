/** The near cache and the watch of the client, against real services. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { makeRunDirectory } from '../../../test/support/run-directory.ts'
import { freshDatabase } from '../../../test/support/servers.ts'
import { startService, type TestService } from '../../../test/support/service.ts'
import {
  CacheOutcome,
  type Client,
  type ConnectOptions,
  connect,
  type GetOptions,
  type GetResult,
  InvalidArgumentError,
  NotFoundError,
  OutOfRangeError,
  StaleReason,
  type WatchMessage,
} from '../src/index.ts'
import { run } from './near-cache-run.ts'
import { startScriptedServer } from './scripted-server.ts'

let service: TestService
let tenants = 0

beforeAll(async () => {
  service = await startService()
})
afterAll(async () => {
  await service?.[Symbol.asyncDispose]()
})

const open = (options: ConnectOptions = {}, target = service.address): Client =>
  connect(target, { timeoutMs: 10_000, tenant: `near-${tenants}`, ...options })
/** Whether a reconnection is under way decides. */
const AWAY = expect.stringMatching(/^(UNAVAILABLE|DEADLINE_EXCEEDED)$/)
const NEAR = { nearCache: { maxEntries: 100 } }

const PATIENT = { timeout: 20_000 }

async function isCurrent(client: Client): Promise<void> {
  await expect.poll(() => client.nearStats()?.state, PATIENT).toBe('current')
}

/** Reads until the near cache answers: on a machine that stalls, the log may not have been heard of for a while. */
async function getNear(client: Client, id: string, options: GetOptions = {}): Promise<GetResult> {
  let answer = await client.get(id, options)
  await expect
    .poll(async () => {
      answer = await client.get(id, options)
      return answer.near
    }, PATIENT)
    .toBe(true)
  return answer
}

describe('a client with a near cache', () => {
  test('asks for an item once, and answers from its own memory until somebody changes it', async () => {
    tenants++
    await using writer = open()
    await using client = open(NEAR)
    const { revision } = await writer.create({ id: 'a', title: 'one', tags: ['t'] })
    await isCurrent(client)
    expect((await client.get('a', { minRevision: revision })).near).toBe(false)
    const again = await getNear(client, 'a')
    expect(again).toMatchObject({ item: { title: 'one' }, cache: { outcome: CacheOutcome.HIT } })
    expect(again.revision).toBeGreaterThanOrEqual(revision)

    await writer.update({ id: 'a', title: 'two' })
    await expect.poll(async () => (await client.get('a')).item?.title, PATIENT).toBe('two')
    await getNear(client, 'a')
    const { revision: invalidated } = await writer.invalidate({ tags: ['t'] })
    await expect.poll(() => client.nearStats()?.position, PATIENT).toBeGreaterThanOrEqual(invalidated)
    expect((await client.get('a')).near).toBe(false)
    await expect
      .poll(() => client.nearStats(), PATIENT)
      .toMatchObject({ state: 'current', entries: 1, connected: true, error: undefined })
  })

  test('reads what it has written itself at once', async () => {
    tenants++
    await using client = open(NEAR)
    await client.create({ id: 'a', title: '0' })
    await isCurrent(client)
    for (let i = 1; i <= 20; i++) {
      await client.get('a')
      await client.update({ id: 'a', title: `${i}` })
      expect((await client.get('a')).item?.title).toBe(`${i}`)
    }
    await client.invalidate({ ids: ['a'] })
    expect((await client.get('a')).near).toBe(false)
    await client.delete('a')
    await expect(client.get('a')).rejects.toBeInstanceOf(NotFoundError)
    await client.create({ id: 'a', title: 'again' })
    expect((await client.get('a')).item?.title).toBe('again')
  })

  test('knows of an absent item, too, and of many at once', async () => {
    tenants++
    await using writer = open()
    await using client = open(NEAR)
    await writer.create({ id: 'a', title: 'a' })
    await isCurrent(client)
    const ids = ['a', 'none']
    await expect
      .poll(async () => [...(await client.getMany(ids)).values()].map(({ near }) => near), PATIENT)
      .toEqual([true, true])
    const results = await client.getMany(ids)
    expect(results.get('a')?.item?.title).toBe('a')
    expect(results.get('none')?.error).toBeInstanceOf(NotFoundError)
    await expect(client.get('none')).rejects.toMatchObject({
      code: 'NOT_FOUND',
      cache: { outcome: CacheOutcome.NEGATIVE_HIT },
    })
    await writer.create({ id: 'none', title: 'there' })
    await expect.poll(async () => (await client.getMany(ids)).get('none')?.item?.title, PATIENT).toBe('there')
  })

  test('keeps only whole copies, which nobody can change', async () => {
    tenants++
    await using client = open(NEAR)
    await client.create({ id: 'a', title: 'one', attributes: { size: { width: 3 } } })
    await isCurrent(client)
    expect((await client.get('a', { fields: ['title'] })).near).toBe(false)
    expect((await client.get('a')).near).toBe(false)
    const { item } = await client.get('a')
    expect(() => Object.assign(item ?? {}, { title: 'mine' })).toThrow(TypeError)
    expect(() => Object.assign(item?.attributes?.['size'] ?? {}, { width: 4 })).toThrow(TypeError)
    expect((await client.get('a', { freshness: 'fresh' })).near).toBe(false)
    expect((await client.get('a', { fields: ['title'] })).near).toBe(false)
    await getNear(client, 'a', { maxStalenessMs: 60_000 })
  })

  test('that asks for one item many times at once sends one call', async () => {
    tenants++
    await using client = open(NEAR)
    await client.create({ id: 'a', title: 'one' })
    await isCurrent(client)
    await client.get('a')
    await client.invalidate({ ids: ['a'] })
    const before = (await service.client.call('getMetrics', {})).snapshot
    // Those who come before the first of them is sent.
    const answers = await Promise.all(Array.from({ length: 100 }, () => client.get('a')))
    expect(answers.filter(({ cache }) => cache?.coalesced)).toHaveLength(99)
    const after = (await service.client.call('getMetrics', {})).snapshot
    const reads = (snapshot: typeof before) =>
      snapshot?.rpcs.find(({ method }) => method.endsWith('GetItem'))?.started ?? 0n
    expect(reads(after) - reads(before)).toBe(1n)
  })

  test('serves a marked copy while the service is away, if that is allowed, and is current again after it', async () => {
    tenants++
    await using other = await startService({ databaseUrl: service.databaseUrl })
    const [, port] = other.address.split(':')
    await using strict = open(NEAR, other.address)
    await using client = open({ nearCache: { maxEntries: 10, maxStaleMs: 600_000 } }, other.address)
    await client.create({ id: 'a', title: 'one' })
    for (const one of [strict, client]) {
      await isCurrent(one)
      await getNear(one, 'a')
    }
    await other[Symbol.asyncDispose]()
    await expect.poll(() => client.nearStats()?.state, PATIENT).toBe('lost')
    const soon = { timeoutMs: 500 }
    expect(await client.get('a', soon)).toMatchObject({
      near: true,
      item: { title: 'one' },
      cache: { outcome: CacheOutcome.STALE, staleReason: StaleReason.UNVERIFIED },
    })
    expect((await client.getMany(['a'], soon)).get('a')).toMatchObject({ near: true, item: { title: 'one' } })
    expect(client.nearStats()?.staleServed).toBe(2)
    await expect
      .poll(() => client.nearStats(), PATIENT)
      .toMatchObject({ connected: false, error: { code: expect.any(String) } })
    for (const options of [{ allowStale: false }, { near: false }, { freshness: 'fresh' }] as const) {
      await expect(client.get('a', { ...soon, ...options })).rejects.toMatchObject({ code: AWAY })
    }
    await expect(strict.get('a', soon)).rejects.toMatchObject({ code: AWAY })
    await using writer = open()
    await writer.update({ id: 'a', title: 'two' })
    await using _again = await startService({
      databaseUrl: service.databaseUrl,
      env: { ITEMCACHE_LISTEN: `127.0.0.1:${port}` },
    })
    await isCurrent(client)
    await expect.poll(async () => (await client.get('a')).item?.title, PATIENT).toBe('two')
  })

  test('says why its stream does not stand', async () => {
    await using other = await startScriptedServer({ getItem: () => ({ revision: 1n }) })
    await using client = open(NEAR, other.target)
    await expect.poll(() => client.nearStats()?.error, PATIENT).toMatchObject({ code: 'UNIMPLEMENTED' })
    expect(client.nearStats()).toMatchObject({ state: 'starting', connected: false })
  })

  test('is refused with bounds that cannot be', () => {
    expect(() => open({ nearCache: { maxEntries: 0 } })).toThrow(InvalidArgumentError)
    expect(() => open({ nearCache: { maxBytes: -1 } })).toThrow(InvalidArgumentError)
  })
})

describe('watch', () => {
  test('brings every event once and in order, over the end of the instance that it follows', async () => {
    tenants++
    await using other = await startService({ databaseUrl: service.databaseUrl })
    await using writer = open()
    const { revision: before } = await writer.create({ id: 'a', title: '0' })
    const firstOfAll = { 'grpc.service_config': '{"loadBalancingConfig":[{"pick_first":{}}]}' }
    await using client = open({ channelOptions: firstOfAll }, `ipv4:${other.address},${service.address}`)
    const messages = client.watch({ resumeAfter: before })
    const events: bigint[] = []
    let disconnects = 0
    const written: bigint[] = []
    const writing = (async () => {
      for (let i = 1; i <= 60; i++) {
        written.push((await writer.update({ id: 'a', title: `${i}` })).revision)
        if (i === 30) await other[Symbol.asyncDispose]()
      }
    })()
    for await (const message of messages) {
      if (message.kind === 'event') events.push(message.revision)
      if (message.kind === 'disconnected') disconnects++
      if (events.length === 60) break
    }
    await writing
    expect(events).toEqual(written)
    expect(disconnects).toBeGreaterThan(0)
  })

  test('names what nobody can tell any more, and goes on', async () => {
    tenants++
    const tenant = `near-${tenants}`
    await using writer = open()
    const revisions: bigint[] = []
    for (let i = 0; i < 5; i++) {
      revisions.push((await writer.update({ id: 'a', title: `${i}` }, { allowMissing: true })).revision)
    }
    await using sql = await freshConnection()
    await sql.query('DELETE FROM invalidations WHERE tenant = $1 AND revision <= $2', [tenant, revisions[3]])
    await using other = await startService({ databaseUrl: service.databaseUrl })
    await using client = open({}, other.address)
    const seen: WatchMessage[] = []
    for await (const message of client.watch({ resumeAfter: revisions[0] })) {
      if (message.kind !== 'heartbeat') seen.push(message)
      if (message.kind === 'event') break
    }
    expect(seen).toMatchObject([
      { kind: 'started', position: revisions[0], oldestResumable: revisions[3] },
      { kind: 'gap', after: revisions[0], through: revisions[3] },
      { kind: 'event', revision: revisions[4] },
    ])
  })

  test('ends with the error that trying again would not mend, and when the caller gives up', async () => {
    tenants++
    await using client = open()
    await expect(client.watch({ resumeAfter: 1n << 52n }).next()).rejects.toBeInstanceOf(OutOfRangeError)
    await expect(client.watch({ ids: [''] }).next()).rejects.toBeInstanceOf(InvalidArgumentError)
    const giveUp = new AbortController()
    const messages = client.watch({ signal: giveUp.signal })
    expect((await messages.next()).value).toMatchObject({ kind: 'started' })
    const rest = Array.fromAsync(messages)
    giveUp.abort()
    await expect(rest).rejects.toMatchObject({ code: 'CANCELLED' })
  })
})

test('near caches are right while writers write at full speed and servers are killed', {
  timeout: 120_000,
}, async () => {
  await using directory = makeRunDirectory()
  await using database = await freshDatabase()
  const summary = await run({ seconds: 7, databaseUrl: database.url, directory: directory.path })
  expect(summary.violations).toEqual([])
  expect(summary.kills).toBeGreaterThan(0)
  expect(summary.nearHits).toBeGreaterThan(0)
})

async function freshConnection() {
  const { default: pg } = await import('pg')
  const client = new pg.Client(service.databaseUrl)
  await client.connect()
  return Object.assign(client, { [Symbol.asyncDispose]: () => client.end() })
}
