/** The gRPC server: the service, health and reflection on one address. */
import type { Http2Server, IncomingHttpHeaders } from 'node:http2'
import { promisify } from 'node:util'
import { type DescFile, toBinary } from '@bufbuild/protobuf'
import { FileDescriptorProtoSchema } from '@bufbuild/protobuf/wkt'
import { Server, ServerCredentials } from '@grpc/grpc-js'
import { ReflectionService } from '@grpc/reflection'
import { HealthImplementation } from 'grpc-health-check'
import type { Config, HostPort } from '../config.ts'
import { ItemCacheError } from '../errors.ts'
import { file_google_rpc_error_details } from '../gen/google/rpc/error_details_pb.ts'
import { file_health_v1_health } from '../gen/health/v1/health_pb.ts'
import { file_itemcache_v1_item_cache, ItemCacheService } from '../gen/itemcache/v1/item_cache_pb.ts'
import type { Metrics } from '../observe/metrics.ts'
import type { CallFrame } from './call.ts'
import { implementation, methodName, type Services } from './handlers.ts'
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
  const server = new Server({
    'grpc.max_receive_message_length': grpc.maxMessageBytes,
    'grpc.max_concurrent_streams': grpc.maxConcurrentStreams,
    'grpc-node.max_session_memory': Math.ceil(grpc.maxSessionMemoryBytes / 1e6),
    'grpc.max_connection_idle_ms': grpc.maxConnectionIdleMs,
    'grpc.max_connection_age_ms': grpc.maxConnectionAgeMs,
    'grpc.max_connection_age_grace_ms': grpc.maxConnectionAgeGraceMs,
    'grpc.keepalive_time_ms': grpc.keepaliveTimeMs,
    'grpc.keepalive_timeout_ms': grpc.keepaliveTimeoutMs,
  })
  showRepeatedCredentials(server)
  server.addService(grpcDefinition(ItemCacheService), implementation(frame, services))
  const health = new HealthImplementation({ '': 'SERVING', [ItemCacheService.typeName]: 'SERVING' })
  health.addToServer(server)
  if (reflection) new ReflectionService(describedFiles()).addToServer(server)

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
  const setServing = (serving: boolean) => {
    const status = serving && !draining.signal.aborted ? 'SERVING' : 'NOT_SERVING'
    for (const name of ['', ItemCacheService.typeName]) health.setStatus(name, status)
  }
  return {
    address: { host: listen.host, port },
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
        resolve()
      }
      const timer = setTimeout(cut, timeoutMs)
      // Streams of others (somebody who watches our health) would keep the server up when all calls have ended.
      const idle = setInterval(() => {
        if (openCalls(frame.metrics) === 0) setTimeout(cut, LAST_WORDS_MS)
      }, LAST_WORDS_MS)
      server.tryShutdown(() => resolve())
      await promise
      clearTimeout(hurry)
      clearTimeout(timer)
      clearInterval(idle)
    },
  }
}

/**
 * Node drops every `authorization` of a request but the first, so that nobody could tell that there were several. This
 * joins them, which is no valid credential. grpc-js keeps its HTTP/2 servers to itself, hence the detour.
 */
function showRepeatedCredentials(server: Server): void {
  const grpc = server as unknown as { createHttp2Server: (...args: unknown[]) => Http2Server }
  const create = grpc.createHttp2Server.bind(server)
  grpc.createHttp2Server = (...args) => {
    const http2 = create(...args)
    const join = (_stream: unknown, headers: IncomingHttpHeaders, _flags: number, raw: readonly string[]) => {
      if (raw.indexOf('authorization') === raw.lastIndexOf('authorization')) return
      // Names and values in turn.
      headers.authorization = raw.filter((_, i) => i % 2 === 1 && raw[i - 1] === 'authorization').join(', ')
    }
    return http2.prependListener('stream', join)
  }
}

/** For the last answers to leave before connections are cut. */
const LAST_WORDS_MS = 200
/** For streams to take the message that is on its way to them, and then to be told that this is the end. */
const LAST_MESSAGES_MS = 500

function openCalls({ rpcs }: Metrics): number {
  let open = 0
  for (const { started, byStatus } of rpcs) {
    open += started
    for (const { count } of byStatus.values()) open -= count
  }
  return open
}

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
