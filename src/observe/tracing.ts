/**
 * Traces: spans of OpenTelemetry for calls, for the tiers that they walk, and for what goes on behind them. This file
 * knows the API only and is loaded when tracing is on (`tracing-sdk.ts`); everybody else knows its types.
 *
 * A span is handed on by hand, in `ReadOptions`, in flights and in writes, so that there is no async context to pay for.
 * What one trace may grow to is bounded: children, events and links of a span beyond a number are left out.
 */
import {
  type Attributes,
  type Context,
  defaultTextMapGetter,
  defaultTextMapSetter,
  type Link,
  ROOT_CONTEXT,
  type Span,
  SpanKind,
  SpanStatusCode,
  type TextMapPropagator,
  TraceFlags,
  type Tracer,
  trace,
} from '@opentelemetry/api'
import type { HostPort } from '../config.ts'
import { ItemCacheError } from '../errors.ts'
import type { TierName, TierSpan } from '../tiers/tier.ts'

export interface TracingOptions {
  readonly tracer: Tracer
  readonly propagator: TextMapPropagator
  /** The names of the headers that the propagator reads. */
  readonly fields: readonly string[]
  /** The same for each tier: what it is and where. */
  readonly tiers: Readonly<Partial<Record<TierName, Attributes>>>
}

/** What of a call's metadata and its end a span tells. */
export interface TracedCall {
  readonly metadata: { get(name: string): readonly (string | Buffer)[] }
  getPeer(): string
}

/** How a call ended. */
export interface Ending {
  /** The name of the gRPC status. */
  readonly code: string
  readonly tenant: string | undefined
  readonly id: string | undefined
  readonly tier: string | undefined
  readonly outcome: string | undefined
  readonly reason: string | undefined
}

/** What a call of a tier is, as the conventions for databases and HTTP name it. */
interface Operation {
  /** The span's name: what is done, and with what. */
  readonly name: string
  readonly attributes: Attributes
}

const select = (collection: string): Operation => sql('SELECT', collection)
const sql = (operation: string, collection: string): Operation => ({
  name: `${operation} ${collection}`,
  attributes: {
    'db.operation.name': operation,
    'db.collection.name': collection,
    'db.query.summary': `${operation} ${collection}`,
  },
})
const script = (name: string): Operation => ({
  name: `EVALSHA ${name}`,
  attributes: { 'db.operation.name': 'EVALSHA', 'db.stored_procedure.name': name },
})

/** Everything that is done with a tier. `db.query.text` is left out: there is one statement for each of these. */
export const OPERATIONS = {
  memory: { name: 'memory', attributes: {} },
  'redis.read': script('read_copies'),
  'redis.store': script('store_copies'),
  'redis.lock': script('take_lock'),
  'postgres.read': select('items'),
  'postgres.log': select('invalidations'),
  'postgres.outcome': select('requests'),
  'postgres.insert': sql('INSERT', 'items'),
  'postgres.update': sql('UPDATE', 'items'),
  'postgres.delete': sql('DELETE', 'items'),
  'postgres.invalidate': sql('INSERT', 'invalidations'),
  'origin.fetch': {
    name: 'GET /products/{id}',
    attributes: { 'http.request.method': 'GET', 'url.template': '/products/{id}' },
  },
} as const satisfies Record<string, Operation>

export type TierOperation = keyof typeof OPERATIONS

const MAX_CHILDREN = 64
const MAX_EVENTS = 32
const MAX_LINKS = 32

/** Calls that look up many items: what memory said of each is counted and not shown one by one. */
const MANY = /\/(BatchGetItems|StreamItems)$/

/** Statuses that are the server's fault, by the conventions for gRPC. */
const FAULTS: ReadonlySet<string> = new Set([
  'UNKNOWN',
  'DEADLINE_EXCEEDED',
  'UNIMPLEMENTED',
  'INTERNAL',
  'UNAVAILABLE',
  'DATA_LOSS',
])

/** Where traces begin. */
export class Tracing {
  readonly options: TracingOptions
  #server: Attributes = {}

  constructor(options: TracingOptions) {
    this.options = options
  }

  /** Where the server listens, once it does. */
  serves({ host, port }: HostPort): void {
    this.#server = { 'server.address': host, 'server.port': port }
  }

