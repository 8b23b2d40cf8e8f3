import { create, type MessageInitShape } from '@bufbuild/protobuf'
import { durationFromMs, timestampFromMs } from '@bufbuild/protobuf/wkt'
import { describe, expect, test } from 'vitest'
import { toDuration, toMs } from '../src/duration.ts'
import {
  formatBytes,
  formatCache,
  formatChange,
  formatDuration,
  formatEvent,
  formatInspection,
  formatItem,
  formatMetrics,
  formatTable,
  printable,
} from '../src/format.ts'
import {
  BreakerState,
  CacheOutcome,
  CacheStatusSchema,
  InspectItemResponseSchema,
  ItemSchema,
  ItemSource,
  MetricsSnapshotSchema,
  MoneySchema,
  SkipReason,
  StaleReason,
  Tier,
} from '../src/gen/itemcache/v1/item_cache_pb.ts'
import { formatMoney, parseMoney } from '../src/money.ts'

const PLAIN = { color: false, columns: Number.POSITIVE_INFINITY }

describe('money', () => {
  test.each([
    ['19.99 USD', { units: 19n, nanos: 990_000_000, currencyCode: 'USD' }],
    ['-0.5 EUR', { units: 0n, nanos: -500_000_000, currencyCode: 'EUR' }],
    ['-3 EUR', { units: -3n, nanos: 0, currencyCode: 'EUR' }],
    ['500 JPY', { units: 500n, nanos: 0, currencyCode: 'JPY' }],
    ['0.000000001 BTC', { units: 0n, nanos: 1, currencyCode: 'BTC' }],
    [
      '999999999999999999.99USD',
      { units: 999_999_999_999_999_999n, nanos: 990_000_000, currencyCode: 'USD' },
    ],
  ])('%s is read exactly', (text, money) => {
    const { units, nanos, currencyCode } = parseMoney(text)
    expect({ units, nanos, currencyCode }).toEqual(money)
  })

  test.each([
    '19.99',
    'USD',
    '19,99 USD',
    '1.0000000001 USD',
    '19.99 usd',
    '1e3 USD',
    '',
    '. USD',
    '19. USD',
  ])('%j is refused', (text) => expect(() => parseMoney(text)).toThrow(RangeError))

  test.each(['19.99 USD', '-0.50 EUR', '-3 EUR', '500 JPY', '0.000000001 BTC', '1.10 USD'])(
    '%s is written as it is read',
    (text) => expect(formatMoney(parseMoney(text))).toBe(text),
  )

  test('an amount below zero has one sign', () => {
    expect(formatMoney(create(MoneySchema, { units: -2n, nanos: -50_000_000, currencyCode: 'EUR' }))).toBe(
      '-2.05 EUR',
    )
  })
})

describe('durations and sizes', () => {
  test.each([
    [0, '0 s'],
    [0.0004, '0 µs'],
    [0.85, '850 µs'],
    [0.9996, '1 ms'],
    [3.24, '3.2 ms'],
    [42.4, '42 ms'],
    [999.6, '1 s'],
    [3240, '3.2 s'],
    [9960, '10 s'],
    [59_400, '59 s'],
    [59_600, '1 min'],
    [291_000, '4 min 51 s'],
    [3_599_600, '1 h'],
    [7_380_000, '2 h 3 min'],
    [273_600_000, '3 d 4 h'],
    [-1500, '-1.5 s'],
  ])('%d ms is shown as %s', (ms, text) => expect(formatDuration(ms)).toBe(text))

  test.each([
    [0, '0 B'],
    [512, '512 B'],
    [1023, '1023 B'],
    [1024, '1 KiB'],
    [1228.8, '1.2 KiB'],
    [1024 * 1024 - 1, '1 MiB'],
    [268_435_456, '256 MiB'],
    [5 * 1024 ** 4, '5120 GiB'],
  ])('%d bytes are shown as %s', (bytes, text) => expect(formatBytes(bytes)).toBe(text))

  test.each([0, 0.000001, 1.5, 5.1, 999.999999, 1999.9999999, -1500.25, 86_400_000])(
    '%d ms survives the way through the message',
    (ms) => {
      const duration = toDuration(ms)
      expect(Number.isInteger(duration.nanos) && Math.abs(duration.nanos) < 1e9).toBe(true)
      expect(toMs(duration)).toBeCloseTo(ms, 6)
    },
  )
})

