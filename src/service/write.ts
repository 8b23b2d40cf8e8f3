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
import { decodeItem } from '../codec.ts'
import { ItemCacheError } from '../errors.ts'
import { notAppliedYet, type Tail, untilAborted } from '../invalidation/tail.ts'
import type { LogRow } from '../invalidation/view.ts'
import { etagOf, type ItemDraft, mostItemBytes } from '../item.ts'
import type { TierOperation, Trace } from '../observe/tracing.ts'
import type {
  InvalidationMode,
  InvalidationTarget,
  KnownWrite,
  OriginTier,
  Revision,
  Snapshot,
  StoreTier,
  WriteContext,
  Written,
} from '../tiers/tier.ts'
import { GroupCommit } from './group-commit.ts'
import type { Reader } from './read.ts'
import { walk, walked } from './walk.ts'

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

/** An update of an item that memory has, on its way into a group commit. */
interface KnownUpdate {
  readonly write: Write
  readonly id: string
  readonly requestId: string
  readonly precondition: Precondition
  readonly change: (current: ItemDraft | undefined) => ItemDraft
  /** `undefined`: nothing was written, since the item is not what memory knows. */
  readonly done: PromiseWithResolvers<Written | undefined>
}

/** Larger items are written one by one. */
const MAX_GROUPED_BYTES = 16 * 1024
/** Writes of a tenant that wait for a group commit; one more goes its own way, where it may be shed. */
const MAX_WAITING = 1000

/** The write operations of one instance. All throw `ItemCacheError`. */
export class Writer {
  readonly #parts: WriterParts
  readonly #updates: GroupCommit<KnownUpdate>

  constructor(parts: WriterParts) {
    this.#parts = parts
    this.#updates = new GroupCommit((tenant, updates) => this.#commitKnown(tenant, updates))
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
    const written = await this.#updateKnown({ write, id, precondition, change })
    if (written !== undefined) return written
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
      if (former !== undefined) {
        // Known before applied, also by who has not logged it.
        this.#raiseInvalidated(write.tenant, target, mode, former)
        return former
      }
      for (const { id, draft, snapshot } of await this.#fetchAgain(write, target.ids)) {
        const now = await postgres.refetched(write.tenant, id, draft, snapshot.revision, write.signal)
        this.#raise(write.tenant, now, now.revision, snapshot.tags)
      }
    }
    const revision = await walked('postgres.invalidate', write, (span) =>
      postgres.invalidate({ ...write, span }, target, mode),
    )
    this.#raiseInvalidated(write.tenant, target, mode, revision)
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
        [write],
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
    // What memory holds, PostgreSQL has seen.
    if (!origin?.serves(id) || reader.known(write.tenant, id) !== undefined) return
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
      await reader.keep(write.tenant, [reader.copyOf(written.snapshot, sentAtMs)], [write])
    }
    return written
  }

  /**
   * Updates an item that is what the caches know, in one commit with others. `undefined`: it is not, or they know nothing,
   * and nothing was written.
   */
  async #updateKnown(update: Omit<KnownUpdate, 'requestId' | 'done'>): Promise<Written | undefined> {
    const { write, id } = update
    const { tenant, requestId, signal } = write
    const { reader } = this.#parts
    if (reader.known(tenant, id) === undefined) {
      await reader.recall(tenant, id, signal, write.trace)
      if (reader.known(tenant, id) === undefined) return undefined
    }
    if (this.#updates.waiting(tenant) >= MAX_WAITING) return undefined
    const done = Promise.withResolvers<Written | undefined>()
    this.#updates.add(tenant, { ...update, requestId, done })
    return untilAborted(done.promise, signal)
  }

  /** Settles all of them. */
  async #commitKnown(tenant: string, updates: readonly KnownUpdate[]): Promise<void> {
    const { reader, postgres } = this.#parts
    const sent: KnownUpdate[] = []
    const writes: KnownWrite[] = []
    for (const update of updates) {
      const write = this.#knownWrite(tenant, update)
      if (write === undefined) update.done.resolve(undefined)
      else {
        sent.push(update)
        writes.push(write)
      }
    }
    if (writes.length === 0) return
    const traced = sent.map(({ write }) => write)
    const sentAtMs = reader.now()
    let written: ReadonlyMap<string, Written>
    using replacing = walk('postgres.update', traced, writes.length)
    try {
      written = await postgres.replaceKnown(tenant, writes, replacing?.span)
    } catch (error) {
      replacing?.fail(error)
      for (const { done } of sent) {
        // What is refused of one must not take the others along.
        if (isAboutContent(error)) done.resolve(undefined)
        else done.reject(error)
      }
      return
    }
    replacing?.[Symbol.dispose]()
    try {
      for (const { snapshot, revision, formerTags } of written.values()) {
        this.#raise(tenant, snapshot, revision, formerTags)
      }
      const copies = Array.from(written.values(), ({ snapshot }) => reader.copyOf(snapshot, sentAtMs))
      await reader.keep(tenant, copies, traced)
      for (const { id, done } of sent) done.resolve(written.get(id))
    } catch (error) {
      for (const { done } of sent) done.reject(error)
    }
  }

  /** What an update makes of the item that memory knows by now. */
  #knownWrite(tenant: string, { write, id, precondition, change }: KnownUpdate): KnownWrite | undefined {
    const bytes = this.#parts.reader.known(tenant, id)
    if (bytes === undefined || write.signal.aborted) return undefined
    try {
      const known = decodeItem(bytes)
      if (precondition.etag !== '' && precondition.etag !== etagOf(known.revision)) return undefined
      const draft = change(known)
      return mostItemBytes(draft) > MAX_GROUPED_BYTES ? undefined : { write, known, draft }
    } catch {
      // Whether that is so of what is there now, whoever locks the row finds out.
      return undefined
    }
  }

  #raiseInvalidated(
    tenant: string,
    target: InvalidationTarget,
    mode: InvalidationMode,
    revision: Revision,
  ): void {
    this.#parts.tail.seen(revision)
    this.#parts.tail.raising(tenant)?.acknowledge(invalidationRow(target, mode, revision))
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

/** Not that PostgreSQL is out of reach, which goes for all writes of a commit. */
function isAboutContent(error: unknown): boolean {
  return error instanceof ItemCacheError && ['invalid', 'conflict', 'internal'].includes(error.code)
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
