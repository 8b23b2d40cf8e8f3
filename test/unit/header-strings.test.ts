import { expect, test } from 'vitest'
import { HeaderStrings } from '../../src/rpc/header-strings.ts'

const headers = { ':path': '/a/b', 'content-type': 'application/grpc', 'user-agent': 'grpc-node/1' }

test('values that calls have in common are kept once, and headers stay as they are', () => {
  const strings = new HeaderStrings()
  for (let call = 0; call < 3; call++) {
    const seen = { ...headers }
    strings.share(seen)
    expect(seen).toEqual(headers)
  }
  expect(strings.size).toBe(3)
})

test('credentials and what differs from call to call are not kept', () => {
  const strings = new HeaderStrings()
  strings.share({
    authorization: 'Bearer secret',
    cookie: 'secret',
    'grpc-timeout': '999m',
    traceparent: '00-1-2-01',
  })
  expect(strings.size).toBe(0)
})

test('of values that a caller makes up a thousand are kept at most, and no long one', () => {
  const strings = new HeaderStrings()
  strings.share({ 'user-agent': 'x'.repeat(201) })
  expect(strings.size).toBe(0)
  for (let n = 0; n < 10_000; n++) {
    strings.share({ 'user-agent': `agent ${n}` })
    expect(strings.size).toBeLessThanOrEqual(1_000)
  }
})

test('values of callers who come after one who makes values up are kept, too', () => {
  const strings = new HeaderStrings()
  for (let n = 0; n < 1_000; n++) strings.share({ 'user-agent': `agent ${n}` })
  strings.share(headers)
  expect(strings.size).toBe(3)
})

test('values that are names of every object are values like others', () => {
  const strings = new HeaderStrings()
  for (const value of ['__proto__', 'constructor', 'toString', '12', '']) strings.share({ te: value })
  expect(strings.size).toBe(5)
})
