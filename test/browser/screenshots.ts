/**
 * `npm run screenshots`: makes the pictures of docs/live-page.md again, of a service under load whose Redis is killed and
 * started again, and prints how long the page took to say so. About a minute and a half.
 */
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Page } from 'playwright-core'
import { startPostgres } from '../../src/embedded/postgres.ts'
import { chromiumProgram, NO_CHROMIUM, startChromium } from '../support/browser.ts'
import { startLoad } from '../support/load.ts'
import { ownRedis } from '../support/own-server.ts'
import { startProcess } from '../support/process.ts'
import { makeRunDirectory } from '../support/run-directory.ts'
import { smallPng } from './small-png.ts'

const DOCS = join(import.meta.dirname, '../../docs')
const CACHE = join(import.meta.dirname, '../../.itemcache/cache')
const MAX_BYTES = 150_000

if (chromiumProgram === undefined) throw new Error(`No screenshots: ${NO_CHROMIUM}.`)

await using started = new AsyncDisposableStack()
const directory = started.use(makeRunDirectory())
const postgres = started.use(await startPostgres({ dataDir: directory.path }))
const redis = started.use(await ownRedis(CACHE))
const service = started.use(
  await startProcess({
    DATABASE_URL: postgres.serviceUrl,
    REDIS_URL: redis.url,
    ITEMCACHE_ADMIN_LISTEN: '127.0.0.1:0',
  }),
)
started.use(startLoad(service.client, 100))
const browser = started.use(await startChromium())

async function open(width: number, height: number, colorScheme: 'light' | 'dark'): Promise<Page> {
  const page = await browser.newPage({ viewport: { width, height }, colorScheme })
  await page.goto(`http://${service.admin}/`)
  return page
}

/** Made small when the load is over: that takes seconds, in which this process would call nobody. */
const pictures = new Map<string, Buffer>()

async function take(page: Page, name: string): Promise<void> {
  pictures.set(name, await page.screenshot({ fullPage: true }))
}

/** Waits until each page says it, and prints how long that took. */
async function timed(pages: readonly Page[], what: string, headline: string): Promise<void> {
  const beganMs = performance.now()
  await Promise.all(
    pages.map(async (page) => {
      await page.locator('#headline-text', { hasText: headline }).waitFor({ timeout: 120_000 })
      const { width } = page.viewportSize() ?? { width: 0 }
      console.log(`${what}, at ${width} pixels: ${Math.round(performance.now() - beganMs)} ms`)
    }),
  )
}

console.log('A minute of load')
await sleep(60_000)
const desktop = await open(1280, 900, 'light')
const phone = await open(390, 844, 'dark')
await phone.getByLabel('Tenant').fill('shop')
await phone.getByLabel('Item id').fill('1')
await phone.getByRole('button', { name: 'Look up' }).click()
await sleep(3_000)
await take(desktop, 'live-page.png')
await take(phone, 'live-page-phone.png')
for (let round = 1; round <= 3; round++) {
  await redis.kill()
  await timed([desktop, phone], 'Redis was killed, and the page says so', 'Redis is down')
  await sleep(5_000)
  if (round === 3) await take(desktop, 'live-page-outage.png')
  await redis.restart()
  await timed([desktop, phone], 'Redis is back, and the page says so', 'All well')
  await sleep(2_000)
}
await started.disposeAsync()
for (const [name, picture] of pictures) {
  const png = smallPng(picture)
  console.log(`${name}: ${Math.ceil(png.length / 1000)} kB`)
  if (png.length > MAX_BYTES) throw new Error(`${name} is larger than ${MAX_BYTES / 1000} kB`)
  writeFileSync(join(DOCS, name), png)
}
