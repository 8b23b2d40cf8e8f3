import { RedisTier } from '../../src/tiers/redis.ts'
import { redisUrl } from '../support/servers.ts'
import { cacheTierContract } from './cache-tier.ts'

cacheTierContract('the Redis tier', async ({ now }) => {
  const url = redisUrl()
  // The contract is about what is held; a slow machine must not turn a hit into a miss.
  const tier = new RedisTier({ url, prefix: 'contract', now, random: Math.random, commandTimeoutMs: 5_000 })
  await tier.settled()
  return tier
})
