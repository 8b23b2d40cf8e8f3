import { describe, expect, test } from 'vitest'
import { changeLevel, createLogger, toggleDebug } from '../../src/observe/log.ts'
import { type RequestLine, RequestLog, type RequestLogOptions } from '../../src/observe/request-log.ts'

const HIT: RequestLine = {
  method: 'itemcache.v1.ItemCacheService/GetItem',
  code: 'OK',
  trace_id: '4bf92f3577b34da6a3ce929d0e0e4736',
  tenant: 'acme',
  id: '1',
  cache_hit: true,
  tier: 'memory',
  outcome: 'HIT',
  duration_ms: 0.1,
  reason: undefined,
}
const MISS: RequestLine = { ...HIT, cache_hit: false, tier: 'postgres', outcome: 'MISS', duration_ms: 3 }
const FAILED: RequestLine = { ...MISS, code: 'UNAVAILABLE', reason: 'POSTGRES_TIMEOUT' }

function started(options: Partial<RequestLogOptions> & { level?: 'debug' | 'info' | 'warn' } = {}) {
  const lines: Record<string, unknown>[] = []
  let nowMs = 0
  const log = createLogger({
    level: options.level ?? 'info',
    version: '0',
    destination: { write: (line) => void lines.push(JSON.parse(line)) },
    now: () => nowMs,
  })
  const requests = new RequestLog({
    log,
    hitsOneIn: 100,
    slowMs: 500,
    now: () => nowMs,
    random: () => 0.5,
    ...options,
  })
  return {
    log,
    lines,
    pass: (ms: number) => {
      nowMs += ms
    },
    /** As the frame of a call does. */
    call(line: RequestLine, isStream = false) {
      const isHit = line.tier === 'memory'
      if (!isHit || requests.wantsHit(line.duration_ms)) requests.write(line, isHit, isStream)
    },
    requestLines: () => lines.filter(({ msg }) => msg === 'request'),
  }
}

describe('the line of a call', () => {
  test('tells who has called what, which tier has answered, and how long it took', () => {
    const { call, requestLines } = started()
    call(MISS)
    const { reason, ...rest } = MISS
    expect(reason).toBeUndefined()
    expect(requestLines()).toEqual([expect.objectContaining({ level: 'info', ...rest })])
  })

  test('is there for one hit in so many', () => {
    const { call, requestLines } = started()
    for (let i = 0; i < 10_000; i++) call(HIT)
    expect(requestLines()).toHaveLength(100)
  })

  test.each([
    [0, 0],
    [1, 50],
  ])('is there for hits as often as %d says', (hitsOneIn, count) => {
    const { call, requestLines } = started({ hitsOneIn })
    for (let i = 0; i < 50; i++) call(HIT)
    expect(requestLines()).toHaveLength(count)
  })

  test('is a warning for whatever takes long, hits included', () => {
    const { call, requestLines } = started({ hitsOneIn: 0, level: 'warn' })
    call({ ...HIT, duration_ms: 500 })
    call({ ...MISS, duration_ms: 900 })
    call(MISS)
    expect(requestLines()).toEqual([
      expect.objectContaining({ level: 'warn', slow: true, duration_ms: 500 }),
      expect.objectContaining({ level: 'warn', slow: true, duration_ms: 900 }),
    ])
  })

  test('is no warning for a stream that was open for long', () => {
    const { call, requestLines } = started()
    call({ ...MISS, duration_ms: 3_600_000 }, true)
    expect(requestLines()).toEqual([expect.objectContaining({ level: 'info' })])
  })

  test('is a warning when the service is at fault, and none when the caller is', () => {
    const { call, requestLines } = started()
    call(FAILED)
    call({ ...MISS, code: 'NOT_FOUND' })
    expect(requestLines().map(({ level }) => level)).toEqual(['warn', 'info'])
  })

  test('is left out when there are too many, those of failures by themselves, and the next one says how many', () => {
    const { call, pass, requestLines } = started()
    for (let i = 0; i < 5000; i++) call(MISS)
    call(FAILED)
    expect(requestLines().length).toBeLessThan(400)
    expect(requestLines().at(-1)).toMatchObject({ code: 'UNAVAILABLE' })
    pass(1000)
    call(MISS)
    expect(requestLines().at(-1)).toMatchObject({ code: 'OK', lines_left_out: 4700 })
  })

  test('never keeps the lines about the service itself out', () => {
    const { call, log, lines } = started()
    for (let i = 0; i < 5000; i++) {
      call(MISS)
      call(FAILED)
    }
    log.warn('the circuit breaker is not closed')
    expect(lines.at(-1)).toMatchObject({ msg: 'the circuit breaker is not closed' })
  })
})

describe('the level', () => {
  test('can be changed while calls are made: at debug every call has a line, and back again none is left', () => {
    const { call, log, requestLines } = started({ hitsOneIn: 0 })
    call(HIT)
    expect(requestLines()).toEqual([])
    expect(changeLevel(log, 'debug')).toBe(true)
    for (let i = 0; i < 2000; i++) call(HIT)
    expect(requestLines()).toHaveLength(2000)
    expect(changeLevel(log, 'info')).toBe(true)
    for (let i = 0; i < 2000; i++) call(HIT)
    expect(requestLines()).toHaveLength(2000)
  })

  test('that does not exist changes nothing', () => {
    const { log } = started()
    expect(changeLevel(log, 'loud')).toBe(false)
    expect(log.level).toBe('info')
  })

  test('goes to debug and back to what is configured', () => {
    const { log, lines } = started({ level: 'warn' })
    toggleDebug(log, 'warn')
    expect(log.level).toBe('debug')
    toggleDebug(log, 'warn')
    expect(log.level).toBe('warn')
    expect(lines.map(({ msg, from, to }) => [msg, from, to])).toEqual([
      ['the log level is changed', 'warn', 'debug'],
      ['the log level is changed', 'debug', 'warn'],
    ])
  })
})
