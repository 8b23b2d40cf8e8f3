/**
 * One line for each call. Calls that memory answers in time, which are most, are sampled; all others have a line, as far
 * as the log takes them: so many a second of those that went well and of those that did not, so that neither keeps the
 * other, or the lines about the service itself, out.
 */
import type { Logger } from './log.ts'

export interface RequestLogOptions {
  readonly log: Logger
  /** One in so many hits has a line; 0: none. */
  readonly hitsOneIn: number
  /** A call that takes this long is a warning, and no sampled hit. */
  readonly slowMs: number
  /** Monotonic, milliseconds. */
  readonly now: () => number
  /** Uniform in [0, 1). */
  readonly random: () => number
}

/** What a line says. */
export interface RequestLine {
  readonly method: string
  /** The name of the gRPC status. */
  readonly code: string
  readonly trace_id?: string | undefined
  readonly span_id?: string | undefined
  readonly tenant?: string | undefined
  readonly id?: string | undefined
  /** Whether memory or Redis gave the answer; `undefined` for what is no read of one item or page. */
  readonly cache_hit?: boolean | undefined
  readonly tier?: string | undefined
  readonly outcome?: string | undefined
  readonly duration_ms: number
  readonly reason?: string | undefined
}

/** Statuses that somebody who runs the service should know of. */
const FAULTS: ReadonlySet<string> = new Set([
  'UNKNOWN',
  'DEADLINE_EXCEEDED',
  'RESOURCE_EXHAUSTED',
  'INTERNAL',
  'UNAVAILABLE',
  'DATA_LOSS',
])

/** Less than the log takes in all (`log.ts`), for either kind of lines. */
const LINES = { burst: 300, perSecond: 40 }

/** Lets so many through at once, and so many a second in the long run. */
class Budget {
  readonly #now: () => number
  #left = LINES.burst
  #atMs: number
  /** Refused since the last one that was let through. */
  refused = 0

  constructor(now: () => number) {
    this.#now = now
    this.#atMs = now()
  }

  take(): boolean {
    const nowMs = this.#now()
    this.#left = Math.min(LINES.burst, this.#left + ((nowMs - this.#atMs) * LINES.perSecond) / 1000)
    this.#atMs = nowMs
    if (this.#left < 1) {
      this.refused++
      return false
    }
    this.#left--
    return true
  }
}

export class RequestLog {
  readonly #options: RequestLogOptions
  readonly #good: Budget
  readonly #bad: Budget
  /** Hits until the next one that may have a line. */
  #hitsLeft = 1

  constructor(options: RequestLogOptions) {
    this.#options = options
    this.#good = new Budget(options.now)
    this.#bad = new Budget(options.now)
    options.log.on('level-change', () => {
      this.#hitsLeft = 1
    })
  }

  /** Whether a hit that went well should be told to `write`. All other calls should. */
  wantsHit(durationMs: number): boolean {
    return --this.#hitsLeft <= 0 || durationMs >= this.#options.slowMs
  }

  /** Whether a line of such a call may be written at all: most services want no more than warnings. */
  wants(code: string, durationMs: number, isStream: boolean): boolean {
    const { log, slowMs } = this.#options
    if (log.isLevelEnabled('info')) return true
    return log.isLevelEnabled('warn') && (FAULTS.has(code) || (!isStream && durationMs >= slowMs))
  }

  write(line: RequestLine, isHit: boolean, isStream: boolean): void {
    const { log, slowMs } = this.#options
    const slow = !isStream && line.duration_ms >= slowMs
    const isDue = !isHit || slow || this.#isDue()
    if (FAULTS.has(line.code) || slow) {
      if (log.isLevelEnabled('warn') && this.#bad.take()) {
        log.warn(withLeftOut(line, slow, this.#bad), 'request')
        return
      }
    } else if (isDue && log.isLevelEnabled('info') && this.#good.take()) {
      log.info(withLeftOut(line, slow, this.#good), 'request')
      return
    }
    // At debug there is a line for every call, whatever was left out above.
    log.debug(line, 'request')
  }

  /** Whether this hit is the one in so many; and then, how many are passed over until the next. */
  #isDue(): boolean {
    const { log, hitsOneIn, random } = this.#options
    if (this.#hitsLeft > 0) return false
    if (log.isLevelEnabled('debug')) {
      this.#hitsLeft = 0
      return false
    }
    this.#hitsLeft =
      hitsOneIn === 0 || !log.isLevelEnabled('info')
        ? Number.POSITIVE_INFINITY
        : 1 + Math.floor(random() * 2 * (hitsOneIn - 0.5))
    return hitsOneIn > 0
  }
}

function withLeftOut(line: RequestLine, slow: boolean, budget: Budget): object {
  const { refused } = budget
  budget.refused = 0
  return { ...line, ...(slow && { slow }), ...(refused > 0 && { lines_left_out: refused }) }
}
