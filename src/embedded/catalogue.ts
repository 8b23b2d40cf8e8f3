/** A catalogue server that speaks FakeStore's HTTP contract, for a start without configuration and for tests. */
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import products from './products.json' with { type: 'json' }

export interface CatalogueOptions {
  /** Default `127.0.0.1`. */
  readonly host?: string
  /** Default 0: any free port. */
  readonly port?: number
  /**
   * Sees every request first. Returns true when it has answered, or deliberately will not, so that tests can be
   * slow, wrong or silent in the catalogue's name.
   */
  readonly intercept?: (request: IncomingMessage, response: ServerResponse) => boolean
}

export interface Catalogue extends AsyncDisposable {
  /** The base URL, without a final slash. */
  readonly url: string
  /** How many requests came for each path, intercepted ones included; the query is not part of it. */
  readonly requests: ReadonlyMap<string, number>
}

/** How many different paths are counted: a stranger who invents paths must not grow the map for ever. */
const MAX_PATHS = 10_000

/** Starts the server; rejects when the address cannot be bound. */
export async function startCatalogue(options: CatalogueOptions = {}): Promise<Catalogue> {
  const requests = new Map<string, number>()
  const server = createServer((request, response) => {
    const url = new URL(`http://catalogue${request.url ?? '/'}`)
    const seen = requests.get(url.pathname)
    if (seen !== undefined || requests.size < MAX_PATHS) requests.set(url.pathname, (seen ?? 0) + 1)
    if (options.intercept?.(request, response)) return
    const { status, body } = answer(request.method ?? 'GET', url)
    const text = JSON.stringify(body)
    response.writeHead(status, {
      'content-type': 'application/json; charset=utf-8',
      'content-length': Buffer.byteLength(text),
    })
    response.end(text)
  })
  const listening = Promise.withResolvers<void>()
  server.once('error', listening.reject)
  server.listen(options.port ?? 0, options.host ?? '127.0.0.1', () => listening.resolve())
  await listening.promise
  const { address, family, port } = server.address() as AddressInfo
  return {
    url: `http://${family === 'IPv6' ? `[${address}]` : address}:${port}`,
    requests,
    async [Symbol.asyncDispose]() {
      const closed = Promise.withResolvers<void>()
      server.close(() => closed.resolve())
      server.closeAllConnections()
      await closed.promise
    },
  }
}

interface Answer {
  readonly status: number
  readonly body: unknown
}

function answer(method: string, url: URL): Answer {
  if (method !== 'GET' && method !== 'HEAD') return { status: 405, body: { message: 'only GET is served' } }
  const [root, first, second, ...rest] = url.pathname.split('/').filter(Boolean).map(decode)
  if (root !== 'products' || rest.length > 0) return { status: 404, body: { message: 'no such path' } }
  if (first === undefined) return { status: 200, body: listed(products, url.searchParams) }
  if (first === 'categories' && second === undefined) {
    return { status: 200, body: [...new Set(products.map(({ category }) => category))] }
  }
  if (first === 'category' && second !== undefined) {
    return { status: 200, body: listed(inCategory(second), url.searchParams) }
  }
  if (second !== undefined) return { status: 404, body: { message: 'no such path' } }
  // FakeStore says 200 and null for a product that it does not have.
  return { status: 200, body: products.find(({ id }) => String(id) === first) ?? null }
}

function inCategory(category: string): typeof products {
  return products.filter((product) => product.category === category)
}

function listed(all: typeof products, query: URLSearchParams): typeof products {
  const ordered = query.get('sort') === 'desc' ? all.toReversed() : all
  const limit = query.get('limit') ?? ''
  return /^[1-9]\d{0,8}$/.test(limit) ? ordered.slice(0, Number(limit)) : ordered
}

/** A path segment as text; one that encodes nothing is taken as it is and names no product. */
function decode(segment: string): string {
  try {
    return decodeURIComponent(segment)
  } catch {
    return segment
  }
}
