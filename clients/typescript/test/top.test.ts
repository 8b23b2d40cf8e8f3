/** `top`: what it draws, and how it behaves on a terminal and without one. */
import { stripVTControlCharacters } from 'node:util'
import { create, type MessageInitShape } from '@bufbuild/protobuf'
import { timestampFromMs } from '@bufbuild/protobuf/wkt'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { startProcess } from '../../../test/support/process.ts'
import { freshDatabase, redisUrl } from '../../../test/support/servers.ts'
import { startService, type TestService } from '../../../test/support/service.ts'
import { History, render, sparkline } from '../src/commands/top.ts'
import { UnavailableError } from '../src/errors.ts'
import {
  BreakerState,
  type LatencySchema,
  type MetricsSnapshot,
  MetricsSnapshotSchema,
  Tier,
} from '../src/gen/itemcache/v1/item_cache_pb.ts'
import { FakeTerminal, itemcache, onTerminal } from './program.ts'

/** A snapshot `seconds` after the start of an instance that did `each` of everything per second. */
function snapshot(seconds: number, each: bigint, { breaker = BreakerState.CLOSED } = {}): MetricsSnapshot {
  const n = each * BigInt(seconds)
  // In the bucket that ends at 2^(40/4) µs: about a millisecond.
  const latency: MessageInitShape<typeof LatencySchema> = {
    count: n,
    buckets: [...Array.from({ length: 40 }, () => 0n), n],
  }
  const method = (name: string) => `itemcache.v1.ItemCacheService/${name}`
  const methods = ['GetItem', 'BatchGetItems', 'StreamItems', 'ListItems', 'CreateItem', 'UpdateItem']
  return create(MetricsSnapshotSchema, {
    startTime: timestampFromMs(1_700_000_000_000),
    time: timestampFromMs(1_700_000_000_000 + seconds * 1000),
    hits: n * 9n,
    misses: n,
    loads: n,
    coalescedLoads: n,
    staleServed: n,
    negativeHits: n,
    backgroundRefreshesOk: n,
    backgroundRefreshesFailed: n,
    invalidationsApplied: n,
    invalidationLag: latency,
    subscribers: n,
    gapsSent: n,
    tiers: [Tier.MEMORY, Tier.REDIS, Tier.POSTGRES, Tier.ORIGIN].map((tier) => ({
      tier,
      hits: n,
      misses: n,
      errors: n,
      timeouts: n,
      entries: n,
      bytes: n,
      evictions: n,
      expirations: n,
      breaker: tier === Tier.MEMORY ? BreakerState.UNSPECIFIED : breaker,
      latency: tier === Tier.MEMORY ? {} : latency,
    })),
    rpcs: [...methods, 'InvalidateItems', 'WatchInvalidations', 'a-method-with-a-name-that-has-no-room'].map(
      (name, i) => ({
        method: method(name),
        started: n * BigInt(i + 1),
        finished: { OK: n, UNAVAILABLE: n },
        latency,
      }),
    ),
  })
}

function history(each: bigint, seconds = 60, options = {}): History {
  const result = new History(2000)
  for (let second = 1; second <= seconds; second++) result.add(snapshot(second, each, options))
  return result
}

const view = { target: '127.0.0.1:50051', columns: 80, rows: 24, style: { color: false, columns: 80 } }

