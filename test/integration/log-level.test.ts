/** What is logged, changed while a real process runs. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { type ServiceProcess, startProcess } from '../support/process.ts'
import { type FreshDatabase, freshDatabase, redisUrl } from '../support/servers.ts'

const lines: string[] = []
let database: FreshDatabase
let service: ServiceProcess

beforeAll(async () => {
  database = await freshDatabase()
  service = await startProcess(
    {
      DATABASE_URL: database.url,
      REDIS_URL: redisUrl(),
      ITEMCACHE_ADMIN_LISTEN: '127.0.0.1:0',
      ITEMCACHE_LOG_LEVEL: 'warn',
    },
    { log: lines },
  )
})
afterAll(async () => {
  await service?.[Symbol.asyncDispose]()
  await database?.[Symbol.asyncDispose]()
})

const url = () => `http://${service.admin}/log-level`
const levelNow = async () => (await fetch(url())).text()
const put = (body: string) => fetch(url(), { method: 'PUT', body })

/** Whether a call has a line. */
async function isLogged(): Promise<boolean> {
  const traceId = crypto.randomUUID().replaceAll('-', '')
  const metadata = { traceparent: `00-${traceId}-00f067aa0ba902b7-01` }
  await service.client.call('getMetrics', {}, { metadata })
  // Lines are in order: once a later one is here, an earlier one is.
  const refused = await put('loud')
  expect(refused.status).toBe(400)
  await service.client.call('getMetrics', {})
  return lines.some((line) => line.includes(traceId))
}

describe('the log level', () => {
  test('is what the admin address has been told by PUT', async () => {
    expect(await levelNow()).toBe('warn\n')
    expect(await isLogged()).toBe(false)

    const changed = await put('debug\n')
    expect([changed.status, await changed.text()]).toEqual([200, 'debug\n'])
    await expect.poll(isLogged).toBe(true)
    expect(await levelNow()).toBe('debug\n')

    expect((await put('warn')).status).toBe(200)
    expect(await isLogged()).toBe(false)
  })

  test('stays as it is for a level that does not exist, and for any other method', async () => {
    for (const body of ['', 'loud', 'INFO', `info${' '.repeat(1_000_000)}x`]) {
      expect((await put(body).catch(() => ({ status: 400 }))).status, body.slice(0, 8)).toBe(400)
    }
    const posted = await fetch(url(), { method: 'POST', body: 'debug' })
    expect([posted.status, posted.headers.get('allow')]).toEqual([405, 'GET, HEAD, PUT'])
    const fromPage = { method: 'PUT', body: 'silent', headers: { origin: 'http://localhost' } }
    expect((await fetch(url(), fromPage)).status).toBe(403)
    expect(await levelNow()).toBe('warn\n')
  })

  test('goes to debug with SIGUSR2, and back with the next', async () => {
    service.signal('SIGUSR2')
    await expect.poll(levelNow).toBe('debug\n')
    service.signal('SIGUSR2')
    await expect.poll(levelNow).toBe('warn\n')
    expect(service.running).toBe(true)
  })
})
