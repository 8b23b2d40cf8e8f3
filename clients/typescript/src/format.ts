/** What people read: items, tiers and metrics as text. Text of items is printed so that it cannot drive a terminal. */
import { styleText } from 'node:util'
import type { DescEnum } from '@bufbuild/protobuf'
import { type Timestamp, timestampDate } from '@bufbuild/protobuf/wkt'
import { toMs } from './duration.ts'
import type { ItemCacheError } from './errors.ts'
import {
  BreakerState,
  BreakerStateSchema,
  CacheOutcomeSchema,
  type CacheStatus,
  type InspectItemResponse,
  type Item,
  ItemSource,
  ItemSourceSchema,
  type Latency,
  type MetricsSnapshot,
  type SkippedTier,
  SkipReason,
  SkipReasonSchema,
  StaleReason,
  StaleReasonSchema,
  Tier,
  type TierInspection,
  type TierMetrics,
  TierSchema,
} from './gen/itemcache/v1/item_cache_pb.ts'
import { formatMoney } from './money.ts'

/** How a place can be written to. */
export interface Style {
  readonly color: boolean
  /** Cells are cut so that a line of a table has at most this many characters. Infinity: never. */
  readonly columns: number
}

type Paint = (format: Parameters<typeof styleText>[0], text: string) => string

function painter({ color }: Style): Paint {
  return (format, text) => (color ? styleText(format, text, { validateStream: false }) : text)
}

/** Text without control characters: each is shown as its escape, as `\n` or `\u001b`. */
export function printable(text: string): string {
  return text.replace(/[\p{Cc}\p{Bidi_Control}\p{Surrogate}]/gu, (char) =>
    char >= '\x7f'
      ? `\\u${char.charCodeAt(0).toString(16).padStart(4, '0')}`
      : JSON.stringify(char).slice(1, -1),
  )
}

/** Milliseconds with the unit that suits: `850 µs`, `3.2 s`, `4 min 51 s`, `2 h 3 min`, `3 d 4 h`. */
export function formatDuration(ms: number): string {
  if (ms < 0) return `-${formatDuration(-ms)}`
  if (ms < 0.9995) return ms === 0 ? '0 s' : `${Math.round(ms * 1000)} µs`
  if (ms < 999.5) return `${ms < 9.95 ? Number(ms.toFixed(1)) : Math.round(ms)} ms`
  const seconds = Math.round(ms / 1000)
  if (seconds < 60) return `${ms < 9950 ? Number((ms / 1000).toFixed(1)) : seconds} s`
  if (seconds < 3600) return twoUnits(seconds, 60, 'min', 1, 's')
  if (seconds < 86_400) return twoUnits(seconds, 3600, 'h', 60, 'min')
  return twoUnits(seconds, 86_400, 'd', 3600, 'h')
}

function twoUnits(seconds: number, big: number, bigName: string, small: number, smallName: string): string {
  const rest = Math.floor((seconds % big) / small)
  return `${Math.floor(seconds / big)} ${bigName}${rest === 0 ? '' : ` ${rest} ${smallName}`}`
}

/** A size with the unit that suits: `512 B`, `1.2 KiB`, `256 MiB`. */
export function formatBytes(bytes: number | bigint): string {
  let size = Number(bytes)
  for (const unit of ['B', 'KiB', 'MiB', 'GiB']) {
    if (size < 1023.5 || unit === 'GiB') return `${Number(size.toFixed(size < 9.95 ? 1 : 0))} ${unit}`
    size /= 1024
  }
  return ''
}

const count = (value: bigint): string => value.toLocaleString('en-US')
const width = (text: string): number => [...text].length

/** Where an answer came from: `from MEMORY (HIT), age 3.2 s, fresh for 56 s, revision 17`. */
export function formatCache(cache: CacheStatus | undefined, revision?: bigint): string {
  const parts = cache === undefined ? [] : cacheParts(cache)
  if (revision !== undefined) parts.push(`revision ${revision}`)
  return parts.join(', ')
}

