/**
 * The environment becomes one frozen `Config`. `VARIABLES` is the one list of what can be set: parsing, `--help`
 * and the table in docs/configuration.md all come from it. All mistakes are reported at once.
 */
import { readFileSync } from 'node:fs'
import { BlockList, isIP } from 'node:net'
import { join, resolve } from 'node:path'
import { parseEnv } from 'node:util'
import { parseOriginUrl } from './tiers/origin.ts'
import { parseRedisUrl } from './tiers/redis-url.ts'

/** The version in package.json. */
export const VERSION: string = JSON.parse(
  readFileSync(new URL('../package.json', import.meta.url), 'utf8'),
).version

/** Where a server listens. `host` is a name or an address without brackets; port 0 lets the system choose. */
export interface HostPort {
  readonly host: string
  readonly port: number
}

/** `embedded`: the private PostgreSQL that a bare start brings along. */
export type DatabaseTarget = { readonly kind: 'embedded' } | { readonly kind: 'url'; readonly url: string }

/** `embedded`: the private Redis. `url` is what `parseRedisUrl` understands. */
export type RedisTarget =
  | { readonly kind: 'embedded' }
  | { readonly kind: 'off' }
  | { readonly kind: 'url'; readonly url: string }

/** `embedded`: the bundled catalogue. `url` has no trailing slash. */
export type OriginTarget =
  | { readonly kind: 'embedded' }
  | { readonly kind: 'off' }
  | { readonly kind: 'url'; readonly url: string }

/** How callers prove who they are. `file` and `jwks.file` are absolute paths. */
export type AuthScheme =
  | { readonly kind: 'none' }
  | { readonly kind: 'tokens'; readonly file: string }
  | {
      readonly kind: 'jwt'
      readonly issuer: string
      readonly audience: string
      readonly jwks:
        | { readonly kind: 'url'; readonly url: string }
        | { readonly kind: 'file'; readonly file: string }
      readonly tenantClaim: string
      readonly roleClaim: string
    }

/** Absolute paths of PEM files. */
export interface TlsFiles {
  readonly cert: string
  readonly key: string
  /** `undefined`: clients need no certificate. */
  readonly clientCa: string | undefined
}

export const LOG_LEVELS = ['trace', 'debug', 'info', 'warn', 'error', 'fatal', 'silent'] as const

/** From the most to the least talkative. */
export type LogLevel = (typeof LOG_LEVELS)[number]

/** Who may open the live page, and under which names besides addresses and localhost; names in lower case. */
export interface LivePageAccess {
  readonly to: 'nobody' | 'this-machine' | 'anybody'
  readonly names: readonly string[]
}

/** Everything that can be set. `VARIABLES` holds each field's default and meaning. */
export interface Config {
  readonly version: string
  readonly listen: HostPort
  /** `undefined`: no admin server. */
  readonly admin: HostPort | undefined
  readonly livePage: LivePageAccess
  readonly auth: AuthScheme
  /** `undefined`: no TLS. */
  readonly tls: TlsFiles | undefined
  readonly insecure: boolean
  readonly reflection: boolean
  readonly logLevel: LogLevel
  readonly requestLog: {
    /** One in so many calls that memory answers has a line; 0: none. */
    readonly hitsOneIn: number
    readonly slowMs: number
  }
  /** The variables of OpenTelemetry, when they switch tracing on. */
  readonly tracing: Readonly<Record<string, string>> | undefined
  /** An absolute path. */
  readonly dataDir: string
  readonly database: DatabaseTarget
  readonly redis: RedisTarget
  readonly redisEpoch: number
  readonly origin: OriginTarget
  readonly memory: {
    readonly enabled: boolean
    readonly maxEntries: number
    readonly maxBytes: number
    /** The most that one tenant may take of either bound, above 0 and up to 1. */
    readonly tenantShare: number
  }
  /** The share of keys that go through the caches, 0 to 100. */
  readonly rolloutPercent: number
  readonly ttl: {
    readonly freshForMs: number
    readonly maxStaleMs: number
    readonly negativeMs: number
    readonly redisMs: number
    /** The share of a TTL that chance may take away, 0 to 1. */
    readonly jitter: number
    /** 0: failures are not remembered. */
    readonly failureMs: number
    /** The beta of XFetch; 0: copies are not refreshed early. */
    readonly earlyRefresh: number
  }
  readonly timeouts: {
    readonly redisMs: number
    readonly postgresConnectMs: number
    readonly postgresStatementMs: number
    readonly softMs: number
    readonly refreshMs: number
    /** How long a lock in Redis lasts unless it is renewed; 0: there are none. */
    readonly lockMs: number
    readonly originMs: number
    readonly maxDeadlineMs: number
    readonly drainMs: number
  }
  readonly pools: {
    readonly postgres: number
    /** Calls that may wait for a connection. */
    readonly postgresQueue: number
    readonly originConcurrency: number
  }
  readonly breaker: {
    /** The share of calls that must fail, above 0 and below 1. */
    readonly failureShare: number
    readonly minimumCalls: number
    readonly redisSlowMs: number
  }
  readonly grpc: {
    readonly maxMessageBytes: number
    readonly maxConcurrentStreams: number
    /** On all connections together. */
    readonly maxCalls: number
    /** On all connections together. */
    readonly maxAnswerMemoryBytes: number
    readonly maxSessionMemoryBytes: number
    /** Of all connections together. */
    readonly maxRequestMemoryBytes: number
    readonly maxConnections: number
    readonly maxConnectionIdleMs: number
    readonly maxConnectionAgeMs: number
    readonly maxConnectionAgeGraceMs: number
    readonly keepaliveTimeMs: number
    readonly keepaliveTimeoutMs: number
  }
  /** Of each tenant. `undefined`: no limit. */
  readonly rateLimit: { readonly perSecond: number; readonly burst: number } | undefined
  /** Bounds of what is kept per tenant, and of how many tenants it is kept for. */
  readonly bounds: { readonly floorsPerTenant: number; readonly tenants: number }
  /** Bounds of the invalidation streams. */
  readonly subscriptions: {
    readonly watchersPerTenant: number
    readonly watchersPerConnection: number
    readonly ringRows: number
    readonly ringBytes: number
  }
  /** How much of the log, and of the outcomes of request ids, is kept. */
  readonly retention: { readonly maxAgeMs: number; readonly maxRows: number }
  /** 0: the probe is off. */
  readonly probeOneIn: number
  /** How many tenants the metrics count by name. */
  readonly metricsTenants: number
}

