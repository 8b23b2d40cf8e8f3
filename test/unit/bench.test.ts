import { execFileSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { expect, test } from 'vitest'
import { asServer } from '../../bench/control.ts'
import { picture } from '../../bench/picture.ts'
import { figure, judge, markdownTable, median, percentile, textTable } from '../../bench/report.ts'
import { CASES, type Row } from '../../bench/rows.ts'

const row: Row = {
  id: 'x',
  work: 'work',
  unit: 'µs',
  peer: 'the other',
  target: '≤ 1.1 ×',
  bound: { of: 'ratio', most: 1.1 },
}

test('--list names every case and every row with its target', () => {
  const listed = execFileSync(process.execPath, ['bench/main.ts', '--list'], { encoding: 'utf8' })
  for (const { name, rows } of CASES) {
    expect(listed).toMatch(new RegExp(`^${name}\\b`, 'm'))
    for (const { work, target } of rows) {
      expect(listed).toContain(work)
      expect(listed).toContain(target)
    }
  }
  const ids = CASES.flatMap(({ rows }) => rows.map(({ id }) => id))
  expect(new Set(ids).size).toBe(ids.length)
})

test('npm start, the image and the servers that are measured run Node alike', () => {
  const image = readFileSync('Dockerfile', 'utf8')
  const command: readonly string[] = JSON.parse(/^CMD (.*)$/m.exec(image)?.[1] ?? '')
  const tunables = /^ENV GLIBC_TUNABLES=(.*)$/m.exec(image)?.[1]
  expect(JSON.parse(readFileSync('package.json', 'utf8')).scripts.start).toBe(
    `node setup.mjs && GLIBC_TUNABLES=\${GLIBC_TUNABLES-${tunables}} exec ${command.join(' ')}`,
  )
  expect(command).toMatchObject({ 0: 'node', [command.length - 1]: 'src/main.ts' })
  expect(asServer({ core: 1, execArgv: ['--more'], env: { A: 'a' } })).toEqual({
    core: 1,
    execArgv: [...command.slice(1, -1), '--more'],
    env: { GLIBC_TUNABLES: process.env['GLIBC_TUNABLES'] ?? tunables, A: 'a' },
  })
})

test('a case that does not exist is named, and nothing is measured', () => {
  expect(() =>
    execFileSync(process.execPath, ['bench/main.ts', 'nonsense'], { encoding: 'utf8', stdio: 'pipe' }),
  ).toThrow(/there is no nonsense/)
})

test('medians and percentiles are those of the sorted values', () => {
  expect(median([3, 1, 2])).toBe(2)
  expect(median([4, 1, 3, 2])).toBe(2.5)
  expect(median([])).toBeNaN()
  const hundred = Array.from({ length: 100 }, (_, n) => 100 - n)
  expect(percentile(hundred, 0.5)).toBe(50)
  expect(percentile(hundred, 0.99)).toBe(99)
  expect(percentile(hundred, 1)).toBe(100)
  expect(percentile([7], 0)).toBe(7)
})

test('a ratio is ours divided by theirs, unless it was measured in pairs', () => {
  expect(judge(row, { row: 'x', ours: 11, peer: 10 }).ratio).toBeCloseTo(1.1)
  expect(judge(row, { row: 'x', ours: 11, peer: 10, ratio: 1.2 }).ratio).toBe(1.2)
  expect(judge(row, { row: 'x', ours: 11 }).ratio).toBeUndefined()
})

test('a target is met on its bound and missed beyond it', () => {
  const met = (bound: Row['bound'], ours: number, peer?: number) =>
    judge({ ...row, bound }, { row: 'x', ours, ...(peer !== undefined && { peer }) }).met
  expect(met({ of: 'ratio', most: 1.5 }, 3, 2)).toBe(true)
  expect(met({ of: 'ratio', most: 1.4 }, 3, 2)).toBe(false)
  expect(met({ of: 'ratio', least: 1.5 }, 3, 2)).toBe(true)
  expect(met({ of: 'ratio', least: 1.6 }, 3, 2)).toBe(false)
  expect(met({ of: 'ratio', least: 0.9, most: 1.1 }, 3, 2)).toBe(false)
  expect(met({ of: 'ours', most: 0 }, 0)).toBe(true)
  expect(met({ of: 'ours', most: 0 }, 1)).toBe(false)
  expect(met(undefined, 1)).toBeUndefined()
})

test('a figure that is missing, or no number, meets no target', () => {
  expect(judge(row, { row: 'x', ours: 1 }).met).toBe(false)
  expect(judge(row, { row: 'x', ours: Number.NaN, peer: 1 }).met).toBe(false)
})

test('the tables and the picture show every result, its verdict and its note', () => {
  const results = [
    judge(row, { row: 'x', ours: 1.234, peer: 1, note: 'shortened | <b>' }),
    judge({ ...row, work: 'other work', bound: undefined }, { row: 'y', ours: 12_345.6 }),
  ]
  for (const table of [textTable(results), markdownTable(results)]) {
    expect(table).toContain('work (shortened')
    expect(table).toContain('NO')
    expect(table).toContain('12,346 µs')
    expect(table).toContain('shown')
  }
  expect(markdownTable(results)).toContain('shortened \\| <b>')
  expect(picture(results)).toContain('class="missed"')
  expect(picture(results)).not.toContain('other work')
})

test.each([
  [1.2345, '1.23'],
  [0.012345, '0.0123'],
  [123.4, '123'],
  [4321.9, '4,322'],
  [Number.NaN, 'no figure'],
  [undefined, ''],
])('%d is shown as %s', (value, shown) => expect(figure(value)).toBe(shown))
