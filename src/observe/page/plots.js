/** The plots: lines over the last minutes, each with a legend that tells the values, and a table of the same. */
import { byId, element, setRows, setText } from './elements.js'
import { latency, number, percent, time } from './format.js'

/**
 * @typedef {import('../live-message.ts').Sample} Sample
 * @typedef {import('../live-message.ts').Outage} Outage
 *
 * One line. Its look, colour and dashes, is that of `--line-<look>` in page.css and of `DASHES`.
 * @typedef {{ readonly column: string, readonly name: string, readonly look: Look }} Line
 * @typedef {'all' | 'memory' | 'redis' | 'postgres' | 'origin' | 'failed' | 'half'} Look
 *
 * @typedef {object} PlotKind
 * @property {string} id
 * @property {string} title
 * @property {string} note what the lines are, in a few words
 * @property {(value: number) => string} format
 * @property {'share' | 'linear' | 'log'} scale
 * @property {readonly Line[]} lines
 * @property {readonly { readonly name: string, readonly lines: readonly Line[] }[]} [choices] instead of `lines`
 * @property {string} [remark] what is missing, and why
 */

/** Lines can be told apart without colours. @type {Readonly<Record<Look, number[]>>} */
const DASHES = {
  all: [],
  memory: [],
  redis: [8, 4],
  postgres: [2, 3],
  origin: [10, 3, 2, 3],
  failed: [4, 2],
  half: [6, 4],
}

const HEIGHT = 190
const TABLE_EVERY = 15
/** A plot of a service that has just started is of so much time. */
const LEAST_SPAN_MS = 60_000
/** The logarithmic scale ends here. */
const LEAST_MS = 0.01

/** @param {string} of */
const latencies = (of) => [
  { column: `${of}.all`, name: 'Whole reads', look: /** @type {const} */ ('all') },
  { column: `${of}.redis`, name: 'Redis', look: /** @type {const} */ ('redis') },
  { column: `${of}.postgres`, name: 'PostgreSQL', look: /** @type {const} */ ('postgres') },
  { column: `${of}.origin`, name: 'Catalogue', look: /** @type {const} */ ('origin') },
]

/** @type {readonly PlotKind[]} */
const KINDS = [
  {
    id: 'hit-rate',
    title: 'Hit rate',
    note: 'of whole reads, and of the look-ups in each tier',
    format: percent,
    scale: 'share',
    lines: [
      { column: 'hits.all', name: 'Whole reads', look: 'all' },
      { column: 'hits.memory', name: 'Memory', look: 'memory' },
      { column: 'hits.redis', name: 'Redis', look: 'redis' },
      { column: 'hits.postgres', name: 'PostgreSQL', look: 'postgres' },
      { column: 'hits.origin', name: 'Catalogue', look: 'origin' },
    ],
  },
  {
    id: 'latency',
    title: 'Latency',
    note: 'of whole reads and of round trips',
    format: latency,
    scale: 'log',
    lines: [],
    remark: 'Memory takes too little to be timed',
    choices: [
      { name: 'p99', lines: latencies('p99') },
      { name: 'p50', lines: latencies('p50') },
    ],
  },
  {
    id: 'reads',
    title: 'Reads per second',
    note: 'by the tier that answered',
    format: number,
    scale: 'linear',
    lines: [
      { column: 'reads.memory', name: 'Memory', look: 'memory' },
      { column: 'reads.redis', name: 'Redis', look: 'redis' },
      { column: 'reads.postgres', name: 'PostgreSQL', look: 'postgres' },
      { column: 'reads.origin', name: 'Catalogue', look: 'origin' },
      { column: 'reads.failed', name: 'Failed', look: 'failed' },
    ],
  },
  {
    id: 'lag',
    title: 'Log lag',
    note: 'from a change being written to its being applied here',
    format: latency,
    scale: 'log',
    lines: [
      { column: 'p99.lag', name: 'p99', look: 'all' },
      { column: 'p50.lag', name: 'p50', look: 'half' },
    ],
  },
]

/** The samples that the plots show, and the outages that lie behind them. */
class Shown {
  /** @type {readonly string[]} */
  columns = []
  /** @type {readonly Sample[]} */
  samples = []
  /** @type {readonly Outage[]} */
  outages = []
  seconds = 300

  /** @param {string} column */
  values(column) {
    const at = this.columns.indexOf(column)
    return this.samples.map((sample) => sample[at] ?? null)
  }

  /** In seconds since 1970, as uPlot wants them. */
  times() {
    return this.samples.map((sample) => (sample[0] ?? 0) / 1000)
  }
}

class Plot {
  #kind
  #shown
  #lines
  #plot
  #legend = element('ul', { class: 'legend' })
  #when = element('li', { class: 'quiet' })
  #table = element('tbody', {})
  #head = element('tr', {})
  #details

