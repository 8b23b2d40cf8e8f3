/**
 * Prometheus for tests: from the PATH, else an unpacked copy of Debian's package in `.itemcache/cache`. Nothing is
 * installed, and no service is started.
 */
import { execFile, spawn } from 'node:child_process'
import { existsSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { promisify } from 'node:util'
import { unpackPackage } from '../../src/embedded/debian.ts'
import { makeRunDirectory } from './run-directory.ts'

const CACHE = join(import.meta.dirname, '../../.itemcache/cache')

export interface PrometheusPrograms {
  readonly prometheus: string
  readonly promtool: string
  readonly version: string
}

/** Throws a sentence when there is none and none can be fetched. */
export async function findPrometheus(): Promise<PrometheusPrograms> {
  const copy = join(CACHE, 'prometheus')
  const places = [...(process.env['PATH'] ?? '').split(':'), join(copy, 'usr/bin')]
  for (const directory of places) {
    const found = await probe(directory).catch(() => undefined)
    if (found !== undefined) return found
  }
  try {
    await unpackPackage(copy, ['prometheus'], (unpacked) => probe(join(unpacked, 'usr/bin')))
    return await probe(join(copy, 'usr/bin'))
  } catch (cause) {
    const why = (cause as Error).message
    throw new Error(`There is no Prometheus on the PATH, and none could be fetched (${why})`, { cause })
  }
}

async function probe(directory: string): Promise<PrometheusPrograms> {
  const [prometheus, promtool] = [join(directory, 'prometheus'), join(directory, 'promtool')]
  if (directory === '' || !existsSync(prometheus)) throw new Error(`${directory} has no prometheus`)
  const { stdout, stderr } = await promisify(execFile)(promtool, ['--version'], { timeout: 20_000 })
  const [, version] = /version (\S+)/.exec(stdout + stderr) ?? []
  if (version === undefined) throw new Error('promtool does not say its version')
  return { prometheus, promtool, version }
}

/** One series of an answer and its value now. */
export interface QueriedSample {
  readonly metric: Readonly<Record<string, string>>
  readonly value: number
}

/** A rule as Prometheus has understood it. */
export interface Rule {
  readonly type: 'recording' | 'alerting'
  readonly name: string
  readonly query: string
  readonly health: string
  readonly lastError?: string
  /** Of alerts only. */
  readonly labels?: Readonly<Record<string, string>>
  readonly annotations?: Readonly<Record<string, string>>
  readonly alerts?: readonly {
    readonly state: 'pending' | 'firing'
    readonly labels: Readonly<Record<string, string>>
    readonly annotations: Readonly<Record<string, string>>
  }[]
}

export interface Prometheus extends AsyncDisposable {
  readonly url: string
  query(expression: string): Promise<readonly QueriedSample[]>
  rules(): Promise<readonly Rule[]>
  /** The names of the alerts that fire now. */
  firing(): Promise<readonly string[]>
}

export interface PrometheusOptions {
  /** `host:port` of the admin servers. */
  readonly targets: readonly string[]
  /** The text of the rules. */
  readonly rules: string
  /** For scrapes and rules, such as `1s`. */
  readonly interval: string
}

/** Starts one on a free port, with its data in a temporary directory. */
export async function startPrometheus({ targets, rules, interval }: PrometheusOptions): Promise<Prometheus> {
  const { prometheus } = await findPrometheus()
  await using started = new AsyncDisposableStack()
  const directory = started.use(makeRunDirectory())
  const file = join(directory.path, 'prometheus.yaml')
  // JSON is YAML.
  writeFileSync(
    file,
    JSON.stringify({
      global: { scrape_interval: interval, evaluation_interval: interval },
      rule_files: ['rules.yaml'],
      scrape_configs: [{ job_name: 'itemcache', static_configs: [{ targets }] }],
    }),
  )
  writeFileSync(join(directory.path, 'rules.yaml'), rules)
  const child = spawn(
    prometheus,
    [
      `--config.file=${file}`,
      `--storage.tsdb.path=${join(directory.path, 'data')}`,
      '--web.listen-address=127.0.0.1:0',
    ],
    { stdio: ['ignore', 'ignore', 'pipe'] },
  )
  if (child.pid !== undefined) directory.ends(child.pid, 'SIGKILL')
  const ended = new Promise<void>((resolve) => child.once('close', () => resolve()))
  started.defer(async () => {
    child.kill('SIGKILL')
    await ended
  })
  const listening = Promise.withResolvers<string>()
  const lines: string[] = []
  createInterface({ input: child.stderr }).on('line', (line) => {
    if (lines.length < 100) lines.push(line)
    const [, address] = /msg="Listening on".* address=(\S+)/.exec(line) ?? []
    if (address !== undefined) listening.resolve(address)
  })
  void ended.then(() => listening.reject(new Error(`Prometheus ended at once:\n${lines.join('\n')}`)))
  const url = `http://${await listening.promise}`
  const ask = async (path: string) => {
    const response = await fetch(`${url}/api/v1/${path}`)
    const { status, data, error } = (await response.json()) as {
      status: string
      data: unknown
      error?: string
    }
    if (status !== 'success') throw new Error(`Prometheus answers ${path}: ${error}`)
    return data
  }
  const allRules = async () => {
    const { groups } = (await ask('rules')) as { groups: readonly { readonly rules: readonly Rule[] }[] }
    return groups.flatMap((group) => group.rules)
  }
  const running = started.move()
  return {
    url,
    query: async (expression) => {
      const { resultType, result } = (await ask(`query?query=${encodeURIComponent(expression)}`)) as {
        resultType: string
        result: readonly { metric: Readonly<Record<string, string>>; value: [number, string] }[]
      }
      if (resultType !== 'vector') throw new Error(`${expression} is a ${resultType}`)
      return result.map(({ metric, value: [, value] }) => ({ metric, value: Number(value) }))
    },
    rules: allRules,
    firing: async () =>
      (await allRules())
        .filter(({ alerts = [] }) => alerts.some(({ state }) => state === 'firing'))
        .map(({ name }) => name),
    [Symbol.asyncDispose]: () => running.disposeAsync(),
  }
}