describe('the screen', () => {
  test('tells hit rate, latencies, breakers, lag and the hottest methods within 80 by 24', () => {
    const lines = render(history(10n), view)
    expect(lines).toHaveLength(24)
    expect(lines[0]).toMatch(/^ itemcache top {2}127\.0\.0\.1:50051 {2}up 1 min +22:14:20 UTC$/)
    expect(lines[2]).toMatch(/^ hit rate +90\.0 % +▇{30,}$/)
    expect(lines[3]).toMatch(/^ reads\/s +100 +█{30,}$/)
    expect(lines[4]).toMatch(/^ read p99 +939 µs +█{30,}$/)
    expect(lines[7]).toMatch(/^ memory +50\.0 % +10 +10 +20 +– +– +–$/)
    expect(lines[8]).toMatch(/^ redis +50\.0 % +10 +10 +20 +939 µs +939 µs +closed$/)
    expect(lines.join('\n')).toContain('applied 10/s   lag p50 939 µs   p99 939 µs   watchers 600   gaps 600')
    // The most calls first.
    expect(lines[17]).toMatch(/^ a-method-with-a-name- +90 +939 µs +939 µs +10$/)
    expect(lines[18]).toMatch(/^ WatchInvalidations +80 /)
    expect(lines[23]).toContain('q quits')
  })

  test.each([
    [80, 24],
    [120, 50],
    [100, 30],
    [80, 12],
    [200, 5],
  ])('fills %i by %i and nothing more, however large the numbers are', (columns, rows) => {
    const size = { ...view, columns, rows, style: { color: false, columns } }
    const refused = new UnavailableError(`no connection: ${'x'.repeat(300)}`)
    const target = `dns:///${'a-long-name.'.repeat(20)}internal:50051`
    for (const each of [0n, 1n, 123_456n]) {
      for (const breaker of [BreakerState.CLOSED, BreakerState.HALF_OPEN, BreakerState.OPEN]) {
        const past = history(each, 40, { breaker })
        for (const lost of [{}, { lost: refused, silentMs: 3_600_000 }, { lost: 'silent' as const }]) {
          const lines = render(past, { ...size, ...lost, target })
          expect(lines).toHaveLength(rows)
          for (const line of lines) expect([...line].length, line).toBeLessThanOrEqual(columns)
        }
      }
    }
  })

  test('colours change nothing but the colour', () => {
    const past = history(123n, 30, { breaker: BreakerState.OPEN })
    const colored = render(past, { ...view, style: { color: true, columns: 80 } })
    expect(colored.join('')).toContain('\u001b[31mopen')
    expect(colored.map(stripVTControlCharacters)).toEqual(render(past, view))
  })

  test('rates are those of the last ten seconds, not of the hours before', () => {
    const past = new History(2000)
    past.add(snapshot(3600, 1000n))
    for (let i = 1; i <= 10; i++) {
      const last = snapshot(3600, 1000n)
      past.add({ ...last, time: timestampFromMs(1_700_000_000_000 + (3600 + i) * 1000), hits: last.hits })
    }
    const [, , hitRate, reads] = render(past, view)
    expect(hitRate).toMatch(/^ hit rate +–/)
    expect(reads).toMatch(/^ reads\/s +0 /)
  })

  test('a restart of the instance begins anew, and a silence is a hole in the sparklines', () => {
    const past = history(10n, 10)
    const restarted = snapshot(4, 10n)
    past.add({
      ...restarted,
      startTime: timestampFromMs(1_700_000_020_000),
      time: timestampFromMs(1_700_000_024_000),
    })
    const lines = render(past, view)
    expect(lines[3]).toMatch(/^ reads\/s +100 /)
    expect(lines[3]).toMatch(/█+ {6}█$/)
  })

  test('a sparkline goes from the lowest to the highest level', () => {
    expect(sparkline([0, 1, 2, 3, 4, 5, 6, 7, 8, undefined, 9], 8)).toBe('▁▁▂▃▄▅▆▇█ █')
    expect(sparkline([0, 0], 0)).toBe('▁▁')
  })
})

