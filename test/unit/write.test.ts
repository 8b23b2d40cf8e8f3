import { expect, test } from 'vitest'
import { Tail } from '../../src/invalidation/tail.ts'
import { createLogger } from '../../src/observe/log.ts'
import { Metrics } from '../../src/observe/metrics.ts'
import type { Reader } from '../../src/service/read.ts'
import { Writer } from '../../src/service/write.ts'
import type { LogSource, StoreTier } from '../../src/tiers/tier.ts'

const TENANT = 'tenant'

function unused(): never {
  throw new Error('nobody has a use for this here')
}

test('a retry of an invalidation that fetches again raises the floors of the instance that answers it', async () => {
  // An instance that has heard of the log up to revision 5, while the first attempt was logged as 7 elsewhere.
  const source: LogSource = {
    newest: async () => ({ revision: 5, rows: [], complete: true }),
    after: unused,
    listen: unused,
    seen: () => {},
    bounds: unused,
    trim: unused,
  }
  await using tail = new Tail({
    source,
    metrics: new Metrics({ methods: [] }),
    log: createLogger({ level: 'silent', version: '0' }),
    now: () => 0,
    pollMs: 500,
    maxTenants: 10,
    maxFloors: 100,
    maxTotalFloors: 1000,
    idleMs: 1e9,
    exclusive: async (_, section) => section(),
  })
  const view = await tail.activated(TENANT)
  // Nothing else is asked: neither PostgreSQL for items, nor the reader.
  const postgres = { outcomeOf: async () => 7 } as unknown as StoreTier
  const writer = new Writer({ reader: {} as Reader, postgres, origin: undefined, tail })
  const old = { id: '1', asOf: 5, tags: [] }
  expect(view.judge(old)).toBe('current')
  const write = {
    tenant: TENANT,
    requestId: 'r',
    fingerprint: 'f',
    clientId: '',
    signal: new AbortController().signal,
  }
  expect(await writer.invalidate(write, { kind: 'ids', ids: ['1'] }, 'EXPIRE', true)).toBe(7)
  expect(view.judge(old)).toBe('expired')
  expect(view.judge({ ...old, id: '2' })).toBe('current')
})
