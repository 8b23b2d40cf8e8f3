/** A headless Chromium: Debian's, which `.ci/run` installs, or the one that CHROMIUM names. */
import { existsSync } from 'node:fs'
import { delimiter, join } from 'node:path'
import { type Browser, chromium } from 'playwright-core'
import { makeRunDirectory } from './run-directory.ts'

/** Its program; `undefined`: there is none. CHROMIUM names one, or none (a file that is not there); else it is on the PATH. */
export const chromiumProgram: string | undefined = (
  process.env['CHROMIUM']
    ? [process.env['CHROMIUM']]
    : (process.env['PATH'] ?? '')
        .split(delimiter)
        .flatMap((dir) => ['chromium', 'chromium-headless-shell'].map((name) => join(dir, name)))
).find((file) => existsSync(file))

/** Why browser tests are not run, where they are not. */
export const NO_CHROMIUM =
  'there is no Chromium (Debian: apt-get install --no-install-recommends chromium; or set CHROMIUM)'

/** Starts it with a profile of its own. Nothing in it asks the network for anything by itself. */
export async function startChromium(): Promise<Browser & AsyncDisposable> {
  const directory = makeRunDirectory()
  try {
    const browser = await chromium.launch({
      ...(chromiumProgram !== undefined && { executablePath: chromiumProgram }),
      env: { ...process.env, HOME: directory.path },
      // A busy machine takes its time.
      timeout: 60_000,
      args: [
        '--no-sandbox',
        '--disable-gpu',
        '--disable-quic',
        '--no-first-run',
        '--disable-background-networking',
        '--disable-component-update',
        '--disable-sync',
      ],
    })
    return Object.assign(browser, {
      [Symbol.asyncDispose]: async () => {
        await browser.close()
        await directory[Symbol.asyncDispose]()
      },
    })
  } catch (error) {
    await directory[Symbol.asyncDispose]()
    throw error
  }
}