  /** A call has come; its span is a child of the caller's, if the metadata name one. `method` is the full name. */
  call(method: string, call: TracedCall): Trace {
    const { tracer, propagator, fields } = this.options
    const carrier: Record<string, string> = {}
    for (const field of fields) {
      const values = call.metadata.get(field)
      // Who sends several means none.
      if (values.length === 1) carrier[field] = String(values[0])
    }
    const parent = propagator.extract(ROOT_CONTEXT, carrier, defaultTextMapGetter)
    const epochMs = epoch()
    const attributes = { 'rpc.system.name': 'grpc', 'rpc.method': method, ...this.#server }
    const options = { kind: SpanKind.SERVER, attributes, startTime: epochMs + performance.now() }
    const span = tracer.startSpan(method, options, parent)
    const begun = new Trace(this, span, epochMs, span.isRecording(), MANY.test(method))
    if (begun.recorded) begun.note(peerOf(call.getPeer()))
    return begun
  }

  /** A refresh of an item behind an answer begins: a trace of its own, with a link to the call that caused it. */
  refresh(tenant: string, id: string, cause: Trace | undefined): Trace {
    const links = cause?.recorded ? [{ context: cause.span.spanContext() }] : []
    return this.#root('refresh', { 'itemcache.tenant': tenant, 'itemcache.item.id': id }, links)
  }

  /** Rows of the log have been applied that were asked for at `sentAtMs`, by `performance.now()`. */
  applied(tenants: number, rows: number, sentAtMs: number): void {
    const attributes = { 'itemcache.log.tenants': tenants, 'itemcache.log.rows': rows }
    const epochMs = epoch()
    this.#root('invalidations', attributes, [], epochMs + sentAtMs, epochMs).end()
  }

  #root(
    name: string,
    attributes: Attributes,
    links: Link[],
    startTime?: number,
    epochMs: number = epoch(),
  ): Trace {
    const options = { attributes, links, root: true, startTime: startTime ?? epochMs + performance.now() }
    const span = this.options.tracer.startSpan(name, options, ROOT_CONTEXT)
    return new Trace(this, span, epochMs, span.isRecording(), false)
  }
}

/** One span, from which its children begin. After its end it still passes its context on. */
export class Trace implements TierSpan, Disposable {
  readonly span: Span
  /** False for one that is not sampled, or beyond a bound: it passes the context on and notes nothing. */
  readonly recorded: boolean
  readonly #tracing: Tracing
  /** Plus `performance.now()`: the time since 1970 in milliseconds. One for the whole tree, so that its times agree. */
  readonly #epochMs: number
  readonly #many: boolean
  #context: Context | undefined
  #silent: Trace | undefined
  #waitedForLog = false
  #load: Trace | undefined
  #loads = 0
  #children = 0
  #events = 0
  #links = 0
  #memory = { hits: 0, misses: 0 }
  #over = false

  constructor(tracing: Tracing, span: Span, epochMs: number, recorded: boolean, many: boolean) {
    this.#tracing = tracing
    this.span = span
    this.#epochMs = epochMs
    this.recorded = recorded
    this.#many = many
  }

  get traceId(): string {
    return this.span.spanContext().traceId
  }

  get spanId(): string {
    return this.span.spanContext().spanId
  }

  /** As W3C writes it; `undefined` when the trace is not sampled. */
  get traceparent(): string | undefined {
    if (!this.recorded) return undefined
    const { traceId, spanId, traceFlags } = this.span.spanContext()
    return `00-${traceId}-${spanId}-0${traceFlags & TraceFlags.SAMPLED}`
  }

  headers(): Readonly<Record<string, string>> {
    const headers: Record<string, string> = {}
    this.#tracing.options.propagator.inject(this.#here, headers, defaultTextMapSetter)
    return headers
  }

