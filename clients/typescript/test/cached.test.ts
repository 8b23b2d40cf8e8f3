/** `cached` and the near cache's reads, on a log that the test itself tells. */
import { execFileSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { cached } from '../src/cached.ts'
import type { Client } from '../src/client.ts'
import { connect, InvalidArgumentError } from '../src/index.ts'
import { NearLog } from '../src/near-log.ts'

const ROOT = join(import.meta.dirname, '..', '..', '..')

let nowMs: number
let log: NearLog
let client: Client

beforeEach(() => {
  nowMs = 1000
  log = new NearLog({ now: () => nowMs, maxFloors: 100 })
  log.started(10)
  log.heartbeat(10, nowMs)
  // All that `cached` uses of a client.
  client = { nearLog: () => ({ log, now: () => nowMs }) } as unknown as Client
})

/** A loader whose loads end when the test says so. */
function gated() {
  const loads: PromiseWithResolvers<string>[] = []
  const load = (_id: string) => {
    const gate = Promise.withResolvers<string>()
    loads.push(gate)
    return gate.promise
  }
  const settled = () => new Promise((resolve) => setImmediate(resolve))
  return { loads, load, settled }
}

const upserted = (revision: number, id: string, tags: string[] = []) =>
  ({ revision, kind: 'UPSERTED', mode: 'EXPIRE', ids: [id], tags }) as const

describe('cached', () => {
  test('loads once for all who ask, and again after an event of the id', async () => {
    const { load, loads, settled } = gated()
    const get = cached(load, { client })
    const both = Promise.all([get('a'), get('a')])
    await settled()
    expect(loads).toHaveLength(1)
    loads[0]?.resolve('one')
    expect(await both).toEqual(['one', 'one'])
    log.event(upserted(11, 'b'))
    expect(await get('a')).toBe('one')
    log.event(upserted(12, 'a'))
    const again = get('a')
    await settled()
    loads[1]?.resolve('two')
    expect(await again).toBe('two')
    expect(get.stats()).toMatchObject({ hits: 1, coalesced: 1, entries: 1 })
  })

  test('who asks after an event is not given a load that began before it, and it is not kept', async () => {
    const { load, loads, settled } = gated()
    const get = cached(load, { client })
    const before = get('a')
    await settled()
    log.event(upserted(11, 'a'))
    const after = get('a')
    loads[0]?.resolve('old')
    expect(await before).toBe('old')
    await settled()
    loads[1]?.resolve('new')
    expect(await after).toBe('new')
    expect(await get('a')).toBe('new')
    expect(get.stats().refused).toBe(1)
  })

  test('an event during a load costs one more load, however many ask', async () => {
    const { load, loads, settled } = gated()
    const get = cached(load, { client })
    const before = get('a')
    await settled()
    const during = Array.from({ length: 100 }, () => get('a'))
    log.event(upserted(11, 'a'))
    loads[0]?.resolve('old')
    await settled()
    expect(loads).toHaveLength(2)
    loads[1]?.resolve('new')
    expect(await before).toBe('old')
    expect(new Set(await Promise.all(during))).toEqual(new Set(['new']))
  })

  test('nothing is kept from another history', async () => {
    let loads = 0
    const get = cached(async () => ++loads, { client })
    await get('a')
    log.reset()
    log.started(5)
    log.heartbeat(5, nowMs)
    expect(get.stats().entries).toBe(0)
    expect(await get('a')).toBe(2)
    expect(await get('a')).toBe(2)
  })

  test('an invalidation of a tag concerns the results that depend on it', async () => {
    let loads = 0
    const get = cached(async (id) => ({ id, n: ++loads }), { client, tags: ({ id }) => [`tag-${id}`] })
    await Promise.all([get('a'), get('b')])
    log.event({ revision: 11, kind: 'TAGS_INVALIDATED', mode: 'EXPIRE', ids: [], tags: ['tag-a'] })
    await Promise.all([get('a'), get('b')])
    expect(loads).toBe(3)
  })

  test('a failure is told to those who wait, and not kept', async () => {
    let fails = true
    const get = cached(
      async () => {
        if (fails) throw new Error('not now')
        return 'value'
      },
      { client },
    )
    await expect(get('a')).rejects.toThrow('not now')
    fails = false
    expect(await get('a')).toBe('value')
  })

  test('while the log is not heard of, every call loads; afterwards what is kept counts again', async () => {
    let loads = 0
    const get = cached(async () => ++loads, { client })
    await get('a')
    nowMs += 1501
    expect(await get('a')).toBe(2)
    expect(get.stats().state).toBe('lost')
    log.heartbeat(10, nowMs)
    expect(await get('a')).toBe(2)
  })

  test('a result is loaded anew when its time is over', async () => {
    let loads = 0
    const get = cached(async () => ++loads, { client, ttlMs: 500 })
    await get('a')
    nowMs += 500
    expect(await get('a')).toBe(2)
  })

  test('needs a near cache', () => {
    expect(() => cached(async () => 1, { client: connect('127.0.0.1:1') })).toThrow(InvalidArgumentError)
  })
})

describe('as a standard decorator', () => {
  let directory: string
  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'itemcache-decorator-'))
  })
  afterEach(() => rmSync(directory, { recursive: true, force: true }))

  test('compiled for engines without decorators, it keeps results per object', async () => {
    writeFileSync(
      join(directory, 'pages.mts'),
      `export function pagesWith(cached: any, client: any): any {
        class Pages {
          loads = 0
          constructor(readonly name: string) {}
          @cached({ client: (self: Pages) => client })
          async page(id: string): Promise<string> {
            this.loads++
            return \`\${this.name} \${id}\`
          }
        }
        return Pages
      }`,
    )
    const tsc = join(ROOT, 'node_modules', 'typescript', 'bin', 'tsc')
    const options = ['--target', 'es2022', '--module', 'nodenext', '--types', '', '--outDir', directory]
    execFileSync(process.execPath, [tsc, join(directory, 'pages.mts'), ...options], { cwd: directory })
    const compiled = join(directory, 'pages.mjs')
    expect(readFileSync(compiled, 'utf8')).not.toContain('@cached')
    const { pagesWith } = await import(compiled)
    const Pages = pagesWith(cached, client)
    const [one, other] = [new Pages('one'), new Pages('other')]
    expect(await Promise.all([one.page('a'), one.page('a'), one.page('b')])).toEqual([
      'one a',
      'one a',
      'one b',
    ])
    expect(await other.page('a')).toBe('other a')
    expect([one.loads, other.loads]).toEqual([2, 1])
    log.event(upserted(11, 'a'))
    await one.page('a')
    expect(one.loads).toBe(3)
  })
})
