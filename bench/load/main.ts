/**
 * Loads every RPC of a running service with ghz, one after the other: `bench/load/rpcs/*.json` are ghz's own configuration
 * files, with payloads as callers send them.
 *
 *     node bench/load/main.ts [--target 127.0.0.1:50051] [NAME...]
 *
 * It writes items whose ids begin with `load-`. ghz ends a stream after so many messages by cancelling it, which is how a
 * watcher leaves, and counts that as Canceled.
 */
import { readdirSync } from 'node:fs'
import { basename, join } from 'node:path'
import { parseArgs } from 'node:util'
import { connect } from '../../clients/typescript/src/index.ts'
import { figure } from '../report.ts'
import { has, INSTALL } from '../tools.ts'
import { failures, ghz, percentileOf } from './ghz.ts'

const ITEMS = 1000
const FOLDER = join(import.meta.dirname, 'rpcs')

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { target: { type: 'string', default: process.env['ITEMCACHE_TARGET'] ?? '127.0.0.1:50051' } },
})
if (!has('ghz')) {
  console.error(`ghz is missing: ${INSTALL.ghz}`)
  process.exit(1)
}
const names = readdirSync(FOLDER)
  .map((file) => basename(file, '.json'))
  .filter((name) => positionals.length === 0 || positionals.includes(name))
{
  await using client = connect(values.target, { timeoutMs: 60_000 })
  for (let n = 0; n < ITEMS; n += 20) {
    const ids = Array.from({ length: 20 }, (_, i) => `load-${n + i}`)
    await Promise.all(
      ids.map((id) =>
        client.update({ id, title: `Bowl ${id}`, category: 'kitchen' }, { allowMissing: true }),
      ),
    )
  }
}
let failed = 0
console.log(['rpc'.padEnd(26), 'calls/s', 'p50 ms', 'p99 ms', 'failed'].join('\t'))
for (const name of names) {
  const report = await ghz(values.target, ['--config', join(FOLDER, `${name}.json`)])
  const lost = failures(report, name.startsWith('watch-') ? ['OK', 'Canceled'] : ['OK'])
  failed += lost
  const cells = [figure(report.rps), figure(percentileOf(report, 50)), figure(percentileOf(report, 99)), lost]
  console.log([name.padEnd(26), ...cells].join('\t'))
}
process.exitCode = failed === 0 ? 0 : 1
