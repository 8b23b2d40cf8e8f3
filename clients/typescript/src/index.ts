/** What `@itemcache/client` offers. */
export { type Cached, type CachedMethodOptions, type CachedOptions, cached } from './cached.ts'
export {
  type CallOptions,
  type Client,
  type ConnectOptions,
  connect,
  type DeleteOptions,
  type Invalidation,
  type ItemInit,
  type ItemList,
  type ListOptions,
  type MetricsOptions,
  type Page,
  SERVICE_CONFIG,
  type TlsOptions,
  type Token,
  type UpdateOptions,
  type WatchMetricsOptions,
  type WatchOptions,
  type WriteOptions,
  type WriteResult,
} from './client.ts'
export {
  AlreadyExistsError,
  CancelledError,
  ConflictError,
  DeadlineExceededError,
  type ErrorCode,
  type ErrorDetails,
  InternalError,
  InvalidArgumentError,
  ItemCacheError,
  NotFoundError,
  OutOfRangeError,
  PermissionDeniedError,
  ResourceExhaustedError,
  UnauthenticatedError,
  UnavailableError,
  UnimplementedError,
  type Violation,
} from './errors.ts'
export type { InvalidationEvent, WatchMessage } from './follow.ts'
export {
  BreakerState,
  CacheOutcome,
  type CacheStatus,
  type InspectItemResponse,
  type Item,
  ItemSource,
  type Latency,
  type MetricsSnapshot,
  type Money,
  type Rating,
  type RpcMetrics,
  type SkippedTier,
  SkipReason,
  StaleReason,
  Tier,
  type TierInspection,
  type TierMetrics,
} from './gen/itemcache/v1/item_cache_pb.ts'
export { formatMoney, parseMoney } from './money.ts'
export type { NearCacheOptions } from './near-cache.ts'
export type { NearState } from './near-log.ts'
export type { NearBounds, NearStats } from './near-store.ts'
export type { GetManyOptions, GetManyResult, GetOptions, GetResult, ReadOptions } from './reads.ts'
