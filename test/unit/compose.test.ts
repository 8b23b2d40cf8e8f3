/** docker-compose.yml: what runs without a profile, and what the profile `scale` adds. */
import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { parse } from 'yaml'
import { parseConfig } from '../../src/config.ts'

const ROOT = join(import.meta.dirname, '../..')

interface Service {
  readonly image: string
  readonly profiles?: readonly string[]
  readonly environment?: Readonly<Record<string, string>>
  readonly networks?: { readonly default: { readonly aliases: readonly string[] } }
  readonly command?: string
  readonly volumes?: readonly string[]
}

const { services } = parse(readFileSync(join(ROOT, 'docker-compose.yml'), 'utf8'), { merge: true }) as {
  services: Readonly<Record<string, Service>>
}
const withProfile = (profile: string | undefined) =>
  Object.keys(services).filter((name) => services[name]?.profiles?.[0] === profile)

test('without a profile there are the service, Redis and PostgreSQL; with scale, two instances, Prometheus and a load', () => {
  expect(withProfile(undefined)).toEqual(['itemcache', 'redis', 'postgres'])
  expect(withProfile('scale')).toEqual(['itemcache-a', 'itemcache-b', 'load', 'prometheus'])
})

test('every instance is configured by variables that the program understands', () => {
  const instances = Object.values(services).filter(
    ({ image, environment }) => image === 'itemcache:local' && environment,
  )
  expect(instances).toHaveLength(4)
  for (const { environment = {} } of instances) {
    const filled = Object.entries(environment).map(([name, value]) => [
      name,
      value.replace(/\$\{\w+:-([^}]*)\}/g, '$1'),
    ])
    expect(parseConfig(Object.fromEntries(filled)).redis.kind).toBe('url')
  }
})

test('the load and Prometheus find both instances by their one name', () => {
  const { 'itemcache-a': one, 'itemcache-b': two, load, prometheus } = services
  const [name = ''] = one?.networks?.default.aliases ?? []
  expect(two?.networks).toEqual(one?.networks)
  expect(load?.command).toContain(`dns:///${name}:50051`)
  const [, file = ''] = /--config\.file=\/etc\/itemcache\/(\S+)/.exec(prometheus?.command ?? '') ?? []
  expect(prometheus?.volumes).toEqual(['./deploy/prometheus:/etc/itemcache:ro'])
  const path = join(ROOT, 'deploy/prometheus', file)
  expect(existsSync(path)).toBe(true)
  const { scrape_configs: scrapes } = parse(readFileSync(path, 'utf8'))
  expect(scrapes).toMatchObject([{ job_name: 'itemcache', dns_sd_configs: [{ names: [name], port: 9464 }] }])
})
