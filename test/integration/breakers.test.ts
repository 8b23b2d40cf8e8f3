/** Circuit breakers of a real service over servers that are stopped: SIGSTOP raises no event and closes no connection. */
import { status } from '@grpc/grpc-js'
import { expect, test } from 'vitest'
import { formatAddress } from '../../src/config.ts'
import { BreakerState, CacheOutcome, StaleReason, Tier } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { freshPostgres, freshRedis } from '../support/servers.ts'
import { startService, type TestService } from '../support/service.ts'

const breakerOf = async (service: TestService, tier: Tier) => {
  const { snapshot } = await service.client.call('getMetrics', {})
  return snapshot?.tiers.find((one) => one.tier === tier)?.breaker
}

/** Reads of ids that nobody has read, of a tenant each, so that each is a call of its own; the codes that they failed with. */
async function coldReads(service: TestService, prefix: string, count: number) {
  const reads = Array.from({ length: count }, (_, i) => {
    const metadata = { 'x-tenant-id': i === 0 ? 'default' : `t${i}` }
    return service.client.call('getItem', { id: `${prefix}${i}` }, { metadata }).then(
      () => status.OK,
      (error: { code: number }) => error.code,
    )
  })
  return [...new Set(await Promise.all(reads))]
}

test('a stopped Redis costs nobody its timeout for long: its breaker opens, and closes by itself when it is back', async () => {
  await using redis = await freshRedis()
  await using service = await startService({
    env: {
      REDIS_URL: redis.url,
      ITEMCACHE_REDIS_TIMEOUT: '150ms',
      ITEMCACHE_REDIS_SLOW: '100ms',
      ORIGIN_URL: 'off',
    },
  })
  await service.client.call('createItem', { item: { id: 'warm', title: 'x' } })
  expect(await breakerOf(service, Tier.REDIS)).toBe(BreakerState.CLOSED)
  redis.pause()
  await expect
    .poll(
      async () => {
        for (let i = 0; i < 10; i++) await coldReads(service, `none-${Math.random()}-`, 10)
        return breakerOf(service, Tier.REDIS)
      },
      { timeout: 20_000 },
    )
    .toBe(BreakerState.OPEN)
  const { tiers } = await service.client.call('inspectItem', { id: 'warm' })
  expect(tiers.find(({ tier }) => tier === Tier.REDIS)?.breaker).not.toBe(BreakerState.CLOSED)
  const warm = await service.client.call('getItem', { id: 'warm' })
  expect(warm.result.value).toMatchObject({ title: 'x' })
  const ready = await fetch(`http://${formatAddress(service.app.admin ?? { host: '', port: 0 })}/readyz`)
  expect(await ready.json()).toMatchObject({ ready: true, breakers: { postgres: 'CLOSED' } })
  redis.resume()
  await expect.poll(() => breakerOf(service, Tier.REDIS), { timeout: 20_000 }).toBe(BreakerState.CLOSED)
})

test('a stopped PostgreSQL: warm items are served, cold ones fail fast, and all is well within seconds of its return', async () => {
  await using postgres = await freshPostgres()
  await using service = await startService({
    databaseUrl: postgres.url,
    env: {
      ITEMCACHE_POSTGRES_CONNECT_TIMEOUT: '500ms',
      ITEMCACHE_POSTGRES_STATEMENT_TIMEOUT: '1s',
      ORIGIN_URL: 'off',
    },
  })
  await service.client.call('createItem', { item: { id: 'warm', title: 'x' } })
  await service.client.call('getItem', { id: 'warm' })
  // So that their logs are known.
  await expect.poll(() => coldReads(service, 'before-', 30)).toEqual([status.NOT_FOUND])
  postgres.pause()
  let round = 0
  const codes = new Set<status>()
  await expect
    .poll(
      async () => {
        for (const code of await coldReads(service, `cold-${round++}-`, 30)) codes.add(code)
        return breakerOf(service, Tier.POSTGRES)
      },
      { timeout: 25_000 },
    )
    .toBe(BreakerState.OPEN)
  expect([...codes]).toEqual([status.UNAVAILABLE])
  // Sooner than any timeout of PostgreSQL. A read that the breaker lets through to try is not one of these.
  await expect
    .poll(async () => {
      const beganAt = performance.now()
      await coldReads(service, `fast-${round++}-`, 1)
      return performance.now() - beganAt
    })
    .toBeLessThan(400)
  const refused = await service.client.failure('getItem', { id: 'cold' })
  expect(refused).toMatchObject({ code: status.UNAVAILABLE })
  expect(refused.retry?.retryDelay).toBeDefined()
  const stale = await service.client.call('getItem', { id: 'warm' })
  expect(stale.result.value).toMatchObject({ title: 'x' })
  if (stale.cache?.outcome === CacheOutcome.STALE) {
    expect([StaleReason.TIER_DOWN, StaleReason.UNVERIFIED]).toContain(stale.cache.staleReason)
  }
  postgres.resume()
  await expect.poll(() => breakerOf(service, Tier.POSTGRES), { timeout: 20_000 }).toBe(BreakerState.CLOSED)
  await expect.poll(() => coldReads(service, 'after-', 1), { timeout: 20_000 }).toEqual([status.NOT_FOUND])
  await service.client.call('updateItem', { item: { id: 'warm', title: 'y' } })
})

test('a catalogue that fails is given a rest, and asked again a second later', async () => {
  let isDown = true
  let asked = 0
  await using service = await startService({
    env: { ITEMCACHE_FAILURE_TTL: '0s', ITEMCACHE_BREAKER_CALLS: '10' },
    catalogue: {
      intercept: (_, response) => {
        asked++
        if (!isDown) return false
        response.statusCode = 500
        response.end()
        return true
      },
    },
  })
  for (let id = 1; id <= 12; id++) await service.client.failure('getItem', { id: `${id}` })
  // One read a second is let through to try, and may be this one.
  await expect
    .poll(async () => {
      const before = asked
      const { code, info } = await service.client.failure('getItem', { id: '13' })
      return { code, reason: info?.reason, asked: asked - before }
    })
    .toEqual({ code: status.UNAVAILABLE, reason: 'ORIGIN_UNAVAILABLE', asked: 0 })
  expect(await breakerOf(service, Tier.ORIGIN)).not.toBe(BreakerState.CLOSED)
  isDown = false
  await expect
    .poll(
      () =>
        service.client.call('getItem', { id: '14' }).then(
          () => true,
          () => false,
        ),
      { timeout: 20_000 },
    )
    .toBe(true)
  expect(await breakerOf(service, Tier.ORIGIN)).toBe(BreakerState.CLOSED)
})
