/**
 * OpenTelemetry's SDK as the standard variables (`OTEL_*`) set it up. Loaded only when they switch tracing on. What the
 * SDK reads by itself (endpoint, headers, certificates, resource) it reads from the environment; the rest is read here.
 */
import { type Attributes, DiagLogLevel, diag, type TextMapPropagator } from '@opentelemetry/api'
import { CompositePropagator, W3CTraceContextPropagator } from '@opentelemetry/core'
import {
  defaultResource,
  detectResources,
  envDetector,
  resourceFromAttributes,
} from '@opentelemetry/resources'
import {
  AlwaysOffSampler,
  AlwaysOnSampler,
  BatchSpanProcessor,
  ConsoleSpanExporter,
  ParentBasedSampler,
  type Sampler,
  type SpanExporter,
  TraceIdRatioBasedSampler,
  TracerProvider,
} from '@opentelemetry/sdk-trace'
import type { TierName } from '../tiers/tier.ts'
import type { Logger } from './log.ts'
import { Tracing } from './tracing.ts'

type Environment = Readonly<Record<string, string>>

export interface TracingSetUp {
  /** The `OTEL_*` variables. */
  readonly env: Environment
  readonly version: string
  readonly log: Logger
  readonly tiers: Readonly<Partial<Record<TierName, Attributes>>>
}

/** What a stop waits for a collector. What it has not taken by then is lost. */
const FLUSH_PATIENCE_MS = 500

/** Tracing that is on. Disposing it sends what has not been sent. */
export interface RunningTracing extends AsyncDisposable {
  readonly tracing: Tracing
}

export async function startTracing(setUp: TracingSetUp): Promise<RunningTracing> {
  const { env, version, log } = setUp
  listen(log)
  const makeExporter = await exporterOf(env, log)
  const propagators = await propagatorsOf(env, log)
  const provider = inEnvironment(env, () => {
    const limit = (name: string) => number(env, log, name)
    return new TracerProvider({
      resource: defaultResource()
        .merge(resourceFromAttributes({ 'service.name': 'itemcache', 'service.version': version }))
        .merge(detectResources({ detectors: [envDetector] })),
      sampler: samplerOf(env, log),
      spanLimits: defined({
        attributeCountLimit: limit('OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT') ?? limit('OTEL_ATTRIBUTE_COUNT_LIMIT'),
        attributeValueLengthLimit:
          limit('OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT') ?? limit('OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT'),
        eventCountLimit: limit('OTEL_SPAN_EVENT_COUNT_LIMIT'),
        linkCountLimit: limit('OTEL_SPAN_LINK_COUNT_LIMIT'),
      }),
      spanProcessors: [
        // Holds so many spans and no more: what a collector does not take is dropped.
        new BatchSpanProcessor({
          exporter: makeExporter(),
          ...defined({
            maxQueueSize: limit('OTEL_BSP_MAX_QUEUE_SIZE'),
            maxExportBatchSize: limit('OTEL_BSP_MAX_EXPORT_BATCH_SIZE'),
            scheduledDelayMillis: limit('OTEL_BSP_SCHEDULE_DELAY'),
            exportTimeoutMillis: limit('OTEL_BSP_EXPORT_TIMEOUT'),
          }),
        }),
      ],
    })
  })
  const propagator = new CompositePropagator({ propagators })
  return {
    tracing: new Tracing({
      tracer: provider.getTracer('itemcache', version),
      propagator,
      fields: propagator.fields(),
      tiers: setUp.tiers,
    }),
    async [Symbol.asyncDispose]() {
      const { promise: late, resolve } = Promise.withResolvers<void>()
      const timer = setTimeout(resolve, FLUSH_PATIENCE_MS)
      const flushed = provider.shutdown().catch((error: unknown) => {
        log.warn({ err: error }, 'the last spans were not taken')
      })
      await Promise.race([flushed, late])
      clearTimeout(timer)
    },
  }
}

/** Where a tier's server is, as far as its URL tells. */
export function serverOf(url: string | undefined): Attributes {
  // Of the nodes of a cluster, the first.
  const parsed = url === undefined ? null : URL.parse(url.split(',')[0] ?? '')
  if (parsed === null) return {}
  const attributes: Attributes = {}
  // PostgreSQL's way to name the directory of a socket.
  const directory = parsed.searchParams.get('host')
  attributes['server.address'] = directory ?? (parsed.hostname || parsed.pathname)
  if (directory === null && parsed.port !== '') attributes['server.port'] = Number(parsed.port)
  const database = parsed.protocol.startsWith('postgres')
    ? decodeURIComponent(parsed.pathname.slice(1))
    : parsed.searchParams.get('db')
  if (database) attributes['db.namespace'] = database
  return attributes
}

