import { status } from '@grpc/grpc-js'
import { expect, test } from 'vitest'
import { ItemCacheError } from '../../src/errors.ts'
import { createLogger } from '../../src/observe/log.ts'
import { Metrics } from '../../src/observe/metrics.ts'
import { RequestLog } from '../../src/observe/request-log.ts'
import { startAuth } from '../../src/rpc/auth.ts'
import { type Messages, type StreamSignals, serverStream } from '../../src/rpc/call.ts'
import { Unsent } from '../../src/rpc/unsent.ts'

/** A call whose reader takes a message when the test says so. */
class SlowCall {
  readonly request = {}
  readonly metadata = { get: () => [] }
  readonly messageBytes = 0
  readonly cancelled = false
  readonly messages: unknown[] = []
  readonly failed = Promise.withResolvers<{ code: number }>()
  deadlineMs = Number.POSITIVE_INFINITY
  take: (error?: Error) => void = () => {}
  leave = () => {}
  close = () => {}

  getDeadline = () => this.deadlineMs
  getPeer = () => '127.0.0.1:1'
  on(_: 'cancelled', tell: () => void) {
    this.leave = tell
  }
  whenClosed(then: () => void) {
    this.close = then
    return true
  }
  write(message: unknown, taken: () => void) {
    this.messages.push(message)
    this.take = taken
  }
  refuse = this.failed.resolve
}

const DRAINING = new ItemCacheError('unavailable', 'the server is draining')
const METHOD = 'itemcache.v1.ItemCacheService/WatchMetrics'

function serve(call: SlowCall, handler: (signals: StreamSignals) => Messages | Promise<Messages>) {
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
  serverStream(frame, METHOD, (_request, _context, signals) => handler(signals))(call as never)
  return { ...frame, call, failure: call.failed.promise, draining, hurrying }
}

/** A stream whose first message its reader has not taken when the server begins to drain. */
function drainedStream() {
  return serve(new SlowCall(), ({ draining }) => {
    const left = [new Uint8Array([1]), new Uint8Array([2])]
    return {
      next: () => {
        if (left.length > 0) return left.shift()
        throw draining.reason
      },
      [Symbol.dispose]: () => {},
    }
  })
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

/** A stream of what a test pushes. `saysSo`: when it has nothing more. */
function fedStream(call = new SlowCall(), saysSo = false) {
  const queue: Uint8Array[] = []
  const fed = { queue, disposed: 0, asked: 0, wake: () => {} }
  const served = serve(call, ({ wake }) => {
    fed.wake = wake
    return {
      next: () => {
        fed.asked++
        return queue.shift()
      },
      get isWaiting() {
        return saysSo && queue.length === 0
      },
      [Symbol.dispose]: () => {
        fed.disposed++
      },
    }
  })
  const push = (bytes: number) => {
    queue.push(new Uint8Array(bytes))
    fed.wake()
  }
  return { ...served, fed, push }
}

test('a message is written in the very turn in which it comes, and the one after it when that has left', () => {
  const { call, push } = fedStream()
  push(1)
  expect(call.messages).toHaveLength(1)
  push(2)
  push(3)
  expect(call.messages).toHaveLength(1)
  call.take()
  expect(call.messages).toHaveLength(2)
  call.take()
  expect(call.messages).toHaveLength(3)
})

test('a stream that has said that it has nothing more is asked again when it wakes, if only while a message is leaving', () => {
  const { call, push, fed } = fedStream(new SlowCall(), true)
  fed.queue.push(new Uint8Array(1), new Uint8Array(2))
  fed.wake()
  call.take()
  expect(call.messages).toHaveLength(2)
  const { asked } = fed
  call.take()
  expect(fed.asked).toBe(asked)
  push(3)
  expect(call.messages).toHaveLength(3)
  fed.wake()
  call.take()
  expect(fed.asked).toBe(asked + 2)
})

test('a stream that waits while its last message leaves hears that the server drains', async () => {
  const call = new SlowCall()
  const { draining, failure } = serve(call, (signals) => {
    const left = [new Uint8Array(1)]
    return {
      next() {
        signals.draining.throwIfAborted()
        return left.shift()
      },
      isWaiting: true,
      [Symbol.dispose]: () => {},
    }
  })
  expect(call.messages).toHaveLength(1)
  draining.abort(DRAINING)
  call.take()
  expect((await failure).code).toBe(status.UNAVAILABLE)
})

test('a large message counts as unsent until it has left, or its reader has, and no longer', () => {
  const { call, push, unsent, fed } = fedStream()
  push(100_000)
  expect(unsent.bytes).toBe(100_000)
  call.take()
  expect(unsent.bytes).toBe(0)
  push(200_000)
  expect(unsent.bytes).toBe(200_000)
  call.leave()
  call.close()
  expect(unsent.bytes).toBe(0)
  call.take(new Error('closed'))
  expect(unsent.bytes).toBe(0)
  expect(fed.disposed).toBe(1)
})

test('a stream is over when its reader leaves: it is counted once, and asked for nothing more', async () => {
  const { call, push, fed, metrics, failure } = fedStream()
  expect(metrics.openCalls).toBe(1)
  push(1)
  call.leave()
  call.close()
  expect((await failure).code).toBe(status.CANCELLED)
  const { asked } = fed
  call.take(new Error('closed'))
  fed.wake()
  expect(fed).toMatchObject({ asked, disposed: 1 })
  expect(metrics.openCalls).toBe(0)
  expect(metrics.rpc(METHOD).byStatus.get('CANCELLED')?.latency.count).toBe(1)
})

test('a stream ends at its deadline, also while its reader takes nothing', async () => {
  const call = new SlowCall()
  call.deadlineMs = Date.now() + 20
  const { push, failure, fed } = fedStream(call)
  push(1)
  expect((await failure).code).toBe(status.DEADLINE_EXCEEDED)
  expect(fed.disposed).toBe(1)
})

test('what begins only after its reader has left is disposed of', async () => {
  const beginning = Promise.withResolvers<Messages>()
  const { call, failure, metrics } = serve(new SlowCall(), () => beginning.promise)
  call.leave()
  expect((await failure).code).toBe(status.CANCELLED)
  const disposed = Promise.withResolvers<void>()
  beginning.resolve({ next: () => new Uint8Array(1), [Symbol.dispose]: () => disposed.resolve() })
  await disposed.promise
  expect(call.messages).toEqual([])
  expect(metrics.openCalls).toBe(0)
})

test('a message that does not fit into what may be unsent ends the stream, and is not counted', async () => {
  const { call, push, unsent, failure } = fedStream()
  unsent.add(950_000, 'others')
  push(100_000)
  expect((await failure).code).toBe(status.RESOURCE_EXHAUSTED)
  call.close()
  expect(unsent.bytes).toBe(950_000)
})
