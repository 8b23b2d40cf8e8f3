/**
 * Structured logs: one line of JSON per event. What callers send (ids, tenants, tags) ends up in them, so every text
 * is bounded, passwords in URLs are hidden, and JSON's escaping keeps one event on one line.
 */
import { type DestinationStream, type Logger, pino } from 'pino'
import { LOG_LEVELS, type LogLevel, withoutPasswords } from '../config.ts'
import { ItemCacheError } from '../errors.ts'

export type { Logger } from 'pino'

/** What `createLogger` needs. */
export interface LogOptions {
  readonly level: LogLevel
  readonly version: string
  /** Default: stderr, written before the logging call returns, for stdout belongs to the start banner. */
  readonly destination?: DestinationStream
  /** Milliseconds of a monotonic clock. Default: `performance.now`. */
  readonly now?: () => number
}

/** Lines at info and above: so many at once, and so many a second in the long run. What is fatal is always logged. */
const LINES = { burst: 1000, perSecond: 100 }
const [INFO, FATAL] = [30, 60]

const MAX_TEXT = 256
const MAX_STACK = 4096
const MAX_DEPTH = 5
const MAX_ENTRIES = 32
const HIDDEN = '[hidden]'
const SECRET_KEYS = ['password', 'secret', 'token', 'authorization', 'cookie', 'apikey', 'privatekey']

/** Bindings of child loggers pass through no formatter, only through serializers, which go by name. */
const CALLERS_FIELDS = [
  'tenant',
  'id',
  'ids',
  'tag',
  'tags',
  'requestId',
  'clientId',
  'traceId',
  'method',
  'peer',
]

/** A logger whose lines carry `level` by name, `time` (ISO 8601), `service`, `version` and `pid`. */
export function createLogger({
  level,
  version,
  destination,
  now = () => performance.now(),
}: LogOptions): Logger {
  let left = LINES.burst
  let atMs = now()
  let leftOut = 0
  const callers = Object.fromEntries(
    CALLERS_FIELDS.map((field) => [field, (value: unknown) => presentable(value)]),
  )
  return pino(
    {
      level,
      base: { service: 'itemcache', version, pid: process.pid },
      timestamp: pino.stdTimeFunctions.isoTime,
      hooks: {
        // A fault that every call meets must not fill the disk.
        logMethod(line, method, lineLevel) {
          if (lineLevel >= INFO && lineLevel < FATAL) {
            const nowMs = now()
            left = Math.min(LINES.burst, left + ((nowMs - atMs) * LINES.perSecond) / 1000)
            atMs = nowMs
            if (left < 1) {
              leftOut++
              return
            }
            left--
            if (leftOut > 0) method.call(this, { lines: leftOut }, 'lines of the log were left out')
            leftOut = 0
          }
          method.apply(this, line)
        },
      },
      redact: { paths: SECRET_KEYS, censor: HIDDEN },
      serializers: {
        ...callers,
        err: (value: unknown) => (value instanceof Error ? presentable(value) : value),
        msg: (value: unknown) => presentable(value),
      },
      formatters: {
        level: (label) => ({ level: label }),
        log: (fields) => presentable(fields) as Record<string, unknown>,
      },
    },
    destination ?? pino.destination({ dest: 2, sync: true }),
  )
}

/** Changes the least level that is logged, from the next line on; false for one that does not exist. */
export function changeLevel(log: Logger, level: string): boolean {
  const known = LOG_LEVELS.find((one) => one === level)
  if (known === undefined) return false
  const from = log.level
  const tell = () => log.warn({ from, to: known }, 'the log level is changed')
  // While it can be seen.
  const before = log.isLevelEnabled('warn')
  if (before) tell()
  log.level = known
  if (!before) tell()
  return true
}

/** Back to `configured`, or to debug when that is the level now. */
export function toggleDebug(log: Logger, configured: LogLevel): void {
  changeLevel(log, log.level === 'debug' ? configured : 'debug')
}

/** The value as a log line may hold it: bounded in length, depth and number of entries, without secrets. */
function presentable(value: unknown, depth = 0): unknown {
  if (typeof value === 'string') return bounded(value, MAX_TEXT)
  if (typeof value === 'bigint') return value.toString()
  if (typeof value !== 'object' || value === null) return value
  if (depth > MAX_DEPTH) return '[too deep]'
  if (value instanceof Error) return presentableError(value, depth)
  if (value instanceof Date) return value
  if (value instanceof Uint8Array) return `[${value.byteLength} bytes]`
  if (Array.isArray(value)) {
    const all = value.length <= MAX_ENTRIES
    const shown = value
      .slice(0, all ? MAX_ENTRIES : MAX_ENTRIES - 1)
      .map((each) => presentable(each, depth + 1))
    return all ? shown : [...shown, `[${value.length - shown.length} more]`]
  }
  const fields: [string, unknown][] = []
  for (const [key, each] of Object.entries(value).slice(0, MAX_ENTRIES)) {
    const hidden = SECRET_KEYS.includes(key.toLowerCase().replaceAll(/[-_]/g, ''))
    fields.push([bounded(key, MAX_TEXT), hidden ? HIDDEN : presentable(each, depth + 1)])
  }
  return Object.fromEntries(fields)
}

interface PresentedError {
  type: string
  message: string
  code?: unknown
  reason?: string
  id?: string
  violations?: unknown
  stack?: string
  errors?: unknown
  cause?: unknown
}

/**
 * Only these fields of an error: a driver's error may carry its whole configuration, and `new URL` throws one that
 * carries the URL.
 */
function presentableError(error: Error, depth: number): PresentedError {
  const shown: PresentedError = { type: error.name, message: bounded(error.message, MAX_TEXT) }
  if ('code' in error && (typeof error.code === 'string' || typeof error.code === 'number')) {
    shown.code = presentable(error.code)
  }
  if (error instanceof ItemCacheError) {
    shown.reason = error.reason
    if (error.id !== undefined) shown.id = bounded(error.id, MAX_TEXT)
    if (error.violations.length > 0) shown.violations = presentable(error.violations, depth + 1)
  }
  if (error.stack !== undefined) shown.stack = bounded(error.stack, MAX_STACK)
  if (error instanceof AggregateError) shown.errors = presentable(error.errors, depth + 1)
  if (error.cause !== undefined) shown.cause = presentable(error.cause, depth + 1)
  return shown
}

/** What JSON leaves as it is, and a terminal or an editor may take for a command, a new line, or a change of direction. */
const COMMANDS = /[\u007f-\u009f\u2028-\u202e\u2066-\u2069]/g
const shownAsCode = (character: string) => `\\u${character.charCodeAt(0).toString(16).padStart(4, '0')}`

function bounded(text: string, max: number): string {
  const cut = text.length > 2 * max ? text.slice(0, 2 * max) : text
  const safe = withoutPasswords(cut).replace(COMMANDS, shownAsCode)
  return safe.length > max ? `${safe.slice(0, max - 1).toWellFormed()}…` : safe
}
