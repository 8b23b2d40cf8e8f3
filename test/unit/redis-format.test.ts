import { crc32 } from 'node:zlib'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { decodeCopy, encodeCopy, FORMAT_VERSION, redisKey } from '../../src/tiers/redis-format.ts'
import { describeRedis, parseRedisUrl } from '../../src/tiers/redis-url.ts'
import type { Copy } from '../../src/tiers/tier.ts'

const TTL_MS = 300_000

const revision = fc.oneof(
  fc.nat(),
  fc.maxSafeNat(),
  fc.constant(Number.MAX_SAFE_INTEGER),
  fc.constant(2 ** 40),
)

const copies: fc.Arbitrary<Copy> = fc
  .record({
    id: fc.string({ unit: 'binary' }),
    asOf: revision,
    bytes: fc.option(fc.uint8Array({ maxLength: 300 }), { nil: undefined }),
    revision,
    tags: fc.array(fc.string({ unit: 'binary', maxLength: 64 }), { maxLength: 33 }),
    verifiedAtMs: fc.integer({ min: -1_000_000, max: 1_000_000 }),
    freshUntilMs: fc.integer({ min: -1_000_000, max: 10_000_000 }),
  })
  .filter(({ tags }) => tags.every((tag) => tag.isWellFormed()))

const sample: Copy = {
  id: '1',
  asOf: 2 ** 40 + 7,
  bytes: Uint8Array.of(1, 2, 3),
  revision: 7,
  tags: ['red', 'größe'],
  verifiedAtMs: 900,
  freshUntilMs: 60_900,
}

describe('a value in Redis', () => {
  test('gives back the copy it was made of, aged by the TTL that has passed, on the clock of the reader', () => {
    fc.assert(
      fc.property(copies, fc.nat({ max: TTL_MS }), fc.integer(), (copy, elapsedMs, readerMs) => {
        const nowMs = 1_000_000
        const value = encodeCopy(copy, nowMs, TTL_MS)
        expect(decodeCopy(copy.id, value, TTL_MS - elapsedMs, readerMs)).toEqual({
          ...copy,
          verifiedAtMs: readerMs - elapsedMs - (nowMs - copy.verifiedAtMs),
          freshUntilMs: readerMs - elapsedMs + (copy.freshUntilMs - nowMs),
        })
      }),
    )
  })

  test('keeps an absent item apart from an empty one', () => {
    const absent = { ...sample, bytes: undefined, tags: [] }
    expect(decodeCopy('1', encodeCopy(absent, 0, TTL_MS), TTL_MS, 0)?.bytes).toBeUndefined()
    const empty = { ...sample, bytes: new Uint8Array() }
    expect(decodeCopy('1', encodeCopy(empty, 0, TTL_MS), TTL_MS, 0)?.bytes).toEqual(new Uint8Array())
  })

  test('holds whatever text was made a tag, however long', () => {
    const long = { ...sample, tags: ['x'.repeat(70_000), ''] }
    expect(decodeCopy('1', encodeCopy(long, 0, TTL_MS), TTL_MS, 0)?.tags).toEqual(long.tags)
  })

  test('is a miss when it is random bytes', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 200 }), fc.boolean(), (bytes, versioned) => {
        if (versioned && bytes.length > 0) bytes[0] = FORMAT_VERSION
        expect(decodeCopy('1', Buffer.from(bytes), 1_000, 0)).toBeUndefined()
      }),
    )
  })

  test('is a miss when it is cut off anywhere or has bytes to spare', () => {
    fc.assert(
      fc.property(copies, fc.double({ min: 0, max: 1, maxExcluded: true, noNaN: true }), (copy, share) => {
        const value = encodeCopy(copy, 0, TTL_MS)
        const cut = value.subarray(0, Math.floor(value.length * share))
        expect(decodeCopy(copy.id, cut, 1_000, 0)).toBeUndefined()
        expect(decodeCopy(copy.id, Buffer.concat([value, Buffer.of(0)]), 1_000, 0)).toBeUndefined()
      }),
    )
  })

  test('is a miss when its parts do not add up, even under a right checksum', () => {
    const value = encodeCopy({ ...sample, bytes: undefined, tags: ['red'] }, 0, TTL_MS)
    const damages: [number, number][] = [
      [1, 2],
      [1, 0xff],
      [2, 0xff],
      [10, 0xff],
      [22, 0xff],
      [45, 2],
      [42, 0xff],
      [46, 0xff],
      [49, 2],
      [49, 9],
    ]
    for (const [at, byte] of damages) {
      const damaged = Buffer.from(value)
      damaged[at] = byte
      damaged.writeUInt32BE(crc32(damaged.subarray(42), crc32(damaged.subarray(0, 38))), 38)
      expect(decodeCopy('1', damaged, TTL_MS, 0), `byte ${at}`).toBeUndefined()
    }
  })

  test('is a miss when any one bit of it has flipped', () => {
    const value = encodeCopy(sample, 1_000, TTL_MS)
    for (let bit = 0; bit < value.length * 8; bit += 1) {
      const damaged = Buffer.from(value)
      damaged.writeUInt8(damaged.readUInt8(bit >> 3) ^ (1 << (bit & 7)), bit >> 3)
      expect(decodeCopy('1', damaged, 1_000, 0), `bit ${bit}`).toBeUndefined()
    }
  })

  test('is a miss when its TTL was taken away, as nothing says how old it is', () => {
    expect(decodeCopy('1', encodeCopy(sample, 1_000, TTL_MS), -1, 5_000)).toBeUndefined()
  })

  test('is never dated into the future when it replaced a value between the TTL and the read', () => {
    const value = encodeCopy(sample, 1_000, TTL_MS)
    for (const leftMs of [-2, TTL_MS + 30_000]) {
      expect(decodeCopy('1', value, leftMs, 5_000)).toMatchObject({
        verifiedAtMs: 4_900,
        freshUntilMs: 64_900,
      })
    }
    expect(decodeCopy('1', value, 1, 5_000)?.verifiedAtMs).toBe(4_900 - (TTL_MS - 1))
  })

  test('shares no memory with the buffer it was read into', () => {
    const socketRead = Buffer.concat([Buffer.alloc(65_536), encodeCopy(sample, 1_000, TTL_MS)])
    const bytes = decodeCopy('1', socketRead.subarray(65_536), TTL_MS, 0)?.bytes
    expect(bytes).toEqual(sample.bytes)
    expect(bytes?.buffer.byteLength).toBe(3)
  })
})