describe('what an item says', () => {
  test('its fields are aligned, and those that are not set are left out', () => {
    const item = create(ItemSchema, {
      id: '1',
      title: 'Backpack',
      price: parseMoney('109.95 USD'),
      rating: { rate: 3.9, count: 1200n },
      tags: ['bags', 'sale'],
      attributes: { color: 'blue' },
      source: ItemSource.ORIGIN,
      updateTime: timestampFromMs(0),
    })
    expect(formatItem(item, PLAIN)).toBe(
      [
        'id           1',
        'title        Backpack',
        'price        109.95 USD',
        'rating       3.9 (1,200 votes)',
        'tags         bags, sale',
        'attributes   {"color":"blue"}',
        'source       origin',
        'updated      1970-01-01T00:00:00.000Z',
        '',
      ].join('\n'),
    )
  })

  test('text of an item cannot drive the terminal', () => {
    expect(printable('a\u001b[31m\r\nb\u009b\u202e\ud800 ünïcode 🎒')).toBe(
      'a\\u001b[31m\\r\\nb\\u009b\\u202e\\ud800 ünïcode 🎒',
    )
    const item = create(ItemSchema, { id: '1', title: '\u001b]0;gotcha\u0007', tags: ['\u001b'] })
    // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is looked for
    expect(formatItem(item, PLAIN)).not.toMatch(/[\u0000-\u0009\u000b-\u001f]/)
  })
})

describe('where an answer came from', () => {
  const line = (status: MessageInitShape<typeof CacheStatusSchema>, revision?: bigint) =>
    formatCache(create(CacheStatusSchema, status), revision)

  test('a hit has a tier, an age and a rest of freshness', () => {
    const age = durationFromMs(3200)
    const hit = { tier: Tier.MEMORY, outcome: CacheOutcome.HIT, age, freshFor: durationFromMs(56_000) }
    expect(line(hit, 17n)).toBe('from MEMORY (HIT), age 3.2 s, fresh for 56 s, revision 17')
  })

  test('a stale answer says why, and which tiers could not be asked', () => {
    const stale = {
      tier: Tier.REDIS,
      outcome: CacheOutcome.STALE,
      staleReason: StaleReason.TIER_DOWN,
      coalesced: true,
      skippedTiers: [{ tier: Tier.POSTGRES, reason: SkipReason.DOWN }],
    }
    expect(line(stale)).toBe(
      "from REDIS (STALE: tier down), shared another caller's load, without POSTGRES (down)",
    )
  })

  test('values of a later release are shown as numbers', () => {
    expect(line({ tier: 99 as Tier, outcome: CacheOutcome.HIT })).toBe('from 99 (HIT)')
  })
})

describe('tables', () => {
  test('numbers are flush right', () => {
    expect(
      formatTable(
        ['name', 'hits'],
        [
          ['a', '5'],
          ['bcd', '1,234'],
        ],
        PLAIN,
      ),
    ).toBe('name   hits\na         5\nbcd   1,234\n')
  })

  test('the widest column is cut to the terminal', () => {
    const table = formatTable(['id', 'title'], [['1', 'a title that is far too long']], {
      color: false,
      columns: 20,
    })
    expect(table).toBe('id  title\n1  a title that is…\n'.replace('1  a', ' 1  a'))
  })
})

describe('an inspection', () => {
  const inspection = create(InspectItemResponseSchema, {
    tiers: [
      {
        tier: Tier.MEMORY,
        present: true,
        current: true,
        asOf: 1700017n,
        age: durationFromMs(3200),
        remainingTtl: durationFromMs(3_540_000),
        sizeBytes: 1229n,
      },
      { tier: Tier.REDIS, skipped: SkipReason.DOWN, breaker: BreakerState.OPEN },
      { tier: Tier.POSTGRES, present: true, negative: true, asOf: 1700012n, breaker: BreakerState.CLOSED },
      { tier: Tier.ORIGIN, servedByOrigin: true, breaker: BreakerState.HALF_OPEN },
    ],
    floors: {
      keyFloor: 1700015n,
      tenantFloor: 1700009n,
      removedFloor: 1700015n,
      tagFloors: [{ tag: 'bags and\nmore that is long', floor: 1700012n }],
    },
  })

  test('is a picture of the tiers, and of copies and floors on the line of revisions', () => {
    expect(formatInspection('1', inspection, PLAIN)).toBe(
      [
        'item 1',
        '',
        'tier      copy                    as of    age  dropped in     size  breaker',
        'memory    ● holds it            1700017  3.2 s      59 min  1.2 KiB',
        'redis     ! down                                                     open',
        'postgres  ◐ knows: absent, old  1700012                              closed',
        'origin    ○ may know it                                              half open',
        '',
        'revision  …0009        …0012                 …0015      …0017',
        'memory    ──────────────────────────────────────────────●──────',
        'postgres  ─────────────◐───────────────────────────────────────',
        'floors    ▲ all items  ▲ tag bags and\\nmor…  ▲ item',
        '                                             ▲ removed',
        'a copy is current when no floor is to the right of it',
        '',
      ].join('\n'),
    )
  })

  test('fits a narrow terminal: the oldest revisions give way', () => {
    for (const columns of [40, 60, 80]) {
      const lines = formatInspection('1', inspection, { color: false, columns }).split('\n')
      const drawing = lines.filter((line) => /[─▲]|^revision/.test(line))
      expect(Math.max(...drawing.map((line) => line.length))).toBeLessThanOrEqual(columns)
    }
    expect(formatInspection('1', inspection, { color: false, columns: 40 })).toContain('▲ item')
  })

  test('says so when no invalidation is known', () => {
    const quiet = create(InspectItemResponseSchema, { tiers: [{ tier: Tier.MEMORY }], floors: {} })
    expect(formatInspection('1', quiet, PLAIN)).toContain('no invalidation of it is known')
  })
})

