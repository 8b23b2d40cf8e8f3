/** The one place that turns errors into gRPC statuses. */
import { randomBytes } from 'node:crypto'
import type { OutgoingHttpHeaders } from 'node:http2'
import {
  create,
  type DescMessage,
  type MessageInitShape,
  type MessageShape,
  toBinary,
} from '@bufbuild/protobuf'
import { type Any, AnySchema, anyPack, type Duration, DurationSchema } from '@bufbuild/protobuf/wkt'
import { Metadata, status } from '@grpc/grpc-js'
import { type ErrorCode, ItemCacheError, type Violation } from '../errors.ts'
import {
  BadRequestSchema,
  ErrorInfoSchema,
  ResourceInfoSchema,
  RetryInfoSchema,
} from '../gen/google/rpc/error_details_pb.ts'
import { StatusSchema } from '../gen/google/rpc/status_pb.ts'
import { CacheStatusSchema } from '../gen/itemcache/v1/item_cache_pb.ts'
import { STATUS_NAMES, type StatusName } from '../observe/metrics.ts'

const CODES: Readonly<Record<ErrorCode, status>> = {
  invalid: status.INVALID_ARGUMENT,
  'not-found': status.NOT_FOUND,
  'already-exists': status.ALREADY_EXISTS,
  conflict: status.ABORTED,
  'ahead-of-log': status.OUT_OF_RANGE,
  exhausted: status.RESOURCE_EXHAUSTED,
  unavailable: status.UNAVAILABLE,
  timeout: status.DEADLINE_EXCEEDED,
  cancelled: status.CANCELLED,
  unauthenticated: status.UNAUTHENTICATED,
  forbidden: status.PERMISSION_DENIED,
  unimplemented: status.UNIMPLEMENTED,
  internal: status.INTERNAL,
}

/** What RetryInfo says of UNAVAILABLE when the error does not know better. */
const RETRY_AFTER_MS = 1000
/** Together with everything else this stays below the 8 KiB of metadata that the most cautious clients take. */
const MAX_VIOLATIONS_BYTES = 4000
const DOMAIN = 'itemcache.v1'
const ITEM_TYPE = 'itemcache.v1.Item'

/** The name of a status code, as `NOT_FOUND`. */
export const codeName = (code: status): StatusName => STATUS_NAMES[code] ?? 'UNKNOWN'

/** The gRPC code of a domain error. */
export const codeOf = (error: ItemCacheError): status => CODES[error.code]

/** Milliseconds as the message; negative ones as zero. */
export function toDuration(ms: number): Duration {
  const whole = Math.max(0, ms)
  const seconds = Math.floor(whole / 1000)
  return create(DurationSchema, {
    seconds: BigInt(seconds),
    nanos: Math.floor((whole - seconds * 1000) * 1e6),
  })
}

/** Milliseconds as the message, rounded down. */
export function toSignedDuration(ms: number): Duration {
  const nanos = Math.floor(ms * 1e6)
  const seconds = Math.trunc(nanos / 1e9)
  return create(DurationSchema, { seconds: BigInt(seconds), nanos: nanos - seconds * 1e9 })
}

/**
 * Any error as one of the domain. A bug becomes `internal` with a reference id, which is all that the caller
 * sees; `log` gets the id and the error itself.
 */
export function toItemCacheError(
  error: unknown,
  log: (reference: string, error: unknown) => void,
): ItemCacheError {
  if (error instanceof ItemCacheError && error.code !== 'internal') return error
  const reference = randomBytes(8).toString('hex')
  log(reference, error)
  return new ItemCacheError('internal', `internal error, reference ${reference}`, { cause: error })
}

/** A gRPC status, as grpc-js takes it too. */
export interface Status {
  readonly code: status
  readonly details: string
  readonly metadata: Metadata
}

/** The gRPC status of a domain error. `cache`, an encoded `CacheStatus`, is added to the details, so that a NOT_FOUND tells who said so. */
export function toStatus(error: ItemCacheError, cache?: Uint8Array): Status {
  const code = codeOf(error)
  // grpc-js encodes the details with encodeURI, which throws on a lone surrogate.
  const message = error.message.toWellFormed()
  const details: Any[] = [pack(ErrorInfoSchema, { reason: error.reason, domain: DOMAIN })]
  if (error.violations.length > 0) {
    details.push(pack(BadRequestSchema, { fieldViolations: fitting(error.violations) }))
  }
  if (error.id !== undefined) {
    details.push(pack(ResourceInfoSchema, { resourceType: ITEM_TYPE, resourceName: error.id.toWellFormed() }))
  }
  const retryAfterMs = error.retryAfterMs ?? (code === status.UNAVAILABLE ? RETRY_AFTER_MS : undefined)
  if (retryAfterMs !== undefined) {
    details.push(pack(RetryInfoSchema, { retryDelay: toDuration(retryAfterMs) }))
  }
  if (cache !== undefined)
    details.push(
      create(AnySchema, { typeUrl: `type.googleapis.com/${CacheStatusSchema.typeName}`, value: cache }),
    )
  const metadata = new Metadata()
  const encoded = toBinary(StatusSchema, create(StatusSchema, { code, message, details }))
  metadata.set('grpc-status-details-bin', Buffer.from(encoded))
  return { code, details: message, metadata }
}

/** Of messages that callers send. */
export const ACCEPTED_ENCODINGS = 'identity,deflate,gzip'

/** A status as the headers of an answer without a message. */
export function trailersOnly(status: Status): OutgoingHttpHeaders {
  return {
    ':status': 200,
    'content-type': 'application/grpc+proto',
    'grpc-accept-encoding': ACCEPTED_ENCODINGS,
    ...trailers(status),
  }
}

/** A status as the end of an answer that has begun. */
export function trailers({ code, details, metadata }: Status): OutgoingHttpHeaders {
  return { 'grpc-status': code, 'grpc-message': encodeURI(details), ...metadata.toHttp2Headers() }
}

/** The first violations, as many as the details of an error have room for. */
function fitting(violations: readonly Violation[]): Violation[] {
  let room = MAX_VIOLATIONS_BYTES
  const end = violations.findIndex(({ field, description }) => {
    room -= Buffer.byteLength(field) + Buffer.byteLength(description) + 8
    return room < 0
  })
  return violations.slice(0, end === -1 ? undefined : end).map((violation) => ({ ...violation }))
}

function pack<Desc extends DescMessage>(schema: Desc, init: MessageInitShape<Desc>): Any {
  return anyPack(schema, create(schema, init) as MessageShape<Desc>)
}
