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

test('a caller who makes values up is kept no more than a thousand of them, and no long one', () => {
  const strings = new HeaderStrings()
  strings.share({ 'user-agent': 'x'.repeat(201) })
  expect(strings.size).toBe(0)
  for (let n = 0; n < 2_000; n++) strings.share({ 'user-agent': `agent ${n}` })
  expect(strings.size).toBe(1_000)
})
