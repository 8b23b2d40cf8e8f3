import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import fc from 'fast-check'
import { afterEach, describe, expect, test } from 'vitest'
import {
  type Config,
  ConfigError,
  formatAddress,
  helpText,
  isLoopback,
  loadConfig,
  type Problem,
  parseConfig,
  VARIABLES,
  withoutPasswords,
} from '../../src/config.ts'

function problemsOf(env: Record<string, string>): readonly Problem[] {
  try {
    parseConfig(env)
  } catch (error) {
    if (error instanceof ConfigError) return error.problems
    throw error
  }
  return []
}

describe('without any variable', () => {
  test('the embedded default is configured', () => {
    expect(parseConfig({}, '/srv')).toEqual<Config>({
      version: JSON.parse(readFileSync('package.json', 'utf8')).version,
      listen: { host: '127.0.0.1', port: 50051 },
      admin: { host: '127.0.0.1', port: 9464 },
      livePage: { to: 'this-machine', names: [] },
      auth: { kind: 'none' },
      tls: undefined,
      rateLimit: undefined,
      insecure: false,
      reflection: true,
      logLevel: 'info',
      requestLog: { hitsOneIn: 1000, slowMs: 500 },
      tracing: undefined,
      dataDir: '/srv/.itemcache',
      database: { kind: 'embedded' },
      redis: { kind: 'embedded' },
      redisEpoch: 0,
      origin: { kind: 'embedded' },
      memory: { enabled: true, maxEntries: 100_000, maxBytes: 256 * 1024 * 1024, tenantShare: 1 },
      rolloutPercent: 100,
      ttl: {
        freshForMs: 60_000,
        maxStaleMs: 3_600_000,
        negativeMs: 10_000,
        redisMs: 300_000,
        jitter: 0.1,
        failureMs: 1_000,
        earlyRefresh: 5,
      },
      timeouts: {
        redisMs: 150,
        postgresConnectMs: 2_000,
        postgresStatementMs: 3_000,
        softMs: 100,
        refreshMs: 10_000,
        lockMs: 2_000,
        originMs: 3_000,
        maxDeadlineMs: 30_000,
        drainMs: 8_000,
      },
      pools: { postgres: 10, postgresQueue: 1000, originConcurrency: 16 },
      breaker: { failureShare: 0.02, minimumCalls: 50, redisSlowMs: 100 },
      grpc: {
        maxMessageBytes: 4 * 1024 * 1024,
        maxConcurrentStreams: 1_000,
        maxCalls: 20_000,
        maxAnswerMemoryBytes: 256 * 1024 * 1024,
        maxSessionMemoryBytes: 64 * 1024 * 1024,
        maxRequestMemoryBytes: 256 * 1024 * 1024,
        maxConnections: 10_000,
        maxConnectionIdleMs: 1_800_000,
        maxConnectionAgeMs: 3_600_000,
        maxConnectionAgeGraceMs: 30_000,
        keepaliveTimeMs: 60_000,
        keepaliveTimeoutMs: 20_000,
      },
      bounds: { floorsPerTenant: 100_000, tenants: 1_000 },
      subscriptions: {
        watchersPerTenant: 2_000,
        watchersPerConnection: 100,
        ringRows: 10_000,
        ringBytes: 8 * 1024 * 1024,
      },
      retention: { maxAgeMs: 86_400_000, maxRows: 1_000_000 },
      probeOneIn: 10_000,
      metricsTenants: 20,
    })
  })

  test('an empty variable counts as unset', () => {
    const empty = Object.fromEntries(VARIABLES.map(({ name }) => [name, ' ']))
    expect(parseConfig(empty)).toEqual(parseConfig({}))
  })

  test('the result is frozen at every level', () => {
    const config = parseConfig({})
    expect(Object.isFrozen(config) && Object.isFrozen(config.listen) && Object.isFrozen(config.ttl)).toBe(
      true,
    )
  })
})

