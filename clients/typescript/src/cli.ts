#!/usr/bin/env node
/** The program `itemcache`. */
import { run } from './command-line.ts'
import { doctor, serve } from './commands/serve.ts'
import { EXIT } from './exit.ts'

// Whoever reads our output may stop reading, as `head` does: then there is nothing left to say.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code === 'EPIPE') process.exit(0)
  throw error
})

/** From the first call on, the first signal aborts and the second ends the process. */
function interruption(): AbortSignal {
  const interrupted = new AbortController()
  const onSignal = () => {
    if (interrupted.signal.aborted) process.exit(EXIT.interrupted)
    interrupted.abort()
  }
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, onSignal)
  return interrupted.signal
}

const { stdout, stderr, stdin, env } = process
process.exitCode = await run(process.argv.slice(2), {
  stdout,
  stderr,
  stdin,
  env,
  interruption,
  ...(serve && { serve }),
  ...(doctor && { doctor }),
})
