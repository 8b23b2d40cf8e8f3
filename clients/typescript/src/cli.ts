#!/usr/bin/env node
/** The program `itemcache`. */
import { run } from './command-line.ts'

// Whoever reads our output may stop reading, as `head` does: then there is nothing left to say.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code === 'EPIPE') process.exit(0)
  throw error
})

const { stdout, stderr, stdin, env } = process
process.exitCode = await run(process.argv.slice(2), { stdout, stderr, stdin, env })
