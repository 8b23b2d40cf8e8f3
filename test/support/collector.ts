/** A collector of traces for tests: takes OTLP over HTTP (Protobuf or JSON) and over gRPC, and shows what has come. */
import { once } from 'node:events'
import { createServer, type IncomingMessage } from 'node:http'
import type { AddressInfo } from 'node:net'
import { promisify } from 'node:util'
import { BinaryReader } from '@bufbuild/protobuf/wire'
import { Server, ServerCredentials } from '@grpc/grpc-js'

export type AttributeValue = string | number | boolean
export type Attributes = Readonly<Record<string, AttributeValue>>

export interface ReceivedSpan {
  readonly traceId: string
  readonly spanId: string
  /** `''`: a root. */
  readonly parentSpanId: string
  readonly name: string
  /** 1 internal, 2 server, 3 client. */
  readonly kind: number
  /** Nanoseconds since 1970. */
  readonly start: bigint
  readonly end: bigint
  readonly attributes: Attributes
  readonly events: readonly { readonly name: string; readonly attributes: Attributes }[]
  readonly links: readonly { readonly traceId: string; readonly spanId: string }[]
  /** 2: error. */
  readonly status: number
  readonly resource: Attributes
}

export interface Collector extends AsyncDisposable {
  /** For `OTEL_EXPORTER_OTLP_ENDPOINT`. */
  readonly url: string
  readonly spans: readonly ReceivedSpan[]
  /** How the requests have come. */
  readonly contentTypes: ReadonlySet<string>
  /** The spans of a trace. */
  trace(traceId: string): readonly ReceivedSpan[]
}

/** `gate`: when it opens, requests are answered. */
export async function startCollector(gate?: Promise<void>): Promise<Collector> {
  const spans: ReceivedSpan[] = []
  const contentTypes = new Set<string>()
  const server = createServer(async (request, response) => {
    const body = await bodyOf(request)
    const type = request.headers['content-type'] ?? ''
    contentTypes.add(type)
    if (request.url === '/v1/traces')
      spans.push(...(type.endsWith('json') ? fromJson(body) : fromBinary(body)))
    await gate
    response.writeHead(200, { 'content-type': type }).end(type.endsWith('json') ? '{}' : '')
  })
  await once(server.listen(0, '127.0.0.1'), 'listening')
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  return collector(url, spans, contentTypes, async () => {
    server.closeAllConnections()
    await promisify(server.close.bind(server))()
  })
}

export async function startGrpcCollector(): Promise<Collector> {
  const spans: ReceivedSpan[] = []
  const contentTypes = new Set<string>()
  const server = new Server()
  const identity = (bytes: Buffer) => bytes
  const path = '/opentelemetry.proto.collector.trace.v1.TraceService/Export'
  const method = { path, requestStream: false, responseStream: false }
  const codec = {
    requestSerialize: identity,
    requestDeserialize: identity,
    responseSerialize: identity,
    responseDeserialize: identity,
  }
  server.addService(
    { Export: { ...method, ...codec } },
    {
      Export(call: { request: Buffer }, answer: (error: null, bytes: Buffer) => void) {
        contentTypes.add('application/grpc')
        spans.push(...fromBinary(call.request))
        answer(null, Buffer.alloc(0))
      },
    },
  )
  const port = await promisify(server.bindAsync).bind(server)(
    '127.0.0.1:0',
    ServerCredentials.createInsecure(),
  )
  return collector(`http://127.0.0.1:${port}`, spans, contentTypes, async () => server.forceShutdown())
}

function collector(
  url: string,
  spans: readonly ReceivedSpan[],
  contentTypes: ReadonlySet<string>,
  close: () => Promise<void>,
): Collector {
  return {
    url,
    spans,
    contentTypes,
    trace: (traceId) => spans.filter((span) => span.traceId === traceId),
    [Symbol.asyncDispose]: close,
  }
}

async function bodyOf(request: IncomingMessage): Promise<Buffer> {
  const chunks: Buffer[] = []
  for await (const chunk of request) chunks.push(chunk as Buffer)
  return Buffer.concat(chunks)
}

/** What the fields of a message hold, by their numbers. */
class Fields {
  readonly #values = new Map<number, (Uint8Array | bigint)[]>()

