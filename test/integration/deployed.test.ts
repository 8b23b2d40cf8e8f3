/** The service on servers as they should be deployed: TLS everywhere, and a Redis that lets it do what it must only. */
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, inject, test } from 'vitest'
import { CacheOutcome, Tier } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { connectPostgres } from '../../src/tiers/postgres.ts'
import { dialRedis } from '../../src/tiers/redis.ts'
import { parseRedisUrl } from '../../src/tiers/redis-url.ts'
import { callerAs } from '../support/caller.ts'
import { newAuthority } from '../support/credentials.ts'
import { tlsTo } from '../support/postgres-tls.ts'
import { type DeployedRedis, startDeployedRedis } from '../support/redis-deployed.ts'
import { makeRunDirectory, type RunDirectory } from '../support/run-directory.ts'
import { freshDatabase } from '../support/servers.ts'
import { startService } from '../support/service.ts'

const held = new AsyncDisposableStack()
let directory: RunDirectory
let authority: Awaited<ReturnType<typeof newAuthority>>
let redis: DeployedRedis

beforeAll(async () => {
  directory = held.use(makeRunDirectory())
  authority = await newAuthority('deployed')
  const pair = await authority.issue('server')
  const options = { directory, name: 'redis', cacheDir: inject('redisCache'), pair, ca: authority.cert }
  redis = held.use(await startDeployedRedis(options))
})
afterAll(() => held.disposeAsync())

describe('the Redis of deploy/redis', () => {
  test('serves instances by TLS as a user who may do what they need: one stores, another reads', async () => {
    await using started = new AsyncDisposableStack()
    const database = started.use(await freshDatabase())
    const env = { REDIS_URL: redis.url }
    const start = async () => started.use(await startService({ databaseUrl: database.url, env }))
    const [one, two] = [await start(), await start()]
    await expect
      .poll(() => [one, two].map(({ app }) => app.tiers.redis))
      .toEqual([expect.stringContaining('ready'), expect.stringContaining('ready')])
    const [writer, reader] = [callerAs(one, 'deployed'), callerAs(two, 'deployed')]
    const { revision } = await writer.call('createItem', { item: { id: 'a', title: 'A' } })
    // What is loaded from the catalogue takes a lock.
    await writer.call('getItem', { id: '1' })
    await expect
      .poll(async () => {
        const answer = await reader.call('getItem', { id: 'a', options: { minRevision: revision } })
        return [answer.cache?.tier, answer.cache?.outcome]
      })
      .toEqual([Tier.REDIS, CacheOutcome.HIT])
    const metrics = await one.client.call('getMetrics', {})
    expect(metrics.snapshot?.tiers.find(({ tier }) => tier === Tier.REDIS)).toMatchObject({ errors: 0n })
    expect((await redis.client.keys('ic:*')).length).toBeGreaterThan(1)
  })

  test.each([
    ['KEYS', ['*']],
    ['FLUSHALL', []],
    ['FLUSHDB', []],
    ['CONFIG', ['GET', 'maxmemory']],
    ['SHUTDOWN', []],
    ['ACL', ['LIST']],
    ['GET', ['something-else']],
    ['SUBSCRIBE', ['news']],
  ])('does not let that user give %s', async (command, args) => {
    await using client = await dialRedis(parseRedisUrl(redis.url), 10_000)
    await expect(client.call(command, ...args)).rejects.toThrow('NOPERM')
  })

  test('lets nobody in without a name and a password, and nobody without TLS', async () => {
    const { searchParams } = new URL(redis.url)
    const nameless = `rediss://127.0.0.1:${redis.port}?${searchParams}`
    await expect(dialRedis(parseRedisUrl(nameless), 10_000)).rejects.toThrow('NOAUTH')
    await expect(dialRedis(parseRedisUrl(`redis://127.0.0.1:${redis.port}`), 10_000)).rejects.toThrow()
  })

  test('has the users that docs/scaling.md shows', () => {
    const [, user] =
      /^(user itemcache .*)$/m.exec(
        readFileSync(join(import.meta.dirname, '../../deploy/redis/users.acl'), 'utf8'),
      ) ?? []
    expect(readFileSync(join(import.meta.dirname, '../../docs/scaling.md'), 'utf8')).toContain(user)
  })
})

describe('PostgreSQL by TLS', () => {
  test('is reached with sslmode=verify-full by a name that its certificate has, and trusted by sslrootcert only', async () => {
    await using database = await freshDatabase()
    await using way = await tlsTo(database.url, await authority.issue('postgres'))
    const ca = join(directory.path, 'postgres-ca.pem')
    writeFileSync(ca, authority.cert)
    const url = way.url({ sslmode: 'verify-full', sslrootcert: ca })
    await using service = await startService({ databaseUrl: url, env: { REDIS_URL: 'off' } })
    const { result } = await service.client.call('getItem', { id: '1' })
    expect(result.case).toBe('item')
    expect(way.asked).toMatchObject({ plain: 0 })
    expect(way.asked.tls).toBeGreaterThan(0)
    await expect(connectPostgres({ url: way.url({ sslmode: 'verify-full' }) })).rejects.toMatchObject({
      code: 'unavailable',
    })
  })
})
