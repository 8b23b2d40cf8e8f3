/**
 * What a call can fail with: one class for each status code of the contract, so that callers write
 * `error instanceof NotFoundError`, or `switch (error.code)`.
 */
import { fromBinary } from '@bufbuild/protobuf'
import { anyUnpack } from '@bufbuild/protobuf/wkt'
import { type ServiceError, status } from '@grpc/grpc-js'
import { toMs } from './duration.ts'
import {
  BadRequestSchema,
  ErrorInfoSchema,
  ResourceInfoSchema,
  RetryInfoSchema,
} from './gen/google/rpc/error_details_pb.ts'
import { StatusSchema } from './gen/google/rpc/status_pb.ts'
import { type CacheStatus, CacheStatusSchema, type ItemError } from './gen/itemcache/v1/item_cache_pb.ts'

/** The name of a gRPC status code. */
export type ErrorCode = Exclude<keyof typeof status, 'OK'>

/** One broken rule: `field` is the path in the request, as `item.tags[3]`. */
export interface Violation {
  readonly field: string
  readonly description: string
}

/** What an error may tell besides its message. */
export interface ErrorDetails {
  readonly reason?: string | undefined
  readonly violations?: readonly Violation[]
  readonly id?: string | undefined
  readonly retryAfterMs?: number | undefined
  readonly cache?: CacheStatus | undefined
  readonly cause?: unknown
}

/** Any failed call. The classes below name the codes of the contract; other codes come as this class. */
export class ItemCacheError extends Error {
  override readonly name: string = 'ItemCacheError'
  readonly code: ErrorCode
  /** Stable and in UPPER_SNAKE_CASE. `undefined` when the service did not answer, so did not say. */
  readonly reason: string | undefined
  /** Every broken rule of the request, with INVALID_ARGUMENT. */
  readonly violations: readonly Violation[]
  /** The item that the error is about. */
  readonly id: string | undefined
  /** Milliseconds after which a retry makes sense, when the service says so. */
  readonly retryAfterMs: number | undefined
  /** Which tier gave the answer, with NOT_FOUND. */
  readonly cache: CacheStatus | undefined

  constructor(code: ErrorCode, message: string, details: ErrorDetails = {}) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause })
    this.code = code
    this.reason = details.reason
    this.violations = details.violations ?? []
    this.id = details.id
    this.retryAfterMs = details.retryAfterMs
    this.cache = details.cache
  }
}

/** A field breaks a rule: `violations` names all of them. Do not retry. */
export class InvalidArgumentError extends ItemCacheError {
  override readonly name = 'InvalidArgumentError'
  constructor(message: string, details?: ErrorDetails) {
    super('INVALID_ARGUMENT', message, details)
  }
}

/** Every authoritative tier says that the item is absent. */
export class NotFoundError extends ItemCacheError {
  override readonly name = 'NotFoundError'
  constructor(message: string, details?: ErrorDetails) {
    super('NOT_FOUND', message, details)
  }
}

/** The id of a create is taken. */
export class AlreadyExistsError extends ItemCacheError {
  override readonly name = 'AlreadyExistsError'
  constructor(message: string, details?: ErrorDetails) {
    super('ALREADY_EXISTS', message, details)
  }
}

/** ABORTED: somebody else was faster (the etag is not the current one). Read again, then write again. */
export class ConflictError extends ItemCacheError {
  override readonly name = 'ConflictError'
  constructor(message: string, details?: ErrorDetails) {
    super('ABORTED', message, details)
  }
}

/** `minRevision` is ahead of everything that was ever written. */
export class OutOfRangeError extends ItemCacheError {
  override readonly name = 'OutOfRangeError'
  constructor(message: string, details?: ErrorDetails) {
    super('OUT_OF_RANGE', message, details)
  }
}

/** Too large or too much at once; see `retryAfterMs`. */
export class ResourceExhaustedError extends ItemCacheError {
  override readonly name = 'ResourceExhaustedError'
  constructor(message: string, details?: ErrorDetails) {
    super('RESOURCE_EXHAUSTED', message, details)
  }
}

/** The service cannot be reached (`reason` is `undefined`), or a tier that it needs is down. Retried already. */
export class UnavailableError extends ItemCacheError {
  override readonly name = 'UnavailableError'
  constructor(message: string, details?: ErrorDetails) {
    super('UNAVAILABLE', message, details)
  }
}