describe('a value', () => {
  test.each<[string, string, (config: Config) => unknown, unknown]>([
    ['DATABASE_URL', 'postgres://u:p@db/x', (c) => c.database, { kind: 'url', url: 'postgres://u:p@db/x' }],
    [
      'DATABASE_URL',
      'postgresql:///x?host=/run',
      (c) => c.database,
      { kind: 'url', url: 'postgresql:///x?host=/run' },
    ],
    ['REDIS_URL', 'off', (c) => c.redis, { kind: 'off' }],
    ['REDIS_URL', 'redis://:p@r:6379/2', (c) => c.redis, { kind: 'url', url: 'redis://:p@r:6379/2' }],
    ['REDIS_URL', 'rediss://r', (c) => c.redis, { kind: 'url', url: 'rediss://r' }],
    ['REDIS_URL', 'unix:/run/redis.sock', (c) => c.redis, { kind: 'url', url: 'unix:/run/redis.sock' }],
    ['REDIS_URL', 'unix:///run/redis.sock', (c) => c.redis, { kind: 'url', url: 'unix:///run/redis.sock' }],
    [
      'REDIS_URL',
      'redis://a:1, redis://b:2',
      (c) => c.redis,
      { kind: 'url', url: 'redis://a:1, redis://b:2' },
    ],
    ['ORIGIN_URL', 'off', (c) => c.origin, { kind: 'off' }],
    ['ORIGIN_URL', 'https://x.org/shop/', (c) => c.origin, { kind: 'url', url: 'https://x.org/shop' }],
    ['ITEMCACHE_LISTEN', '[::1]:50051', (c) => c.listen, { host: '::1', port: 50051 }],
    ['ITEMCACHE_LISTEN', 'localhost:0', (c) => c.listen, { host: 'localhost', port: 0 }],
    ['ITEMCACHE_ADMIN_LISTEN', 'off', (c) => c.admin, undefined],
    ['ITEMCACHE_LIVE_PAGE', 'off', (c) => c.livePage.to, 'nobody'],
    ['ITEMCACHE_LIVE_PAGE', 'any', (c) => c.livePage, { to: 'anybody', names: [] }],
    [
      'ITEMCACHE_LIVE_PAGE',
      'Cache.example.com,b.example',
      (c) => c.livePage,
      { to: 'anybody', names: ['cache.example.com', 'b.example'] },
    ],
    ['ITEMCACHE_DATA_DIR', '/var/lib/itemcache', (c) => c.dataDir, '/var/lib/itemcache'],
    ['ITEMCACHE_REFLECTION', 'off', (c) => c.reflection, false],
    ['ITEMCACHE_REFLECTION', 'TRUE', (c) => c.reflection, true],
    ['ITEMCACHE_LOG_LEVEL', 'debug', (c) => c.logLevel, 'debug'],
    ['ITEMCACHE_MEMORY_MAX_BYTES', '1048576', (c) => c.memory.maxBytes, 1_048_576],
    ['ITEMCACHE_MEMORY_MAX_BYTES', '2GiB', (c) => c.memory.maxBytes, 2_147_483_648],
    ['ITEMCACHE_FRESH_FOR', '1.5s', (c) => c.ttl.freshForMs, 1_500],
    ['ITEMCACHE_FRESH_FOR', '48h', (c) => c.ttl.freshForMs, 172_800_000],
    ['ITEMCACHE_MAX_STALE', '0s', (c) => c.ttl.maxStaleMs, 0],
    ['ITEMCACHE_TTL_JITTER', '0.25', (c) => c.ttl.jitter, 0.25],
    ['ITEMCACHE_AUTH', 'tokens:/etc/tokens', (c) => c.auth, { kind: 'tokens', file: '/etc/tokens' }],
    [
      'ITEMCACHE_AUTH',
      'jwt:https://issuer.org/?audience=shop&jwks=https://issuer.org/keys',
      (c) => c.auth,
      {
        kind: 'jwt',
        issuer: 'https://issuer.org/',
        audience: 'shop',
        jwks: { kind: 'url', url: 'https://issuer.org/keys' },
        tenantClaim: 'tenant',
        roleClaim: 'role',
      },
    ],
    [
      'ITEMCACHE_AUTH',
      'jwt:me?audience=a%20b&jwks=/etc/keys.json&tenant-claim=org&role-claim=https://x.org/role',
      (c) => c.auth,
      {
        kind: 'jwt',
        issuer: 'me',
        audience: 'a b',
        jwks: { kind: 'file', file: '/etc/keys.json' },
        tenantClaim: 'org',
        roleClaim: 'https://x.org/role',
      },
    ],
    ['ITEMCACHE_RATE_LIMIT', '100', (c) => c.rateLimit, { perSecond: 100, burst: 100 }],
    ['ITEMCACHE_RATE_LIMIT', '100:500', (c) => c.rateLimit, { perSecond: 100, burst: 500 }],
    ['ITEMCACHE_TENANT_MEMORY_SHARE', '25', (c) => c.memory.tenantShare, 0.25],
  ])('%s=%s is understood', (name, text, read, expected) => {
    expect(read(parseConfig({ [name]: text }))).toEqual(expected)
  })

  test.each([
    ['DATABASE_URL', 'mysql://db/x'],
    ['REDIS_URL', 'localhost:6379'],
    ['REDIS_URL', 'redis://'],
    ['REDIS_URL', 'redis://a/name'],
    ['REDIS_URL', 'redis://a,rediss://b'],
    ['REDIS_URL', 'redis://a/1,redis://b/1'],
    ['REDIS_URL', 'redis://a,'],
    ['REDIS_URL', 'unix:relative.sock'],
    ['ORIGIN_URL', 'ftp://x'],
    ['ORIGIN_URL', 'http://x/?q=1'],
    ['ORIGIN_URL', 'http://x/#y'],
    ['ITEMCACHE_LISTEN', ':50051'],
    ['ITEMCACHE_LISTEN', '127.0.0.1'],
    ['ITEMCACHE_LISTEN', '127.0.0.1:65536'],
    ['ITEMCACHE_LISTEN', '::1:50051'],
    ['ITEMCACHE_LISTEN', '[localhost]:50051'],
    ['ITEMCACHE_LISTEN', 'off'],
    ['ITEMCACHE_ADMIN_LISTEN', 'of'],
    ['ITEMCACHE_LIVE_PAGE', 'on'],
    ['ITEMCACHE_LIVE_PAGE', 'a.example,,b.example'],
    ['ITEMCACHE_LIVE_PAGE', 'https://a.example'],
    ['ITEMCACHE_LIVE_PAGE', 'a.example:8080'],
    ['ITEMCACHE_RATE_LIMIT', '0'],
    ['ITEMCACHE_RATE_LIMIT', '10:0'],
    ['ITEMCACHE_RATE_LIMIT', '10/s'],
    ['ITEMCACHE_TENANT_MEMORY_SHARE', '0'],
    ['ITEMCACHE_TENANT_MEMORY_SHARE', '101'],
    ['ITEMCACHE_REFLECTION', 'maybe'],
    ['ITEMCACHE_LOG_LEVEL', 'loud'],
    ['ITEMCACHE_REDIS_EPOCH', '-1'],
    ['ITEMCACHE_MEMORY_MAX_ENTRIES', '0'],
    ['ITEMCACHE_MEMORY_MAX_ENTRIES', '1e5'],
    ['ITEMCACHE_MEMORY_MAX_BYTES', '256MB'],
    ['ITEMCACHE_MEMORY_MAX_BYTES', '1KiB'],
    ['ITEMCACHE_FRESH_FOR', '60'],
    ['ITEMCACHE_FRESH_FOR', '-1s'],
    ['ITEMCACHE_FRESH_FOR', '1d'],
    ['ITEMCACHE_MAX_DEADLINE', '25h'],
    ['ITEMCACHE_TTL_JITTER', '1.1'],
    ['ITEMCACHE_MAX_MESSAGE_BYTES', '1KiB'],
  ])('%s=%s is a mistake that names variable, rule and value', (name, text) => {
    expect(problemsOf({ [name]: text })).toEqual([
      {
        variable: name,
        rule: expect.stringMatching(/^(must|a cluster) /),
        value: expect.stringContaining(text),
      },
    ])
  })

  test.each([
    'basic',
    'tokens:',
    'jwt:https://issuer',
    'jwt:https://issuer?audience=a',
    'jwt:https://issuer?jwks=/keys',
    'jwt:https://issuer?audience=a&audience=b&jwks=/keys',
    'jwt:https://issuer?audience=&jwks=/keys',
    'jwt:https://issuer?audience=a&jwks=/keys&tenants=x',
    'jwt:https://issuer?audience=a&jwks=http://issuer/keys',
    'jwt:https://issuer?audience=a&jwks=ftp://issuer/keys',
  ])('ITEMCACHE_AUTH=%s is a mistake', (text) => {
    expect(problemsOf({ ITEMCACHE_AUTH: text })).toEqual([
      expect.objectContaining({ variable: 'ITEMCACHE_AUTH', rule: expect.stringMatching(/^must /) }),
    ])
  })

  test('is never silently taken for something else: whatever is accepted is within its bounds', () => {
    fc.assert(
      fc.property(
        fc.string({ unit: fc.constantFrom(...'0159.-eNnIifty ms hKMGB'), maxLength: 8 }),
        (text) => {
          try {
            const { memory, ttl } = parseConfig({
              ITEMCACHE_MEMORY_MAX_ENTRIES: text,
              ITEMCACHE_MEMORY_MAX_BYTES: text,
              ITEMCACHE_FRESH_FOR: text,
              ITEMCACHE_TTL_JITTER: text,
            })
            expect(Number.isSafeInteger(memory.maxEntries) && Number.isSafeInteger(memory.maxBytes)).toBe(
              true,
            )
            expect(Number.isSafeInteger(ttl.freshForMs) && ttl.jitter >= 0 && ttl.jitter <= 1).toBe(true)
          } catch (error) {
            expect(error).toBeInstanceOf(ConfigError)
          }
        },
      ),
    )
  })
})

