import { Metadata } from '@grpc/grpc-js'
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest'
import { parseConfig } from '../../src/config.ts'
import { createLogger } from '../../src/observe/log.ts'
import { startAuth } from '../../src/rpc/auth.ts'
import { type Issuer, newToken, startIssuer, temporaryFiles, tokenLine } from '../support/credentials.ts'

const silent = createLogger({ level: 'silent', version: 'test' })

function authOf(value: string, wallNow?: () => number) {
  const { auth } = parseConfig({ ITEMCACHE_AUTH: value })
  return startAuth(auth, { log: silent, ...(wallNow && { wallNow }) })
}

function bearer(token: string): Metadata {
  const metadata = new Metadata()
  metadata.set('authorization', `Bearer ${token}`)
  return metadata
}

test('without authentication the caller says which tenant it is, and is told at once', () => {
  const metadata = new Metadata()
  expect(authOf('none').identify(metadata)).toMatchObject({ tenant: 'default', role: 'admin' })
  metadata.set('x-tenant-id', 'acme')
  expect(authOf('none').identify(metadata)).toMatchObject({ tenant: 'acme', role: 'admin' })
})

test('tokens are told at once, so that a hit in memory needs to wait for nothing', () => {
  using files = temporaryFiles()
  const [a, b] = [newToken(), newToken()]
  const file = files.write('tokens', tokenLine(a, 'acme', 'reader') + tokenLine(b, 'globex', 'admin'))
  const auth = authOf(`tokens:${file}`)
  expect(auth.identify(bearer(a))).toMatchObject({ tenant: 'acme', role: 'reader' })
  expect(auth.identify(bearer(b))).toMatchObject({ tenant: 'globex', role: 'admin' })
})

test('a token is good until the moment of its expiry', () => {
  using files = temporaryFiles()
  const token = newToken()
  const clock = { ms: Date.parse('2026-12-31T23:59:59.999Z') }
  const file = files.write('tokens', tokenLine(token, 'acme', 'reader', '2027-01-01T00:00:00Z'))
  const auth = authOf(`tokens:${file}`, () => clock.ms)
  expect(auth.identify(bearer(token))).toMatchObject({ tenant: 'acme' })
  clock.ms += 1
  expect(() => auth.identify(bearer(token))).toThrow('expired')
})

test('a file holds 100,000 tokens at most', () => {
  using files = temporaryFiles()
  const lines = Array.from({ length: 100_001 }, (_, n) => `${n.toString(16).padStart(64, '0')} acme reader\n`)
  const tooMany = files.write('tokens', lines.join(''))
  expect(() => authOf(`tokens:${tooMany}`)).toThrow('100000 tokens at most')
})

describe('a JSON Web Token', () => {
  let issuer: Issuer
  beforeAll(async () => {
    issuer = await startIssuer()
  })
  afterAll(() => issuer?.[Symbol.asyncDispose]())

  test('that was verified is told at once for five minutes, and then verified again', async () => {
    const clock = { ms: Date.now() }
    const auth = authOf(issuer.auth, () => clock.ms)
    const token = bearer(await issuer.sign({ exp: Math.floor(clock.ms / 1000) + 3600 }))
    const first = auth.identify(token)
    expect(first).toBeInstanceOf(Promise)
    expect(auth.identify(token)).toBeInstanceOf(Promise)
    const identity = await first
    expect(auth.identify(token)).toBe(identity)
    clock.ms += 299_999
    expect(auth.identify(token)).toBe(identity)
    clock.ms += 1
    expect(auth.identify(token)).toBeInstanceOf(Promise)
    expect(await auth.identify(token)).toEqual(identity)
  })

  test('that was verified longest ago is forgotten when too many are remembered', async () => {
    const { auth: scheme } = parseConfig({ ITEMCACHE_AUTH: issuer.auth })
    const auth = startAuth(scheme, { log: silent, maxVerified: 2 })
    const tokens = []
    for (const sub of ['a', 'b', 'c']) tokens.push(bearer(await issuer.sign({ sub })))
    for (const token of tokens) await auth.identify(token)
    const isRemembered = tokens.map((token) => !(auth.identify(token) instanceof Promise))
    expect(isRemembered).toEqual([false, true, true])
  })

  test('is not remembered beyond its end', async () => {
    const clock = { ms: Date.now() }
    const auth = authOf(issuer.auth, () => clock.ms)
    const exp = Math.floor(clock.ms / 1000) + 60
    const token = bearer(await issuer.sign({ exp }))
    await auth.identify(token)
    clock.ms = (exp + 5) * 1000 - 1
    expect(auth.identify(token)).toMatchObject({ tenant: 'acme' })
    clock.ms += 1
    await expect(auth.identify(token)).rejects.toThrow('expired')
  })

  test('is verified with the last keys while the issuer does not answer', async () => {
    await using own = await startIssuer()
    const clock = { ms: Date.now() }
    const auth = authOf(own.auth, () => clock.ms)
    const sign = async () => bearer(await own.sign({ exp: Math.floor(clock.ms / 1000) + 3600 }))
    await auth.identify(await sign())
    own.answers = false
    clock.ms += 3_600_000
    vi.useFakeTimers({ toFake: ['Date'], now: clock.ms })
    try {
      expect(await auth.identify(await sign())).toMatchObject({ tenant: 'acme' })
    } finally {
      vi.useRealTimers()
    }
  })

  test('is forgotten when the keys are asked for again', async () => {
    const auth = authOf(issuer.auth)
    const token = bearer(await issuer.sign())
    await auth.identify(token)
    auth.reload()
    expect(auth.identify(token)).toBeInstanceOf(Promise)
    await auth.identify(token)
  })
})
