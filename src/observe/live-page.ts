/**
 * The live page: what one instance does, second by second, for people with a browser.
 *
 * `/` and `/page/` are files, `/events` is a stream of server-sent events, and `/inspect` looks one item up. All of them
 * name items of all tenants, and nobody is asked for a credential, hence three checks of each request. It must come from
 * this machine unless the operator has opened the page to others. Its Host must be an address, localhost or a name that
 * the operator has given: a site that points a name of its own to this address (DNS rebinding) reads nothing. And a
 * browser must not make it for another site's page.
 *
 * One message a second is made for all listeners, and none when there are none. A listener who does not read is
 * disconnected when `MAX_UNREAD_BYTES` wait for it; its browser comes back and gets the history anew.
 */
import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import type { IncomingMessage, ServerResponse } from 'node:http'
import { createRequire } from 'node:module'
import { isIP } from 'node:net'
import { join } from 'node:path'
import { type Config, isLoopback } from '../config.ts'
import { ItemCacheError } from '../errors.ts'
import type { Feed } from './feed.ts'
import { COLUMNS, HISTORY_SECONDS, type History } from './history.ts'
import type { History as HistoryMessage, Now, Sample, Second } from './live-message.ts'

/** Pages that are open at once. */
export const MAX_LISTENERS = 16
/** What may wait for one of them: several histories. */
export const MAX_UNREAD_BYTES = 1024 * 1024
/** Look-ups that are under way at once. */
const MAX_LOOK_UPS = 4
const TICK_MS = 1_000
const CHANGES_MS = 100

/** What the live page shows, and to whom. */
export interface LivePageOptions {
  readonly version: string
  readonly access: Config['livePage']
  readonly history: History
  readonly feed: Feed
  /** Asked once a second while somebody looks. */
  readonly now: () => Omit<Now, 'outages' | 'rpcs'>
  /** The answer of InspectItem as its JSON form. Throws `ItemCacheError`. */
  readonly inspect: (tenant: string, id: string) => Promise<unknown>
  readonly onError?: (error: unknown) => void
  /** Between two samples. Default: 1,000. */
  readonly tickMs?: number
}

interface File {
  readonly contentType: string
  readonly body: Buffer
  readonly etag: string
}

const require = createRequire(import.meta.url)
const HTML = 'text/html; charset=utf-8'
const SCRIPT = 'text/javascript; charset=utf-8'
const STYLE = 'text/css; charset=utf-8'

const own = (name: string) => join(import.meta.dirname, 'page', name)

/** All files that are served, by their paths: nothing else can be asked for. */
const FILES: Readonly<Record<string, { readonly contentType: string; readonly path: () => string }>> = {
  '/': { contentType: HTML, path: () => own('index.html') },
  '/page/page.css': { contentType: STYLE, path: () => own('page.css') },
  '/page/icon.svg': { contentType: 'image/svg+xml', path: () => own('icon.svg') },
  ...Object.fromEntries(
    ['page', 'headline', 'plots', 'tables', 'look-up', 'elements', 'format'].map((name) => [
      `/page/${name}.js`,
      { contentType: SCRIPT, path: () => own(`${name}.js`) },
    ]),
  ),
  '/page/uplot.css': { contentType: STYLE, path: () => require.resolve('uplot/dist/uPlot.min.css') },
  '/page/uplot.js': { contentType: SCRIPT, path: () => require.resolve('uplot/dist/uPlot.iife.min.js') },
}

const TEXT = 'text/plain; charset=utf-8'
const JSON_TYPE = 'application/json; charset=utf-8'

const SAFE_HEADERS = {
  'content-security-policy':
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
  'cross-origin-opener-policy': 'same-origin',
  'cross-origin-resource-policy': 'same-origin',
  'referrer-policy': 'no-referrer',
  'x-content-type-options': 'nosniff',
  'x-frame-options': 'DENY',
}

