/** Redis servers as processes of their own, with any settings: nodes of a cluster, sentinels, servers with TLS. */
import { type ChildProcess, spawn } from 'node:child_process'
import { randomInt } from 'node:crypto'
import { once } from 'node:events'
import { mkdirSync, rmSync } from 'node:fs'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { Redis, type RedisOptions } from 'ioredis'
import { findRedis } from '../../src/embedded/redis.ts'
import type { RunDirectory } from './run-directory.ts'

export interface RedisProcess extends AsyncDisposable {
  readonly port: number
  /** A client that talks to this server alone, and waits for it while it is away. */
  readonly client: Redis
  /** SIGKILL. */
  kill(): Promise<void>
  signal(signal: 'SIGSTOP' | 'SIGCONT'): void
  /** Starts it again on the same port and the same data. */
  restart(): Promise<void>
}

export interface RedisProcessOptions {
  readonly directory: RunDirectory
  /** Of what is in `directory`. */
  readonly name: string
  /** Where a private copy of Redis is kept. */
  readonly cacheDir: string
  /** The arguments of the server, those for its port among them. */
  readonly args: (port: number) => readonly string[]
  /** How to reach it, besides the port. */
  readonly connect?: Pick<RedisOptions, 'tls' | 'username' | 'password'>
}

/**
 * Ports that the system gives nobody by itself (Linux: from 32768 on), and whose neighbours 10,000 above, where the nodes
 * of a cluster talk among themselves, it does not give either.
 */
const PORTS = [10_000, 22_000] as const
const STARTS_WITHIN_MS = 30_000

/** A free port, whose neighbour 10,000 above is free too. */
export async function freePort(): Promise<number> {
  for (;;) {
    const port = randomInt(...PORTS)
    if ((await isFree(port)) && (await isFree(port + 10_000))) return port
  }
}

function isFree(port: number): Promise<boolean> {
  return new Promise((done) => {
    const server = createServer()
    server.once('error', () => done(false))
    server.listen(port, '127.0.0.1', () => server.close(() => done(true)))
  })
}

export async function startRedisProcess(options: RedisProcessOptions): Promise<RedisProcess> {
  const { directory, name, cacheDir, args, connect = {} } = options
  const { file, env } = await findRedis(cacheDir, () => {})
  const home = join(directory.path, name)
  mkdirSync(home, { recursive: true })
  let child: ChildProcess | undefined
  const hasEnded = () => child === undefined || child.exitCode !== null || child.signalCode !== null
  const kill = async () => {
    if (child === undefined || hasEnded()) return
    const exited = once(child, 'exit')
    child.kill('SIGKILL')
    await exited
  }
  /** Whether it came up; it does not when somebody else has taken the port. */
  const run = async (port: number, client: Redis) => {
    child = spawn(file, [...args(port)], { cwd: home, env, stdio: 'ignore' })
    directory.ends(child.pid ?? 0, 'SIGKILL')
    const endMs = performance.now() + STARTS_WITHIN_MS
    for (;;) {
      const answer = await client.ping().catch((error: Error) => error.message)
      // One who is refused has been answered.
      if (answer === 'PONG' || /^(NOAUTH|NOPERM)/.test(answer)) return true
      if (hasEnded()) return false
      if (performance.now() > endMs) throw new Error(`${name} did not answer: ${answer}`)
      await sleep(20)
    }
  }
  for (let attempt = 1; ; attempt += 1) {
    const port = await freePort()
    const client = new Redis({
      port,
      host: '127.0.0.1',
      retryStrategy: () => 20,
      maxRetriesPerRequest: 0,
      commandTimeout: 5_000,
      ...connect,
    })
    client.on('error', () => {})
    if (await run(port, client)) {
      return {
        port,
        client,
        kill,
        signal: (signal) => void child?.kill(signal),
        restart: async () => {
          if (!(await run(port, client))) throw new Error(`${name} did not start again`)
        },
        async [Symbol.asyncDispose]() {
          client.disconnect()
          await kill()
        },
      }
    }
    client.disconnect()
    rmSync(home, { recursive: true, force: true })
    mkdirSync(home, { recursive: true })
    if (attempt === 5) throw new Error(`${name} ended at once, ${attempt} times`)
  }
}
