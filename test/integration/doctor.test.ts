import { execFile } from 'node:child_process'
import { generateKeyPairSync } from 'node:crypto'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, inject, test } from 'vitest'
import { parseConfig } from '../../src/config.ts'
import { examine } from '../../src/doctor/examine.ts'
import { checkFiles, checkMemory, checkNode } from '../../src/doctor/machine.ts'
import { checkClock, checkExpiry } from '../../src/doctor/measures.ts'
import { checkMemory as checkRedisMemory } from '../../src/doctor/redis.ts'
import { exitCodeOf, type Finding, formatReport, Report } from '../../src/doctor/report.ts'
import { connectPostgres } from '../../src/tiers/postgres.ts'
import { newAuthority } from '../support/credentials.ts'
import { startCluster } from '../support/redis-cluster.ts'
import { type DeployedOptions, type DeployedRedis, startDeployedRedis } from '../support/redis-deployed.ts'
import { freePort, type RedisProcess, startRedisProcess } from '../support/redis-process.ts'
import { startSentinels } from '../support/redis-sentinels.ts'
import { makeRunDirectory, type RunDirectory } from '../support/run-directory.ts'
import { freshDatabase, freshPostgres } from '../support/servers.ts'
import { connectSql } from './postgres-fixture.ts'

const held = new AsyncDisposableStack()
let directory: RunDirectory
let deployed: DeployedRedis
let database: string
let authority: Awaited<ReturnType<typeof newAuthority>>
let pair: Awaited<ReturnType<typeof authority.issue>>

beforeAll(async () => {
  directory = held.use(makeRunDirectory())
  authority = await newAuthority('doctor')
  pair = await authority.issue('redis')
  deployed = held.use(await asDeployed('deployed'))
  const own = held.use(await freshDatabase())
  database = own.url
  await (await connectPostgres({ url: database }))[Symbol.asyncDispose]()
})
afterAll(() => held.disposeAsync())

function asDeployed(name: string, options: Partial<DeployedOptions> = {}): Promise<DeployedRedis> {
  return startDeployedRedis({
    directory,
    name,
    cacheDir: inject('redisCache'),
    pair,
    ca: authority.cert,
    ...options,
  })
}

function redisWith(name: string, ...args: readonly string[]): Promise<RedisProcess> {
  return startRedisProcess({
    directory,
    name,
    cacheDir: inject('redisCache'),
    args: (port) => ['--port', `${port}`, '--bind', '127.0.0.1', '--save', '', ...args],
  })
}

const urlOf = ({ port }: RedisProcess) => `redis://127.0.0.1:${port}`

interface Examined {
  readonly code: number
  readonly findings: readonly Finding[]
  /** What a check found. */
  of(check: string): readonly Finding[]
  /** The checks with this verdict. */
  with(verdict: Finding['verdict']): readonly string[]
}

/** An environment in which all is well, but for `env`. */
const environment = (env: Readonly<Record<string, string>>) => ({
  DATABASE_URL: database,
  REDIS_URL: deployed.url,
  ORIGIN_URL: 'off',
  ITEMCACHE_LISTEN: '127.0.0.1:0',
  ITEMCACHE_ADMIN_LISTEN: '127.0.0.1:0',
  ITEMCACHE_MAX_CONNECTIONS: '100',
  // How long things take here says nothing of them.
  ITEMCACHE_REDIS_TIMEOUT: '20s',
  ITEMCACHE_SOFT_TIMEOUT: '20s',
  ITEMCACHE_POSTGRES_CONNECT_TIMEOUT: '20s',
  ITEMCACHE_POSTGRES_STATEMENT_TIMEOUT: '20s',
  ...env,
})