  /**
   * @param {PlotKind} kind
   * @param {Shown} shown
   */
  constructor(kind, shown) {
    this.#kind = kind
    this.#shown = shown
    this.#lines = kind.choices?.[0]?.lines ?? kind.lines
    const title = element(
      'h2',
      { id: `${kind.id}-title` },
      kind.title,
      ' ',
      element('small', { class: 'quiet' }, kind.note),
    )
    const canvas = element('div', { class: 'canvas', 'aria-hidden': 'true' })
    this.#details = element(
      'details',
      {},
      element('summary', {}, 'As a table'),
      element(
        'div',
        { class: 'scroll', tabindex: '0', role: 'region', 'aria-label': `${kind.title} as a table` },
        element(
          'table',
          {},
          element('caption', { class: 'quiet' }, `One second in ${TABLE_EVERY}, the newest first`),
          element('thead', {}, this.#head),
          this.#table,
        ),
      ),
    )
    this.#details.addEventListener('toggle', () => this.#showTable())
    const head = element('div', { class: 'plot-head' }, title, this.#choice())
    this.root = element(
      'section',
      { class: 'plot', 'aria-labelledby': `${kind.id}-title` },
      head,
      canvas,
      this.#legend,
      this.#details,
    )
    this.#showLegend()
    byId('plots').append(this.root)
    this.#plot = this.#draw(canvas)
    new ResizeObserver(([entry]) => {
      const width = Math.floor(entry?.contentRect.width ?? 0)
      if (width > 0 && width !== this.#plot.width) this.#plot.setSize({ width, height: HEIGHT })
    }).observe(canvas)
  }

  /** Shows what `shown` holds now. */
  update() {
    const { samples, seconds } = this.#shown
    const endMs = samples.at(-1)?.[0] ?? Date.now()
    const fromMs = Math.max(samples[0]?.[0] ?? endMs, endMs - seconds * 1000)
    this.#plot.setData([this.#shown.times(), ...this.#lines.map(({ column }) => this.#values(column))], false)
    this.#plot.batch(() => {
      this.#plot.setScale('x', { min: Math.min(fromMs, endMs - LEAST_SPAN_MS) / 1000, max: endMs / 1000 })
      this.#plot.setScale('y', this.#range())
    })
    this.#showValues()
    this.#showTable()
  }

  redraw() {
    this.#plot.redraw()
  }