describe('mistakes', () => {
  test('are reported all at once', () => {
    const problems = problemsOf({
      ITEMCACHE_LISTEN: 'nowhere',
      ITEMCACHE_FRESH_FOR: 'soon',
      ITEMCACHE_MEMORY_MAX_BYTES: '12 apples',
      ITEMCACHE_REDIS_TIMEOUT: '40s',
      ITEMCACHE_COLOUR: 'red',
    })
    expect(problems.map(({ variable }) => variable).toSorted()).toEqual([
      'ITEMCACHE_COLOUR',
      'ITEMCACHE_FRESH_FOR',
      'ITEMCACHE_LISTEN',
      'ITEMCACHE_MEMORY_MAX_BYTES',
      'ITEMCACHE_REDIS_TIMEOUT',
    ])
  })

  test('read as one sentence a line', () => {
    expect(() => parseConfig({ ITEMCACHE_REFLECTION: 'perhaps', ITEMCACHE_TTL_JITTER: '2' })).toThrow(
      'ITEMCACHE_REFLECTION must be true or false; got "perhaps"\nITEMCACHE_TTL_JITTER must be a number, 0 to 1; got "2"',
    )
  })

  test('cannot forge lines of their own', () => {
    const [problem] = problemsOf({ ITEMCACHE_LOG_LEVEL: 'a\nb\u001b[2J' })
    expect(problem?.value).toBe('"a\\nb\\u001b[2J"')
  })

  test('include a variable that does not exist, with the one that was probably meant', () => {
    expect(problemsOf({ ITEMCACHE_LISTN: 'x' })).toEqual([
      {
        variable: 'ITEMCACHE_LISTN',
        rule: 'is not a variable of ItemCache; did you mean ITEMCACHE_LISTEN?',
      },
    ])
    expect(problemsOf({ ITEMCACHE_SOMETHING_ELSE_ENTIRELY: 'x' })[0]?.rule).toContain('--help')
  })

  test('do not include what Kubernetes sets for a service called itemcache', () => {
    expect(
      problemsOf({
        ITEMCACHE_SERVICE_HOST: '10.0.0.1',
        ITEMCACHE_SERVICE_PORT: '50051',
        ITEMCACHE_SERVICE_PORT_GRPC: '50051',
        ITEMCACHE_PORT: 'tcp://10.0.0.1:50051',
        ITEMCACHE_PORT_50051_TCP: 'tcp://10.0.0.1:50051',
        ITEMCACHE_ADMIN_PORT_9464_TCP_ADDR: '10.0.0.1',
      }),
    ).toEqual([])
    expect(problemsOf({ ITEMCACHE_PORT: '50051' })).toHaveLength(1)
  })

  test.each(['0.0.0.0:50051', '[::]:50051', '192.168.1.5:50051', 'example.org:50051', '128.0.0.1:50051'])(
    'include the address %s, unless ITEMCACHE_INSECURE allows it',
    (address) => {
      for (const variable of ['ITEMCACHE_LISTEN', 'ITEMCACHE_ADMIN_LISTEN']) {
        expect(problemsOf({ [variable]: address })).toEqual([
          {
            variable,
            rule: expect.stringContaining('ITEMCACHE_INSECURE=true'),
            value: JSON.stringify(address),
          },
        ])
        expect(problemsOf({ [variable]: address, ITEMCACHE_INSECURE: 'true' })).toEqual([])
      }
    },
  )

  test('include an address of others without either TLS or authentication', () => {
    const open = { ITEMCACHE_LISTEN: '0.0.0.0:50051' }
    const tls = { ITEMCACHE_TLS_CERT: 'cert.pem', ITEMCACHE_TLS_KEY: 'key.pem' }
    const auth = { ITEMCACHE_AUTH: 'tokens:file' }
    const rules = (env: Record<string, string>) => problemsOf(env).map(({ rule }) => rule)
    expect(rules({ ...open, ...tls })).toEqual([
      expect.stringContaining('no authentication (ITEMCACHE_AUTH)'),
    ])
    expect(rules({ ...open, ...auth })).toEqual([expect.stringContaining('no TLS (ITEMCACHE_TLS_CERT')])
    expect(rules({ ...open, ...tls, ...auth })).toEqual([])
    expect(rules({ ...tls, ...auth, ITEMCACHE_ADMIN_LISTEN: '0.0.0.0:1' })).toHaveLength(1)
  })

  test.each([
    [{ ITEMCACHE_TLS_CERT: 'c' }, 'ITEMCACHE_TLS_KEY'],
    [{ ITEMCACHE_TLS_KEY: 'k' }, 'ITEMCACHE_TLS_CERT'],
    [{ ITEMCACHE_TLS_CLIENT_CA: 'a' }, 'ITEMCACHE_TLS_CERT'],
  ])('include TLS by halves: %o', (env, other) => {
    expect(problemsOf(env)).toEqual([
      { variable: Object.keys(env)[0], rule: `must be set together with ${other}` },
    ])
  })

  test('include one address for both servers, but not port 0 for both', () => {
    const both = (address: string) => ({ ITEMCACHE_LISTEN: address, ITEMCACHE_ADMIN_LISTEN: address })
    expect(problemsOf(both('127.0.0.1:7000'))).toHaveLength(1)
    expect(problemsOf(both('127.0.0.1:0'))).toEqual([])
  })

  test('include a wait that is not shorter than the longest call', () => {
    expect(problemsOf({ ITEMCACHE_MAX_DEADLINE: '3s' }).map(({ variable }) => variable)).toEqual([
      'ITEMCACHE_POSTGRES_STATEMENT_TIMEOUT',
      'ITEMCACHE_ORIGIN_TIMEOUT',
    ])
  })
})

