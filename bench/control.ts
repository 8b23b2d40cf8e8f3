/**
 * Processes that a measurement starts and asks questions: a server whose processor time is wanted, a generator that is told
 * how much to send. Each may be pinned to one core, so that the one does not run in the other's time.
 */
import { type ChildProcess, fork, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'

/** What a process answers to its parent, by the name of the question. */
export type Answers = Readonly<Record<string, (argument: never) => unknown>>

interface Question {
  readonly question: number
  readonly name: string
  readonly argument: unknown
}

/** In a child: answers what the parent asks until the parent goes, and ends with it. */
export function answer(answers: Answers): void {
  process.on('message', async (message: Question) => {
    const handler = answers[message.name] as ((argument: unknown) => unknown) | undefined
    if (handler === undefined) return
    const { question } = message
    try {
      process.send?.({ question, value: await handler(message.argument) })
    } catch (error) {
      process.send?.({ question, failed: error instanceof Error ? error.stack : `${error}` })
    }
  })
  process.on('disconnect', () => process.exit())
}

/** User and system time of this process so far, all its threads together, in microseconds. */
export function cpuUs(): number {
  const { user, system } = process.cpuUsage()
  return user + system
}

const START: string = JSON.parse(readFileSync(join(import.meta.dirname, '..', 'package.json'), 'utf8'))
  .scripts.start
const [, TUNABLES, ARGUMENTS] =
  /GLIBC_TUNABLES=\$\{GLIBC_TUNABLES-(\S+)\} exec node (.*) src\/main\.ts$/.exec(START) ?? []
if (TUNABLES === undefined || ARGUMENTS === undefined) throw new Error(`cannot read npm start: ${START}`)

/** A process that answers. Disposed, it is killed: it holds nothing that matters. */
export interface Asked extends AsyncDisposable {
  readonly pid: number
  readonly child: ChildProcess
  ask<T>(name: string, argument?: unknown): Promise<T>
  /** User and system time of the process so far, in microseconds. */
  cpuUs(): Promise<number>
}

export interface StartOptions {
  readonly args?: readonly string[]
  readonly execArgv?: readonly string[]
  readonly env?: Readonly<Record<string, string | undefined>>
  readonly cwd?: string
  /** Undefined: wherever the system likes. */
  readonly core?: number | undefined
  /** Also pass the output on to the caller, who must read it. */
  readonly stdout?: 'pipe' | 'inherit'
}

/** Starts a module in a process of its own. Every one of them answers `cpu`. */
export function start(module: string, options: StartOptions = {}): Asked {
  const { args = [], execArgv = [], env = {}, cwd, core, stdout = 'inherit' } = options
  const child = fork(module, args, {
    execArgv: ['--import', join(import.meta.dirname, 'probe.ts'), ...execArgv],
    env: { ...process.env, ...env },
    ...(cwd !== undefined && { cwd }),
    serialization: 'advanced',
    stdio: ['ignore', stdout, 'inherit', 'ipc'],
  })
  const { pid } = child
  if (pid === undefined) throw new Error(`cannot start ${module}`)
  if (core !== undefined) pin(pid, core)

  let asked = 0
  const waiting = new Map<number, PromiseWithResolvers<unknown>>()
  child.on(
    'message',
    ({ question, value, failed }: { question: number; value: unknown; failed?: string }) => {
      const asker = waiting.get(question)
      waiting.delete(question)
      if (failed === undefined) asker?.resolve(value)
      else asker?.reject(new Error(failed))
    },
  )
  child.on('exit', (code, signal) => {
    for (const { reject } of waiting.values()) reject(new Error(`${module} ended with ${signal ?? code}`))
    waiting.clear()
  })
  const ask = <T>(name: string, argument?: unknown): Promise<T> => {
    const asker = Promise.withResolvers<unknown>()
    waiting.set(asked, asker)
    child.send({ question: asked++, name, argument } satisfies Question)
    return asker.promise as Promise<T>
  }
  return {
    pid,
    child,
    ask,
    cpuUs: () => ask<number>('cpu'),
    async [Symbol.asyncDispose]() {
      if (child.exitCode !== null || child.signalCode !== null) return
      child.kill('SIGKILL')
      await once(child, 'exit')
    },
  }
}

/** All threads of a process, also those that it starts later, stay on one core. */
function pin(pid: number, core: number): void {
  spawnSync('taskset', ['-a', '-c', '-p', `${core}`, `${pid}`], { stdio: 'ignore' })
}

/** The cores that this process may use; none where that cannot be told or set. */
function cores(): readonly number[] {
  try {
    if (spawnSync('taskset', ['-V'], { stdio: 'ignore' }).status !== 0) return []
    const list = /^Cpus_allowed_list:\s+(.+)$/m.exec(readFileSync('/proc/self/status', 'utf8'))?.[1] ?? ''
    return list.split(',').flatMap((range) => {
      const [first = Number.NaN, last = first] = range.split('-').map(Number)
      return Array.from({ length: last - first + 1 }, (_, n) => first + n)
    })
  } catch {
    return []
  }
}

const [first, second] = cores()

/** Where the measured server runs, and where everything that loads it does. Undefined: there are no two cores. */
export const SERVER_CORE = second === undefined ? undefined : first
export const LOAD_CORE = second

/** How a server runs that is measured, ours or another: with what `npm start` gives Node. */
export const asServer = ({ execArgv = [], env, ...options }: StartOptions): StartOptions => ({
  ...options,
  execArgv: [...ARGUMENTS.split(' '), ...execArgv],
  env: { GLIBC_TUNABLES: process.env['GLIBC_TUNABLES'] ?? TUNABLES, ...env },
})

/** How a server runs that ours is compared with. */
export const SERVER = asServer({ core: SERVER_CORE })
