import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { Readable } from 'node:stream'
import { Metadata, status } from '@grpc/grpc-js'
import { describe, expect, test } from 'vitest'
import { run } from '../src/command-line.ts'
import { CacheOutcome, Freshness, InvalidationMode, Tier } from '../src/gen/itemcache/v1/item_cache_pb.ts'
import { refusal, type Script, startScriptedServer } from './scripted-server.ts'

interface Setting {
  readonly env?: Record<string, string>
  readonly stdin?: string
  readonly terminal?: boolean
}

/** What the program writes and exits with. */
async function itemcache(argv: readonly string[], { env = {}, stdin = '', terminal = false }: Setting = {}) {
  const written = { stdout: '', stderr: '' }
  const output = (name: keyof typeof written) => ({
    write: (text: string) => {
      written[name] += text
    },
    isTTY: terminal,
    columns: 80,
  })
  const io = { stdout: output('stdout'), stderr: output('stderr'), stdin: Readable.from([stdin]), env }
  const exitCode = await run(argv, io)
  return { exitCode, ...written }
}

/** The same against a scripted server. */
async function against(script: Script, argv: readonly string[], setting: Setting = {}) {
  await using server = await startScriptedServer(script)
  return await itemcache(argv, { ...setting, env: { ITEMCACHE_TARGET: server.target, ...setting.env } })
}

const backpack = { id: '1', title: 'Backpack', etag: '"h"', revision: 17n }
const hit = { tier: Tier.MEMORY, outcome: CacheOutcome.HIT, asOf: 17n }
const found: Script = {
  getItem: () => ({ result: { case: 'item', value: backpack }, cache: hit, revision: 17n }),
}

describe('get', () => {
  test('prints the item and where it came from', async () => {
    const { exitCode, stdout, stderr } = await against(found, ['get', '1'])
    expect(exitCode).toBe(0)
    expect(stdout).toMatch(/^id {11}1\ntitle {8}Backpack\n/)
    expect(stdout).toMatch(/\n\nfrom MEMORY \(HIT\), revision 17\n$/)
    expect(stderr).toBe('')
  })

  test('prints the answer as one line of JSON, flags before or after the command', async () => {
    for (const argv of [
      ['get', '1', '--json'],
      ['--json', 'get', '1'],
    ]) {
      const { stdout } = await against(found, argv)
      expect(stdout.trimEnd()).not.toContain('\n')
      expect(JSON.parse(stdout)).toEqual({
        item: { id: '1', title: 'Backpack', etag: '"h"', revision: '17' },
        cache: { tier: 'TIER_MEMORY', outcome: 'CACHE_OUTCOME_HIT', asOf: '17' },
        revision: '17',
      })
    }
  })

  test('passes its flags on', async () => {
    const seen: unknown[] = []
    const script: Script = {
      getItem: ({ request: { id, options, readMask }, metadata }) => {
        seen.push([
          id,
          options?.freshness,
          options?.minRevision,
          options?.maxStaleness?.seconds,
          readMask?.paths,
        ])
        seen.push(metadata.get('x-tenant-id'))
        return { result: { case: 'item', value: backpack } }
      },
    }
    await against(script, ['get', '--fresh', '--tenant', 'blue', '--', '-1'])
    const more = ['--min-revision', '9', '--max-staleness', '5s', '--fields', 'title,price']
    await against(script, ['get', '1', '--cache-only', ...more], { env: { ITEMCACHE_TENANT: 'red' } })
    expect(seen).toEqual([
      ['-1', Freshness.FRESH, 0n, undefined, undefined],
      ['blue'],
      ['1', Freshness.CACHE_ONLY, 9n, 5n, ['title', 'price']],
      ['red'],
    ])
  })

  test('an absent item exits with 3, and so does a miss of --cache-only', async () => {
    const absent = await against(
      {
        getItem: () => {
          throw refusal(status.NOT_FOUND, 'the item does not exist')
        },
      },
      ['get', '1'],
    )
    expect(absent).toMatchObject({ exitCode: 3, stdout: '' })
    expect(absent.stderr).toMatch(/^itemcache: item.* was not found\n$/)
    const miss = await against(
      { getItem: () => ({ cache: { outcome: CacheOutcome.MISS }, revision: 17n }) },
      ['get', '1', '--cache-only'],
    )
    expect(miss).toMatchObject({
      exitCode: 3,
      stdout: 'no cache holds item 1: from no tier (MISS), revision 17\n',
    })
  })

  test('a service that does not run is told in one line, with exit code 4', async () => {
    const { exitCode, stderr } = await itemcache(['get', '1', '--target', '127.0.0.1:1'])
    expect(exitCode).toBe(4)
    expect(stderr).toBe('itemcache: cannot reach 127.0.0.1:1: is the service running? (npm start)\n')
  })

  test('a service that does not answer in time, too', async () => {
    const script: Script = { getItem: async ({ cancelled }) => cancelled.then(() => ({})) }
    const { exitCode, stderr } = await against(script, ['get', '1', '--timeout', '50ms'])
    expect(exitCode).toBe(4)
    expect(stderr).toMatch(/^itemcache: no answer from \S+ within 0.05 s \(--timeout\)\n$/)
  })

  test('any other refusal is one line, whatever its text contains', async () => {
    const script: Script = {
      getItem: () => {
        throw refusal(status.INTERNAL, 'line\nbreak', new Metadata())
      },
    }
    const { exitCode, stderr } = await against(script, ['get', '1'])
    expect(exitCode).toBe(1)
    expect(stderr).toBe('itemcache: INTERNAL: line\\nbreak\n')
  })

  test('colours only on a terminal that wants them', async () => {
    const colored = async (setting: Setting) =>
      (await against(found, ['get', '1'], setting)).stdout.includes('\u001b[')
    expect(await colored({ terminal: true })).toBe(true)
    expect(await colored({ terminal: false })).toBe(false)
    expect(await colored({ terminal: true, env: { NO_COLOR: '1' } })).toBe(false)
    expect(await colored({ terminal: true, env: { TERM: 'dumb' } })).toBe(false)
  })
})

