/** A running service for a test: real PostgreSQL and Redis, a real gRPC server on a free port, a real client. */
import {
  create,
  type DescMethod,
  fromBinary,
  type MessageInitShape,
  type MessageShape,
  toBinary,
} from '@bufbuild/protobuf'
import { anyUnpack } from '@bufbuild/protobuf/wkt'
import { type ChannelCredentials, Client, credentials, Metadata, type ServiceError } from '@grpc/grpc-js'
import { type App, type AppOptions, startApp } from '../../src/app.ts'
import { parseConfig } from '../../src/config.ts'
import { type Catalogue, startCatalogue } from '../../src/embedded/catalogue.ts'
import {
  type BadRequest,
  BadRequestSchema,
  type ErrorInfo,
  ErrorInfoSchema,
  type RetryInfo,
  RetryInfoSchema,
} from '../../src/gen/google/rpc/error_details_pb.ts'
import { StatusSchema } from '../../src/gen/google/rpc/status_pb.ts'
import {
  type CacheStatus,
  CacheStatusSchema,
  ItemCacheService,
} from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import { createLogger } from '../../src/observe/log.ts'
import { freshDatabase, redisUrl } from './servers.ts'

const { method } = ItemCacheService

type UnaryName = {
  [Name in keyof typeof method]: (typeof method)[Name]['methodKind'] extends 'unary' ? Name : never
}[keyof typeof method]

/** How a call is made. */
export interface CallOptions {
  readonly metadata?: Readonly<Record<string, string>>
  /** Default: 10,000. */
  readonly timeoutMs?: number
  readonly signal?: AbortSignal
}

/** What a failed call carries. */
export interface Failure {
  readonly code: number
  readonly message: string
  readonly info: ErrorInfo | undefined
  readonly badRequest: BadRequest | undefined
  readonly retry: RetryInfo | undefined
  readonly cache: CacheStatus | undefined
}

/** A client that shows everything a server sends. */
export class TestClient implements Disposable {
  readonly raw: Client

  constructor(address: string, channel: ChannelCredentials = credentials.createInsecure()) {
    this.raw = new Client(address, channel)
  }

  /** The answer of a unary call; rejects with grpc-js's own error. */
  call<Name extends UnaryName>(
    name: Name,
    request: MessageInitShape<(typeof method)[Name]['input']>,
    options: CallOptions = {},
  ): Promise<MessageShape<(typeof method)[Name]['output']>> {
    const { input, output } = method[name] as DescMethod
    const bytes = toBinary(input, create(input, request))
    return this.send(name, bytes, options).then(
      (answer) => fromBinary(output, answer) as MessageShape<(typeof method)[Name]['output']>,
    )
  }

  /** As `call`, with the encoded request as it is. */
  send(name: UnaryName, bytes: Uint8Array, options: CallOptions = {}): Promise<Buffer> {
    const { promise, resolve, reject } = Promise.withResolvers<Buffer>()
    const identity = (value: Buffer) => value
    const call = this.raw.makeUnaryRequest(
      pathOf(name),
      identity,
      identity,
      Buffer.from(bytes),
      metadataOf(options),
      { deadline: Date.now() + (options.timeoutMs ?? 10_000) },
      (error, answer) => (error === null && answer !== undefined ? resolve(answer) : reject(error)),
    )
    options.signal?.addEventListener('abort', () => call.cancel(), { once: true })
    return promise
  }

  /** How a unary call fails. Throws when it does not. */
  async failure<Name extends UnaryName>(
    name: Name,
    request: MessageInitShape<(typeof method)[Name]['input']>,
    options: CallOptions = {},
  ): Promise<Failure> {
    const outcome = await this.call(name, request, options).catch((error: ServiceError) => failureOf(error))
    if ('$typeName' in outcome)
      throw new Error(`${name} was expected to fail and answered ${outcome.$typeName}`)
    return outcome
  }

