import { chmodSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

/** A directory that goes when it is disposed, or when the process exits before. */
export interface RunDirectory extends AsyncDisposable {
  readonly path: string
  /** Ends `pid` with `signal`, too, when the process exits before the directory is disposed. */
  ends(pid: number, signal: NodeJS.Signals): void
}

interface Held {
  readonly path: string
  readonly ends: Map<number, NodeJS.Signals>
}

const held = new Set<Held>()

/** What is done when there is no time left to wait for servers to stop. */
function cleanAll(): void {
  for (const { ends } of held) {
    for (const [pid, signal] of ends) {
      try {
        process.kill(pid, signal)
      } catch {
        // It has ended already.
      }
    }
  }
  for (const { path } of held) remove(path)
  held.clear()
}

/** A server that is ending may still write into its directory: then it takes some tries. */
function remove(path: string): void {
  for (let tries = 1; ; tries++) {
    try {
      rmSync(path, { recursive: true, force: true })
      return
    } catch (error) {
      if (tries === 50) throw error
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 20)
    }
  }
}

process.on('exit', cleanAll)
for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  // Vitest's workers may not call process.exit, so the signal ends the process when it comes again, unheard.
  process.once(signal, () => {
    cleanAll()
    process.kill(process.pid, signal)
  })
}
// A worker whose test hangs would outlive the run.
process.once('disconnect', () => {
  cleanAll()
  process.kill(process.pid, 'SIGKILL')
})

export function makeRunDirectory(): RunDirectory {
  const path = mkdtempSync(join(tmpdir(), 'itemcache-test-'))
  // As root, PostgreSQL runs as another user, who must get in.
  chmodSync(path, 0o755)
  const directory: Held = { path, ends: new Map() }
  held.add(directory)
  return {
    path,
    ends: (pid, signal) => void directory.ends.set(pid, signal),
    [Symbol.asyncDispose]: async () => {
      held.delete(directory)
      remove(path)
    },
  }
}
