/**
 * Executes README.md from its beginning to its end, against a service as `npm start` starts it, and compares what is
 * printed with what README shows.
 *
 * A line after `$ ` in an `sh` block is a command (a final `\` continues it); the lines after it are its output. `…`
 * stands for any text within a line, and for any lines where it is alone on one. Numbers that differ from run to run
 * (times, revisions, ports) are not compared, nor is how columns are padded. A `ts` block is a program; the `text`
 * block after it is its output.
 */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { existsSync, mkdirSync, readFileSync, symlinkSync } from 'node:fs'
import { delimiter, join } from 'node:path'
import { createInterface } from 'node:readline'
import { text } from 'node:stream/consumers'
import { fromBinary, fromJson, type JsonValue, toBinary, toJson } from '@bufbuild/protobuf'
import { type ServiceError, status } from '@grpc/grpc-js'
import { afterAll, beforeAll, describe, expect, inject, test } from 'vitest'
import { findRedis } from '../../src/embedded/redis.ts'
import { ItemCacheService } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { makeRunDirectory, type RunDirectory } from '../support/run-directory.ts'
import { redisUrl } from '../support/servers.ts'
import { TestClient } from '../support/service.ts'

const ROOT = join(import.meta.dirname, '..', '..')
const README = readFileSync(join(ROOT, 'README.md'), 'utf8')
const BIN = join(ROOT, 'node_modules', '.bin')
const SHOWN_ADDRESS = /\b(?:localhost|127\.0\.0\.1):50051\b/g
/** How `npm run itemcache` is made: set-up first, then the program. `npm test` has done the set-up. */
const SET_UP = 'node setup.mjs --quiet && exec '

/** One command of README and what it prints. */
interface Example {
  readonly command: string
  readonly output: readonly string[]
  readonly kind: 'npm' | 'grpcurl' | 'program'
}

const [start, ...examples] = examplesOf(README)
const grpcurl = findGrpcurl()
const how = {
  npm: 'executed',
  program: 'executed',
  grpcurl: grpcurl === undefined ? "sent by the tests' client, as there is no grpcurl here" : 'executed',
} as const

describe('README', () => {
  let directory: RunDirectory
  let service: ChildProcess
  let address = ''
  const banner: string[] = []

  beforeAll(async () => {
    directory = makeRunDirectory()
    const dataDir = join(directory.path, 'data')
    service = spawn('node', ['src/main.ts'], {
      cwd: ROOT,
      env: {
        PATH: withBin(),
        HOME: process.env['HOME'],
        ITEMCACHE_DATA_DIR: dataDir,
        ITEMCACHE_LISTEN: '127.0.0.1:0',
        ITEMCACHE_ADMIN_LISTEN: '127.0.0.1:0',
        // A slow machine must not find stale what README shows as a hit.
        ITEMCACHE_FRESH_FOR: '10m',
        ...(await redisFor(dataDir)),
      },
      stdio: ['ignore', 'pipe', 'pipe'],
    })
    if (service.pid !== undefined) directory.ends(service.pid, 'SIGTERM')
    const { stdout, stderr } = service
    if (stdout === null || stderr === null) throw new Error('the service has no output')
    const errors = text(stderr)
    for await (const line of createInterface({ input: stdout })) {
      banner.push(line)
      if (line.startsWith('{')) break
    }
    const last = banner.at(-1)
    if (last === undefined) throw new Error(`the service did not start: ${await errors}`)
    address = JSON.parse(last).grpc
  })

  afterAll(async () => {
    if (service?.exitCode === null) {
      const ended = Promise.withResolvers<void>()
      service.once('exit', () => ended.resolve())
      service.kill('SIGTERM')
      await ended.promise
    }
    await directory?.[Symbol.asyncDispose]()
  })

  test('`npm start` prints the banner that README shows', () => {
    expect(start?.command).toBe('npm start')
    const stable = (lines: readonly string[]) =>
      lines
        // As root there is a note on who runs PostgreSQL.
        .filter((line) => !line.startsWith('  note '))
        // Which Redis and which PostgreSQL, and where, depends on the machine.
        .map((line) => line.replace(/^( {2}(?:Redis|PostgreSQL) ).*/, '$1'))
    compare(stable(banner), stable(start?.output ?? []))
  })

  test('has examples of every kind', () => {
    expect(new Set(examples.map(({ kind }) => kind))).toEqual(new Set(['npm', 'grpcurl', 'program']))
  })

  for (const example of examples) {
    test(`\`${titleOf(example)}\` prints what README shows (${how[example.kind]})`, async () => {
      compare(await outputOf(example, address), example.output)
    })
  }
})

function examplesOf(readme: string): Example[] {
  const found: Example[] = []
  let program: string | undefined
  for (const [, language = '', body = ''] of readme.matchAll(/^```(\w+)\n(.*?)^```$/gms)) {
    if (language === 'sh') found.push(...commandsOf(body))
    else if (language === 'ts') program = body
    else if (language === 'text' && program !== undefined) {
      found.push({ command: program, output: body.trimEnd().split('\n'), kind: 'program' })
      program = undefined
    }
  }
  expect(program, 'a program without an output').toBeUndefined()
  return found
}

function commandsOf(block: string): Example[] {
  return block
    .split(/^\$ /m)
    .slice(1)
    .map((part) => {
      const [, command = '', output = ''] = /^((?:[^\n]*\\\n)*[^\n]*\n)(.*)$/s.exec(part) ?? []
      const line = command.replace(/\\\n\s*/g, '').trim()
      if (!/^(npm|grpcurl) /.test(line)) throw new Error(`README has a command that is not tested: ${line}`)
      return {
        command: line,
        output: output.trimEnd().split('\n'),
        kind: line.startsWith('npm') ? 'npm' : 'grpcurl',
      }
    })
}