/** The call took longer than its `timeoutMs`, or than the service allows. A write may have happened. */
export class DeadlineExceededError extends ItemCacheError {
  override readonly name = 'DeadlineExceededError'
  constructor(message: string, details?: ErrorDetails) {
    super('DEADLINE_EXCEEDED', message, details)
  }
}

/** The call's signal was aborted (`cause` is its reason), or the client was closed. A write may have happened. */
export class CancelledError extends ItemCacheError {
  override readonly name = 'CancelledError'
  constructor(message: string, details?: ErrorDetails) {
    super('CANCELLED', message, details)
  }
}

/** The credential is missing or wrong. */
export class UnauthenticatedError extends ItemCacheError {
  override readonly name = 'UnauthenticatedError'
  constructor(message: string, details?: ErrorDetails) {
    super('UNAUTHENTICATED', message, details)
  }
}

/** The credential does not allow this call. */
export class PermissionDeniedError extends ItemCacheError {
  override readonly name = 'PermissionDeniedError'
  constructor(message: string, details?: ErrorDetails) {
    super('PERMISSION_DENIED', message, details)
  }
}

/** The service that answered does not offer the call: another release, or not an ItemCache at all. */
export class UnimplementedError extends ItemCacheError {
  override readonly name = 'UnimplementedError'
  constructor(message: string, details?: ErrorDetails) {
    super('UNIMPLEMENTED', message, details)
  }
}

/** A bug. The message has the reference under which the service logged it. */
export class InternalError extends ItemCacheError {
  override readonly name = 'InternalError'
  constructor(message: string, details?: ErrorDetails) {
    super('INTERNAL', message, details)
  }
}

const CLASSES: Partial<Record<ErrorCode, new (message: string, details?: ErrorDetails) => ItemCacheError>> = {
  INVALID_ARGUMENT: InvalidArgumentError,
  NOT_FOUND: NotFoundError,
  ALREADY_EXISTS: AlreadyExistsError,
  ABORTED: ConflictError,
  OUT_OF_RANGE: OutOfRangeError,
  RESOURCE_EXHAUSTED: ResourceExhaustedError,
  UNAVAILABLE: UnavailableError,
  DEADLINE_EXCEEDED: DeadlineExceededError,
  CANCELLED: CancelledError,
  UNAUTHENTICATED: UnauthenticatedError,
  PERMISSION_DENIED: PermissionDeniedError,
  UNIMPLEMENTED: UnimplementedError,
  INTERNAL: InternalError,
}

function errorOf(number: number, message: string, details: ErrorDetails): ItemCacheError {
  const code = (status[number] ?? 'UNKNOWN') as ErrorCode
  const Class = CLASSES[code]
  return Class === undefined ? new ItemCacheError(code, message, details) : new Class(message, details)
}

/** The error that one item of a batch failed with. */
export function fromItemError(id: string, error: ItemError, cache: CacheStatus | undefined): ItemCacheError {
  const { code, reason, message, retryDelay } = error
  return errorOf(code, message, { reason: reason || undefined, id, retryAfterMs: toMs(retryDelay), cache })
}

/** The error that a call failed with. `cause` is for calls that their caller gave up. */
export function fromServiceError(error: ServiceError, cause?: unknown): ItemCacheError {
  return errorOf(error.code, error.details, { ...detailsOf(error), cause })
}

/** Details that cannot be read are left out: the code and the message say enough. */
function detailsOf(error: ServiceError): ErrorDetails {
  const [encoded] = error.metadata?.get('grpc-status-details-bin') ?? []
  if (!(encoded instanceof Uint8Array)) return {}
  try {
    const { details } = fromBinary(StatusSchema, encoded)
    const first = <T>(unpack: (any: (typeof details)[number]) => T | undefined): T | undefined =>
      details.map(unpack).find((detail) => detail !== undefined)
    return {
      reason: first((any) => anyUnpack(any, ErrorInfoSchema))?.reason,
      violations: (first((any) => anyUnpack(any, BadRequestSchema))?.fieldViolations ?? []).map(
        ({ field, description }) => ({ field, description }),
      ),
      id: first((any) => anyUnpack(any, ResourceInfoSchema))?.resourceName,
      retryAfterMs: toMs(first((any) => anyUnpack(any, RetryInfoSchema))?.retryDelay),
      cache: first((any) => anyUnpack(any, CacheStatusSchema)),
    }
  } catch {
    return {}
  }
}
