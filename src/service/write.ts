/**
 * Writes: to PostgreSQL first, then to the caches.
 *
 * A write is acknowledged in this order: PostgreSQL has answered COMMIT; this instance's floors are raised to the
 * write's revision (**known before applied**), so that no older copy is served here any more; the new copy is put into
 * memory, and is on its way to Redis. Nothing is cached before COMMIT is answered. An invalidation by tag is acknowledged when the tail
 * has applied it: items may have got the tag in revisions that this instance has not seen yet.
 *
 * An id that PostgreSQL has never seen is loaded from the origin first, so that a create of an item of the
 * catalogue is refused, and an update of one keeps what the catalogue says of the other fields.
 */
import { ItemCacheError } from '../errors.ts'
import { notAppliedYet, type Tail } from '../invalidation/tail.ts'
import type { LogRow } from '../invalidation/view.ts'
import type { ItemDraft } from '../item.ts'
import type { TierOperation, Trace } from '../observe/tracing.ts'
import type {
  InvalidationMode,
  InvalidationTarget,
  OriginTier,
  Revision,
  Snapshot,
  StoreTier,
  WriteContext,
  Written,
} from '../tiers/tier.ts'
import type { Reader } from './read.ts'
import { walked } from './walk.ts'

/** A write by a caller, with the signal that ends when the caller stops waiting. */
export interface Write extends WriteContext {
  readonly signal: AbortSignal
  /** `undefined`: nobody traces the write. */
  readonly trace?: Trace | undefined
}

/** What a write needs of an existing item. */
export interface Precondition {
  /** `''`: any version. */
  readonly etag: string
  readonly allowMissing: boolean
}

/** The parts that writes go through. `origin` is `undefined` when it is off. */
export interface WriterParts {
  readonly reader: Reader
  readonly postgres: StoreTier
  readonly origin: OriginTier | undefined
  readonly tail: Tail
}

/** The write operations of one instance. All throw `ItemCacheError`. */
export class Writer {
  readonly #parts: WriterParts

  constructor(parts: WriterParts) {
    this.#parts = parts
  }

