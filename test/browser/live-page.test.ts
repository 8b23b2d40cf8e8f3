/** The live page in a real browser, Debian's Chromium, with real load behind it. */
import { once } from 'node:events'
import { type AddressInfo, connect, createServer, type Socket } from 'node:net'
import type { Browser, BrowserContextOptions, Page } from 'playwright-core'
import { afterAll, beforeAll, beforeEach, describe, expect, test, vi } from 'vitest'
import { chromiumProgram, NO_CHROMIUM, startChromium } from '../support/browser.ts'
import { callerAs } from '../support/caller.ts'
import { startLoad } from '../support/load.ts'
import { freshRedis, type OwnServer } from '../support/servers.ts'
import { startService, type TestService } from '../support/service.ts'

const WIDE = { width: 1280, height: 900 }
const PHONE = { width: 390, height: 844 }

let held: AsyncDisposableStack | undefined
let browser: Browser
let redis: OwnServer
let service: TestService
let url: string

// A browser is many processes, and each of them waits for its turn on a busy machine.
vi.setConfig({ testTimeout: 240_000 })

beforeEach(({ skip }) => skip(chromiumProgram === undefined, NO_CHROMIUM))

beforeAll(async () => {
  if (chromiumProgram === undefined) return
  await using starting = new AsyncDisposableStack()
  browser = starting.use(await startChromium())
  redis = starting.use(await freshRedis())
  service = starting.use(await startService({ env: { REDIS_URL: redis.url } }))
  starting.use(startLoad(service.client, 40))
  url = `http://127.0.0.1:${service.app.admin?.port}/`
  held = starting.move()
})
afterAll(() => held?.disposeAsync())

interface Opened extends AsyncDisposable {
  readonly page: Page
  /** What the browser complained of, and requests to anywhere else. */
  readonly problems: string[]
}

/** Opens the page and waits for its first data. */
async function open(options: BrowserContextOptions = {}, address = url): Promise<Opened> {
  const context = await browser.newContext({ viewport: WIDE, ...options })
  context.setDefaultTimeout(60_000)
  const page = await context.newPage()
  const problems: string[] = []
  page.on('console', (message) => problems.push(`${message.type()}: ${message.text()}`))
  page.on('pageerror', (error) => problems.push(`${error.stack}`))
  page.on('request', (request) => {
    if (!request.url().startsWith(address)) problems.push(`a request to ${request.url()}`)
  })
  await page.goto(address)
  await page.locator('body[data-begun]').waitFor()
  return { page, problems, [Symbol.asyncDispose]: () => context.close() }
}

const text = (page: Page, selector: string) => page.locator(selector).innerText()
const tile = (page: Page, name: string) =>
  page
    .locator('#tiles > div', { has: page.getByText(name, { exact: true }) })
    .locator('.figure')
    .innerText()
const overflow = (page: Page) =>
  page.evaluate('document.documentElement.scrollWidth - document.documentElement.clientWidth')

/** Whether something is drawn in each plot in the colour of a line. */
const drawnPlots = (page: Page) =>
  page.locator('.plot canvas').evaluateAll((canvases) =>
    canvases.map((canvas) => {
      const { width, height } = canvas as unknown as { width: number; height: number }
      const context = (
        canvas as unknown as {
          getContext(kind: '2d'): { getImageData(...area: number[]): { data: Uint8ClampedArray } }
        }
      ).getContext('2d')
      const { data } = context.getImageData(0, 0, width, height)
      let strong = 0
      for (let i = 3; i < data.length; i += 4) if ((data[i] ?? 0) > 250) strong++
      return strong > 100
    }),
  )

