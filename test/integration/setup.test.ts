import { execFile, spawnSync } from 'node:child_process'
import { chmodSync, copyFileSync, existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { findProcess, registerRunning } from '../../src/embedded/processes.ts'
import { makeRunDirectory, type RunDirectory } from '../support/run-directory.ts'

const project = join(import.meta.dirname, '..', '..')

/** A checkout of nothing but what setup.mjs looks at, and an npm that notes its calls instead of installing. */
let directory: RunDirectory
let root: string
beforeEach(() => {
  directory = makeRunDirectory()
  root = join(directory.path, 'checkout')
  mkdirSync(join(root, 'client'), { recursive: true })
  copyFileSync(join(project, 'setup.mjs'), join(root, 'setup.mjs'))
  write('package.json', '{ "workspaces": ["client"] }')
  write('client/package.json', '{}')
  write('package-lock.json', '{}')
  writeFileSync(
    join(directory.path, 'npm-cli.js'),
    `const { appendFileSync, chmodSync, mkdirSync, rmSync, writeFileSync } = require('node:fs')
    const call = { args: process.argv.slice(2), env: process.env, cwd: process.cwd() }
    appendFileSync(${JSON.stringify(join(directory.path, 'calls'))}, JSON.stringify(call) + '\\n')
    if (process.env.FAKE_FAILS) process.exit(7)
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, Number(process.env.FAKE_MS ?? 0))
    rmSync('node_modules', { recursive: true, force: true })
    mkdirSync('node_modules/.bin', { recursive: true })
    writeFileSync('node_modules/.bin/node', process.env.FAKE_RUNTIME ?? '#!/bin/sh\\necho v26.1.0\\n')
    chmodSync('node_modules/.bin/node', 0o755)
    console.log('added 1 package')`,
  )
})
afterEach(() => directory[Symbol.asyncDispose]())

function write(file: string, text: string): void {
  writeFileSync(join(root, file), text)
}

interface Outcome {
  readonly code: number
  readonly stdout: string
  readonly stderr: string
}

function setUp(env: NodeJS.ProcessEnv = {}, ...args: string[]): Promise<Outcome> {
  const npm = { npm_execpath: join(directory.path, 'npm-cli.js'), npm_node_execpath: process.execPath }
  return new Promise((done) => {
    const options = { env: { PATH: process.env['PATH'], ...npm, ...env } }
    const child = execFile(
      process.execPath,
      [join(root, 'setup.mjs'), ...args],
      options,
      (_, stdout, stderr) => done({ code: child.exitCode ?? -1, stdout, stderr }),
    )
  })
}

function calls(): { args: string[]; env: NodeJS.ProcessEnv; cwd: string }[] {
  const file = join(directory.path, 'calls')
  if (!existsSync(file)) return []
  const lines = readFileSync(file, 'utf8').trim().split('\n')
  return lines.map((line) => JSON.parse(line))
}

test('packages are installed once, by npm ci without scripts, and nothing is said when there is nothing to do', async () => {
  const first = await setUp()
  expect(first).toMatchObject({ code: 0, stdout: '', stderr: expect.stringContaining('added 1 package') })
  expect(calls()).toMatchObject([{ cwd: root, args: expect.arrayContaining(['ci', '--ignore-scripts']) }])
  expect(await setUp()).toEqual({ code: 0, stdout: '', stderr: '' })
  expect(await setUp({}, '--quiet')).toEqual({ code: 0, stdout: '', stderr: '' })
  expect(calls()).toHaveLength(1)
})

test('packages are installed again when the lock changes, and only then', async () => {
  await setUp()
  write('package.json', '{ "workspaces": ["client"], "scripts": {} }')
  await setUp()
  expect(calls()).toHaveLength(1)
  write('package-lock.json', '{}\n')
  expect(await setUp()).toMatchObject({ code: 0 })
  expect(calls()).toHaveLength(2)
})

test('packages are installed again when node_modules is gone', async () => {
  await setUp()
  rmSync(join(root, 'node_modules'), { recursive: true })
  await setUp()
  expect(calls()).toHaveLength(2)
})

test("the user's npm settings cannot leave anything out, and those about the network still count", async () => {
  const settings = {
    npm_config_omit: 'optional',
    NPM_CONFIG_OMIT: 'dev',
    npm_config_dry_run: 'true',
    npm_config_workspace: 'client',
    npm_config_global: 'true',
    npm_config_registry: 'https://registry.example',
    npm_config_https_proxy: 'http://proxy.example',
    'npm_config_//registry.example/:_authToken': 'secret',
  }
  await setUp({ ...settings, NODE_ENV: 'production' })
  const [call] = calls()
  const kept = Object.keys(call?.env ?? {}).filter((name) => /^npm_config_/i.test(name))
  expect(kept.sort()).toEqual(
    ['npm_config_//registry.example/:_authToken', 'npm_config_https_proxy', 'npm_config_registry'].sort(),
  )
  for (const flag of ['--include=dev', '--include=optional', '--engine-strict=false', '--dry-run=false']) {
    expect(call?.args).toContain(flag)
  }
})

test('the runtime of an older installation does not run npm', async () => {
  const bin = join(root, 'node_modules', '.bin')
  await setUp({ PATH: `${bin}:${process.env['PATH']}` })
  expect(calls()[0]?.env['PATH']?.split(':')).not.toContain(bin)
})

test('of two that start at once one installs and the other waits for it', async () => {
  const outcomes = await Promise.all([setUp({ FAKE_MS: '600' }), setUp({ FAKE_MS: '600' })])
  expect(outcomes.map(({ code }) => code)).toEqual([0, 0])
  expect(calls()).toHaveLength(1)
  expect(outcomes.map(({ stderr }) => stderr).join('')).toMatch(
    /Waiting for process \d+, which is installing/,
  )
  expect(existsSync(join(root, '.itemcache', 'setup.lock'))).toBe(false)
})

test('the lock of a set-up that was killed is taken over', async () => {
  const dead = spawnSync(process.execPath, ['--version']).pid
  for (const owner of [`${dead} 1`, `${process.pid} an earlier time`, 'nonsense']) {
    rmSync(join(root, 'node_modules'), { recursive: true, force: true })
    mkdirSync(join(root, '.itemcache'), { recursive: true })
    write('.itemcache/setup.lock', `${owner}\n`)
    expect(await setUp()).toMatchObject({ code: 0 })
  }
  expect(calls()).toHaveLength(3)
})

test('packages stay as they are while a service runs from them', async () => {
  await setUp()
  write('package-lock.json', '{ "changed": true }')
  const running = registerRunning(root)
  const refused = await setUp()
  expect(refused).toMatchObject({ code: 1, stdout: '' })
  expect(refused.stderr).toBe(
    `setup: The packages must be installed anew, but ItemCache is running from them: stop process ${process.pid} first.\n`,
  )
  // The command line that talks to the service runs with the service's packages.
  expect(await setUp({}, '--quiet')).toEqual({ code: 0, stdout: '', stderr: '' })
  expect(calls()).toHaveLength(1)
  running[Symbol.dispose]()
  expect(await setUp()).toMatchObject({ code: 0 })
  expect(calls()).toHaveLength(2)
})

test('a service that died, or whose process id is used again, does not stand in the way', async () => {
  mkdirSync(join(root, '.itemcache', 'run'), { recursive: true })
  write(`.itemcache/run/${process.pid}`, `${process.pid} an earlier time\n`)
  write('.itemcache/run/4194305', '4194305 1\n')
  expect(findProcess(4194305)).toBeUndefined()
  expect(await setUp()).toMatchObject({ code: 0 })
})

test('a failed npm is reported in one sentence, and the next start tries again', async () => {
  const failed = await setUp({ FAKE_FAILS: '1' })
  expect(failed).toMatchObject({ code: 1, stderr: expect.stringContaining('npm ci failed (exit code 7)') })
  expect(failed.stderr).not.toContain(' at ')
  expect(await setUp()).toMatchObject({ code: 0 })
})

function oldNode(): string {
  const file = join(directory.path, 'old-node')
  writeFileSync(file, `#!/bin/sh\n[ "$1" = --version ] && echo v20.1.0 || exec '${process.execPath}' "$@"\n`)
  chmodSync(file, 0o755)
  return file
}

test('where the packaged runtime does not run, one sentence names the platforms that are supported', async () => {
  for (const runtime of ['#!/no/such/loader\n', '#!/bin/sh\necho v24.16.9\n']) {
    const refused = await setUp({ FAKE_RUNTIME: runtime, npm_node_execpath: oldNode() })
    expect(refused.code).toBe(1)
    expect(refused.stderr).toMatch(
      /Linux with glibc on x64 and arm64, macOS\): install Node 24\.17 or newer yourself\.\n$/,
    )
  }
})

test("where it does not run, a system's own Node that is new enough does", async () => {
  expect(await setUp({ FAKE_RUNTIME: '#!/no/such/loader\n' })).toMatchObject({ code: 0 })
  expect(existsSync(join(root, 'node_modules', '.bin', 'node'))).toBe(false)
  expect(await setUp()).toEqual({ code: 0, stdout: '', stderr: '' })
})
