/** Starts the service, where the program runs from the repository. The package does not have the service. */
import { fileURLToPath } from 'node:url'

// In the package this file is JavaScript and part of a bundle.
const IS_SOURCE = import.meta.url.endsWith('.ts')

/** Becomes the service: the same process, with its signals and its exit code. */
export const serve: ((argv: readonly string[]) => never) | undefined = IS_SOURCE
  ? (argv) => {
      const main = fileURLToPath(new URL('../../../../src/main.ts', import.meta.url))
      return process.execve?.(process.execPath, [process.execPath, main, ...argv]) as never
    }
  : undefined