  constructor(message: Uint8Array) {
    const reader = new BinaryReader(message)
    while (reader.pos < reader.len) {
      const [number, type] = reader.tag()
      const values = this.#values.get(number) ?? []
      this.#values.set(number, values)
      if (type === 2) values.push(reader.bytes())
      else if (type === 1) values.push(BigInt(reader.fixed64()))
      else values.push(BigInt(type === 5 ? reader.fixed32() : reader.uint64()))
    }
  }

  bytes(number: number): Uint8Array[] {
    return (this.#values.get(number) ?? []).filter((value) => typeof value !== 'bigint')
  }
  messages(number: number): Fields[] {
    return this.bytes(number).map((bytes) => new Fields(bytes))
  }
  text(number: number, encoding: 'utf8' | 'hex' = 'utf8'): string {
    return Buffer.from(this.bytes(number)[0] ?? []).toString(encoding)
  }
  number(number: number): bigint | undefined {
    return (this.#values.get(number) ?? []).find((value) => typeof value === 'bigint')
  }
  attributes(number: number): Attributes {
    return Object.fromEntries(
      this.messages(number).map((pair) => [pair.text(1), attributeValue(pair.messages(2)[0])]),
    )
  }
}

function attributeValue(value: Fields | undefined): AttributeValue {
  const truth = value?.number(2)
  if (truth !== undefined) return truth === 1n
  const integer = value?.number(3)
  return integer === undefined ? (value?.text(1) ?? '') : Number(BigInt.asIntN(64, integer))
}

/** Of `opentelemetry.proto.collector.trace.v1.ExportTraceServiceRequest`. */
function fromBinary(request: Uint8Array): ReceivedSpan[] {
  return new Fields(request).messages(1).flatMap((resourceSpans) => {
    const resource = resourceSpans.messages(1)[0]?.attributes(1) ?? {}
    const scopes = resourceSpans.messages(2)
    return scopes.flatMap((scope) => scope.messages(2).map((span) => spanOf(span, resource)))
  })
}

function spanOf(span: Fields, resource: Attributes): ReceivedSpan {
  return {
    traceId: span.text(1, 'hex'),
    spanId: span.text(2, 'hex'),
    parentSpanId: span.text(4, 'hex'),
    name: span.text(5),
    kind: Number(span.number(6) ?? 0),
    start: span.number(7) ?? 0n,
    end: span.number(8) ?? 0n,
    attributes: span.attributes(9),
    events: span.messages(11).map((event) => ({ name: event.text(2), attributes: event.attributes(3) })),
    links: span.messages(13).map((link) => ({ traceId: link.text(1, 'hex'), spanId: link.text(2, 'hex') })),
    status: Number(span.messages(15)[0]?.number(3) ?? 0),
    resource,
  }
}

interface JsonValue {
  readonly stringValue?: string
  readonly intValue?: number | string
  readonly boolValue?: boolean
}
interface JsonSpan {
  readonly traceId: string
  readonly spanId: string
  readonly parentSpanId?: string
  readonly name: string
  readonly kind: number
  readonly startTimeUnixNano: string
  readonly endTimeUnixNano: string
  readonly attributes: readonly { readonly key: string; readonly value: JsonValue }[]
}

/** The same in JSON, as far as tests ask for it. */
function fromJson(body: Buffer): ReceivedSpan[] {
  const { resourceSpans } = JSON.parse(body.toString()) as {
    resourceSpans: readonly { scopeSpans: readonly { spans: readonly JsonSpan[] }[] }[]
  }
  return resourceSpans
    .flatMap(({ scopeSpans }) => scopeSpans)
    .flatMap(({ spans }) => spans)
    .map((span) => ({
      traceId: span.traceId,
      spanId: span.spanId,
      parentSpanId: span.parentSpanId ?? '',
      name: span.name,
      kind: span.kind,
      start: BigInt(span.startTimeUnixNano),
      end: BigInt(span.endTimeUnixNano),
      attributes: Object.fromEntries(
        span.attributes.map(({ key, value }) => [
          key,
          value.stringValue ?? value.boolValue ?? Number(value.intValue),
        ]),
      ),
      events: [],
      links: [],
      status: 0,
      resource: {},
    }))
}
