/** The state of the service in one sentence. */
import { byId, setText } from './elements.js'
import { NAMES, span, time } from './format.js'

/**
 * @typedef {import('../live-message.ts').Now} Now
 * @typedef {import('../live-message.ts').PartName} PartName
 * @typedef {{ readonly level: 'well' | 'poor' | 'bad' | 'waiting', readonly text: string, readonly detail: string }} Headline
 */

/** What an outage means for callers. @type {Readonly<Record<PartName, string>>} */
const MEANING = {
  memory: '',
  redis: 'Reads go on from memory and PostgreSQL, and each instance loads for itself.',
  postgres: 'What memory and Redis hold is still served, marked as stale; writes fail.',
  origin: 'Only items that PostgreSQL has never seen are missing.',
  log: 'Copies cannot be called current: they are served marked as stale.',
}

/** Worst first. @type {readonly PartName[]} */
const ORDER = ['postgres', 'log', 'redis', 'origin']

/** How long an outage that is over is told of. */
const OVER_MS = 120_000

/**
 * @param {Now} now
 * @returns {Headline}
 */
export function headlineOf(now) {
  const lasting = now.outages
    .filter(({ untilMs }) => untilMs === undefined)
    .sort((a, b) => ORDER.indexOf(a.part) - ORDER.indexOf(b.part))
  const sentences = lasting.map(
    ({ part, what, sinceMs }) => `${NAMES[part]} is ${what} since ${time(sinceMs, now.timeMs)}`,
  )
  if (now.draining)
    return {
      level: 'poor',
      text: 'Draining',
      detail: 'This instance is about to stop and takes no further calls.',
    }
  const [worst] = lasting
  if (worst !== undefined) {
    const bad = !now.ready || ['postgres', 'log'].includes(worst.part)
    const breaker = worst.what === 'failing' ? ' Its circuit breaker is not closed.' : ''
    return {
      level: bad ? 'bad' : 'poor',
      text: sentences.join('; '),
      detail: `For ${span(now.timeMs - worst.sinceMs)}. ${now.ready ? '' : 'Not ready: there is nothing to serve from. '}${MEANING[worst.part]}${breaker}`,
    }
  }
  if (!now.ready) return { level: 'bad', text: 'Not ready', detail: 'There is nothing to serve from.' }
  if (now.violations > 0) {
    return {
      level: 'bad',
      text: `The consistency probe has found ${now.violations} wrong ${now.violations === 1 ? 'answer' : 'answers'}`,
      detail: 'Since the start. The log has an error line for each, with both positions.',
    }
  }
  const over = now.outages.findLast(({ untilMs = 0 }) => now.timeMs - untilMs < OVER_MS)
  const off = now.parts.filter(({ state }) => state === 'off').map(({ name }) => NAMES[name])
  return {
    level: 'well',
    text: 'All well',
    detail:
      over?.untilMs !== undefined
        ? `${NAMES[over.part]} was ${over.what} from ${time(over.sinceMs, now.timeMs)} to ${time(over.untilMs, now.timeMs)}, for ${span(over.untilMs - over.sinceMs)}.`
        : off.length > 0
          ? `Switched off: ${off.join(', ')}. Everything else answers.`
          : 'Every tier answers, and the log is followed.',
  }
}

/** @param {Headline} headline */
export function showHeadline({ level, text, detail }) {
  byId('banner').dataset['level'] = level
  // The region is announced when its text changes, so only what matters is in it.
  setText(byId('headline-text'), text)
  setText(byId('headline-detail'), detail)
  const mark = { well: '', poor: '▲ ', bad: '✕ ', waiting: '' }[level]
  const title = level === 'well' || level === 'waiting' ? 'ItemCache' : `${mark}${text} · ItemCache`
  if (document.title !== title) document.title = title
}
