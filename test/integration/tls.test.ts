/** TLS and mTLS, with certificates that change while the service runs. */
import { connect as connectTls } from 'node:tls'
import { credentials, status } from '@grpc/grpc-js'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { newAuthority, type Pair, temporaryFiles } from '../support/credentials.ts'
import { startService, TestClient } from '../support/service.ts'

type Authority = Awaited<ReturnType<typeof newAuthority>>

const files = temporaryFiles()
let authority: Authority
let other: Authority
let server: Pair

beforeAll(async () => {
  authority = await newAuthority('one')
  other = await newAuthority('two')
  server = await authority.issue('server')
})
afterAll(() => files[Symbol.dispose]())

/** The paths of a service's files, and how to replace what is in them. */
function filesOf(name: string, pair: Pair, clientCa?: Authority) {
  const write = ({ cert, key }: Pair) => ({
    ITEMCACHE_TLS_CERT: files.write(`${name}-cert.pem`, cert),
    ITEMCACHE_TLS_KEY: files.write(`${name}-key.pem`, key),
  })
  const ca = clientCa && { ITEMCACHE_TLS_CLIENT_CA: files.write(`${name}-ca.pem`, clientCa.cert) }
  return { env: { ...write(pair), ...ca }, write }
}

/** A call over a new connection, by a client that trusts `root`. */
async function answers(address: string, root: Authority, own?: Pair): Promise<number> {
  const pem = own && { key: Buffer.from(own.key), cert: Buffer.from(own.cert) }
  using client = new TestClient(
    address.replace('127.0.0.1', 'localhost'),
    credentials.createSsl(Buffer.from(root.cert), pem?.key, pem?.cert),
  )
  return await client.call('getItem', { id: '1' }).then(
    () => status.OK,
    (error) => error.code,
  )
}

test('calls go over TLS, and plain ones or those that trust others fail', async () => {
  await using service = await startService({ env: filesOf('plain', server).env })
  expect(await answers(service.address, authority)).toBe(status.OK)
  expect(await answers(service.address, other)).toBe(status.UNAVAILABLE)
  expect((await service.client.failure('getItem', { id: '1' })).code).toBe(status.UNAVAILABLE)
})

test('TLS 1.1 is refused', async () => {
  await using service = await startService({ env: filesOf('old', server).env })
  const port = Number(service.address.split(':')[1])
  const tls = (options: object) => {
    const { promise, resolve } = Promise.withResolvers<string>()
    const socket = connectTls({
      port,
      host: '127.0.0.1',
      ca: authority.cert,
      ALPNProtocols: ['h2'],
      ...options,
    })
    socket.on('secureConnect', () => resolve(socket.getProtocol() ?? ''))
    socket.on('error', () => resolve('refused'))
    return promise.finally(() => socket.destroy())
  }
  expect(await tls({ maxVersion: 'TLSv1.2' })).toBe('TLSv1.2')
  expect(await tls({})).toBe('TLSv1.3')
  const old = { minVersion: 'TLSv1.1', maxVersion: 'TLSv1.1', ciphers: 'DEFAULT@SECLEVEL=0' }
  expect(await tls(old)).toBe('refused')
})

test('with an authority for clients, only those get in whom it has signed', async () => {
  await using service = await startService({ env: filesOf('mutual', server, authority).env })
  expect(await answers(service.address, authority, await authority.issue('client'))).toBe(status.OK)
  expect(await answers(service.address, authority)).toBe(status.UNAVAILABLE)
  expect(await answers(service.address, authority, await other.issue('client'))).toBe(status.UNAVAILABLE)
})

test('a new certificate is taken without a restart, and one that cannot be used is not', async () => {
  const { env, write } = filesOf('changing', server)
  await using service = await startService({ env })
  // A key that does not fit: what a rotation looks like half-way.
  const next = await other.issue('server')
  write({ cert: next.cert, key: server.key })
  service.app.reload()
  expect(await answers(service.address, authority)).toBe(status.OK)
  write({ cert: 'no certificate', key: '' })
  service.app.reload()
  expect(await answers(service.address, authority)).toBe(status.OK)
  write(next)
  service.app.reload()
  expect(await answers(service.address, other)).toBe(status.OK)
  expect(await answers(service.address, authority)).toBe(status.UNAVAILABLE)
})

test('a changed file is noticed by itself', async () => {
  const { env, write } = filesOf('noticed', server)
  await using service = await startService({ env })
  write(await other.issue('server'))
  await expect.poll(() => answers(service.address, other), { timeout: 25_000, interval: 500 }).toBe(status.OK)
})

test('files that cannot be used stop the start, with a sentence that says which and why', async () => {
  const missing = { ...filesOf('missing', server).env, ITEMCACHE_TLS_KEY: '/nowhere/key.pem' }
  await expect(startService({ env: missing })).rejects.toMatchObject({
    reason: 'BAD_TLS_FILES',
    message: '/nowhere/key.pem cannot be read: ENOENT',
  })
  const mixed = filesOf('mixed', { cert: server.cert, key: (await other.issue('x')).key })
  await expect(startService({ env: mixed.env })).rejects.toMatchObject({
    reason: 'BAD_TLS_FILES',
    message: expect.stringContaining('mixed-cert.pem and'),
  })
})
