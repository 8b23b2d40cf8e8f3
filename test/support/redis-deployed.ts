/** A Redis as deploy/redis has it: its settings, users and TLS, but for paths, passwords and sizes of a test. */
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import type { Pair } from './credentials.ts'
import { type RedisProcess, startRedisProcess } from './redis-process.ts'
import type { RunDirectory } from './run-directory.ts'

const DEPLOY = join(import.meta.dirname, '../../deploy/redis')

export interface DeployedRedis extends RedisProcess {
  /** As the service's user, by TLS. */
  readonly url: string
  /** As the administrator. */
  readonly adminUrl: string
}

export interface DeployedOptions {
  readonly directory: RunDirectory
  readonly name: string
  readonly cacheDir: string
  readonly pair: Pair
  /** The certificate of its authority. */
  readonly ca: string
  /** Settings that replace those of the file. */
  readonly settings?: Readonly<Record<string, string>>
  /** Changes the users. */
  readonly users?: (acl: string) => string
}

export async function startDeployedRedis({
  directory,
  name,
  cacheDir,
  pair,
  ca,
  settings = {},
  users = (acl) => acl,
}: DeployedOptions): Promise<DeployedRedis> {
  const files = join(directory.path, `${name}-files`)
  mkdirSync(files)
  const put = (file: string, text: string) => {
    writeFileSync(join(files, file), text)
    return join(files, file)
  }
  const caFile = put('ca.crt', ca)
  const paths: Record<string, string> = {
    'tls-cert-file': put('tls.crt', pair.cert),
    'tls-key-file': put('tls.key', pair.key),
    'tls-ca-cert-file': caFile,
    aclfile: put('users.acl', users(readFileSync(join(DEPLOY, 'users.acl'), 'utf8'))),
    maxmemory: '64mb',
    bind: '127.0.0.1',
    ...settings,
  }
  const lines = readFileSync(join(DEPLOY, 'redis.conf'), 'utf8').split('\n')
  const conf = put(
    'redis.conf',
    lines
      .map((line) => {
        const [setting = ''] = line.split(' ')
        return paths[setting] === undefined ? line : `${setting} ${paths[setting]}`
      })
      .join('\n'),
  )
  const server = await startRedisProcess({
    directory,
    name,
    cacheDir,
    args: (port) => [conf, '--tls-port', `${port}`],
    connect: { username: 'admin', password: 'CHANGE-ME-ADMIN', tls: { ca } },
  })
  const urlAs = (user: string, password: string) =>
    `rediss://${user}:${password}@127.0.0.1:${server.port}?ca=${encodeURIComponent(caFile)}`
  return Object.assign(server, {
    url: urlAs('itemcache', 'CHANGE-ME-SERVICE'),
    adminUrl: urlAs('admin', 'CHANGE-ME-ADMIN'),
  })
}
