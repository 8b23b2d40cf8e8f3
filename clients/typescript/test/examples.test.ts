import { execFile } from 'node:child_process'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { startService, type TestService } from '../../../test/support/service.ts'

let service: TestService

beforeAll(async () => {
  service = await startService()
  await service.client.call('getItem', { id: '1' })
})
afterAll(() => service?.[Symbol.asyncDispose]())

async function run(example: string): Promise<string> {
  const file = join(import.meta.dirname, '..', 'examples', example)
  const { stdout } = await promisify(execFile)(process.execPath, [file, service.address])
  return stdout
}

describe('the examples', () => {
  test('near-cache: the second read stays in the process, and an invalidation ends that', async () => {
    const lines = (await run('near-cache.ts')).split('\n')
    expect(lines[0]).toMatch(/^read 1: \S.*, from the service$/)
    expect(lines[2]).toMatch(/^read 3: \S.*, from the near cache$/)
    expect(lines[3]).toBe('after an invalidation: from the service')
    expect(lines[4]).toMatch(/^\d+ hits, \d+ misses, current$/)
  })

  test('watch: shows what happens', async () => {
    expect(await run('watch.ts')).toBe('upserted watched by the-example\ndeleted watched by the-example\n')
  })

  test('cached: makes what it keeps once, and anew after an invalidation', async () => {
    const [first, second] = (await run('cached.ts')).split('\n')
    expect(first).toMatch(/<h1>\S.*<\/h1> rendered 1 time\(s\)$/)
    expect(second).toBe('after an invalidation: rendered 2 time(s)')
  })
})
