/** A primary, its replica, and three sentinels that watch them. */
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { type RedisProcess, startRedisProcess } from './redis-process.ts'
import type { RunDirectory } from './run-directory.ts'

export interface Sentinels extends AsyncDisposable {
  readonly primary: RedisProcess
  readonly replica: RedisProcess
  readonly sentinels: readonly RedisProcess[]
  /** As `REDIS_URL` takes it. */
  readonly url: string
}

const COUNT = 3

export async function startSentinels({
  directory,
  name,
  cacheDir,
}: {
  readonly directory: RunDirectory
  readonly name: string
  readonly cacheDir: string
}): Promise<Sentinels> {
  await using started = new AsyncDisposableStack()
  const start = async (what: string, args: (port: number) => readonly string[]) =>
    started.use(await startRedisProcess({ directory, name: `${name}-${what}`, cacheDir, args }))
  const settings = (port: number) => [
    ...['--port', `${port}`, '--bind', '127.0.0.1', '--save', '', '--repl-diskless-sync-delay', '0'],
  ]
  const primary = await start('primary', settings)
  const replica = await start('replica', (port) => [
    ...settings(port),
    ...['--replicaof', `127.0.0.1 ${primary.port}`],
  ])
  const sentinels = await Promise.all(
    Array.from({ length: COUNT }, (_, index) =>
      start(`sentinel-${index}`, (port) => {
        // A sentinel keeps what it learns in its file.
        const file = join(directory.path, `${name}-${index}.conf`)
        const lines = [
          `port ${port}`,
          'bind 127.0.0.1',
          `sentinel monitor shop 127.0.0.1 ${primary.port} 2`,
          'sentinel down-after-milliseconds shop 1000',
          'sentinel failover-timeout shop 5000',
        ]
        writeFileSync(file, `${lines.join('\n')}\n`)
        return [file, '--sentinel']
      }),
    ),
  )
  // They find each other, and the replica, by what they hear from the primary.
  for (const { client } of sentinels) {
    for (;;) {
      const fields = (await client.call('SENTINEL', 'MASTER', 'shop')) as string[]
      const of = (field: string) => fields[fields.indexOf(field) + 1]
      if (of('num-slaves') === '1' && of('num-other-sentinels') === `${COUNT - 1}`) break
      await sleep(50)
    }
  }
  const running = started.move()
  return {
    primary,
    replica,
    sentinels,
    url: `redis+sentinel://${sentinels.map(({ port }) => `127.0.0.1:${port}`).join(',')}/shop`,
    [Symbol.asyncDispose]: () => running.disposeAsync(),
  }
}
