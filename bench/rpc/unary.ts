/** Unary calls at full speed: what each costs the server. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { ItemCacheService } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { type Asked, SERVER, start } from '../control.ts'
import { median } from '../report.ts'
import { runTool } from '../tools.ts'

/** A call as h2load makes it, over and over. */
export interface Target {
  readonly address: string
  /** `/package.Service/Method` */
  readonly path: string
  readonly request: Uint8Array
  /** The size of the answer, to see that all answers came whole. May differ by 1 %: ages are in it. */
  readonly answerBytes: number
  cpuUs(): Promise<number>
}

export interface Load {
  readonly calls: number
  /** Default 8. */
  readonly connections?: number
  /** On each connection. Default 8. */
  readonly concurrent?: number
}

/** A message with the five bytes in front that gRPC puts there. */
export function framed(message: Uint8Array): Buffer {
  const frame = Buffer.alloc(5 + message.byteLength)
  frame.writeUInt32BE(message.byteLength, 1)
  frame.set(message, 5)
  return frame
}

/** Sends calls one behind the other, and answers with the server's CPU per call in microseconds. Throws when one failed. */
export async function cpuPerCall(target: Target, load: Load): Promise<number> {
  const { calls, connections = 8, concurrent = 8 } = load
  const directory = mkdtempSync(join(tmpdir(), 'itemcache-bench-'))
  try {
    const body = join(directory, 'request')
    writeFileSync(body, framed(target.request))
    const before = await target.cpuUs()
    const output = await runTool('h2load', [
      ...['-n', `${calls}`, '-c', `${connections}`, '-m', `${concurrent}`, '-d', body],
      ...['-H', 'content-type: application/grpc', '-H', 'te: trailers'],
      `http://${target.address}${target.path}`,
    ])
    const cpuUs = (await target.cpuUs()) - before
    const succeeded = Number(/(\d+) succeeded/.exec(output)?.[1])
    const bytes = Number(/\((\d+)\) data/.exec(output)?.[1]) / calls
    if (succeeded !== calls || !(Math.abs(bytes / (target.answerBytes + 5) - 1) < 0.01)) {
      throw new Error(`${succeeded} of ${calls} calls succeeded, with ${bytes} bytes each: ${output}`)
    }
    return cpuUs / calls
  } finally {
    rmSync(directory, { recursive: true })
  }
}

/** A bare server that answers these bytes, and its target. */
export async function startBare(
  answer: Uint8Array,
): Promise<{ readonly process: Asked; readonly target: Target }> {
  const bare = start(join(import.meta.dirname, 'bare.ts'), SERVER)
  const address = await bare.ask<string>('listen', answer)
  return {
    process: bare,
    target: {
      address,
      path: `/${ItemCacheService.typeName}/GetItem`,
      request: new Uint8Array(10),
      answerBytes: answer.byteLength,
      cpuUs: bare.cpuUs,
    },
  }
}

/** Ours and the peer's figure, and their ratio: medians over rounds. */
export interface Compared {
  readonly ours: number
  readonly peer: number
  readonly ratio: number
}

/**
 * Two ways of doing something, in turns, so that what else the machine does meets both alike: a ratio is that of two
 * neighbours in time. The first round warms up and does not count.
 */
export async function compare(
  rounds: number,
  ours: () => Promise<number>,
  peer: () => Promise<number>,
  progress: (line: string) => void,
): Promise<Compared> {
  const pairs: { readonly ours: number; readonly peer: number }[] = []
  for (let round = 0; round <= rounds; round++) {
    // Whoever came second in every round would always find the machine as the other left it.
    const first = round % 2 === 0 ? await ours() : undefined
    const theirs = await peer()
    const pair = { ours: first ?? (await ours()), peer: theirs }
    if (round > 0) pairs.push(pair)
    const figures = `${pair.ours.toFixed(2)} to ${pair.peer.toFixed(2)}: ${(pair.ours / pair.peer).toFixed(3)}`
    progress(round === 0 ? `warm: ${figures}` : `round ${round} of ${rounds}: ${figures}`)
  }
  return {
    ours: median(pairs.map((pair) => pair.ours)),
    peer: median(pairs.map((pair) => pair.peer)),
    ratio: median(pairs.map((pair) => pair.ours / pair.peer)),
  }
}