function cacheParts(cache: CacheStatus): string[] {
  const { tier, outcome, staleReason, coalesced, age, freshFor, skippedTiers } = cache
  const reason = staleReason === StaleReason.UNSPECIFIED ? '' : `: ${words(StaleReasonSchema, staleReason)}`
  const from = tier === Tier.UNSPECIFIED ? 'no tier' : nameOf(TierSchema, tier)
  const freshMs = toMs(freshFor) ?? 0
  return [
    `from ${from} (${nameOf(CacheOutcomeSchema, outcome)}${reason})`,
    ...(age === undefined || tier === Tier.UNSPECIFIED ? [] : [`age ${formatDuration(toMs(age))}`]),
    ...(freshMs > 0 ? [`fresh for ${formatDuration(freshMs)}`] : []),
    ...(coalesced ? ["shared another caller's load"] : []),
    ...skippedTiers.map(formatSkipped),
  ]
}

function formatSkipped({ tier, reason }: SkippedTier): string {
  return `without ${nameOf(TierSchema, tier)} (${words(SkipReasonSchema, reason)})`
}

/** The name of an enum's value, as `SOFT_TIMEOUT`; the number for one that this release does not know. */
function nameOf(desc: DescEnum, value: number): string {
  return desc.value[value]?.localName ?? String(value)
}

/** The same as people write it: `soft timeout`. */
function words(desc: DescEnum, value: number): string {
  return nameOf(desc, value).toLowerCase().replaceAll('_', ' ')
}

/** The fields of an item that are set, one per line. */
export function formatItem(item: Item, style: Style): string {
  const { price, rating, attributes, source, revision, etag } = item
  const rows: [string, string | undefined][] = [
    ['id', item.id],
    ['title', item.title],
    ['description', item.description],
    ['category', item.category],
    ['price', price && formatMoney(price)],
    ['rating', rating && `${rating.rate} (${count(rating.count)} ${rating.count === 1n ? 'vote' : 'votes'})`],
    ['tags', item.tags.join(', ')],
    ['image', item.imageUri],
    ['attributes', attributes && JSON.stringify(attributes)],
    ['source', source === ItemSource.UNSPECIFIED ? '' : words(ItemSourceSchema, source)],
    ['etag', etag],
    ['revision', revision === 0n ? '' : revision.toString()],
    ['created', time(item.createTime)],
    ['updated', time(item.updateTime)],
  ]
  const paint = painter(style)
  return rows
    .filter(([, value]) => value !== undefined && value !== '')
    .map(([name, value = '']) => `${paint('dim', name.padEnd(11))}  ${printable(value)}\n`)
    .join('')
}

/** `''` for one that is unset or out of the range of dates. */
function time(timestamp: Timestamp | undefined): string {
  const date = timestamp && timestampDate(timestamp)
  return date === undefined || Number.isNaN(date.getTime()) ? '' : date.toISOString()
}

/** What an item's error says, in one phrase. */
export function formatError(error: ItemCacheError): string {
  const violations = error.violations.map(({ field, description }) => `${field} ${description}`)
  return printable(violations.length > 0 ? violations.join('; ') : error.message)
}

/** Rows under a header; numbers flush right. The widest column is cut when a line would be longer than allowed. */
export function formatTable(
  header: readonly string[],
  rows: readonly (readonly string[])[],
  style: Style,
): string {
  const cells = [header, ...rows].map((row) => row.map(printable))
  const widths = header.map((_, i) => Math.max(...cells.map((row) => width(row[i] ?? ''))))
  const excess = widths.reduce((sum, each) => sum + each + 2, -2) - style.columns
  const widest = widths.indexOf(Math.max(...widths))
  if (excess > 0) widths[widest] = Math.max(8, (widths[widest] ?? 0) - excess)
  const numeric = header.map(
    (_, i) => rows.length > 0 && rows.every((row) => /^(?:[-\d.,]+( .*)?)?$/.test(row[i] ?? '')),
  )
  const paint = painter(style)
  return cells
    .map((row, r) => {
      const line = row
        .map((cell, i) => fit(cell, widths[i] ?? 0, numeric[i] === true))
        .join('  ')
        .trimEnd()
      return `${r === 0 ? paint('dim', line) : line}\n`
    })
    .join('')
}

