import { once } from 'node:events'
import { connect } from 'node:net'
import { describe, expect, test } from 'vitest'
import { type Admin, type AdminOptions, startAdmin } from '../../src/observe/admin.ts'
import { Metrics } from '../../src/observe/metrics.ts'
import { prometheusText } from '../../src/observe/prometheus.ts'

function start(options: Partial<AdminOptions> = {}): Promise<Admin> {
  return startAdmin({
    host: '127.0.0.1',
    port: 0,
    metrics: { contentType: 'text/plain', text: async () => 'a 1\n' },
    ready: async () => ({ ready: true, detail: { tiers: { memory: 'up' } } }),
    ...options,
  })
}

const urlOf = ({ address }: Admin, path: string) => `http://${address.host}:${address.port}${path}`

/** Sends raw bytes and returns everything that comes back until the server ends the connection. */
async function exchange({ address }: Admin, bytes: string): Promise<string> {
  const socket = connect(address.port, address.host)
  let received = ''
  socket.setEncoding('utf8').on('data', (chunk) => {
    received += chunk
  })
  socket.on('error', () => {})
  socket.write(bytes)
  await once(socket, 'close')
  return received
}

describe('the admin server', () => {
  test('says on /healthz that the process lives, whatever its tiers do', async () => {
    await using admin = await start({ ready: async () => ({ ready: false, detail: {} }) })
    const response = await fetch(urlOf(admin, '/healthz'))
    expect(response.status).toBe(200)
    expect(await response.text()).toBe('ok\n')
  })

  test('answers /readyz with 200 or 503, and the state of every tier', async () => {
    const tiers = { memory: 'up', redis: 'off', postgres: 'up', origin: 'up' }
    let ready = true
    await using admin = await start({ ready: async () => ({ ready, detail: { tiers } }) })

    const good = await fetch(urlOf(admin, '/readyz'))
    expect(good.status).toBe(200)
    expect(good.headers.get('content-type')).toBe('application/json; charset=utf-8')
    expect(await good.json()).toEqual({ ready: true, tiers })

    ready = false
    const bad = await fetch(urlOf(admin, '/readyz'))
    expect(bad.status).toBe(503)
    expect(await bad.json()).toEqual({ ready: false, tiers })
  })

  test('is not ready when the check fails or hangs, and tells no caller why', async () => {
    const errors: unknown[] = []
    await using failing = await start({
      ready: async () => {
        throw new Error('password hunter2')
      },
      onError: (error) => errors.push(error),
    })
    const failed = await fetch(urlOf(failing, '/readyz'))
    expect(failed.status).toBe(503)
    expect(await failed.text()).not.toContain('hunter2')
    expect(errors).toEqual([new Error('password hunter2')])

    await using hanging = await start({ ready: () => new Promise(() => {}), readyTimeoutMs: 1 })
    expect((await fetch(urlOf(hanging, '/readyz'))).status).toBe(503)
  })

  test('serves the service’s metrics as Prometheus text', async () => {
    const metrics = new Metrics({ methods: [] })
    metrics.countRead('memory', 'HIT')
    await using admin = await start({ metrics: prometheusText(metrics, '1.2.3') })
    const response = await fetch(urlOf(admin, '/metrics?x=1'))
    expect(response.status).toBe(200)
    expect(response.headers.get('content-type')).toBe('text/plain; version=0.0.4; charset=utf-8')
    expect(await response.text()).toContain('itemcache_reads_total{outcome="hit",tier="memory"} 1\n')
  })

  test('answers 500 and goes on when metrics fail', async () => {
    const errors: unknown[] = []
    const text = () => Promise.reject(new Error('hunter2'))
    await using admin = await start({
      metrics: { contentType: 'text/plain', text },
      onError: (error) => errors.push(error),
    })
    const response = await fetch(urlOf(admin, '/metrics'))
    expect(response.status).toBe(500)
    expect(await response.text()).toBe('internal error\n')
    expect(errors).toHaveLength(1)
    expect((await fetch(urlOf(admin, '/healthz'))).status).toBe(200)
  })

  test('answers HEAD like GET without the body', async () => {
    await using admin = await start()
    for (const path of ['/healthz', '/readyz', '/metrics', '/nothing']) {
      const get = await fetch(urlOf(admin, path))
      const head = await fetch(urlOf(admin, path), { method: 'HEAD' })
      expect(head.status).toBe(get.status)
      expect(head.headers.get('content-length')).toBe(get.headers.get('content-length'))
      expect(await head.text()).toBe('')
    }
  })

  test('knows no other paths and no other methods', async () => {
    await using admin = await start()
    for (const path of ['/', '/healthz/', '/metricsx', '/../metrics/..', '/%6detrics']) {
      expect((await fetch(urlOf(admin, path))).status, path).toBe(404)
    }
    const posted = await fetch(urlOf(admin, '/metrics'), { method: 'POST', body: 'x'.repeat(1_000_000) })
    expect(posted.status).toBe(405)
    expect(posted.headers.get('allow')).toBe('GET, HEAD')
    const deleted = await fetch(urlOf(admin, '/healthz'), { method: 'DELETE' })
    expect(deleted.status).toBe(405)
  })

  test('refuses headers over 8 KiB and what is not HTTP', async () => {
    await using admin = await start()
    expect(
      await exchange(admin, `GET /healthz HTTP/1.1\r\nhost: x\r\na: ${'a'.repeat(9_000)}\r\n\r\n`),
    ).toMatch(/^HTTP\/1\.1 431 /)
    expect(await exchange(admin, 'nonsense\r\n\r\n')).toMatch(/^HTTP\/1\.1 400 /)
  })

  test('tells the bound address, also on IPv6', async () => {
    await using admin = await start({ host: '::1' })
    expect(admin.address).toEqual({ host: '::1', port: expect.any(Number) })
    expect((await fetch(`http://[::1]:${admin.address.port}/healthz`)).status).toBe(200)
  })

  test('says which address cannot be bound', async () => {
    await using first = await start()
    const { port } = first.address
    await expect(start({ port })).rejects.toThrow(
      `the admin server cannot listen on 127.0.0.1:${port}: EADDRINUSE`,
    )
  })

  test('ends all connections when disposed, idle and waiting ones too', async () => {
    const asked = Promise.withResolvers<void>()
    const admin = await start({
      ready: () => {
        asked.resolve()
        return new Promise(() => {})
      },
      readyTimeoutMs: 60_000,
    })
    const idle = connect(admin.address.port, admin.address.host)
    await once(idle, 'connect')
    const waiting = fetch(urlOf(admin, '/readyz')).then(
      () => 'answered',
      () => 'ended',
    )
    await asked.promise
    const idleEnded = once(idle, 'close')
    await admin[Symbol.asyncDispose]()
    expect(await waiting).toBe('ended')
    await idleEnded
    await expect(fetch(urlOf(admin, '/healthz'))).rejects.toThrow()
  })
})
