/**
 * What it costs to deliver an event to one subscriber: CPU of the server with 1,000 subscribers and writes at a fixed rate,
 * less what the same writes cost with one, beside a bare grpc-js server that writes the same bytes to as many streams.
 */
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { rawStreams } from '../bed.ts'
import { LOAD_CORE, SERVER, start } from '../control.ts'
import type { Measured } from '../report.ts'
import { median } from '../report.ts'
import type { Run } from '../rows.ts'
import { idOf, startHot } from './hot.ts'
import { compare } from './unary.ts'
import type { Subscribers } from './watch-load.ts'

const SUBSCRIBERS = 1000
const STREAMS_PER_CONNECTION = 50
const WRITES_PER_S = 20
const ITEMS = 1000
/** For the last messages to arrive before the clock is read. */
const SETTLE_MS = 300

export async function run({ full, progress }: Run): Promise<readonly Measured[]> {
  const seconds = full ? 10 : 4
  await using hot = await startHot(ITEMS)
  const { instance } = hot
  const sql = await hot.bed.sql()
  const bare = start(join(import.meta.dirname, 'bare.ts'), SERVER)
  await using _bare = bare
  const bareAddress = await bare.ask<string>('listen', new Uint8Array())
  await using load = start(join(import.meta.dirname, 'watch-load.ts'), { core: LOAD_CORE })

  let turn = 0
  const write = async () => {
    turn++
    await sql.query('UPDATE items SET title = $3 WHERE tenant = $1 AND id = $2', [
      'default',
      idOf(turn % ITEMS),
      `title ${turn}`,
    ])
  }
  /** The CPU of a process while something happens at the rate of the writes, in microseconds. */
  const during = async (process: { cpuUs(): Promise<number> }, each: () => Promise<unknown>) => {
    const before = await process.cpuUs()
    const startedMs = performance.now()
    for (let n = 0; n < WRITES_PER_S * seconds; n++) {
      await sleep(Math.max(0, startedMs + (n * 1000) / WRITES_PER_S - performance.now()))
      await each()
    }
    await sleep(SETTLE_MS)
    return (await process.cpuUs()) - before
  }
  const seen = (address: string) =>
    load.ask<{ readonly messages: number; readonly bytes: number }>('seen', address)
  const perDelivery = async (
    process: { cpuUs(): Promise<number> },
    address: string,
    each: () => Promise<unknown>,
    otherwiseUs: number,
  ) => {
    const before = await seen(address)
    const took = await during(process, each)
    const delivered = (await seen(address)).messages - before.messages
    // Events that come together travel in one message.
    if (delivered < SUBSCRIBERS * WRITES_PER_S * seconds * 0.5)
      throw new Error(`only ${delivered} deliveries`)
    return (took - otherwiseUs) / delivered
  }

  const alone = rawStreams(instance.address, 'default')
  alone.open({ heartbeatInterval: { seconds: 60n } }, () => {})
  await sleep(SETTLE_MS)
  progress('writes with 1 subscriber')
  await during(instance, write)
  const otherwiseUs = median([await during(instance, write), await during(instance, write)])

  await load.ask('open', {
    address: instance.address,
    streams: SUBSCRIBERS,
    streamsPerConnection: STREAMS_PER_CONNECTION,
  } satisfies Subscribers)
  await load.ask('open', {
    address: bareAddress,
    path: '/bare.Bare/Stream',
    streams: SUBSCRIBERS,
    streamsPerConnection: STREAMS_PER_CONNECTION,
  } satisfies Subscribers)
  while ((await seen(instance.address)).messages < SUBSCRIBERS) await sleep(50)
  while ((await bare.ask<number>('streams')) < SUBSCRIBERS) await sleep(50)
  await write()
  await sleep(SETTLE_MS)
  const message = new Uint8Array((await seen(instance.address)).bytes)
  progress(`writes with ${SUBSCRIBERS} subscribers, messages of ${message.byteLength} bytes`)
  const deliver = () => bare.ask('deliver', message)
  const compared = await compare(
    full ? 7 : 3,
    () => perDelivery(instance, instance.address, write, otherwiseUs),
    () => perDelivery(bare, bareAddress, deliver, 0),
    progress,
  )
  alone.close()
  return [
    { row: 'watch', ...compared, note: `${WRITES_PER_S} writes/s` },
    { row: 'watch-cost', ours: compared.ours },
  ]
}
