import { Writable } from 'node:stream'
import pg from 'pg'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { createLogger } from '../../src/observe/log.ts'
import { startService, type TestService } from '../support/service.ts'
import { connectSql, someoneWaits } from './postgres-fixture.ts'

describe('the consistency probe', () => {
  let service: TestService
  let psql: pg.Client
  const lines: Record<string, unknown>[] = []
  const probes = () => ({ ...service.app.metrics.probes })
  const put = (id: string, title: string) =>
    service.client.call('updateItem', { item: { id, title }, allowMissing: true })
  const get = async (id: string) => {
    const { result } = await service.client.call('getItem', { id })
    return result.case === 'item' ? result.value.title : undefined
  }
  /** What a database does that has lost its triggers: nothing is logged, so nobody is told. */
  const withoutTriggers = async (statement: string) => {
    await psql.query('ALTER TABLE items DISABLE TRIGGER USER')
    await psql.query(statement)
    for (const name of ['insert', 'update', 'delete', 'truncate']) {
      await psql.query(`ALTER TABLE items ENABLE ALWAYS TRIGGER items_log_${name}`)
    }
  }

  beforeAll(async () => {
    const sink = new Writable({
      write(chunk, _encoding, done) {
        for (const line of `${chunk}`.trim().split('\n')) lines.push(JSON.parse(line))
        done()
      },
    })
    const log = createLogger({ level: 'error', version: '0', destination: sink })
    service = await startService({ env: { ITEMCACHE_PROBE_ONE_IN: '1' }, app: { log, random: () => 0 } })
    psql = new pg.Client(service.databaseUrl)
    await psql.connect()
  })
  afterAll(async () => {
    await psql?.end()
    await service?.[Symbol.asyncDispose]()
  })

  test('finds a copy that is what PostgreSQL holds consistent', async () => {
    await put('same', 'x')
    const before = probes()
    expect(await get('same')).toBe('x')
    await expect.poll(() => probes().consistent).toBeGreaterThan(before.consistent)
    expect(probes()).toMatchObject({ withinBound: before.withinBound, violation: before.violation })
  })

  test('finds a copy whose item has just changed to be within the bound', async () => {
    await put('changing', 'before')
    const before = probes()
    // The change is committed, but nobody can read the log: whoever queues for its lock first gets it at COMMIT.
    // That it was written long before it is committed, in a transaction that stays open, changes nothing.
    await psql.query(`BEGIN; UPDATE items SET title = 'after' WHERE id = 'changing'`)
    await psql.query(`UPDATE invalidations SET committed_at = committed_at - interval '1 hour'
      WHERE ids = '{changing}'`)
    await using lock = await connectSql(service.databaseUrl)
    await using onlooker = await connectSql(service.databaseUrl)
    const locked = lock('BEGIN; LOCK TABLE invalidations IN ACCESS EXCLUSIVE MODE')
    await someoneWaits(onlooker)
    await psql.query('COMMIT')
    await locked
    expect(await get('changing')).toBe('before')
    await lock('COMMIT')
    await expect.poll(() => probes().withinBound).toBe(before.withinBound + 1)
    expect(probes().violation).toBe(before.violation)
  })

  test('finds and logs a copy that should not have been served', async () => {
    const { item } = await put('wrong', 'logged')
    await withoutTriggers(`UPDATE items SET title = 'unlogged', revision = revision + 100 WHERE id = 'wrong'`)
    const before = probes()
    expect(await get('wrong')).toBe('logged')
    await expect.poll(() => probes().violation).toBe(before.violation + 1)
    const revision = Number(item?.revision)
    expect(lines.at(-1)).toMatchObject({
      level: 'error',
      tenant: 'default',
      id: 'wrong',
      served_revision: revision,
      revision: revision + 100,
    })
    expect(lines.at(-1)?.['served_as_of']).toBeGreaterThanOrEqual(revision)
    expect(lines.at(-1)?.['as_of']).toBeGreaterThanOrEqual(revision)
  })

  test('finds a copy of an item that is gone although nothing was logged', async () => {
    await put('gone', 'x')
    await withoutTriggers(`DELETE FROM items WHERE id = 'gone'`)
    const before = probes()
    expect(await get('gone')).toBe('x')
    await expect.poll(() => probes().violation).toBe(before.violation + 1)
  })

  test('is off when it is told to compare one in 0', async () => {
    await using quiet = await startService({
      databaseUrl: service.databaseUrl,
      env: { ITEMCACHE_PROBE_ONE_IN: '0' },
    })
    await quiet.client.call('updateItem', { item: { id: 'quiet', title: 'x' }, allowMissing: true })
    for (let i = 0; i < 5; i++) await quiet.client.call('getItem', { id: 'quiet' })
    expect(quiet.app.metrics.probes).toEqual({ consistent: 0, withinBound: 0, violation: 0 })
  })
})
