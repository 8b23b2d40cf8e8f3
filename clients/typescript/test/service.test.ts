/** The client and the command line against the real service. */
import { execFile } from 'node:child_process'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { startService, type TestService } from '../../../test/support/service.ts'
import { run } from '../src/command-line.ts'
import {
  AlreadyExistsError,
  CacheOutcome,
  type Client,
  ConflictError,
  connect,
  InvalidArgumentError,
  ItemSource,
  NotFoundError,
  OutOfRangeError,
  parseMoney,
  Tier,
} from '../src/index.ts'

let service: TestService
let client: Client

beforeAll(async () => {
  service = await startService()
  client = connect(service.address, { tenant: 'typescript', clientId: 'the-tests', timeoutMs: 10_000 })
})

afterAll(async () => {
  await client?.close()
  await service?.[Symbol.asyncDispose]()
})

describe('the client', () => {
  test('reads an item of the origin, and the second time from memory', async () => {
    const first = await client.get('1')
    expect(first.item).toMatchObject({ id: '1', source: ItemSource.ORIGIN })
    expect(first.cache?.tier).toBe(Tier.ORIGIN)
    const second = await client.get('1')
    expect(second.cache).toMatchObject({ tier: Tier.MEMORY, outcome: CacheOutcome.HIT })
    expect(second.item).toEqual(first.item)
    const etag = first.item?.etag
    expect(await client.get('1', { ifNoneMatch: etag })).toMatchObject({ item: undefined, notModified: true })
    const cut = await client.get('1', { fields: ['title', 'imageUri'] })
    expect(cut.item).toMatchObject({ title: first.item?.title, imageUri: first.item?.imageUri, category: '' })
  })

  test('reads with the options of the contract', async () => {
    await client.get('2')
    expect((await client.get('2', { freshness: 'fresh' })).cache?.outcome).toBe(CacheOutcome.BYPASS)
    const unknown = await client.get('never-read', { freshness: 'cache-only' })
    expect(unknown).toMatchObject({
      item: undefined,
      notModified: false,
      cache: { outcome: CacheOutcome.MISS },
    })
    await expect(client.get('2', { minRevision: 1n << 52n })).rejects.toBeInstanceOf(OutOfRangeError)
  })

  test('tells an absent item from a wrong request', async () => {
    const absent = await client.get('no-such-item').catch((error: unknown) => error)
    expect(absent).toBeInstanceOf(NotFoundError)
    expect(absent).toMatchObject({ id: 'no-such-item', reason: 'ITEM_NOT_FOUND' })
    const wrong = await client.get('').catch((error: unknown) => error)
    expect(wrong).toBeInstanceOf(InvalidArgumentError)
    expect(wrong).toMatchObject({ reason: 'INVALID_FIELD', violations: [{ field: 'id' }] })
  })

  test('writes, reads its writes, and is told of conflicts', async () => {
    const draft = {
      id: 'mug',
      title: 'Mug',
      price: parseMoney('7.50 EUR'),
      tags: ['kitchen'],
      attributes: { ml: 300 },
    }
    const created = await client.create(draft)
    expect(created.item).toMatchObject({ ...draft, source: ItemSource.LOCAL, revision: created.revision })
    await expect(client.create(draft)).rejects.toBeInstanceOf(AlreadyExistsError)

    const updated = await client.update({ ...created.item, title: 'Big mug' }, { fields: ['title'] })
    expect(updated.item).toMatchObject({ title: 'Big mug', attributes: { ml: 300 } })
    expect(updated.revision).toBeGreaterThan(created.revision)
    // The etag of the item that was read first is out of date by now.
    await expect(client.update({ ...created.item, title: 'Small mug' })).rejects.toBeInstanceOf(ConflictError)
    const read = await client.get('mug', { minRevision: updated.revision })
    expect(read.item).toEqual(updated.item)

    const cleared = await client.update({ id: 'mug' }, { fields: ['price'] })
    expect(cleared.item.price).toBeUndefined()
    await client.delete('mug')
    await expect(client.get('mug')).rejects.toBeInstanceOf(NotFoundError)
    await expect(client.delete('mug')).rejects.toBeInstanceOf(NotFoundError)
    await client.delete('mug', { allowMissing: true })
  })

  test('a repeated write with one request id happens once', async () => {
    const request = { requestId: 'once' }
    const first = await client.create({ id: 'once', title: 'Once' }, request)
    const again = await client.create({ id: 'once', title: 'Once' }, request)
    expect(again).toEqual(first)
  })

  test('reads 1,200 items by their ids, the missing ones as errors of their own', async () => {
    const ids = ['3', ...Array.from({ length: 1199 }, (_, i) => `absent-${i}`)]
    const results = await client.getMany(ids)
    expect([...results.keys()]).toEqual(ids)
    expect(results.get('3')?.item?.id).toBe('3')
    for (const [id, { error }] of results) if (id !== '3') expect(error).toBeInstanceOf(NotFoundError)
  })

  test('lists page by page', async () => {
    const ids = Array.from({ length: 7 }, (_, i) => `listed-${i}`)
    for (const id of ids) await client.create({ id, category: 'listed' })
    const list = client.list({ category: 'listed', pageSize: 3 })
    const items = await Array.fromAsync(list)
    expect(items.map(({ id }) => id)).toEqual(ids)
    const pages = await Array.fromAsync(list.pages())
    expect(pages.map((page) => page.items.length)).toEqual([3, 3, 1])
  })

  test('invalidates and inspects', async () => {
    const { item } = await client.get('4')
    const { revision } = await client.invalidate({ tags: [item?.category ?? ''] })
    const { tiers, floors } = await client.inspect('4')
    expect(tiers.map(({ tier }) => tier)).toEqual([Tier.MEMORY, Tier.REDIS, Tier.POSTGRES, Tier.ORIGIN])
    expect(floors?.tagFloors).toContainEqual(expect.objectContaining({ floor: revision }))
    await client.invalidate({ ids: ['4'], mode: 'remove', refreshOrigin: true })
    await client.invalidate({ all: true })
    expect((await client.get('4')).item?.id).toBe('4')
  })

  test('watches the metrics that it can also ask for', async () => {
    const before = await client.metrics()
    for await (const snapshot of client.watchMetrics({ intervalMs: 100 })) {
      expect(snapshot.hits + snapshot.misses).toBeGreaterThanOrEqual(before.hits + before.misses)
      if (snapshot.time?.nanos !== before.time?.nanos) break
    }
  })

  test('tenants do not see each other', async () => {
    await client.create({ id: 'private' })
    await using other = connect(service.address, { tenant: 'somebody-else', timeoutMs: 10_000 })
    await expect(other.get('private')).rejects.toBeInstanceOf(NotFoundError)
  })
})

