/** Traces, as a collector receives them from a running service. */
import { randomBytes } from 'node:crypto'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { callerAs } from '../support/caller.ts'
import { type Collector, type ReceivedSpan, startCollector } from '../support/collector.ts'
import { startService, type TestService } from '../support/service.ts'

/** Spans are sent this often, so that tests need not wait. */
const PROMPT = { OTEL_BSP_SCHEDULE_DELAY: '50' }

const traced = () => {
  const traceId = randomBytes(16).toString('hex')
  const spanId = randomBytes(8).toString('hex')
  return { traceId, spanId, metadata: { traceparent: `00-${traceId}-${spanId}-01` } }
}

let collector: Collector
let service: TestService

beforeAll(async () => {
  collector = await startCollector()
  service = await startService({ env: { OTEL_EXPORTER_OTLP_ENDPOINT: collector.url, ...PROMPT } })
})
afterAll(async () => {
  await service?.[Symbol.asyncDispose]()
  await collector?.[Symbol.asyncDispose]()
})

test('try', async () => {
  const a = callerAs(service, 'cold')
  const { traceId, metadata } = traced()
  await a.call('getItem', { id: '1' }, { metadata })
  await expect.poll(() => collector.trace(traceId).find((s: ReceivedSpan) => s.kind === 2)).toBeDefined()
  await new Promise((r) => setTimeout(r, 500))
  for (const s of [...collector.trace(traceId)].sort((x, y) => Number(x.start - y.start)))
    console.log(
      s.spanId,
      '<-',
      s.parentSpanId,
      s.name,
      Number(s.end - s.start) / 1e6,
      s.kind,
      JSON.stringify(s.attributes),
      JSON.stringify(s.events),
      JSON.stringify(s.links),
      s.status,
    )
  console.log(JSON.stringify(collector.spans[0]?.resource))
})
