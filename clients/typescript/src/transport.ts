/** The wire: grpc-js calls made out of protobuf-es service descriptors. Knows nothing of items. */
import {
  create,
  type DescMessage,
  type DescMethodBiDiStreaming,
  type DescMethodServerStreaming,
  type DescMethodUnary,
  fromBinary,
  type MessageInitShape,
  type MessageShape,
  toBinary,
} from '@bufbuild/protobuf'
import {
  type ChannelCredentials,
  type ClientDuplexStream,
  type ClientOptions,
  type ClientReadableStream,
  type ClientUnaryCall,
  type CallOptions as GrpcCallOptions,
  Client as GrpcClient,
  Metadata,
  type ServiceError,
} from '@grpc/grpc-js'
import { CancelledError, fromServiceError, InvalidArgumentError, UnauthenticatedError } from './errors.ts'
import { traceHeaders } from './tracing.ts'

/** grpc-js refuses deadlines of more than 24.8 days; nobody waits for more than one. */
const MAX_TIMEOUT_MS = 24 * 3600 * 1000
/** How long a stream that wants a connection waits for one before it is sent nonetheless, and so told what is wrong. */
const READY_MS = 5000

/** How one call is made. */
export interface CallOptions {
  /**
   * Milliseconds after which the call fails with DeadlineExceededError; retries count. Default: the client's;
   * for streams: none. At most a day.
   */
  readonly timeoutMs?: number | undefined
  /** Aborting it ends the call with CancelledError. */
  readonly signal?: AbortSignal | undefined
  /**
   * Further metadata. `traceparent` is added by itself where OpenTelemetry is set up, but for look-ups of a pipeline, which
   * share a stream.
   */
  readonly metadata?: Readonly<Record<string, string>> | undefined
}

/** A bearer token, or what provides one for each call. */
export type Token = string | (() => string | Promise<string>)

/** What a transport is made of. */
export interface TransportOptions {
  readonly target: string
  readonly credentials: ChannelCredentials
  readonly channel: ClientOptions
  /** The deadline of unary calls that name none, in milliseconds. */
  readonly timeoutMs: number
  /** How many channels take turns; 1 or more. */
  readonly connections: number
  readonly token: Token | undefined
}

export class Transport implements AsyncDisposable {
  readonly connections: number
  readonly timeoutMs: number
  readonly #clients: readonly GrpcClient[]
  readonly #token: Token | undefined
  readonly #underWay = new Set<Promise<unknown>>()
  readonly #streams = new Set<{ cancel(): void }>()
  #turn = 0
  #closing: Promise<void> | undefined
  #isOver = false

  constructor({ target, credentials, channel, timeoutMs, connections, token }: TransportOptions) {
    // Channels share the connections of a process unless each has a pool of its own.
    const options = connections > 1 ? { ...channel, 'grpc.use_local_subchannel_pool': 1 } : channel
    this.connections = connections
    this.#clients = Array.from({ length: connections }, () => new GrpcClient(target, credentials, options))
    this.timeoutMs = timeoutMs
    this.#token = token
  }