async function examined(env: Readonly<Record<string, string>> = {}, instances = 1): Promise<Examined> {
  const { findings } = await examine({ instances, env: environment(env) })
  return {
    code: exitCodeOf(findings, { strict: false }),
    findings,
    of: (check) => findings.filter((finding) => finding.check === check),
    with: (verdict) => [
      ...new Set(findings.filter((each) => each.verdict === verdict).map(({ check }) => check)),
    ],
  }
}

/** Runs a program with such an environment. */
function run(
  program: string,
  args: readonly string[],
  env: Readonly<Record<string, string>> = {},
): Promise<{ readonly code: number; readonly stdout: string; readonly stderr: string }> {
  const file = join(import.meta.dirname, '../..', program)
  return new Promise((done) => {
    execFile(
      process.execPath,
      [file, ...args],
      { cwd: directory.path, env: { PATH: process.env['PATH'], ...environment(env) } },
      (error, stdout, stderr) => done({ code: error === null ? 0 : Number(error.code), stdout, stderr }),
    )
  })
}

/** Round trips on a busy machine may be slow. */
const apartFromTime = (checks: readonly string[]) => checks.filter((check) => !check.endsWith('.round-trip'))

describe('a set-up as it should be', () => {
  test('has no fault and no warning: deploy/redis, a role that owns its database', async () => {
    const found = await examined()
    expect(apartFromTime([...found.with('fault'), ...found.with('warning')])).toEqual([])
    expect(found.code).toBe(0)
    // The service's user may not give CONFIG, and the doctor says what it could not look at.
    expect(found.with('unknown')).toEqual(['redis.settings'])
    expect(found.of('redis.acl')).toMatchObject([{ verdict: 'ok' }])
    expect(found.of('redis.permissions')).toMatchObject([{ verdict: 'ok' }])
  })

  test('is looked at to the end by an administrator of Redis, whose rights are then the only complaint', async () => {
    const found = await examined({ REDIS_URL: deployed.adminUrl })
    expect(apartFromTime([...found.with('fault'), ...found.with('unknown')])).toEqual([])
    expect(apartFromTime(found.with('warning'))).toEqual(['redis.acl'])
    expect(found.of('redis.acl')[0]?.text).toBe('the user may also give KEYS, FLUSHALL, FLUSHDB, CONFIG')
    expect(found.of('redis.lazyfree')).toMatchObject([{ verdict: 'ok' }])
    expect(found.of('redis.timeout')).toMatchObject([
      { verdict: 'ok', text: expect.stringContaining('300 s') },
    ])
    expect(exitCodeOf(found.findings, { strict: true })).toBe(1)
  })

  test('is left as it was', async () => {
    await using sql = await connectSql(database)
    const rows = () => sql('SELECT * FROM tenants')
    // What the doctor stores ends by itself, also what the tests before have stored.
    const isEmpty = () => expect.poll(() => deployed.client.dbsize()).toBe(0)
    const before = await rows()
    await isEmpty()
    await examined()
    expect(await rows()).toEqual(before)
    await isEmpty()
  })
})