/** One mistake. `value` is what was found, shown safely: quoted, shortened, without passwords. */
export interface Problem {
  readonly variable: string
  readonly rule: string
  readonly value?: string
}

/** The configuration cannot be used. `message` lists all problems, one a line. */
export class ConfigError extends Error {
  override readonly name = 'ConfigError'
  readonly problems: readonly Problem[]

  constructor(problems: readonly Problem[]) {
    super(
      problems
        .map(
          ({ variable, rule, value }) => `${variable} ${rule}${value === undefined ? '' : `; got ${value}`}`,
        )
        .join('\n'),
    )
    this.problems = problems
  }
}

/** One thing that can be set. */
export interface Variable<T = unknown> {
  readonly name: string
  readonly group: string
  /** What `parse` gets when the variable is unset or empty. Written as a user would write it. */
  readonly default: string
  readonly description: string
  /** The value may hold a password. */
  readonly secret?: true
  /** Throws `BrokenRule`. */
  readonly parse: (text: string) => T
}

/** What a value must be, as the second half of a sentence that starts with the variable's name. */
class BrokenRule extends Error {}

const SECOND = 1000
const HOUR = 3600 * SECOND
const KIB = 1024
const MIB = 1024 * KIB
const GIB = 1024 * MIB

const DURATION_UNITS = { ms: 1, s: SECOND, m: 60 * SECOND, h: HOUR }
const SIZE_UNITS = { '': 1, B: 1, KiB: KIB, MiB: MIB, GiB: GIB }

/** `1500` with `DURATION_UNITS` reads `1500ms`, `60000` reads `1m`: the largest unit that leaves no fraction. */
function inUnits(value: number, units: Readonly<Record<string, number>>): string {
  const [unit, factor] = Object.entries(units).findLast(([, each]) => value % each === 0) ?? ['', 1]
  return `${value / factor}${unit}`
}

/** A duration with its unit, as whole milliseconds. At most 24 h unless `max` says more: timers end at 24.8 days. */
function duration(minMs: number, maxMs = 24 * HOUR): (text: string) => number {
  const rule = `must be a duration with its unit (150ms, 5s, 2m, 1h), ${inUnits(minMs, DURATION_UNITS)} to ${inUnits(maxMs, DURATION_UNITS)}`
  return (text) => {
    const [, digits, unit] = /^(\d{1,12}(?:\.\d{1,6})?)(ms|s|m|h)$/.exec(text) ?? []
    const factor = DURATION_UNITS[unit as keyof typeof DURATION_UNITS] ?? Number.NaN
    const ms = Math.round(Number(digits) * factor)
    if (!(ms >= minMs && ms <= maxMs)) throw new BrokenRule(rule)
    return ms
  }
}

/** A size in bytes, with or without a unit. */
function size(min: number, max: number): (text: string) => number {
  const rule = `must be a size (1048576, 512KiB, 256MiB, 1GiB), ${inUnits(min, SIZE_UNITS)} to ${inUnits(max, SIZE_UNITS)}`
  return (text) => {
    const [, digits, unit] = /^(\d{1,15})(|B|KiB|MiB|GiB)$/.exec(text) ?? []
    const bytes = Number(digits) * (SIZE_UNITS[unit as keyof typeof SIZE_UNITS] ?? Number.NaN)
    if (!(bytes >= min && bytes <= max)) throw new BrokenRule(rule)
    return bytes
  }
}

function count(min: number, max: number): (text: string) => number {
  return (text) => {
    const value = /^\d{1,15}$/.test(text) ? Number(text) : Number.NaN
    if (!(value >= min && value <= max)) throw new BrokenRule(`must be a whole number, ${min} to ${max}`)
    return value
  }
}

function ratio(text: string): number {
  const value = /^\d(\.\d{1,9})?$/.test(text) ? Number(text) : Number.NaN
  if (!(value <= 1)) throw new BrokenRule('must be a number, 0 to 1')
  return value
}

function decimal(max: number): (text: string) => number {
  return (text) => {
    const value = /^\d{1,9}(\.\d{1,9})?$/.test(text) ? Number(text) : Number.NaN
    if (!(value <= max)) throw new BrokenRule(`must be a number, 0 to ${max}`)
    return value
  }
}

function flag(text: string): boolean {
  if (/^(true|on|yes|1)$/i.test(text)) return true
  if (/^(false|off|no|0)$/i.test(text)) return false
  throw new BrokenRule('must be true or false')
}

function oneOf<const T extends string>(...allowed: readonly T[]): (text: string) => T {
  return (text) => {
    const found = allowed.find((each) => each === text)
    if (found === undefined) throw new BrokenRule(`must be one of ${allowed.join(', ')}`)
    return found
  }
}

const AUTH_RULE =
  'must be none, tokens:FILE, or jwt:ISSUER?audience=NAME&jwks=URL-OR-FILE (and &tenant-claim=NAME, &role-claim=NAME)'

