/**
 * `npm run monitoring -- --minutes 10`: the rules as they are, over the times that they name. Prometheus scrapes a service
 * under load for so many minutes; then every query of the dashboard and every alert's measure must have a result, and no
 * alert have fired. Then Redis is killed: ItemCacheRedisDown must fire, and nothing else for longer than any rule that a
 * Redis could set off waits. Exit code 1 when something else happens.
 */
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { credentials } from '@grpc/grpc-js'
import { newAuthority, temporaryFiles } from '../support/credentials.ts'
import { ownRedis } from '../support/own-server.ts'
import { startProcess } from '../support/process.ts'
import { startPrometheus } from '../support/prometheus.ts'
import { TestClient } from '../support/service.ts'
import { dashboardQueries, measured, RULES, unanswered } from './queries.ts'
import { callUntil } from './traffic.ts'

const SCRAPE_SECONDS = 15
/** The rules on reads, refreshes and dependencies look back ten minutes at most and wait five. */
const AFTERMATH_MINUTES = 16
const CACHE = join(import.meta.dirname, '../../.itemcache/cache')

const { values } = parseArgs({ options: { minutes: { type: 'string', default: '10' } } })
const minutes = Number(values.minutes)
if (!(minutes > 0)) throw new Error('--minutes must be a positive number')

await using started = new AsyncDisposableStack()
const say = (line: string) => console.log(`${new Date().toISOString().slice(11, 19)} ${line}`)
let failed = false
const expectNothing = (what: string, found: readonly string[]) => {
  if (found.length === 0) return say(`ok: ${what}`)
  failed = true
  say(`FAILED: ${what}:\n  ${found.join('\n  ')}`)
}

const files = started.use(temporaryFiles())
const authority = await newAuthority('one')
const { cert, key } = await authority.issue('server')
const redis = started.use(await ownRedis(CACHE))
const service = started.use(
  await startProcess({
    REDIS_URL: redis.url,
    ITEMCACHE_ADMIN_LISTEN: '127.0.0.1:0',
    ITEMCACHE_TLS_CERT: files.write('cert.pem', cert),
    ITEMCACHE_TLS_KEY: files.write('key.pem', key),
  }),
)
const client = started.use(
  new TestClient(
    service.address.replace('127.0.0.1', 'localhost'),
    credentials.createSsl(Buffer.from(authority.cert)),
  ),
)
const prometheus = started.use(
  await startPrometheus({ targets: [service.admin], rules: RULES, interval: `${SCRAPE_SECONDS}s` }),
)
const stop = new AbortController()
const traffic = callUntil(client, stop.signal)
started.defer(() => stop.abort())

say(`load for ${minutes} minutes, scraped every ${SCRAPE_SECONDS} s by ${prometheus.url}`)
await sleep(minutes * 60_000)
const rules = await prometheus.rules()
const queries = dashboardQueries('1m')
expectNothing(
  `all ${queries.length} queries of the dashboard have a result`,
  await unanswered(prometheus, queries),
)
const measures = rules.map(({ name, type, query }) => ({
  title: name,
  query: type === 'alerting' ? measured(query) : query,
}))
expectNothing(`all ${measures.length} rules have a figure`, await unanswered(prometheus, measures))
expectNothing(
  'all rules can be evaluated',
  rules.filter(({ health }) => health !== 'ok').map(({ name }) => name),
)
const fired = async () => {
  const series = await prometheus.query('max_over_time(ALERTS{alertstate="firing"}[3h])')
  return [...new Set(series.map(({ metric }) => metric['alertname'] ?? ''))]
}
expectNothing('no alert has fired', await fired())
for (const name of [
  'job:itemcache_hit_ratio:rate5m',
  'job:itemcache_read_call_duration_seconds:p99_5m',
  'job:itemcache_calls:rate5m',
]) {
  say(`${name} ${(await prometheus.query(name)).map(({ value }) => value).join()}`)
}

say(`killing Redis, and watching for ${AFTERMATH_MINUTES} minutes`)
await redis.kill()
const killedMs = performance.now()
while (performance.now() - killedMs < AFTERMATH_MINUTES * 60_000) {
  await sleep(15_000)
  const now = await prometheus.firing()
  if (now.length > 0 && !now.includes('ItemCacheRedisDown')) say(`firing: ${now.join()}`)
}
const names = await fired()
const well = names.length === 1 && names[0] === 'ItemCacheRedisDown'
expectNothing(
  'ItemCacheRedisDown fires, and nothing else',
  well ? [] : [`fired: ${names.join() || 'nothing'}`],
)
stop.abort()
const { calls, failures } = await traffic
say(`${calls} calls, failures: ${JSON.stringify(failures)}`)
process.exitCode = failed ? 1 : 0
