/** Everything that is shown as numbers and words: tiles, states, tables. */
import { byId, element, setRows, setText } from './elements.js'
import { bytes, count, latency, NAMES, number, percent, span, time } from './format.js'

/**
 * @typedef {import('../live-message.ts').Now} Now
 * @typedef {import('../live-message.ts').Sample} Sample
 * @typedef {import('../live-message.ts').FedInvalidation} FedInvalidation
 * @typedef {import('../live-message.ts').Part} Part
 */

/** Tiles are of so many seconds. */
const TILE_SECONDS = 10
/** Rows of the feed that are shown. */
const FEED_ROWS = 50

/**
 * @param {Now} now
 * @param {readonly string[]} columns
 * @param {readonly Sample[]} samples
 */
export function showTiles(now, columns, samples) {
  const lately = samples.slice(-TILE_SECONDS)
  /** @param {string} column */
  const valuesOf = (column) =>
    lately.map((sample) => sample[columns.indexOf(column)] ?? null).filter((value) => value !== null)
  /** @param {string} column */
  const mean = (column) => {
    const values = valuesOf(column)
    return values.reduce((sum, value) => sum + value, 0) / Math.max(values.length, 1)
  }
  const tiers = ['memory', 'redis', 'postgres', 'origin'].map((tier) => mean(`reads.${tier}`))
  const reads = tiers.reduce((sum, rate) => sum + rate, 0) + mean('reads.failed')
  const rate = hitRate(columns, lately)
  const p99 = valuesOf('p99.all')
  const lag = valuesOf('p99.lag')
  const { memory } = now.memory
  const failed = mean('reads.failed')
  const lastly = `mean of ${TILE_SECONDS} s`
  /** @type {readonly (readonly [string, string, string])[]} */
  const tiles = [
    ['Hit rate', rate === undefined ? '–' : percent(rate), rate === undefined ? 'no reads' : lastly],
    ['Reads', `${number(reads)} /s`, failed > 0 ? `${number(failed)} /s failed` : lastly],
    [
      'Read p99',
      p99.length === 0 ? '–' : latency(Math.max(...p99)),
      p99.length === 0 ? 'no reads' : `worst of ${TILE_SECONDS} s`,
    ],
    [
      'Log lag p99',
      lag.length === 0 ? '–' : latency(Math.max(...lag)),
      lag.length === 0 ? 'no changes' : `worst of ${TILE_SECONDS} s`,
    ],
    [
      'Memory',
      memory.on ? bytes(memory.bytes) : 'off',
      memory.on ? `of ${bytes(memory.maxBytes)}, ${count(memory.entries)} copies` : '',
    ],
    ['Open calls', count(now.openCalls), `${count(now.subscribers)} invalidation streams`],
  ]
  const list = byId('tiles')
  if (list.children.length === 0) {
    for (const [name] of tiles) {
      list.append(
        element(
          'div',
          {},
          element('dt', {}, name),
          element('dd', { class: 'figure' }),
          element('dd', { class: 'quiet' }),
        ),
      )
    }
  }
  tiles.forEach(([, figure, note], i) => {
    const [, shown, small] = list.children[i]?.children ?? []
    if (shown) setText(shown, figure)
    if (small) setText(small, note)
  })
}

/**
 * Of all reads of these seconds together: a second with few reads counts little.
 * @param {readonly string[]} columns
 * @param {readonly Sample[]} samples
 */
function hitRate(columns, samples) {
  const reading = columns.flatMap((name, i) => (name.startsWith('reads.') ? [i] : []))
  const at = columns.indexOf('hits.all')
  let [hits, reads] = [0, 0]
  for (const sample of samples) {
    const all = reading.reduce((sum, i) => sum + (sample[i] ?? 0), 0)
    reads += all
    hits += all * (sample[at] ?? 0)
  }
  return reads === 0 ? undefined : hits / reads
}

/** @param {Part} part */
function stateOf({ state, breaker }) {
  if (state === 'off') return { level: 'off', text: 'off' }
  if (state === 'down') return { level: 'bad', text: 'down' }
  if (breaker === 'OPEN' || breaker === 'HALF_OPEN') return { level: 'bad', text: 'failing' }
  if (state === 'connecting') return { level: 'poor', text: 'connecting' }
  return { level: 'well', text: state === 'on' ? 'on' : 'ready' }
}

const BREAKERS = { CLOSED: 'breaker closed', HALF_OPEN: 'breaker half-open', OPEN: 'breaker open' }

/** @param {Now} now */
export function showParts(now) {
  const list = byId('parts')
  now.parts.forEach((part, i) => {
    let item = list.children[i]
    if (item === undefined) {
      item = element(
        'li',
        {},
        element('span', { class: 'mark', 'aria-hidden': 'true' }),
        element('strong', {}),
        element('span', { class: 'state' }),
        element('small', { class: 'quiet' }),
      )
      list.append(item)
    }
    const { level, text } = stateOf(part)
    const outage = now.outages.findLast((each) => each.part === part.name && each.untilMs === undefined)
    const since = outage && `since ${time(outage.sinceMs, now.timeMs)}`
    const breaker = part.breaker && part.state !== 'off' ? BREAKERS[part.breaker] : ''
    const notes = [since, breaker].filter(Boolean).join('; ')
    const [, name, state, note] = item.children
    if (item instanceof HTMLElement && item.dataset['level'] !== level) item.dataset['level'] = level
    if (name) setText(name, NAMES[part.name])
    if (state) setText(state, text)
    if (note)
      setText(
        note,
        notes ||
          (part.name === 'log' && text === 'ready'
            ? 'followed'
            : part.name === 'memory' && text === 'ready'
              ? 'in this process'
              : ''),
      )
  })
}

