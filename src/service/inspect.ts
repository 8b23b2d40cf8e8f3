/** What each tier holds of an item, and what it must satisfy to be served. Loads nothing. */
import type { Tail } from '../invalidation/tail.ts'
import { type Verdict, View } from '../invalidation/view.ts'
import type { MemoryTier } from '../tiers/memory.ts'
import type { CacheTier, Inspection, OriginTier, StoreTier, TierName } from '../tiers/tier.ts'

/** One tier's part of an inspection. */
export interface InspectedTier extends Inspection {
  readonly tier: TierName
  /** What the rule says of the tier's copy; `undefined` when it holds none. */
  readonly verdict: Verdict | undefined
}

/** The tiers that are asked. `origin` is `undefined` when it is off. */
export interface InspectedParts {
  readonly memory: MemoryTier
  readonly redis: CacheTier
  readonly postgres: StoreTier
  readonly origin: OriginTier | undefined
  readonly tail: Tail
}

/** Inspects an item. A database that does not answer is reported, not thrown. */
export async function inspectItem(
  { memory, redis, postgres, origin, tail }: InspectedParts,
  tenant: string,
  id: string,
) {
  const off: Inspection = { present: false, skipped: 'off' }
  const [inMemory, inRedis, inPostgres] = await Promise.all([
    memory.inspect(tenant, id),
    redis.inspect(tenant, id),
    postgres.inspect(tenant, id),
  ])
  // The nearest copy knows best which tags concern the item.
  const tags = inMemory.tags ?? inRedis.tags ?? inPostgres.tags ?? []
  // A tenant whose log is not followed has no floors, and nothing of it is current.
  const view = tail.raising(tenant)
  const judged = (tier: TierName, found: Inspection): InspectedTier => ({
    ...found,
    tier,
    verdict:
      found.present && found.asOf !== undefined && view !== undefined
        ? view.judge({ id, asOf: found.asOf, tags: found.tags ?? tags })
        : undefined,
  })
  return {
    tiers: [
      judged('memory', inMemory),
      judged('redis', inRedis),
      judged('postgres', inPostgres),
      judged('origin', origin === undefined ? off : { present: false }),
    ],
    servedByOrigin: origin?.serves(id) ?? false,
    floors: (view ?? new View(1)).describe(id, tags),
  }
}
