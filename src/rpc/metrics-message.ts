/** The metrics of the service as the message. */
import { create, type MessageInitShape } from '@bufbuild/protobuf'
import { timestampFromMs } from '@bufbuild/protobuf/wkt'
import {
  BreakerState,
  type LatencySchema,
  type MetricsSnapshot as MetricsSnapshotMessage,
  MetricsSnapshotSchema,
} from '../gen/itemcache/v1/item_cache_pb.ts'
import { type LatencySnapshot, type MetricsSnapshot, TIER_NAMES } from '../observe/metrics.ts'
import { TIERS } from './encode.ts'
import { toDuration } from './status.ts'

export function metricsMessage(snapshot: MetricsSnapshot): MetricsSnapshotMessage {
  return create(MetricsSnapshotSchema, {
    startTime: timestampFromMs(snapshot.startTimeMs),
    time: timestampFromMs(snapshot.timeMs),
    tiers: TIER_NAMES.map((name) => {
      const tier = snapshot.tiers[name]
      return {
        tier: TIERS[name],
        hits: BigInt(tier.hits),
        misses: BigInt(tier.misses),
        errors: BigInt(tier.errors),
        timeouts: BigInt(tier.timeouts),
        breaker: BreakerState[tier.breaker ?? 'UNSPECIFIED'],
        latency: latencyMessage(tier.latency),
        entries: BigInt(tier.entries),
        bytes: BigInt(tier.bytes),
        evictions: BigInt(tier.evictions),
        expirations: BigInt(tier.expirations),
      }
    }),
    hits: BigInt(snapshot.hits),
    misses: BigInt(snapshot.misses),
    hitRate: snapshot.hitRate,
    loads: BigInt(snapshot.loads),
    coalescedLoads: BigInt(snapshot.coalescedLoads),
    staleServed: BigInt(snapshot.staleServed),
    backgroundRefreshesOk: BigInt(snapshot.refreshesOk),
    backgroundRefreshesFailed: BigInt(snapshot.refreshesFailed),
    negativeHits: BigInt(snapshot.negativeHits),
    invalidationsApplied: BigInt(snapshot.invalidationsApplied),
    invalidationLag: latencyMessage(snapshot.invalidationLag),
    subscribers: BigInt(snapshot.subscribers),
    gapsSent: BigInt(snapshot.gapsSent),
    rpcs: snapshot.rpcs
      .filter((rpc) => rpc.started > 0)
      .map((rpc) => ({
        method: rpc.method,
        started: BigInt(rpc.started),
        finished: Object.fromEntries(
          Object.entries(rpc.finished).map(([code, count]) => [code, BigInt(count)]),
        ),
        latency: latencyMessage(rpc.latency),
      })),
  })
}

function latencyMessage(latency: LatencySnapshot): MessageInitShape<typeof LatencySchema> {
  return {
    count: BigInt(latency.count),
    p50: toDuration(latency.p50Ms),
    p90: toDuration(latency.p90Ms),
    p99: toDuration(latency.p99Ms),
    max: toDuration(latency.maxMs),
    buckets: (latency.buckets ?? []).map(BigInt),
  }
}