describe('passwords', () => {
  test.each([
    ['DATABASE_URL', 'postgrs://user:hunter2@db/items'],
    ['DATABASE_URL', 'postgres//user:hunter2@db/items'],
    ['DATABASE_URL', 'postgrs://user:hun@ter2@db/items?password=hunter2'],
    ['DATABASE_URL', 'postgrs://user:12/hunter2@db/items'],
    ['DATABASE_URL', 'user:hunter2@db'],
    ['REDIS_URL', 'redis://:hunter2@'],
    ['REDIS_URL', 'default:hunter2@host:6379'],
    ['REDIS_URL', 'redis://:hunter2@a,rediss://:hunter2@b'],
    ['REDIS_URL', 'redis://:hunter2@a,redis://:hunter2'],
    ['ORIGIN_URL', 'https://hunter2@shop.org'],
    ['ORIGIN_URL', 'https://shop.org/?api_key=hunter2'],
    ['ITEMCACHE_SECRET', 'hunter2'],
  ])('in %s=%s are not shown when the value is wrong', (name, text) => {
    const [problem] = problemsOf({ [name]: text })
    expect(problem?.variable).toBe(name)
    expect(JSON.stringify(problem)).not.toContain('ter2')
  })

  test('are taken out of URLs wherever these stand in a text', () => {
    expect(withoutPasswords('lost redis://u:p@h:1/2 and https://token@x/y?a=1&access_token=t today')).toBe(
      'lost redis://u:***@h:1/2 and https://***@x/y?a=1&access_token=*** today',
    )
    expect(withoutPasswords('no URL: a@b')).toBe('no URL: a@b')
  })
})