describe('get-many', () => {
  const batch = (...codes: number[]): Script => ({
    batchGetItems: ({ request: { ids } }) => ({
      results: ids.map((id, i) =>
        codes[i] === 0
          ? { id, result: { case: 'item', value: { id, title: `item ${id}` } }, cache: hit }
          : {
              id,
              result: { case: 'error', value: { code: codes[i] ?? 0, reason: 'WHY', message: 'because' } },
            },
      ),
    }),
  })

  test('prints a row for each id, in their order', async () => {
    const { exitCode, stdout } = await against(batch(0, 0), ['get-many', '2', '1'])
    expect(exitCode).toBe(0)
    expect(stdout).toBe('id  title   answer\n 2  item 2  from MEMORY (HIT)\n 1  item 1  from MEMORY (HIT)\n')
  })

  test('exits with 3 when an item is missing, with 4 and 1 when one failed', async () => {
    expect(await against(batch(0, status.NOT_FOUND), ['get-many', '1', '2'])).toMatchObject({ exitCode: 3 })
    expect(await against(batch(status.NOT_FOUND, status.UNAVAILABLE), ['get-many', '1', '2'])).toMatchObject({
      exitCode: 4,
    })
    expect(await against(batch(status.UNAVAILABLE, status.INTERNAL), ['get-many', '1', '2'])).toMatchObject({
      exitCode: 1,
    })
  })

  test('exits with 3 when --cache-only misses one', async () => {
    const script: Script = {
      batchGetItems: () => ({ results: [{ id: '1', cache: { outcome: CacheOutcome.MISS } }] }),
    }
    const { exitCode, stdout } = await against(script, ['get-many', '1', '--cache-only'])
    expect(exitCode).toBe(3)
    expect(stdout).toContain('from no tier (MISS)')
  })

  test('prints one JSON document for each id', async () => {
    const { stdout } = await against(batch(0, status.NOT_FOUND), ['get-many', '1', '2', '--json'])
    const lines = stdout.trimEnd().split('\n')
    expect(lines.map((line) => JSON.parse(line))).toMatchObject([
      { id: '1', item: { title: 'item 1' } },
      { id: '2', error: { code: 5, reason: 'WHY', message: 'because' } },
    ])
  })
})

describe('list', () => {
  const script = (sizes: number[]): Script => ({
    listItems: ({ request: { pageToken, pageSize } }) => {
      sizes.push(pageSize)
      return pageToken === ''
        ? { items: [backpack], nextPageToken: 'two' }
        : { items: [{ id: '2', title: 'Mug' }], nextPageToken: '' }
    },
  })

  test('prints one page and says that there is more', async () => {
    const sizes: number[] = []
    const { exitCode, stdout, stderr } = await against(script(sizes), ['list', '--page-size', '1'])
    expect(exitCode).toBe(0)
    expect(stdout).toContain('Backpack')
    expect(stdout).not.toContain('Mug')
    expect(stderr).toBe('itemcache: there are more items (--all)\n')
    expect(sizes).toEqual([1])
  })

  test('prints all pages, as one JSON document per item', async () => {
    const sizes: number[] = []
    const { stdout, stderr } = await against(script(sizes), ['list', '--all', '--json'])
    const ids = stdout
      .trimEnd()
      .split('\n')
      .map((line) => JSON.parse(line).id)
    expect(ids).toEqual(['1', '2'])
    expect(stderr).toBe('')
    expect(sizes).toEqual([500, 500])
  })
})