  /** The messages of a server stream until the consumer breaks off. */
  async *stream<Name extends 'watchMetrics' | 'watchInvalidations'>(
    name: Name,
    request: MessageInitShape<(typeof method)[Name]['input']>,
    options: CallOptions = {},
  ): AsyncGenerator<MessageShape<(typeof method)[Name]['output']>> {
    const { input, output } = method[name] as DescMethod
    const call = this.raw.makeServerStreamRequest(
      pathOf(name),
      (value: Uint8Array) => Buffer.from(value),
      (bytes: Buffer) => fromBinary(output, bytes),
      toBinary(input, create(input, request)),
      metadataOf(options),
    )
    try {
      yield* call as AsyncIterable<MessageShape<(typeof method)[Name]['output']>>
    } finally {
      call.on('error', () => {})
      call.cancel()
    }
  }

  [Symbol.dispose](): void {
    this.raw.close()
  }
}

function pathOf(name: keyof typeof method): string {
  return `/${ItemCacheService.typeName}/${method[name].name}`
}

function metadataOf({ metadata = {} }: CallOptions): Metadata {
  const result = new Metadata()
  for (const [key, value] of Object.entries(metadata)) result.set(key, value)
  return result
}

/** The details of an error of grpc-js. */
export function failureOf(error: ServiceError): Failure {
  const [encoded] = error.metadata?.get('grpc-status-details-bin') ?? []
  const details = encoded instanceof Buffer ? fromBinary(StatusSchema, encoded).details : []
  return {
    code: error.code,
    message: error.details,
    info: details.map((any) => anyUnpack(any, ErrorInfoSchema)).find(Boolean),
    badRequest: details.map((any) => anyUnpack(any, BadRequestSchema)).find(Boolean),
    retry: details.map((any) => anyUnpack(any, RetryInfoSchema)).find(Boolean),
    cache: details.map((any) => anyUnpack(any, CacheStatusSchema)).find(Boolean),
  }
}

/** A service with a client and its own catalogue and database. */
export interface TestService extends AsyncDisposable {
  readonly app: App
  readonly address: string
  readonly client: TestClient
  readonly catalogue: Catalogue
  readonly databaseUrl: string
}

/** What a test may choose; the rest is fresh. */
export interface ServiceOptions {
  readonly env?: Readonly<Record<string, string>>
  readonly databaseUrl?: string
  readonly catalogue?: Parameters<typeof startCatalogue>[0]
  readonly app?: Partial<AppOptions>
}

/** Timeouts that a busy machine does not reach; tests of what happens after them set their own. */
export const PATIENT = {
  ITEMCACHE_REDIS_TIMEOUT: '5s',
  ITEMCACHE_REDIS_SLOW: '5s',
  ITEMCACHE_SOFT_TIMEOUT: '5s',
  ITEMCACHE_POSTGRES_CONNECT_TIMEOUT: '10s',
  ITEMCACHE_POSTGRES_STATEMENT_TIMEOUT: '10s',
  ITEMCACHE_ORIGIN_TIMEOUT: '5s',
}

export async function startService(options: ServiceOptions = {}): Promise<TestService> {
  await using started = new AsyncDisposableStack()
  const databaseUrl = options.databaseUrl ?? started.use(await freshDatabase()).url
  const catalogue = started.use(await startCatalogue(options.catalogue))
  const config = parseConfig({
    DATABASE_URL: databaseUrl,
    REDIS_URL: redisUrl(),
    ORIGIN_URL: catalogue.url,
    ITEMCACHE_LISTEN: '127.0.0.1:0',
    ITEMCACHE_ADMIN_LISTEN: '127.0.0.1:0',
    ITEMCACHE_LOG_LEVEL: process.env['TEST_LOG_LEVEL'] ?? 'silent',
    ...PATIENT,
    ...options.env,
  })
  const log = createLogger({ level: config.logLevel, version: config.version })
  const app = started.use(await startApp(config, { log, ...options.app }))
  const address = `127.0.0.1:${app.address.port}`
  const client = started.use(new TestClient(address))
  const running = started.move()
  return {
    app,
    address,
    client,
    catalogue,
    databaseUrl,
    [Symbol.asyncDispose]: () => running.disposeAsync(),
  }
}