describe('the live page', () => {
  test.each([
    ['1280 pixels, light', { viewport: WIDE, colorScheme: 'light' }, 'rgb(244, 246, 248)'],
    ['390 pixels, dark', { viewport: PHONE, colorScheme: 'dark' }, 'rgb(15, 18, 22)'],
  ] as const)('shows a service under load, at %s', async (_, options, ground) => {
    await using opened = await open(options)
    const { page, problems } = opened
    await expect.poll(() => text(page, '#headline-text')).toBe('All well')
    expect(await text(page, '#connection-text')).toBe('live')
    await expect.poll(() => tile(page, 'Hit rate')).toMatch(/^\d[\d.]* %$/)
    await expect.poll(() => tile(page, 'Reads')).toMatch(/^[1-9][\d.,]* \/s$/)
    await expect.poll(() => tile(page, 'Read p99')).toMatch(/^\d[\d.]* (µs|ms|s)$/)
    await expect.poll(() => tile(page, 'Log lag p99')).toMatch(/^\d[\d.]* (µs|ms|s)$/)
    await expect.poll(() => tile(page, 'Memory')).toMatch(/^\d[\d.]* [KM]iB$/)
    for (const part of ['Memory', 'Redis', 'PostgreSQL', 'Catalogue', 'Log of changes']) {
      expect(await text(page, '#parts')).toContain(part)
    }
    await expect.poll(() => text(page, '#rpcs')).toMatch(/GetItem\s+[\d.]+/)
    await expect.poll(() => text(page, '#feed')).toMatch(/(shop|outlet)\s+lamp-\d+/)
    await expect.poll(() => text(page, '#memory')).toMatch(/Redis\s+\d[\d.]* [KM]iB/)
    await expect.poll(() => text(page, '#outages')).not.toBe('')
    await expect.poll(() => drawnPlots(page)).toEqual([true, true, true, true])
    const legend = page.locator('section[aria-labelledby=reads-title] .legend')
    await expect.poll(() => legend.innerText()).toMatch(/Memory\s+\d/)
    expect(await page.evaluate('getComputedStyle(document.body).backgroundColor')).toBe(ground)
    expect(await overflow(page)).toBe(0)
    expect(problems).toEqual([])
  })

  test.each([
    ['1280', WIDE],
    ['390', PHONE],
  ])('shows that Redis is down, since when, and that it is back, at %s pixels', async (_, viewport) => {
    await using opened = await open({ viewport })
    const { page, problems } = opened
    const card = page.locator('#parts > li', { hasText: 'Redis' })
    await expect.poll(() => text(page, '#headline-text')).toBe('All well')
    await redis.kill()
    await expect.poll(() => text(page, '#headline-text')).toMatch(/^Redis is down since \d\d:\d\d:\d\d$/)
    await expect.poll(() => page.title()).toMatch(/^▲ Redis is down since /)
    await expect.poll(() => text(page, '#headline-detail')).toMatch(/^For \d+ s\. Reads go on from memory/)
    // It is announced, and the seconds that pass are not.
    const announced = page.getByRole('status')
    await expect.poll(() => announced.innerText()).toMatch(/^Redis is down since \d\d:\d\d:\d\d$/)
    await expect.poll(() => card.innerText()).toMatch(/down\s+since \d\d:\d\d:\d\d/)
    await expect.poll(() => text(page, '#outages')).toMatch(/Redis\s+down\s+\d\d:\d\d:\d\d\s+lasts, \d+ s/)
    await expect.poll(() => tile(page, 'Reads')).toMatch(/^[1-9]/)
    expect(await overflow(page)).toBe(0)
    await redis.restart()
    await expect.poll(() => text(page, '#headline-text')).toBe('All well')
    // On a busy machine another part may have been late since.
    await expect
      .poll(() => text(page, '#headline-detail'))
      .toMatch(/^.+ was (down|failing) from \d\d:\d\d:\d\d to \d\d:\d\d:\d\d, for .+\.$/)
    await expect.poll(() => card.innerText()).toMatch(/ready/)
    await expect.poll(() => text(page, '#outages')).toMatch(/Redis\s+down\s+\d\d:\d\d:\d\d\s+\d+ s/)
    await expect.poll(() => page.title()).toBe('ItemCache')
    expect(problems).toEqual([])
  })

  test('shows names with HTML in them as text', async () => {
    const tenant = '<b>bold</b>'
    const id = `<img src=x onerror="document.title='owned'">`
    const { call } = callerAs(service, tenant)
    await call('createItem', { item: { id, title: id, tags: ['<i>'] } })
    await using opened = await open()
    const { page, problems } = opened
    // The load's own rows push it out of the feed in time.
    await expect
      .poll(async () => {
        await call('invalidateItems', { target: { case: 'ids', value: { ids: [id] } } })
        return text(page, '#feed')
      })
      .toContain(id)
    expect(await text(page, '#feed')).toContain(tenant)
    await page.getByLabel('Tenant').fill(tenant)
    await page.getByLabel('Item id').fill(id)
    await page.getByRole('button', { name: 'Look up' }).click()
    await expect.poll(() => text(page, '#look-up-answer')).toContain(`Item ${id} of tenant ${tenant}`)
    expect(await page.locator('main img, main b, main i').count()).toBe(0)
    expect(await page.title()).not.toBe('owned')
    expect(problems).toEqual([])
  })

  test('looks an item up, and says what InspectItem says', async () => {
    const { call } = callerAs(service, 'looked-up')
    await call('getItem', { id: '3' })
    const told = await call('inspectItem', { id: '3' })
    await using opened = await open()
    const { page, problems } = opened
    const lookUp = async (id: string) => {
      await page.getByLabel('Tenant').fill('looked-up')
      await page.getByLabel('Item id').fill(id)
      await page.getByRole('button', { name: 'Look up' }).click()
    }
    await lookUp('3')
    const answer = page.getByRole('region', { name: 'Answer of the look-up' })
    const cards = answer.locator('.parts > li')
    await expect.poll(() => cards.count()).toBe(4)
    const [memory, , postgres, origin] = await cards.allInnerTexts()
    expect(memory).toMatch(/Memory\s+holds it/)
    expect(memory).toContain(`${told.tiers[0]?.asOf}`)
    expect(memory).toMatch(/Dropped in\s+\d/)
    expect(postgres).toMatch(/PostgreSQL\s+holds it/)
    expect(origin).toMatch(/Catalogue\s+may know it; is not asked/)
    await lookUp('nobody-has-it')
    await expect.poll(() => answer.innerText()).toContain('No tier holds it.')
    await page.getByLabel('Item id').fill('x'.repeat(128))
    // Longer ones than an id can be in bytes.
    await page.getByLabel('Item id').fill('€'.repeat(128))
    await page.getByRole('button', { name: 'Look up' }).click()
    await expect.poll(() => answer.innerText()).toMatch(/The service says: id: must be 1 to 128 bytes/)
    // The browser notes that the service has refused.
    expect(problems.filter((problem) => !problem.includes('status of 400'))).toEqual([])
  })

  test('can be used with the keyboard alone', async () => {
    await using opened = await open()
    const { page, problems } = opened
    const focused = () =>
      page.evaluate(
        `(() => { const e = document.activeElement; return [e.id || e.value || e.textContent.trim().slice(0, 40), getComputedStyle(e).outlineStyle] })()`,
      ) as Promise<[string, string]>
    const order: string[] = []
    for (let i = 0; i < 12; i++) {
      await page.keyboard.press('Tab')
      const [name, outline] = await focused()
      order.push(name)
      // What has the focus shows it; the choice of a line does in its label.
      if (name !== 'p99') expect(outline, name).toBe('solid')
    }
    expect(order).toEqual(
      [
        'Skip to the look-up of an item',
        'pause',
        'As a table',
        'p99',
        'As a table',
        'As a table',
        'As a table',
        'Age\tTenant\tWhat\tRevision',
        'look-up-tenant',
        'look-up-id',
        'Look up',
        '/metrics',
      ].map((name) => (name.startsWith('Age') ? expect.stringMatching(/^Age/) : name)),
    )

    await page.reload()
    await page.locator('body[data-begun]').waitFor()
    await page.keyboard.press('Tab')
    await page.keyboard.press('Enter')
    expect((await focused())[0]).toBe('look-up-id')
    await page.keyboard.type('1')
    await page.keyboard.press('Enter')
    await expect.poll(() => text(page, '#look-up-answer')).toContain('Item 1 of tenant default')

    await page.locator('#pause').focus()
    await page.keyboard.press('Space')
    expect(await page.locator('#pause').getAttribute('aria-pressed')).toBe('true')
    expect(await text(page, '#connection-text')).toBe('paused')
    await page.keyboard.press('Space')
    await page.keyboard.press('Tab')
    await page.keyboard.press('Enter')
    const table = page.getByRole('region', { name: 'Hit rate as a table' })
    await expect.poll(() => table.innerText()).toMatch(/\d\d:\d\d:\d\d\s+[\d.]+ %/)
    await page.getByLabel('p99').focus()
    await page.keyboard.press('ArrowRight')
    expect(await page.getByLabel('p50').isChecked()).toBe(true)
    expect(problems).toEqual([])
  })

  test('keeps still while it is paused, but for the state', async () => {
    await using opened = await open()
    const { page, problems } = opened
    await expect.poll(() => text(page, '#feed')).toContain('lamp')
    await page.getByRole('button', { name: 'Pause' }).click()
    const feed = await text(page, '#feed')
    await redis.kill()
    await expect.poll(() => text(page, '#headline-text')).toMatch(/^Redis is down/)
    expect(await text(page, '#feed')).toBe(feed)
    await redis.restart()
    await expect.poll(() => text(page, '#headline-text')).toBe('All well')
    await page.getByRole('button', { name: 'Pause' }).click()
    await expect.poll(() => text(page, '#feed')).not.toBe(feed)
    expect(problems).toEqual([])
  })
})

