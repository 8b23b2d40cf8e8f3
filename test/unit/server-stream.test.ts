import { EventEmitter } from 'node:events'
import { Metadata, status } from '@grpc/grpc-js'
import { expect, test } from 'vitest'
import { ItemCacheError } from '../../src/errors.ts'
import { createLogger } from '../../src/observe/log.ts'
import { Metrics } from '../../src/observe/metrics.ts'
import { RequestLog } from '../../src/observe/request-log.ts'
import { startAuth } from '../../src/rpc/auth.ts'
import { serverStream } from '../../src/rpc/call.ts'
import { Unsent } from '../../src/rpc/unsent.ts'

/** A call whose reader takes a message when the test says so. */
class SlowCall extends EventEmitter {
  readonly request = {}
  readonly metadata = new Metadata()
  readonly cancelled = false
  readonly messages: unknown[] = []
  ended = false
  take = () => {}

  getDeadline = () => Number.POSITIVE_INFINITY
  getPeer = () => '127.0.0.1:1'
  write(message: unknown, taken: () => void) {
    this.messages.push(message)
    this.take = taken
    return false
  }
  end() {
    this.ended = true
  }
}

const DRAINING = new ItemCacheError('unavailable', 'the server is draining')
const METHOD = 'itemcache.v1.ItemCacheService/WatchMetrics'

/** A stream whose first message its reader has not taken when the server begins to drain. */
function drainedStream() {
  const [draining, hurrying] = [new AbortController(), new AbortController()]
  const log = createLogger({ level: 'silent', version: '0.0.0' })
  const frame = {
    log,
    requests: new RequestLog({ log, hitsOneIn: 0, slowMs: 1000, now: () => 0, random: () => 0 }),
    metrics: new Metrics({ methods: [METHOD] }),
    auth: startAuth({ kind: 'none' }, { log }),
    now: () => 0,
    maxDeadlineMs: 1000,
    maxCalls: 10,
    unsent: new Unsent(1e6),
    draining: draining.signal,
    hurrying: hurrying.signal,
  }
  const call = new SlowCall()
  const failed = Promise.withResolvers<{ code: number }>()
  call.on('error', failed.resolve)
  const handler = async function* () {
    yield new Uint8Array([1])
    if (draining.signal.aborted) yield new Uint8Array([2])
    throw draining.signal.reason
  }
  serverStream(frame, METHOD, handler)(call as never)
  return { call, failure: failed.promise, draining, hurrying }
}

test('a stream whose reader takes its message while the server drains is told the rest before it ends', async () => {
  const { call, failure, draining } = drainedStream()
  await expect.poll(() => call.messages.length).toBe(1)
  draining.abort(DRAINING)
  call.take()
  await expect.poll(() => call.messages.length).toBe(2)
  call.take()
  expect((await failure).code).toBe(status.UNAVAILABLE)
})

test('a stream whose reader takes nothing is given up when the server can wait no longer', async () => {
  const { call, failure, draining, hurrying } = drainedStream()
  await expect.poll(() => call.messages.length).toBe(1)
  draining.abort(DRAINING)
  hurrying.abort(DRAINING)
  expect((await failure).code).toBe(status.UNAVAILABLE)
  expect(call.messages).toHaveLength(1)
})
