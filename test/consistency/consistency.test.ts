import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, inject, test } from 'vitest'
import { makeRunDirectory, type RunDirectory } from '../support/run-directory.ts'
import { check } from './checker.ts'
import { runHistory, startWorld, type World } from './driver.ts'
import { type Profile, planOf } from './plan.ts'

const ROOT = join(import.meta.dirname, '..', '..')

/** Fixed seeds, each with its own mix of faults, and what the mix must contain. */
const HISTORIES: readonly [what: string, seed: number, profile: Profile][] = [
  ['instances that are killed and stopped', 11, { faults: { kill: true, stop: true } }],
  [
    'a PostgreSQL that is slow, silent, cut off and crashes',
    12,
    { faults: { postgresCut: true, postgresDrop: true, postgresDelay: true, postgresCrash: true } },
  ],
  [
    'a Redis that is flushed, robbed, put back in time and replaced by an empty one',
    13,
    { faults: { redisFlush: true, redisEvict: true, redisDump: true, redisEmpty: true, redisDelay: true } },
  ],
  ['a failover that loses commits', 14, { failover: true }],
  [
    'a catalogue that says something else every time, and a log that is trimmed',
    15,
    { origin: true, refreshes: true, trims: true, bulk: true },
  ],
]

describe('three instances, eight clients and four watchers, at a service with everything against it', () => {
  let directory: RunDirectory
  let world: World

  beforeAll(async () => {
    directory = makeRunDirectory()
    world = await startWorld(directory.path, inject('postgresCache'), inject('redisCache'))
  })
  afterAll(async () => {
    await world?.[Symbol.asyncDispose]()
    await directory?.[Symbol.asyncDispose]()
  })

  test.each(HISTORIES)('every promise is kept with %s', { timeout: 240_000 }, async (_, seed, profile) => {
    const plan = planOf(seed, { ms: 8000, watchers: 4, faultEveryMs: 500, ...profile })
    const { events } = await runHistory(world, plan, ROOT)
    expect(check(events)).toEqual([])

    // It was put to the test: all that was announced has happened, and was seen by readers and watchers.
    const notes = events.flatMap((event) => (event.t === 'fault' ? [event.what] : []))
    for (const kind of Object.keys(profile.faults ?? {})) {
      expect(notes).toContainEqual(expect.stringMatching(`^${kind} `))
    }
    expect(notes.includes('the standby has taken over')).toBe(plan.failover !== undefined)
    expect(events.filter(({ t }) => t === 'read').length).toBeGreaterThan(20)
    expect(events.filter(({ t }) => t === 'write').length).toBeGreaterThan(10)
    const heard = events.filter((event) => event.t === 'watch' && event.message.kind === 'event')
    expect(heard.length).toBeGreaterThan(5)
  })
})
