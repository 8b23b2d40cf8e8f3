/** What the live page's server gives, and to whom. What a browser makes of it is in test/browser. */
import { once } from 'node:events'
import { request as httpRequest, type IncomingHttpHeaders } from 'node:http'
import { connect, type Socket } from 'node:net'
import { networkInterfaces } from 'node:os'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import type { LivePageAccess } from '../../src/config.ts'
import { type Admin, startAdmin } from '../../src/observe/admin.ts'
import { Feed } from '../../src/observe/feed.ts'
import { COLUMNS, History } from '../../src/observe/history.ts'
import type { History as HistoryMessage, Second } from '../../src/observe/live-message.ts'
import { LivePage, MAX_LISTENERS, MAX_UNREAD_BYTES } from '../../src/observe/live-page.ts'
import { Metrics } from '../../src/observe/metrics.ts'
import { newCaller } from '../support/caller.ts'
import { startService, type TestService } from '../support/service.ts'

const MEMORY = {
  memory: { on: true, entries: 0, maxEntries: 1, bytes: 0, maxBytes: 1, evictions: 0 },
  process: { residentBytes: 0, heapBytes: 0 },
  unsentBytes: 0,
  ringBytes: 0,
}

/** A page of a service that does nothing. `asked` counts how often its state was computed. */
async function startPage(options: {
  access?: LivePageAccess
  host?: string
  padding?: string
  inspect?: () => Promise<unknown>
}) {
  await using started = new AsyncDisposableStack()
  const asked = { count: 0 }
  const metrics = new Metrics({ methods: [] })
  const errors: unknown[] = []
  const page = started.use(
    new LivePage({
      version: '1.2.3',
      access: options.access ?? { to: 'this-machine', names: [] },
      history: new History({ metrics, parts: () => [], now: Date.now }),
      feed: new Feed(Date.now),
      now: () => {
        asked.count++
        const parts =
          options.padding === undefined ? [] : [{ name: options.padding as 'redis', state: 'ready' as const }]
        return {
          timeMs: 0,
          startMs: 0,
          ready: true,
          draining: false,
          parts,
          violations: 0,
          openCalls: 0,
          subscribers: 0,
          memory: MEMORY,
        }
      },
      inspect: options.inspect ?? (async () => ({})),
      onError: (error) => errors.push(error),
      // Only the test itself lets a second pass.
      tickMs: 2 ** 30,
    }),
  )
  const admin = started.use(
    await startAdmin({
      host: options.host ?? '127.0.0.1',
      port: 0,
      metrics: { contentType: 'text/plain', text: async () => '' },
      ready: async () => ({ ready: true, detail: {} }),
      page,
    }),
  )
  const running = started.move()
  return { page, admin, asked, errors, [Symbol.asyncDispose]: () => running.disposeAsync() }
}

interface Answer {
  readonly status: number
  readonly headers: IncomingHttpHeaders
  readonly body: string
}

/** As fetch, but for the headers that fetch does not let through. */
async function get(
  { address }: Admin,
  path: string,
  headers: Readonly<Record<string, string>> = {},
  { method = 'GET', host = address.host }: { method?: string; host?: string } = {},
): Promise<Answer> {
  const request = httpRequest({ host, port: address.port, path, headers, method, agent: false }).end()
  const [response] = await once(request, 'response')
  let body = ''
  response.setEncoding('utf8')
  for await (const chunk of response) body += chunk
  return { status: response.statusCode, headers: response.headers, body }
}

/** The events of a stream, as they come. */
async function* events(url: string, signal: AbortSignal): AsyncGenerator<{ name: string; data: unknown }> {
  const response = await fetch(url, { signal })
  expect(response.headers.get('content-type')).toBe('text/event-stream')
  let text = ''
  for await (const chunk of response.body ?? []) {
    text += Buffer.from(chunk).toString()
    for (let end = text.indexOf('\n\n'); end >= 0; end = text.indexOf('\n\n')) {
      const [, name = '', data = ''] = /event: (\w+)\ndata: (.*)$/.exec(text.slice(0, end)) ?? []
      text = text.slice(end + 2)
      yield { name, data: JSON.parse(data) }
    }
  }
}

/** A listener who never reads. */
async function deafListener({ address }: Admin): Promise<Socket> {
  const socket = connect(address.port, address.host)
  socket.on('error', () => {})
  socket.pause()
  socket.write(`GET /events HTTP/1.1\r\nhost: localhost\r\n\r\n`)
  await once(socket, 'connect')
  return socket
}