describe('the file .env', () => {
  const directories: string[] = []
  afterEach(() => {
    for (const directory of directories.splice(0)) rmSync(directory, { recursive: true })
  })
  function directoryWith(text: string | undefined): string {
    const directory = mkdtempSync(join(tmpdir(), 'itemcache-config-'))
    directories.push(directory)
    if (text !== undefined) writeFileSync(join(directory, '.env'), text)
    return directory
  }

  test('is read from the working directory, and the environment wins', () => {
    const directory = directoryWith('# comment\nITEMCACHE_FRESH_FOR="5s"\nITEMCACHE_LOG_LEVEL=debug\n')
    const config = loadConfig({ ITEMCACHE_LOG_LEVEL: 'warn' }, directory)
    expect(config.ttl.freshForMs).toBe(5_000)
    expect(config.logLevel).toBe('warn')
    expect(config.dataDir).toBe(join(directory, '.itemcache'))
  })

  test('need not exist', () => {
    expect(loadConfig({}, directoryWith(undefined)).logLevel).toBe('info')
  })

  test('is held to the same rules', () => {
    expect(() => loadConfig({}, directoryWith('ITEMCACHE_FRESHFOR=5s\n'))).toThrow(
      'did you mean ITEMCACHE_FRESH_FOR?',
    )
  })
})

