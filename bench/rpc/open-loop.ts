/**
 * Unary calls at a fixed rate, whether or not earlier ones have been answered. A call's latency counts from when it was due,
 * so that a server that stands still for a while is charged for every call that would have come meanwhile.
 */
import { type ClientHttp2Session, connect } from 'node:http2'
import { setTimeout as sleep } from 'node:timers/promises'
import { seededRandom, zipfTrace } from '../../test/support/zipf.ts'
import { answer } from '../control.ts'
import { idOf } from './hot.ts'
import { sendItemCall } from './send.ts'

export interface Arrivals {
  readonly address: string
  readonly perS: number
  readonly seconds: number
  readonly connections: number
  /** Items from 0 up to this are asked for. */
  readonly items: number
  /** Default: each is as likely as any other. */
  readonly zipf?: number
}

export interface Latencies {
  readonly calls: number
  readonly failed: number
  /** Of every call, in milliseconds. */
  readonly ms: Float64Array
}

answer({ run })

async function run({ address, perS, seconds, connections, items, zipf }: Arrivals): Promise<Latencies> {
  const sessions = Array.from({ length: connections }, () => connect(`http://${address}`))
  await Promise.all(
    sessions.map((session) => new Promise<void>((resolve) => session.once('connect', () => resolve()))),
  )
  const calls = Math.round(perS * seconds)
  const ms = new Float64Array(calls)
  const random = seededRandom(1)
  const trace =
    zipf === undefined ? undefined : zipfTrace({ keys: items, length: calls, exponent: zipf, random })
  let [ended, failed] = [0, 0]
  const startedMs = performance.now()
  for (let n = 0; n < calls; ) {
    const dueMs = performance.now() - startedMs
    for (; n < calls && (n * 1000) / perS <= dueMs; n++) {
      const call = n
      const item = trace?.[n] ?? Math.floor(random() * items)
      const session = sessions[n % connections] as ClientHttp2Session
      sendItemCall(session, 'GetItem', { id: idOf(item) }).then((ok) => {
        ms[call] = performance.now() - startedMs - (call * 1000) / perS
        ended++
        if (!ok) failed++
      })
    }
    await sleep(1)
  }
  for (let waited = 0; ended < calls && waited < 5000; waited += 10) await sleep(10)
  for (const session of sessions) session.close()
  return { calls, failed: failed + calls - ended, ms }
}
