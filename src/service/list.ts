/** Lists: pages of what PostgreSQL holds, in the order of ids (keyset pagination). */
import { createHash } from 'node:crypto'
import { ItemCacheError } from '../errors.ts'
import { LISTED } from '../invalidation/view.ts'
import type { Trace } from '../observe/tracing.ts'
import type { Snapshot, StoreTier, TierSpan } from '../tiers/tier.ts'
import type { Answer, Reader } from './read.ts'

/** Which page of which items. */
export interface PageRequest {
  readonly tenant: string
  /** 1 to 500. */
  readonly pageSize: number
  /** The token of the page before; `''` for the first page. */
  readonly pageToken: string
  /** `''`: all. */
  readonly category: string
  /** `''`: all. */
  readonly tag: string
}

/** One page, all of one snapshot. */
export interface Page {
  readonly items: readonly Snapshot[]
  /** `''` on the last page. */
  readonly nextPageToken: string
}

/**
 * A page, cached like an item: a change of any item that is or was in the list, an invalidation of its category or tag,
 * and one of the whole tenant concern it. `encode` makes of a page what the answer's `copy.bytes` hold. Throws
 * `ItemCacheError`: `invalid` for a token that this list did not give out.
 */
export function readPage(
  parts: { readonly reader: Reader; readonly postgres: StoreTier },
  request: PageRequest,
  encode: (page: Page) => Uint8Array,
  signal: AbortSignal,
  trace?: Trace,
): Promise<Answer> {
  const { tenant, category, tag, pageSize } = request
  const afterId = request.pageToken === '' ? '' : readToken(request)
  const id = `${LISTED}${JSON.stringify([pageSize, category, tag, afterId])}`
  const load = async (cancelled: AbortSignal, span?: TierSpan): Promise<Snapshot> => {
    // One more than asked for tells whether there is a next page.
    const query = { category, tag, afterId, limit: pageSize + 1 }
    const found = await parts.postgres.list(tenant, query, cancelled, span)
    const items = found.items.slice(0, pageSize)
    const last = items.at(-1)
    const more = found.items.length > pageSize && last !== undefined
    const bytes = encode({ items, nextPageToken: more ? makeToken(request, last.id) : '' })
    return { id, asOf: found.asOf, state: 'present', bytes, revision: 0, tags: floorTagsOf(request) }
  }
  return parts.reader.page(tenant, id, load, signal, trace)
}

/** An item that enters, leaves or changes within a list has the list's tag before or after, so one of two is enough. */
function floorTagsOf({ category, tag }: PageRequest): readonly string[] {
  const filters = [tag, category].filter((filter) => filter !== '')
  return [LISTED + (filters[0] ?? ''), ...filters]
}

/**
 * A token is the last id of the page and a digest over it, the tenant, and the filters, so that a damaged token,
 * and one of another tenant or list, is refused. It is no secret: whoever forges one only chooses where in
 * their own list to start.
 */
function makeToken(request: PageRequest, afterId: string): string {
  return Buffer.concat([digest(request, afterId), Buffer.from(afterId)]).toString('base64url')
}

function readToken(request: PageRequest): string {
  const token = Buffer.from(request.pageToken, 'base64url')
  const afterId = token.subarray(DIGEST_BYTES).toString()
  if (afterId !== '' && makeToken(request, afterId) === request.pageToken) return afterId
  throw new ItemCacheError('invalid', 'the page token does not belong to this list', {
    reason: 'INVALID_PAGE_TOKEN',
    violations: [
      { field: 'page_token', description: 'must be the next_page_token of a page with the same filters' },
    ],
  })
}

const DIGEST_BYTES = 12

function digest(request: PageRequest, afterId: string): Buffer {
  const parts = ['itemcache page token 1', request.tenant, request.category, request.tag, afterId]
  return createHash('sha256').update(JSON.stringify(parts)).digest().subarray(0, DIGEST_BYTES)
}
