/**
 * Callers of several instances whose Redis loses a primary. Each read knows what had been acknowledged when it began, so
 * that an answer which lacks it is seen: on the instance that took the write by itself, on the others with `min_revision`.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { CacheOutcome, Tier } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { Caller, isFailed } from '../consistency/client.ts'

const TENANT = 'failover'
const metadata = { 'x-tenant-id': TENANT }
const DEADLINE_MS = 15_000

/** An item's last acknowledged version: its title. */
interface Acknowledged {
  readonly version: number
  readonly revision: bigint
  /** Which instance took the write. */
  readonly instance: number
}

export interface LoadOptions {
  /** Of gRPC. */
  readonly addresses: readonly string[]
  /** What ids begin with, so that two loads on one Redis can be told apart. */
  readonly name: string
  readonly items: number
  readonly readers: number
  readonly writers: number
  /** Of each caller, between two calls, in milliseconds. */
  readonly pauseMs: number
}

/** Readers and writers that go on until it is disposed. */
export class Load implements AsyncDisposable {
  readonly ids: readonly string[]
  reads = 0
  writes = 0
  /** Answers that were marked as stale, as they may be. */
  marked = 0
  /** What reads and writes failed with. */
  readonly failedReads: string[] = []
  readonly failedWrites: string[] = []
  /** Answers that lacked an acknowledged write. */
  readonly stale: string[] = []
  /** How often each item's answer came out of Redis. */
  readonly outOfRedis = new Map<string, number>()
  readonly #callers: readonly Caller[]
  readonly #acknowledged = new Map<string, Acknowledged>()
  readonly #stopping = new AbortController()
  #loops: readonly Promise<void>[] = []

  private constructor({ addresses, name, items }: LoadOptions) {
    this.ids = Array.from({ length: items }, (_, index) => `${name}-${index}`)
    this.#callers = addresses.map((address) => new Caller(address, { 'grpc.use_local_subchannel_pool': 1 }))
  }

  /** Makes the items, reads each once on every instance, and starts the callers. */
  static async start(options: LoadOptions): Promise<Load> {
    const load = new Load(options)
    await inTurns(load.ids, (id) => load.write(id, 0))
    for (const instance of load.#callers.keys()) await inTurns(load.ids, (id) => load.read(id, instance))
    const loop = async (once: (turn: number) => Promise<unknown>) => {
      const { signal } = load.#stopping
      for (let turn = 0; !signal.aborted; turn += 1) {
        await once(turn)
        await sleep(options.pauseMs * (0.5 + Math.random()), undefined, { signal }).catch(() => {})
      }
    }
    const anyOf = (count: number) => Math.floor(Math.random() * count)
    load.#loops = [
      ...Array.from({ length: options.readers }, () =>
        loop(() => load.read(load.ids[anyOf(load.ids.length)] ?? '', anyOf(load.#callers.length))),
      ),
      // An item has one writer, so that its versions are acknowledged in their order.
      ...Array.from({ length: options.writers }, (_, own) => {
        const ids = load.ids.filter((_id, index) => index % options.writers === own)
        return loop((turn) => load.write(ids[turn % ids.length] ?? '', turn % load.#callers.length))
      }),
    ]
    return load
  }

  /** Reads an item; resolves with the tier that the answer came from. */
  async read(id: string, instance: number): Promise<Tier | undefined> {
    const before = this.#acknowledged.get(id)
    // The instance that acknowledged a write shows it without being asked to.
    const knowsBest = before === undefined || before.instance === instance
    const options = { minRevision: knowsBest ? 0n : before.revision }
    const answer = await this.#caller(instance).call(
      'getItem',
      { id, options },
      { metadata, timeoutMs: DEADLINE_MS },
    )
    this.reads += 1
    if (isFailed(answer)) {
      this.failedReads.push(answer.text)
      return undefined
    }
    const { cache, result } = answer
    if (cache?.outcome === CacheOutcome.STALE) this.marked += 1
    const version = Number(result.case === 'item' ? result.value.title : -1)
    if (before !== undefined && version < before.version && cache?.outcome !== CacheOutcome.STALE) {
      this.stale.push(`${id}: version ${version} after ${before.version} had been acknowledged`)
    }
    if (cache?.tier === Tier.REDIS) this.outOfRedis.set(id, (this.outOfRedis.get(id) ?? 0) + 1)
    return cache?.tier
  }

  /** The version that a plain read shows on the first instance. */
  async versionOf(id: string): Promise<number | undefined> {
    const answer = await this.#caller(0).call('getItem', { id }, { metadata, timeoutMs: DEADLINE_MS })
    if (isFailed(answer)) throw new Error(answer.text)
    return answer.result.case === 'item' ? Number(answer.result.value.title) : undefined
  }

  /** Writes the item's next version. */
  async write(id: string, instance: number): Promise<void> {
    const version = (this.#acknowledged.get(id)?.version ?? 0) + 1
    const answer = await this.#caller(instance).call(
      'updateItem',
      { item: { id, title: `${version}` }, allowMissing: true, updateMask: { paths: ['title'] } },
      { metadata, timeoutMs: DEADLINE_MS },
    )
    this.writes += 1
    if (isFailed(answer)) this.failedWrites.push(answer.text)
    else this.#acknowledged.set(id, { version, revision: answer.revision, instance })
  }

  /** Calls that must not have ended as they did. */
  get wrong(): readonly string[] {
    return [
      ...this.failedReads.map((text) => `a read failed: ${text}`),
      ...this.failedWrites.map((text) => `a write failed: ${text}`),
      ...this.stale,
    ]
  }

  /** The ids of the items whose copies a Redis holds, by its keys. */
  heldBy(keys: readonly string[]): ReadonlySet<string> {
    const known = new Set(this.ids)
    return new Set(keys.map((key) => key.split(':').at(-1) ?? '').filter((id) => known.has(id)))
  }

  /** How often items were answered out of Redis, of these or of all others. */
  count(ids: ReadonlySet<string>, others = false): number {
    let sum = 0
    for (const [id, times] of this.outOfRedis) if (ids.has(id) !== others) sum += times
    return sum
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#stopping.abort()
    await Promise.all(this.#loops)
    for (const caller of this.#callers) caller.close()
  }

  #caller(instance: number): Caller {
    const caller = this.#callers[instance]
    if (caller === undefined) throw new Error(`there is no instance ${instance}`)
    return caller
  }
}

/** Eight at a time. */
async function inTurns(ids: readonly string[], call: (id: string) => Promise<unknown>): Promise<void> {
  const left = ids.values()
  await Promise.all(
    Array.from({ length: 8 }, async () => {
      for (const id of left) await call(id)
    }),
  )
}

/** What `/metrics` of an instance has for a series; the sum when there are several. */
export async function metricOf(admin: string, name: RegExp): Promise<number> {
  const text = await (await fetch(`http://${admin}/metrics`)).text()
  return text
    .split('\n')
    .filter((line) => !line.startsWith('#') && name.test(line))
    .reduce((sum, line) => sum + Number(line.split(' ').at(-1)), 0)
}

/** The state of Redis's breaker. */
export async function breakerOf(admin: string): Promise<string> {
  const detail = (await (await fetch(`http://${admin}/readyz`)).json()) as { breakers: { redis: string } }
  return detail.breakers.redis
}