  note(attributes: Attributes): void {
    if (this.recorded && !this.#over) this.span.setAttributes(attributes)
  }

  event(name: string, attributes: Attributes = {}): void {
    if (!this.recorded || this.#over || this.#events++ >= MAX_EVENTS) return
    this.span.addEvent(name, attributes, this.#now())
  }

  /** A call of a tier begins, about so many keys. */
  tier(operation: TierOperation, keys: number): Trace {
    const tier = operation.replace(/\..*/, '') as TierName
    // All look-ups of a call wait for the tenant's log together.
    if (operation === 'postgres.log' && this.#waitedForLog) return this.#passing
    this.#waitedForLog ||= operation === 'postgres.log'
    const { name, attributes }: Operation = OPERATIONS[operation]
    const kind = tier === 'memory' ? SpanKind.INTERNAL : SpanKind.CLIENT
    return this.#child(name, kind, {
      'itemcache.tier': tier,
      ...this.#tracing.options.tiers[tier],
      ...attributes,
      ...(keys > 1 && { 'db.operation.batch.size': keys }),
    })
  }

  /** The load that this trace's flights share, until all of them are over. Each ends it once. */
  load(route: string): Trace {
    if (!this.recorded) return this
    if (this.#load === undefined || this.#load.#over) {
      this.#load = this.#child('load', SpanKind.INTERNAL, { 'itemcache.route': route })
    }
    this.#load.#loads++
    return this.#load
  }

  /** What memory said of one look-up. */
  looked(outcome: string | undefined): void {
    if (!this.recorded) return
    if (outcome === undefined) this.#memory.misses++
    else this.#memory.hits++
    if (this.#many) return
    const memory = this.tier('memory', 1)
    memory.event(eventOf(outcome))
    memory.end()
  }

  /** The load that this trace waits for had been started for somebody else. */
  coalesced(flight: Trace | undefined): void {
    if (!this.recorded || this.#over) return
    this.event('coalesced')
    if (!flight?.recorded || this.#links++ >= MAX_LINKS) return
    this.span.addLink({ context: flight.span.spanContext() })
  }

  /** What was done has failed. Somebody who left is none of the tier's failures. */
  fail(error: unknown): void {
    if (!this.recorded || this.#over) return
    if (!(error instanceof ItemCacheError)) {
      this.span.setAttribute('error.type', error instanceof Error ? error.name : 'unknown')
      this.span.setStatus({ code: SpanStatusCode.ERROR })
      return
    }
    this.span.setAttribute('error.type', error.reason)
    if (error.code !== 'cancelled')
      this.span.setStatus({ code: SpanStatusCode.ERROR, message: error.message })
  }

  /** The call is over. */
  answered({ code, tenant, id, tier, outcome, reason }: Ending): void {
    if (!this.recorded) return
    const { hits, misses } = this.#memory
    const attributes: Attributes = { 'rpc.response.status_code': code }
    if (tenant !== undefined) attributes['itemcache.tenant'] = tenant
    if (id !== undefined) attributes['itemcache.item.id'] = id
    if (tier !== undefined) attributes['itemcache.tier'] = tier
    if (this.#many) {
      attributes['itemcache.memory.hits'] = hits
      attributes['itemcache.memory.misses'] = misses
    } else if (outcome !== undefined) attributes['itemcache.outcome'] = outcome
    if (reason !== undefined) attributes['error.type'] = reason
    this.note(attributes)
    if (FAULTS.has(code)) this.span.setStatus({ code: SpanStatusCode.ERROR })
    this.end()
  }

  end(): void {
    // A load ends with the last of its flights.
    if (!this.recorded || this.#over || --this.#loads > 0) return
    this.#over = true
    this.span.end(this.#now())
  }

  [Symbol.dispose](): void {
    this.end()
  }

  get #here(): Context {
    this.#context ??= trace.setSpan(ROOT_CONTEXT, this.span)
    return this.#context
  }

  /** Stands for a child that is left out: passes this span's context on. */
  get #passing(): Trace {
    this.#silent ??= new Trace(this.#tracing, this.span, this.#epochMs, false, false)
    return this.#silent
  }

  #now(): number {
    return this.#epochMs + performance.now()
  }

  #child(name: string, kind: SpanKind, attributes: Attributes): Trace {
    if (!this.recorded) return this
    if (this.#children++ >= MAX_CHILDREN) return this.#passing
    const options = { kind, attributes, startTime: this.#now() }
    const span = this.#tracing.options.tracer.startSpan(name, options, this.#here)
    return new Trace(this.#tracing, span, this.#epochMs, span.isRecording(), false)
  }
}

/** What is to be added to `performance.now()` for the time since 1970. */
const epoch = (): number => Date.now() - performance.now()

/** The event that tells of an outcome of memory's or Redis'. */
function eventOf(outcome: string | undefined): string {
  if (outcome === undefined) return 'miss'
  return outcome === 'STALE' ? 'stale' : 'hit'
}

/** `address:port`, where the address may hold colons; what is none of this is left out. */
function peerOf(peer: string): Attributes {
  const [, address, port] = /^(?:ipv[46]:)?\[?([^\]]+?)\]?:(\d+)$/.exec(peer) ?? []
  if (address === undefined) return {}
  return { 'client.address': address, 'network.peer.address': address, 'network.peer.port': Number(port) }
}