describe('a Redis', () => {
  test('without a limit, that refuses when it is full and frees memory while callers wait, is told so', async () => {
    await using redis = await redisWith('plain')
    const found = await examined({ REDIS_URL: urlOf(redis) })
    expect(found.code).toBe(1)
    expect(found.with('fault')).toEqual(expect.arrayContaining(['redis.maxmemory', 'redis.maxmemory-policy']))
    expect(found.with('warning')).toEqual(
      expect.arrayContaining(['redis.lazyfree', 'redis.timeout', 'redis.acl']),
    )
    expect(found.of('redis.maxmemory')[0]?.mend).toContain('70 %')
  })

  test('that is given more than the machine has room for is told so', async () => {
    await using redis = await redisWith('greedy', '--maxmemory', '9000gb')
    expect((await examined({ REDIS_URL: urlOf(redis) })).of('redis.maxmemory')).toMatchObject([
      { verdict: 'fault', text: expect.stringContaining('no room') },
    ])
  })

  test('with room for so many instances, but not besides those who are connected, is a fault', async () => {
    await using redis = await redisWith('few', '--maxclients', '20')
    // Of 20, 16 may be taken: as many as eight instances need.
    expect((await examined({ REDIS_URL: urlOf(redis) }, 8)).of('redis.clients')).toMatchObject([
      { verdict: 'fault', text: expect.stringContaining('8 instances need another 16') },
    ])
    expect((await examined({ REDIS_URL: urlOf(redis) }, 1)).of('redis.clients')).toMatchObject([
      { verdict: 'ok' },
    ])
  })

  test('that is full and makes no room cannot be stored in', async () => {
    await using redis = await redisWith('full', '--maxmemory', '1kb')
    const [finding] = (await examined({ REDIS_URL: urlOf(redis) })).of('redis.permissions')
    expect(finding).toMatchObject({ verdict: 'fault', mend: expect.stringContaining('allkeys-lru') })
  })

  test('whose user lacks a command that the service needs is a fault, with the command in it', async () => {
    await using redis = await asDeployed('strict', {
      users: (acl) => acl.replace(' +evalsha', '').replace(' +getrange', '').replace(' +eval', ''),
    })
    const [finding] = (await examined({ REDIS_URL: redis.url })).of('redis.permissions')
    expect(finding).toMatchObject({ verdict: 'fault', text: expect.stringMatching(/store a copy.*'eval'/) })
  })

  test('with a wrong password, a certificate of others, or nobody there, is a fault that says which', async () => {
    const wrong = await examined({ REDIS_URL: deployed.url.replace('CHANGE-ME-SERVICE', 'guess') })
    expect(wrong.of('redis.connection')).toMatchObject([
      {
        verdict: 'fault',
        text: expect.stringContaining('WRONGPASS'),
        mend: expect.stringContaining('password'),
      },
    ])
    expect(JSON.stringify(wrong.findings)).not.toContain('guess')
    const foreign = await examined({ REDIS_URL: deployed.url.replace(/\?.*/, '') })
    expect(foreign.of('redis.connection')).toMatchObject([
      { verdict: 'fault', mend: expect.stringContaining('?ca=') },
    ])
    const nobody = await examined({ REDIS_URL: `redis://127.0.0.1:${await freePort()}` })
    expect(nobody.of('redis.connection')).toMatchObject([
      { verdict: 'fault', text: expect.stringContaining('ECONNREFUSED') },
    ])
  })

  test.each([
    ['1.1', 'ok', 'holds'],
    ['1.6', 'warning', 'fragmented'],
    ['0.5', 'warning', 'swapped'],
  ])('whose process holds %s times of what is used: %s', (ratio, verdict, text) => {
    const report = new Report()
    const info = {
      maxmemory: 2 ** 31,
      maxmemory_policy: 'allkeys-lru',
      used_memory: 2 ** 28,
      mem_fragmentation_ratio: ratio,
    }
    checkRedisMemory(report, new Map(Object.entries(info).map(([name, value]) => [name, `${value}`])))
    const [found] = report.findings.filter(({ check }) => check === 'redis.fragmentation')
    expect(found).toMatchObject({ verdict, text: expect.stringContaining(text) })
  })

  test('whose sentinels are too few to replace it is a warning', async () => {
    await using watched = await startSentinels({ directory, name: 'watched', cacheDir: inject('redisCache') })
    const whole = await examined({ REDIS_URL: watched.url })
    expect(whole.of('redis.sentinels')).toMatchObject([{ verdict: 'ok' }])
    // The first that is named among them: another is asked.
    const [first, second, last] = watched.sentinels
    await Promise.all([first?.kill(), second?.kill()])
    await expect
      .poll(() => last?.client.call('SENTINEL', 'CKQUORUM', 'shop').catch(String), { timeout: 20_000 })
      .toContain('NOQUORUM')
    const broken = await examined({ REDIS_URL: watched.url })
    expect(broken.of('redis.sentinels')).toMatchObject([
      { verdict: 'warning', text: expect.stringContaining('NOQUORUM') },
    ])
  })

  test('of three primaries without replicas, one of which is dead, is told both', async () => {
    await using cluster = await startCluster({
      directory,
      name: 'doctor',
      cacheDir: inject('redisCache'),
      nodeTimeoutMs: 2_000,
    })
    const whole = await examined({ REDIS_URL: cluster.url })
    expect(whole.of('redis.cluster')).toMatchObject([{ verdict: 'ok' }])
    expect(whole.of('redis.replicas')).toMatchObject([{ verdict: 'warning' }])
    expect(new Set(whole.of('redis.maxmemory').map(({ where }) => where)).size).toBe(3)
    const [lost, kept] = cluster.primaries
    await lost?.kill()
    await expect.poll(() => kept?.client.cluster('INFO')).toMatch(/cluster_slots_fail:[1-9]/)
    const broken = await examined({ REDIS_URL: cluster.url })
    expect(broken.of('redis.cluster')).toMatchObject([{ verdict: 'fault' }])
    expect(broken.of('redis.connection')).toContainEqual(
      expect.objectContaining({ verdict: 'fault', where: `127.0.0.1:${lost?.port}` }),
    )
  })
})