describe('the files of the live page', () => {
  test('are all that its first file asks for, and may be used without asking again', async () => {
    await using started = await startPage({})
    const { admin } = started
    const index = await get(admin, '/')
    expect(index.status).toBe(200)
    expect(index.headers['content-type']).toBe('text/html; charset=utf-8')
    const asked = [...index.body.matchAll(/(?:href|src)="(page\/[^"]+)"/g)].map(([, path]) => `/${path}`)
    expect(asked.length).toBeGreaterThan(4)
    const imported = new Set(asked)
    for (const path of imported) {
      const file = await get(admin, path)
      expect(file.status, path).toBe(200)
      for (const [, name] of file.body.matchAll(/from '\.\/([\w-]+\.js)'/g)) imported.add(`/page/${name}`)
      expect(file.headers['x-content-type-options']).toBe('nosniff')
      expect(file.headers['cache-control']).toBe('no-cache')
      const again = await get(admin, path, { 'if-none-match': file.headers.etag ?? '' })
      expect(again).toMatchObject({ status: 304, body: '' })
      expect(again.headers.etag).toBe(file.headers.etag)
      const head = await get(admin, path, {}, { method: 'HEAD' })
      expect(head).toMatchObject({ status: 200, body: '' })
      expect(head.headers['content-length']).toBe(file.headers['content-length'])
    }
    expect(imported).toContain('/page/uplot.js')
    expect(imported).toContain('/page/elements.js')
  })

  test('are a fixed list, read and never written', async () => {
    await using started = await startPage({})
    for (const path of [
      '/page/',
      '/page/tsconfig.json',
      '/page/../admin.ts',
      '/page/%2e%2e/admin.ts',
      '/constructor',
    ]) {
      expect((await get(started.admin, path)).status, path).toBe(404)
    }
    for (const path of ['/', '/events', '/inspect', '/page/page.js']) {
      expect((await get(started.admin, path, {}, { method: 'POST' })).status, path).toBe(405)
    }
  })

  test('forbid everything that is not theirs', async () => {
    await using started = await startPage({})
    for (const path of ['/', '/page/page.js', '/inspect?tenant=t&id=1']) {
      const { headers } = await get(started.admin, path)
      const policy = `${headers['content-security-policy']}`
      expect(policy).toContain("default-src 'none'")
      expect(policy).toContain("frame-ancestors 'none'")
      expect(policy).not.toMatch(/unsafe|\*|https?:|data:/)
      expect(headers['x-frame-options']).toBe('DENY')
      expect(headers['referrer-policy']).toBe('no-referrer')
      expect(headers['access-control-allow-origin']).toBeUndefined()
    }
  })
})

describe('the live page is', () => {
  const PATHS = ['/', '/page/page.js', '/events', '/inspect?tenant=t&id=1']

  test('given under addresses and localhost, not under a name that anybody could point here', async () => {
    await using started = await startPage({})
    const { admin } = started
    const port = admin.address.port
    for (const path of PATHS) {
      for (const host of [
        'evil.example',
        `evil.example:${port}`,
        'localhost.evil.example',
        '127.0.0.1.evil.example',
      ]) {
        expect((await get(admin, path, { host })).status, `${path} as ${host}`).toBe(403)
      }
    }
    for (const host of ['localhost', `LOCALHOST:${port}`, `127.0.0.1:${port}`, `[::1]:${port}`, '10.1.2.3']) {
      expect((await get(admin, '/', { host })).status, host).toBe(200)
    }
    // Prometheus and probes come by any name.
    for (const path of ['/metrics', '/healthz', '/readyz']) {
      expect((await get(admin, path, { host: 'itemcache' })).status).toBe(200)
    }
  })

  test('given under the names that the operator says', async () => {
    await using started = await startPage({ access: { to: 'anybody', names: ['cache.example.com'] } })
    expect((await get(started.admin, '/', { host: 'Cache.example.com:8080' })).status).toBe(200)
    expect((await get(started.admin, '/', { host: 'other.example.com' })).status).toBe(403)
  })

  test('not read by the pages of other sites, which may link to it', async () => {
    await using started = await startPage({})
    for (const site of ['cross-site', 'same-site']) {
      for (const path of PATHS.slice(1)) {
        expect((await get(started.admin, path, { 'sec-fetch-site': site })).status, path).toBe(403)
      }
      expect((await get(started.admin, '/', { 'sec-fetch-site': site })).status).toBe(200)
    }
    expect((await get(started.admin, '/inspect', { 'sec-fetch-site': 'same-origin' })).status).toBe(200)
  })

  test('for callers on this machine, unless the operator says otherwise; metrics are for all', async ({
    skip,
  }) => {
    const outer = Object.values(networkInterfaces())
      .flat()
      .find((each) => each?.family === 'IPv4' && !each.internal)?.address
    if (outer === undefined) return skip('this machine has no address but loopback')
    await using local = await startPage({ host: '0.0.0.0' })
    expect((await get(local.admin, '/', {}, { host: outer })).status).toBe(403)
    expect((await get(local.admin, '/events', {}, { host: outer })).status).toBe(403)
    expect((await get(local.admin, '/metrics', {}, { host: outer })).status).toBe(200)
    expect((await get(local.admin, '/', {}, { host: '127.0.0.1' })).status).toBe(200)
    await using open = await startPage({ host: '0.0.0.0', access: { to: 'anybody', names: [] } })
    expect((await get(open.admin, '/', {}, { host: outer })).status).toBe(200)
  })

  test('not there when it is off', async () => {
    await using service = await startService({ env: { ITEMCACHE_LIVE_PAGE: 'off', REDIS_URL: 'off' } })
    const admin = `http://127.0.0.1:${service.app.admin?.port}`
    for (const path of PATHS) expect((await fetch(`${admin}${path}`)).status).toBe(404)
    expect((await fetch(`${admin}/healthz`)).status).toBe(200)
  })
})