/** @param {Now} now */
export function showRpcs(now) {
  const rows = now.rpcs.map(({ method, perSecond, failed, p50Ms, p99Ms }) => {
    const failures = Object.entries(failed).sort(([, a], [, b]) => b - a)
    const sum = failures.reduce((all, [, rate]) => all + rate, 0)
    return [
      { text: method, class: 'name' },
      { text: number(perSecond), class: 'n' },
      {
        text:
          sum === 0
            ? '0'
            : [number(sum), failures.map(([status]) => status.toLowerCase().replaceAll('_', ' ')).join(', ')],
        class: 'n',
      },
      { text: p50Ms === undefined ? '–' : latency(p50Ms), class: 'n' },
      { text: p99Ms === undefined ? '–' : latency(p99Ms), class: 'n' },
    ]
  })
  setRows(byId('rpcs'), rows, 'No calls in the last minute', 5)
}

/** @type {Readonly<Record<FedInvalidation['reason'], string>>} */
const REASONS = {
  UPSERTED: 'written',
  DELETED: 'deleted',
  KEYS_INVALIDATED: 'invalidated by id',
  TAGS_INVALIDATED: 'invalidated by tag',
  TENANT_INVALIDATED: 'invalidated: everything',
  GAP: 'rows were skipped: everything older is distrusted',
}

/** @param {FedInvalidation} row */
function namesOf({ reason, ids, moreIds, tags, moreTags }) {
  const byTag = reason === 'TAGS_INVALIDATED'
  const [names, more] = byTag ? [tags, moreTags] : [ids, moreIds]
  return `${names.join(', ')}${more > 0 ? ` and ${count(more)} more` : ''}`
}

/**
 * @param {readonly FedInvalidation[]} invalidations the oldest first
 * @param {Now} now
 */
export function showFeed(invalidations, now) {
  const rows = invalidations
    .toReversed()
    .slice(0, FEED_ROWS)
    .map((row) => {
      const removed = row.mode === 'REMOVE' ? ', not even stale' : ''
      const names = namesOf(row)
      const what = `${REASONS[row.reason]}${removed}`
      return [
        { text: span(now.timeMs - row.appliedMs + (row.lagMs ?? 0)) },
        { text: row.tenant, class: 'name' },
        { text: names === '' ? what : [names, what], class: 'name' },
        { text: `${row.revision}`, class: 'n' },
      ]
    })
  setRows(byId('feed'), rows, 'None since the start', 4)
}

/** @param {Now} now */
export function showMemory({ memory: { memory, redis, process, unsentBytes, ringBytes } }) {
  /** @param {number} part @param {number} whole */
  const share = (part, whole) => ({ text: percent(part / whole), share: part / whole, class: 'share' })
  const none = { text: '' }
  /** @param {string} text */
  const name = (text) => ({ text })
  /** @param {string} text */
  const n = (text) => ({ text, class: 'n' })
  const rows = [
    ...(memory.on
      ? [
          [
            name('Memory tier'),
            n(bytes(memory.bytes)),
            n(bytes(memory.maxBytes)),
            share(memory.bytes, memory.maxBytes),
          ],
          [
            name('its copies'),
            n(count(memory.entries)),
            n(count(memory.maxEntries)),
            share(memory.entries, memory.maxEntries),
          ],
          [name('evicted since the start'), n(count(memory.evictions)), none, none],
        ]
      : [[name('Memory tier'), n('off'), none, none]]),
    redis === undefined
      ? [name('Redis'), n('–'), none, none]
      : redis.maxBytes === undefined
        ? [name('Redis'), n(bytes(redis.usedBytes)), n('no limit'), none]
        : [
            name('Redis'),
            n(bytes(redis.usedBytes)),
            n(bytes(redis.maxBytes)),
            share(redis.usedBytes, redis.maxBytes),
          ],
    [name('This process, resident'), n(bytes(process.residentBytes)), none, none],
    [name('its heap'), n(bytes(process.heapBytes)), none, none],
    [name('Answers not taken yet'), n(bytes(unsentBytes)), none, none],
    [name('Rows for streams'), n(bytes(ringBytes)), none, none],
  ]
  setRows(byId('memory'), rows, '', 4)
}

/** @param {Now} now */
export function showOutages({ outages, timeMs }) {
  const rows = outages.toReversed().map(({ part, what, sinceMs, untilMs }) => [
    { text: NAMES[part] },
    { text: what },
    { text: time(sinceMs, timeMs), class: 'n' },
    {
      text: untilMs === undefined ? `lasts, ${span(timeMs - sinceMs)}` : span(untilMs - sinceMs),
      class: 'n',
    },
  ])
  setRows(byId('outages'), rows, 'None', 4)
}
