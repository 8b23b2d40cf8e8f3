/** The program in this process, with a terminal that tests can look at, press keys on, and resize. */
import { EventEmitter } from 'node:events'
import { Readable } from 'node:stream'
import xterm from '@xterm/headless'
import ansi from 'ansi-escapes'
import { run } from '../src/command-line.ts'
import type { Io } from '../src/terminal.ts'

export interface Setting {
  readonly env?: Readonly<Record<string, string>>
  readonly stdin?: string
  readonly interruption?: AbortSignal
  readonly serve?: Io['serve']
}

/** What the program writes and exits with, without a terminal. */
export async function itemcache(
  argv: readonly string[],
  { env = {}, stdin = '', interruption, serve }: Setting = {},
): Promise<{ exitCode: number; stdout: string; stderr: string }> {
  const written = { stdout: '', stderr: '' }
  const output = (name: keyof typeof written) => ({
    write: (text: string) => {
      written[name] += text
    },
  })
  const exitCode = await run(argv, {
    stdout: output('stdout'),
    stderr: output('stderr'),
    stdin: Readable.from([stdin]),
    env,
    ...(interruption && { interruption: () => interruption }),
    ...(serve && { serve }),
  })
  return { exitCode, ...written }
}

/** A terminal of so many columns and rows, as xterm.js understands what is written to it. */
export class FakeTerminal extends EventEmitter {
  readonly isTTY = true
  /** Whether the program reads single keys. */
  isRaw = false
  isPaused = false
  #isCursorVisible = true
  readonly #terminal: InstanceType<typeof xterm.Terminal>

  constructor(columns: number, rows: number) {
    super()
    this.#terminal = new xterm.Terminal({ cols: columns, rows, allowProposedApi: true, scrollback: 1000 })
  }

  get columns(): number {
    return this.#terminal.cols
  }

  get rows(): number {
    return this.#terminal.rows
  }

  write(text: string): void {
    const shown = text.lastIndexOf(ansi.cursorShow)
    const hidden = text.lastIndexOf(ansi.cursorHide)
    if (shown !== hidden) this.#isCursorVisible = shown > hidden
    // As a terminal does where it is not raw, which ours is only for keys.
    this.#terminal.write(text.replace(/(?<!\r)\n/g, '\r\n'))
  }

  setRawMode(raw: boolean): void {
    this.isRaw = raw
  }

  pause(): void {
    this.isPaused = true
  }

  press(keys: string): void {
    this.emit('data', Buffer.from(keys))
  }

  resize(columns: number, rows: number): void {
    this.#terminal.resize(columns, rows)
    this.emit('resize')
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<string> {}

  /** What is on the screen: its lines, without the blanks at their ends, and which of the two screens it is. */
  async look(): Promise<{ lines: string[]; isFullScreen: boolean; isCursorVisible: boolean }> {
    // Writing is asynchronous, and in order.
    await new Promise<void>((resolve) => this.#terminal.write('', resolve))
    const { active } = this.#terminal.buffer
    const lines = Array.from(
      { length: this.rows },
      (_, i) => active.getLine(active.baseY + i)?.translateToString(true) ?? '',
    )
    return {
      lines,
      isFullScreen: active.type === 'alternate',
      isCursorVisible: this.#isCursorVisible,
    }
  }
}

/** Starts the program on a terminal. */
export function onTerminal(
  terminal: FakeTerminal,
  argv: readonly string[],
  { env = {}, interruption }: Setting = {},
): Promise<number> {
  return run(argv, {
    stdout: terminal,
    stderr: terminal,
    stdin: terminal,
    env,
    ...(interruption && { interruption: () => interruption }),
  })
}
