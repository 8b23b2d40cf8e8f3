/** A collector of traces for tests: takes OTLP over HTTP (Protobuf or JSON) and over gRPC, and shows what has come. */
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

export async function startCollector(): Promise<Collector> {
  const spans: ReceivedSpan[] = []
  const contentTypes = new Set<string>()
  const server = createServer(async (request, response) => {
    const body = await bodyOf(request)
    const type = request.headers['content-type'] ?? ''
    contentTypes.add(type)
    if (request.url === '/v1/traces')
      spans.push(...(type.endsWith('json') ? fromJson(body) : fromBinary(body)))
    response.writeHead(200, { 'content-type': type }).end(type.endsWith('json') ? '{}' : '')
  })
  await promisify(server.listen.bind(server, 0, '127.0.0.1'))()
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

/** Calls `field` for every field of a message with what it holds: a number of Protobuf's wire format or bytes. */
function fields(
  bytes: Uint8Array,
  field: {
    bytes?: (number: number, value: Uint8Array) => void
    number?: (number: number, value: bigint) => void
  },
): void {
  const reader = new BinaryReader(bytes)
  while (reader.pos < reader.len) {
    const [number, type] = reader.tag()
    // Read in any case, whether somebody wants it or not.
    const value = type === 2 ? reader.bytes() : numberIn(reader, type)
    if (typeof value === 'bigint') field.number?.(number, value)
    else field.bytes?.(number, value)
  }
}

function numberIn(reader: BinaryReader, type: number): bigint {
  if (type === 1) return BigInt(reader.fixed64())
  return BigInt(type === 5 ? reader.fixed32() : reader.uint64())
}

const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex')
const text = (bytes: Uint8Array) => Buffer.from(bytes).toString()

/** Of `opentelemetry.proto.collector.trace.v1.ExportTraceServiceRequest`. */
function fromBinary(request: Uint8Array): ReceivedSpan[] {
  const spans: ReceivedSpan[] = []
  fields(request, {
    bytes(_, resourceSpans) {
      let resource: Attributes = {}
      fields(resourceSpans, {
        bytes(number, value) {
          if (number === 1) resource = attributesIn(value, 1)
          else if (number === 2)
            fields(value, { bytes: (inner, span) => inner === 2 && spans.push(spanOf(span, resource)) })
        },
      })
    },
  })
  return spans
}

function spanOf(bytes: Uint8Array, resource: Attributes): ReceivedSpan {
  const ids = new Map<number, string>()
  const numbers = new Map<number, bigint>()
  let name = ''
  let status = 0
  const events: ReceivedSpan['events'][number][] = []
  const links: ReceivedSpan['links'][number][] = []
  fields(bytes, {
    bytes(number, value) {
      if (number === 5) name = text(value)
      else if (number === 11) {
        let event = ''
        fields(value, { bytes: (inner, part) => inner === 2 && (event = text(part)) })
        events.push({ name: event, attributes: attributesIn(value, 3) })
      } else if (number === 13) {
        const link = new Map<number, string>()
        fields(value, { bytes: (inner, part) => link.set(inner, hex(part)) })
        links.push({ traceId: link.get(1) ?? '', spanId: link.get(2) ?? '' })
      } else if (number === 15) {
        fields(value, { number: (inner, code) => inner === 3 && (status = Number(code)) })
      } else ids.set(number, hex(value))
    },
    number: (number, value) => void numbers.set(number, value),
  })
  return {
    traceId: ids.get(1) ?? '',
    spanId: ids.get(2) ?? '',
    parentSpanId: ids.get(4) ?? '',
    name,
    kind: Number(numbers.get(6) ?? 0),
    start: numbers.get(7) ?? 0n,
    end: numbers.get(8) ?? 0n,
    attributes: attributesIn(bytes, 9),
    events,
    links,
    status,
    resource,
  }
}

/** The pairs of name and value in a field of a message. */
function attributesIn(bytes: Uint8Array, field: number): Attributes {
  const attributes: Record<string, AttributeValue> = {}
  fields(bytes, {
    bytes(number, pair) {
      if (number !== field) return
      let key = ''
      let value: AttributeValue = ''
      fields(pair, {
        bytes(part, content) {
          if (part === 1) key = text(content)
          else
            fields(content, {
              bytes: (kind, string) => kind === 1 && (value = text(string)),
              number: (kind, number) =>
                (value = kind === 2 ? number === 1n : Number(BigInt.asIntN(64, number))),
            })
        },
      })
      attributes[key] = value
    },
  })
  return attributes
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