describe('listeners', () => {
  test('get the history first, and then each second once, computed once for all of them', async () => {
    await using started = await startPage({})
    const { admin, page, asked } = started
    page.tick()
    page.tick()
    // Nobody listens: samples are taken, and nothing else is computed.
    expect(asked.count).toBe(0)
    const url = `http://127.0.0.1:${admin.address.port}/events`
    const leaving = new AbortController()
    const streams = [events(url, leaving.signal), events(url, leaving.signal)]
    for (const stream of streams) {
      const { value } = await stream.next()
      expect(value?.name).toBe('history')
      const history = value?.data as HistoryMessage
      expect(history.version).toBe('1.2.3')
      expect(history.samples).toHaveLength(2)
      expect(history.samples[0]).toHaveLength(history.columns.length)
    }
    const before = asked.count
    page.tick()
    expect(asked.count).toBe(before + 1)
    const [first, second] = await Promise.all(streams.map((stream) => stream.next()))
    expect(first?.value?.name).toBe('second')
    expect(second?.value).toEqual(first?.value)
    leaving.abort()
    await expect.poll(() => page.listeners).toBe(0)
  })

  test('are told at once, without a sample, that a part has changed its state', async () => {
    await using started = await startPage({})
    const { admin, page, asked } = started
    const leaving = new AbortController()
    const stream = events(`http://127.0.0.1:${admin.address.port}/events`, leaving.signal)
    await stream.next()
    const before = asked.count
    for (let i = 0; i < 100; i++) page.changed()
    const { value } = await stream.next()
    expect(value?.data).toMatchObject({ sample: null })
    // A hundred changes are one message.
    expect(asked.count).toBe(before + 1)
    leaving.abort()
  })

  test('are bounded: one more is told so, and there is room again when one leaves', async () => {
    await using started = await startPage({})
    const { admin, page } = started
    const sockets: Socket[] = []
    for (let i = 0; i < MAX_LISTENERS; i++) sockets.push(await deafListener(admin))
    await expect.poll(() => page.listeners).toBe(MAX_LISTENERS)
    const refused = await get(admin, '/events')
    expect(refused).toMatchObject({ status: 503, body: '16 pages are open already\n' })
    sockets[0]?.destroy()
    await expect.poll(() => page.listeners).toBe(MAX_LISTENERS - 1)
    expect((await get(admin, '/events', {}, { method: 'HEAD' })).status).toBe(200)
    for (const socket of sockets) socket.destroy()
  })

  test('who do not read are disconnected before much waits for them', async () => {
    await using started = await startPage({ padding: 'x'.repeat(MAX_UNREAD_BYTES / 4) })
    const { admin, page } = started
    const socket = await deafListener(admin)
    await expect.poll(() => page.listeners).toBe(1)
    // The system's buffers take some of it.
    for (let ticks = 0; page.listeners > 0 && ticks < 1000; ticks++) {
      page.tick()
      await new Promise((turn) => setImmediate(turn))
    }
    expect(page.listeners).toBe(0)
    socket.destroy()
  })

  test('leave no connection behind when the service stops', async () => {
    const started = await startPage({})
    const leaving = new AbortController()
    const stream = events(`http://127.0.0.1:${started.admin.address.port}/events`, leaving.signal)
    await stream.next()
    const ended = stream.next().then(
      ({ done }) => done === true,
      () => true,
    )
    await started[Symbol.asyncDispose]()
    expect(await ended).toBe(true)
  })
})

test('a look-up that fails tells the operator why, and no caller', async () => {
  await using started = await startPage({ inspect: () => Promise.reject(new Error('hunter2')) })
  const failed = await get(started.admin, '/inspect?tenant=t&id=1')
  expect(failed.status).toBe(500)
  expect(failed.body).not.toContain('hunter2')
  expect(started.errors).toEqual([new Error('hunter2')])
})

