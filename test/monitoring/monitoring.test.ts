/**
 * The rules and the dashboard in deploy/, by a real Prometheus that scrapes a real service under load. The rules are
 * hurried: what they do within minutes they do within seconds. `npm run monitoring` waits the minutes.
 */
import { execFile } from 'node:child_process'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'
import { credentials } from '@grpc/grpc-js'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { newAuthority, temporaryFiles } from '../support/credentials.ts'
import { findPrometheus, type Prometheus, startPrometheus } from '../support/prometheus.ts'
import { freshRedis, type OwnServer } from '../support/servers.ts'
import { startService, TestClient } from '../support/service.ts'
import { dashboardQueries, hurried, measured, RULES, RULES_FILE, untilAnswered } from './queries.ts'
import { callUntil } from './traffic.ts'

/** Alerts that a machine which stands still for seconds sets off, and rightly. */
const OF_A_STALLED_MACHINE = [
  'ItemCacheLatencyHigh',
  'ItemCacheEventLoopBlocked',
  'ItemCacheHitRateLow',
  'ItemCacheLogLag',
  'ItemCacheLogSilent',
  'ItemCachePostgresDown',
  'ItemCacheInstanceDown',
  'ItemCacheServiceDown',
]

const run = promisify(execFile)
/** The first test fetches Prometheus where there is none: some seconds, on a slow line more. */
const FETCHING_MS = 180_000
/** What takes seconds may take much longer on a machine with other work. */
const PATIENTLY = { timeout: 60_000 }
const SLOW_TEST = { timeout: 150_000 }

describe('the rules', () => {
  test('are in order, and fire when they should, as promtool finds', { timeout: FETCHING_MS }, async () => {
    const { promtool } = await findPrometheus()
    // Checks the rules that it names, too.
    await run(promtool, ['check', 'config', join(RULES_FILE, '../prometheus.yaml')])
    const { stdout } = await run(promtool, ['test', 'rules', join(RULES_FILE, '../alerts.test.yaml')]).catch(
      (error: { stdout: string; stderr: string }) => {
        throw new Error(error.stdout + error.stderr)
      },
    )
    expect(stdout).toContain('SUCCESS')
  })
})

describe('a service under load that Prometheus scrapes', () => {
  const started = new AsyncDisposableStack()
  const stop = new AbortController()
  let prometheus: Prometheus
  let redis: OwnServer

  beforeAll(async () => {
    const files = started.use(temporaryFiles())
    const authority = await newAuthority('one')
    const { cert, key } = await authority.issue('server')
    redis = started.use(await freshRedis())
    const service = started.use(
      await startService({
        env: {
          REDIS_URL: redis.url,
          ITEMCACHE_TLS_CERT: files.write('cert.pem', cert),
          ITEMCACHE_TLS_KEY: files.write('key.pem', key),
        },
      }),
    )
    const client = started.use(
      new TestClient(
        service.address.replace('127.0.0.1', 'localhost'),
        credentials.createSsl(Buffer.from(authority.cert)),
      ),
    )
    prometheus = started.use(
      await startPrometheus({
        targets: [`127.0.0.1:${service.app.admin?.port}`],
        rules: hurried(RULES),
        interval: '1s',
      }),
    )
    const traffic = callUntil(client, stop.signal)
    started.defer(async () => {
      stop.abort()
      await traffic
    })
  })
  afterAll(() => started.disposeAsync())

  test('answers every query of the dashboard', SLOW_TEST, async () => {
    const queries = dashboardQueries('1m')
    expect(queries.length).toBeGreaterThan(60)
    await expect.poll(untilAnswered(prometheus, queries), PATIENTLY).toEqual([])
  })

  test('has a figure for everything that is alerted on and recorded', SLOW_TEST, async () => {
    const rules = await prometheus.rules()
    expect(rules.length).toBeGreaterThan(30)
    const queries = rules.map(({ name, type, query }) => ({
      title: name,
      query: type === 'alerting' ? measured(query) : query,
    }))
    await expect.poll(untilAnswered(prometheus, queries), PATIENTLY).toEqual([])
    expect((await prometheus.rules()).filter(({ health }) => health !== 'ok')).toEqual([])
  })

  test('has alerts that say how urgent they are, and where to read on', async () => {
    const alerts = (await prometheus.rules()).filter(({ type }) => type === 'alerting')
    expect(new Set(alerts.map(({ name }) => name)).size).toBe(alerts.length)
    for (const { name, labels, annotations } of alerts) {
      expect(['page', 'ticket'], name).toContain(labels?.['severity'])
      const words = name.replace(/([a-z])([A-Z])/g, '$1-$2').toLowerCase()
      expect(annotations?.['runbook_url']).toBe(`docs/runbook.md#${words}`)
      expect(annotations?.['summary'], name).toMatch(/\.$/)
    }
  })

  test('that loses Redis says so once, and nothing else', SLOW_TEST, async () => {
    await redis.kill()
    await expect.poll(() => prometheus.firing(), PATIENTLY).toContain('ItemCacheRedisDown')
    // Longer than any rule that it might set off looks back and waits: five seconds each.
    await sleep(11_000)
    const [alert] = (await prometheus.rules()).find(({ name }) => name === 'ItemCacheRedisDown')?.alerts ?? []
    expect(alert?.labels).toMatchObject({ job: 'itemcache', tier: 'redis', severity: 'ticket' })
    expect(alert?.annotations['summary']).toMatch(/^Redis does not answer/)
    const fired = await prometheus.query('max_over_time(ALERTS{alertstate="firing"}[10m])')
    const names = new Set(fired.map(({ metric }) => metric['alertname'] ?? ''))
    expect([...names].filter((name) => !OF_A_STALLED_MACHINE.includes(name))).toEqual(['ItemCacheRedisDown'])
  })

  test('is well again when Redis is back', SLOW_TEST, async () => {
    await redis.restart()
    await expect
      .poll(
        async () => (await prometheus.firing()).filter((name) => !OF_A_STALLED_MACHINE.includes(name)),
        PATIENTLY,
      )
      .toEqual([])
  })
})
