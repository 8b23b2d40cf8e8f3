/** What a seed decides: the settings of the instances, what clients do, and which faults happen when. */
import { seededRandom } from '../support/zipf.ts'
import { digestOf } from './servers.ts'

/** A repeatable source of chance for one purpose. */
export interface Chance {
  (): number
  /** 0 up to n - 1. */
  int(n: number): number
  pick<T>(from: readonly T[]): T
  /** True with probability p. */
  on(p: number): boolean
  between(low: number, high: number): number
}

export function chanceOf(seed: number, ...purpose: readonly (string | number)[]): Chance {
  const random = seededRandom(Number.parseInt(digestOf(`${seed} ${purpose.join(' ')}`), 16))
  const int = (n: number) => Math.floor(random() * n)
  return Object.assign(random, {
    int,
    pick: <T>(from: readonly T[]): T => from[int(from.length)] as T,
    on: (p: number) => random() < p,
    between: (low: number, high: number) => low + random() * (high - low),
  })
}

/** Everything that can go wrong, and how often when it is part of the mix. */
export const FAULTS = {
  kill: 0.5,
  stop: 0.5,
  postgresCut: 0.5,
  postgresDrop: 0.5,
  postgresDelay: 0.6,
  postgresLostReplies: 0.5,
  postgresCrash: 0.2,
  redisCut: 0.4,
  redisDrop: 0.4,
  redisDelay: 0.6,
  redisLostReplies: 0.4,
  redisFlush: 0.5,
  redisEvict: 0.5,
  redisDump: 0.5,
  redisEmpty: 0.3,
  redisStop: 0.3,
} as const

export type FaultKind = keyof typeof FAULTS

export interface PlannedFault {
  readonly atMs: number
  readonly forMs: number
  readonly kind: FaultKind
  readonly instance: number
  /** 0 up to 1, for what the kind leaves open. */
  readonly how: number
}

/** How often a client does what, relative to the others. */
export const WORKLOAD = {
  read: 50,
  batch: 6,
  fresh: 4,
  cacheOnly: 4,
  list: 5,
  update: 12,
  create: 3,
  delete: 4,
  invalidateIds: 3,
  invalidateTags: 2.5,
  invalidateAll: 0.5,
  sql: 5,
  pause: 2,
}

export type Act = keyof typeof WORKLOAD

export interface Failover {
  readonly cutAtMs: number
  readonly atMs: number
  /** For so long the old primary lives on, and one instance keeps its connections to it; 0: it is killed. */
  readonly splitMs: number
}

export interface Plan {
  readonly seed: number
  readonly ms: number
  readonly tenants: number
  /** Items by name; those that are numbers the catalogue knows. */
  readonly ids: readonly string[]
  readonly tags: readonly string[]
  readonly origin: boolean
  /** Whether invalidations may ask the origin again. */
  readonly refreshes: boolean
  readonly env: Readonly<Record<string, string>>
  readonly workload: Readonly<Record<Act, number>>
  readonly faults: readonly PlannedFault[]
  /** When the standby stops following, and when it takes over. */
  readonly failover: Failover | undefined
  /** One statement changes more than a thousand items. */
  readonly bulk: boolean
  /** Most of the log is deleted now and then, as when it grows old. */
  readonly trims: boolean
  /** The delay of the fault `postgresDelay`; left out: it varies. */
  readonly delayMs: number | undefined
  /** Streams that are followed; a tenant without one may be forgotten by an instance. */
  readonly watchers: number
  /** The share of acknowledged writes that are sent again for no reason. */
  readonly repeats: number
  /** Between two calls of a client, at most. */
  readonly thinkMs: number
  /** The share of reads that carry the highest revision seen, by clients that always do so. */
  readonly carriers: number
}

/** What may be fixed instead of left to the seed. */
export interface Profile {
  readonly ms?: number
  readonly tenants?: number
  /** Those that are `true` happen at least once each; more by chance. */
  readonly faults?: Partial<Record<FaultKind, boolean>>
  /** The same for all that are not named in `faults`. */
  readonly otherFaults?: boolean
  readonly faultEveryMs?: number
  readonly failover?: boolean
  /** Whether the old primary lives on for a while. */
  readonly split?: boolean
  readonly origin?: boolean
  readonly refreshes?: boolean
  readonly bulk?: boolean
  readonly trims?: boolean
  readonly repeats?: number
  readonly faultForMs?: number
  readonly delayMs?: number
  readonly watchers?: number
  readonly env?: Readonly<Record<string, string>>
  readonly workload?: Partial<Record<Act, number>>
  readonly ids?: readonly string[]
  readonly carriers?: number
  readonly thinkMs?: number
}