describe('create and update', () => {
  const writing = (seen: unknown[]): Script => ({
    createItem: ({ request: { item } }) => {
      seen.push(item)
      return { item: backpack, revision: 17n }
    },
    updateItem: ({ request: { item, updateMask, allowMissing } }) => {
      seen.push({ item, paths: updateMask?.paths, allowMissing })
      return { item: backpack, revision: 17n }
    },
  })

  test('flags describe the item', async () => {
    const seen: unknown[] = []
    const words = ['create', '1', '--title', 'Backpack', '--price', '19.99 USD', '--tag', 'a', '--tag', 'b']
    const more = [
      '--description',
      'Holds much',
      '--category',
      'bags',
      '--image',
      'http://x/1',
      '--attributes',
      '{"a":1}',
    ]
    const { exitCode, stdout } = await against(writing(seen), [...words, ...more])
    expect(exitCode).toBe(0)
    expect(stdout).toContain('revision     17\n')
    expect(seen).toMatchObject([
      {
        id: '1',
        title: 'Backpack',
        description: 'Holds much',
        category: 'bags',
        price: { units: 19n, nanos: 990_000_000, currencyCode: 'USD' },
        tags: ['a', 'b'],
        imageUri: 'http://x/1',
        attributes: { a: 1 },
      },
    ])
  })

  test('an update changes the fields that are named, and only those', async () => {
    const seen: unknown[] = []
    const words = ['update', '1', '--title', '', '--clear', 'price', '--clear', 'image', '--etag', '"h"']
    await against(writing(seen), [...words, '--allow-missing'])
    expect(seen).toMatchObject([
      {
        item: { id: '1', title: '', etag: '"h"' },
        paths: ['price', 'image_uri', 'title'],
        allowMissing: true,
      },
    ])
  })

  test('what get --json prints can be changed and sent back, guarded by its etag', async () => {
    const seen: unknown[] = []
    const stdin = JSON.stringify({ id: '1', title: 'Old', rating: { rate: 4 }, etag: '"h"', revision: '17' })
    await against(writing(seen), ['update', '1', '--json-input', '-', '--title', 'New'], { stdin })
    expect(seen).toMatchObject([
      { item: { id: '1', title: 'New', rating: { rate: 4 }, etag: '"h"' }, paths: ['title', 'rating'] },
    ])
  })

  test.each([
    ['JSON that is none', '{', 'The item must be JSON'],
    ['JSON that is no object', '[]', 'The item must be a JSON object.'],
    ['a field that no item has', '{"titel":"x"}', 'titel'],
    ['another item', '{"id":"2","title":"x"}', 'The JSON is about item "2", not "1".'],
    ['nothing to change', '{}', 'nothing to change'],
  ])('%s is wrong usage and sends nothing', async (_what, stdin, message) => {
    const { exitCode, stderr } = await itemcache(['update', '1', '--json-input', '-'], { stdin })
    expect(exitCode).toBe(2)
    expect(stderr).toContain(message)
    expect(stderr.trimEnd()).not.toContain('\n')
  })
})

describe('delete, invalidate', () => {
  test('delete prints the revision', async () => {
    const seen: unknown[] = []
    const script: Script = {
      deleteItem: ({ request: { id, etag, allowMissing } }) => {
        seen.push([id, etag, allowMissing])
        return { revision: 18n }
      },
    }
    expect((await against(script, ['delete', '1', '--etag', '"h"'])).stdout).toBe(
      'deleted item 1, revision 18\n',
    )
    expect((await against(script, ['delete', '1', '--allow-missing', '--json'])).stdout).toBe(
      '{"revision":"18"}\n',
    )
    expect(seen).toEqual([
      ['1', '"h"', false],
      ['1', '', true],
    ])
  })

  test('invalidate names ids, tags or everything', async () => {
    const seen: unknown[] = []
    const script: Script = {
      invalidateItems: ({ request: { target, mode, refreshOrigin } }) => {
        seen.push([target.case, mode, refreshOrigin])
        return { revision: 19n }
      },
    }
    expect((await against(script, ['invalidate', '1', '2', '--refresh-origin'])).stdout).toBe(
      'invalidated, revision 19\n',
    )
    await against(script, ['invalidate', '--tag', 'a', '--tag', 'b', '--remove'])
    await against(script, ['invalidate', '--all'])
    expect(seen).toEqual([
      ['ids', InvalidationMode.EXPIRE, true],
      ['tags', InvalidationMode.REMOVE, false],
      ['all', InvalidationMode.EXPIRE, false],
    ])
  })

  test.each([
    [['invalidate']],
    [['invalidate', '1', '--all']],
    [['invalidate', '--all', '--refresh-origin']],
  ])('%j is wrong usage', async (argv) =>
    expect(await itemcache(argv)).toMatchObject({ exitCode: 2, stdout: '' }),
  )
})

