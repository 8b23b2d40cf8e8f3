/** One workload over ItemCache and over what people would use instead: CPU of the serving process, and reads that reach SQL. */
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fillItems } from '../bed.ts'
import { LOAD_CORE, SERVER, start } from '../control.ts'
import type { Measured } from '../report.ts'
import { figure, median } from '../report.ts'
import type { Run } from '../rows.ts'
import { ITEM_BYTES, startHot, warm } from '../rpc/hot.ts'
import type { Mix } from '../rpc/mixed-load.ts'
import type { EdgeOptions, Kind } from './edge.ts'

const KINDS: readonly Kind[] = [
  'no cache',
  'Redis cache-aside',
  'bentocache',
  'cacheable',
  'an answer at once',
]
const WRITES = 0.05

interface Served {
  readonly name: string
  readonly address: string
  cpuUs(): Promise<number>
  selects(): Promise<number>
}

export async function run({ full, progress }: Run): Promise<readonly Measured[]> {
  const items = full ? 1_000_000 : 20_000
  const calls = full ? 100_000 : 10_000
  const rounds = full ? 3 : 2
  // A memory that was filled in the order of ids holds what came last, and V8 has yet to see what runs often.
  const warmRounds = full ? 1 : 2
  const memoryEntries = items / 10
  await using stack = new AsyncDisposableStack()
  progress(`writing ${items} items`)
  const hot = stack.use(await startHot(items, { env: { ITEMCACHE_MEMORY_MAX_ENTRIES: `${memoryEntries}` } }))
  // Theirs are others: what they write must not cost ours anything.
  await fillItems(await hot.bed.sql(), 'peer', items, ITEM_BYTES)
  progress('reading them into Redis')
  await warm(hot.instance, 0, items)
  const all: Served[] = [
    {
      name: 'ItemCache',
      address: hot.instance.address,
      cpuUs: hot.instance.cpuUs,
      selects: async () => Number((await hot.instance.metrics()).loads),
    },
  ]
  for (const kind of KINDS) {
    progress(`filling ${kind}`)
    const edge = stack.use(start(join(import.meta.dirname, 'edge.ts'), SERVER))
    const options: EdgeOptions = {
      kind,
      databaseUrl: hot.bed.databaseUrl,
      redisSocket: hot.bed.redisSocket,
      memoryEntries,
    }
    const address = await edge.ask<string>('listen', options)
    all.push({ name: kind, address, cpuUs: edge.cpuUs, selects: () => edge.ask<number>('selects') })
  }
  const load = stack.use(start(join(import.meta.dirname, '..', 'rpc', 'mixed-load.ts'), { core: LOAD_CORE }))

  const cpu = new Map<string, number[]>(all.map(({ name }) => [name, []]))
  const sql = new Map<string, number[]>(all.map(({ name }) => [name, []]))
  const failures = new Map<string, number>()
  // Redis and PostgreSQL were busy being filled; breakers that opened meanwhile close again.
  await sleep(5000)
  for (let round = 1 - warmRounds; round <= rounds; round++) {
    for (const { name, address, cpuUs, selects } of all) {
      const before = { us: await cpuUs(), selects: await selects() }
      const mix: Mix = {
        address,
        calls,
        items,
        zipf: 0.99,
        writes: WRITES,
        connections: 8,
        concurrent: 64,
        seed: round + warmRounds,
      }
      const { failed, reads } = await load.ask<{ failed: number; reads: number }>('run', mix)
      if (round > 0) failures.set(name, (failures.get(name) ?? 0) + failed)
      const perRead = ((await cpuUs()) - before.us) / reads
      const sqlPerRead = ((await selects()) - before.selects) / reads
      progress(
        `${round > 0 ? `round ${round}` : 'warm'}: ${name}, ${perRead.toFixed(0)} µs a read, ${sqlPerRead.toFixed(4)} SQL reads a read`,
      )
      if (round > 0) {
        cpu.get(name)?.push(perRead)
        sql.get(name)?.push(sqlPerRead)
      }
    }
  }
  /** Reads in a second of the serving process's CPU. */
  const speed = (name: string) => 1e6 / median(cpu.get(name) ?? [])
  const ratio = (name: string, to = 'ItemCache') =>
    median((cpu.get(name) ?? []).map((theirs, n) => theirs / (cpu.get(to)?.[n] ?? Number.NaN)))
  const selects = (name: string) => median(sql.get(name) ?? [])
  const lost = [...failures]
    .filter(([, count]) => count > 0)
    .map(([name, count]) => `${count} calls of ${name} failed`)
  const note = [`${items.toLocaleString('en')} ids`, ...lost].join(', ')
  const atOnce = (kind: Kind) => `${figure(ratio(kind, 'an answer at once'))} × ${kind}`
  const ceiling = `that edge is ${atOnce('no cache')} and ${atOnce('Redis cache-aside')}`
  return [
    {
      row: 'zipf-sql',
      ours: 100 * (1 - selects('ItemCache') / selects('no cache')),
      note: `${note}; ${selects('ItemCache').toFixed(4)} to ${selects('no cache').toFixed(2)} a read`,
    },
    ...KINDS.map((kind) => ({
      row: `zipf-${kind}`,
      ours: speed('ItemCache'),
      peer: speed(kind),
      ratio: ratio(kind),
      note: kind === 'an answer at once' ? `${note}; ${ceiling}` : note,
    })),
  ]
}
