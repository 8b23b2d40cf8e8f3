/** The results as a picture that is readable on a light and on a dark page. */
import { figure, type Result } from './report.ts'

const WIDTH = 860
const LABEL_WIDTH = 420
const ROW_HEIGHT = 30
const TOP = 46
/** Where a bar ends that just meets its target. */
const LIMIT_AT = 0.6

/** How far a result is from its target: below 1 it is better, whichever direction better is. Undefined: it has no target. */
function shareOfLimit({ ratio, ours, bound }: Result): number | undefined {
  if (bound === undefined) return undefined
  const value = bound.of === 'ratio' ? ratio : ours
  if (value === undefined || !Number.isFinite(value)) return undefined
  if (bound.least !== undefined && bound.most === undefined) return bound.least / value
  if (bound.most === undefined) return undefined
  if (bound.most === 0) return value === 0 ? 0 : Number.POSITIVE_INFINITY
  return value / bound.most
}

const escaped = (text: string) => text.replaceAll('&', '&amp;').replaceAll('<', '&lt;')

/** Bars against one line: what does not reach the line meets its target. */
export function picture(results: readonly Result[]): string {
  const bars = results.flatMap((result) => {
    const share = shareOfLimit(result)
    return share === undefined ? [] : [{ result, share }]
  })
  const height = TOP + bars.length * ROW_HEIGHT + 12
  const room = WIDTH - LABEL_WIDTH - 150
  const limitX = LABEL_WIDTH + room * LIMIT_AT
  const lines = bars.flatMap(({ result, share }, n) => {
    const y = TOP + n * ROW_HEIGHT
    const width = Math.max(2, Math.min(room, room * LIMIT_AT * share))
    const { bound, ratio, ours, unit, target, work, peerName } = result
    const value = bound?.of === 'ratio' ? `${figure(ratio)} ×` : `${figure(ours)} ${unit}`
    const label = `${work === 'the same' ? `… ${peerName}` : work}`
    return [
      `<text x="${LABEL_WIDTH - 10}" y="${y + 17}" text-anchor="end">${escaped(shortened(label))}</text>`,
      `<rect x="${LABEL_WIDTH}" y="${y + 5}" width="${width.toFixed(1)}" height="16" rx="2" class="${result.met ? 'met' : 'missed'}"/>`,
      `<text x="${(LABEL_WIDTH + Math.max(width, room * LIMIT_AT) + 8).toFixed(1)}" y="${y + 17}">${escaped(`${value}, target ${target}`)}</text>`,
    ]
  })
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${height}" width="${WIDTH}" height="${height}" role="img">`,
    '<title>Measurements beside their targets</title>',
    '<style>',
    '  text { font: 12px system-ui, sans-serif; fill: #24292f }',
    '  .met { fill: #2b7a5d } .missed { fill: #b3552b } .limit { stroke: #57606a; stroke-dasharray: 4 3 }',
    '  @media (prefers-color-scheme: dark) { text { fill: #d0d7de } .met { fill: #56b48d } .missed { fill: #e08b5f } .limit { stroke: #8b949e } }',
    '</style>',
    `<text x="${limitX.toFixed(1)}" y="20" text-anchor="middle">target: a bar that ends before the line meets it</text>`,
    `<line x1="${limitX.toFixed(1)}" x2="${limitX.toFixed(1)}" y1="28" y2="${height - 8}" class="limit"/>`,
    ...lines,
    '</svg>',
    '',
  ].join('\n')
}

const shortened = (text: string) => (text.length <= 64 ? text : `${text.slice(0, 62)}…`)