describe('on a terminal', () => {
  let service: TestService
  const env = () => ({ ITEMCACHE_TARGET: service.address })

  beforeAll(async () => {
    service = await startService()
  })
  afterAll(() => service?.[Symbol.asyncDispose]())

  test.each([
    ['q', 'q'],
    ['Ctrl-C', '\u0003'],
    ['Escape', '\u001b'],
  ])('fills the screen, and %s leaves the terminal as it was', async (_name, keys) => {
    const terminal = new FakeTerminal(80, 24)
    terminal.write('before\n')
    const ended = onTerminal(terminal, ['top', '--interval', '100ms'], { env: env() })
    await service.client.call('getItem', { id: '1' })
    await expect.poll(async () => (await terminal.look()).lines.join('\n')).toMatch(/^ GetItem /m)
    const { lines, isFullScreen, isCursorVisible } = await terminal.look()
    expect({ isFullScreen, isCursorVisible, isRaw: terminal.isRaw }).toEqual({
      isFullScreen: true,
      isCursorVisible: false,
      isRaw: true,
    })
    expect(lines[0]).toMatch(/^ itemcache top .* UTC$/)
    expect(lines.filter((line) => /^ (?:memory|redis|postgres|origin) /.test(line))).toHaveLength(5)
    expect(lines[23]).toMatch(/^ q quits/)
    // An arrow is a sequence that begins with an escape, and no reason to go.
    terminal.press('\u001b[A')
    terminal.resize(100, 30)
    await expect.poll(async () => (await terminal.look()).lines[29]).toMatch(/^ q quits/)
    terminal.press(keys)
    expect(await ended).toBe(0)
    const after = await terminal.look()
    expect(after).toMatchObject({ isFullScreen: false, isCursorVisible: true })
    expect(after.lines[0]).toBe('before')
    expect(after.lines.slice(1).join('')).toBe('')
    expect(terminal).toMatchObject({ isRaw: false, isPaused: true })
  })

  test('a signal leaves it as it was, too', async () => {
    const terminal = new FakeTerminal(80, 24)
    const interrupted = new AbortController()
    const ended = onTerminal(terminal, ['top'], { env: env(), interruption: interrupted.signal })
    await expect.poll(async () => (await terminal.look()).lines.join('\n')).toMatch(/^ memory /m)
    interrupted.abort()
    expect(await ended).toBe(0)
    expect(await terminal.look()).toMatchObject({ isFullScreen: false, isCursorVisible: true })
  })

  test('--count ends it', async () => {
    const terminal = new FakeTerminal(80, 24)
    expect(await onTerminal(terminal, ['top', '--count', '2', '--interval', '100ms'], { env: env() })).toBe(0)
    expect(await terminal.look()).toMatchObject({ isFullScreen: false })
  })

  test('a service that is away from the start is an error, and the screen is not touched', async () => {
    const terminal = new FakeTerminal(80, 24)
    expect(await onTerminal(terminal, ['top', '--target', '127.0.0.1:1'])).toBe(4)
    const { lines, isFullScreen } = await terminal.look()
    expect(isFullScreen).toBe(false)
    expect(lines[0]).toMatch(/^itemcache: cannot reach 127\.0\.0\.1:1/)
  })

  test('a dumb terminal, and a pipe, get lines', async () => {
    const terminal = new FakeTerminal(100, 24)
    const argv = ['top', '--count', '2', '--interval', '100ms']
    expect(await onTerminal(terminal, argv, { env: { ...env(), TERM: 'dumb' } })).toBe(0)
    const { lines, isFullScreen } = await terminal.look()
    expect(isFullScreen).toBe(false)
    expect(lines[0]).toMatch(/^time \(UTC\) +reads\/s +hit rate +read p99/)
    const { exitCode, stdout, stderr } = await itemcache(argv, { env: env() })
    expect({ exitCode, stderr }).toEqual({ exitCode: 0, stderr: '' })
    expect(stdout).toMatch(/^time \(UTC\) .*\n(?:\d\d:\d\d:\d\d +\d.*\n){2}$/)
  })

  test('--json prints a snapshot per line, with the buckets of its latencies', async () => {
    await service.client.call('getItem', { id: '2' })
    const { exitCode, stdout } = await itemcache(['top', '--json', '--count', '2', '--interval', '100ms'], {
      env: env(),
    })
    expect(exitCode).toBe(0)
    const snapshots = stdout
      .trimEnd()
      .split('\n')
      .map((line) => JSON.parse(line))
    expect(snapshots).toHaveLength(2)
    const origin = snapshots[1].tiers.find(({ tier }: { tier: string }) => tier === 'TIER_ORIGIN')
    expect(origin.latency.buckets.map(Number).reduce((sum: number, n: number) => sum + n)).toBe(
      Number(origin.latency.count),
    )
  })
})

test('a service that goes away is waited for, and its return shown', async () => {
  await using database = await freshDatabase()
  const env = { DATABASE_URL: database.url, REDIS_URL: redisUrl(), ORIGIN_URL: 'off' }
  const terminal = new FakeTerminal(80, 24)
  let ended: Promise<number>
  let address: string
  {
    await using first = await startProcess(env)
    address = first.client.raw.getChannel().getTarget().replace(/^dns:/, '')
    ended = onTerminal(terminal, ['top', '--interval', '100ms', '--target', address])
    await expect.poll(async () => (await terminal.look()).lines.join('\n')).toMatch(/^ memory /m)
    first.signal('SIGKILL')
  }
  await expect.poll(async () => (await terminal.look()).lines[0]).toMatch(/no answer for /)
  expect((await terminal.look()).lines[23]).toMatch(/^ q quits {3}trying again: /)
  await using _second = await startProcess({ ...env, ITEMCACHE_LISTEN: address })
  await expect.poll(async () => (await terminal.look()).lines[0]).toMatch(/ UTC$/)
  terminal.press('q')
  expect(await ended).toBe(0)
})