function fit(cell: string, room: number, right: boolean): string {
  const chars = [...cell]
  if (chars.length > room) return `${chars.slice(0, room - 1).join('')}…`
  const padding = ' '.repeat(room - chars.length)
  return right ? padding + cell : cell + padding
}

/** Items as a table. */
export function formatItems(items: readonly Item[], style: Style): string {
  const rows = items.map(({ id, title, category, price }) => [
    id,
    title,
    category,
    price === undefined ? '' : formatMoney(price),
  ])
  return formatTable(['id', 'title', 'category', 'price'], rows, style)
}

/** Which tiers hold an item, and what a copy must satisfy to be served. */
export function formatInspection(id: string, { tiers, floors }: InspectItemResponse, style: Style): string {
  const paint = painter(style)
  const rows = tiers.map((tier) => {
    const { mark, color, state } = verdict(tier)
    const facts = tierFacts(tier).join('   ')
    return `  ${words(TierSchema, tier.tier).padEnd(9)} ${paint(color, `${mark} ${state.padEnd(18)}`)} ${facts}`.trimEnd()
  })
  const lines = [paint('bold', `item ${printable(id)}`), ...rows]
  if (floors !== undefined) {
    const { tenantFloor, keyFloor, tagFloors, removedFloor } = floors
    const known = [
      ...(keyFloor > 0n ? [`the item itself ${keyFloor}`] : []),
      ...tagFloors.map(({ tag, floor }) => `tag ${printable(tag)} ${floor}`),
      ...(tenantFloor > 0n ? [`all items ${tenantFloor}`] : []),
      ...(removedFloor > 0n ? [`removed ${removedFloor}`] : []),
    ]
    lines.push(`last invalidations: ${known.length === 0 ? 'none known' : known.join(', ')}`)
  }
  return `${lines.join('\n')}\n`
}

function verdict(tier: TierInspection): {
  mark: string
  color: 'green' | 'yellow' | 'red' | 'dim'
  state: string
} {
  if (tier.skipped === SkipReason.OFF) return { mark: '–', color: 'dim', state: 'off' }
  if (tier.skipped !== SkipReason.UNSPECIFIED) {
    return { mark: '!', color: 'red', state: words(SkipReasonSchema, tier.skipped) }
  }
  if (tier.tier === Tier.ORIGIN) {
    return { mark: '○', color: 'dim', state: tier.servedByOrigin ? 'may know it' : 'cannot know it' }
  }
  if (!tier.present) return { mark: '○', color: 'dim', state: 'nothing' }
  const what = tier.negative ? 'knows: absent' : 'holds it'
  return tier.current
    ? { mark: '●', color: 'green', state: what }
    : { mark: '◐', color: 'yellow', state: `${what}, old` }
}

function tierFacts(tier: TierInspection): string[] {
  if (!tier.present) return []
  const { age, remainingTtl, sizeBytes } = tier
  return [
    `as of ${tier.asOf}`,
    ...(age === undefined ? [] : [`age ${formatDuration(toMs(age))}`]),
    ...(remainingTtl === undefined ? [] : [`dropped in ${formatDuration(toMs(remainingTtl))}`]),
    ...(sizeBytes === 0n ? [] : [formatBytes(sizeBytes)]),
  ]
}