  /** Which lines are shown, where there is a choice. */
  #choice() {
    const { choices, id, title } = this.#kind
    if (choices === undefined) return undefined
    return element(
      'fieldset',
      { class: 'choice' },
      element('legend', { class: 'hidden' }, `${title}: which`),
      ...choices.map(({ name, lines }, i) => {
        const radio = element('input', { type: 'radio', name: `${id}-choice`, value: name })
        radio.checked = i === 0
        radio.addEventListener('change', () => {
          this.#lines = lines
          this.#showLegend()
          this.update()
        })
        return element('label', {}, radio, element('span', {}, name))
      }),
    )
  }

  #showLegend() {
    this.#legend.replaceChildren(
      ...this.#lines.map(({ name, look }) =>
        element('li', {}, key(look), element('span', {}, name), element('span', { class: 'value' }, '–')),
      ),
      ...(this.#kind.remark === undefined
        ? []
        : [element('li', { class: 'quiet remark' }, this.#kind.remark)]),
      this.#when,
    )
    this.#head.replaceChildren(
      element('th', { scope: 'col' }, 'Time'),
      ...this.#lines.map(({ name }) => element('th', { scope: 'col', class: 'n' }, name)),
    )
  }

  /** The values under the cursor; without one, the newest. */
  #showValues() {
    const { samples, columns } = this.#shown
    const pointed = this.#plot.cursor.idx
    const sample = samples[pointed ?? samples.length - 1]
    this.#lines.forEach(({ column }, i) => {
      const value = sample?.[columns.indexOf(column)]
      const target = this.#legend.children[i]?.lastElementChild
      if (target) setText(target, value === null || value === undefined ? '–' : this.#kind.format(value))
    })
    const atMs = sample?.[0]
    const newest = pointed === null || pointed === undefined
    setText(this.#when, atMs ? `${newest ? 'now' : 'at'} ${time(atMs)}` : 'no data yet')
  }

  #showTable() {
    if (!this.#details.open) return
    const { samples, columns } = this.#shown
    const rows = samples.toReversed().filter((sample, i) => i % TABLE_EVERY === 0 && sample[0])
    const cells = rows.map((sample) => [
      { text: time(sample[0] ?? 0) },
      ...this.#lines.map(({ column }) => {
        const value = sample[columns.indexOf(column)]
        return { class: 'n', text: value === null || value === undefined ? '–' : this.#kind.format(value) }
      }),
    ])
    setRows(this.#table, cells, 'No data yet', this.#lines.length + 1)
  }

  /** @param {string} column */
  #values(column) {
    const values = this.#shown.values(column)
    if (this.#kind.scale !== 'log') return values
    return values.map((value) => (value === null ? null : Math.max(value, LEAST_MS)))
  }

  /** @returns {{ min: number, max: number }} */
  #range() {
    if (this.#kind.scale === 'share') return { min: 0, max: 1 }
    let [min, max] = [Number.POSITIVE_INFINITY, 0]
    for (const { column } of this.#lines) {
      for (const value of this.#values(column)) {
        if (value === null) continue
        min = Math.min(min, value)
        max = Math.max(max, value)
      }
    }
    if (this.#kind.scale === 'linear') return { min: 0, max: roundUp(Math.max(max, 1)) }
    if (max === 0) return { min: 0.1, max: 100 }
    const from = Math.floor(Math.log10(min))
    return { min: 10 ** from, max: 10 ** Math.max(from + 2, Math.ceil(Math.log10(max) + 0.01)) }
  }

  /** @param {HTMLElement} canvas */
  #draw(canvas) {
    const { scale, format } = this.#kind
    const ink = () => colour('--ink-2')
    const grid = { stroke: () => colour('--grid'), width: 1 }
    const count = Math.max(
      this.#kind.lines.length,
      ...(this.#kind.choices ?? []).map(({ lines }) => lines.length),
    )
    /** @type {uPlot.Options} */
    const options = {
      width: Math.max(280, Math.floor(canvas.clientWidth)),
      height: HEIGHT,
      legend: { show: false },
      cursor: {
        y: false,
        drag: { x: false, y: false },
        points: { size: 7, width: 2 },
        sync: { key: 'live' },
      },
      scales: {
        x: { time: true, auto: false },
        y: { auto: false, distr: scale === 'log' ? 3 : 1 },
      },
      axes: [
        {
          stroke: ink,
          font: FONT,
          grid: { show: false },
          ticks: { ...grid, size: 5 },
          space: 80,
          incrs: [1, 5, 10, 15, 30, 60, 120, 300],
          size: 30,
          values: (_, splits) => splits.map((seconds) => time(seconds * 1000)),
        },
        {
          stroke: ink,
          font: FONT,
          grid,
          ticks: { show: false },
          size: 62,
          ...(scale === 'log' && {
            splits: (self) => decades(self.scales['y']),
            filter: (_, splits) => splits,
          }),
          ...(scale === 'share' && { splits: () => [0, 0.25, 0.5, 0.75, 1] }),
          values: (_, splits) =>
            splits.map((value) => (scale === 'share' ? `${value * 100} %` : format(value))),
        },
      ],
      series: [
        {},
        ...Array.from({ length: count }, (_, i) => ({
          stroke: () => colour(`--line-${this.#lines[i]?.look}`),
          dash: DASHES[this.#lines[i]?.look ?? 'all'],
          width: this.#lines[i]?.look === 'all' ? 2.5 : 1.75,
          points: { show: false },
        })),
      ],
      hooks: {
        drawClear: [(self) => this.#shadeOutages(self)],
        setCursor: [() => this.#plot !== undefined && this.#showValues()],
      },
    }
    return new uPlot(options, [[], ...Array.from({ length: count }, () => [])], canvas)
  }

  /** @param {uPlot} self */
  #shadeOutages(self) {
    const { ctx, bbox, scales } = self
    const { min = 0, max = 0 } = /** @type {{ min?: number, max?: number }} */ (scales['x'])
    ctx.save()
    ctx.fillStyle = colour('--outage')
    for (const { sinceMs, untilMs } of this.#shown.outages) {
      const from = self.valToPos(Math.max(sinceMs / 1000, min), 'x', true)
      const to = self.valToPos(Math.min((untilMs ?? Number.POSITIVE_INFINITY) / 1000, max), 'x', true)
      if (to > from) ctx.fillRect(from, bbox.top, to - from, bbox.height)
    }
    ctx.restore()
  }
}

const FONT = '12px system-ui, sans-serif'

/**
 * What a line looks like, for legends.
 * @param {Look} look
 */
function key(look) {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg')
  const line = document.createElementNS('http://www.w3.org/2000/svg', 'line')
  for (const [name, value] of Object.entries({ class: 'key', viewBox: '0 0 26 4', 'aria-hidden': 'true' })) {
    svg.setAttribute(name, value)
  }
  const drawn = {
    class: `line-${look}`,
    x1: '0',
    y1: '2',
    x2: '26',
    y2: '2',
    'stroke-dasharray': DASHES[look].join(' '),
  }
  for (const [name, value] of Object.entries(drawn)) line.setAttribute(name, value)
  svg.append(line)
  return svg
}

/** @param {string} name */
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim()
}

/** @param {number} value */
function roundUp(value) {
  const unit = 10 ** Math.floor(Math.log10(value))
  return (Math.ceil((value * 1.05) / unit / 0.5) * unit) / 2
}

/** @param {uPlot.Scale | undefined} scale */
function decades(scale) {
  const { min = 0.1, max = 100 } = /** @type {{ min?: number, max?: number }} */ (scale ?? {})
  const first = Math.round(Math.log10(min))
  return Array.from({ length: Math.round(Math.log10(max)) - first + 1 }, (_, i) => 10 ** (first + i))
}

/**
 * All plots.
 * @returns {{ update(shown: Partial<Shown>): void }}
 */
export function makePlots() {
  const shown = new Shown()
  const plots = KINDS.map((kind) => new Plot(kind, shown))
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => {
    for (const plot of plots) plot.redraw()
  })
  return {
    update(changed) {
      Object.assign(shown, changed)
      for (const plot of plots) plot.update()
    },
  }
}
