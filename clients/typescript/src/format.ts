/** What people read: items, tiers and metrics as text. Text of items is printed so that it cannot drive a terminal. */
import { styleText } from 'node:util'
import type { DescEnum } from '@bufbuild/protobuf'
import { type Timestamp, timestampDate } from '@bufbuild/protobuf/wkt'
import { toMs } from './duration.ts'
import type { ItemCacheError } from './errors.ts'
import type { InvalidationEvent } from './follow.ts'
import {
  BreakerState,
  BreakerStateSchema,
  CacheOutcomeSchema,
  type CacheStatus,
  type Floors,
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
  TierSchema,
} from './gen/itemcache/v1/item_cache_pb.ts'
import { formatMoney } from './money.ts'
import { Span, uptimeMs } from './rates.ts'

/** How a place can be written to. */
export interface Style {
  readonly color: boolean
  /** Cells are cut so that a line of a table has at most this many characters. Infinity: never. */
  readonly columns: number
}

type Paint = (format: Parameters<typeof styleText>[0], text: string) => string

export function painter({ color }: Style): Paint {
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

/** `1,234`. */
export const count = (value: bigint | number): string => value.toLocaleString('en-US')

/** `98.7 %`, of a share from 0 to 1. */
export const percent = (share: number): string => `${(share * 100).toFixed(1)} %`

/** A number per second, with one decimal where that matters. */
export function rate(perSecond: number): string {
  if (perSecond === 0) return '0'
  return perSecond < 9.95 ? perSecond.toFixed(1) : count(Math.round(perSecond))
}

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

/** The tier that answered: `memory`, or `no tier`. */
export function tierName(cache: CacheStatus | undefined): string {
  return cache === undefined || cache.tier === Tier.UNSPECIFIED ? 'no tier' : tierLabel(cache.tier)
}

export const tierLabel = (tier: Tier): string => words(TierSchema, tier)

/** `GetItem` of `itemcache.v1.ItemCacheService/GetItem`. */
export const methodName = (method: string): string => method.slice(method.lastIndexOf('/') + 1)

/** `''` where there is no breaker. */
export function breakerState(state: BreakerState): string {
  return state === BreakerState.UNSPECIFIED ? '' : words(BreakerStateSchema, state)
}

export function breakerColor(state: BreakerState): 'green' | 'yellow' | 'red' | 'dim' {
  if (state === BreakerState.CLOSED) return 'green'
  if (state === BreakerState.HALF_OPEN) return 'yellow'
  return state === BreakerState.OPEN ? 'red' : 'dim'
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

/** Which tiers hold an item, and how their copies and its invalidations lie on the line of revisions. */
export function formatInspection(id: string, { tiers, floors }: InspectItemResponse, style: Style): string {
  const paint = painter(style)
  const rows = tiers.map((tier) => {
    const { age, remainingTtl, sizeBytes, asOf, present } = tier
    const { mark, state } = verdict(tier)
    return [
      tierLabel(tier.tier),
      `${mark} ${state}`,
      present ? `${asOf}` : '',
      present && age !== undefined ? formatDuration(toMs(age)) : '',
      present && remainingTtl !== undefined ? formatDuration(toMs(remainingTtl)) : '',
      present && sizeBytes > 0n ? formatBytes(sizeBytes) : '',
      breakerState(tier.breaker),
    ]
  })
  const header = ['tier', 'copy', 'as of', 'age', 'dropped in', 'size', 'breaker']
  const table = formatTable(header, rows, style).trimEnd().split('\n')
  const colored = tiers.map((tier, i) => {
    const { mark, color } = verdict(tier)
    return (table[i + 1] ?? '').replace(mark, paint(color, mark))
  })
  const lines = [paint('bold', `item ${printable(id)}`), '', table[0], ...colored]
  if (floors !== undefined) lines.push('', ...revisionLine(tiers, floors, style))
  return `${lines.join('\n')}\n`
}

interface Mark {
  readonly revision: bigint
  readonly row: string
  readonly text: string
  readonly color: 'green' | 'yellow' | 'red' | 'dim' | 'cyan'
}

/** Names of tags are cut to so many characters. */
const MAX_TAG = 14
/** The newest of the tags' floors that are shown. */
const MAX_TAG_FLOORS = 4

/** One column per revision, the newest at the right: a copy is current when no floor is to the right of it. */
function revisionLine(tiers: readonly TierInspection[], floors: Floors, style: Style): string[] {
  const paint = painter(style)
  const floorMarks = floorsOf(floors).map(({ text, revision }) => ({
    revision,
    row: 'floors',
    text: `▲ ${text}`,
    color: 'cyan' as const,
  }))
  const copies: Mark[] = tiers
    .filter(({ present }) => present)
    .map((tier) => {
      const { mark: text, color } = verdict(tier)
      return { revision: tier.asOf, row: tierLabel(tier.tier), text, color }
    })
  if (floorMarks.length === 0) return [paint('dim', 'no invalidation of it is known')]
  const marks = [...copies, ...floorMarks]
  let revisions = [...new Set(marks.map(({ revision }) => revision))].sort((a, b) => (a < b ? -1 : 1))
  const names = shortened(revisions)
  const widthOf = (revision: bigint) =>
    Math.max(
      width(names.get(revision) ?? ''),
      ...marks.filter((mark) => mark.revision === revision).map(({ text }) => width(text)),
    ) + 2
  const label = 10
  while (
    revisions.length > 1 &&
    label + revisions.reduce((sum, revision) => sum + widthOf(revision), 0) > style.columns
  ) {
    revisions = revisions.slice(1)
  }
  const line = (name: string, cells: readonly (Mark | undefined)[], fill: string) =>
    `${name.padEnd(label)}${cells
      .map((mark, i) => {
        const room = widthOf(revisions[i] ?? 0n)
        const text = mark?.text ?? ''
        return paint(mark?.color ?? 'dim', text) + paint('dim', fill.repeat(room - width(text)))
      })
      .join('')}`.trimEnd()
  const at = (row: string, nth = 0) =>
    revisions.map((revision) => marks.filter((mark) => mark.row === row && mark.revision === revision)[nth])
  const depth = Math.max(
    ...revisions.map((revision) => floorMarks.filter((mark) => mark.revision === revision).length),
  )
  return [
    paint(
      'dim',
      line(
        'revision',
        revisions.map((revision) => plain(names.get(revision) ?? '')),
        ' ',
      ),
    ),
    ...copies.map(({ row }) => line(row, at(row), '─')),
    ...Array.from({ length: depth }, (_, i) => line(i === 0 ? 'floors' : '', at('floors', i), ' ')),
    paint('dim', 'a copy is current when no floor is to the right of it'),
  ]
}

const plain = (text: string): Mark => ({ revision: 0n, row: '', text, color: 'dim' })

function floorsOf({ keyFloor, tagFloors, tenantFloor, removedFloor }: Floors) {
  const newestTags = tagFloors.toSorted((a, b) => (a.floor > b.floor ? -1 : 1)).slice(0, MAX_TAG_FLOORS)
  return [
    { text: 'item', revision: keyFloor },
    ...newestTags.map(({ tag, floor }) => {
      const name = printable(tag)
      const cut = width(name) > MAX_TAG ? `${[...name].slice(0, MAX_TAG - 1).join('')}…` : name
      return { text: `tag ${cut}`, revision: floor }
    }),
    { text: 'all items', revision: tenantFloor },
    { text: 'removed', revision: removedFloor },
  ].filter(({ revision }) => revision > 0n)
}

/** Revisions by their last digits, as many as it takes to tell them apart and at least four: `…7780`. */
function shortened(revisions: readonly bigint[]): Map<bigint, string> {
  const texts = revisions.map(String)
  let digits = 4
  while (digits < 20 && new Set(texts.map((text) => text.slice(-digits))).size < texts.length) digits++
  return new Map(
    revisions.map((revision, i) => {
      const text = texts[i] ?? ''
      return [revision, text.length > digits + 1 ? `…${text.slice(-digits)}` : text]
    }),
  )
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

/** One event of a watch, as a line. */
export function formatEvent(row: InvalidationEvent, style: Style): string {
  const { committedAt, revision, event, mode, ids, tags, clientId } = row
  const paint = painter(style)
  const color = event === 'upserted' ? 'green' : event === 'deleted' ? 'red' : 'yellow'
  const named = ids.length > 0 ? ids : tags.map((tag) => `tag ${tag}`)
  const more = named.length > 10 ? ` and ${named.length - 10} more` : ''
  const what =
    event === 'tenant-invalidated' ? 'every item' : `${named.slice(0, 10).map(printable).join(', ')}${more}`
  const how = mode === 'remove' && event.endsWith('invalidated') ? ' (remove)' : ''
  const by = clientId === '' ? '' : `  ${paint('dim', `by ${printable(clientId)}`)}`
  const at = committedAt.toISOString().slice(11, 23)
  return `${paint('dim', at)}  ${revision}  ${paint(color, event.padEnd(18))}  ${what}${how}${by}`
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
    tierLabel(tier.tier),
    count(tier.hits),
    count(tier.misses),
    count(tier.errors),
    count(tier.timeouts),
    ...percentiles(tier.latency),
    tier.entries === 0n ? '' : count(tier.entries),
    tier.bytes === 0n ? '' : formatBytes(tier.bytes),
    breakerState(tier.breaker),
  ])
  const rpcRows = snapshot.rpcs.map(({ method, started, finished, latency }) => {
    const refused = Object.entries(finished).filter(([code, times]) => code !== 'OK' && times > 0n)
    return [
      methodName(method),
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

function lagOf({ p50, p99 }: Latency): string {
  return `${formatDuration(toMs(p50) ?? 0)} (p50) to ${formatDuration(toMs(p99) ?? 0)} (p99)`
}

function percentiles(latency: Latency | undefined): [string, string] {
  if (latency === undefined || latency.count === 0n) return ['', '']
  return [formatDuration(toMs(latency.p50) ?? 0), formatDuration(toMs(latency.p99) ?? 0)]
}

/** The latencies of the methods that read: not of streams, whose length says nothing. */
export function readLatencies({ rpcs }: MetricsSnapshot): (Latency | undefined)[] {
  return rpcs
    .filter(({ method }) => ['GetItem', 'BatchGetItems', 'ListItems'].includes(methodName(method)))
    .map(({ latency }) => latency)
}

/** The head of the lines of `formatChange`. */
export const CHANGE_HEADER =
  'time (UTC)   reads/s  hit rate  read p99   loads/s   stale/s  failed/s   lag p99\n'

/** What happened between two snapshots of an instance, as one line. A restart in between counts from zero. */
export function formatChange(before: MetricsSnapshot, after: MetricsSnapshot): string {
  const span = new Span(before, after)
  const hits = span.grown(({ hits }) => hits)
  const reads = hits + span.grown(({ misses }) => misses)
  const latency = (of: Parameters<Span['percentile']>[1]) => {
    const ms = span.percentile(0.99, of)
    return ms === undefined ? '–' : formatDuration(ms)
  }
  const cells = [
    rate(span.seconds > 0 ? reads / span.seconds : 0),
    reads === 0 ? '–' : percent(hits / reads),
    latency(readLatencies),
    rate(span.rate(({ loads }) => loads)),
    rate(span.rate(({ staleServed }) => staleServed)),
    rate(span.rate(failures)),
    latency(({ invalidationLag }) => [invalidationLag]),
  ]
  const open = after.tiers.filter(
    ({ breaker }) => breaker !== BreakerState.UNSPECIFIED && breaker !== BreakerState.CLOSED,
  )
  const breakers = open.map(({ tier, breaker }) => `  ${tierLabel(tier)} ${breakerState(breaker)}`).join('')
  const at = after.time === undefined ? '' : timestampDate(after.time).toISOString().slice(11, 19)
  return `${at.padEnd(10)}${cells.map((cell) => cell.padStart(10)).join('')}${breakers}\n`
}

/** Calls that the service failed, not ones in which the caller was wrong. */
function failures({ rpcs }: MetricsSnapshot): bigint {
  const codes = ['UNAVAILABLE', 'DEADLINE_EXCEEDED', 'INTERNAL', 'UNKNOWN', 'RESOURCE_EXHAUSTED']
  return rpcs.reduce(
    (sum, { finished }) => codes.reduce((more, code) => more + (finished[code] ?? 0n), sum),
    0n,
  )
}
