/** What the program has of its process, and the terminal, if there is one: a full screen, or a line that changes. */
import ansi from 'ansi-escapes'
import { createLogUpdate } from 'log-update'
import sliceAnsi from 'slice-ansi'
import type { Style } from './format.ts'

/** A place to write to. */
export interface Output {
  write(text: string): unknown
  readonly isTTY?: boolean
  readonly columns?: number
  readonly rows?: number
  on?(event: 'resize', listener: () => void): unknown
  off?(event: 'resize', listener: () => void): unknown
}

/** Where keys and piped text come from. */
export interface Input extends AsyncIterable<Uint8Array | string> {
  readonly isTTY?: boolean
  setRawMode?(raw: boolean): unknown
  on?(event: 'data', listener: (keys: Uint8Array | string) => void): unknown
  off?(event: 'data', listener: (keys: Uint8Array | string) => void): unknown
  pause?(): unknown
}

/** What the program gets from its process. */
export interface Io {
  readonly stdout: Output
  readonly stderr: Output
  readonly stdin: Input
  readonly env: Readonly<Record<string, string | undefined>>
  /** Aborted by Ctrl-C and the like, which end the process only until this was asked for. Default: never. */
  readonly interruption?: () => AbortSignal
  /** Replaces the process with the service. Default: there is none. */
  readonly serve?: (argv: readonly string[]) => never
  /** Replaces the process with the doctor. Default: there is none. */
  readonly doctor?: (argv: readonly string[]) => never
}

/** How an output can be written to: colours and a width on terminals only. */
export function styleOf({ isTTY = false, columns = 80 }: Output, env: Io['env']): Style {
  return {
    color: isTTY && (env['NO_COLOR'] ?? '') === '' && env['TERM'] !== 'dumb',
    columns: isTTY ? columns : Number.POSITIVE_INFINITY,
  }
}

/** Whether output and input can be a full screen with keys. */
export function isScreen({ stdout, env }: Io): boolean {
  return stdout.isTTY === true && env['TERM'] !== 'dumb'
}

const CTRL_C = '\u0003'
const CTRL_D = '\u0004'
const ESCAPE = '\u001b'

/** The whole terminal until it is disposed, which leaves it as it was; so does the end of the process. */
export class Screen implements Disposable {
  readonly #stdout: Output
  readonly #stdin: Input
  readonly #quit = new AbortController()
  readonly #keys = (keys: Uint8Array | string) => {
    const text = keys.toString()
    // Other keys, as the arrows, are sequences that begin with an escape.
    if (text === ESCAPE || ['q', 'Q', CTRL_C, CTRL_D].some((key) => text.includes(key))) this.#quit.abort()
  }
  readonly #leave = () => void this.#stdout.write(`${ansi.cursorShow}${ansi.exitAlternativeScreen}`)
  readonly #redraw: () => void
  #entered = true

  /** `onResize` is called after the terminal has got another size. */
  constructor({ stdout, stdin }: Io, onResize: () => void) {
    this.#stdout = stdout
    this.#stdin = stdin
    this.#redraw = onResize
    process.once('exit', this.#leave)
    stdout.write(`${ansi.enterAlternativeScreen}${ansi.cursorHide}`)
    stdout.on?.('resize', this.#redraw)
    if (stdin.isTTY === true) {
      stdin.setRawMode?.(true)
      stdin.on?.('data', this.#keys)
    }
  }

  /** Aborted when q, Escape, Ctrl-C or Ctrl-D was pressed. */
  get quit(): AbortSignal {
    return this.#quit.signal
  }

  get columns(): number {
    return this.#stdout.columns ?? 80
  }

  get rows(): number {
    return this.#stdout.rows ?? 24
  }

  /** Shows lines from the top. What has no room is cut off. */
  draw(lines: readonly string[]): void {
    const fitting = lines.slice(0, this.rows).map((line) => sliceAnsi(line, 0, this.columns))
    const text = fitting.map((line) => `${line}${ansi.eraseEndLine}`).join('\r\n')
    this.#stdout.write(ansi.synchronizedOutput(`${ansi.cursorTo(0, 0)}${text}${ansi.eraseDown}`))
  }

  [Symbol.dispose](): void {
    if (!this.#entered) return
    this.#entered = false
    process.off('exit', this.#leave)
    this.#leave()
    this.#stdout.off?.('resize', this.#redraw)
    if (this.#stdin.isTTY === true) {
      this.#stdin.off?.('data', this.#keys)
      this.#stdin.setRawMode?.(false)
      this.#stdin.pause?.()
    }
  }
}

/** One line of a terminal that changes and is gone in the end. Elsewhere: nothing. */
export function changingLine(output: Output): { show(line: string): void } & Disposable {
  if (output.isTTY !== true) return { show: () => {}, [Symbol.dispose]: () => {} }
  // Only the methods that log-update uses are there.
  const log = createLogUpdate(output as NodeJS.WriteStream, { showCursor: true })
  return {
    show: (line) => log(sliceAnsi(line, 0, output.columns ?? 80)),
    [Symbol.dispose]: () => log.clear(),
  }
}
