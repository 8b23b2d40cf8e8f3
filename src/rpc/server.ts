/** The gRPC server: the service, health and reflection on one address. */
import type { Http2Server } from 'node:http2'
import { promisify } from 'node:util'
import { type DescFile, toBinary } from '@bufbuild/protobuf'
import { FileDescriptorProtoSchema } from '@bufbuild/protobuf/wkt'
import {
  Server,
  ServerCredentials,
  type ServerDuplexStream,
  type ServiceDefinition,
  setLogger,
} from '@grpc/grpc-js'
import { ReflectionService } from '@grpc/reflection'
import { HealthImplementation } from 'grpc-health-check'
import type { Config, HostPort } from '../config.ts'
import { ItemCacheError } from '../errors.ts'
import { file_google_rpc_error_details } from '../gen/google/rpc/error_details_pb.ts'
import { file_health_v1_health } from '../gen/health/v1/health_pb.ts'
import { file_itemcache_v1_item_cache, ItemCacheService } from '../gen/itemcache/v1/item_cache_pb.ts'
import type { Logger } from '../observe/log.ts'
import { BatchRequest } from './batch-request.ts'
import type { CallFrame } from './call.ts'
import type { DirectMethod } from './direct-call.ts'
import { implementation, methodName, type Services } from './handlers.ts'
import { Intake, type MethodKind } from './intake.ts'
import { grpcDefinition } from './service-definition.ts'
import type { TlsCredentials } from './tls.ts'

/** The full names of the RPCs, for the metrics. */
export const RPC_METHODS: readonly string[] = ItemCacheService.methods.map((method) =>
  methodName(method.name),
)

/** What the server needs besides the services. */
export interface GrpcServerOptions {
  readonly listen: HostPort
  readonly grpc: Config['grpc']
  readonly reflection: boolean
  /** `undefined`: no TLS. */
  readonly tls: TlsCredentials | undefined
  readonly frame: Omit<CallFrame, 'draining' | 'hurrying'>
}

/** A server that listens. */
export interface GrpcServer {
  /** With the port that was really bound. */
  readonly address: HostPort
  /** Names whose health somebody has watched. */
  watchedNames(): number
  /** HTTP/2 streams that are open, whatever has become of their calls. */
  streams(): number
  /** Answers of `grpc.health.v1`, for the whole server and for the service. */
  setServing(serving: boolean): void
  /**
   * Says NOT_SERVING, ends the streams, lets the calls under way finish, and after `timeoutMs` milliseconds
   * cuts off what is left.
   */
  drain(timeoutMs: number): Promise<void>
}

/** Starts to listen. Throws `unavailable` with the address when it cannot. */
export async function startGrpcServer(options: GrpcServerOptions, services: Services): Promise<GrpcServer> {
  const { listen, grpc, reflection } = options
  const draining = new AbortController()
  const hurrying = new AbortController()
  const frame: CallFrame = { ...options.frame, draining: draining.signal, hurrying: hurrying.signal }
  quiet(frame.log)
  const definition = grpcDefinition(ItemCacheService)
  const { grpcJs: handledByGrpcJs, direct } = implementation(frame, services)
  const intake = new Intake({
    kindOf: (path) => grpcJs.handlers.get(path)?.type,
    direct: directMethods(definition, direct, grpc.maxMessageBytes),
    maxDeadlineMs: frame.maxDeadlineMs,
    maxConnectionBytes: grpc.maxSessionMemoryBytes,
    maxBytes: grpc.maxRequestMemoryBytes,
    maxMessageBytes: grpc.maxMessageBytes,
    // Calls of other services, and those that have only begun, are no calls yet.
    maxStreams: 2 * frame.maxCalls,
    maxIdleMs: grpc.maxConnectionIdleMs,
    log: frame.log,
    requests: frame.requests,
    metrics: frame.metrics,
    now: frame.now,
  })
  const server = new Server({
    interceptors: [intake.interceptor],
    'grpc.max_receive_message_length': grpc.maxMessageBytes,
    'grpc.max_concurrent_streams': grpc.maxConcurrentStreams,
    'grpc-node.max_session_memory': Math.ceil(grpc.maxSessionMemoryBytes / 1e6),
    // Nobody here asks for its counts.
    'grpc.enable_channelz': 0,
    'grpc.max_connection_age_ms': grpc.maxConnectionAgeMs,
    'grpc.max_connection_age_grace_ms': grpc.maxConnectionAgeGraceMs,
    'grpc.keepalive_time_ms': grpc.keepaliveTimeMs,
    'grpc.keepalive_timeout_ms': grpc.keepaliveTimeoutMs,
  })
  const grpcJs = server as unknown as Insides
  const create = grpcJs.createHttp2Server.bind(server)
  grpcJs.createHttp2Server = (...args) => {
    const http2 = create(...args)
    http2.maxConnections = grpc.maxConnections
    intake.guard(http2)
    return http2
  }
  server.addService(definition, handledByGrpcJs)
  const health = new HealthImplementation({ '': 'SERVING', [ItemCacheService.typeName]: 'SERVING' })
  const watchedNames = forgetStrangers(health)
  health.addToServer(server)
  if (reflection) new ReflectionService(describedFiles()).addToServer(unhurried(server))

  const host = listen.host.includes(':') ? `[${listen.host}]` : listen.host
  let port: number
  try {
    const bind = promisify(server.bindAsync).bind(server)
    port = await bind(`${host}:${listen.port}`, options.tls ?? ServerCredentials.createInsecure())
  } catch (error) {
    throw new ItemCacheError('unavailable', `cannot listen on ${host}:${listen.port}: is it taken?`, {
      reason: 'ADDRESS_UNAVAILABLE',
      cause: error,
    })
  }
  let told = 'SERVING'
  const setServing = (serving: boolean) => {
    const status = serving && !draining.signal.aborted ? 'SERVING' : 'NOT_SERVING'
    // Every watcher would be sent it again.
    if (status === told) return
    told = status
    for (const name of ['', ItemCacheService.typeName]) health.setStatus(name, status)
  }
  return {
    address: { host: listen.host, port },
    watchedNames,
    streams: () => intake.streams,
    setServing,
    async drain(timeoutMs) {
      setServing(false)
      draining.abort(
        new ItemCacheError('unavailable', 'the server is draining', {
          reason: 'DRAINING',
          retryAfterMs: 1000,
        }),
      )
      const hurry = setTimeout(() => hurrying.abort(draining.signal.reason), LAST_MESSAGES_MS)
      const { promise, resolve } = Promise.withResolvers<void>()
      const cut = () => {
        server.forceShutdown()
        intake.cut()
        resolve()
      }
      const timer = setTimeout(cut, timeoutMs)
      // Streams of others (somebody who watches our health, a watcher who never reads) would keep the server up when all
      // calls have ended.
      const idle = setInterval(() => {
        const { openCalls, openAnswers } = frame.metrics
        if (openCalls === 0 && openAnswers === 0 && !intake.receiving) setTimeout(cut, LAST_WORDS_MS)
      }, LAST_WORDS_MS)
      server.tryShutdown(() => resolve())
      await promise
      clearTimeout(hurry)
      clearTimeout(timer)
      clearInterval(idle)
      intake[Symbol.dispose]()
    },
  }
}

