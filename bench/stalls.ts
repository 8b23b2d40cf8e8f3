/**
 * How long the machine keeps a process waiting that does nothing but look at the clock: what no server's latency can be below.
 * A process of its own; one question: `watch`.
 */
import { answer, SERVER_CORE, start } from './control.ts'

const WATCHED_MS = 4000
/** Shorter ones are what a clock costs. */
const SHORTEST_MS = 1

interface Stalls {
  /** Of the time that was watched. */
  readonly share: number
  readonly longestMs: number
}

if (process.argv[1] === import.meta.filename) answer({ watch })

function watch(): Stalls {
  const startedMs = performance.now()
  let [lastMs, stalledMs, longestMs] = [startedMs, 0, 0]
  while (lastMs < startedMs + WATCHED_MS) {
    const nowMs = performance.now()
    const gapMs = nowMs - lastMs
    if (gapMs > SHORTEST_MS) stalledMs += gapMs
    longestMs = Math.max(longestMs, gapMs)
    lastMs = nowMs
  }
  return { share: stalledMs / (lastMs - startedMs), longestMs }
}

/** For the note of a latency: what the machine adds to it, on the core that servers have. Takes some seconds. */
export async function machineStalls(): Promise<string> {
  await using watcher = start(import.meta.filename, { core: SERVER_CORE })
  const { share, longestMs } = await watcher.ask<Stalls>('watch')
  return `the idle machine stalls for ${(100 * share).toFixed(1)} % of the time, ${longestMs.toFixed(0)} ms at most`
}
