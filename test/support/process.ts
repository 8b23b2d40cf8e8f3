/** Instances of the service as processes of their own, for what one process cannot do to itself: be killed or stopped. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { makeRunDirectory } from './run-directory.ts'
import { TestClient } from './service.ts'

export interface ServiceProcess extends AsyncDisposable {
  readonly client: TestClient
  readonly address: string
  readonly pid: number
  /** Whether it has not ended yet. */
  readonly running: boolean
  signal(signal: NodeJS.Signals): void
}

const MAIN = join(import.meta.dirname, '../../src/main.ts')

/**
 * Starts an instance with this environment; all it needs must be in there. Rejects when it ends before it is ready. Lines
 * that it writes to stderr go into `log`, if there is one.
 */
export async function startProcess(
  env: Readonly<Record<string, string>>,
  log?: string[],
): Promise<ServiceProcess> {
  await using started = new AsyncDisposableStack()
  const directory = started.use(makeRunDirectory())
  const child = spawn(process.execPath, [MAIN], {
    cwd: directory.path,
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
  if (child.pid !== undefined) directory.ends(child.pid, 'SIGKILL')
  const exited = once(child, 'exit')
  started.defer(async () => {
    child.kill('SIGKILL')
    await exited
  })
  let address: string | undefined
  for await (const line of createInterface({ input: child.stdout })) {
    if (!line.startsWith('{"ready"')) continue
    address = (JSON.parse(line) as { grpc: string }).grpc
    break
  }
  if (address === undefined) throw new Error('the service ended before it was ready')
  const client = started.use(new TestClient(address))
  const running = started.move()
  return {
    client,
    address,
    pid: child.pid ?? 0,
    get running() {
      return child.exitCode === null && child.signalCode === null
    },
    signal: (signal) => void child.kill(signal),
    [Symbol.asyncDispose]: () => running.disposeAsync(),
  }
}
