/** docs/limits.md names tests and metrics: they are what they are called there. */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { VARIABLES } from '../../src/config.ts'

const ROOT = join(import.meta.dirname, '../..')
const page = readFileSync(join(ROOT, 'docs/limits.md'), 'utf8')

const rows = page
  .split('\n')
  .filter((line) => line.startsWith('| ') && !line.startsWith('| what |'))
  .map((line) => line.slice(2, -2).split(' | '))

test('every bound names a test that is there', () => {
  expect(rows.length).toBeGreaterThan(30)
  for (const row of rows) {
    const [, file = '', title = ''] = /^([\w/-]+\.test\.ts): (.+)$/.exec(row.at(-1) ?? '') ?? []
    expect(file, row[0]).not.toBe('')
    const source = readFileSync(join(ROOT, 'test', file), 'utf8')
    expect(
      source.includes(`test('${title}'`) || source.includes(`attack('${title}'`),
      `${file}: ${title}`,
    ).toBe(true)
  }
})

test('every variable on the page is one', () => {
  const known = new Set(VARIABLES.map(({ name }) => name))
  for (const [name] of page.matchAll(/ITEMCACHE_\w+/g)) expect(known).toContain(name)
})