describe('a PostgreSQL', () => {
  test('whose role is a superuser is a warning, and a fault where callers are told apart', async () => {
    await using own = await freshDatabase()
    const found = await examined({ DATABASE_URL: own.superuserUrl })
    expect(found.of('postgres.role')).toMatchObject([{ verdict: 'warning' }])
    // Nor has anybody made the schema yet.
    expect(found.of('postgres.migrations')).toMatchObject([
      { verdict: 'warning', text: expect.stringContaining('1 (tables)') },
    ])
  })

  test('that a newer release has been at is a fault, and so is one whose migrations were edited', async () => {
    await using own = await freshDatabase()
    await (await connectPostgres({ url: own.url }))[Symbol.asyncDispose]()
    await using sql = await connectSql(own.url)
    await sql(`INSERT INTO itemcache_migrations (version, name, checksum) VALUES (99, 'later', 'x')`)
    const newer = await examined({ DATABASE_URL: own.url })
    expect(newer.code).toBe(1)
    expect(newer.of('postgres.migrations')).toMatchObject([
      { verdict: 'fault', text: expect.stringContaining('schema version 99') },
    ])
    await sql('DELETE FROM itemcache_migrations WHERE version = 99')
    await sql(`UPDATE itemcache_migrations SET checksum = 'edited' WHERE version = 1`)
    const edited = await examined({ DATABASE_URL: own.url })
    expect(edited.of('postgres.migrations')).toMatchObject([
      { verdict: 'fault', mend: expect.stringContaining('edited') },
    ])
  })

  test('with row security off, a trigger off, and a table that the role may not write is told each', async () => {
    await using own = await freshDatabase()
    await (await connectPostgres({ url: own.url }))[Symbol.asyncDispose]()
    await using sql = await connectSql(own.url)
    await sql('ALTER TABLE items DISABLE ROW LEVEL SECURITY')
    await sql('ALTER TABLE items DISABLE TRIGGER items_log_update')
    await sql('REVOKE INSERT ON requests FROM CURRENT_USER')
    const { of, code } = await examined({ DATABASE_URL: own.url })
    expect(code).toBe(1)
    expect(of('postgres.row-security')).toMatchObject([
      { verdict: 'fault', text: expect.stringContaining('items') },
    ])
    expect(of('postgres.triggers')).toMatchObject([
      { verdict: 'fault', text: expect.stringContaining('items_log_update') },
    ])
    expect(of('postgres.permissions')).toMatchObject([
      { verdict: 'fault', text: expect.stringContaining('requests') },
    ])
  })

  test('with fewer connections than so many instances take is a fault', async () => {
    const { of } = await examined({}, 1_000)
    expect(of('postgres.connections')).toMatchObject([
      { verdict: 'fault', text: expect.stringContaining('1000 instances need 13 connections each') },
    ])
  })

  test('counts the connections of other roles, which a role sees less of, and those kept for others', async () => {
    await using server = await freshPostgres()
    {
      await using sql = await connectSql(server.url)
      await sql(`CREATE ROLE service LOGIN PASSWORD 'service'`)
      await sql(`CREATE ROLE shop LOGIN PASSWORD 'shop'`)
      await sql('GRANT CREATE ON SCHEMA public TO service')
      await sql('ALTER SYSTEM SET max_connections = 50')
      await sql('ALTER SYSTEM SET reserved_connections = 7')
    }
    await server.restart()
    const as = (role: string) => Object.assign(new URL(server.url), { username: role, password: role }).href
    await using shop = await connectSql(as('shop'))
    await shop('SELECT')
    // 50 without the three that are for superusers and the seven that are reserved.
    expect((await examined({ DATABASE_URL: as('service') })).of('postgres.connections')).toMatchObject([
      { text: expect.stringMatching(/others have 1, of 40$/) },
    ])
  })

  test('that cannot be reached, or does not know the password, is a fault that says which', async () => {
    const nobody = await examined({ DATABASE_URL: `postgres://u:secret@127.0.0.1:${await freePort()}/d` })
    expect(nobody.code).toBe(1)
    expect(nobody.of('postgres.connection')).toMatchObject([
      { verdict: 'fault', text: expect.stringContaining('ECONNREFUSED') },
    ])
    expect(JSON.stringify(nobody.findings)).not.toContain('secret')
  })

  test('whose commits are not on disk is a fault', async () => {
    await using own = await freshDatabase()
    await using sql = await connectSql(own.superuserUrl)
    await sql(`ALTER DATABASE ${own.name} SET synchronous_commit = off`)
    expect((await examined({ DATABASE_URL: own.url })).of('postgres.durability')).toMatchObject([
      { verdict: 'fault' },
    ])
  })
})

