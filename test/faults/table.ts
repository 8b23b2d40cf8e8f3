/** The matrix as the Markdown table of docs/resilience.md. */
import { type Cell, percentile } from './matrix.ts'
import type { Kind } from './traffic.ts'

const HEAD = [
  'broken',
  'how',
  'callers',
  'warm reads: failed, p99 ms',
  'cold, stored: ok, failed, slowest s',
  'cold, catalogue: ok, failed, slowest s',
  'writes: ok, failed, slowest s',
  'well again after s',
  'lag ms',
]

export function tableOf(cells: readonly Cell[]): string {
  const rows = cells.map((cell) => [
    cell.dependency,
    cell.fault,
    cell.crowd,
    warm(cell),
    reads(cell, ['stored', 'hurried']),
    reads(cell, ['catalogue']),
    reads(cell, ['create', 'update']),
    (cell.convergedMs / 1000).toFixed(1) + (cell.violations.length > 0 ? ' (violations)' : ''),
    `${Math.round(cell.lagMs)}`,
  ])
  const line = (columns: readonly string[]) => `| ${columns.join(' | ')} |`
  return [line(HEAD), `|${'---|'.repeat(HEAD.length)}`, ...rows.map(line)].join('\n')
}

function warm({ seen }: Cell): string {
  const { ended, tookMs } = seen.warm
  const failed = tookMs.length - (ended.get('OK') ?? 0)
  return `${failed} of ${tookMs.length}, ${Math.round(percentile(tookMs, 99))}`
}

function reads({ seen }: Cell, kinds: readonly Kind[]): string {
  const all = kinds.flatMap((kind) => seen[kind].tookMs)
  const ok = kinds.reduce((sum, kind) => sum + (seen[kind].ended.get('OK') ?? 0), 0)
  return `${ok}, ${all.length - ok}, ${(Math.max(...all) / 1000).toFixed(1)}`
}
