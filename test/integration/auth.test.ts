/** Credentials: who is let in, to which tenant, and for how long. */
import { connect } from 'node:http2'
import { Writable } from 'node:stream'
import { create, toBinary } from '@bufbuild/protobuf'
import { type ServiceError, status } from '@grpc/grpc-js'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { GetItemRequestSchema, ItemCacheService } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { createLogger } from '../../src/observe/log.ts'
import {
  bearing,
  type Issuer,
  newToken,
  startIssuer,
  temporaryFiles,
  tokenLine,
} from '../support/credentials.ts'
import {
  type CallOptions,
  failureOf,
  startService,
  type TestClient,
  type TestService,
} from '../support/service.ts'
import { unlessStalled } from '../support/stalls.ts'

const ROLES = ['reader', 'writer', 'admin'] as const

async function itemOf(client: TestClient, request: { id: string }, options: CallOptions) {
  const { result } = await client.call('getItem', request, options)
  return result.case === 'item' ? result.value : undefined
}

/** A logger of everything. */
function logInto(lines: string[]) {
  const destination = new Writable({
    write(line, _, done) {
      lines.push(String(line))
      done()
    },
  })
  return createLogger({ level: 'trace', version: 'test', destination })
}

/** What the stream of a caller ends with. */
async function endOf(stream: AsyncIterable<unknown>) {
  try {
    for await (const _ of stream);
  } catch (error) {
    return failureOf(error as ServiceError)
  }
  return undefined
}

/** The gRPC status of a GetItem with these headers besides the needed ones, sent as they are. */
async function rawStatus(address: string, headers: readonly string[]): Promise<number> {
  // The types do not know this option yet.
  const options: object = { strictSingleValueFields: false }
  const session = connect(`http://${address}`, options)
  try {
    const stream = session.request([
      ':method',
      'POST',
      ':path',
      `/${ItemCacheService.typeName}/GetItem`,
      'content-type',
      'application/grpc',
      'te',
      'trailers',
      ...headers,
    ])
    const message = toBinary(GetItemRequestSchema, create(GetItemRequestSchema, { id: '1' }))
    stream.end(Buffer.concat([Buffer.from([0, 0, 0, 0, message.byteLength]), message]))
    const { promise, resolve, reject } = Promise.withResolvers<number>()
    const look = (found: Record<string, unknown>) => {
      if (found['grpc-status'] !== undefined) resolve(Number(found['grpc-status']))
    }
    stream.on('response', look)
    stream.on('trailers', look)
    stream.on('error', reject)
    stream.resume()
    return await promise
  } finally {
    session.close()
  }
}