function titleOf({ kind, command }: Example): string {
  if (kind === 'program') return 'the TypeScript program'
  return kind === 'npm' ? command : `grpcurl … ${command.slice(command.lastIndexOf('/') + 1)}`
}

/** What an example prints, stderr after stdout. */
async function outputOf({ kind, command }: Example, address: string): Promise<string[]> {
  const line = command.replace(SHOWN_ADDRESS, address)
  const printed = await (kind === 'program'
    ? run('node --input-type=module-typescript', address, line)
    : kind === 'npm'
      ? run(scriptOf(line), address)
      : grpcurl === undefined
        ? sendInstead(line, address)
        : run(line.replace('grpcurl', `'${grpcurl}'`), address))
  return printed.trimEnd().split('\n')
}

/** The command behind `npm run <script> -- <arguments>`, without the set-up. */
function scriptOf(command: string): string {
  const [, name = '', words = ''] = /^npm run (\S+) -- (.*)$/.exec(command) ?? []
  const script: string = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8')).scripts[name]
  if (!script?.startsWith(SET_UP)) throw new Error(`${command} is not made as this test expects`)
  return `${script.slice(SET_UP.length)} ${words}`
}

async function run(command: string, address: string, input = ''): Promise<string> {
  const child = spawn('sh', ['-c', command], {
    cwd: ROOT,
    env: { PATH: withBin(), HOME: process.env['HOME'], ITEMCACHE_TARGET: address },
  })
  child.stdin.end(input)
  const [out, err] = await Promise.all([text(child.stdout), text(child.stderr)])
  return out + err
}

/** Sends what grpcurl would send, and prints it as grpcurl would. */
async function sendInstead(command: string, address: string): Promise<string> {
  const [, json = '', service, name = ''] =
    /^grpcurl -plaintext -d '(.*)' \S+ (\S+)\/(\w+)$/.exec(command) ?? []
  const method = ItemCacheService.methods.find((one) => one.name === name)
  if (service !== ItemCacheService.typeName || method?.methodKind !== 'unary') {
    throw new Error(`this test cannot send ${command}`)
  }
  using client = new TestClient(address)
  const request = toBinary(method.input, fromJson(method.input, requestOf(json)))
  try {
    const answer = await client.send(method.localName as Parameters<typeof client.send>[0], request)
    return JSON.stringify(toJson(method.output, fromBinary(method.output, answer)), null, 2)
  } catch (error) {
    const { code, details } = error as ServiceError
    const words = (status[code] ?? '').split('_').map((word) => word.charAt(0) + word.slice(1).toLowerCase())
    return `ERROR:\n  Code: ${words.join('')}\n  Message: ${details}\n  Details:`
  }
}

/** The request in the JSON of Protobuf, where a mask is one string; grpcurl takes it as the message it is. */
function requestOf(json: string): JsonValue {
  const inCamelCase = (path: string) => path.replace(/_(.)/g, (_, letter: string) => letter.toUpperCase())
  return JSON.parse(json, (name, value) =>
    name.endsWith('_mask') ? value.paths.map(inCamelCase).join(',') : value,
  )
}

/** Fails unless the lines are those that README shows, in this order. */
function compare(printed: readonly string[], shown: readonly string[]): void {
  const pattern = shown.map((line) => {
    if (line.trim() === '…') return '(?:.*\\n)*?'
    return `${comparable(line).split('…').map(RegExp.escape).join('.*')}\\n`
  })
  const actual = printed.map((line) => `${comparable(line)}\n`).join('')
  if (!new RegExp(`^${pattern.join('')}$`).test(actual)) {
    // Not equal: shows both.
    expect(`${printed.join('\n')}\n`).toBe(`${shown.join('\n')}\n`)
  }
}

/** A line without what differs from run to run. */
function comparable(line: string): string {
  return line
    .replace(/127\.0\.0\.1:\d+/g, '<address>')
    .replace(/\d{4}-\d\d-\d\dT[\d:.]+Z/g, '<time>')
    .replace(/"e[0-9a-z]{7,}"/g, '<etag>')
    .replace(/\b\d{13,}\b/g, '<revision>')
    .replace(/\b\d[\d.]* (?:[KMG]i)?B\b/g, '<size>')
    .replace(/\b[\d.]+ (?:µs|ms|s|min|h)\b(?: [\d.]+ (?:s|min)\b)?/g, '<duration>')
    .replace(/\s+/g, ' ')
    .trim()
}

/** A private Redis, as by default, where there can be one; else the one that the tests have found. */
async function redisFor(dataDir: string): Promise<Record<string, string>> {
  const cache = inject('redisCache')
  const found = await findRedis(cache, () => undefined).catch(() => undefined)
  if (found === undefined) return { REDIS_URL: redisUrl() }
  const copy = join(cache, 'redis')
  if (existsSync(copy)) {
    mkdirSync(join(dataDir, 'cache'), { recursive: true })
    symlinkSync(copy, join(dataDir, 'cache', 'redis'))
  }
  return {}
}

function findGrpcurl(): string | undefined {
  const dirs = (process.env['PATH'] ?? '').split(delimiter)
  try {
    dirs.push(join(execFileSync('go', ['env', 'GOPATH'], { encoding: 'utf8' }).trim(), 'bin'))
  } catch {
    // There is no Go here.
  }
  return dirs.map((dir) => join(dir, 'grpcurl')).find((file) => existsSync(file))
}

function withBin(): string {
  return `${BIN}${delimiter}${process.env['PATH'] ?? ''}`
}
