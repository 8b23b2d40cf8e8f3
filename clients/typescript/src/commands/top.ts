/** `top`: what an instance does, live: a full screen on a terminal, lines elsewhere. */
import { setTimeout as sleep } from 'node:timers/promises'
import { toJsonString } from '@bufbuild/protobuf'
import { timestampMs } from '@bufbuild/protobuf/wkt'
import type { Client } from '../client.ts'
import { CancelledError, ItemCacheError } from '../errors.ts'
import {
  breakerColor,
  breakerState,
  CHANGE_HEADER,
  count,
  formatBytes,
  formatChange,
  formatDuration,
  methodName,
  painter,
  percent,
  printable,
  rate,
  readLatencies,
  type Style,
  tierLabel,
} from '../format.ts'
import {
  type MetricsSnapshot,
  MetricsSnapshotSchema,
  type RpcMetrics,
  Tier,
  type TierMetrics,
} from '../gen/itemcache/v1/item_cache_pb.ts'
import { Span, uptimeMs } from '../rates.ts'
import { type Io, isScreen, Screen, styleOf } from '../terminal.ts'

/** Rates and latencies are those of the last ten seconds: long enough to be calm, short enough to show an incident. */
const WINDOW_MS = 10_000
/** What one character of a sparkline stands for, at least. */
const SLOT_MS = 2_000
/** The widest terminal that gets full sparklines. */
const MAX_SLOTS = 500
const RETRY_MS = 1_000

export interface TopFlags {
  readonly interval: number
  readonly count?: number
  readonly json?: true
  readonly target: string
}

/** Goes on until `count` snapshots were shown, a key ends it, or the program is interrupted. */
export async function top(client: Client, flags: TopFlags, io: Io): Promise<void> {
  // Fails within the deadline, which a stream has not.
  await client.metrics()
  if (!flags.json && isScreen(io)) return await onScreen(client, flags, io)
  const signal = io.interruption?.()
  let before: MetricsSnapshot | undefined
  let left = flags.count ?? Number.POSITIVE_INFINITY
  if (!flags.json) io.stdout.write(CHANGE_HEADER)
  try {
    for await (const snapshot of client.watchMetrics({ intervalMs: flags.interval, buckets: true, signal })) {
      if (flags.json) io.stdout.write(`${toJsonString(MetricsSnapshotSchema, snapshot)}\n`)
      else if (before !== undefined) io.stdout.write(formatChange(before, snapshot))
      // The first one of the lines is what the others are compared with.
      if ((flags.json || before !== undefined) && --left <= 0) return
      before = snapshot
    }
  } catch (error) {
    if (!(error instanceof CancelledError && signal?.aborted)) throw error
  }
}

async function onScreen(
  client: Client,
  { interval, count: frames, target }: TopFlags,
  io: Io,
): Promise<void> {
  const history = new History(Math.max(SLOT_MS, interval))
  let heardMs = performance.now()
  let error: ItemCacheError | undefined
  const draw = () => {
    const silentMs = performance.now() - heardMs
    const lost = error ?? (silentMs > 2 * interval + 2000 ? 'silent' : undefined)
    const { columns, rows } = screen
    const style = { ...styleOf(io.stdout, io.env), columns }
    screen.draw(render(history, { target, columns, rows, style, ...(lost && { lost, silentMs }) }))
  }
  using screen = new Screen(io, draw)
  const interruption = io.interruption?.()
  const signal = interruption ? AbortSignal.any([screen.quit, interruption]) : screen.quit
  // Draws also when nothing comes, to say so.
  const ticking = setInterval(() => performance.now() - heardMs > interval + 1000 && draw(), 1000)
  let left = frames ?? Number.POSITIVE_INFINITY
  try {
    draw()
    while (left > 0 && !signal.aborted) {
      try {
        for await (const snapshot of client.watchMetrics({ intervalMs: interval, buckets: true, signal })) {
          history.add(snapshot)
          heardMs = performance.now()
          error = undefined
          draw()
          if (--left <= 0) return
        }
      } catch (caught) {
        if (signal.aborted) return
        if (!(caught instanceof ItemCacheError)) throw caught
        // A service that restarts is waited for; one that refuses will go on refusing.
        if (!['UNAVAILABLE', 'UNKNOWN', 'INTERNAL', 'DEADLINE_EXCEEDED'].includes(caught.code)) throw caught
        error = caught
        draw()
      }
      await sleep(RETRY_MS, undefined, { signal }).catch(() => {})
    }
  } finally {
    clearInterval(ticking)
  }
}