test('says since when it has no data, and goes on by itself with the next instance', async () => {
  await using way = await startWay()
  way.to = service.app.admin?.port
  await using opened = await open({}, way.url)
  const { page } = opened
  await expect.poll(() => text(page, '#connection-text')).toBe('live')
  const samples = () => page.locator('section[aria-labelledby=reads-title] tbody tr').count()
  await page.locator('section[aria-labelledby=reads-title] summary').click()
  await expect.poll(samples).toBeGreaterThan(0)
  way.to = undefined
  await expect.poll(() => text(page, '#connection-text')).toMatch(/^no data since \d\d:\d\d:\d\d$/)
  expect(await page.getByRole('status').innerText()).toMatch(/^No data since \d\d:\d\d:\d\d$/)
  // What it showed is still there.
  expect(await samples()).toBeGreaterThan(0)
  await using next = await startService({ env: { REDIS_URL: 'off' } })
  way.to = next.app.admin?.port
  await expect.poll(() => text(page, '#connection-text')).toBe('live')
  await expect.poll(() => text(page, '#headline-detail')).toContain('Switched off: Redis')
})

/** An address that stays while what is behind it goes and another one comes. */
async function startWay() {
  const sockets = new Set<Socket>()
  let target: number | undefined
  const server = createServer((near) => {
    sockets.add(near)
    near.on('error', () => {}).on('close', () => sockets.delete(near))
    if (target === undefined) return near.destroy()
    const far = connect(target, '127.0.0.1')
    far.on('error', () => {}).on('close', () => near.destroy())
    near.on('close', () => far.destroy())
    near.pipe(far).pipe(near)
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}/`,
    set to(port: number | undefined) {
      target = port
      for (const socket of sockets) socket.destroy()
    },
    async [Symbol.asyncDispose]() {
      const closed = once(server, 'close')
      server.close()
      for (const socket of sockets) socket.destroy()
      await closed
    },
  }
}