/** A snapshot of an instance's metrics. */
export function formatMetrics(snapshot: MetricsSnapshot, style: Style): string {
  const { hits, misses, loads, invalidationLag: lag } = snapshot
  const lines = [
    `up ${formatDuration(uptimeMs(snapshot))}, hit rate ${percent(snapshot.hitRate)} (${count(hits)} hits, ${count(misses)} misses)`,
    `of the hits: ${count(snapshot.staleServed)} stale, ${count(snapshot.negativeHits)} known to be absent`,
    `loads: ${count(loads)}, joined by ${count(snapshot.coalescedLoads)} more reads; in the background: ${count(snapshot.backgroundRefreshesOk)} ok, ${count(snapshot.backgroundRefreshesFailed)} failed`,
    `log rows applied: ${count(snapshot.invalidationsApplied)}${lag && lag.count > 0n ? `, ${lagOf(lag)} after their commit` : ''}`,
  ]
  const tierRows = snapshot.tiers.map((tier) => [
    words(TierSchema, tier.tier),
    count(tier.hits),
    count(tier.misses),
    count(tier.errors),
    count(tier.timeouts),
    ...percentiles(tier.latency),
    tier.entries === 0n ? '' : count(tier.entries),
    tier.bytes === 0n ? '' : formatBytes(tier.bytes),
    breaker(tier),
  ])
  const rpcRows = snapshot.rpcs.map(({ method, started, finished, latency }) => {
    const refused = Object.entries(finished).filter(([code, times]) => code !== 'OK' && times > 0n)
    return [
      method.slice(method.lastIndexOf('/') + 1),
      count(started),
      ...percentiles(latency),
      refused.map(([code, times]) => `${code} ${count(times)}`).join(', '),
    ]
  })
  const tierHeader = [
    'tier',
    'hits',
    'misses',
    'errors',
    'timeouts',
    'p50',
    'p99',
    'entries',
    'size',
    'breaker',
  ]
  return [
    `${lines.join('\n')}\n`,
    formatTable(tierHeader, tierRows, style),
    ...(rpcRows.length === 0
      ? []
      : [formatTable(['method', 'calls', 'p50', 'p99', 'not ok'], rpcRows, style)]),
  ].join('\n')
}

function uptimeMs({ startTime, time }: MetricsSnapshot): number {
  if (startTime === undefined || time === undefined) return 0
  return timestampDate(time).getTime() - timestampDate(startTime).getTime()
}

const percent = (rate: number): string => `${(rate * 100).toFixed(1)} %`

function lagOf({ p50, p99 }: Latency): string {
  return `${formatDuration(toMs(p50) ?? 0)} (p50) to ${formatDuration(toMs(p99) ?? 0)} (p99)`
}

function percentiles(latency: Latency | undefined): [string, string] {
  if (latency === undefined || latency.count === 0n) return ['', '']
  return [formatDuration(toMs(latency.p50) ?? 0), formatDuration(toMs(latency.p99) ?? 0)]
}

function breaker({ breaker }: TierMetrics): string {
  return breaker === BreakerState.UNSPECIFIED ? '' : words(BreakerStateSchema, breaker)
}

/** The head of the lines of `formatChange`. */
export const CHANGE_HEADER = 'time (UTC)    reads/s  hit rate   loads/s   stale/s  failed/s\n'

/** What happened between two snapshots of an instance, as one line. A restart in between counts from zero. */
export function formatChange(before: MetricsSnapshot, after: MetricsSnapshot): string {
  const seconds = (uptimeMs(after) - uptimeMs(before)) / 1000
  const restarted = seconds <= 0 || after.startTime?.seconds !== before.startTime?.seconds
  const span = restarted ? uptimeMs(after) / 1000 : seconds
  const grown = (of: (snapshot: MetricsSnapshot) => bigint) =>
    Number(of(after) - (restarted ? 0n : of(before)))
  const hits = grown(({ hits }) => hits)
  const reads = hits + grown(({ misses }) => misses)
  const rate = (times: number) =>
    (span > 0 ? times / span : 0).toFixed(times > 0 && times / span < 10 ? 1 : 0)
  const cells = [
    rate(reads),
    reads === 0 ? '–' : percent(hits / reads),
    rate(grown(({ loads }) => loads)),
    rate(grown(({ staleServed }) => staleServed)),
    rate(grown(failures)),
  ]
  const at = after.time === undefined ? '' : timestampDate(after.time).toISOString().slice(11, 19)
  return `${at.padEnd(11)}${cells.map((cell) => cell.padStart(10)).join('')}\n`
}

/** Calls that the service failed, not ones in which the caller was wrong. */
function failures({ rpcs }: MetricsSnapshot): bigint {
  const codes = ['UNAVAILABLE', 'DEADLINE_EXCEEDED', 'INTERNAL', 'UNKNOWN', 'RESOURCE_EXHAUSTED']
  return rpcs.reduce(
    (sum, { finished }) => codes.reduce((more, code) => more + (finished[code] ?? 0n), sum),
    0n,
  )
}