describe('with a token file', () => {
  const tokens = {
    reader: newToken(),
    writer: newToken(),
    admin: newToken(),
    other: newToken(),
    expired: newToken(),
    brief: newToken(),
  }
  const files = temporaryFiles()
  const content = [
    '# who may do what',
    tokenLine(tokens.reader, 'acme', 'reader'),
    tokenLine(tokens.writer, 'acme', 'writer'),
    tokenLine(tokens.admin, 'acme', 'admin'),
    tokenLine(tokens.other, 'globex', 'admin'),
    tokenLine(tokens.expired, 'acme', 'admin', '2020-01-01T00:00:00Z'),
  ].join('\n')
  const logged: string[] = []
  let service: TestService

  beforeAll(async () => {
    service = await startService({
      env: { ITEMCACHE_AUTH: `tokens:${files.write('tokens', content)}` },
      app: { log: logInto(logged) },
    })
  })
  afterAll(async () => {
    await service?.[Symbol.asyncDispose]()
    files[Symbol.dispose]()
  })

  test('the tenant is the one of the token, and x-tenant-id beside it is ignored', async () => {
    const { client } = service
    await client.call('createItem', { item: { id: 'mine', title: 'Lamp' } }, bearing(tokens.writer))
    const lie = { metadata: { ...bearing(tokens.other).metadata, 'x-tenant-id': 'acme' } }
    expect((await client.failure('getItem', { id: 'mine' }, lie)).code).toBe(status.NOT_FOUND)
    expect((await itemOf(client, { id: 'mine' }, bearing(tokens.reader)))?.title).toBe('Lamp')
  })

  test.each([
    ['none', {}, 'CREDENTIAL_MISSING'],
    ['only a tenant', { 'x-tenant-id': 'acme' }, 'CREDENTIAL_MISSING'],
    ['a token that nobody has', bearing(newToken()).metadata, 'CREDENTIAL_INVALID'],
    ['a token without its scheme', { authorization: tokens.admin }, 'CREDENTIAL_INVALID'],
    ['another scheme', { authorization: `Basic ${tokens.admin}` }, 'CREDENTIAL_INVALID'],
    [
      'two tokens in one',
      { authorization: `Bearer ${tokens.admin}, Bearer ${tokens.admin}` },
      'CREDENTIAL_INVALID',
    ],
    ['nothing behind the scheme', { authorization: 'Bearer' }, 'CREDENTIAL_INVALID'],
    ['a token that has expired', bearing(tokens.expired).metadata, 'CREDENTIAL_EXPIRED'],
  ])('a call with %s is UNAUTHENTICATED, whatever it asks for', async (_, metadata, reason) => {
    for (const id of ['1', 'not-there', '']) {
      const failure = await service.client.failure('getItem', { id }, { metadata })
      expect(failure).toMatchObject({ code: status.UNAUTHENTICATED, info: { reason }, badRequest: undefined })
    }
  })

  test('several authorization headers are UNAUTHENTICATED, even if each is good', async () => {
    const good = ['authorization', `Bearer ${tokens.reader}`]
    expect(await rawStatus(service.address, good)).toBe(status.OK)
    expect(await rawStatus(service.address, [...good, ...good])).toBe(status.UNAUTHENTICATED)
    expect(await rawStatus(service.address, [...good, 'authorization', 'x'])).toBe(status.UNAUTHENTICATED)
    expect(await rawStatus(service.address, ['x-note', 'authorization', ...good])).toBe(status.OK)
  })

  /** The least role for each method, as docs/security.md has it. */
  const least: Readonly<Record<string, (typeof ROLES)[number]>> = {
    GetItem: 'reader',
    BatchGetItems: 'reader',
    StreamItems: 'reader',
    ListItems: 'reader',
    InspectItem: 'reader',
    WatchInvalidations: 'reader',
    CreateItem: 'writer',
    UpdateItem: 'writer',
    DeleteItem: 'writer',
    InvalidateItems: 'writer',
    GetMetrics: 'admin',
    WatchMetrics: 'admin',
  }

  test.each(ItemCacheService.methods.map((method) => [method.name, method] as const))(
    '%s is denied to every role below its own, before the request is looked at',
    async (name, method) => {
      for (const role of ROLES) {
        const { promise, resolve } = Promise.withResolvers<number>()
        const metadata = new (await import('@grpc/grpc-js')).Metadata()
        metadata.set('authorization', `Bearer ${tokens[role]}`)
        // No request at all is not valid for most of them; for the streams a code is all there is to wait for.
        const call = service.client.raw.makeServerStreamRequest(
          `/${ItemCacheService.typeName}/${name}`,
          (bytes: Buffer) => bytes,
          (bytes: Buffer) => bytes,
          Buffer.from([0xff]),
          metadata,
        )
        call.on('data', () => call.cancel())
        call.on('error', (error: ServiceError) => resolve(error.code))
        call.on('end', () => resolve(status.OK))
        const code = await promise
        const may = ROLES.indexOf(role) >= ROLES.indexOf(least[name] ?? 'admin')
        if (method.methodKind === 'bidi_streaming' && may) expect(code).not.toBe(status.PERMISSION_DENIED)
        else
          expect([name, role, code]).toEqual([
            name,
            role,
            may ? status.INVALID_ARGUMENT : status.PERMISSION_DENIED,
          ])
      }
    },
  )

  test('health needs no credential', async () => {
    expect(least).toEqual(
      Object.fromEntries(ItemCacheService.methods.map(({ name }) => [name, expect.any(String)])),
    )
    const { promise, resolve } = Promise.withResolvers<unknown>()
    service.client.raw.makeUnaryRequest(
      '/grpc.health.v1.Health/Check',
      () => Buffer.alloc(0),
      (bytes: Buffer) => bytes,
      {},
      (error, answer) => resolve(error ?? [...(answer ?? [])]),
    )
    expect(await promise).toEqual([8, 1])
  })

  describe('another tenant', () => {
    const mine = bearing(tokens.admin)
    const others = bearing(tokens.other)

    test('has its own items under the same ids, in every tier', async () => {
      const { client } = service
      await client.call('createItem', { item: { id: 'same', title: 'of acme', tags: ['t'] } }, mine)
      await client.call('getItem', { id: 'same' }, mine)
      expect((await client.failure('getItem', { id: 'same' }, others)).code).toBe(status.NOT_FOUND)
      const inspected = await client.call('inspectItem', { id: 'same' }, others)
      expect(inspected.tiers.filter(({ present, negative }) => present && !negative)).toEqual([])
      for (const name of ['updateItem', 'deleteItem'] as const) {
        const request = name === 'updateItem' ? { item: { id: 'same', title: 'x' } } : { id: 'same' }
        expect((await client.failure(name, request, others)).code).toBe(status.NOT_FOUND)
      }
      await client.call('createItem', { item: { id: 'same', title: 'of globex' } }, others)
      expect((await itemOf(client, { id: 'same' }, mine))?.title).toBe('of acme')
    })

    test('finds nothing by tag or category, and cannot use a page token', async () => {
      const { client } = service
      for (const id of ['p1', 'p2', 'p3']) {
        await client.call('createItem', { item: { id, title: 'x', tags: ['paged'], category: 'c' } }, mine)
      }
      const page = await client.call('listItems', { pageSize: 1, tag: 'paged' }, mine)
      expect(page.nextPageToken).not.toBe('')
      for (const filter of [{ tag: 'paged' }, { category: 'c' }]) {
        expect((await client.call('listItems', filter, others)).items).toEqual([])
      }
      const stolen = { pageSize: 1, tag: 'paged', pageToken: page.nextPageToken }
      const outcome = await client.call('listItems', stolen, others).catch((error) => failureOf(error))
      // A token is a place in an order of ids: elsewhere it is another place, or none.
      if ('items' in outcome) expect(outcome.items).toEqual([])
      else expect(outcome.code).toBe(status.INVALID_ARGUMENT)
    })

    test('invalidates its own copies only', async () => {
      const { client } = service
      await client.call('createItem', { item: { id: 'kept', title: 'x', tags: ['warm'] } }, mine)
      await unlessStalled(async () => {
        const { revision } = await client.call('getItem', { id: 'kept' }, mine)
        for (const target of [
          { case: 'ids' as const, value: { ids: ['kept'] } },
          { case: 'tags' as const, value: { tags: ['warm'] } },
          { case: 'all' as const, value: true },
        ]) {
          await client.call('invalidateItems', { target }, others)
        }
        const again = await client.call('getItem', { id: 'kept' }, mine)
        expect(again.revision).toBe(revision)
        expect(again.cache?.tier).toBe(1)
      })
    })

    test('gets nothing of the stream, and a cursor from elsewhere shows nothing of elsewhere', async () => {
      const { client } = service
      await client.call('createItem', { item: { id: 'secret-1', title: 'x' } }, mine)
      await client.call('createItem', { item: { id: 'public-1', title: 'x' } }, others)
      const seen: string[] = []
      for await (const { event } of client.stream('watchInvalidations', { resumeAfter: 0n }, others)) {
        if (event.case === 'batch') seen.push(...event.value.events.flatMap(({ ids }) => ids))
        if (seen.includes('public-1')) break
      }
      expect(seen).not.toContain('secret-1')
    })

    test('a request id of another tenant replays nothing', async () => {
      const { client } = service
      const request = { item: { id: 'once', title: 'x' }, requestId: 'r-1' }
      const first = await client.call('createItem', request, mine)
      const second = await client.call('createItem', request, others)
      expect(second.item?.etag === first.item?.etag && second.revision === first.revision).toBe(false)
      expect((await client.call('createItem', request, mine)).revision).toBe(first.revision)
    })
  })

  test('the file is read again on demand: new tokens work, withdrawn ones do not, and their streams end', async () => {
    const { client } = service
    const added = newToken()
    const [leaving, staying] = [newToken(), newToken()]
    const write = (...lines: string[]) => files.write('tokens', [content, ...lines].join('\n'))
    write(tokenLine(leaving, 'acme', 'reader'), tokenLine(staying, 'acme', 'reader'))
    service.app.reload()
    const left = endOf(client.stream('watchInvalidations', {}, bearing(leaving)))
    const stream = client.stream(
      'watchInvalidations',
      { heartbeatInterval: { nanos: 100_000_000 } },
      bearing(staying),
    )
    await stream.next()

    write(tokenLine(staying, 'acme', 'reader'), tokenLine(added, 'acme', 'reader'))
    service.app.reload()
    expect((await client.failure('getItem', { id: '1' }, bearing(leaving))).code).toBe(status.UNAUTHENTICATED)
    expect((await itemOf(client, { id: '1' }, bearing(added)))?.id).toBe('1')
    expect((await left)?.code).toBe(status.UNAUTHENTICATED)
    expect((await stream.next()).done).toBe(false)

    write('nonsense')
    service.app.reload()
    expect((await itemOf(client, { id: '1' }, bearing(added)))?.id).toBe('1')
    expect(logged.join('')).toMatch(/tokens:\d+: a line must begin with the SHA-256/)
    await stream.return(undefined)
  })

  test('a stream ends when its token expires', async () => {
    const until = new Date(Date.now() + 1500).toISOString()
    files.write('tokens', `${content}\n${tokenLine(tokens.brief, 'acme', 'admin', until)}`)
    service.app.reload()
    const ends = await Promise.all([
      endOf(service.client.stream('watchInvalidations', {}, bearing(tokens.brief))),
      endOf(service.client.stream('watchMetrics', {}, bearing(tokens.brief))),
    ])
    for (const end of ends) {
      expect(end).toMatchObject({ code: status.UNAUTHENTICATED, info: { reason: 'CREDENTIAL_EXPIRED' } })
    }
  })

  test('no token and no digest of one is ever logged', () => {
    const text = logged.join('')
    expect(text).toContain('"method":"itemcache.v1.ItemCacheService/GetItem"')
    for (const token of Object.values(tokens)) {
      expect(text).not.toContain(token)
      expect(text).not.toContain(tokenLine(token, '', '').slice(0, 64))
    }
  })

  test('mistakes in the file are all told at the start, with their lines and without what stands there', async () => {
    const token = newToken()
    const bad = [
      tokenLine(token, 'acme', 'reader').trim(),
      `${token} acme reader`,
      tokenLine(newToken(), 'acme', 'owner').trim(),
      tokenLine(newToken(), 'acme', 'reader', 'tomorrow').trim(),
      `${tokenLine(token, 'acme', 'reader').trim()} # again`,
      `${tokenLine(newToken(), 'acme', 'reader', '2030-01-01T00:00:00Z').trim()} more`,
    ].join('\n')
    const path = files.write('bad', bad)
    const error = await startService({ env: { ITEMCACHE_AUTH: `tokens:${path}` } }).catch((thrown) => thrown)
    const { message } = error as Error
    expect(message.split('\n').map((line) => line.slice(path.length))).toEqual([
      expect.stringMatching(/^:2: a line must begin/),
      expect.stringMatching(/^:3: the third word must be a role/),
      expect.stringMatching(/^:4: the fourth word must be an expiry/),
      expect.stringMatching(/^:5: this token is on line 1, too/),
      expect.stringMatching(/^:6: there must be at most four words/),
    ])
    expect(message).not.toContain(token)
    for (const env of [
      { ITEMCACHE_AUTH: 'tokens:/nowhere' },
      { ITEMCACHE_AUTH: `tokens:${files.write('e', '')}` },
    ]) {
      await expect(startService({ env })).rejects.toMatchObject({ reason: 'BAD_TOKEN_FILE' })
    }
  })
})