describe('usage', () => {
  test.each([
    [['get'], 'missing required argument'],
    [['gte', '1'], "unknown command 'gte'"],
    [['get', '1', '--frsh'], "unknown option '--frsh'"],
    [['get', '1', '--fresh', '--cache-only'], 'cannot be used with'],
    [['get', '1', '--timeout', '5'], 'A duration looks like'],
    [['get', '1', '--timeout', '0s'], 'at least 1ms'],
    [['get', '1', '--min-revision', '-1'], 'A revision is a whole number'],
    [['get', '1', '--min-revision', '9223372036854775808'], 'A revision is a whole number'],
    [['get', '1', '--fields', 'title,,price'], 'Fields look like'],
    [['list', '--page-size', '501'], '1 to 500'],
    [['create', '1', '--price', '19,99'], 'An amount looks like'],
    [['create', '1', '--attributes', '1'], 'It must be a JSON object'],
    [['update', '1', '--clear', 'etag'], 'It must be one of title'],
  ])('%j is told on stderr, with exit code 2', async (argv, message) => {
    const { exitCode, stdout, stderr } = await itemcache(argv)
    expect(exitCode).toBe(2)
    expect(stdout).toBe('')
    expect(stderr).toMatch(/^itemcache: /)
    expect(stderr).toContain(message)
  })

  test('the version is that of the package', async () => {
    const { version } = JSON.parse(await readFile(join(import.meta.dirname, '..', 'package.json'), 'utf8'))
    expect(await itemcache(['--version'])).toEqual({ exitCode: 0, stdout: `${version}\n`, stderr: '' })
  })

  test('help goes to stdout, with every command and exit code', async () => {
    const { exitCode, stdout, stderr } = await itemcache(['--help'])
    expect(exitCode).toBe(0)
    expect(stderr).toBe('')
    const commands = [
      'get',
      'get-many',
      'list',
      'create',
      'update',
      'delete',
      'invalidate',
      'inspect',
      'metrics',
      'put',
      'watch',
      'top',
      'warm',
      'bench',
      'serve',
      'completion',
    ]
    for (const command of commands) expect(stdout).toMatch(new RegExp(`^ {2}${command} `, 'm'))
    expect(stdout).toContain('3 not found')
  })
})

describe('metrics', () => {
  test('--watch prints a header and then a line per interval, until the stream ends', async () => {
    const script: Script = {
      watchMetrics: (call) => {
        expect(call.request.interval).toMatchObject({ nanos: 200_000_000 })
        const startTime = { seconds: 0n }
        for (const seconds of [1n, 2n, 3n]) {
          call.write({ snapshot: { startTime, time: { seconds }, hits: seconds * 100n } })
        }
        call.end()
      },
    }
    const { exitCode, stdout } = await against(script, ['metrics', '--watch', '--interval', '200ms'])
    expect(exitCode).toBe(0)
    expect(
      stdout
        .trimEnd()
        .split('\n')
        .map((line) =>
          line
            .trim()
            .split(/\s{2,}/)
            .slice(0, 3),
        ),
    ).toEqual([
      ['time (UTC)', 'reads/s', 'hit rate'],
      ['00:00:02', '100', '100.0 %'],
      ['00:00:03', '100', '100.0 %'],
    ])
  })
})

describe('the program', () => {
  const cli = join(import.meta.dirname, '..', 'src', 'cli.ts')

  test('ends in silence when its reader goes away, as head does', async () => {
    const script: Script = {
      watchMetrics: (call) => {
        const timer = setInterval(() => call.write({ snapshot: { hits: 1n } }), 5)
        call.on('cancelled', () => clearInterval(timer))
      },
    }
    await using server = await startScriptedServer(script)
    const child = spawn(process.execPath, [cli, 'metrics', '--watch', '--json', '--target', server.target])
    let stderr = ''
    child.stderr.on('data', (chunk) => {
      stderr += chunk
    })
    await once(child.stdout, 'data')
    child.stdout.destroy()
    expect(await once(child, 'exit')).toEqual([0, null])
    expect(stderr).toBe('')
  })

  test('exits with the code that it documents', async () => {
    const child = spawn(process.execPath, [cli, 'get', '1', '--target', '127.0.0.1:1'])
    expect(await once(child, 'exit')).toEqual([4, null])
  })
})
