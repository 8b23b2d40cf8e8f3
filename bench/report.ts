/** What becomes of measurements: medians, ratios, verdicts, and one table of them all. */
import type { Bound, Row } from './rows.ts'

/** What a case found for one row, in the row's unit. */
export interface Measured {
  readonly row: string
  readonly ours: number
  /** Undefined where there is nobody to compare with. */
  readonly peer?: number
  /** Ours divided by the peer's, where it was measured in pairs: the median of theirs. Default: that of the two figures. */
  readonly ratio?: number
  /** What else there is to say: what was shortened, who the peer was, what was counted. */
  readonly note?: string
}

/** A measurement with what it was held against. */
export interface Result extends Omit<Measured, 'ratio'> {
  readonly work: string
  readonly unit: string
  readonly peerName: string
  readonly target: string
  readonly bound: Bound | undefined
  readonly ratio: number | undefined
  /** Undefined: the row has no target, it is there to be seen. */
  readonly met: boolean | undefined
}

/** Of an even number of values the mean of the middle two. NaN of none. */
export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b)
  const upper = sorted[sorted.length >> 1] ?? Number.NaN
  const lower = sorted[(sorted.length - 1) >> 1] ?? Number.NaN
  return (lower + upper) / 2
}

/** The value that `share` of all values do not exceed. NaN of none. */
export function percentile(values: readonly number[], share: number): number {
  const sorted = values.toSorted((a, b) => a - b)
  return sorted[Math.max(0, Math.ceil(sorted.length * share) - 1)] ?? Number.NaN
}

/**
 * A row's result. A ratio is always ours divided by the peer's; whether it should be large or small is the row's to say.
 * A figure that is no number meets no target.
 */
export function judge(row: Row, measured: Measured): Result {
  const ratio = measured.ratio ?? (measured.peer === undefined ? undefined : measured.ours / measured.peer)
  const { bound } = row
  let met: boolean | undefined
  if (bound !== undefined) {
    const value = (bound.of === 'ratio' ? ratio : measured.ours) ?? Number.NaN
    met =
      value >= (bound.least ?? Number.NEGATIVE_INFINITY) && value <= (bound.most ?? Number.POSITIVE_INFINITY)
  }
  return {
    ...measured,
    work: row.work,
    unit: row.unit,
    peerName: row.peer,
    target: row.target,
    bound,
    ratio,
    met,
  }
}

/** Three significant digits, and whole numbers whole. */
export function figure(value: number | undefined): string {
  if (value === undefined) return ''
  if (!Number.isFinite(value)) return 'no figure'
  if (Number.isInteger(value) || Math.abs(value) >= 1000) return Math.round(value).toLocaleString('en')
  return String(Number(value.toPrecision(3)))
}

const HEAD = ['work', 'ours', 'the other', 'ratio', 'target', 'met'] as const

function cells(result: Result): readonly string[] {
  const { work, note, ours, peer, unit, peerName, ratio, target, met } = result
  return [
    note === undefined ? work : `${work} (${note})`,
    `${figure(ours)} ${unit}`,
    peer === undefined ? peerName : `${figure(peer)} ${unit}, ${peerName}`,
    figure(ratio),
    target,
    met === undefined ? 'shown' : met ? 'yes' : 'NO',
  ]
}

/** The table for a terminal. */
export function textTable(results: readonly Result[]): string {
  const rows = [HEAD, ...results.map(cells)]
  const widths = HEAD.map((_, column) => Math.max(...rows.map((row) => row[column]?.length ?? 0)))
  const line = (row: readonly string[]) =>
    row
      .map((cell, n) => cell.padEnd(widths[n] ?? 0))
      .join('  ')
      .trimEnd()
  return [line(HEAD), line(widths.map((width) => '─'.repeat(width))), ...rows.slice(1).map(line)].join('\n')
}

/** The same for a page. */
export function markdownTable(results: readonly Result[]): string {
  const line = (row: readonly string[]) => `| ${row.map((cell) => cell.replaceAll('|', '\\|')).join(' | ')} |`
  return [line(HEAD), line(HEAD.map(() => '---')), ...results.map((result) => line(cells(result)))].join('\n')
}
