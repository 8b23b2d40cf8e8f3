import { describe, expect, test } from 'vitest'
import { parseConfig } from '../../src/config.ts'
import { describeRedis, parseRedisUrl } from '../../src/tiers/redis-url.ts'

describe('a URL of sentinels', () => {
  test('names the sentinels, the primary that they watch, and the credentials of both', () => {
    expect(
      parseRedisUrl(
        'redis+sentinel://itemcache:p%40ss%2Cword@one:26379,two,[::1]:26380/shop/3?sentinel-username=s&sentinel-password=t',
      ),
    ).toEqual({
      nodes: [
        { host: 'one', port: 26379 },
        { host: 'two', port: 26379 },
        { host: '::1', port: 26380 },
      ],
      path: undefined,
      username: 'itemcache',
      password: 'p@ss,word',
      db: 3,
      tls: undefined,
      sentinel: { name: 'shop', username: 's', password: 't' },
    })
  })

  test('asks for TLS as other URLs do', () => {
    expect(parseRedisUrl('rediss+sentinel://one/shop?insecure=true').tls).toEqual({
      rejectUnauthorized: false,
    })
    expect(parseRedisUrl('rediss+sentinel://one/shop').tls).toEqual({})
    expect(() => parseRedisUrl('rediss+sentinel://one/shop?ca=/nowhere')).toThrow('the file that ca names')
  })

  test.each([
    ['redis+sentinel://one:26379', 'must name sentinels and a primary'],
    ['redis+sentinel:///shop', 'must name sentinels and a primary'],
    ['redis+sentinel://one,/shop', 'must name sentinels and a primary'],
    ['redis+sentinel://one:port/shop', 'must name sentinels and a primary'],
    ['redis+sentinel://one/', 'must name the primary'],
    ['redis+sentinel://one/shop/first', 'a database by its number'],
    ['redis+sentinel://one/shop/0/1', 'a database by its number'],
    ['redis+sentinel://u:%zz@one/shop', 'a percent sign'],
    ['sentinel://one/shop', 'must be redis://'],
  ])('%s is refused', (url, rule) => {
    expect(() => parseRedisUrl(url)).toThrow(rule)
  })

  test('is described, and refused, without its passwords', () => {
    const url = 'redis+sentinel://itemcache:hunter2@one:26379,two:26379/shop?sentinel-password=hunter3'
    expect(describeRedis(url)).toBe('redis+sentinel://itemcache:***@one:26379,two:26379/shop')
    const wrong = url.replace('/shop', '/')
    expect(() => parseConfig({ REDIS_URL: wrong })).toThrow(/must name the primary/)
    expect(() => parseConfig({ REDIS_URL: wrong })).not.toThrow(/hunter/)
    expect(parseConfig({ REDIS_URL: url }).redis).toEqual({ kind: 'url', url })
  })
})