/** The methods that are answered from their HTTP/2 streams, by their paths. */
function directMethods(
  definition: ServiceDefinition,
  handlers: Readonly<Record<string, DirectMethod['handle']>>,
  maxRequestBytes: number,
): ReadonlyMap<string, DirectMethod> {
  const methods = Object.entries(definition).flatMap(([name, method]) => {
    const handle = handlers[name]
    if (handle === undefined) return []
    const { path, requestDeserialize } = method
    const decode =
      name === ItemCacheService.method.batchGetItems.name
        ? (message: Buffer) => new BatchRequest(message, requestDeserialize)
        : requestDeserialize
    return [[path, { maxRequestBytes, decode, handle }] as const]
  })
  return new Map(methods)
}

/** The HTTP/2 servers and the methods' kinds, which grpc-js keeps to itself. */
interface Insides {
  createHttp2Server(...args: readonly unknown[]): Http2Server
  readonly handlers: ReadonlyMap<string, { readonly type: MethodKind }>
}

/**
 * grpc-js prints to stderr what it thinks of the metadata that callers send, as it came. Here it is a line of the log, at
 * debug.
 */
function quiet(log: Logger): void {
  const line = (text: unknown) => log.debug({ text: String(text) }, 'grpc-js')
  setLogger({ error: line, info: line, debug: line })
}

/** The reflection service answers whatever comes, whether its caller takes the answers or not. Here it waits for them. */
function unhurried(server: Server): Pick<Server, 'addService'> {
  type Stream = ServerDuplexStream<unknown, unknown>
  return {
    addService(service, handlers) {
      const bounded = Object.entries(handlers).map(([name, handler]) => [
        name,
        (stream: Stream) => {
          const write = stream.write.bind(stream) as (answer: unknown) => boolean
          stream.write = (answer: unknown) => {
            const taken = write(answer)
            if (!taken) stream.pause()
            return taken
          }
          stream.on('drain', () => stream.resume())
          ;(handler as (stream: Stream) => void)(stream)
        },
      ])
      server.addService(service, Object.fromEntries(bounded))
    },
  }
}

/**
 * The library remembers each name that somebody has watched for ever. Of names that it knows no state of, and never
 * will, there is nothing to tell and so nothing to remember.
 */
function forgetStrangers(health: HealthImplementation): () => number {
  const inside = health as unknown as {
    statusMap: ReadonlyMap<string, unknown>
    watchers: Map<string, unknown>
  }
  const { statusMap } = inside
  inside.watchers = new (class extends Map<string, unknown> {
    override set(name: string, watchers: unknown): this {
      return statusMap.has(name) ? super.set(name, watchers) : this
    }
  })()
  return () => inside.watchers.size
}

/** For the last answers to leave before connections are cut. */
const LAST_WORDS_MS = 200
/** For streams to take the message that is on its way to them, and then to be told that this is the end. */
const LAST_MESSAGES_MS = 500

/**
 * What the reflection service tells of: our proto with all that it imports, the error details, and health. (The
 * descriptor that grpc-health-check itself has loaded names its map entries wrongly, which grpcurl refuses.)
 */
function describedFiles(): ConstructorParameters<typeof ReflectionService>[0] {
  const files = new Map<string, Buffer>()
  const add = (file: DescFile) => {
    if (files.has(file.proto.name)) return
    files.set(file.proto.name, Buffer.from(toBinary(FileDescriptorProtoSchema, file.proto)))
    for (const dependency of file.dependencies) add(dependency)
  }
  add(file_itemcache_v1_item_cache)
  add(file_google_rpc_error_details)
  add(file_health_v1_health)
  const format = 'Protocol Buffer 3 DescriptorProto'
  return { itemcache: { format, type: {}, fileDescriptorProtos: [...files.values()] } }
}
