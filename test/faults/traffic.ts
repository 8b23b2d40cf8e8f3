/**
 * Callers of every kind, and a record of how each call ended. Each does one call after the other, with a pause in between,
 * so that one that hangs holds up nobody but itself.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { status } from '@grpc/grpc-js'
import { Caller, type Failed, isFailed } from '../consistency/client.ts'
import type { connectSql } from '../consistency/servers.ts'

/**
 * warm: items that everybody reads. stored: items of PostgreSQL that nobody has read. catalogue: items that only the
 * catalogue knows. hurried: as stored, by callers with little time. create and update: writes.
 */
export type Kind = 'warm' | 'stored' | 'catalogue' | 'hurried' | 'create' | 'update'
export const KINDS: readonly Kind[] = ['warm', 'stored', 'catalogue', 'hurried', 'create', 'update']

/** How many callers of each kind there are, and how long each pauses between two calls. */
export interface Crowd {
  readonly callers: Readonly<Record<Kind, number>>
  readonly pauseMs: number
}

/** How one call ended. `OK`, or "<code name> <reason>". */
export interface Ended {
  readonly kind: Kind
  readonly code: status
  readonly text: string
  readonly hasRetryInfo: boolean
  /** Of `performance.now`. */
  readonly startedMs: number
  readonly tookMs: number
  readonly deadlineMs: number
}

export const TENANT = 'faults'
const metadata = { 'x-tenant-id': TENANT }
const DEADLINE_MS = 15_000
const HURRIED_DEADLINE_MS = 1_000
const CONNECTIONS = 4
const SEED_STEP = 5000

export const warmIds = Array.from({ length: 50 }, (_, i) => `warm-${i}`)
const storedId = (i: number) => `stored-${i}`

/** Puts items into PostgreSQL, past the service. */
export async function seed(sql: Awaited<ReturnType<typeof connectSql>>, stored: number): Promise<void> {
  await sql.query(`SELECT set_config('itemcache.tenant', $1, false)`, [TENANT])
  await sql.query(
    `INSERT INTO items (tenant, id, title, source)
      SELECT $1, unnest($2::text[]), 'warm', 'LOCAL' ON CONFLICT DO NOTHING`,
    [TENANT, [...warmIds, 'lag']],
  )
  for (let first = 0; first < stored; first += SEED_STEP) {
    await sql.query(
      `INSERT INTO items (tenant, id, title, source)
        SELECT $1, 'stored-' || i, 'stored', 'LOCAL' FROM generate_series($2::int, $3::int) AS i
          ON CONFLICT DO NOTHING`,
      [TENANT, first, Math.min(first + SEED_STEP, stored) - 1],
    )
  }
}

/** What callers of one run share: the ids that are next, and the writes that were acknowledged. */
export class Traffic implements Disposable {
  readonly #callers: readonly Caller[]
  readonly #stored: number
  #nextStored = 0
  #nextProduct = 1000
  #nextCreated = 0
  #writers = 0
  #stopping = new AbortController()
  #loops: Promise<void>[] = []
  readonly #created: string[] = []
  /** The last acknowledged title of each item that is updated. */
  readonly #updated = new Map<string, number>()
  onEnd: (ended: Ended) => void = () => {}

  /** `stored`: how many items `seed` made. */
  constructor(address: string, stored: number) {
    this.#stored = stored
    this.#callers = Array.from(
      { length: CONNECTIONS },
      () => new Caller(address, { 'grpc.use_local_subchannel_pool': 1 }),
    )
  }

  start({ callers, pauseMs }: Crowd): void {
    this.#stopping = new AbortController()
    for (const kind of KINDS) {
      for (let i = 0; i < callers[kind]; i++) this.#loops.push(this.#loop(kind, pauseMs))
    }
  }

  /** Resolves when the last call has ended. */
  async stop(): Promise<void> {
    this.#stopping.abort()
    await Promise.all(this.#loops)
    this.#loops = []
  }

  get caller(): Caller {
    const [caller] = this.#callers
    if (caller === undefined) throw new Error('there are no connections')
    return caller
  }

  /** An id that nobody has read yet. */
  newStoredId(): string {
    return storedId(this.#nextStored++ % this.#stored)
  }

  newProductId(): string {
    return `${this.#nextProduct++}`
  }

  /** The acknowledged writes that PostgreSQL does not have. */
  async lost(sql: Awaited<ReturnType<typeof connectSql>>): Promise<readonly string[]> {
    await sql.query(`SELECT set_config('itemcache.tenant', $1, false)`, [TENANT])
    const ids = [...this.#created, ...this.#updated.keys()]
    const { rows } = await sql.query<{ id: string; title: string }>(
      'SELECT id, title FROM items WHERE tenant = $1 AND id = ANY ($2) AND NOT deleted',
      [TENANT, ids],
    )
    const found = new Map(rows.map(({ id, title }) => [id, title]))
    const behind = [...this.#updated].filter(([id, title]) => Number(found.get(id) ?? -1) < title)
    return [...this.#created.filter((id) => !found.has(id)), ...behind.map(([id]) => id)]
  }

  /** How many writes were acknowledged. */
  get acknowledged(): number {
    return this.#created.length + [...this.#updated.values()].reduce((sum, title) => sum + title, 0)
  }

  async #loop(kind: Kind, pauseMs: number): Promise<void> {
    const { signal } = this.#stopping
    const own = this.#writers++
    for (let turn = 0; !signal.aborted; turn++) {
      await this.#once(kind, own, turn)
      await sleep(pauseMs * (0.5 + Math.random()), undefined, { signal }).catch(() => {})
    }
  }

  async #once(kind: Kind, own: number, turn: number): Promise<void> {
    const caller = this.#callers[own % CONNECTIONS] ?? this.caller
    const deadlineMs = kind === 'hurried' ? HURRIED_DEADLINE_MS : DEADLINE_MS
    const options = { metadata, timeoutMs: deadlineMs }
    const startedMs = performance.now()
    const id = this.#idFor(kind, own, turn)
    const answer =
      kind === 'create'
        ? await caller.call('createItem', { item: { id, title: '0' } }, options)
        : kind === 'update'
          ? await caller.call(
              'updateItem',
              { item: { id, title: `${turn + 1}` }, allowMissing: true, updateMask: { paths: ['title'] } },
              options,
            )
          : await caller.call('getItem', { id }, options)
    const tookMs = performance.now() - startedMs
    const failed = isFailed(answer) ? answer : undefined
    if (failed === undefined && kind === 'create') this.#created.push(id)
    if (failed === undefined && kind === 'update') this.#updated.set(id, turn + 1)
    this.onEnd({
      kind,
      code: failed?.code ?? status.OK,
      text: failed === undefined ? 'OK' : textOf(failed),
      hasRetryInfo: failed?.hasRetryInfo ?? false,
      startedMs,
      tookMs,
      deadlineMs,
    })
  }

  #idFor(kind: Kind, own: number, turn: number): string {
    switch (kind) {
      case 'warm':
        return warmIds[(own + turn) % warmIds.length] ?? 'warm-0'
      case 'stored':
      case 'hurried':
        return this.newStoredId()
      case 'catalogue':
        return this.newProductId()
      case 'create':
        return `created-${this.#nextCreated++}`
      case 'update':
        return `updated-${own}`
    }
  }

  [Symbol.dispose](): void {
    for (const caller of this.#callers) caller.close()
  }
}

/** What grpc-js itself says of a deadline is different every time. */
function textOf({ code, text }: Failed): string {
  const [, reason = ''] = /^\d+ ([A-Z_]+)$/.exec(text) ?? []
  return `${status[code]} ${reason}`.trim()
}