  /** Rejects with ItemCacheError only. */
  async unary<I extends DescMessage, O extends DescMessage>(
    method: DescMethodUnary<I, O>,
    request: MessageInitShape<I>,
    { timeoutMs = this.timeoutMs, signal, metadata }: CallOptions = {},
  ): Promise<MessageShape<O>> {
    this.#check(signal)
    const bytes = encode(method.input, request)
    const deadline = deadlineIn(timeoutMs)
    const headers = this.#headers(metadata)
    const sent = headers instanceof Promise ? await unlessAborted(headers, signal) : headers
    if (headers instanceof Promise) this.#check(signal)
    const { promise, resolve, reject } = Promise.withResolvers<MessageShape<O>>()
    const call: ClientUnaryCall = this.#client().makeUnaryRequest(
      pathOf(method),
      identity,
      (answer: Buffer) => fromBinary(method.output, answer),
      bytes,
      sent,
      { deadline },
      (error, answer) => (answer === undefined ? reject(error) : resolve(answer)),
    )
    const cancel = () => call.cancel()
    signal?.addEventListener('abort', cancel, { once: true })
    this.#underWay.add(promise)
    try {
      return await promise
    } catch (error) {
      // Made here, not in the callback, so that the stack shows who called.
      throw fromServiceError(error as ServiceError, reasonOf(signal))
    } finally {
      this.#underWay.delete(promise)
      signal?.removeEventListener('abort', cancel)
    }
  }

  /**
   * The messages of a server stream until the consumer breaks off; a slow consumer slows the server down. With `onBegin`
   * the stream waits for a connection first, and tells when it then sends its request.
   */
  async *serverStream<I extends DescMessage, O extends DescMessage>(
    method: DescMethodServerStreaming<I, O>,
    request: MessageInitShape<I>,
    { timeoutMs, signal, metadata, onBegin }: CallOptions & { readonly onBegin?: () => void } = {},
  ): AsyncGenerator<MessageShape<O>, void, undefined> {
    this.#check(signal)
    const options: GrpcCallOptions = timeoutMs === undefined ? {} : { deadline: deadlineIn(timeoutMs) }
    const bytes = encode(method.input, request)
    const client = this.#client()
    const headers = await unlessAborted(this.#headers(metadata), signal)
    if (onBegin !== undefined) {
      await unlessAborted(ready(client), signal)
      this.#check(signal)
      onBegin()
    }
    this.#check(signal)
    const call: ClientReadableStream<MessageShape<O>> = client.makeServerStreamRequest(
      pathOf(method),
      identity,
      (answer: Buffer) => fromBinary(method.output, answer),
      bytes,
      headers,
      options,
    )
    // The loop below throws what happens while it waits; what happens after it concerns nobody.
    call.on('error', () => {})
    const cancel = () => call.cancel()
    signal?.addEventListener('abort', cancel, { once: true })
    this.#streams.add(call)
    try {
      for await (const message of call) yield message as MessageShape<O>
    } catch (error) {
      throw isServiceError(error) ? fromServiceError(error, reasonOf(signal)) : error
    } finally {
      this.#streams.delete(call)
      signal?.removeEventListener('abort', cancel)
      call.cancel()
    }
  }

  /**
   * A stream both ways on the connection with this number; requests are encoded already. It outlives the calls that use it,
   * so it carries the trace context of none. It can be had until what `close` waits for first is over.
   */
  async bidiStream<O extends DescMessage>(
    method: DescMethodBiDiStreaming<DescMessage, O>,
    connection: number,
    metadata: Readonly<Record<string, string>>,
  ): Promise<ClientDuplexStream<Buffer, MessageShape<O>>> {
    const headers = await this.#withToken(metadataOf(metadata))
    const client = this.#client(connection)
    await ready(client)
    if (this.#isOver) throw new CancelledError('the client is closed')
    const call: ClientDuplexStream<Buffer, MessageShape<O>> = client.makeBidiStreamRequest(
      pathOf(method),
      identity,
      (answer: Buffer) => fromBinary(method.output, answer),
      headers,
    )
    this.#streams.add(call)
    call.on('close', () => this.#streams.delete(call))
    return call
  }

  /** Takes no more calls, waits for `first`, ends streams, and resolves when the calls under way are over. */
  close(first?: Promise<unknown>): Promise<void> {
    this.#closing ??= this.#close(first)
    return this.#closing
  }

  async #close(first: Promise<unknown> | undefined): Promise<void> {
    await first
    this.#isOver = true
    for (const stream of this.#streams) stream.cancel()
    await Promise.allSettled(this.#underWay)
    for (const client of this.#clients) client.close()
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  #client(connection = this.#turn++): GrpcClient {
    const client = this.#clients[connection % this.#clients.length]
    if (client === undefined) throw new RangeError('there is no such connection')
    return client
  }

  /** With the token and the trace context of this moment. A promise only where the token is one. */
  #headers(entries: Readonly<Record<string, string>> = {}): Metadata | Promise<Metadata> {
    return this.#withToken(metadataOf({ ...traceHeaders(), ...entries }))
  }

  #withToken(metadata: Metadata): Metadata | Promise<Metadata> {
    const token = this.#token
    if (token === undefined) return metadata
    const withToken = (bearer: string) => {
      setEntry(metadata, 'authorization', `Bearer ${bearer}`)
      return metadata
    }
    if (typeof token === 'string') return withToken(token)
    const refuse = (cause: unknown): never => {
      throw new UnauthenticatedError('the token provider failed', { reason: 'NO_TOKEN', cause })
    }
    return (async () => token())().then(withToken, refuse)
  }

  #check(signal: AbortSignal | undefined): void {
    if (this.#closing !== undefined) throw new CancelledError('the client is closed')
    if (signal?.aborted) throw new CancelledError('the call was cancelled', { cause: signal.reason })
  }
}

/** Resolves when there is a connection, or when there has been none for long: the call then fails with the reason. */
function ready(client: GrpcClient): Promise<void> {
  return new Promise((resolve) => client.waitForReady(Date.now() + READY_MS, () => resolve()))
}

/** Rejects with CancelledError as soon as the signal is aborted. */
async function unlessAborted<T>(waited: T | Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (signal === undefined || !(waited instanceof Promise)) return waited
  const { promise, reject } = Promise.withResolvers<never>()
  const cancel = () => reject(new CancelledError('the call was cancelled', { cause: signal.reason }))
  signal.addEventListener('abort', cancel, { once: true })
  if (signal.aborted) cancel()
  try {
    return await Promise.race([waited, promise])
  } finally {
    signal.removeEventListener('abort', cancel)
  }
}

const identity = (bytes: Buffer): Buffer => bytes

function pathOf(method: DescMethodUnary | DescMethodServerStreaming | DescMethodBiDiStreaming): string {
  return `/${method.parent.typeName}/${method.name}`
}

/** The encoded request. Throws InvalidArgumentError for what no message can hold. */
export function encode<I extends DescMessage>(input: I, request: MessageInitShape<I>): Buffer {
  try {
    const bytes = toBinary(input, create(input, request))
    return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  } catch (cause) {
    throw new InvalidArgumentError((cause as Error).message, { reason: 'NOT_ENCODABLE', cause })
  }
}

/** Metadata for a call. Throws InvalidArgumentError for keys and values that HTTP/2 cannot carry. */
export function metadataOf(entries: Readonly<Record<string, string>> = {}): Metadata {
  const metadata = new Metadata()
  for (const [key, value] of Object.entries(entries)) setEntry(metadata, key, value)
  return metadata
}

function setEntry(metadata: Metadata, key: string, value: string): void {
  try {
    metadata.set(key, value)
  } catch (cause) {
    throw new InvalidArgumentError(`metadata ${key} is not valid`, { reason: 'INVALID_METADATA', cause })
  }
}

function deadlineIn(timeoutMs: number): number {
  return Date.now() + checkedTimeout(timeoutMs)
}

/** At most a day. Throws InvalidArgumentError unless it is more than 0. */
export function checkedTimeout(timeoutMs: number): number {
  if (timeoutMs > 0) return Math.min(timeoutMs, MAX_TIMEOUT_MS)
  throw new InvalidArgumentError(`timeoutMs must be more than 0, got ${timeoutMs}`, {
    reason: 'INVALID_TIMEOUT',
  })
}

function reasonOf(signal: AbortSignal | undefined): unknown {
  return signal?.aborted ? signal.reason : undefined
}

export function isServiceError(error: unknown): error is ServiceError {
  return error instanceof Error && 'code' in error && typeof error.code === 'number'
}
