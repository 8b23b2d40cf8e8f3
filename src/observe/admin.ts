/** The admin server: health, metrics and the live page over HTTP, for people, probes and Prometheus. Not for callers. */
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import { formatAddress, type HostPort } from '../config.ts'
import { ItemCacheError } from '../errors.ts'
import type { LivePage } from './live-page.ts'
import type { Exposition } from './prometheus.ts'

/** Whether the service can do its work, and what state its parts are in; `detail` goes into the answer as it is. */
export interface Readiness {
  readonly ready: boolean
  readonly detail: Readonly<Record<string, unknown>>
}

/** What `startAdmin` needs. */
export interface AdminOptions extends HostPort {
  readonly metrics: Exposition
  readonly ready: () => Promise<Readiness>
  /** What is logged; `set` returns false for a level that does not exist. Default: there is no such page. */
  readonly logLevel?: { get(): string; set(level: string): boolean }
  /** Absent: there is none. */
  readonly page?: Pick<LivePage, 'handle'> | undefined
  /** How long `ready` may take before the answer is "not ready". Default: 2,000 ms. */
  readonly readyTimeoutMs?: number
  /** Told about what `metrics` and `ready` throw; callers are not. */
  readonly onError?: (error: unknown) => void
}

/** A running admin server. Disposing it ends all connections. */
export interface Admin extends AsyncDisposable {
  /** The bound address; its port is the chosen one if 0 was asked for. */
  readonly address: HostPort
}

interface Answer {
  readonly status: number
  readonly contentType: string
  readonly body: string
  /** The methods that there are; default: GET and HEAD. */
  readonly allow?: string
}

const TEXT = 'text/plain; charset=utf-8'
const JSON_TYPE = 'application/json; charset=utf-8'

/** Rejects when the address cannot be bound. */
export async function startAdmin(options: AdminOptions): Promise<Admin> {
  const server = createServer(
    {
      maxHeaderSize: 8 * 1024,
      headersTimeout: 5_000,
      requestTimeout: 10_000,
      keepAliveTimeout: 30_000,
      connectionsCheckingInterval: 1_000,
    },
    (request, response) => {
      if (options.page?.handle(request, response)) return
      answer(request, options).then(
        (found) => send(response, found),
        (error) => {
          options.onError?.(error)
          send(response, { status: 500, contentType: TEXT, body: 'internal error\n' })
        },
      )
    },
  )
  server.maxConnections = 256

  const listening = Promise.withResolvers<void>()
  server.once('error', listening.reject)
  server.listen(options.port, options.host, listening.resolve)
  try {
    await listening.promise
  } catch (cause) {
    const code = cause instanceof Error && 'code' in cause ? cause.code : 'unknown error'
    throw new ItemCacheError(
      'unavailable',
      `the admin server cannot listen on ${formatAddress(options)}: ${code}`,
      {
        reason: 'ADDRESS_UNAVAILABLE',
        cause,
      },
    )
  }
  server.off('error', listening.reject)
  server.on('error', (error) => options.onError?.(error))

  const bound = server.address()
  if (bound === null || typeof bound === 'string') throw new Error('the admin server has no TCP address')
  return {
    address: { host: bound.address, port: bound.port },
    async [Symbol.asyncDispose]() {
      const closed = Promise.withResolvers<void>()
      server.close(() => closed.resolve())
      server.closeAllConnections()
      await closed.promise
    },
  }
}

async function answer(request: IncomingMessage, options: AdminOptions): Promise<Answer> {
  const path = request.url?.replace(/\?.*$/s, '')
  if (path === '/log-level' && options.logLevel !== undefined) return logLevel(request, options.logLevel)
  if (path !== '/healthz' && path !== '/readyz' && path !== '/metrics') {
    const body = 'not found; there are /healthz, /readyz, /metrics and /log-level\n'
    return { status: 404, contentType: TEXT, body }
  }
  if (request.method !== 'GET' && request.method !== 'HEAD') {
    return { status: 405, contentType: TEXT, body: 'only GET and HEAD\n' }
  }
  switch (path) {
    case '/healthz':
      return { status: 200, contentType: TEXT, body: 'ok\n' }
    case '/metrics':
      return { status: 200, contentType: options.metrics.contentType, body: await options.metrics.text() }
    case '/readyz': {
      const readiness = await readinessOf(options)
      const body = `${JSON.stringify({ ready: readiness.ready, ...readiness.detail })}\n`
      return { status: readiness.ready ? 200 : 503, contentType: JSON_TYPE, body }
    }
  }
}

/** No level has a longer name. */
const MAX_LEVEL_BYTES = 16

/**
 * GET tells the level, PUT changes it to its body. Not for pages that a browser shows: it names their origin with every PUT,
 * also when the page's own name has been made to lead here.
 */
async function logLevel(
  request: IncomingMessage,
  logLevel: NonNullable<AdminOptions['logLevel']>,
): Promise<Answer> {
  if (request.method === 'GET' || request.method === 'HEAD') {
    return { status: 200, contentType: TEXT, body: `${logLevel.get()}\n` }
  }
  if (request.method !== 'PUT') {
    return { status: 405, contentType: TEXT, body: 'only GET, HEAD and PUT\n', allow: 'GET, HEAD, PUT' }
  }
  if (request.headers.origin !== undefined) {
    return { status: 403, contentType: TEXT, body: 'not from a page in a browser\n' }
  }
  let text = ''
  for await (const chunk of request) {
    text += String(chunk)
    if (text.length > MAX_LEVEL_BYTES) break
  }
  const level = text.length > MAX_LEVEL_BYTES ? '' : text.trim()
  if (!logLevel.set(level)) {
    const body = 'the body must be a level: trace, debug, info, warn, error, fatal, silent\n'
    return { status: 400, contentType: TEXT, body }
  }
  return { status: 200, contentType: TEXT, body: `${level}\n` }
}

async function readinessOf({ ready, readyTimeoutMs = 2_000, onError }: AdminOptions): Promise<Readiness> {
  const late = Promise.withResolvers<Readiness>()
  const timer = setTimeout(
    () => late.resolve({ ready: false, detail: { error: `no answer within ${readyTimeoutMs} ms` } }),
    readyTimeoutMs,
  )
  try {
    return await Promise.race([ready(), late.promise])
  } catch (error) {
    onError?.(error)
    return { ready: false, detail: { error: 'the check failed' } }
  } finally {
    clearTimeout(timer)
  }
}

function send(response: ServerResponse, { status, contentType, body, allow = 'GET, HEAD' }: Answer): void {
  response.writeHead(status, {
    'content-type': contentType,
    'content-length': Buffer.byteLength(body),
    'cache-control': 'no-store',
    'x-content-type-options': 'nosniff',
    ...(status === 405 ? { allow } : {}),
    // A request that was not understood may go on with a body that nobody reads.
    ...(status >= 400 && status < 500 ? { connection: 'close' } : {}),
  })
  // node:http leaves the body out for HEAD.
  response.end(body)
}
