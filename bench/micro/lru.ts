/** Our LRU beside others along one Zipf trace, each in processes of its own, in turns. */
import { execFile } from 'node:child_process'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { SERVER_CORE } from '../control.ts'
import { type Measured, median } from '../report.ts'
import type { Run } from '../rows.ts'
import { CACHES } from './caches.ts'
import type { Traced } from './lru-trace.ts'

/** Of the trace. The shorter one fills the cache several times over, too, before anything is measured. */
const ACCESSES = { full: 2_000_000, short: 1_000_000 }

const OTHERS = Object.keys(CACHES).filter((name) => name !== 'ours')

export async function run({ full, progress }: Run): Promise<readonly Measured[]> {
  const rounds = full ? 9 : 2
  const runs = new Map<string, Traced[]>()
  for (let round = 1; round <= rounds; round++) {
    for (const name of Object.keys(CACHES)) {
      const traced = await alone(name, full ? ACCESSES.full : ACCESSES.short)
      runs.set(name, [...(runs.get(name) ?? []), traced])
      progress(`round ${round} of ${rounds}: ${name}, ${Math.round(traced.cpuNs)} ns`)
    }
  }
  const of = (name: string) => runs.get(name) ?? []
  /** Accesses in a second of CPU, in millions. */
  const speed = (name: string) => 1000 / median(of(name).map(({ cpuNs }) => cpuNs))
  const ratio = (name: string) => median(of('ours').map(({ cpuNs }, n) => (of(name)[n]?.cpuNs ?? 0) / cpuNs))
  const bytes = (name: string) => median(of(name).map(({ bytesPerEntry }) => bytesPerEntry))
  const fastest = OTHERS.filter((name) => !name.startsWith('lru-cache')).reduce((a, b) =>
    ratio(a) < ratio(b) ? a : b,
  )
  const detailed = 'lru-cache with TTL and size'
  return [
    {
      row: 'lru-cache',
      ours: speed('ours'),
      peer: speed('lru-cache'),
      ratio: ratio('lru-cache'),
      note: `lru-cache with TTL and size: ratio ${ratio(detailed).toFixed(2)}`,
    },
    { row: 'lru-fastest', ours: speed('ours'), peer: speed(fastest), ratio: ratio(fastest), note: fastest },
    { row: 'lru-bytes', ours: bytes('ours'), peer: bytes(detailed) },
  ]
}

async function alone(name: string, accesses: number): Promise<Traced> {
  const trace = join(import.meta.dirname, 'lru-trace.ts')
  const command = [process.execPath, '--expose-gc', trace, name, `${accesses}`]
  const pinned = SERVER_CORE === undefined ? command : ['taskset', '-c', `${SERVER_CORE}`, ...command]
  const [program = '', ...args] = pinned
  const { stdout } = await promisify(execFile)(program, args)
  return JSON.parse(stdout)
}
