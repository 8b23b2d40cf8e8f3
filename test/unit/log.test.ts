import { describe, expect, test } from 'vitest'
import { ItemCacheError } from '../../src/errors.ts'
import { createLogger } from '../../src/observe/log.ts'

function capture(level: 'debug' | 'info' = 'debug') {
  const lines: string[] = []
  const log = createLogger({
    level,
    version: '1.2.3',
    destination: { write: (line) => void lines.push(line) },
  })
  const only = () => {
    expect(lines).toHaveLength(1)
    return JSON.parse(lines[0] ?? '')
  }
  return { lines, log, only }
}

describe('a log line', () => {
  test('is one line of JSON that names level, time, service and version', () => {
    const { log, only } = capture()
    log.info({ tenant: 'acme', durationMs: 1.5 }, 'read')

    expect(only()).toEqual({
      level: 'info',
      time: expect.stringMatching(/^\d{4}-\d\d-\d\dT[\d:.]+Z$/),
      service: 'itemcache',
      version: '1.2.3',
      pid: process.pid,
      tenant: 'acme',
      durationMs: 1.5,
      msg: 'read',
    })
  })

  test('is left out below the level', () => {
    const { log, lines } = capture('info')
    log.debug('request')
    expect(lines).toEqual([])
  })

  test.each(['1\r\n{"level":"error","msg":"forged"}', 'a\u0000b', '\u001b[2J', '"},{"', '\\'])(
    'is not forged by an id or tenant like %j',
    (id) => {
      const { log, lines, only } = capture()
      log.child({ tenant: id }).info({ id, ids: [id], [id]: 1 }, id)

      const line = only()
      expect([...(lines[0] ?? '')].filter((character) => character < ' ')).toEqual(['\n'])
      expect(lines[0]?.endsWith('\n')).toBe(true)
      expect(line).toMatchObject({ level: 'info', tenant: id, id, ids: [id], msg: id })
    },
  )

  test.each([
    ['\u009b2J', '\\u009b2J'],
    ['a\u0085b', 'a\\u0085b'],
    ['a\u2028{"level":"error"}', 'a\\u2028{"level":"error"}'],
    ['\u202ecba', '\\u202ecba'],
    ['\u007f', '\\u007f'],
  ])('shows what a terminal would obey by its code: %j', (id, shown) => {
    const { log, lines, only } = capture()
    log.info({ id, [id]: 1 }, id)
    expect(only()).toMatchObject({ id: shown, msg: shown, [shown]: 1 })
    expect(lines[0]).not.toContain(id)
  })

  test('bounds every text to 256 characters and every list to 32 entries', () => {
    const { log, only } = capture()
    const long = 'x'.repeat(100_000)
    log
      .child({ tenant: long })
      .info({ id: long, nested: { deep: long }, ids: Array.from({ length: 500 }, () => 'a') }, long)

    const line = only()
    for (const text of [line.tenant, line.id, line.nested.deep, line.msg]) {
      expect(text).toBe(`${'x'.repeat(255)}…`)
    }
    expect(line.ids).toHaveLength(32)
    expect(line.ids.at(-1)).toBe('[469 more]')
  })

  test('takes what JSON cannot hold', () => {
    const { log, only } = capture()
    const circular: unknown[] = []
    circular.push(circular)
    log.info({ revision: 2n ** 60n, bytes: new Uint8Array(7), circular, lone: '\ud800' })

    expect(only()).toMatchObject({ revision: '1152921504606846976', bytes: '[7 bytes]' })
  })

  test('shows code, reason and causes of an error, and a bounded stack', () => {
    const { log, only } = capture()
    const driver = Object.assign(new Error('connect ECONNREFUSED 127.0.0.1:1'), { code: 'ECONNREFUSED' })
    log.error({
      err: new ItemCacheError('unavailable', 'PostgreSQL does not answer', { id: '7', cause: driver }),
    })

    expect(only().err).toEqual({
      type: 'ItemCacheError',
      code: 'unavailable',
      reason: 'UNAVAILABLE',
      id: '7',
      message: 'PostgreSQL does not answer',
      stack: expect.stringContaining('log.test.ts'),
      cause: expect.objectContaining({ message: 'connect ECONNREFUSED 127.0.0.1:1', code: 'ECONNREFUSED' }),
    })
  })
})

describe('secrets', () => {
  test('of URLs are hidden wherever a URL may turn up', () => {
    const { log, lines } = capture()
    const url = 'postgres://user:hunter2@db:5432/items'
    let invalid: unknown
    try {
      new URL('http://user:hunter2@[')
    } catch (error) {
      invalid = error
    }
    const failed = new Error(`cannot reach ${url}`, { cause: invalid })
    log.error(failed)
    log.child({ err: failed }).warn({ url, nested: [{ url }] }, `lost ${url}`)
    log.warn({ url: 'redis://a:1,redis://:hun@ter2@b:2 https://hunter2@c/?access_token=hunter2' })

    expect(lines).toHaveLength(3)
    expect(lines.join('')).not.toContain('ter2')
    expect(lines.join('')).toContain('postgres://user:***@db:5432/items')
  })

  test('are hidden by the names of their fields', () => {
    const { log, lines } = capture()
    log.child({ token: 'hunter2' }).info({ password: 'hunter2', metadata: { Authorization: 'hunter2' } })
    log.info({ connection: { password: 'hunter2', 'api-key': 'hunter2', host: 'db' } })

    expect(lines.join('')).not.toContain('hunter2')
    expect(lines.join('')).toContain('"host":"db"')
  })
})
