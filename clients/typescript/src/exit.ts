/** What the program exits with. */
import { InvalidArgumentError } from 'commander'
import {
  DeadlineExceededError,
  InvalidArgumentError as InvalidCallError,
  NotFoundError,
  UnavailableError,
} from './errors.ts'

export const EXIT = { ok: 0, error: 1, usage: 2, notFound: 3, unavailable: 4, interrupted: 130 } as const

/** Ends the program with a code other than 0 after everything was said. */
export class Ending extends Error {
  readonly exitCode: number
  constructor(exitCode: number) {
    super()
    this.exitCode = exitCode
  }
}

/** What the client itself refuses; what the service refuses has other reasons. */
const NOT_SENT = ['INVALID_OPTION', 'INVALID_TARGET', 'INVALID_METADATA', 'INVALID_TIMEOUT', 'NOT_ENCODABLE']

export function exitCodeOf(error: unknown): number {
  if (error instanceof InvalidArgumentError) return EXIT.usage
  if (error instanceof InvalidCallError && NOT_SENT.includes(error.reason ?? '')) return EXIT.usage
  if (error instanceof NotFoundError) return EXIT.notFound
  if (error instanceof UnavailableError || error instanceof DeadlineExceededError) return EXIT.unavailable
  return EXIT.error
}

/** The code for several outcomes: the one that needs attention first. */
export function worstExitCode(codes: Iterable<number>): number {
  const present = new Set(codes)
  return [EXIT.error, EXIT.unavailable, EXIT.notFound].find((code) => present.has(code)) ?? EXIT.ok
}
