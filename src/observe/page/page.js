/** The live page: takes the service's events, keeps the last minutes of them, and shows them. */
import { byId, setText } from './elements.js'
import { span, time } from './format.js'
import { headlineOf, showHeadline } from './headline.js'
import { startLookUp } from './look-up.js'
import { makePlots } from './plots.js'
import { showFeed, showMemory, showOutages, showParts, showRpcs, showTiles } from './tables.js'

/**
 * @typedef {import('../live-message.ts').History} History
 * @typedef {import('../live-message.ts').Second} Second
 * @typedef {import('../live-message.ts').Sample} Sample
 * @typedef {import('../live-message.ts').FedInvalidation} FedInvalidation
 * @typedef {import('../live-message.ts').Now} Now
 */

/** Without an event for this long the service, or the way to it, is not well: one comes every second. */
const SILENCE_MS = 3_000
/** What an attempt to connect gets: on a busy machine the first event may take seconds. */
const PATIENCE_MS = 10_000
/** Before the next attempt where the browser makes none by itself. */
const AGAIN_MS = 2_000
const FEED_ROWS = 100
/** Who wants less motion gets the plots drawn anew this rarely. */
const CALM_MS = 5_000

/** What the page knows. */
const known = {
  /** @type {readonly string[]} */
  columns: [],
  /** @type {Sample[]} */
  samples: [],
  /** @type {FedInvalidation[]} */
  invalidations: [],
  seconds: 300,
  version: '',
  /** @type {Now | undefined} */
  now: undefined,
}

const plots = makePlots()
const calm = matchMedia('(prefers-reduced-motion: reduce)')
let paused = false
let drawnAtMs = Number.NEGATIVE_INFINITY
let heardAtMs = performance.now()
let triedAtMs = performance.now()
/** @type {'waiting' | 'live' | 'lost'} */
let connection = 'waiting'
let whyLost = ''
/** @type {EventSource | undefined} */
let source

/** @param {Sample} sample */
function add(sample) {
  const lastMs = known.samples.at(-1)?.[0] ?? 0
  const timeMs = sample[0] ?? 0
  if (timeMs <= lastMs) return
  // Lines must not lead over a time of which nothing is known.
  if (lastMs > 0 && timeMs - lastMs > SILENCE_MS)
    known.samples.push([lastMs + 1000, ...sample.slice(1).map(() => null)])
  known.samples.push(sample)
}

/** @param {History | Second} message */
function take({ now, invalidations }) {
  const newest = known.invalidations.at(-1)?.seq ?? 0
  known.invalidations.push(...invalidations.filter(({ seq }) => seq > newest))
  known.invalidations.splice(0, known.invalidations.length - FEED_ROWS)
  const sinceMs = now.timeMs - known.seconds * 1000
  known.samples.splice(
    0,
    known.samples.findIndex(([timeMs]) => (timeMs ?? 0) >= sinceMs),
  )
  known.now = now
  heardAtMs = performance.now()
  setConnection('live')
  show()
}

/** @param {History} history */
function begin(history) {
  // What a service knew that has been replaced since stays in the plots; its rows of the log are none of the new one's.
  const firstMs = history.samples[0]?.[0] ?? history.now.timeMs
  const former =
    known.now?.startMs === history.now.startMs
      ? []
      : known.samples.filter(([timeMs]) => (timeMs ?? 0) < firstMs)
  known.columns = history.columns
  known.seconds = history.seconds
  known.version = history.version
  known.samples = former
  known.invalidations = []
  for (const sample of history.samples) add(sample)
  take(history)
}

function connect() {
  triedAtMs = performance.now()
  source?.close()
  source = new EventSource('events')
  source.addEventListener('history', (event) => begin(JSON.parse(event.data)))
  source.addEventListener('second', (event) => {
    /** @type {Second} */
    const second = JSON.parse(event.data)
    if (second.sample !== null) add(second.sample)
    take(second)
  })
  source.addEventListener('error', async () => {
    setConnection('lost')
    if (source?.readyState !== EventSource.CLOSED) return
    // The service has answered, but not with events.
    whyLost = await fetch('events', { method: 'HEAD' }).then(
      ({ status }) => (status === 503 ? 'Too many pages are open on this instance. ' : ''),
      () => '',
    )
    setTimeout(connect, AGAIN_MS)
  })
}

/** @param {typeof connection} state */
function setConnection(state) {
  if (state === 'live') whyLost = ''
  connection = state
  const text = {
    waiting: 'connecting',
    live: paused ? 'paused' : 'live',
    lost: known.now === undefined ? 'no connection' : `no data since ${time(known.now.timeMs)}`,
  }[state]
  byId('connection').dataset['state'] = paused && state === 'live' ? 'paused' : state
  setText(byId('connection-text'), text)
  if (state !== 'lost') return
  const last = known.now
  showHeadline({
    level: 'bad',
    text: last === undefined ? 'No connection to the service' : `No data since ${time(last.timeMs)}`,
    detail: `${whyLost}The page tries again by itself.${last === undefined ? '' : ' What it shows is from before.'}`,
  })
}

function show() {
  const { now, columns, samples, invalidations, version, seconds } = known
  if (now === undefined) return
  document.body.dataset['begun'] = ''
  // Whether the service is well is told always.
  showHeadline(headlineOf(now))
  showParts(now)
  showOutages(now)
  setText(byId('about'), `version ${version} · ${location.host} · up ${span(now.timeMs - now.startMs)}`)
  if (paused) return
  showTiles(now, columns, samples)
  showRpcs(now)
  showFeed(invalidations, now)
  showMemory(now)
  const nowMs = performance.now()
  if (calm.matches && nowMs - drawnAtMs < CALM_MS) return
  drawnAtMs = nowMs
  plots.update({ columns, samples, outages: now.outages, seconds })
}

byId('pause').addEventListener('click', () => {
  paused = !paused
  byId('pause').setAttribute('aria-pressed', `${paused}`)
  if (connection === 'live') setConnection('live')
  show()
})

setInterval(() => {
  const nowMs = performance.now()
  if (nowMs - heardAtMs < SILENCE_MS) return
  setConnection('lost')
  // A connection that is open and silent does not end by itself.
  if (nowMs - triedAtMs >= PATIENCE_MS) connect()
}, 500)

startLookUp()
connect()