test('an event of a watch is one line, whatever its names contain', () => {
  const event = {
    revision: 17n,
    event: 'keys-invalidated',
    mode: 'remove',
    ids: Array.from({ length: 12 }, (_, i) => `i${i}\u001b[2J`),
    tags: [],
    items: [],
    committedAt: new Date(1234),
    clientId: 'a writer',
  } as const
  expect(formatEvent(event, PLAIN)).toMatch(
    /^00:00:01\.234 {2}17 {2}keys-invalidated {4}i0\\u001b\[2J, .* and 2 more \(remove\) {2}by a writer$/,
  )
  const plain = { ...event, mode: 'expire', ids: [], clientId: '' } as const
  expect(formatEvent({ ...plain, event: 'tags-invalidated', tags: ['sale'] }, PLAIN)).toMatch(/ tag sale$/)
  expect(formatEvent({ ...plain, event: 'tenant-invalidated' }, PLAIN)).toMatch(/ every item$/)
})

describe('metrics', () => {
  const snapshot = (hits: bigint, misses: bigint, atMs: number, startMs = 0) =>
    create(MetricsSnapshotSchema, {
      startTime: timestampFromMs(startMs),
      time: timestampFromMs(atMs),
      hits,
      misses,
      hitRate: 0.75,
      loads: misses,
      tiers: [{ tier: Tier.POSTGRES, hits: 5n, breaker: BreakerState.HALF_OPEN, bytes: 2048n }],
      rpcs: [
        {
          method: 'itemcache.v1.ItemCacheService/GetItem',
          started: 1234n,
          finished: { OK: 1230n, NOT_FOUND: 4n },
          latency: { count: 1234n, p50: durationFromMs(1), p99: durationFromMs(20) },
        },
      ],
    })

  test('a snapshot names hit rate, tiers and methods', () => {
    const text = formatMetrics(snapshot(3n, 1n, 60_000), PLAIN)
    expect(text).toContain('up 1 min, hit rate 75.0 % (3 hits, 1 misses)')
    expect(text).toMatch(/^postgres +5 +0 +0 +0 +2 KiB +half open$/m)
    expect(text).toMatch(/^GetItem +1,234 +1 ms +20 ms +NOT_FOUND 4$/m)
  })

  test('a change is told as rates over the time between two snapshots', () => {
    const line = formatChange(snapshot(100n, 100n, 10_000), snapshot(190n, 110n, 20_000))
    expect(line.trim().split(/\s{2,}/)).toEqual([
      '00:00:20',
      '10',
      '90.0 %',
      '–',
      '1.0',
      '0',
      '0',
      '–',
      'postgres half open',
    ])
  })

  test('a restart in between counts from zero, never below', () => {
    const line = formatChange(snapshot(1000n, 1000n, 10_000), snapshot(20n, 0n, 14_000, 12_000))
    expect(line.trim().split(/\s{2,}/)).toEqual([
      '00:00:14',
      '10',
      '100.0 %',
      '–',
      '0',
      '0',
      '0',
      '–',
      'postgres half open',
    ])
  })

  test('no reads have no hit rate', () => {
    const line = formatChange(snapshot(1n, 1n, 1000), snapshot(1n, 1n, 2000))
    expect(line).toContain('–')
  })
})
