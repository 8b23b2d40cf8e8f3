/** What every cache tier promises, whatever holds its copies. */
import { randomUUID } from 'node:crypto'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { LIMITS } from '../../src/item.ts'
import type { CacheTier, Copy } from '../../src/tiers/tier.ts'

/** A tier that is ready and holds at least 2,000 entries and 8 MiB, for at least a minute. It is disposed if it can be. */
export type MakeTier = (options: {
  readonly now: () => number
}) => Promise<CacheTier & Partial<AsyncDisposable>>

/** How far apart a tier's two roundings to whole milliseconds may put a time. */
const ROUNDING_MS = 5
const now = () => performance.now()

function copyOf(id: string, changes: Partial<Copy> = {}): Copy {
  return {
    id,
    asOf: 7,
    bytes: new TextEncoder().encode(`the item ${id.toWellFormed()}`),
    revision: 5,
    tags: ['fruit', 'season:summer'],
    verifiedAtMs: now(),
    freshUntilMs: now() + 30_000,
    ...changes,
  }
}

/** The part of a copy that must come back exactly. */
function exact({ id, asOf, bytes, revision, tags }: Copy) {
  return { id, asOf, revision, tags: [...tags], hex: bytes && Buffer.from(bytes).toString('hex') }
}

const long = (prefix: string) => prefix.padEnd(LIMITS.idBytes, 'x')

/** Ids that a careless key would mix up, or trip over. All of them are valid. */
const ODD_IDS = [
  '1',
  '01',
  '1:1',
  ':',
  '::',
  '__proto__',
  'constructor',
  'prototype',
  'hasOwnProperty',
  'toString',
  '{x}',
  '{x}y',
  '{',
  '}',
  '{}',
  '*',
  '?',
  '[a-z]',
  '.',
  '..',
  '../..',
  '/',
  'a/b',
  'a\\b',
  'a b',
  ' ',
  'a|b',
  'a,b',
  'a;b',
  'a=b',
  'a%3Ab',
  'a:b',
  'a_b',
  '@host',
  '#',
  '"',
  "'",
  '`',
  'null',
  'undefined',
  'NaN',
  '0',
  '-1',
  'é',
  'e\u0301',
  'É',
  'ß',
  'ss',
  'A',
  'a',
  '🛒',
  '👩‍🚀',
  '\u2028',
  '\ufeff',
  long('a'),
  long('b'),
  long('').slice(1),
]

