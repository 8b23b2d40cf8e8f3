/** Numbers, times and names as text. */

const MINUS_SIGN_FREE = { minimumFractionDigits: 0, maximumFractionDigits: 0 }

/**
 * Three digits at most behind a group: 0.042, 4.2, 42, 1,234.
 * @param {number} value
 */
export function number(value) {
  if (value === 0) return '0'
  const size = Math.abs(value)
  const digits = size < 0.1 ? 3 : size < 10 ? 2 : size < 100 ? 1 : 0
  return value.toLocaleString('en', { ...MINUS_SIGN_FREE, maximumFractionDigits: digits })
}

/** @param {number} value a whole number */
export function count(value) {
  return value.toLocaleString('en', MINUS_SIGN_FREE)
}

/** @param {number} share 0 to 1 */
export function percent(share) {
  const value = share * 100
  // What is not quite all must not read as all.
  const digits = value > 99 && value < 100 ? 2 : 1
  const shown = Math.min(value, value < 100 ? 99.99 : 100)
  return `${shown.toLocaleString('en', { maximumFractionDigits: digits })} %`
}

/** @param {number} ms */
export function latency(ms) {
  if (ms === 0) return '0 ms'
  if (ms < 0.1) return `${number(ms * 1000)} µs`
  return ms < 1000 ? `${number(ms)} ms` : `${number(ms / 1000)} s`
}

/** @param {number} bytes */
export function bytes(bytes) {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB']
  let value = bytes
  let unit = 0
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024
    unit++
  }
  return `${unit === 0 ? count(value) : number(value)} ${units[unit]}`
}

/**
 * The two greatest units of a span of time, 4 s, 2 min 5 s, 3 h 12 min, 5 d 1 h.
 * @param {number} ms
 */
export function span(ms) {
  const seconds = Math.max(0, Math.round(ms / 1000))
  if (seconds < 60) return `${seconds} s`
  const units = /** @type {const} */ ([
    [86_400, 'd', 3600, 'h'],
    [3600, 'h', 60, 'min'],
    [60, 'min', 1, 's'],
  ])
  for (const [size, name, next, nextName] of units) {
    if (seconds < size) continue
    const rest = Math.floor((seconds % size) / next)
    return `${Math.floor(seconds / size)} ${name}${rest > 0 ? ` ${rest} ${nextName}` : ''}`
  }
  return `${seconds} s`
}

const TIME = new Intl.DateTimeFormat('en-GB', { hour: '2-digit', minute: '2-digit', second: '2-digit' })
const DAY = new Intl.DateTimeFormat('en-GB', { day: 'numeric', month: 'short' })

/**
 * The time of day by the browser's clock; with the day when it is another than that of `nowMs`.
 * @param {number} timeMs
 * @param {number} [nowMs]
 */
export function time(timeMs, nowMs = timeMs) {
  const day = DAY.format(timeMs)
  return `${day === DAY.format(nowMs) ? '' : `${day}, `}${TIME.format(timeMs)}`
}

/** @type {Readonly<Record<import('../live-message.ts').PartName, string>>} */
export const NAMES = {
  memory: 'Memory',
  redis: 'Redis',
  postgres: 'PostgreSQL',
  origin: 'Catalogue',
  log: 'Log of changes',
}
