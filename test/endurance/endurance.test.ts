/** Short forms of what `npm run soak` and `npm run kills` do at length. */
import { join } from 'node:path'
import { expect, inject, test } from 'vitest'
import { makeRunDirectory } from '../support/run-directory.ts'
import { freshDatabase, redisUrl } from '../support/servers.ts'
import { kills } from './kills.ts'
import { soak } from './soak.ts'

test('nothing stays held when load, a flapping Redis and bad subscribers are over', async () => {
  await using database = await freshDatabase()
  await using directory = makeRunDirectory()
  const { calls, redisKills, problems, after } = await soak({
    seconds: 6,
    databaseUrl: database.url,
    superuserUrl: database.superuserUrl,
    directory: join(directory.path, 'soak'),
    redisCache: inject('redisCache'),
    progress: () => {},
    pace: { lineMs: 2000, redisUpMs: 1500, redisDownMs: 700 },
    busyMachine: true,
  })
  expect(problems).toEqual([])
  expect(after).toMatchObject({ subscribers: 0, flights: 0, rings: 0, calls: 0 })
  expect(calls).toBeGreaterThan(0)
  expect(redisKills).toBeGreaterThan(0)
}, 180_000)

test('SIGKILL in the middle of writes loses none that was acknowledged, and repeats none', async () => {
  await using database = await freshDatabase()
  await using directory = makeRunDirectory()
  const {
    kills: killed,
    acknowledged,
    problems,
  } = await kills({
    times: 3,
    databaseUrl: database.url,
    superuserUrl: database.superuserUrl,
    redisUrl: redisUrl(),
    directory: join(directory.path, 'kills'),
  })
  expect(problems).toEqual([])
  expect(killed).toBe(3)
  expect(acknowledged).toBeGreaterThanOrEqual(30)
}, 180_000)