export function cacheTierContract(name: string, makeTier: MakeTier): void {
  describe(`${name}, as every cache tier,`, () => {
    let tier: CacheTier & Partial<AsyncDisposable>
    let tenant: string

    beforeEach(async () => {
      tier = await makeTier({ now })
      tenant = `tenant-${randomUUID()}`
    })
    afterEach(async () => {
      await tier[Symbol.asyncDispose]?.()
    })

    async function readOne(id: string, of = tenant): Promise<Copy | undefined> {
      const { copies, skipped } = await tier.read(of, [id])
      expect(skipped).toBeUndefined()
      return copies.get(id)
    }

    async function expectStored(copy: Copy): Promise<void> {
      await tier.store(tenant, [copy])
      const found = await readOne(copy.id)
      expect(found && exact(found)).toEqual(exact(copy))
    }

    test.each([
      ['a short item', new Uint8Array([1, 2, 3])],
      ['an item of no bytes, which is not an absent one', new Uint8Array()],
      ['every byte value', Uint8Array.from({ length: 256 }, (_, index) => index)],
      ['text that is not UTF-8', new Uint8Array([0xc3, 0x28, 0x00, 0x0d, 0x0a, 0xff])],
      ['an item of the largest size', new Uint8Array(LIMITS.itemBytes).fill(0xa5)],
    ])('returns exactly the bytes that were stored: %s', async (_, bytes) => {
      await expectStored(copyOf('item', { bytes }))
    })

    test('keeps its own bytes when they were a window into a larger buffer', async () => {
      const buffer = Buffer.from('before|the item|after')
      const bytes = new Uint8Array(buffer.buffer, buffer.byteOffset + 7, 8)
      await expectStored(copyOf('item', { bytes }))
    })

    test.each([
      [1, 1],
      [0, 0],
      [2 ** 40 + 1, 2 ** 40],
      [8_191 * 2 ** 40 + 2 ** 40 - 1, 8_191 * 2 ** 40],
    ])('returns exactly the as-of %d and the revision %d', async (asOf, revision) => {
      await expectStored(copyOf('item', { asOf, revision }))
    })

    test.each([
      ['no tags', []],
      ['one tag', ['fruit']],
      ['tags with separators', ['a,b', 'a', 'b', 'a|b', ':', ' ', '"', '\\', '{x}', '__proto__', '*']],
      ['tags of several scripts', ['obst', 'фрукты', '果物', '🍎', 'e\u0301', 'é']],
      ['32 tags of 64 bytes', Array.from({ length: 32 }, (_, index) => `${index}`.padEnd(64, 'y'))],
    ])('returns exactly the tags that were stored, in order: %s', async (_, tags) => {
      await expectStored(copyOf('item', { tags }))
    })

    test('holds that an item is absent, which is not the same as holding nothing', async () => {
      await expectStored(copyOf('deleted', { bytes: undefined, tags: [], revision: 6 }))
      await expectStored(copyOf('never', { bytes: undefined, tags: [], revision: 0, asOf: 0 }))
      expect((await readOne('deleted'))?.bytes).toBeUndefined()
      expect(await readOne('unknown')).toBeUndefined()
    })

    test('leaves out what it does not hold', async () => {
      await tier.store(tenant, [copyOf('a'), copyOf('c')])
      const { copies } = await tier.read(tenant, ['a', 'b', 'c', 'd'])
      expect([...copies.keys()].toSorted()).toEqual(['a', 'c'])
    })

    test('stores nothing, and is content, when there is nothing to store', async () => {
      await expect(tier.store(tenant, [])).resolves.toBeUndefined()
    })

    test('returns every one of a batch of 500', async () => {
      const stored = Array.from({ length: LIMITS.batchIds }, (_, index) =>
        copyOf(`item-${index}`, index % 5 === 0 ? { bytes: undefined, tags: [] } : { asOf: 100 + index }),
      )
      await tier.store(tenant, stored)
      const { copies, skipped } = await tier.read(
        tenant,
        stored.map(({ id }) => id),
      )
      expect(skipped).toBeUndefined()
      expect(copies.size).toBe(LIMITS.batchIds)
      for (const copy of stored) expect(copies.get(copy.id)).toMatchObject({ id: copy.id, asOf: copy.asOf })
      for (const copy of stored)
        expect((copies.get(copy.id)?.bytes ?? '').length).toBe((copy.bytes ?? '').length)
    })

    test('keeps odd ids apart from each other', async () => {
      const stored = ODD_IDS.map((id, index) =>
        copyOf(id, { asOf: index + 1, bytes: Buffer.from(`${index} ${id}`) }),
      )
      await tier.store(tenant, stored)
      const { copies } = await tier.read(tenant, ODD_IDS)
      expect([...copies.values()].map(exact).toSorted((a, b) => a.asOf - b.asOf)).toEqual(stored.map(exact))
    })

    test('keeps tenants apart, also those whose name and id read the same when joined', async () => {
      const pairs = [
        ['', 'ab'],
        ['a', 'b'],
        ['ab', 'c'],
        ['a', 'bc'],
        ['a:b', 'c'],
        ['a', 'b:c'],
        ['1:a', 'b'],
        ['1', 'a:b'],
        ['1', '1:a'],
        ['11', ':a'],
        ['1:', '1a'],
        ['{a}', 'b'],
        ['{a', '}b'],
        ['__proto__', 'constructor'],
        ['constructor', '__proto__'],
        ['é', 'x'],
        ['e', '\u0301x'],
        ['🛒', 'x'],
      ].map(([suffix, id]) => ({ of: `${tenant}${suffix}`, id: id ?? '' }))
      for (const [index, { of, id }] of pairs.entries())
        await tier.store(of, [copyOf(id, { asOf: index + 1 })])
      for (const [index, { of, id }] of pairs.entries()) expect((await readOne(id, of))?.asOf).toBe(index + 1)
      expect(await readOne('b', `${tenant}-other`)).toBeUndefined()
      expect((await tier.inspect(`${tenant}-other`, 'b')).present).toBe(false)
    })

    test('never replaces a newer copy by an older one', async () => {
      const newer = copyOf('item', { asOf: 20, bytes: undefined, tags: [], revision: 20 })
      await tier.store(tenant, [newer])
      await tier.store(tenant, [copyOf('item', { asOf: 19 })])
      expect(exact((await readOne('item')) ?? copyOf(''))).toEqual(exact(newer))
      // Text would order these the other way round.
      await tier.store(tenant, [copyOf('item', { asOf: 100 })])
      expect((await readOne('item'))?.asOf).toBe(100)
      await tier.store(tenant, [copyOf('item', { asOf: 99 })])
      expect((await readOne('item'))?.asOf).toBe(100)
    })

    test('tells as-ofs apart that differ by one, however large', async () => {
      const asOf = 8_191 * 2 ** 40 + 2 ** 40 - 1
      await tier.store(tenant, [copyOf('item', { asOf: asOf - 1 })])
      await tier.store(tenant, [copyOf('item', { asOf })])
      await tier.store(tenant, [copyOf('item', { asOf: asOf - 1 })])
      expect((await readOne('item'))?.asOf).toBe(asOf)
    })

    test('replaces a copy by one that is as new', async () => {
      await tier.store(tenant, [copyOf('item', { bytes: Buffer.from('first') })])
      await expectStored(copyOf('item', { bytes: Buffer.from('second') }))
      await expectStored(copyOf('item', { bytes: undefined, tags: [] }))
      await expectStored(copyOf('item', { bytes: Buffer.from('third') }))
    })

    test('keeps the newest of copies that are stored at once, in any order', async () => {
      await Promise.all([3, 9, 1, 7, 5].map((asOf) => tier.store(tenant, [copyOf('item', { asOf })])))
      expect((await readOne('item'))?.asOf).toBe(9)
      await tier.store(
        tenant,
        [12, 11].map((asOf) => copyOf('item', { asOf })),
      )
      expect((await readOne('item'))?.asOf).toBe(12)
    })

    test.each([
      ['fresh', -2_000, 30_000],
      ['verified just now', 0, 10_000],
      ['stale', -20_000, -5_000],
    ])('keeps the age and the remaining freshness of a copy that is %s', async (_, verifiedMs, freshMs) => {
      const startMs = now()
      const copy = copyOf('item', { verifiedAtMs: startMs + verifiedMs, freshUntilMs: startMs + freshMs })
      await tier.store(tenant, [copy])
      const found = await readOne('item')
      // A tier may keep times as remaining ones; then they move by no more than the journey took.
      const slackMs = now() - startMs + ROUNDING_MS
      expect(Math.abs((found?.verifiedAtMs ?? Number.NaN) - copy.verifiedAtMs)).toBeLessThanOrEqual(slackMs)
      if (freshMs > 0) {
        expect(Math.abs((found?.freshUntilMs ?? Number.NaN) - copy.freshUntilMs)).toBeLessThanOrEqual(slackMs)
      } else {
        expect(found?.freshUntilMs).toBeLessThanOrEqual(now())
      }
    })

    test('says of an id what it holds', async () => {
      const startMs = now()
      const copy = copyOf('item', { asOf: 42, verifiedAtMs: startMs - 2_000 })
      await tier.store(tenant, [copy, copyOf('absent', { bytes: undefined, tags: [] })])
      const inspected = await tier.inspect(tenant, 'item')
      const slackMs = now() - startMs + ROUNDING_MS
      expect(inspected).toMatchObject({ present: true, negative: false, asOf: 42 })
      expect(Math.abs((inspected.ageMs ?? Number.NaN) - 2_000)).toBeLessThanOrEqual(slackMs)
      expect(inspected.ttlMs).toBeGreaterThan(0)
      expect(inspected.sizeBytes).toBeGreaterThanOrEqual(copy.bytes?.length ?? 0)
      expect(await tier.inspect(tenant, 'absent')).toMatchObject({ present: true, negative: true, asOf: 7 })
    })

    test('says that it holds nothing of an unknown id, and holds nothing afterwards', async () => {
      expect(await tier.inspect(tenant, 'unknown')).toEqual({ present: false })
      expect(await readOne('unknown')).toBeUndefined()
    })

    test('holds the same after it was inspected', async () => {
      await tier.store(tenant, [copyOf('item')])
      const before = await readOne('item')
      for (let times = 0; times < 3; times += 1) await tier.inspect(tenant, 'item')
      const after = await readOne('item')
      expect(after && exact(after)).toEqual(before && exact(before))
    })
  })
}