export function planOf(seed: number, profile: Profile = {}): Plan {
  const chance = chanceOf(seed, 'plan')
  const ms = profile.ms ?? 10_000
  const origin = profile.origin ?? chance.on(0.4)
  const env: Record<string, string> = {
    ITEMCACHE_MAX_FLOORS: chance.pick(['1', '2', '4', '1000']),
    ITEMCACHE_MEMORY_MAX_ENTRIES: chance.pick(['2', '4', '1000', '1000']),
    ITEMCACHE_MAX_TENANTS: chance.pick(['1', '10', '10']),
    ITEMCACHE_RING_ROWS: chance.pick(['1', '5', '1000']),
    ITEMCACHE_FRESH_FOR: chance.pick(['300ms', '2s', '60s']),
    ITEMCACHE_NEGATIVE_TTL: chance.pick(['300ms', '10s']),
    ITEMCACHE_SOFT_TIMEOUT: chance.pick(['20ms', '100ms', '1s']),
    ITEMCACHE_REDIS_TIMEOUT: chance.pick(['30ms', '150ms']),
    ...profile.env,
  }
  const workload = { ...WORKLOAD }
  for (const act of Object.keys(workload) as Act[]) workload[act] *= 2 ** chance.between(-1.5, 1.5)
  Object.assign(workload, profile.workload)
  const { faults = {}, otherFaults } = profile
  const kinds = (Object.keys(FAULTS) as FaultKind[]).filter((kind) => {
    const isOn = chance.on(FAULTS[kind])
    return faults[kind] ?? otherFaults ?? isOn
  })
  const everyMs = (profile.faultEveryMs ?? chance.pick([250, 500, 1000])) * 2
  const named = kinds.filter((kind) => faults[kind])
  const planned: PlannedFault[] = []
  let atMs = 300 + chance() * everyMs
  while (kinds.length > 0 && (atMs < ms - 500 || planned.length < named.length)) {
    const kind = named[planned.length] ?? chance.pick(kinds)
    const forMs =
      kind === 'kill'
        ? chance.between(10, 500)
        : chance.pick([50, 300, 1000, 2500]) * chance.between(0.5, 1.5)
    planned.push({ atMs, forMs: profile.faultForMs ?? forMs, kind, instance: chance.int(3), how: chance() })
    atMs += chance() * everyMs
  }
  const failingOver = chance.on(0.25)
  const isSplit = chance.on(0.3)
  const failoverAtMs = ms * chance.between(0.35, 0.65)
  return {
    seed,
    ms,
    tenants: profile.tenants ?? chance.pick([1, 2]),
    ids:
      profile.ids ??
      (origin ? ['a', 'b', 'c', '1', '2', '3'] : ['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h']).slice(
        0,
        4 + chance.int(5),
      ),
    tags: ['t1', 't2', 't3'],
    origin,
    refreshes: profile.refreshes ?? (origin && chance.on(0.5)),
    env,
    workload,
    faults: planned,
    failover:
      (profile.failover ?? failingOver)
        ? {
            atMs: failoverAtMs,
            cutAtMs: failoverAtMs - chance.pick([50, 200, 600]),
            splitMs: (profile.split ?? isSplit) ? 1500 : 0,
          }
        : undefined,
    bulk: profile.bulk ?? chance.on(0.1),
    trims: profile.trims ?? chance.on(0.15),
    repeats: profile.repeats ?? 0.08,
    delayMs: profile.delayMs,
    watchers: profile.watchers ?? chance.pick([4, 4, 4, 1, 0]),
    thinkMs: profile.thinkMs ?? chance.pick([5, 20, 60]),
    carriers: profile.carriers ?? 3,
  }
}

/** One of several, in proportion to their weights. */
export function weighted<T extends string>(weights: Readonly<Record<T, number>>, chance: Chance): T {
  const names = Object.keys(weights) as T[]
  let left = chance() * names.reduce((sum, name) => sum + weights[name], 0)
  for (const name of names) {
    left -= weights[name]
    if (left < 0) return name
  }
  return names[0] as T
}