test('four look-ups at once are answered, and one more is told to come again', async () => {
  const gate = Promise.withResolvers<unknown>()
  let asking = 0
  await using started = await startPage({
    inspect: () => {
      asking++
      return gate.promise
    },
  })
  const asked = Array.from({ length: 4 }, () => get(started.admin, '/inspect?tenant=t&id=1'))
  await expect.poll(() => asking).toBe(4)
  expect((await get(started.admin, '/inspect?tenant=t&id=2')).status).toBe(429)
  gate.resolve({})
  for (const { status } of await Promise.all(asked)) expect(status).toBe(200)
  expect((await get(started.admin, '/inspect?tenant=t&id=2')).status).toBe(200)
})

describe('of a running service', () => {
  let service: TestService
  const admin = () => `http://127.0.0.1:${service.app.admin?.port}`

  beforeAll(async () => {
    service = await startService()
  })
  afterAll(() => service?.[Symbol.asyncDispose]())

  test('the events tell reads, calls, memory, the state of each part, and what was invalidated', async () => {
    const { tenant, call } = newCaller(service)
    const leaving = new AbortController()
    const stream = events(`${admin()}/events`, leaving.signal)
    const first = await stream.next()
    expect(first.value?.data).toMatchObject({ columns: COLUMNS })
    // Its log is followed from now on.
    await call('getItem', { id: '1' })
    await call('invalidateItems', { target: { case: 'ids', value: { ids: ['1'] } } })
    const seen = { memory: 0, invalidated: 0 }
    let last: Second | undefined
    for await (const { name, data } of stream) {
      expect(name).toBe('second')
      last = data as Second
      seen.memory += last.sample?.[COLUMNS.indexOf('reads.memory')] ?? 0
      seen.invalidated += last.invalidations.filter(
        (row) => row.tenant === tenant && row.ids[0] === '1' && row.reason === 'KEYS_INVALIDATED',
      ).length
      const { parts, memory } = last.now
      // On a busy machine a part may be late for a moment.
      const well = parts.every(({ state, breaker = 'CLOSED' }) => state !== 'down' && breaker === 'CLOSED')
      if (seen.memory > 0 && seen.invalidated > 0 && memory.redis !== undefined && well) break
      await call('getItem', { id: '1' })
    }
    expect(seen.invalidated).toBe(1)
    expect(last?.now.ready).toBe(true)
    expect(last?.now.parts).toEqual([
      { name: 'memory', state: 'ready' },
      { name: 'redis', state: 'ready', breaker: 'CLOSED' },
      { name: 'postgres', state: 'ready', breaker: 'CLOSED' },
      { name: 'origin', state: 'on', breaker: 'CLOSED' },
      { name: 'log', state: 'ready' },
    ])
    expect(last?.now.memory.memory.entries).toBeGreaterThan(0)
    expect(last?.now.memory.redis?.usedBytes).toBeGreaterThan(100_000)
    expect(last?.now.rpcs.find(({ method }) => method === 'GetItem')?.perSecond).toBeGreaterThan(0)
    leaving.abort()
  })

  test('a look-up tells what InspectItem tells, and nothing of what the item is', async () => {
    const { tenant, call } = newCaller(service)
    await call('getItem', { id: '2' })
    const told = await call('inspectItem', { id: '2' })
    const response = await fetch(`${admin()}/inspect?tenant=${tenant}&id=2`)
    expect(response.status).toBe(200)
    const found = (await response.json()) as { tiers: Record<string, unknown>[] }
    expect(found.tiers.map(({ asOf }) => asOf)).toEqual(told.tiers.map(({ asOf }) => `${asOf}`))
    expect(found.tiers.map(({ present }) => present)).toEqual([true, true, true, false])
    expect(Object.keys(found.tiers[0] ?? {}).sort()).toEqual([
      'age',
      'asOf',
      'breaker',
      'current',
      'negative',
      'present',
      'remainingTtl',
      'servedByOrigin',
      'sizeBytes',
      'skipped',
      'tier',
    ])
    expect(JSON.stringify(found)).not.toContain('rass')
  })

  test('a look-up of what cannot be an id is refused with the rule', async () => {
    for (const query of [
      '',
      'tenant=t',
      'tenant=t&id=%00',
      `tenant=t&id=${'x'.repeat(129)}`,
      'tenant=&id=1',
    ]) {
      const response = await fetch(`${admin()}/inspect?${query}`)
      expect(response.status, query).toBe(400)
      expect(await response.text()).toMatch(/must be 1 to 128 bytes without control characters/)
    }
  })
})
