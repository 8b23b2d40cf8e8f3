/** What the tiers hold of an item, as the answer of InspectItem, and as JSON for the live page. */
import { create, type JsonValue, toJson } from '@bufbuild/protobuf'
import {
  BreakerState,
  type InspectItemResponse,
  InspectItemResponseSchema,
  SkipReason,
} from '../gen/itemcache/v1/item_cache_pb.ts'
import type { Metrics } from '../observe/metrics.ts'
import { type InspectedParts, inspectItem } from '../service/inspect.ts'
import { SKIP_REASONS, TIERS } from './encode.ts'
import { toDuration } from './status.ts'
import { checkId, Violations } from './validate.ts'

export async function inspectMessage(
  parts: InspectedParts,
  metrics: Metrics,
  tenant: string,
  id: string,
): Promise<InspectItemResponse> {
  const { tiers, floors, servedByOrigin } = await inspectItem(parts, tenant, id)
  return create(InspectItemResponseSchema, {
    tiers: tiers.map((found) => ({
      tier: TIERS[found.tier],
      present: found.present,
      negative: found.negative ?? false,
      current: found.verdict === 'current',
      asOf: BigInt(found.asOf ?? 0),
      ...(found.ageMs !== undefined && { age: toDuration(found.ageMs) }),
      ...(found.ttlMs !== undefined && { remainingTtl: toDuration(found.ttlMs) }),
      sizeBytes: BigInt(found.sizeBytes ?? 0),
      skipped: found.skipped === undefined ? SkipReason.UNSPECIFIED : SKIP_REASONS[found.skipped],
      servedByOrigin: found.tier === 'origin' && servedByOrigin,
      breaker: BreakerState[metrics.tiers[found.tier].breaker() ?? 'UNSPECIFIED'],
    })),
    floors: {
      tenantFloor: BigInt(floors.tenantFloor),
      keyFloor: BigInt(floors.keyFloor),
      tagFloors: floors.tagFloors.map(({ tag, floor }) => ({ tag, floor: BigInt(floor) })),
      removedFloor: BigInt(floors.removedFloor),
    },
  })
}

/** For the live page, which sends names that nobody has checked. Throws `invalid`. */
export async function inspectJson(
  parts: InspectedParts,
  metrics: Metrics,
  tenant: string,
  id: string,
): Promise<JsonValue> {
  const violations = new Violations()
  checkId(tenant, 'tenant', violations)
  checkId(id, 'id', violations)
  violations.throwIfAny()
  const message = await inspectMessage(parts, metrics, tenant, id)
  return toJson(InspectItemResponseSchema, message, { alwaysEmitImplicit: true })
}
