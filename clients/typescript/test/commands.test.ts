/** Every command against a real service, and against none. */
import { execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { status } from '@grpc/grpc-js'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { newAuthority, newToken, temporaryFiles, tokenLine } from '../../../test/support/credentials.ts'
import { startService, type TestService } from '../../../test/support/service.ts'
import { FakeTerminal, itemcache, onTerminal, type Setting } from './program.ts'
import { startScriptedServer } from './scripted-server.ts'

const CLI = join(import.meta.dirname, '..', 'src', 'cli.ts')
const run = promisify(execFile)

const files = temporaryFiles()
let service: TestService

beforeAll(async () => {
  service = await startService()
})
afterAll(async () => {
  files[Symbol.dispose]()
  await service?.[Symbol.asyncDispose]()
})

const environment = () => ({ ITEMCACHE_TARGET: service.address, ITEMCACHE_TENANT: 'commands' })

/** The program against the service. */
function cli(argv: readonly string[], setting: Setting = {}) {
  const patient = argv.includes('--timeout') ? argv : ['--timeout', '30s', ...argv]
  return itemcache(patient, { ...setting, env: { ...environment(), ...setting.env } })
}

const documents = (stdout: string): unknown[] =>
  stdout
    .split('\n')
    .filter(Boolean)
    .map((line) => JSON.parse(line))

describe('put', () => {
  test('stores what flags describe, whether or not it existed, and unsets the rest', async () => {
    const first = await cli(['put', 'cup', '--title', 'Cup', '--price', '3 EUR', '--tag', 'kitchen'])
    expect(first).toMatchObject({ exitCode: 0, stderr: '' })
    expect(first.stdout).toMatch(/^title {8}Cup$/m)
    const second = await cli(['put', 'cup', '--title', 'Big cup', '--json'])
    const [{ item }] = documents(second.stdout) as [{ item: Record<string, unknown> }]
    expect(item).toMatchObject({ id: 'cup', title: 'Big cup' })
    expect(item).not.toHaveProperty('price')
    expect(item).not.toHaveProperty('tags')
  })

  test('stores JSON from stdin, under its own id or the one that is named', async () => {
    const json = JSON.stringify({ id: 'from-json', title: 'A', tags: ['x'] })
    expect(await cli(['put'], { stdin: json })).toMatchObject({ exitCode: 0, stderr: '' })
    expect(
      await cli(['put', 'other', '--json-input', '-'], { stdin: JSON.stringify({ title: 'B' }) }),
    ).toMatchObject({ exitCode: 0 })
    const read = await cli(['get-many', 'from-json', 'other', '--json'])
    expect(documents(read.stdout)).toMatchObject([
      { id: 'from-json', item: { title: 'A', tags: ['x'] } },
      { id: 'other', item: { title: 'B' } },
    ])
  })

  test('fails when somebody has changed the item since its etag was read', async () => {
    await cli(['put', 'guarded', '--title', 'A'])
    const read = await cli(['get', 'guarded', '--json'])
    const [{ item }] = documents(read.stdout) as [{ item: { etag: string } }]
    expect(await cli(['put'], { stdin: JSON.stringify(item) })).toMatchObject({ exitCode: 0 })
    await cli(['put', 'guarded', '--title', 'B'])
    const late = await cli(['put'], { stdin: JSON.stringify(item) })
    expect(late).toMatchObject({ exitCode: 1, stdout: '' })
    expect(late.stderr).toMatch(/^itemcache: ETAG_MISMATCH: /)
  })

  test.each([
    [[], '{"title":"no id"}', 'The item has no id'],
    [['a'], '', 'The item must be JSON'],
    [['a'], '{"id":"b"}', 'The JSON is about item "b"'],
  ])('put %j of %j is wrong usage', async (argv, stdin, message) => {
    const { exitCode, stderr } = await cli(['put', ...argv], { stdin })
    expect(exitCode).toBe(2)
    expect(stderr).toContain(message)
  })

  test('does not wait for somebody to type JSON', async () => {
    const terminal = new FakeTerminal(80, 24)
    expect(await onTerminal(terminal, ['put', 'a'], { env: environment() })).toBe(2)
    expect((await terminal.look()).lines[0]).toContain('describe the item with flags')
  })
})

describe('watch', () => {
  test('shows what comes after a revision, in order, and where to go on', async () => {
    await cli(['put', 'watched', '--title', 'A'])
    const [{ revision }] = documents((await cli(['put', 'watched', '--title', 'B', '--json'])).stdout) as [
      { revision: string },
    ]
    const after = String(BigInt(revision) - 1n)
    await cli(['invalidate', 'watched', '--remove'])
    await cli(['invalidate', '--tag', 'kitchen'])
    await cli(['delete', 'watched'])
    const { exitCode, stdout, stderr } = await cli(['watch', '--resume-after', after, '--count', '4'])
    expect(exitCode).toBe(0)
    expect(
      stdout
        .trimEnd()
        .split('\n')
        .map((line) => line.replace(/^\S+ {2}\d+ {2}/, '')),
    ).toEqual([
      'upserted            watched  by itemcache-cli',
      'keys-invalidated    watched (remove)  by itemcache-cli',
      'tags-invalidated    tag kitchen  by itemcache-cli',
      'deleted             watched  by itemcache-cli',
    ])
    const position = BigInt(revision) + 3n
    expect(stderr).toBe(
      `itemcache: watching what comes after revision ${after}\nitemcache: to go on: --resume-after ${position}\n`,
    )
  })

  test('prints JSON, of some items only, with the items themselves', async () => {
    const [{ revision }] = documents((await cli(['put', 'json-1', '--title', 'A', '--json'])).stdout) as [
      { revision: string },
    ]
    await cli(['put', 'json-2', '--title', 'B', '--tag', 'seen'])
    await cli(['put', 'json-3', '--title', 'C'])
    await cli(['put', 'json-1', '--title', 'D'])
    const argv = ['watch', 'json-1', '--tag', 'seen', '--items', '--json']
    const { stdout, stderr } = await cli([...argv, '--resume-after', revision, '--count', '2'])
    expect(stderr).toBe('')
    expect(documents(stdout)).toMatchObject([
      { started: { position: revision } },
      { event: { kind: 'INVALIDATION_KIND_UPSERTED', ids: ['json-2'], items: [{ title: 'B' }] } },
      { event: { ids: ['json-1'], items: [{ title: 'D' }], clientId: 'itemcache-cli' } },
    ])
  })

  test('ends without an error when it is interrupted', async () => {
    const interrupted = new AbortController()
    const watching = cli(['watch'], { interruption: interrupted.signal })
    await expect.poll(() => service.app.metrics.subscribers).toBeGreaterThan(0)
    interrupted.abort()
    const { exitCode, stdout, stderr } = await watching
    expect({ exitCode, stdout }).toEqual({ exitCode: 0, stdout: '' })
    expect(stderr).not.toContain('CANCELLED')
  })

  test('says that a revision is ahead of the log', async () => {
    const { exitCode, stderr } = await cli(['watch', '--resume-after', '9000000000000000000'])
    expect(exitCode).toBe(1)
    expect(stderr).toMatch(/^itemcache: REVISION_AHEAD|^itemcache: [A-Z_]+: /)
  })
})

describe('warm', () => {
  test('reads what arguments and a file name, each once, and tells where it came from', async () => {
    const ids = files.write('ids', '1\n2\r\n\n3\nnowhere\n1\n')
    const { exitCode, stdout, stderr } = await cli(['warm', '4', '2', '--file', ids])
    expect({ exitCode, stderr }).toEqual({ exitCode: 0, stderr: '' })
    expect(stdout).toMatch(/^5 of 5 ids in .+ \(.+\/s\): 4 items, 1 absent, 0 failed\nthey came from: /)
    const again = await cli(['warm', '--file', '-', '--json'], { stdin: '1\n2\n3\n4\n' })
    expect(documents(again.stdout)).toMatchObject([
      { ids: 4, items: 4, absent: 0, failed: 0, tiers: { memory: 4 }, failures: {} },
    ])
  })

  test('draws its progress on a terminal, and clears it in the end', async () => {
    const terminal = new FakeTerminal(80, 24)
    let drawn = ''
    const stderr = {
      isTTY: true,
      columns: 80,
      rows: 24,
      write: (text: string) => {
        drawn += text
        terminal.write(text)
      },
    }
    const { run: program } = await import('../src/command-line.ts')
    const ids = Array.from({ length: 250 }, (_, i) => `progress-${i}`)
    const io = { stdout: terminal, stderr, stdin: terminal, env: environment() }
    expect(await program(['warm', '--timeout', '30s', ...ids], io)).toBe(0)
    expect(drawn).toMatch(/█+░* +\d+ % {2}\d+\/250 {2}\d/)
    const { lines } = await terminal.look()
    expect(lines[0]).toMatch(/^250 of 250 ids in /)
    expect(lines.join('')).not.toContain('█')
  })

  test('tries again what may be over soon, and tells what failed', async () => {
    let calls = 0
    const failure = { code: status.UNAVAILABLE, reason: 'ORIGIN_TIMEOUT', message: 'too slow' }
    await using server = await startScriptedServer({
      batchGetItems: ({ request: { ids } }) => {
        calls++
        return {
          results: ids.map((id) =>
            id === 'never' || (id === 'later' && calls < 2)
              ? { id, result: { case: 'error', value: failure } }
              : { id, result: { case: 'item', value: { id } } },
          ),
        }
      },
    })
    const argv = ['warm', 'at-once', 'later', 'never', '--target', server.target]
    const { exitCode, stdout, stderr } = await cli(argv)
    expect(exitCode).toBe(4)
    expect(stdout).toMatch(/^2 of 3 ids .* 2 items, 0 absent, 1 failed\n/)
    expect(stderr).toBe('itemcache: ORIGIN_TIMEOUT 1, as: too slow\n')
    expect(calls).toBe(3)
  })

  test('a call that is refused as a whole is an error', async () => {
    const { exitCode, stdout, stderr } = await cli(['warm', '1', 'x'.repeat(129)])
    expect({ exitCode, stdout }).toEqual({ exitCode: 1, stdout: '' })
    expect(stderr).toMatch(/^itemcache: INVALID_FIELD: ids\[1\] must be/)
  })
})

describe('bench', () => {
  test('reads for the time that is given, and tells percentiles and tiers', async () => {
    const { exitCode, stdout, stderr } = await cli([
      'bench',
      '1',
      '--duration',
      '200ms',
      '--concurrency',
      '2',
    ])
    expect({ exitCode, stderr }).toEqual({ exitCode: 0, stderr: '' })
    expect(stdout).toMatch(/^calls {4}\d[\d,]* in \d.*\/s\nwith {5}2 callers, 1 connection, 1 ids\n/)
    expect(stdout).toMatch(/^latency {2}p50 .+ p90 .+ p99 .+ p99\.9 .+ max .+$/m)
    expect(stdout).toMatch(/^from {5}memory /m)
    expect(stdout).toMatch(/^errors {3}none$/m)
  })

  test.each([[['--batch', '3']], [['--pipeline', '--connections', '2']], [[]]])(
    'with %j, of what the database holds',
    async (flags) => {
      for (const id of ['a', 'b', 'c']) await cli(['put', `benched-${id}`, '--title', id])
      const { exitCode, stdout } = await cli(['bench', '--duration', '200ms', '--json', ...flags])
      expect(exitCode).toBe(0)
      const [{ calls, reads, latencyMs }] = documents(stdout) as [
        { calls: number; reads: number; latencyMs: Record<string, number> },
      ]
      expect(calls).toBeGreaterThan(0)
      expect(reads).toBe(flags.includes('--batch') ? calls * 3 : calls)
      expect(latencyMs['p50']).toBeGreaterThan(0)
      expect(latencyMs['max']).toBeGreaterThanOrEqual(latencyMs['p99'] ?? 0)
    },
  )

  test('without any item there is nothing to read', async () => {
    const { exitCode, stderr } = await cli(['bench', '--tenant', 'empty'])
    expect(exitCode).toBe(3)
    expect(stderr).toContain('there are no items to read')
  })

  test('that is interrupted tells what it has, and exits with 130', async () => {
    const interrupted = new AbortController()
    const reads = service.app.metrics.rpc('itemcache.v1.ItemCacheService/GetItem')
    const before = reads.started
    const benching = cli(['bench', '1', '--duration', '1m'], { interruption: interrupted.signal })
    await expect.poll(() => reads.started).toBeGreaterThan(before + 20)
    interrupted.abort()
    const { exitCode, stdout } = await benching
    expect(exitCode).toBe(130)
    expect(stdout).toMatch(/^calls {4}\d/)
  })
})

const COMMANDS: readonly [string, ...string[]][] = [
  ['get', '1'],
  ['get-many', '1'],
  ['list'],
  ['create', 'a'],
  ['put', 'a', '--title', 'A'],
  ['update', 'a', '--title', 'A'],
  ['delete', 'a'],
  ['invalidate', 'a'],
  ['inspect', 'a'],
  ['metrics'],
  ['watch'],
  ['top'],
  ['warm', '1'],
  ['bench', '1', '--duration', '100ms'],
]

describe.each(COMMANDS)('%s', (command, ...rest) => {
  const argv = [command, ...rest]

  test('tells in one line that the service is away, and exits with 4', { timeout: 30_000 }, async () => {
    const { exitCode, stdout, stderr } = await itemcache(argv, {
      env: { ITEMCACHE_TARGET: '127.0.0.1:1' },
    })
    expect({ exitCode, stdout: stdout.replace(/^time .*\n/, '') }).toEqual({ exitCode: 4, stdout: '' })
    expect(stderr).toBe('itemcache: cannot reach 127.0.0.1:1: is the service running? (npm start)\n')
  })

  test('does not know a wrong flag, and explains itself', async () => {
    const wrong = await cli([...argv, '--no-such-flag'])
    expect(wrong).toMatchObject({ exitCode: 2, stdout: '' })
    expect(wrong.stderr).toContain("unknown option '--no-such-flag'")
    const help = await cli([command, '--help'])
    expect(help).toMatchObject({ exitCode: 0, stderr: '' })
    expect(help.stdout).toContain(`Usage: itemcache ${command}`)
    for (const flag of ['--target', '--tenant', '--timeout', '--tls', '--ca', '--cert', '--key', '--json']) {
      expect(help.stdout).toContain(flag)
    }
  })
})

describe('JSON', () => {
  test('every command prints it', async () => {
    await cli(['put', 'a-json', '--title', 'A'])
    const short = ['--count', '1', '--interval', '100ms']
    const revision = documents((await cli(['get', 'a-json', '--json'])).stdout) as [{ revision: string }]
    const resume = ['--resume-after', String(BigInt(revision[0].revision) - 1n), '--count', '1']
    for (const argv of [
      ['get', 'a-json'],
      ['get-many', 'a-json', '1'],
      ['list', '--page-size', '2'],
      ['create', 'b-json'],
      ['update', 'a-json', '--title', 'B'],
      ['inspect', 'a-json'],
      ['invalidate', 'a-json'],
      ['delete', 'b-json'],
      ['metrics'],
      ['top', ...short],
      ['watch', ...resume],
      ['warm', '1'],
      ['bench', '1', '--duration', '100ms'],
    ]) {
      const { exitCode, stdout } = await cli([...argv, '--json'])
      expect(exitCode, argv.join(' ')).toBe(0)
      const found = documents(stdout)
      expect(found.length, argv.join(' ')).toBeGreaterThan(0)
      for (const document of found) expect(document).toBeTypeOf('object')
    }
  })
})

describe('wrong usage', () => {
  test.each([
    [['warm'], 'name ids, or a file'],
    [['warm', '--file', '/no/such/file'], '--file: cannot read /no/such/file (ENOENT)'],
    [['warm', '1', '--concurrency', '0'], 'It must be 1 to 64.'],
    [['bench', '--duration', '2m'], 'It must be 100ms to 1m.'],
    [['bench', '--batch', '501'], 'It must be 1 to 500.'],
    [['bench', '--batch', '5', '--pipeline'], 'cannot be used with'],
    [['top', '--interval', '50ms'], 'It must be 100ms to 1h.'],
    [['top', '--count', '0'], 'It must be at least 1.'],
    [['watch', '--resume-after', 'x'], 'A revision is a whole number'],
    [['get', '1', '--cert', 'x'], '--cert and --key go together'],
    [['get', '1', '--tls'], 'TLS to an IP address needs --server-name'],
    [['get', '1', '--ca', '/no/such/ca', '--server-name', 'x'], '--ca: cannot read /no/such/ca (ENOENT)'],
    [['get', '1', '--tenant', 'ä'], 'metadata x-tenant-id is not valid'],
    [['completion', 'tcsh'], 'Allowed choices are'],
    [['metrics', '--watch', '--interval', '10ms'], 'It must be 100ms to 1h'],
  ])('%j is told on stderr, with exit code 2', async (argv, message) => {
    const { exitCode, stdout, stderr } = await cli(argv)
    expect({ exitCode, stdout }).toEqual({ exitCode: 2, stdout: '' })
    expect(stderr).toMatch(/^itemcache: /)
    expect(stderr).toContain(message)
  })

  test('a token is not sent to another machine without TLS', async () => {
    const env = { ITEMCACHE_TARGET: 'cache.invalid:1', ITEMCACHE_TOKEN: 'secret' }
    const { exitCode, stderr } = await itemcache(['get', '1'], { env })
    expect(exitCode).toBe(2)
    expect(stderr).toBe('itemcache: a token is sent to other machines with TLS only\n')
  })
})

test('TLS, mTLS and tokens: who is not let in is told', async () => {
  const authority = await newAuthority('one')
  const [server, own] = [await authority.issue('server'), await authority.issue('somebody')]
  const token = newToken()
  const ca = files.write('ca.pem', authority.cert)
  await using secure = await startService({
    env: {
      ITEMCACHE_TLS_CERT: files.write('server.pem', server.cert),
      ITEMCACHE_TLS_KEY: files.write('server-key.pem', server.key),
      ITEMCACHE_TLS_CLIENT_CA: ca,
      ITEMCACHE_AUTH: `tokens:${files.write('tokens', tokenLine(token, 'commands', 'reader'))}`,
    },
  })
  const cert = ['--cert', files.write('own.pem', own.cert), '--key', files.write('own-key.pem', own.key)]
  const trusting = ['--timeout', '30s', '--ca', ca, ...cert]
  const env = { ITEMCACHE_TARGET: secure.address.replace('127.0.0.1', 'localhost'), ITEMCACHE_TOKEN: token }
  expect(await itemcache(['get', '1', ...trusting], { env })).toMatchObject({ exitCode: 0, stderr: '' })
  const byAddress = { ...env, ITEMCACHE_TARGET: secure.address }
  const named = ['get', '1', ...trusting, '--server-name', 'localhost']
  expect(await itemcache(named, { env: byAddress })).toMatchObject({ exitCode: 0, stderr: '' })

  const reader = await itemcache(['put', 'a', '--title', 'A', ...trusting], { env })
  expect(reader).toMatchObject({ exitCode: 1, stdout: '' })
  const nobody = await itemcache(['get', '1', ...trusting], { env: { ...env, ITEMCACHE_TOKEN: '' } })
  expect(nobody).toMatchObject({ exitCode: 1, stdout: '' })
  // Without --ca the certificate is nobody's that Node trusts.
  const distrusting = await itemcache(['get', '1', '--tls'], { env })
  expect(distrusting.exitCode).toBe(4)
  expect(distrusting.stderr).toMatch(/^itemcache: cannot reach localhost:\d+: .*certificate/)
})

test('a service without TLS is told from one that is not there', async () => {
  const plain = createServer((socket) => {
    socket.on('error', () => {})
    socket.write('HTTP/1.1 400 Bad Request\r\n\r\n')
  })
  plain.listen(0, '127.0.0.1')
  await once(plain, 'listening')
  const address = plain.address()
  if (address === null || typeof address === 'string') throw new Error('it does not listen')
  const target = `127.0.0.1:${address.port}`
  const argv = ['watch', '--tls', '--server-name', 'localhost', '--timeout', '30s', '--target', target]
  const { exitCode, stdout, stderr } = await itemcache(argv)
  plain.close()
  expect({ exitCode, stdout }).toEqual({ exitCode: 4, stdout: '' })
  expect(stderr).toBe(`itemcache: cannot reach ${target}: TLS: wrong version number: does it speak TLS?\n`)
})

describe('serve', () => {
  test('becomes the service, where the repository is', async () => {
    const { stdout } = await run(process.execPath, [CLI, 'serve', '--', '--help'])
    expect(stdout).toMatch(/^itemcache \d/)
    expect(stdout).toContain('ITEMCACHE_LISTEN')
  })

  test('says how to get the service, where it is not', async () => {
    const { exitCode, stderr } = await itemcache(['serve'])
    expect(exitCode).toBe(1)
    expect(stderr).toMatch(/^itemcache: this package is the client, .* npm start there\n$/)
  })
})

describe('completion', () => {
  const out = async (...argv: string[]) => (await run(process.execPath, [CLI, ...argv])).stdout

  test.each(['bash', 'zsh', 'fish'])('%s gets a script', async (shell) => {
    const script = await out('completion', shell)
    expect(script).toContain('itemcache complete --')
  })

  test('bash completes with the script, given what the package bash-completion defines', async () => {
    const bash = `
      _get_comp_words_by_ref() { words=("\${COMP_WORDS[@]}") cword=$COMP_CWORD cur=\${COMP_WORDS[COMP_CWORD]}; }
      itemcache() { '${process.execPath}' '${CLI}' "$@"; }
      ${await out('completion', 'bash')}
      COMP_WORDS=(itemcache inv) COMP_CWORD=1
      __itemcache_complete 2> /dev/null
      printf '%s\\n' "\${COMPREPLY[@]}"`
    expect((await run('bash', ['--norc', '-c', bash])).stdout).toBe('invalidate\n')
  })

  test('completes commands and their flags', async () => {
    expect(await out('complete', '--', 'inv')).toMatch(/^invalidate\t/)
    expect(await out('complete', '--', 'get', '--fr')).toMatch(/^--fresh\t/)
  })
})

test('Ctrl-C ends the process of a watch with code 0, after a last word', async () => {
  const child = spawn(process.execPath, [CLI, 'watch'], { env: { ...process.env, ...environment() } })
  let stderr = ''
  child.stderr.on('data', (bytes) => {
    stderr += bytes
  })
  const ended = once(child, 'exit')
  await expect.poll(() => stderr).toContain('watching what comes after')
  child.kill('SIGINT')
  expect(await ended).toEqual([0, null])
  expect(stderr).toContain('to go on: --resume-after')
})
