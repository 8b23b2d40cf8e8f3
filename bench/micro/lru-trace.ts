/**
 * One cache alone in a process: the CPU of getting or setting along a Zipf trace, and what its entries take. Prints JSON.
 *
 *     node --expose-gc bench/micro/lru-trace.ts "lru-cache" 2000000
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { Bench } from 'tinybench'
import { seededRandom, zipfTrace } from '../../test/support/zipf.ts'
import { cpuUs } from '../control.ts'
import { CACHES } from './caches.ts'

export interface Traced {
  readonly cpuNs: number
  readonly hitRate: number
  readonly bytesPerEntry: number
}

const KEYS = 1_000_000
const CAPACITY = 100_000
const PASSES = 2
const ITEM_BYTES = 320

const [, , name = '', length] = process.argv
const accesses = Number(length)
const newCache = CACHES[name]
if (newCache === undefined || !(accesses > 0)) {
  throw new Error(`expected one of ${Object.keys(CACHES).join(', ')}, and the length of the trace`)
}

// Of one piece each, as a decoder makes them, and not what two strings that were joined are.
const text = Buffer.alloc(32)
const keys = Array.from({ length: KEYS }, (_, n) => text.toString('latin1', 0, text.write(`7:default${n}`)))
const trace = zipfTrace({ keys: KEYS, length: accesses, exponent: 0.99, random: seededRandom(42) })
const value = { bytes: new Uint8Array(ITEM_BYTES) }
await settle()
const before = used()
const cache = newCache(CAPACITY)
let hits = 0
// The pass that warms up also leaves each key's hash in its string, where a Map finds it: the best case of whoever uses one.
const bench = new Bench({
  now: () => cpuUs() / 1000,
  time: 0,
  iterations: PASSES,
  warmup: true,
  warmupTime: 0,
  warmupIterations: 1,
})
bench.add('get or set', () => {
  hits = 0
  for (const n of trace) {
    const key = keys[n] as string
    if (cache.get(key) !== undefined) hits += 1
    else cache.set(key, value, ITEM_BYTES + key.length)
  }
})
const [task] = await bench.run()
if (task?.result.state !== 'completed') throw new Error(`the trace did not run: ${task?.result.state}`)
await settle()
const bytesPerEntry = (used() - before) / CAPACITY
// Asked once more, so that neither the cache nor what it is compared without is collected before.
if (cache.get(keys[trace[0] as number] as string) === 0) throw new Error('it is gone')
console.log(
  JSON.stringify({
    cpuNs: (task.result.latency.min * 1e6) / accesses,
    hitRate: hits / accesses,
    bytesPerEntry,
  } satisfies Traced),
)

async function settle(): Promise<void> {
  for (let round = 0; round < 3; round += 1) {
    globalThis.gc?.()
    await sleep(20)
  }
}

function used(): number {
  const { heapUsed, arrayBuffers } = process.memoryUsage()
  return heapUsed + arrayBuffers
}