/** What the SDK complains of goes into our log: a collector that is away, among others. */
function listen(log: Logger): void {
  const warn = (message: string) => log.warn({ detail: message }, 'tracing')
  const debug = (message: string) => log.debug({ detail: message }, 'tracing')
  const sink = { error: warn, warn, info: debug, debug, verbose: () => {} }
  diag.setLogger(sink, { logLevel: DiagLogLevel.INFO, suppressOverrideMessage: true })
}

/** Lets the SDK see the variables, those of a file .env among them, while it is made. */
function inEnvironment<T>(env: Environment, make: () => T): T {
  const before = { ...process.env }
  Object.assign(process.env, env)
  try {
    return make()
  } finally {
    for (const name of Object.keys(env)) {
      if (before[name] === undefined) delete process.env[name]
      else process.env[name] = before[name]
    }
  }
}

async function exporterOf(env: Environment, log: Logger): Promise<() => SpanExporter> {
  const exporter = env['OTEL_TRACES_EXPORTER']
  // stdout belongs to the start banner, whose readers have seen its end by then.
  if (exporter === 'console') return () => new ConsoleSpanExporter()
  if (exporter !== undefined && exporter !== 'otlp') ignored(log, 'OTEL_TRACES_EXPORTER', 'otlp')
  const name = 'OTEL_EXPORTER_OTLP_TRACES_PROTOCOL'
  const protocol = env[name] ?? env['OTEL_EXPORTER_OTLP_PROTOCOL'] ?? 'http/protobuf'
  if (protocol === 'grpc') {
    const { OTLPTraceExporter } = await import('@opentelemetry/exporter-trace-otlp-grpc')
    return () => new OTLPTraceExporter()
  }
  if (protocol === 'http/json') {
    const { OTLPTraceExporter } = await import('@opentelemetry/exporter-trace-otlp-http')
    return () => new OTLPTraceExporter()
  }
  if (protocol !== 'http/protobuf') ignored(log, name, 'http/protobuf')
  const { OTLPTraceExporter } = await import('@opentelemetry/exporter-trace-otlp-proto')
  return () => new OTLPTraceExporter()
}

/** Baggage is not passed on: a load is shared by callers, and the origin is another party. */
async function propagatorsOf(env: Environment, log: Logger): Promise<TextMapPropagator[]> {
  const propagators: TextMapPropagator[] = []
  for (const name of new Set(
    (env['OTEL_PROPAGATORS'] ?? 'tracecontext').split(',').map((one) => one.trim()),
  )) {
    if (name === 'tracecontext') propagators.push(new W3CTraceContextPropagator())
    else if (name === 'b3' || name === 'b3multi') {
      const { B3InjectEncoding, B3Propagator } = await import('@opentelemetry/propagator-b3')
      const { SINGLE_HEADER, MULTI_HEADER } = B3InjectEncoding
      propagators.push(new B3Propagator({ injectEncoding: name === 'b3' ? SINGLE_HEADER : MULTI_HEADER }))
    } else if (name !== 'none' && name !== 'baggage') ignored(log, 'OTEL_PROPAGATORS', 'the others')
  }
  return propagators
}

function samplerOf(env: Environment, log: Logger): Sampler {
  const name = env['OTEL_TRACES_SAMPLER'] ?? 'parentbased_always_on'
  const ratio = () => {
    const text = env['OTEL_TRACES_SAMPLER_ARG']
    const value = Number(text ?? 1)
    if (value >= 0 && value <= 1) return new TraceIdRatioBasedSampler(value)
    ignored(log, 'OTEL_TRACES_SAMPLER_ARG', '1')
    return new TraceIdRatioBasedSampler(1)
  }
  const roots: Readonly<Record<string, () => Sampler>> = {
    always_on: () => new AlwaysOnSampler(),
    always_off: () => new AlwaysOffSampler(),
    traceidratio: ratio,
  }
  const make = roots[name.replace(/^parentbased_/, '')]
  if (make === undefined) {
    ignored(log, 'OTEL_TRACES_SAMPLER', 'parentbased_always_on')
    return new ParentBasedSampler({ root: new AlwaysOnSampler() })
  }
  return name.startsWith('parentbased_') ? new ParentBasedSampler({ root: make() }) : make()
}

/** A whole number that a variable holds. */
function number(env: Environment, log: Logger, name: string): number | undefined {
  const text = env[name]
  if (text === undefined) return undefined
  if (/^\d{1,9}$/.test(text)) return Number(text)
  ignored(log, name, 'the default')
  return undefined
}

/** As OpenTelemetry has it: what makes no sense is no reason not to start. */
function ignored(log: Logger, variable: string, instead: string): void {
  log.warn({ variable, instead }, 'a variable of OpenTelemetry has a value that is not known here')
}

function defined<T extends object>(options: T): { [K in keyof T]?: Exclude<T[K], undefined> } {
  return Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined)) as {
    [K in keyof T]?: Exclude<T[K], undefined>
  }
}
