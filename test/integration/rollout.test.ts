import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { CacheOutcome, Freshness, SkipReason, Tier } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { startService, type TestService } from '../support/service.ts'
import { unlessStalled } from '../support/stalls.ts'

const IDS = Array.from({ length: 20 }, (_, i) => `${i + 1}`)

async function tiersOf({ client }: TestService, ids: readonly string[]) {
  const answers = await Promise.all(ids.map((id) => client.call('getItem', { id })))
  return answers.map(({ cache }) => ({ tier: cache?.tier, outcome: cache?.outcome }))
}

const bypassed = { tier: Tier.POSTGRES, outcome: CacheOutcome.BYPASS }
const hit = { tier: Tier.MEMORY, outcome: CacheOutcome.HIT }

async function sample({ app }: TestService, path: string): Promise<string | undefined> {
  const admin = app.admin
  const text = await (await fetch(`http://127.0.0.1:${admin?.port}/metrics`)).text()
  return text.match(new RegExp(`^itemcache_read_latency_seconds_count{path="${path}"} (\\d+)`, 'm'))?.[1]
}

describe('with half of the keys going through the caches', () => {
  let service: TestService
  beforeAll(async () => {
    service = await startService({ env: { ITEMCACHE_ROLLOUT_PERCENT: '50' } })
    await tiersOf(service, IDS)
  })
  afterAll(() => service?.[Symbol.asyncDispose]())

  test('the same keys are cached on every instance, and the others are read from PostgreSQL', async () => {
    const here = await unlessStalled(async () => {
      const answers = await tiersOf(service, IDS)
      for (const answer of answers) expect([hit, bypassed]).toContainEqual(answer)
      return answers
    })
    expect(here).toContainEqual(hit)
    expect(here).toContainEqual(bypassed)
    await using other = await startService({
      databaseUrl: service.databaseUrl,
      env: { ITEMCACHE_ROLLOUT_PERCENT: '50' },
    })
    await tiersOf(other, IDS)
    await expect.poll(() => tiersOf(other, IDS)).toEqual(here)
  })

  test('what bypasses the caches leaves nothing there, written or read', async () => {
    const answers = await tiersOf(service, IDS)
    const out = IDS.filter((_, i) => answers[i]?.outcome === CacheOutcome.BYPASS)
    for (const id of out) {
      const item = { id, title: 'written' }
      await service.client.call('updateItem', { item, updateMask: { paths: ['title'] } })
      const { tiers } = await service.client.call('inspectItem', { id })
      expect(tiers.slice(0, 3).map(({ present }) => present)).toEqual([false, false, true])
      const { result } = await service.client.call('getItem', { id })
      expect(result.value).toMatchObject({ title: 'written' })
      const only = await service.client.call('getItem', { id, options: { freshness: Freshness.CACHE_ONLY } })
      expect(only.result.case).toBeUndefined()
    }
  })

  test('reads and their latencies are told apart in the metrics', async () => {
    const counts = async () => [
      Number(await sample(service, 'cached')),
      Number(await sample(service, 'bypassed')),
    ]
    const [cached = 0, past = 0] = await counts()
    const answers = await tiersOf(service, IDS)
    const out = answers.filter(({ outcome }) => outcome === CacheOutcome.BYPASS).length
    expect(await counts()).toEqual([cached + IDS.length - out, past + out])
  })
})

test('with no key going through the caches, an item still comes from the origin first', async () => {
  await using service = await startService({ env: { ITEMCACHE_ROLLOUT_PERCENT: '0' } })
  expect(await tiersOf(service, ['1'])).toEqual([{ tier: Tier.ORIGIN, outcome: CacheOutcome.BYPASS }])
  expect(await tiersOf(service, ['1'])).toEqual([bypassed])
  const { result } = await service.client
    .call('listItems', {})
    .then((page) => ({ result: page.items.map(({ id }) => id) }))
  expect(result).toEqual(['1'])
})

test('with memory off, Redis answers, and the answer says so', async () => {
  await using service = await startService({ env: { ITEMCACHE_MEMORY: 'off' } })
  await service.client.call('getItem', { id: '1' })
  await expect
    .poll(async () => (await service.client.call('getItem', { id: '1' })).cache)
    .toMatchObject({
      tier: Tier.REDIS,
      outcome: CacheOutcome.HIT,
      skippedTiers: [{ tier: Tier.MEMORY, reason: SkipReason.OFF }],
    })
  expect(service.app.metrics.snapshot().tiers.memory).toMatchObject({ entries: 0, misses: 0 })
  const { tiers } = await service.client.call('inspectItem', { id: '1' })
  expect(tiers[0]).toMatchObject({ present: false, skipped: SkipReason.OFF })
})