describe('a key in Redis', () => {
  const part = fc.oneof(
    fc.string({ unit: 'binary' }).filter((text) => text.isWellFormed()),
    fc
      .array(
        fc.constantFrom(
          ':',
          '::',
          '{',
          '}',
          '{x}',
          '%',
          '%3A',
          '%25',
          '1',
          '12',
          'ic',
          '1:',
          '\r\n',
          '*',
          '😀',
        ),
        {
          maxLength: 5,
        },
      )
      .map((parts) => parts.join('')),
  )

  test('belongs to one tenant and id only', () => {
    fc.assert(
      fc.property(part, part, part, part, (tenant, id, otherTenant, otherId) => {
        fc.pre(tenant !== otherTenant || id !== otherId)
        expect(redisKey('p', tenant, id)).not.toBe(redisKey('p', otherTenant, otherId))
      }),
      { numRuns: 5_000 },
    )
    // The same characters cut elsewhere: what a separator alone would confuse.
    fc.assert(
      fc.property(part, fc.nat(), fc.nat(), (text, a, b) => {
        const [i, j] = [a % (text.length + 1), b % (text.length + 1)]
        const [one, other] = [
          [text.slice(0, i), text.slice(i)],
          [text.slice(0, j), text.slice(j)],
        ] as const
        fc.pre(i !== j && [...one, ...other].every((each) => each.isWellFormed()))
        expect(redisKey('p', ...one)).not.toBe(redisKey('p', ...other))
      }),
      { numRuns: 5_000 },
    )
  })

  test('has the documented form, prints safely and leaves the cluster slot to the whole key', () => {
    expect(redisKey('7312:0', 'acme', 'a:b{c}')).toBe('ic:1:7312%3A0:acme:a%3Ab%7Bc%7D')
    fc.assert(
      fc.property(part, part, part, (prefix, tenant, id) => {
        expect(redisKey(prefix, tenant, id)).toMatch(/^ic:1(:[\w.!~*'()%-]*){3}$/)
      }),
    )
  })

  test('is the same at every instance', () => {
    expect(redisKey('p', 'acme', '42')).toBe('ic:1:p:acme:42')
  })
})

describe('a Redis URL', () => {
  test('may name a host, a database, credentials, a socket, TLS or the nodes of a cluster', () => {
    expect(parseRedisUrl('redis://localhost')).toMatchObject({
      nodes: [{ host: 'localhost', port: 6379 }],
      db: 0,
    })
    expect(parseRedisUrl('redis://ann:p%40ss%2C@[::1]:7000/3')).toMatchObject({
      nodes: [{ host: '::1', port: 7000 }],
      username: 'ann',
      password: 'p@ss,',
      db: 3,
      tls: undefined,
    })
    expect(parseRedisUrl('unix:/run/a%20b.sock?db=2')).toMatchObject({
      nodes: [],
      path: '/run/a%20b.sock',
      db: 2,
    })
    expect(parseRedisUrl('unix:///run/redis.sock')).toMatchObject({ path: '/run/redis.sock' })
    expect(parseRedisUrl('rediss://h?insecure=true').tls).toEqual({ rejectUnauthorized: false })
    expect(parseRedisUrl('redis://:pw@a:1, redis://b').nodes).toEqual([
      { host: 'a', port: 1 },
      { host: 'b', port: 6379 },
    ])
  })

  test.each([
    'http://h',
    'localhost:6379',
    'redis://',
    'unix:relative.sock',
    'unix:/a.sock,unix:/b.sock',
    'redis://h/name',
    'redis://a/1,redis://b/1',
    'redis://a,rediss://b',
    'redis://a,nonsense',
    'redis://u:secret%@h',
    'rediss://h?ca=/does/not/exist',
    '',
  ])('that is wrong is refused without being repeated: %s', (url) => {
    expect(() => parseRedisUrl(url)).toThrow(/^(?!.*secret)(must|needs|a cluster|has|the file)/)
  })

  test('is described without its passwords and options', () => {
    expect(describeRedis('redis://ann:secret@h:7000/3,redis://:secret@i')).toBe(
      'redis://ann:***@h:7000/3,redis://:***@i',
    )
    expect(describeRedis('rediss://h?key=/secret.pem')).toBe('rediss://h')
    expect(describeRedis('unix:/run/redis.sock')).toBe('unix:/run/redis.sock')
    expect(describeRedis('secret')).toBe('(not a URL)')
  })
})
