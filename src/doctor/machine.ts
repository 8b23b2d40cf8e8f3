/** What may be wrong on this machine: the runtime, its limits, the addresses and files of the service. */
import { X509Certificate } from 'node:crypto'
import { existsSync, readFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { totalmem } from 'node:os'
import { createRemoteJWKSet } from 'jose'
import { type Config, formatAddress, type HostPort, isLoopback, withoutPasswords } from '../config.ts'
import { createLogger } from '../observe/log.ts'
import { startAuth } from '../rpc/auth.ts'
import { TlsCredentials } from '../rpc/tls.ts'
import { FakeStoreOrigin } from '../tiers/origin.ts'
import { checkExpiry, megabytes, reasonOf, seconds } from './measures.ts'
import type { Report } from './report.ts'

const NODE = [24, 17] as const
/** Of the service itself: code, heap, connections. */
const PROCESS_BYTES = 200 * 2 ** 20
/** Files besides connections: the program's own, logs, pools. */
const OTHER_FILES = 200
const PATIENCE_MS = 3_000

export async function examineMachine(report: Report, config: Config): Promise<void> {
  checkNode(report, process.versions.node)
  checkFiles(report, config, openFileLimit())
  checkMemory(report, config, memoryLimit())
  checkCertificate(report, config)
  await checkCredentials(report, config)
  await checkAddress(report, 'machine.grpc-address', config.listen, config)
  if (config.admin !== undefined) await checkAddress(report, 'machine.admin-address', config.admin, config)
}

export function checkNode(report: Report, version: string): void {
  const [major = 0, minor = 0] = version.split('.').map(Number)
  if (major > NODE[0] || (major === NODE[0] && minor >= NODE[1])) report.ok('machine.node', `Node ${version}`)
  else
    report.fault(
      'machine.node',
      `Node ${version} is too old`,
      'Use Node 24.17 or newer; npm start brings one along.',
    )
}

/** The soft limit on open files; `undefined` where the system does not say. */
function openFileLimit(): number | undefined {
  if (!existsSync('/proc/self/limits')) return undefined
  const [, soft] = /^Max open files\s+(\d+)/m.exec(readFileSync('/proc/self/limits', 'utf8')) ?? []
  return soft === undefined ? Number.POSITIVE_INFINITY : Number(soft)
}

export function checkFiles(report: Report, { grpc, pools }: Config, limit: number | undefined): void {
  if (limit === undefined) {
    report.unknown('machine.open-files', 'this system does not say how many may be open')
    return
  }
  const wanted = grpc.maxConnections + pools.postgres + pools.originConcurrency + OTHER_FILES
  const text = `${limit} files may be open, and up to ${wanted} are wanted`
  if (limit >= wanted) report.ok('machine.open-files', text)
  else if (limit < 1_024)
    report.fault('machine.open-files', text, `ulimit -n ${wanted}, or LimitNOFILE=${wanted}.`)
  else {
    report.warning(
      'machine.open-files',
      text,
      `ulimit -n ${wanted} (LimitNOFILE=), or a smaller ITEMCACHE_MAX_CONNECTIONS.`,
    )
  }
}

/** What the machine, or the container, lets this process have. */
function memoryLimit(): number {
  return Math.min(totalmem(), process.constrainedMemory() || Number.POSITIVE_INFINITY)
}

export function checkMemory(report: Report, { memory, grpc }: Config, limit: number): void {
  const copies = memory.enabled ? memory.maxBytes : 0
  const wanted = copies + grpc.maxAnswerMemoryBytes + grpc.maxRequestMemoryBytes + PROCESS_BYTES
  const text = `up to ${megabytes(wanted)} at the worst (${megabytes(copies)} of them copies), of ${megabytes(limit)}`
  const mend = 'Lower ITEMCACHE_MEMORY_MAX_BYTES, or give the container more memory.'
  if (copies + PROCESS_BYTES > limit) report.fault('machine.memory', text, mend)
  else if (wanted > limit) report.warning('machine.memory', text, mend)
  else report.ok('machine.memory', text)
}

function checkCertificate(report: Report, { tls, listen }: Config): void {
  if (tls === undefined) {
    if (!isLoopback(listen.host)) {
      report.warning(
        'machine.tls',
        'callers reach the service without TLS',
        'Set ITEMCACHE_TLS_CERT and ITEMCACHE_TLS_KEY.',
      )
    }
    return
  }
  try {
    new TlsCredentials(tls, createLogger({ level: 'silent', version: '' }))
    checkExpiry(
      report,
      'machine.certificate',
      "the service's",
      new X509Certificate(readFileSync(tls.cert)).validTo,
    )
  } catch (error) {
    report.fault(
      'machine.certificate',
      reasonOf(error),
      'Compare the files with what ITEMCACHE_TLS_CERT and ITEMCACHE_TLS_KEY name.',
    )
  }
}

async function checkCredentials(report: Report, { auth, listen }: Config): Promise<void> {
  if (auth.kind === 'none') {
    if (!isLoopback(listen.host)) {
      report.warning(
        'machine.auth',
        'nobody has to say who they are',
        'Set ITEMCACHE_AUTH: docs/security.md.',
      )
    }
    return
  }
  try {
    startAuth(auth, { log: createLogger({ level: 'silent', version: '' }) })
  } catch (error) {
    return report.fault('machine.auth', reasonOf(error), 'Compare the file with docs/security.md.')
  }
  try {
    if (auth.kind === 'jwt' && auth.jwks.kind === 'url') await fetchKeys(auth.jwks.url)
    report.ok('machine.auth', `callers are known by ${auth.kind === 'jwt' ? 'JSON Web Tokens' : 'tokens'}`)
  } catch (error) {
    report.fault(
      'machine.auth',
      `the keys of the issuer cannot be had: ${withoutPasswords(reasonAndCause(error))}`,
      'Does jwks in ITEMCACHE_AUTH lead to the key set of the issuer, reached from here? Nobody is let in without it.',
    )
  }
}

/** As the service does when the first token comes. Rejects when there is no key. */
async function fetchKeys(url: string): Promise<void> {
  const keySet = createRemoteJWKSet(new URL(url), { timeoutDuration: PATIENCE_MS })
  await keySet.reload()
  if (keySet.jwks()?.keys.length === 0) throw new Error('there are none in the key set')
}

/** Of what `fetch` rejects with, the cause tells more than the message. */
function reasonAndCause(error: unknown): string {
  const cause = error instanceof Error && error.cause !== undefined ? `: ${reasonOf(error.cause)}` : ''
  return `${reasonOf(error)}${cause}`
}

async function checkAddress(
  report: Report,
  check: string,
  address: HostPort,
  { admin }: Config,
): Promise<void> {
  const text = formatAddress(address)
  const problem = await listenError(address)
  if (problem === undefined) return report.ok(check, `${text} is free`)
  if (problem !== 'EADDRINUSE') {
    return report.fault(
      check,
      `${text} cannot be listened on: ${problem}`,
      'Name an address of this machine, and a port that this user may open.',
    )
  }
  if (admin !== undefined && (await isServing(admin)))
    return report.ok(check, `${text} is the running service's`)
  report.fault(check, `another process has ${text}`, 'Stop it, or choose another port; port 0 takes any.')
}

function listenError({ host, port }: HostPort): Promise<string | undefined> {
  return new Promise((done) => {
    const server = createServer()
    server.once('error', (error: NodeJS.ErrnoException) => done(error.code ?? error.message))
    server.listen(port, host, () => server.close(() => done(undefined)))
  })
}

/** Whether the service answers there. */
async function isServing(admin: HostPort): Promise<boolean> {
  const host = ['0.0.0.0', '::'].includes(admin.host) ? 'localhost' : admin.host
  try {
    const answer = await fetch(`http://${formatAddress({ host, port: admin.port })}/readyz`, {
      signal: AbortSignal.timeout(PATIENCE_MS),
    })
    return 'draining' in ((await answer.json()) as object) || answer.ok
  } catch {
    return false
  }
}

export async function examineOrigin(report: Report, { origin, timeouts }: Config): Promise<void> {
  if (origin.kind !== 'url') {
    const text =
      origin.kind === 'off' ? 'off: items come from PostgreSQL only' : 'a bundled catalogue of 20 products'
    return report.ok('origin.configured', text)
  }
  const tier = new FakeStoreOrigin({
    url: origin.url,
    timeoutMs: timeouts.originMs,
    overallMs: 2 * timeouts.originMs,
    maxConcurrent: 1,
    random: Math.random,
  })
  const startMs = performance.now()
  try {
    const draft = await tier.fetch('1')
    const text = `it answers after ${seconds(performance.now() - startMs)}`
    report.ok('origin.connection', draft === undefined ? `${text}; it has no item 1` : text)
  } catch (error) {
    report.fault(
      'origin.connection',
      reasonAndCause(error),
      'Does ORIGIN_URL name a catalogue like https://fakestoreapi.com, reached from here? Stored items are served without it.',
    )
  }
}