describe('with JSON Web Tokens', () => {
  let issuer: Issuer
  let service: TestService

  beforeAll(async () => {
    issuer = await startIssuer()
    service = await startService({ env: { ITEMCACHE_AUTH: issuer.auth } })
  })
  afterAll(async () => {
    await service?.[Symbol.asyncDispose]()
    await issuer?.[Symbol.asyncDispose]()
  })

  test('tenant and role are claims of the token', async () => {
    const { client } = service
    const writer = bearing(await issuer.sign({ role: 'writer' }))
    const stranger = bearing(await issuer.sign({ tenant: 'globex' }))
    await client.call('createItem', { item: { id: 'j', title: 'Lamp' } }, writer)
    expect((await client.failure('getItem', { id: 'j' }, stranger)).code).toBe(status.NOT_FOUND)
    expect((await client.failure('deleteItem', { id: 'j' }, stranger)).code).toBe(status.PERMISSION_DENIED)
    const several = bearing(await issuer.sign({ role: ['something', 'reader', 'admin'] }))
    expect((await client.call('getMetrics', {}, several)).snapshot).toBeDefined()
    for (const role of ['', 'root', 7, undefined, { admin: true }]) {
      const powerless = bearing(await issuer.sign({ role }))
      expect((await client.failure('getItem', { id: 'j' }, powerless)).code).toBe(status.PERMISSION_DENIED)
    }
  })

  test.each<[string, () => Promise<string>]>([
    ['of another issuer', () => issuer.sign({ iss: 'https://issuer.example' })],
    ['for another audience', () => issuer.sign({ aud: 'bank' })],
    ['without an end', () => issuer.sign({ exp: undefined as unknown as number })],
    ['that is not valid yet', () => issuer.sign({ nbf: Math.floor(Date.now() / 1000) + 600 })],
    ['of an unknown key', () => issuer.sign({}, { kid: 'two' })],
    ['without a tenant', () => issuer.sign({ tenant: undefined })],
    ['whose tenant is no name', () => issuer.sign({ tenant: 'a b' })],
    ['whose tenant is a list', () => issuer.sign({ tenant: ['acme'] })],
    [
      'that was changed after it was signed',
      async () => {
        const [header, , signature] = (await issuer.sign()).split('.')
        const claims = { iss: issuer.issuer, aud: 'shop', exp: 9e9, tenant: 'acme', role: 'admin' }
        return `${header}.${Buffer.from(JSON.stringify(claims)).toString('base64url')}.${signature}`
      },
    ],
    [
      'without a signature',
      async () => {
        const claims = { iss: issuer.issuer, aud: 'shop', exp: 9e9, tenant: 'acme', role: 'admin' }
        const part = (value: object) => Buffer.from(JSON.stringify(value)).toString('base64url')
        return `${part({ alg: 'none' })}.${part(claims)}.`
      },
    ],
    ['that is none', async () => 'abc'],
  ])('a token %s is UNAUTHENTICATED', async (_, make) => {
    const failure = await service.client.failure('getItem', { id: '1' }, bearing(await make()))
    expect(failure).toMatchObject({ code: status.UNAUTHENTICATED, info: { reason: 'CREDENTIAL_INVALID' } })
  })

  test('a token that has expired says so, and a stream ends when its token does', async () => {
    const past = bearing(await issuer.sign({ exp: Math.floor(Date.now() / 1000) - 60 }))
    expect(await service.client.failure('getItem', { id: '1' }, past)).toMatchObject({
      code: status.UNAUTHENTICATED,
      info: { reason: 'CREDENTIAL_EXPIRED' },
    })
    // Within the tolerance for the issuer's clock.
    const brief = bearing(await issuer.sign({ exp: Math.floor(Date.now() / 1000) - 3 }))
    expect(await endOf(service.client.stream('watchInvalidations', {}, brief))).toMatchObject({
      code: status.UNAUTHENTICATED,
      info: { reason: 'CREDENTIAL_EXPIRED' },
    })
  })

  test('while the keys cannot be had, callers are told to come again, and known tokens go on', async () => {
    await using own = await startIssuer()
    const lines: string[] = []
    await using other = await startService({
      env: { ITEMCACHE_AUTH: own.auth },
      app: { log: logInto(lines) },
    })
    own.answers = false
    const jwt = await own.sign()
    const token = bearing(jwt)
    expect(await other.client.failure('getItem', { id: '1' }, token)).toMatchObject({
      code: status.UNAVAILABLE,
      info: { reason: 'KEYS_UNAVAILABLE' },
    })
    own.answers = true
    expect((await itemOf(other.client, { id: '1' }, token))?.id).toBe('1')
    own.answers = false
    expect((await itemOf(other.client, { id: '1' }, token))?.id).toBe('1')
    expect(lines.join('')).toContain('the keys of the issuer cannot be had')
    for (const part of jwt.split('.').slice(1)) expect(lines.join('')).not.toContain(part)
  })

  test('the keys may come from a file, which is read again on demand', async () => {
    using files = temporaryFiles()
    await using next = await startIssuer()
    const path = files.write('keys.json', issuer.keySet)
    await using own = await startService({
      env: { ITEMCACHE_AUTH: `jwt:${issuer.issuer}?audience=shop&jwks=${path}` },
    })
    const [former, later] = [bearing(await issuer.sign()), bearing(await next.sign())]
    expect((await itemOf(own.client, { id: '1' }, former))?.id).toBe('1')
    files.write('keys.json', 'no JSON')
    own.app.reload()
    expect((await itemOf(own.client, { id: '1' }, former))?.id).toBe('1')
    files.write('keys.json', next.keySet)
    own.app.reload()
    expect((await own.client.failure('getItem', { id: '1' }, former)).code).toBe(status.UNAUTHENTICATED)
    expect((await itemOf(own.client, { id: '1' }, later))?.id).toBe('1')
  })
})

test('a tenant that calls too often is told when to come again, and others are not', async () => {
  await using service = await startService({ env: { ITEMCACHE_RATE_LIMIT: '1:3' }, app: { now: () => 1000 } })
  const as = (tenant: string) => ({ metadata: { 'x-tenant-id': tenant } })
  for (let i = 0; i < 3; i++) await service.client.call('getMetrics', {}, as('loud'))
  expect(await service.client.failure('getMetrics', {}, as('loud'))).toMatchObject({
    code: status.RESOURCE_EXHAUSTED,
    info: { reason: 'RATE_LIMITED' },
    retry: { retryDelay: { seconds: 1n } },
  })
  await service.client.call('getMetrics', {}, as('quiet'))
})
