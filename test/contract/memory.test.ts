import { MemoryTier } from '../../src/tiers/memory.ts'
import { cacheTierContract } from './cache-tier.ts'

cacheTierContract(
  'the memory tier',
  async ({ now }) => new MemoryTier({ maxEntries: 2_000, maxBytes: 8 * 2 ** 20, maxStaleMs: 3_600_000, now }),
)