test('loopback is what only this machine can reach', () => {
  for (const host of ['127.0.0.1', '127.8.8.8', '::1', '0:0:0:0:0:0:0:1', '::ffff:127.0.0.1', 'LocalHost']) {
    expect(isLoopback(host), host).toBe(true)
  }
  for (const host of ['0.0.0.0', '::', '10.0.0.1', '::ffff:10.0.0.1', 'localhost.example.org', '']) {
    expect(isLoopback(host), host).toBe(false)
  }
})

test('an address is printed as it is written', () => {
  expect(formatAddress({ host: '::1', port: 1 })).toBe('[::1]:1')
  expect(formatAddress({ host: 'localhost', port: 1 })).toBe('localhost:1')
})

describe('every variable', () => {
  test('is in --help with its default', () => {
    const help = helpText()
    for (const variable of VARIABLES) {
      expect(help).toContain(
        `  ${variable.name}  ${variable.default === '' ? '(unset)' : variable.default}\n`,
      )
    }
    expect(Math.max(...help.split('\n').map((line) => line.length))).toBeLessThanOrEqual(110)
  })

  test('is in docs/configuration.md with its default and meaning', () => {
    const lines = readFileSync('docs/configuration.md', 'utf8').split('\n')
    for (const variable of VARIABLES) {
      const value = variable.default === '' ? 'unset' : `\`${variable.default}\``
      expect(lines).toContain(`| \`${variable.name}\` | ${value} | ${variable.description} |`)
    }
    const named = lines.flatMap((line) => /^\| `([A-Z_]+)`/.exec(line)?.[1] ?? [])
    expect(named).toEqual(VARIABLES.map(({ name }) => name))
  })
})
