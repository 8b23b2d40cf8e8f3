/** What `npm run test:clients -- --quick` says on machines that cannot test the Go or the Python client. */
import { spawnSync } from 'node:child_process'
import { chmodSync, mkdtempDisposableSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, test } from 'vitest'

/** Runs it where the PATH holds these programs, each a shell script, and nothing else. */
function run(programs: Readonly<Record<string, string>>) {
  using bin = mkdtempDisposableSync(join(tmpdir(), 'itemcache-bin-'))
  for (const [name, script] of Object.entries(programs)) {
    const path = join(bin.path, name)
    writeFileSync(path, `#!/bin/sh\n${script}\n`)
    chmodSync(path, 0o755)
  }
  const { status, stdout } = spawnSync(process.execPath, ['clients/test.ts', '--quick'], {
    encoding: 'utf8',
    env: { PATH: bin.path },
  })
  return { status, lines: stdout.trimEnd().split('\n') }
}

test('a machine without Go and Python says what is not run, and fails at nothing', () => {
  expect(run({})).toEqual({
    status: 0,
    lines: [
      'not run: clients/go: no Go 1.24 or newer in PATH',
      'not run: clients/python: no Python 3.9 or newer with venv in PATH',
      '0 passed, 0 failed',
    ],
  })
})

test('so does one whose Go and Python are too old', () => {
  const { status, lines } = run({ go: 'echo go1.19.8', python3: 'echo 3.8' })
  expect(lines.filter((line) => line.startsWith('not run: '))).toHaveLength(2)
  expect({ status, last: lines.at(-1) }).toEqual({ status: 0, last: '0 passed, 0 failed' })
})

test('so does one that cannot reach the modules, but a module that is broken is a failure', () => {
  const fetching = (sentence: string) => ({
    go: `case "$1" in env) echo go1.24.1;; *) echo '${sentence}' >&2; exit 1;; esac`,
  })
  const away = run(fetching('dial tcp: lookup proxy.golang.org on 10.0.0.2:53: no such host'))
  expect(away.lines[0]).toMatch(/^not run: clients\/go: its modules cannot be fetched \(dial tcp: .*\)$/)
  expect({ status: away.status, last: away.lines.at(-1) }).toEqual({ status: 0, last: '0 passed, 0 failed' })
  const broken = run(fetching('verifying module: checksum mismatch'))
  expect({ status: broken.status, last: broken.lines.at(-1) }).toEqual({
    status: 1,
    last: '0 passed, 1 failed',
  })
})