describe('the machine and the rest', () => {
  test('a catalogue that nobody serves and an address that is taken are faults', async () => {
    const { of, code } = await examined({
      ORIGIN_URL: `http://127.0.0.1:${await freePort()}`,
      ITEMCACHE_LISTEN: `127.0.0.1:${deployed.port}`,
    })
    expect(code).toBe(1)
    expect(of('origin.connection')).toMatchObject([{ verdict: 'fault' }])
    expect(of('machine.grpc-address')).toMatchObject([
      { verdict: 'fault', text: expect.stringContaining('another process') },
    ])
  })

  test('an issuer whose keys cannot be had is a fault, and one that has some is not', async () => {
    let answer = ''
    await using issuer = createServer((_, response) => response.end(answer))
    await new Promise<void>((done) => issuer.listen(0, '127.0.0.1', done))
    const { port } = issuer.address() as AddressInfo
    const { publicKey } = generateKeyPairSync('ed25519')
    const examinedAt = async (at: number) =>
      (
        await examined({
          ITEMCACHE_AUTH: `jwt:https://issuer.example?audience=items&jwks=http://127.0.0.1:${at}/jwks`,
        })
      ).of('machine.auth')
    expect(await examinedAt(await freePort())).toMatchObject([
      { verdict: 'fault', text: expect.stringContaining('ECONNREFUSED') },
    ])
    for (answer of ['Welcome', '{"issuer":"https://issuer.example"}', '{"keys":[]}']) {
      expect(await examinedAt(port)).toMatchObject([
        { verdict: 'fault', text: expect.stringContaining('the keys of the issuer cannot be had') },
      ])
    }
    answer = JSON.stringify({ keys: [publicKey.export({ format: 'jwk' })] })
    expect(await examinedAt(port)).toMatchObject([{ verdict: 'ok' }])
  })

  test('variables that cannot be used are named, and nothing else is examined', async () => {
    const { findings, code } = await examined({ ITEMCACHE_FRESH_FOR: 'soon', ITEMCACHE_LISTENS: '1' })
    expect(code).toBe(1)
    expect(findings.map(({ text }) => text)).toEqual([
      expect.stringContaining('ITEMCACHE_LISTENS'),
      expect.stringContaining('ITEMCACHE_FRESH_FOR'),
    ])
  })

  test('the program says it to people and to programs, and by its exit code; so does itemcache doctor', async () => {
    const [main, cli] = ['src/doctor/main.ts', 'clients/typescript/src/cli.ts']
    const [people, programs, wrong] = await Promise.all([
      run(main, ['--instances', '1000']),
      run(cli, ['--json', 'doctor'], { REDIS_URL: 'redis://127.0.0.1:1' }),
      run(cli, ['doctor', '--', '--instances', 'many']),
    ])
    expect(people).toMatchObject({
      code: 1,
      stdout: expect.stringMatching(/FAULT +postgres.connections: .*\n +→ .*ITEMCACHE_POSTGRES_POOL/),
    })
    expect(people.stdout).toMatch(/\n1 faults, \d+ warnings, \d+ ok, 1 not known\n$/)
    expect(programs.code).toBe(1)
    expect(JSON.parse(programs.stdout)).toMatchObject({
      healthy: false,
      findings: expect.arrayContaining([
        expect.objectContaining({ check: 'redis.connection', verdict: 'fault' }),
      ]),
    })
    expect(wrong).toMatchObject({ code: 2, stdout: '', stderr: expect.stringContaining('--instances') })
  })

  const verdictOf = (check: (report: Report) => void) => {
    const report = new Report()
    check(report)
    return report.findings[0]?.verdict
  }
  const config = parseConfig({})

  test.each([
    ['a Node that is too old', 'fault', (report) => checkNode(report, '24.16.9')],
    ['a Node that will do', 'ok', (report) => checkNode(report, '24.17.0')],
    ['too few open files', 'fault', (report) => checkFiles(report, config, 512)],
    ['few open files', 'warning', (report) => checkFiles(report, config, 1_024)],
    ['enough open files', 'ok', (report) => checkFiles(report, config, 65_536)],
    ['a container too small for the copies', 'fault', (report) => checkMemory(report, config, 2 ** 28)],
    ['a container too small for the worst', 'warning', (report) => checkMemory(report, config, 2 ** 29)],
    ['a clock that is a minute ahead', 'fault', (report) => checkClock(report, 'c', 'its', 60_000)],
    ['a clock that is 2 s behind', 'warning', (report) => checkClock(report, 'c', 'its', -2_000)],
    ['a clock that is right', 'ok', (report) => checkClock(report, 'c', 'its', 200)],
    [
      'a certificate that has ended',
      'fault',
      (report) => checkExpiry(report, 'c', 'its', 'Jan 1 00:00:00 2020 GMT'),
    ],
    [
      'a certificate that ends soon',
      'warning',
      (report) => checkExpiry(report, 'c', 'its', new Date(Date.now() + 5 * 86_400_000).toUTCString()),
    ],
  ] as const satisfies readonly [string, Finding['verdict'], (report: Report) => void][])(
    '%s: %s',
    (_, verdict, check) => {
      expect(verdictOf(check)).toBe(verdict)
    },
  )

  test('a report says where, what, and how to mend it, and counts at the end', () => {
    const report = new Report()
    report.ok('a.b', 'fine')
    report.at('node:1').fault('a.c', 'broken', 'Mend it.')
    expect(formatReport(report.findings)).toBe(
      'ok       a.b: fine\nFAULT    a.c [node:1]: broken\n         → Mend it.\n\n1 faults, 0 warnings, 1 ok\n',
    )
  })
})