export class LivePage implements Disposable {
  readonly #options: LivePageOptions
  readonly #files = new Map<string, File>()
  readonly #listeners = new Set<ServerResponse>()
  readonly #timer: NodeJS.Timeout
  #telling: NodeJS.Timeout | undefined
  /** The newest row of the feed that listeners have. */
  #fed = 0
  #lookUps = 0

  constructor(options: LivePageOptions) {
    this.#options = options
    this.#timer = setInterval(() => this.#guarded(() => this.tick()), options.tickMs ?? TICK_MS)
    this.#timer.unref()
  }

  /** Pages that are open. */
  get listeners(): number {
    return this.#listeners.size
  }

  /** Answers the request if its path is one of the page's; false if not. */
  handle(request: IncomingMessage, response: ServerResponse): boolean {
    const [path = '', query = ''] = request.url?.split('?', 2) ?? []
    const file = Object.hasOwn(FILES, path)
    if (this.#options.access.to === 'nobody' || !(file || path === '/events' || path === '/inspect'))
      return false
    if (request.method !== 'GET' && request.method !== 'HEAD') {
      refuse(response, 405, 'only GET and HEAD', { allow: 'GET, HEAD' })
      return true
    }
    const refusal = this.#refusal(request, path)
    if (refusal !== undefined) refuse(response, 403, refusal)
    else if (path === '/events') this.#listen(request, response)
    else if (path === '/inspect') void this.#lookUp(new URLSearchParams(query), response)
    else this.#serve(path, request, response)
    return true
  }

  /** A second has passed: takes its sample, and tells it to whoever listens. */
  tick(): void {
    const { history } = this.#options
    history.take()
    this.#tell(history.newest ?? null)
  }

  /** A part has changed its state: who listens is told at once, but at most ten times a second. */
  changed(): void {
    this.#options.history.noteOutages()
    this.#telling ??= setTimeout(() => {
      this.#telling = undefined
      this.#guarded(() => this.#tell(null))
    }, CHANGES_MS).unref()
  }

  [Symbol.dispose](): void {
    clearInterval(this.#timer)
    clearTimeout(this.#telling)
    for (const listener of this.#listeners) listener.destroy()
  }

  #tell(sample: Sample | null): void {
    const { feed } = this.#options
    const after = this.#fed
    this.#fed = feed.seq
    if (this.#listeners.size === 0) return
    const second: Second = { sample, invalidations: feed.after(after), now: this.#now() }
    const message = eventOf('second', second)
    for (const listener of this.#listeners) this.#send(listener, message)
  }

  /** What a timer calls must not throw. */
  #guarded(action: () => void): void {
    try {
      action()
    } catch (error) {
      this.#options.onError?.(error)
    }
  }

  #now(): Now {
    const { history, now } = this.#options
    return { ...now(), outages: history.outages, rpcs: history.rpcs() }
  }

  /** Why a request is not answered; `undefined` if it is. */
  #refusal({ socket, headers }: IncomingMessage, path: string): string | undefined {
    const { to, names } = this.#options.access
    if (to === 'this-machine' && !isLoopback(socket.remoteAddress ?? '')) {
      return 'the live page is for callers on this machine; ITEMCACHE_LIVE_PAGE says to whom else'
    }
    const host = nameIn(headers.host)
    if (host === undefined || !(isIP(host) !== 0 || host === 'localhost' || names.includes(host))) {
      return 'the live page has no such name; open it by its address or as localhost, or name it in ITEMCACHE_LIVE_PAGE'
    }
    const site = headers['sec-fetch-site']
    // Anybody may link to the page.
    if (path === '/' || site === undefined || site === 'same-origin' || site === 'none') return undefined
    return 'the live page answers its own requests only'
  }

  #serve(path: string, request: IncomingMessage, response: ServerResponse): void {
    let file: File
    try {
      file = this.#file(path)
    } catch (error) {
      this.#options.onError?.(error)
      refuse(response, 500, 'internal error')
      return
    }
    const headers = { ...SAFE_HEADERS, etag: file.etag, 'cache-control': 'no-cache' }
    if (request.headers['if-none-match']?.split(/\s*,\s*/).includes(file.etag)) {
      response.writeHead(304, headers).end()
      return
    }
    response.writeHead(200, {
      ...headers,
      'content-type': file.contentType,
      'content-length': file.body.byteLength,
    })
    response.end(file.body)
  }

  /** Read when first asked for: most instances are never looked at. */
  #file(path: string): File {
    const known = this.#files.get(path)
    if (known !== undefined) return known
    const found = FILES[path]
    if (found === undefined) throw new ItemCacheError('internal', 'unreachable: the path was checked')
    const body = readFileSync(found.path())
    const etag = `"${createHash('sha256').update(body).digest('base64url').slice(0, 16)}"`
    const file = { contentType: found.contentType, body, etag }
    this.#files.set(path, file)
    return file
  }

  #listen(request: IncomingMessage, response: ServerResponse): void {
    if (this.#listeners.size >= MAX_LISTENERS) {
      refuse(response, 503, `${MAX_LISTENERS} pages are open already`, { 'retry-after': '5' })
      return
    }
    response.writeHead(200, {
      ...SAFE_HEADERS,
      'content-type': 'text/event-stream',
      'cache-control': 'no-store',
      // So that no proxy keeps events back.
      'x-accel-buffering': 'no',
    })
    if (request.method === 'HEAD') {
      response.end()
      return
    }
    const { history, feed, version } = this.#options
    const message: HistoryMessage = {
      version,
      columns: COLUMNS,
      seconds: HISTORY_SECONDS,
      samples: history.samples(),
      // What came since the last tick comes with the next one.
      invalidations: feed.after(0).filter(({ seq }) => seq <= this.#fed),
      now: this.#now(),
    }
    response.on('close', () => this.#listeners.delete(response))
    response.on('error', () => this.#listeners.delete(response))
    this.#listeners.add(response)
    this.#send(response, `retry: 1000\n${eventOf('history', message)}`)
  }

  #send(listener: ServerResponse, message: string): void {
    if (listener.destroyed) return
    listener.write(message)
    if (listener.writableLength > MAX_UNREAD_BYTES) listener.destroy()
  }

  async #lookUp(query: URLSearchParams, response: ServerResponse): Promise<void> {
    if (this.#lookUps >= MAX_LOOK_UPS) {
      return answer(response, 429, { error: 'too many look-ups are under way; try again' })
    }
    this.#lookUps++
    try {
      const found = await this.#options.inspect(query.get('tenant') ?? '', query.get('id') ?? '')
      answer(response, 200, found)
    } catch (error) {
      if (error instanceof ItemCacheError && error.code === 'invalid') {
        answer(response, 400, { error: error.message })
      } else {
        this.#options.onError?.(error)
        answer(response, 500, { error: 'the look-up failed' })
      }
    } finally {
      this.#lookUps--
    }
  }
}

/** The host of a Host header without its port, in lower case. */
function nameIn(header: string | undefined): string | undefined {
  const [, bracketed, plain] = /^(?:\[([^\]]+)\]|([^[\]:]+))(?::\d+)?$/.exec(header ?? '') ?? []
  return (bracketed ?? plain)?.toLowerCase()
}

function eventOf(name: string, data: unknown): string {
  return `event: ${name}\ndata: ${JSON.stringify(data)}\n\n`
}

function answer(response: ServerResponse, status: number, found: unknown): void {
  const body = `${JSON.stringify(found)}\n`
  response.writeHead(status, {
    ...SAFE_HEADERS,
    'content-type': JSON_TYPE,
    'content-length': Buffer.byteLength(body),
    'cache-control': 'no-store',
  })
  response.end(body)
}

function refuse(
  response: ServerResponse,
  status: number,
  text: string,
  headers: Readonly<Record<string, string>> = {},
): void {
  const body = `${text}\n`
  response.writeHead(status, {
    ...SAFE_HEADERS,
    ...headers,
    'content-type': TEXT,
    'content-length': Buffer.byteLength(body),
    'cache-control': 'no-store',
    // A request that was not understood may go on with a body that nobody reads.
    connection: 'close',
  })
  response.end(body)
}