interface Slot {
  readonly number: number
  hits: number
  reads: number
  seconds: number
  p99: number | undefined
}

/** The snapshots of the window, and what happened in each slot of time before. */
export class History {
  readonly slotMs: number
  readonly #recent: MetricsSnapshot[] = []
  readonly #slots: Slot[] = []

  constructor(slotMs: number) {
    this.slotMs = slotMs
  }

  get last(): MetricsSnapshot | undefined {
    return this.#recent.at(-1)
  }

  add(snapshot: MetricsSnapshot): void {
    const { last } = this
    this.#recent.push(snapshot)
    // One that is older than the window stays: the window begins with it.
    const begin = uptimeMs(snapshot) - WINDOW_MS
    while (this.#recent.length > 2 && uptimeMs(this.#recent[1] ?? snapshot) <= begin) this.#recent.shift()
    if (last === undefined) return
    const span = new Span(last, snapshot)
    const at = snapshot.time === undefined ? 0 : timestampMs(snapshot.time)
    const number = Math.floor(at / this.slotMs)
    let slot = this.#slots.at(-1)
    // A clock that was set back does not begin a slot.
    if (slot === undefined || number > slot.number) {
      slot = { number, hits: 0, reads: 0, seconds: 0, p99: undefined }
      this.#slots.push(slot)
      if (this.#slots.length > MAX_SLOTS) this.#slots.shift()
    }
    const hits = span.grown((s) => s.hits)
    slot.hits += hits
    slot.reads += hits + span.grown((s) => s.misses)
    slot.seconds += span.seconds
    const p99 = span.percentile(0.99, readLatencies)
    if (p99 !== undefined) slot.p99 = Math.max(slot.p99 ?? 0, p99)
  }

  /** The window; `undefined` before the first snapshot. */
  span(): Span | undefined {
    const { last } = this
    return last && new Span(this.#recent.length > 1 ? this.#recent[0] : undefined, last)
  }

  /** The last slots, `undefined` where nothing was heard. */
  slots(length: number): (Slot | undefined)[] {
    const last = this.#slots.at(-1)?.number ?? 0
    const byNumber = new Map(this.#slots.map((slot) => [slot.number, slot]))
    return Array.from({ length }, (_, i) => byNumber.get(last - length + 1 + i))
  }
}

const LEVELS = '▁▂▃▄▅▆▇█'

/** One character per value. `max`: what is drawn highest. Nothing where there is no value. */
export function sparkline(values: readonly (number | undefined)[], max: number): string {
  return values
    .map((value) =>
      value === undefined ? ' ' : LEVELS[max > 0 ? Math.min(7, Math.floor((value / max) * 7)) : 0],
    )
    .join('')
}

export interface View {
  readonly target: string
  readonly columns: number
  readonly rows: number
  readonly style: Style
  /** Why nothing comes. */
  readonly lost?: ItemCacheError | 'silent'
  readonly silentMs?: number
}

/** The lines of the screen: as many as it has rows at most, none longer than it is wide. */
export function render(history: History, view: View): string[] {
  const paint = painter(view.style)
  const { last } = history
  const span = history.span()
  const foot = footer(view)
  if (last === undefined || span === undefined) {
    return [header(view, undefined), '', ' waiting for the first numbers', '', foot].slice(0, view.rows)
  }
  const lines = [
    header(view, last),
    '',
    ...sparklines(history, span, view),
    '',
    ...tierTable(last, span, paint),
    '',
    ...details(last, span, view),
    '',
  ]
  const room = Math.max(0, view.rows - 1 - lines.length)
  const table = rpcTable(last, span, paint).slice(0, room)
  const body = [...lines, ...table].slice(0, Math.max(0, view.rows - 1))
  while (body.length < view.rows - 1) body.push('')
  return [...body, foot]
}

type Paint = ReturnType<typeof painter>

function header(
  { target, columns, style, lost, silentMs = 0 }: View,
  last: MetricsSnapshot | undefined,
): string {
  const paint = painter(style)
  const time = last?.time === undefined ? '' : new Date(timestampMs(last.time)).toISOString().slice(11, 19)
  const right =
    lost === undefined ? (time === '' ? '' : `${time} UTC`) : `no answer for ${formatDuration(silentMs)}`
  const up = last === undefined ? '' : `  up ${formatDuration(uptimeMs(last))}`
  const room = Math.max(0, columns - right.length - up.length - 18)
  const shown = printable(target)
  const where = shown.length > room ? `${shown.slice(0, Math.max(0, room - 1))}…` : shown
  const left = ` itemcache top  ${where}${up}`
  const gap = ' '.repeat(Math.max(1, columns - left.length - right.length - 1))
  return `${paint('bold', left)}${gap}${lost === undefined ? right : paint(['bold', 'red'], right)}`
}

function footer({ lost, columns, style }: View): string {
  const text = ' q quits   rates, hit rates and latencies are those of the last 10 s'
  if (lost === undefined) return painter(style)('dim', text)
  const why = lost === 'silent' ? 'the service does not answer' : printable(lost.message)
  return painter(style)('red', ` q quits   trying again: ${why}`.slice(0, columns))
}

function sparklines(history: History, span: Span, { columns, style }: View): string[] {
  const paint = painter(style)
  const slots = history.slots(Math.min(MAX_SLOTS, Math.max(0, columns - 26)))
  const row = (
    label: string,
    value: string,
    color: 'green' | 'cyan' | 'yellow',
    of: (slot: Slot) => number | undefined,
    top?: number,
  ) => {
    const values = slots.map((slot) => slot && of(slot))
    const max = top ?? Math.max(0, ...values.map((each) => each ?? 0))
    return ` ${label.padEnd(11)}${value.padStart(10)}  ${paint(color, sparkline(values, max))}`
  }
  const hits = span.grown((s) => s.hits)
  const reads = hits + span.grown((s) => s.misses)
  const p99 = span.percentile(0.99, readLatencies)
  return [
    row(
      'hit rate',
      reads === 0 ? '–' : percent(hits / reads),
      'green',
      (slot) => (slot.reads === 0 ? undefined : slot.hits / slot.reads),
      1,
    ),
    row('reads/s', rate(span.seconds > 0 ? reads / span.seconds : 0), 'cyan', (slot) =>
      slot.seconds === 0 ? undefined : slot.reads / slot.seconds,
    ),
    row('read p99', p99 === undefined ? '–' : formatDuration(p99), 'yellow', (slot) => slot.p99),
  ]
}

function tierTable(last: MetricsSnapshot, span: Span, paint: Paint): string[] {
  const widths = [9, 9, 9, 10, 10, 9, 9]
  const line = (cells: readonly string[]) =>
    ` ${cells.map((cell, i) => (i === 0 ? cell.padEnd(9) : cell.padStart(widths[i] ?? 0))).join('')}`
  const head = line(['tier', 'hit rate', 'hits/s', 'misses/s', 'failed/s', 'p50', 'p99'])
  return [
    paint('dim', `${head}  breaker`),
    ...last.tiers.map(({ tier, breaker }) => {
      const find = (s: MetricsSnapshot): TierMetrics | undefined => s.tiers.find((each) => each.tier === tier)
      const hits = span.rate((s) => find(s)?.hits)
      const misses = span.rate((s) => find(s)?.misses)
      const failed = span.rate((s) => (find(s)?.errors ?? 0n) + (find(s)?.timeouts ?? 0n))
      const latency = (share: number) => {
        const ms = span.percentile(share, (s) => [find(s)?.latency])
        return ms === undefined ? '–' : formatDuration(ms)
      }
      const cells = line([
        tierLabel(tier),
        hits + misses > 0 ? percent(hits / (hits + misses)) : '–',
        rate(hits),
        rate(misses),
        rate(failed),
        latency(0.5),
        latency(0.99),
      ])
      const state = breakerState(breaker)
      return `${failed > 0 ? paint('red', cells) : cells}  ${paint(breakerColor(breaker), state || '–')}`
    }),
  ]
}

/** What has no room at the right is left out. */
function details(last: MetricsSnapshot, span: Span, { columns, style }: View): string[] {
  const paint = painter(style)
  const find = (s: MetricsSnapshot) => s.tiers.find(({ tier }) => tier === Tier.MEMORY)
  const per = (of: (s: MetricsSnapshot) => bigint | undefined) => `${short(span.rate(of))}/s`
  const lag = (share: number) => {
    const ms = span.percentile(share, (s) => [s.invalidationLag])
    return ms === undefined ? '–' : formatDuration(ms)
  }
  const row = (label: string, parts: readonly string[]) => {
    let room = columns - 10
    const fitting = parts.filter((part) => {
      room -= part.length + 3
      return room >= -3
    })
    return ` ${paint('dim', label.padEnd(9))}${fitting.join('   ')}`
  }
  const { subscribers, gapsSent } = last
  const { entries = 0n, bytes = 0n } = find(last) ?? {}
  return [
    row('log', [
      `applied ${per((s) => s.invalidationsApplied)}`,
      `lag p50 ${lag(0.5)}`,
      `p99 ${lag(0.99)}`,
      `watchers ${short(subscribers)}`,
      `gaps ${short(gapsSent)}`,
    ]),
    row('loads', [
      per((s) => s.loads),
      `joined ${per((s) => s.coalescedLoads)}`,
      `refreshed ${per((s) => s.backgroundRefreshesOk)}`,
      `failed ${per((s) => s.backgroundRefreshesFailed)}`,
      `stale ${per((s) => s.staleServed)}`,
    ]),
    row('memory', [
      `${short(entries)} copies`,
      formatBytes(bytes),
      `evicted ${per((s) => find(s)?.evictions)}`,
      `expired ${per((s) => find(s)?.expirations)}`,
      `absent ${per((s) => s.negativeHits)}`,
    ]),
  ]
}

/** A number that is short also when it is large: `12.3K`. */
function short(value: bigint | number): string {
  if (value < 10_000) return typeof value === 'bigint' ? count(value) : rate(value)
  return value.toLocaleString('en-US', { notation: 'compact', maximumFractionDigits: 1 })
}

/** The methods, the hottest first. */
function rpcTable(last: MetricsSnapshot, span: Span, paint: Paint): string[] {
  const line = (cells: readonly string[]) =>
    ` ${cells.map((cell, i) => (i === 0 ? cell.padEnd(22) : cell.padStart(11))).join('')}`
  const rows = last.rpcs.map(({ method, started }) => {
    const find = (s: MetricsSnapshot): RpcMetrics | undefined => s.rpcs.find((rpc) => rpc.method === method)
    const notOk = (s: MetricsSnapshot) =>
      Object.entries(find(s)?.finished ?? {}).reduce((sum, [code, n]) => (code === 'OK' ? sum : sum + n), 0n)
    return { method, started, calls: span.rate((s) => find(s)?.started), refused: span.rate(notOk), find }
  })
  rows.sort((a, b) => b.calls - a.calls || Number(b.started - a.started))
  return [
    paint('dim', line(['rpc', 'calls/s', 'p50', 'p99', 'not ok/s'])),
    ...rows.map(({ method, calls, refused, find }) => {
      const latency = (share: number) => {
        const ms = span.percentile(share, (s) => [find(s)?.latency])
        return ms === undefined ? '–' : formatDuration(ms)
      }
      const cells = line([
        printable(methodName(method)).slice(0, 21),
        rate(calls),
        latency(0.5),
        latency(0.99),
        rate(refused),
      ])
      return calls === 0 ? paint('dim', cells) : cells
    }),
  ]
}
