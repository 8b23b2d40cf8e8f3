/** Redis URLs: understood, and described without their secrets. */
import { readFileSync } from 'node:fs'
import { type ConnectionOptions, createSecureContext } from 'node:tls'

/** A Redis URL in parts. Passwords are in it: do not log it, log `describeRedis` of the URL. */
export interface RedisTarget {
  /** Host and port of each node; more than one is a cluster, unless they are sentinels. Empty for a Unix socket. */
  readonly nodes: readonly { readonly host: string; readonly port: number }[]
  /** The path of a Unix socket. */
  readonly path: string | undefined
  readonly username: string
  readonly password: string
  /** The number of the database; a cluster only has 0. */
  readonly db: number
  readonly tls: ConnectionOptions | undefined
  /** The nodes are sentinels, which know where the primary of this name is. They may have credentials of their own. */
  readonly sentinel:
    | { readonly name: string; readonly username: string; readonly password: string }
    | undefined
}

/**
 * Understands `redis://[user:password@]host[:port][/db]`, `rediss://…` (TLS), `unix:/path[?db=n]`, and several
 * of the first two with commas between them (a cluster; credentials and options are those of the first node).
 * `redis+sentinel://[user:password@]host[:port],host[:port]/name[/db]` names sentinels and the primary that they watch;
 * `?sentinel-username=` and `?sentinel-password=` are credentials for themselves.
 * With `rediss`, `?ca=FILE`, `?cert=FILE` and `?key=FILE` name PEM files and `?insecure=true` accepts any
 * certificate. Special characters of a password, a comma among
 * them, must be percent-encoded; a path is taken as it is.
 * Throws an `Error` whose message states the broken rule and holds nothing of the URL.
 */
export function parseRedisUrl(url: string): RedisTarget {
  const socket = /^unix:(?:\/\/)?(\/[^?#,]+)(?:\?db=(\d{1,4}))?$/.exec(url)
  if (socket !== null) {
    const [, path, db = '0'] = socket
    return {
      nodes: [],
      path,
      username: '',
      password: '',
      db: Number(db),
      tls: undefined,
      sentinel: undefined,
    }
  }
  if (SENTINEL.test(url)) return parseSentinelUrl(url)
  const urls = url.split(',').map((part) => URL.parse(part.trim()))
  const [first] = urls
  if (
    !first ||
    urls.some((each) => !each || !['redis:', 'rediss:'].includes(each.protocol) || !each.hostname)
  ) {
    throw new Error(
      'must be redis://host:port, rediss://host:port, several of them, redis+sentinel://host:port,host:port/name, or unix:/path',
    )
  }
  if (urls.some((each) => each?.protocol !== first.protocol)) {
    throw new Error('must use either redis:// or rediss:// for all nodes')
  }
  const dbs = urls.map((each) => each?.pathname.replace(/^\//, '') || '0')
  if (dbs.some((db) => !/^\d{1,4}$/.test(db))) throw new Error('must name a database by its number')
  if (urls.length > 1 && dbs.some((db) => Number(db) !== 0)) throw new Error('a cluster only has database 0')
  return {
    nodes: urls
      .filter((each) => each !== null)
      .map(({ hostname, port }) => ({ host: bare(hostname), port: Number(port || 6379) })),
    path: undefined,
    username: decode(first.username),
    password: decode(first.password),
    db: Number(dbs[0]),
    tls: first.protocol === 'rediss:' ? tlsOptions(first.searchParams) : undefined,
    sentinel: undefined,
  }
}

const SENTINEL = /^rediss?\+sentinel:\/\//
const SENTINEL_PORT = 26379

function parseSentinelUrl(url: string): RedisTarget {
  const [, tls, userinfo = '', hosts = '', path = '', query] =
    /^redis(s?)\+sentinel:\/\/(?:([^@/?#]*)@)?([^@/?#]+)\/([^?#]*)(?:\?([^#]*))?$/.exec(url) ?? []
  const nodes = hosts.split(',').map((host) => URL.parse(`redis://${host}`))
  if (tls === undefined || nodes.some((node) => !node?.hostname)) {
    throw new Error('must name sentinels and a primary: redis+sentinel://host:port,host:port/name')
  }
  const [name = '', db = '0', ...rest] = path.split('/')
  if (name === '') throw new Error('must name the primary that the sentinels watch, after a slash')
  if (rest.length > 0 || !/^\d{1,4}$/.test(db)) throw new Error('must name a database by its number')
  const [username = '', ...password] = userinfo.split(':')
  const settings = new URLSearchParams(query)
  return {
    nodes: nodes
      .filter((node) => node !== null)
      .map(({ hostname, port }) => ({ host: bare(hostname), port: Number(port || SENTINEL_PORT) })),
    path: undefined,
    username: decode(username),
    password: decode(password.join(':')),
    db: Number(db),
    tls: tls === 's' ? tlsOptions(settings) : undefined,
    sentinel: {
      name: decode(name),
      username: settings.get('sentinel-username') ?? '',
      password: settings.get('sentinel-password') ?? '',
    },
  }
}

/** The URL without its passwords and options, for logs and banners. */
export function describeRedis(url: string): string {
  if (SENTINEL.test(url)) return url.replace(/[?#].*$/s, '').replace(/\/\/([^:@/]*):[^@/]*@/, '//$1:***@')
  return url
    .split(',')
    .map((part) => {
      const parsed = URL.parse(part.trim())
      if (parsed === null) return '(not a URL)'
      if (parsed.password !== '') parsed.password = '***'
      parsed.search = ''
      parsed.hash = ''
      return parsed.href
    })
    .join(',')
}

/** The address in `[::1]`, as sockets want it. */
function bare(hostname: string): string {
  return hostname.replace(/^\[(.*)\]$/, '$1')
}

function decode(text: string): string {
  try {
    return decodeURIComponent(text)
  } catch {
    throw new Error('has a percent sign that encodes nothing')
  }
}

function tlsOptions(query: URLSearchParams): ConnectionOptions {
  const tls: ConnectionOptions = {}
  for (const name of ['ca', 'cert', 'key'] as const) {
    const file = query.get(name)
    if (file === null) continue
    try {
      tls[name] = readFileSync(file)
    } catch (cause) {
      throw new Error(`the file that ${name} names cannot be read`, { cause })
    }
  }
  if (query.get('insecure') === 'true') tls.rejectUnauthorized = false
  try {
    createSecureContext(tls)
  } catch (cause) {
    throw new Error('ca, cert and key must be PEM files that fit together', { cause })
  }
  return tls
}