  async create(write: Write, id: string, draft: ItemDraft): Promise<Written> {
    await this.#loadFirst(write, id)
    return this.#acknowledge('postgres.insert', write, (postgres, context) =>
      postgres.create(context, id, draft),
    )
  }

  async update(
    write: Write,
    id: string,
    precondition: Precondition,
    change: (current: ItemDraft | undefined) => ItemDraft,
  ): Promise<Written> {
    await this.#loadFirst(write, id)
    return this.#acknowledge('postgres.update', write, (postgres, context) =>
      postgres.update(context, id, precondition, change),
    )
  }

  async delete(write: Write, id: string, precondition: Precondition): Promise<Written> {
    await this.#loadFirst(write, id)
    return this.#acknowledge('postgres.delete', write, (postgres, context) =>
      postgres.delete(context, id, precondition),
    )
  }

  /**
   * Returns the revision of the invalidation. Items are fetched again before it is logged: whoever retries a call that
   * broke off in between has them fetched, and whoever retries a call that succeeded gets its outcome.
   */
  async invalidate(
    write: Write,
    target: InvalidationTarget,
    mode: InvalidationMode,
    refreshOrigin: boolean,
  ): Promise<Revision> {
    const { postgres, reader, tail } = this.#parts
    await untilActive(tail, write)
    const refetched = refreshOrigin && target.kind === 'ids'
    if (refetched) {
      const former = await walked('postgres.outcome', write, (span) => postgres.outcomeOf({ ...write, span }))
      if (former !== undefined) return former
      for (const { id, draft, snapshot } of await this.#fetchAgain(write, target.ids)) {
        const now = await postgres.refetched(write.tenant, id, draft, snapshot.revision, write.signal)
        this.#raise(write.tenant, now, now.revision, snapshot.tags)
      }
    }
    const revision = await walked('postgres.invalidate', write, (span) =>
      postgres.invalidate({ ...write, span }, target, mode),
    )
    tail.seen(revision)
    tail.raising(write.tenant)?.acknowledge(invalidationRow(target, mode, revision))
    if (target.kind === 'tags') {
      await tail.reached(write.tenant, revision, write.signal).catch((error: unknown) => {
        throw notAppliedYet(error)
      })
    }
    if (refetched) {
      const sentAtMs = reader.now()
      const { ids } = target
      const reading = walked(
        'postgres.read',
        write,
        (span) => postgres.read(write.tenant, ids, write.signal, span),
        ids.length,
      )
      const snapshots = await reading
      const known = [...snapshots.values()].filter(({ state }) => state !== 'unknown')
      await reader.keep(
        write.tenant,
        known.map((snapshot) => reader.copyOf(snapshot, sentAtMs)),
        write.trace,
      )
    }
    return revision
  }

  /** What the origin says now of items that were not written here. Asked before anything is changed. */
  async #fetchAgain(write: Write, ids: readonly string[]) {
    const { postgres, origin } = this.#parts
    if (origin === undefined) {
      throw new ItemCacheError('unavailable', 'the origin is switched off', { reason: 'ORIGIN_OFF' })
    }
    const served = ids.filter((id) => origin.serves(id))
    if (served.length === 0) return []
    const snapshots = await postgres.read(write.tenant, served, write.signal)
    return Promise.all(
      [...snapshots.values()].map(async (snapshot) => ({
        id: snapshot.id,
        snapshot,
        draft: await walked('origin.fetch', write, (span) => origin.fetch(snapshot.id, write.signal, span)),
      })),
    )
  }

  async #loadFirst(write: Write, id: string): Promise<void> {
    const { postgres, origin, reader, tail } = this.#parts
    await untilActive(tail, write)
    if (!origin?.serves(id)) return
    const reading = walked('postgres.read', write, (span) =>
      postgres.read(write.tenant, [id], write.signal, span),
    )
    const snapshot = (await reading).get(id)
    if (snapshot?.state === 'unknown') await reader.loaded(write.tenant, id, write.signal, write.trace)
  }

  async #acknowledge(
    operation: TierOperation,
    write: Write,
    send: (postgres: StoreTier, context: WriteContext) => Promise<Written>,
  ): Promise<Written> {
    const { reader, postgres } = this.#parts
    const sentAtMs = reader.now()
    const written = await walked(operation, write, (span) => send(postgres, { ...write, span }))
    this.#raise(write.tenant, written.snapshot, written.revision, written.formerTags)
    // A replayed outcome is old news: others may have written since, so it is told but not kept.
    if (!written.replayed) {
      await reader.keep(write.tenant, [reader.copyOf(written.snapshot, sentAtMs)], write.trace)
    }
    return written
  }

  #raise(tenant: string, snapshot: Snapshot, revision: Revision, formerTags: readonly string[]): void {
    const { id, bytes, tags } = snapshot
    this.#parts.tail.seen(revision)
    this.#parts.tail.raising(tenant)?.acknowledge({
      revision,
      kind: bytes === undefined ? 'DELETED' : 'UPSERTED',
      mode: bytes === undefined ? 'REMOVE' : 'EXPIRE',
      ids: [id],
      tags: [...tags, ...formerTags],
    })
  }
}

/** The log row that an invalidation has written, as far as floors go. */
function invalidationRow(target: InvalidationTarget, mode: InvalidationMode, revision: Revision): LogRow {
  switch (target.kind) {
    case 'ids':
      return { revision, kind: 'KEYS_INVALIDATED', mode, ids: target.ids, tags: [] }
    case 'tags':
      return { revision, kind: 'TAGS_INVALIDATED', mode, ids: [], tags: target.tags }
    case 'all':
      return { revision, kind: 'TENANT_INVALIDATED', mode, ids: [], tags: [] }
  }
}

/** Follows the tenant's log from before the write, so that what is written can be served from memory after it. */
async function untilActive(tail: Tail, write: Write): Promise<void> {
  const { tenant, signal } = write
  if (tail.view(tenant) !== undefined) return
  await walked('postgres.log', write, () => tail.activated(tenant, signal))
}