function authScheme(text: string): AuthScheme {
  if (text === 'none') return { kind: 'none' }
  const [, kind, rest = ''] = /^(tokens|jwt):(.+)$/.exec(text) ?? []
  if (kind === 'tokens' && !rest.includes('\0')) return { kind, file: rest }
  const [, issuer, query] = /^([^?#\s]+)\?([^\s]+)$/.exec(rest) ?? []
  if (kind !== 'jwt' || issuer === undefined) throw new BrokenRule(AUTH_RULE)
  const settings = new Map<string, string>()
  for (const [name, value] of new URLSearchParams(query)) {
    if (!JWT_SETTINGS.includes(name)) throw new BrokenRule(`${AUTH_RULE}; there is another setting in it`)
    if (value === '' || settings.has(name)) throw new BrokenRule(`must set ${name} once, and not to nothing`)
    settings.set(name, value)
  }
  const [audience, jwks] = [settings.get('audience'), settings.get('jwks')]
  if (audience === undefined || jwks === undefined)
    throw new BrokenRule(`${AUTH_RULE}; audience and jwks are needed`)
  return {
    kind,
    issuer,
    audience,
    jwks: jwksTarget(jwks),
    tenantClaim: settings.get('tenant-claim') ?? 'tenant',
    roleClaim: settings.get('role-claim') ?? 'role',
  }
}

const JWT_SETTINGS: readonly string[] = ['audience', 'jwks', 'tenant-claim', 'role-claim']

/** Keys that come over the network decide who is let in, so nobody may change them on the way. */
function jwksTarget(text: string) {
  if (!text.includes('://')) return { kind: 'file', file: text } as const
  const url = urlOf(text, ['https', 'http'])
  if (url === undefined || (url.protocol === 'http:' && !isLoopback(url.hostname.replace(/^\[|\]$/g, '')))) {
    throw new BrokenRule('must name its jwks by a file or an https:// URL (http:// on loopback only)')
  }
  return { kind: 'url', url: text } as const
}

function percent(text: string): number {
  const value = /^\d{1,3}$/.test(text) ? Number(text) : 0
  if (!(value >= 1 && value <= 100)) throw new BrokenRule('must be a percentage, 1 to 100')
  return value / 100
}

function rate(text: string): { perSecond: number; burst: number } | undefined {
  if (text === 'off') return undefined
  const [, perSecond, burst = perSecond] = /^(\d{1,7})(?::(\d{1,7}))?$/.exec(text) ?? []
  const limit = { perSecond: Number(perSecond), burst: Number(burst) }
  if (!(limit.perSecond >= 1 && limit.burst >= 1)) {
    throw new BrokenRule('must be calls per second, or calls per second:burst (100, 100:500), or off')
  }
  return limit
}

function address(text: string): HostPort {
  const [, bracketed, plain, digits] = /^(?:\[([^[\]\s]+)\]|([^[\]:\s/@]+)):(\d{1,5})$/.exec(text) ?? []
  const host = bracketed ?? plain
  const port = Number(digits)
  if (host === undefined || !(port <= 65535) || (bracketed !== undefined && isIP(bracketed) !== 6)) {
    throw new BrokenRule(
      'must be host:port or [IPv6 address]:port (0.0.0.0 or [::] for every interface), port 0 to 65535',
    )
  }
  return { host, port }
}

function addressOrOff(text: string): HostPort | undefined {
  if (text === 'off') return undefined
  try {
    return address(text)
  } catch (error) {
    if (error instanceof BrokenRule) throw new BrokenRule(`${error.message}; or off`)
    throw error
  }
}

function livePageAccess(text: string): LivePageAccess {
  if (text === 'off') return { to: 'nobody', names: [] }
  if (text === 'local') return { to: 'this-machine', names: [] }
  if (text === 'any') return { to: 'anybody', names: [] }
  const names = text.toLowerCase().split(',')
  // One dot at least, so that a misspelt word is none.
  if (!names.every((name) => /^[a-z0-9-]+(\.[a-z0-9-]+)+$/.test(name))) {
    throw new BrokenRule(
      'must be local, any, off, or host names with a dot, by which others may open it too (cache.example.com,…)',
    )
  }
  return { to: 'anybody', names }
}

/** The parsed URL if its scheme is one of `schemes`, and it has a host unless `hostless`. */
function urlOf(text: string, schemes: readonly string[], hostless = false): URL | undefined {
  if (!schemes.some((scheme) => text.startsWith(`${scheme}://`))) return undefined
  const url = URL.parse(text)
  return url === null || (url.host === '' && !hostless) ? undefined : url
}

function databaseTarget(text: string): DatabaseTarget {
  if (text === '') return { kind: 'embedded' }
  if (urlOf(text, ['postgres', 'postgresql'], true) === undefined) {
    throw new BrokenRule('must be a URL like postgres://user:password@host:5432/database')
  }
  return { kind: 'url', url: text }
}

function redisTarget(text: string): RedisTarget {
  if (text === '') return { kind: 'embedded' }
  if (text === 'off') return { kind: 'off' }
  try {
    parseRedisUrl(text)
  } catch (error) {
    if (!(error instanceof Error)) throw error
    // Its messages are rules and hold nothing of the URL.
    throw new BrokenRule(error.message.startsWith('must be') ? `${error.message}, or off` : error.message)
  }
  return { kind: 'url', url: text }
}

function originTarget(text: string): OriginTarget {
  if (text === '') return { kind: 'embedded' }
  if (text === 'off') return { kind: 'off' }
  try {
    parseOriginUrl(text)
  } catch (error) {
    throw new BrokenRule(`${(error as Error).message}; or off`)
  }
  return { kind: 'url', url: text.replace(/\/+$/, '') }
}

function path(text: string): string {
  if (text.includes('\0')) throw new BrokenRule('must be a path')
  return text
}

const WHAT = 'What it talks to'
const WHERE = 'Where it listens'
const MEMORY = 'Memory'
const TIMES = 'How long copies live'
const WAITS = 'How long it waits'
const LIMITS = 'Limits'

/** Every variable, by the name that `build` knows it under, in the order of the documentation. */
const TABLE = {
  database: {
    name: 'DATABASE_URL',
    group: WHAT,
    default: '',
    description:
      'PostgreSQL 15 or newer, postgres://user:password@host:5432/database. Unset: a private PostgreSQL in the data directory.',
    secret: true,
    parse: databaseTarget,
  },
  redis: {
    name: 'REDIS_URL',
    group: WHAT,
    default: '',
    description:
      'Redis, Valkey, KeyDB or Dragonfly: redis://, rediss:// (TLS; ?ca=FILE&cert=FILE&key=FILE), unix:/path, the comma-separated nodes of a cluster, or redis+sentinel://host:port,host:port/name; off disables the tier. Unset: a private Redis, from the PATH or, on Debian and its like, a private copy that apt fetches.',
    secret: true,
    parse: redisTarget,
  },
  redisEpoch: {
    name: 'ITEMCACHE_REDIS_EPOCH',
    group: WHAT,
    default: '0',
    description:
      'Part of every Redis key. Raise it after a logical restore of the database, which may reuse revisions.',
    parse: count(0, 1_000_000_000),
  },
  origin: {
    name: 'ORIGIN_URL',
    group: WHAT,
    default: '',
    description:
      'The catalogue that knows items first, such as https://fakestoreapi.com; off disables it. Unset: a bundled catalogue of 20 products.',
    secret: true,
    parse: originTarget,
  },
  rolloutPercent: {
    name: 'ITEMCACHE_ROLLOUT_PERCENT',
    group: WHAT,
    default: '100',
    description:
      'The share of keys that go through the caches, 0 to 100; the others go straight to PostgreSQL.',
    parse: count(0, 100),
  },
  dataDir: {
    name: 'ITEMCACHE_DATA_DIR',
    group: WHAT,
    default: '.itemcache',
    description: 'Where the private PostgreSQL and Redis live. Relative to the working directory.',
    parse: path,
  },
  listen: {
    name: 'ITEMCACHE_LISTEN',
    group: WHERE,
    default: '127.0.0.1:50051',
    description: 'Address of the gRPC server. Port 0: any free port, printed at start.',
    parse: address,
  },
  admin: {
    name: 'ITEMCACHE_ADMIN_LISTEN',
    group: WHERE,
    default: '127.0.0.1:9464',
    description: 'Address of /healthz, /readyz, /metrics and the live page over HTTP; off disables them.',
    parse: addressOrOff,
  },
  livePage: {
    name: 'ITEMCACHE_LIVE_PAGE',
    group: WHERE,
    default: 'local',
    description:
      'Who may open the live page at / of the admin address, which names items of all tenants. local: callers on this machine; any: whoever reaches it; host names, with commas: the same, and under these names too; off: nobody.',
    parse: livePageAccess,
  },
  auth: {
    name: 'ITEMCACHE_AUTH',
    group: WHERE,
    default: 'none',
    description:
      'How callers prove who they are. none: nobody is asked; the tenant is x-tenant-id, else default. tokens:FILE: tokens whose SHA-256 is in the file. jwt:ISSUER?audience=NAME&jwks=URL-OR-FILE: JSON Web Tokens; &tenant-claim= (tenant) and &role-claim= (role) name their claims.',
    secret: true,
    parse: authScheme,
  },
  tlsCert: {
    name: 'ITEMCACHE_TLS_CERT',
    group: WHERE,
    default: '',
    description: 'PEM file with the certificate of the gRPC server and its chain. Unset: no TLS.',
    parse: path,
  },
  tlsKey: {
    name: 'ITEMCACHE_TLS_KEY',
    group: WHERE,
    default: '',
    description: 'PEM file with its private key.',
    parse: path,
  },
  tlsClientCa: {
    name: 'ITEMCACHE_TLS_CLIENT_CA',
    group: WHERE,
    default: '',
    description:
      'PEM file with the authorities that sign certificates of clients, which then need one (mTLS).',
    parse: path,
  },
  insecure: {
    name: 'ITEMCACHE_INSECURE',
    group: WHERE,
    default: 'false',
    description:
      'Allows addresses that other machines can reach without TLS or authentication; for the admin server, which has neither, it is always needed there.',
    parse: flag,
  },
  reflection: {
    name: 'ITEMCACHE_REFLECTION',
    group: WHERE,
    default: 'true',
    description: 'Serves gRPC reflection, so that grpcurl needs no proto file.',
    parse: flag,
  },
  logLevel: {
    name: 'ITEMCACHE_LOG_LEVEL',
    group: WHERE,
    default: 'info',
    description: `The least level that is logged, as JSON on stderr: ${LOG_LEVELS.join(', ')}. At debug, every request. It can be changed while the service runs.`,
    parse: oneOf(...LOG_LEVELS),
  },
  logHitsOneIn: {
    name: 'ITEMCACHE_LOG_HITS_ONE_IN',
    group: WHERE,
    default: '1000',
    description:
      'One in so many calls that memory answers is logged at info; 0: none. Other calls are, as far as the log takes them.',
    parse: count(0, 1_000_000_000),
  },
  logSlow: {
    name: 'ITEMCACHE_LOG_SLOW',
    group: WHERE,
    default: '500ms',
    description: 'A call that takes this long is logged as a warning, whatever it was.',
    parse: duration(1, 720 * HOUR),
  },
  memoryEnabled: {
    name: 'ITEMCACHE_MEMORY',
    group: MEMORY,
    default: 'on',
    description: 'Whether copies are held in memory; off disables the tier.',
    parse: flag,
  },
  maxEntries: {
    name: 'ITEMCACHE_MEMORY_MAX_ENTRIES',
    group: MEMORY,
    default: '100000',
    description: 'Most copies that memory holds.',
    parse: count(1, 30_000_000),
  },
  maxBytes: {
    name: 'ITEMCACHE_MEMORY_MAX_BYTES',
    group: MEMORY,
    default: '256MiB',
    description: 'Most bytes that those copies take, keys and bookkeeping included.',
    parse: size(MIB, 1024 * GIB),
  },
  tenantShare: {
    name: 'ITEMCACHE_TENANT_MEMORY_SHARE',
    group: MEMORY,
    default: '100',
    description:
      'Most that the copies of one tenant may take of the entries and of the bytes, in percent; past it, a tenant evicts its own.',
    parse: percent,
  },
  maxFloors: {
    name: 'ITEMCACHE_MAX_FLOORS',
    group: MEMORY,
    default: '100000',
    description:
      'Most invalidations remembered per tenant, by key and by tag. Forgetting one costs reloads, never correctness.',
    parse: count(1, 30_000_000),
  },
  maxTenants: {
    name: 'ITEMCACHE_MAX_TENANTS',
    group: MEMORY,
    default: '1000',
    description: 'Most tenants whose state is kept at once; the least recently used one makes room.',
    parse: count(1, 1_000_000),
  },
  ringRows: {
    name: 'ITEMCACHE_RING_ROWS',
    group: MEMORY,
    default: '10000',
    description:
      'Most rows of the log that are kept for the invalidation streams of a tenant; streams that fall further behind are served from PostgreSQL.',
    parse: count(1, 10_000_000),
  },
  ringBytes: {
    name: 'ITEMCACHE_RING_BYTES',
    group: MEMORY,
    default: '8MiB',
    description: 'About the most bytes that those rows take, for each tenant.',
    parse: size(64 * KIB, GIB),
  },
  freshFor: {
    name: 'ITEMCACHE_FRESH_FOR',
    group: TIMES,
    default: '60s',
    description:
      'How long a copy is fresh (soft TTL), in every tier. After that memory serves it once more, marked, while it is reloaded.',
    parse: duration(1, 720 * HOUR),
  },
  maxStale: {
    name: 'ITEMCACHE_MAX_STALE',
    group: TIMES,
    default: '1h',
    description: 'How old a stale answer may be; 0s: no stale answers.',
    parse: duration(0, 720 * HOUR),
  },
  negativeTtl: {
    name: 'ITEMCACHE_NEGATIVE_TTL',
    group: TIMES,
    default: '10s',
    description: 'How long it is remembered that an item does not exist; 0s: not at all.',
    parse: duration(0, 720 * HOUR),
  },
  redisTtl: {
    name: 'ITEMCACHE_REDIS_TTL',
    group: TIMES,
    default: '300s',
    description: 'After how long Redis drops a copy.',
    parse: duration(SECOND, 720 * HOUR),
  },
  ttlJitter: {
    name: 'ITEMCACHE_TTL_JITTER',
    group: TIMES,
    default: '0.1',
    description: 'The share of a TTL that is left to chance, so that copies do not expire together; 0 to 1.',
    parse: ratio,
  },
  earlyRefresh: {
    name: 'ITEMCACHE_EARLY_REFRESH',
    group: TIMES,
    default: '5',
    description:
      'How eagerly copies that are read often are refreshed before their time is over: the beta of XFetch; 0: not at all.',
    parse: decimal(1000),
  },
  failureTtl: {
    name: 'ITEMCACHE_FAILURE_TTL',
    group: TIMES,
    default: '1s',
    description:
      'How long a failure of the catalogue is remembered for the item, so that a dead one is not asked again and again; 0s: not at all.',
    parse: duration(0, 60 * SECOND),
  },
  redisTimeout: {
    name: 'ITEMCACHE_REDIS_TIMEOUT',
    group: WAITS,
    default: '150ms',
    description: 'For a Redis command. Past it, the read goes on to PostgreSQL.',
    parse: duration(1),
  },
  redisSlow: {
    name: 'ITEMCACHE_REDIS_SLOW',
    group: WAITS,
    default: '100ms',
    description: 'A Redis command that takes longer counts as failed for its circuit breaker.',
    parse: duration(1),
  },
  breakerPercent: {
    name: 'ITEMCACHE_BREAKER_PERCENT',
    group: WAITS,
    default: '2',
    description:
      'When more of the calls of a tier fail within 10 s, its circuit breaker opens: it is left alone but for a probe a second.',
    parse: count(1, 99),
  },
  breakerCalls: {
    name: 'ITEMCACHE_BREAKER_CALLS',
    group: WAITS,
    default: '50',
    description: 'With fewer calls in these 10 s the circuit breaker stays closed.',
    parse: count(1, 1_000_000),
  },
  postgresConnectTimeout: {
    name: 'ITEMCACHE_POSTGRES_CONNECT_TIMEOUT',
    group: WAITS,
    default: '2s',
    description: 'For a connection to PostgreSQL, or a free one of the pool.',
    parse: duration(1),
  },
  postgresStatementTimeout: {
    name: 'ITEMCACHE_POSTGRES_STATEMENT_TIMEOUT',
    group: WAITS,
    default: '3s',
    description: 'For a statement in PostgreSQL.',
    parse: duration(1),
  },
  softTimeout: {
    name: 'ITEMCACHE_SOFT_TIMEOUT',
    group: WAITS,
    default: '100ms',
    description: 'For a better answer, when there is a stale one that the caller accepts.',
    parse: duration(1),
  },
  refreshTimeout: {
    name: 'ITEMCACHE_REFRESH_TIMEOUT',
    group: WAITS,
    default: '10s',
    description: 'For a load behind a stale answer, which nobody waits for.',
    parse: duration(1),
  },
  lockTtl: {
    name: 'ITEMCACHE_LOCK_TTL',
    group: WAITS,
    default: '2s',
    description:
      'For an instance that loads an item for all of them and has died: its lock in Redis ends by itself. 0s: no locks, each instance loads for itself.',
    parse: duration(0, 60 * SECOND),
  },
  originTimeout: {
    name: 'ITEMCACHE_ORIGIN_TIMEOUT',
    group: WAITS,
    default: '3s',
    description: 'For an answer of the catalogue; an item that needs several attempts gets twice as long.',
    parse: duration(1),
  },
  maxDeadline: {
    name: 'ITEMCACHE_MAX_DEADLINE',
    group: WAITS,
    default: '30s',
    description: 'Longest time a unary call may take, and the deadline of a call that names none.',
    parse: duration(1),
  },
  drainTimeout: {
    name: 'ITEMCACHE_DRAIN_TIMEOUT',
    group: WAITS,
    default: '8s',
    description: 'How long running calls may go on after SIGTERM.',
    parse: duration(0),
  },
  postgresPool: {
    name: 'ITEMCACHE_POSTGRES_POOL',
    group: LIMITS,
    default: '10',
    description: 'Most connections to PostgreSQL for reads and writes; following the log takes three more.',
    parse: count(1, 1000),
  },
  postgresQueue: {
    name: 'ITEMCACHE_POSTGRES_QUEUE',
    group: LIMITS,
    default: '1000',
    description: 'Most reads, and most writes, that wait for one of them; one more is RESOURCE_EXHAUSTED.',
    parse: count(1, 1_000_000),
  },
  originConcurrency: {
    name: 'ITEMCACHE_ORIGIN_CONCURRENCY',
    group: LIMITS,
    default: '16',
    description: 'Most requests to the catalogue at once.',
    parse: count(1, 1000),
  },
  rateLimit: {
    name: 'ITEMCACHE_RATE_LIMIT',
    group: LIMITS,
    default: 'off',
    description:
      'Calls that each tenant may make on this instance: per second, or per second:burst (100:500). A stream of invalidations or metrics is one call; each look-up of StreamItems is one. off: any number.',
    parse: rate,
  },
  maxMessageBytes: {
    name: 'ITEMCACHE_MAX_MESSAGE_BYTES',
    group: LIMITS,
    default: '4MiB',
    description: 'Largest gRPC message that is accepted.',
    parse: size(512 * KIB, GIB),
  },
  maxConcurrentStreams: {
    name: 'ITEMCACHE_MAX_CONCURRENT_STREAMS',
    group: LIMITS,
    default: '1000',
    description: 'Most calls at once on one connection.',
    parse: count(1, 1_000_000),
  },
  maxCalls: {
    name: 'ITEMCACHE_MAX_CALLS',
    group: LIMITS,
    default: '20000',
    description:
      'Most calls at once on all connections, streams included; one more is RESOURCE_EXHAUSTED. Beyond twice as many HTTP/2 streams the connection that has most is closed.',
    parse: count(1, 10_000_000),
  },
  maxAnswerMemory: {
    name: 'ITEMCACHE_MAX_ANSWER_MEMORY',
    group: LIMITS,
    default: '256MiB',
    description:
      'Most memory that answers may take which callers have not taken yet, on all connections; one more is RESOURCE_EXHAUSTED.',
    parse: size(MIB, 64 * GIB),
  },
  maxSessionMemory: {
    name: 'ITEMCACHE_MAX_SESSION_MEMORY',
    group: LIMITS,
    default: '64MiB',
    description:
      'Most memory that HTTP/2 may take for one connection, and again the requests that are being received on it.',
    parse: size(MIB, 4 * GIB),
  },
  maxRequestMemory: {
    name: 'ITEMCACHE_MAX_REQUEST_MEMORY',
    group: LIMITS,
    default: '256MiB',
    description:
      'Most memory that requests which are being received may take, of all connections together, compressed ones as twice what they may become; one more is RESOURCE_EXHAUSTED.',
    parse: size(MIB, 64 * GIB),
  },
  maxConnections: {
    name: 'ITEMCACHE_MAX_CONNECTIONS',
    group: LIMITS,
    default: '10000',
    description: 'Most connections of callers at once; one more is closed.',
    parse: count(1, 1_000_000),
  },
  maxConnectionIdle: {
    name: 'ITEMCACHE_MAX_CONNECTION_IDLE',
    group: LIMITS,
    default: '30m',
    description: 'A connection without calls is closed after this time.',
    parse: duration(SECOND),
  },
  maxConnectionAge: {
    name: 'ITEMCACHE_MAX_CONNECTION_AGE',
    group: LIMITS,
    default: '1h',
    description: 'A connection is asked to end after this time, so that clients spread over new instances.',
    parse: duration(SECOND),
  },
  maxConnectionAgeGrace: {
    name: 'ITEMCACHE_MAX_CONNECTION_AGE_GRACE',
    group: LIMITS,
    default: '30s',
    description: 'How long its calls may go on then.',
    parse: duration(0),
  },
  keepaliveTime: {
    name: 'ITEMCACHE_KEEPALIVE_TIME',
    group: LIMITS,
    default: '60s',
    description: 'How often a connection is asked whether it is alive.',
    parse: duration(SECOND),
  },
  keepaliveTimeout: {
    name: 'ITEMCACHE_KEEPALIVE_TIMEOUT',
    group: LIMITS,
    default: '20s',
    description: 'A connection that has not answered by then is closed.',
    parse: duration(1),
  },
  watchersPerTenant: {
    name: 'ITEMCACHE_MAX_WATCHERS',
    group: LIMITS,
    default: '2000',
    description: 'Most invalidation streams of a tenant at once.',
    parse: count(1, 1_000_000),
  },
  watchersPerConnection: {
    name: 'ITEMCACHE_MAX_WATCHERS_PER_CONNECTION',
    group: LIMITS,
    default: '100',
    description: 'Most invalidation streams on one connection at once.',
    parse: count(1, 1_000_000),
  },
  retention: {
    name: 'ITEMCACHE_LOG_RETENTION',
    group: LIMITS,
    default: '24h',
    description:
      'How long the log, from which streams resume, and the outcomes of request ids are kept in PostgreSQL.',
    parse: duration(60 * SECOND, 720 * HOUR),
  },
  retentionRows: {
    name: 'ITEMCACHE_LOG_RETENTION_ROWS',
    group: LIMITS,
    default: '1000000',
    description: 'Most rows of the log that are kept for a tenant.',
    parse: count(1000, 1_000_000_000),
  },
  probeOneIn: {
    name: 'ITEMCACHE_PROBE_ONE_IN',
    group: LIMITS,
    default: '10000',
    description: 'One in so many cache hits is compared with PostgreSQL behind the answer; 0: none.',
    parse: count(0, 1_000_000_000),
  },
  metricsTenants: {
    name: 'ITEMCACHE_METRICS_TENANTS',
    group: LIMITS,
    default: '20',
    description:
      'Most tenants that the metrics count by name, the first that call; the others are counted together, as other.',
    parse: count(0, 1000),
  },
} as const satisfies Record<string, Variable>

type Values = { readonly [K in keyof typeof TABLE]: ReturnType<(typeof TABLE)[K]['parse']> }

/** Every variable, in the order of the documentation. */
export const VARIABLES: readonly Variable[] = Object.values(TABLE)

/** The text of `--help`: every variable with its default and meaning. */
export function helpText(): string {
  const lines = [
    `itemcache ${VERSION}`,
    '',
    'Usage: npm start [-- --help | --version]',
    '',
    'Set by environment variables, or by a file .env in the working directory (the environment wins).',
    'Durations carry a unit (150ms, 5s, 2m, 1h); sizes may (512KiB, 256MiB). An empty variable counts as unset.',
    'Traces are switched on by the variables of OpenTelemetry (OTEL_EXPORTER_OTLP_ENDPOINT): docs/tracing.md.',
  ]
  for (const [group, variables] of Map.groupBy(VARIABLES, (variable) => variable.group)) {
    lines.push('', group)
    for (const variable of variables) {
      lines.push(`  ${variable.name}  ${variable.default === '' ? '(unset)' : variable.default}`)
      lines.push(...wrapped(variable.description, 92).map((line) => `      ${line}`))
    }
  }
  return `${lines.join('\n')}\n`
}

/** Reads `cwd`/.env and the environment, which wins. Throws `ConfigError`. */
export function loadConfig(env: Readonly<NodeJS.ProcessEnv> = process.env, cwd = process.cwd()): Config {
  return parseConfig({ ...readDotEnv(join(cwd, '.env')), ...env }, cwd)
}

/** Throws `ConfigError` with everything that is wrong in `env`. Relative paths start at `cwd`. */
export function parseConfig(env: Readonly<NodeJS.ProcessEnv>, cwd = process.cwd()): Config {
  const problems = unknownVariables(env)
  const values: Record<string, unknown> = {}
  for (const [key, variable] of Object.entries<Variable>(TABLE)) {
    const text = env[variable.name]?.trim() || variable.default
    try {
      values[key] = variable.parse(text)
    } catch (error) {
      if (!(error instanceof BrokenRule)) throw error
      problems.push({ variable: variable.name, rule: error.message, value: shown(variable, text) })
      // Cross checks go on with the default.
      values[key] = variable.parse(variable.default)
    }
  }
  const config = build(values as Values, env, cwd)
  problems.push(...halfTls(values as Values))
  problems.push(...contradictions(config, new Set(problems.map(({ variable }) => variable))))
  if (problems.length > 0) throw new ConfigError(problems)
  return deepFrozen(config)
}

/** Whether only this machine can reach the host. A name other than localhost may lead anywhere. */
export function isLoopback(host: string): boolean {
  const family = isIP(host)
  if (family === 0) return host.toLowerCase() === 'localhost'
  return LOOPBACK.check(host, family === 6 ? 'ipv6' : 'ipv4')
}

const LOOPBACK = new BlockList()
LOOPBACK.addSubnet('127.0.0.0', 8, 'ipv4')
LOOPBACK.addAddress('::1', 'ipv6')

/** `host:port`, with the brackets that an IPv6 address needs. */
export function formatAddress({ host, port }: HostPort): string {
  return host.includes(':') ? `[${host}]:${port}` : `${host}:${port}`
}

/** The text with `***` for what its URLs carry of passwords and tokens; rather too much hidden than too little. */
export function withoutPasswords(text: string): string {
  if (!text.includes('://')) return text
  return text
    .replace(/(:\/\/[^\s:/?#@]*):\S*@/g, '$1:***@')
    .replace(/(:\/\/)[^\s:/?#@]+@/g, '$1***@')
    .replace(/([?&][^=&\s]*(?:pass|secret|token|key)[^=&\s]*=)[^&\s#]+/gi, '$1***')
}

/**
 * The variables of OpenTelemetry, if they say where traces go: an endpoint or an exporter. By its rules `none` and
 * `OTEL_SDK_DISABLED` switch it off, whatever else is set.
 */
function tracingOf(env: Readonly<NodeJS.ProcessEnv>): Config['tracing'] {
  const set: Record<string, string> = {}
  for (const [name, value] of Object.entries(env)) {
    if (name.startsWith('OTEL_') && value?.trim()) set[name] = value.trim()
  }
  const exporter = set['OTEL_TRACES_EXPORTER']
  const endpoint = set['OTEL_EXPORTER_OTLP_TRACES_ENDPOINT'] ?? set['OTEL_EXPORTER_OTLP_ENDPOINT']
  if (set['OTEL_SDK_DISABLED']?.toLowerCase() === 'true' || exporter === 'none') return undefined
  return exporter === undefined && endpoint === undefined ? undefined : set
}

function withAbsolutePaths(auth: AuthScheme, cwd: string): AuthScheme {
  if (auth.kind === 'tokens') return { ...auth, file: resolve(cwd, auth.file) }
  if (auth.kind !== 'jwt' || auth.jwks.kind !== 'file') return auth
  return { ...auth, jwks: { kind: 'file', file: resolve(cwd, auth.jwks.file) } }
}

function build(values: Values, env: Readonly<NodeJS.ProcessEnv>, cwd: string): Config {
  return {
    version: VERSION,
    listen: values.listen,
    admin: values.admin,
    livePage: values.livePage,
    auth: withAbsolutePaths(values.auth, cwd),
    tls:
      values.tlsCert === ''
        ? undefined
        : {
            cert: resolve(cwd, values.tlsCert),
            key: resolve(cwd, values.tlsKey),
            clientCa: values.tlsClientCa === '' ? undefined : resolve(cwd, values.tlsClientCa),
          },
    insecure: values.insecure,
    reflection: values.reflection,
    logLevel: values.logLevel,
    requestLog: { hitsOneIn: values.logHitsOneIn, slowMs: values.logSlow },
    tracing: tracingOf(env),
    dataDir: resolve(cwd, values.dataDir),
    database: values.database,
    redis: values.redis,
    redisEpoch: values.redisEpoch,
    origin: values.origin,
    memory: {
      enabled: values.memoryEnabled,
      maxEntries: values.maxEntries,
      maxBytes: values.maxBytes,
      tenantShare: values.tenantShare,
    },
    rolloutPercent: values.rolloutPercent,
    ttl: {
      freshForMs: values.freshFor,
      maxStaleMs: values.maxStale,
      negativeMs: values.negativeTtl,
      redisMs: values.redisTtl,
      jitter: values.ttlJitter,
      failureMs: values.failureTtl,
      earlyRefresh: values.earlyRefresh,
    },
    timeouts: {
      redisMs: values.redisTimeout,
      postgresConnectMs: values.postgresConnectTimeout,
      postgresStatementMs: values.postgresStatementTimeout,
      softMs: values.softTimeout,
      refreshMs: values.refreshTimeout,
      lockMs: values.lockTtl,
      originMs: values.originTimeout,
      maxDeadlineMs: values.maxDeadline,
      drainMs: values.drainTimeout,
    },
    pools: {
      postgres: values.postgresPool,
      postgresQueue: values.postgresQueue,
      originConcurrency: values.originConcurrency,
    },
    breaker: {
      failureShare: values.breakerPercent / 100,
      minimumCalls: values.breakerCalls,
      redisSlowMs: values.redisSlow,
    },
    grpc: {
      maxMessageBytes: values.maxMessageBytes,
      maxConcurrentStreams: values.maxConcurrentStreams,
      maxCalls: values.maxCalls,
      maxAnswerMemoryBytes: values.maxAnswerMemory,
      maxSessionMemoryBytes: values.maxSessionMemory,
      maxRequestMemoryBytes: values.maxRequestMemory,
      maxConnections: values.maxConnections,
      maxConnectionIdleMs: values.maxConnectionIdle,
      maxConnectionAgeMs: values.maxConnectionAge,
      maxConnectionAgeGraceMs: values.maxConnectionAgeGrace,
      keepaliveTimeMs: values.keepaliveTime,
      keepaliveTimeoutMs: values.keepaliveTimeout,
    },
    rateLimit: values.rateLimit,
    bounds: { floorsPerTenant: values.maxFloors, tenants: values.maxTenants },
    subscriptions: {
      watchersPerTenant: values.watchersPerTenant,
      watchersPerConnection: values.watchersPerConnection,
      ringRows: values.ringRows,
      ringBytes: values.ringBytes,
    },
    retention: { maxAgeMs: values.retention, maxRows: values.retentionRows },
    probeOneIn: values.probeOneIn,
    metricsTenants: values.metricsTenants,
  }
}

/** A certificate goes with its key, and clients are only asked for theirs over TLS. */
function halfTls({ tlsCert, tlsKey, tlsClientCa }: Values): Problem[] {
  const needs = (variable: string, other: string) => [
    { variable, rule: `must be set together with ${other}` },
  ]
  const { tlsCert: cert, tlsKey: key, tlsClientCa: clientCa } = TABLE
  if (tlsCert !== '' && tlsKey === '') return needs(cert.name, key.name)
  if (tlsCert === '' && tlsKey !== '') return needs(key.name, cert.name)
  if (tlsCert === '' && tlsClientCa !== '') return needs(clientCa.name, cert.name)
  return []
}

/** Values that are right each and wrong together. Says nothing of variables that are `wrong` by themselves. */
function contradictions(config: Config, wrong: ReadonlySet<string>): Problem[] {
  const problems: Problem[] = []
  const { listen, admin, timeouts } = config

  const lacks = [
    ...(config.tls === undefined ? [`TLS (${TABLE.tlsCert.name}, ${TABLE.tlsKey.name})`] : []),
    ...(config.auth.kind === 'none' ? [`authentication (${TABLE.auth.name})`] : []),
  ]
  for (const [{ name }, reached, missing] of [
    [TABLE.listen, listen, lacks],
    [TABLE.admin, admin, ['TLS', 'authentication']],
  ] as const) {
    if (reached === undefined || isLoopback(reached.host) || config.insecure || missing.length === 0) continue
    // What is missing may just be misspelt, which is said already.
    if ([name, TABLE.auth.name].some((each) => wrong.has(each))) continue
    problems.push({
      variable: name,
      rule: `must be a loopback address (127.0.0.1, [::1], localhost) unless ${TABLE.insecure.name}=true, for there is no ${missing.join(' and no ')}`,
      value: JSON.stringify(formatAddress(reached)),
    })
  }
  if (listen.port !== 0 && admin?.port === listen.port && admin.host === listen.host) {
    problems.push({
      variable: TABLE.admin.name,
      rule: `must differ from ${TABLE.listen.name}`,
      value: JSON.stringify(formatAddress(admin)),
    })
  }
  for (const [{ name }, ms] of [
    [TABLE.redisTimeout, timeouts.redisMs],
    [TABLE.postgresConnectTimeout, timeouts.postgresConnectMs],
    [TABLE.postgresStatementTimeout, timeouts.postgresStatementMs],
    [TABLE.originTimeout, timeouts.originMs],
  ] as const) {
    if (ms < timeouts.maxDeadlineMs || wrong.has(name) || wrong.has(TABLE.maxDeadline.name)) continue
    problems.push({
      variable: name,
      rule: `must be shorter than ${TABLE.maxDeadline.name} (${inUnits(timeouts.maxDeadlineMs, DURATION_UNITS)})`,
      value: inUnits(ms, DURATION_UNITS),
    })
  }
  return problems
}

/** Kubernetes and Docker links give every container such variables for a service that is called "itemcache". */
const INJECTED = /_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)$/

/** What the command line and the client read: often set in the same environment. */
const CLIENT_VARIABLES: ReadonlySet<string> = new Set([
  'ITEMCACHE_TARGET',
  'ITEMCACHE_TENANT',
  'ITEMCACHE_TOKEN',
])

function unknownVariables(env: Readonly<NodeJS.ProcessEnv>): Problem[] {
  const known = new Set(VARIABLES.map((variable) => variable.name))
  const problems: Problem[] = []
  for (const [name, value = ''] of Object.entries(env)) {
    if (!name.startsWith('ITEMCACHE_') || known.has(name) || CLIENT_VARIABLES.has(name)) continue
    if (INJECTED.test(name) || (name.endsWith('_PORT') && /^(tcp|udp|sctp):\/\//.test(value))) continue
    const [nearest] = [...known]
      .map((candidate) => ({ candidate, distance: editDistance(name, candidate) }))
      .filter(({ distance }) => distance <= 4)
      .sort((a, b) => a.distance - b.distance)
    problems.push({
      variable: name,
      rule:
        nearest === undefined
          ? 'is not a variable of ItemCache (--help lists them all)'
          : `is not a variable of ItemCache; did you mean ${nearest.candidate}?`,
    })
  }
  return problems
}

/** The value as a mistake's message may show it: no passwords, no control characters, not too long. */
function shown(variable: Variable, text: string): string {
  if (variable.secret === undefined) return JSON.stringify(text.slice(0, 200))
  const parts = text.split(',').map((each) => each.trim())
  // A URL is shown without its password; a plain word, host:port or socket path as it is. Of anything else nobody
  // knows where the password is.
  const safe = parts.map((each) => {
    if (/^(|[\w.-]{1,64}(:\d{1,5})?|\w+:\/\/|unix:[^:@]+)$/.test(each)) return each
    const url = /^\w+:\/\//.test(each) ? URL.parse(each) : null
    if (url === null || url.host === '') return undefined
    return `${url.pathname}${url.search}${url.hash}`.includes('@') ? undefined : withoutPasswords(each)
  })
  if (safe.includes(undefined)) return 'a value that is not shown, for it may hold a password'
  return JSON.stringify(safe.join(',').slice(0, 200))
}

function readDotEnv(path: string): NodeJS.Dict<string> {
  try {
    return parseEnv(readFileSync(path, 'utf8'))
  } catch (error) {
    if (error instanceof Error && 'code' in error) {
      if (error.code === 'ENOENT') return {}
      throw new ConfigError([
        { variable: '.env', rule: 'must be a readable file', value: String(error.code) },
      ])
    }
    throw error
  }
}

/** How many letters must be added, dropped or changed to make `a` into `b` (Levenshtein). */
function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, index) => index)
  for (let i = 1; i <= a.length; i++) {
    const next = [i]
    for (let j = 1; j <= b.length; j++) {
      const changed = (row[j - 1] ?? 0) + (a[i - 1] === b[j - 1] ? 0 : 1)
      next.push(Math.min(changed, (row[j] ?? 0) + 1, (next[j - 1] ?? 0) + 1))
    }
    row = next
  }
  return row[b.length] ?? 0
}

function wrapped(text: string, width: number): string[] {
  const lines: string[] = []
  let line = ''
  for (const word of text.split(' ')) {
    if (line !== '' && line.length + 1 + word.length > width) {
      lines.push(line)
      line = word
    } else {
      line = line === '' ? word : `${line} ${word}`
    }
  }
  return [...lines, line]
}

function deepFrozen<T extends object>(value: T): T {
  for (const each of Object.values(value)) {
    if (typeof each === 'object' && each !== null) deepFrozen(each)
  }
  return Object.freeze(value)
}
