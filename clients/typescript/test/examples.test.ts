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
    const [first = '', ...rest] = (await run('near-cache.ts')).trimEnd().split('\n')
    expect(first).toMatch(/^read 1: \S.*, from the service$/)
    expect(rest.at(-3)).toMatch(/^read \d+: \S.*, from the near cache$/)
    expect(rest.at(-2)).toBe('after an invalidation: from the service')
    expect(rest.at(-1)).toMatch(/^\d+ hits, \d+ misses, (current|lost)$/)
  })

  test('watch: shows what happens', async () => {
    // Acknowledged once it is applied: a watch that begins then does not show what the example before has written.
    await service.client.call('invalidateItems', { target: { case: 'tags', value: { tags: ['none'] } } })
    expect(await run('watch.ts')).toBe('upserted watched by the-example\ndeleted watched by the-example\n')
  })

  test('cached: makes what it keeps, and anew after an invalidation', async () => {
    const [first = '', second = ''] = (await run('cached.ts')).split('\n')
    const before = /<h1>\S.*<\/h1> rendered (\d+) time\(s\)$/.exec(first)?.[1]
    const after = /^after an invalidation: rendered (\d+) time\(s\)$/.exec(second)?.[1]
    expect(Number(after)).toBe(Number(before) + 1)
  })
})
