/** What health and the probes say while PostgreSQL and Redis, real processes, are killed, stopped and back. */
import { fromBinary } from '@bufbuild/protobuf'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { HealthCheckResponseSchema } from '../../src/gen/health/v1/health_pb.ts'
import { freshPostgres, freshRedis, type OwnServer } from '../support/servers.ts'
import { startService, type TestService } from '../support/service.ts'

const PATIENT = { timeout: 30_000 }
const [SERVING, NOT_SERVING] = [1, 2]

let postgres: OwnServer
let redis: OwnServer
beforeAll(async () => {
  ;[postgres, redis] = await Promise.all([freshPostgres(), freshRedis()])
})
afterAll(() => Promise.all([postgres?.[Symbol.asyncDispose](), redis?.[Symbol.asyncDispose]()]))

const start = () =>
  startService({
    databaseUrl: postgres.url,
    env: {
      REDIS_URL: redis.url,
      ITEMCACHE_POSTGRES_CONNECT_TIMEOUT: '2s',
      ITEMCACHE_POSTGRES_STATEMENT_TIMEOUT: '2s',
    },
  })

async function stateOf({ app, client }: TestService) {
  const { port } = app.admin ?? { port: 0 }
  const [ready, live] = await Promise.all(
    ['readyz', 'healthz'].map((path) => fetch(`http://127.0.0.1:${port}/${path}`)),
  )
  const health = await new Promise<number>((done) => {
    client.raw.makeUnaryRequest(
      '/grpc.health.v1.Health/Check',
      (bytes: Buffer) => bytes,
      (bytes: Buffer) => fromBinary(HealthCheckResponseSchema, bytes),
      Buffer.alloc(0),
      (error, answer) => done(answer?.status ?? -(error?.code ?? 0)),
    )
  })
  const detail = (await ready?.json()) as { ready: boolean; redis: string; postgres: string }
  return {
    live: live?.status,
    status: ready?.status,
    ready: detail.ready,
    redis: detail.redis,
    postgres: detail.postgres,
    health,
  }
}

const good = { live: 200, status: 200, ready: true, redis: 'ready', postgres: 'ready', health: SERVING }
/** Nothing can be answered: no probe should send anybody here, and none should kill the process for it. */
const useless = { live: 200, status: 503, ready: false, redis: 'down', postgres: 'down', health: NOT_SERVING }

test('without PostgreSQL the service is ready as long as a cache may answer, and says what is down', async () => {
  await using service = await start()
  await expect.poll(() => stateOf(service), PATIENT).toEqual(good)
  await postgres.kill()
  await expect.poll(() => stateOf(service), PATIENT).toEqual({ ...good, postgres: 'down' })
  await redis.kill()
  await expect.poll(() => stateOf(service), PATIENT).toEqual(useless)
  await redis.restart()
  await expect.poll(() => stateOf(service), PATIENT).toEqual({ ...good, postgres: 'down' })
  await postgres.restart()
  await expect.poll(() => stateOf(service), PATIENT).toEqual(good)
}, 240_000)

test('a PostgreSQL that is stopped and stays connected counts as down, too', async () => {
  await using service = await start()
  await redis.kill()
  await expect.poll(() => stateOf(service), PATIENT).toEqual({ ...good, redis: 'down' })
  postgres.pause()
  await expect.poll(() => stateOf(service), PATIENT).toEqual(useless)
  postgres.resume()
  await expect.poll(() => stateOf(service), PATIENT).toEqual({ ...good, redis: 'down' })
  // What is in memory can be served without either.
  await expect
    .poll(() => service.client.call('getItem', { id: '1' }).catch(() => undefined), PATIENT)
    .toMatchObject({ result: { case: 'item' } })
  postgres.pause()
  await expect.poll(() => stateOf(service), PATIENT).toEqual({ ...good, redis: 'down', postgres: 'down' })
  postgres.resume()
  await redis.restart()
  await expect.poll(() => stateOf(service), PATIENT).toEqual(good)
}, 240_000)
