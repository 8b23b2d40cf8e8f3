/** Instances of the service as processes of their own, for what one process cannot do to itself: be killed or stopped. */
import { spawn } from 'node:child_process'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { makeRunDirectory } from './run-directory.ts'
import { TestClient } from './service.ts'

/** How a process ended: by its own code, or by a signal. */
export interface Ended {
  readonly code: number | null
  readonly signal: NodeJS.Signals | null
}

export interface ServiceProcess extends AsyncDisposable {
  readonly client: TestClient
  readonly pid: number
  readonly address: string
  /** Where health and metrics are served over HTTP, or `off`. */
  readonly admin: string
  readonly ended: Promise<Ended>
  /** Whether it has not ended yet. */
  readonly running: boolean
  signal(signal: NodeJS.Signals): void
}

const MAIN = join(import.meta.dirname, '../../src/main.ts')

/**
 * Starts an instance with this environment; all it needs must be in there. Rejects when it ends before it is ready.
 * `log` is what gets the lines that it writes to stderr, `ownGroup` that it leads a process group, as one that a terminal
 * has started.
 */
export async function startProcess(
  env: Readonly<Record<string, string>>,
  { log, ownGroup = false }: { readonly log?: string[]; readonly ownGroup?: boolean } = {},
): Promise<ServiceProcess> {
  await using started = new AsyncDisposableStack()
  const directory = started.use(makeRunDirectory())
  const child = spawn(process.execPath, [MAIN], {
    cwd: directory.path,
    detached: ownGroup,
    env: {
      PATH: process.env['PATH'],
      ITEMCACHE_LISTEN: '127.0.0.1:0',
      ITEMCACHE_ADMIN_LISTEN: 'off',
      ITEMCACHE_LOG_LEVEL: process.env['TEST_LOG_LEVEL'] ?? 'silent',
      ...env,
    },
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  createInterface({ input: child.stderr }).on('line', (line) => {
    if (log === undefined) process.stderr.write(`${line}\n`)
    else log.push(line)
  })
  const { pid = 0 } = child
  if (pid !== 0) directory.ends(pid, 'SIGKILL')
  const ended = new Promise<Ended>((done) => child.once('exit', (code, signal) => done({ code, signal })))
  started.defer(async () => {
    child.kill('SIGKILL')
    await ended
  })
  let banner: { readonly grpc: string; readonly admin: string } | undefined
  for await (const line of createInterface({ input: child.stdout })) {
    if (!line.startsWith('{"ready"')) continue
    banner = JSON.parse(line)
    break
  }
  if (banner === undefined) throw new Error('the service ended before it was ready')
  const { grpc: address, admin } = banner
  const client = started.use(new TestClient(address))
  const running = started.move()
  return {
    client,
    pid,
    address,
    admin,
    ended,
    get running() {
      return child.exitCode === null && child.signalCode === null
    },
    signal: (signal) => void child.kill(signal),
    [Symbol.asyncDispose]: () => running.disposeAsync(),
  }
}
