/** Starts the service, or its doctor, where the program runs from the repository. The package has neither. */
import { fileURLToPath } from 'node:url'

// In the package this file is JavaScript and part of a bundle.
const IS_SOURCE = import.meta.url.endsWith('.ts')

/** Becomes another program: the same process, with its signals and its exit code. */
type Become = (argv: readonly string[]) => never

const become = (path: string): Become | undefined =>
  IS_SOURCE
    ? (argv) => {
        const main = fileURLToPath(new URL(`../../../../src/${path}`, import.meta.url))
        return process.execve?.(process.execPath, [process.execPath, main, ...argv]) as never
      }
    : undefined

export const serve = become('main.ts')
export const doctor = become('doctor/main.ts')
