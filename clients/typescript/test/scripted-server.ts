/** A gRPC server whose answers a test writes itself, for what a healthy service never says. */
import { create, fromBinary, type MessageInitShape, type MessageShape, toBinary } from '@bufbuild/protobuf'
import {
  type Metadata,
  Server,
  ServerCredentials,
  type ServerDuplexStream,
  type ServerUnaryCall,
  type ServerWritableStream,
  type ServiceDefinition,
  type StatusObject,
} from '@grpc/grpc-js'
import { ItemCacheService } from '../src/gen/itemcache/v1/item_cache_pb.ts'

type Methods = (typeof ItemCacheService)['method']
type UnaryName = {
  [Name in keyof Methods]: Methods[Name]['methodKind'] extends 'unary' ? Name : never
}[keyof Methods]

/** One call as a handler sees it. */
export interface Seen<Name extends UnaryName> {
  readonly request: MessageShape<Methods[Name]['input']>
  readonly metadata: Metadata
  /** Milliseconds since 1970; Infinity: none. */
  readonly deadline: number
  /** Resolves when the caller has cancelled. */
  readonly cancelled: Promise<void>
}

const STREAMS = ['watchMetrics', 'watchInvalidations', 'streamItems']

/** Answers of unary methods: a message, or a status by throwing one. */
export type Script = {
  [Name in UnaryName]?: (
    call: Seen<Name>,
  ) => MessageInitShape<Methods[Name]['output']> | Promise<MessageInitShape<Methods[Name]['output']>>
} & {
  /** Writes raw frames of a stream. */
  [Name in 'watchMetrics' | 'watchInvalidations']?: (
    call: ServerWritableStream<
      MessageShape<Methods[Name]['input']>,
      MessageInitShape<Methods[Name]['output']>
    >,
  ) => void
} & {
  streamItems?: (
    call: ServerDuplexStream<
      MessageShape<Methods['streamItems']['input']>,
      MessageInitShape<Methods['streamItems']['output']>
    >,
  ) => void
}

export interface ScriptedServer extends AsyncDisposable {
  readonly target: string
  readonly port: number
}

/** Starts it on a free port of loopback. `port`: on this one. */
export async function startScriptedServer(
  script: Script,
  { port = 0, credentials = ServerCredentials.createInsecure() } = {},
): Promise<ScriptedServer> {
  const definition: ServiceDefinition = Object.fromEntries(
    ItemCacheService.methods.map((method) => [
      method.localName,
      {
        path: `/${ItemCacheService.typeName}/${method.name}`,
        requestStream: method.methodKind === 'bidi_streaming',
        responseStream: method.methodKind !== 'unary',
        requestSerialize: () => Buffer.alloc(0),
        requestDeserialize: (bytes: Buffer) => fromBinary(method.input, bytes),
        responseSerialize: (answer: MessageInitShape<typeof method.output>) =>
          Buffer.from(toBinary(method.output, create(method.output, answer))),
        responseDeserialize: () => undefined,
      },
    ]),
  )
  const handlers = Object.entries(script).map(([name, handler]) => [
    name,
    STREAMS.includes(name) ? handler : unary(handler as (call: unknown) => unknown),
  ])
  const server = new Server()
  server.addService(definition, Object.fromEntries(handlers))
  const { promise, resolve, reject } = Promise.withResolvers<number>()
  server.bindAsync(`127.0.0.1:${port}`, credentials, (error, bound) =>
    error ? reject(error) : resolve(bound),
  )
  const bound = await promise
  return {
    target: `127.0.0.1:${bound}`,
    port: bound,
    [Symbol.asyncDispose]: async () => server.forceShutdown(),
  }
}

function unary(handler: (call: unknown) => unknown) {
  return (call: ServerUnaryCall<unknown, unknown>, callback: (error: unknown, answer?: unknown) => void) => {
    const { promise: cancelled, resolve } = Promise.withResolvers<void>()
    call.on('cancelled', resolve)
    const { request, metadata } = call
    const deadline = Number(call.getDeadline())
    const answer = async () => handler({ request, metadata, deadline, cancelled })
    answer().then((message) => callback(null, message), callback)
  }
}

/** A status for a handler to throw. */
export function refusal(code: number, details: string, metadata?: Metadata): Partial<StatusObject> {
  return { code, details, ...(metadata && { metadata }) }
}
