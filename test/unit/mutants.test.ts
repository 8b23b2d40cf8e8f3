import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { MUTANTS } from '../consistency/mutant-list.ts'

const ROOT = join(import.meta.dirname, '..', '..')

test.each(MUTANTS)(
  'the rule "$rule" can still be left out of the sources: $name',
  ({ edits, amplifiers = [] }) => {
    const files = new Map<string, string>()
    for (const { file, find, put } of [...amplifiers, ...edits]) {
      const parts = (files.get(file) ?? readFileSync(join(ROOT, file), 'utf8')).split(find)
      expect(parts, `${file} holds once: ${find}`).toHaveLength(2)
      files.set(file, parts.join(put))
    }
  },
)
