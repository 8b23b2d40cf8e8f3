/** Reads and writes of items in the order of a trace, so many under way at a time. By HTTP/2 alone: answers are not decoded. */
import { type ClientHttp2Session, connect } from 'node:http2'
import { seededRandom, zipfTrace } from '../../test/support/zipf.ts'
import { answer } from '../control.ts'
import { idOf } from './hot.ts'
import { sendItemCall } from './send.ts'

export interface Mix {
  readonly address: string
  readonly calls: number
  readonly items: number
  /** 0: each item is as likely as any other. */
  readonly zipf: number
  /** The share of calls that write. */
  readonly writes: number
  readonly connections: number
  readonly concurrent: number
  readonly seed: number
}

answer({ run })

async function run(mix: Mix): Promise<{ readonly failed: number; readonly reads: number }> {
  const { address, calls, items, zipf, writes, connections, concurrent, seed } = mix
  const random = seededRandom(seed)
  const trace =
    zipf === 0
      ? Uint32Array.from({ length: calls }, () => Math.floor(random() * items))
      : zipfTrace({ keys: items, length: calls, exponent: zipf, random })
  const sessions = Array.from({ length: connections }, () => connect(`http://${address}`))
  let [next, failed, reads] = [0, 0, 0]
  const worker = async (_: unknown, n: number) => {
    while (next < calls) {
      const call = next++
      const item = trace[call] as number
      const isWrite = random() < writes
      if (!isWrite) reads++
      const session = sessions[n % connections] as ClientHttp2Session
      const ok = await sendItemCall(session, isWrite ? 'UpdateItem' : 'GetItem', {
        id: idOf(item),
        title: `title ${call}`,
      })
      if (!ok) failed++
    }
  }
  await Promise.all(Array.from({ length: concurrent }, worker))
  for (const session of sessions) session.close()
  return { failed, reads }
}
