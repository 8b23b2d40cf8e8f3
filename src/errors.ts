/**
 * What went wrong, in the words of the domain. Only `rpc/status.ts` turns a code into a gRPC status.
 *
 * - `invalid`: the request breaks a documented rule; `violations` lists all of them.
 * - `not-found`: every authoritative tier answered "absent".
 * - `already-exists`: create of an id that exists.
 * - `conflict`: the etag does not match, or a deadlock outlived its retries.
 * - `ahead-of-log`: a revision was asked for that the tenant has not reached.
 * - `exhausted`: too large, too many, or a queue is full.
 * - `unavailable`: a needed tier is down and nothing stale may be served.
 * - `timeout`: the caller's deadline, or the server's own maximum, has passed.
 * - `cancelled`: the caller went away.
 * - `unauthenticated`: the call carries no valid credential.
 * - `forbidden`: the credential's role does not allow the call.
 * - `unimplemented`: the operation is part of the contract but not built yet.
 * - `internal`: a bug.
 */
export type ErrorCode =
  | 'invalid'
  | 'not-found'
  | 'already-exists'
  | 'conflict'
  | 'ahead-of-log'
  | 'exhausted'
  | 'unavailable'
  | 'timeout'
  | 'cancelled'
  | 'unauthenticated'
  | 'forbidden'
  | 'unimplemented'
  | 'internal'

/** One broken rule: `field` is the path in the request (`item.tags[3]`), `description` the rule. */
export interface Violation {
  readonly field: string
  readonly description: string
}

/** What an `ItemCacheError` may carry besides its code and message. */
export interface ErrorExtras {
  /** UPPER_SNAKE_CASE, stable: clients switch on it. Default: derived from the code. */
  readonly reason?: string
  readonly violations?: readonly Violation[]
  /** The item id that the error is about. */
  readonly id?: string
  /** When a retry makes sense, in milliseconds. */
  readonly retryAfterMs?: number
  readonly cause?: unknown
}

/** The one error that crosses rooms. `message` is shown to callers: no driver text, SQL, hosts or secrets. */
export class ItemCacheError extends Error {
  override readonly name = 'ItemCacheError'
  readonly code: ErrorCode
  readonly reason: string
  readonly violations: readonly Violation[]
  readonly id: string | undefined
  readonly retryAfterMs: number | undefined

  constructor(code: ErrorCode, message: string, extras: ErrorExtras = {}) {
    super(message, extras.cause === undefined ? undefined : { cause: extras.cause })
    this.code = code
    this.reason = extras.reason ?? code.toUpperCase().replaceAll('-', '_')
    this.violations = extras.violations ?? []
    this.id = extras.id
    this.retryAfterMs = extras.retryAfterMs
  }
}

/** Every authoritative tier says that the item is absent. */
export function itemNotFound(id: string): ItemCacheError {
  return new ItemCacheError('not-found', 'the item does not exist', { reason: 'ITEM_NOT_FOUND', id })
}