describe('the command line', () => {
  async function itemcache(...argv: string[]) {
    const written = { stdout: '', stderr: '' }
    const output = (name: keyof typeof written) => ({
      write: (text: string) => {
        written[name] += text
      },
    })
    const env = { ITEMCACHE_TARGET: service.address, ITEMCACHE_TENANT: 'command-line' }
    const io = { stdout: output('stdout'), stderr: output('stderr'), stdin: (async function* () {})(), env }
    return { exitCode: await run(argv, io), ...written }
  }

  test('an item lives: created, read, changed, inspected, invalidated, deleted', async () => {
    expect(
      await itemcache('create', 'pen', '--title', 'Pen', '--price', '1.20 EUR', '--tag', 'desk'),
    ).toMatchObject({
      exitCode: 0,
      stderr: '',
    })
    const read = await itemcache('get', 'pen')
    expect(read.stdout).toMatch(/^price {8}1\.20 EUR$/m)
    expect(read.stdout).toMatch(/^from MEMORY \(HIT\), age .+, fresh for .+, revision \d+$/m)
    await itemcache('update', 'pen', '--price', '1.30 EUR', '--clear', 'tags')
    const { item } = JSON.parse((await itemcache('get', 'pen', '--json')).stdout)
    expect(item).toMatchObject({
      title: 'Pen',
      price: { currencyCode: 'EUR', units: '1', nanos: 300_000_000 },
    })
    expect(item).not.toHaveProperty('tags')
    expect((await itemcache('inspect', 'pen')).stdout).toMatch(/^memory +● holds it +\d+ /m)
    expect((await itemcache('invalidate', 'pen')).stdout).toMatch(/^invalidated, revision \d+$/m)
    expect((await itemcache('list')).stdout).toMatch(/^pen +Pen +1\.30 EUR$/m)
    expect((await itemcache('delete', 'pen')).exitCode).toBe(0)
    const gone = await itemcache('get', 'pen')
    expect(gone.exitCode).toBe(3)
    expect(gone.stderr).toMatch(/^itemcache: item pen was not found \(from \w+/)
  })

  test('several items, one of them missing', async () => {
    const { exitCode, stdout } = await itemcache('get-many', '1', 'nope')
    expect(exitCode).toBe(3)
    expect(stdout).toMatch(/^nope .*ITEM_NOT_FOUND/m)
  })

  test('metrics name the tiers and the methods', async () => {
    await itemcache('get', '5')
    const { exitCode, stdout } = await itemcache('metrics')
    expect(exitCode).toBe(0)
    for (const name of ['memory', 'redis', 'postgres', 'origin', 'GetItem']) {
      expect(stdout).toMatch(new RegExp(`^${name} `, 'm'))
    }
  })

  test('a rule that the service enforces is told by its field', async () => {
    const { exitCode, stderr } = await itemcache('create', 'x', '--price', '1 XXXX')
    expect({ exitCode, stderr }).toMatchObject({ exitCode: 2 })
    const long = await itemcache('create', 'x', '--tag', 'y'.repeat(65))
    expect(long).toMatchObject({ exitCode: 1 })
    expect(long.stderr).toMatch(/^itemcache: INVALID_FIELD: item\.tags\[0\] must be 1 to 64 bytes/)
  })
})

test('the code of the README runs as it is', async () => {
  const directory = join(import.meta.dirname, '..')
  const readme = await readFile(join(directory, 'README.md'), 'utf8')
  const code = [...readme.matchAll(/^```ts\n(.*?)^```$/gms)].map(([, block]) => block).join('\n')
  const program = code.replaceAll("'127.0.0.1:50051'", `'${service.address}'`)
  // The README's default deadline suits a service that is warm.
  await client.get('1')
  const { stdout } = await promisify(execFile)(
    process.execPath,
    ['--input-type=module-typescript', '--eval', program],
    { cwd: directory },
  )
  expect(stdout).toMatch(/^\S.* from tier \d/)
  expect(stdout).toContain('no-such-item the item does not exist')
  expect(stdout).toMatch(/the first change since \d+n is of \[ 'lamp-1' \]/)
  expect(stdout).toContain('somebody else has changed it')
  expect(stdout).toContain('NOT_FOUND ITEM_NOT_FOUND no-such-item')
})
