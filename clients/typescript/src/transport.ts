/** The wire: grpc-js calls made out of protobuf-es service descriptors. Knows nothing of items. */
import {
  create,
  type DescMessage,
  type DescMethodServerStreaming,
  type DescMethodUnary,
  fromBinary,
  type MessageInitShape,
  type MessageShape,
  toBinary,
} from '@bufbuild/protobuf'
import {
  type ChannelCredentials,
  type ClientOptions,
  type ClientReadableStream,
  type ClientUnaryCall,
  type CallOptions as GrpcCallOptions,
  Client as GrpcClient,
  Metadata,
  type ServiceError,
} from '@grpc/grpc-js'
import { CancelledError, fromServiceError, InvalidArgumentError } from './errors.ts'

/** grpc-js refuses deadlines of more than 24.8 days; nobody waits for more than one. */
const MAX_TIMEOUT_MS = 24 * 3600 * 1000

/** How one call is made. */
export interface CallOptions {
  /**
   * Milliseconds after which the call fails with DeadlineExceededError; retries count. Default: the client's;
   * for streams: none. At most a day.
   */
  readonly timeoutMs?: number | undefined
  /** Aborting it ends the call with CancelledError. */
  readonly signal?: AbortSignal | undefined
  /** Further metadata, as `traceparent`. */
  readonly metadata?: Readonly<Record<string, string>> | undefined
}

export class Transport implements AsyncDisposable {
  readonly #client: GrpcClient
  readonly #timeoutMs: number
  readonly #underWay = new Set<Promise<unknown>>()
  readonly #streams = new Set<{ cancel(): void }>()
  #closing: Promise<void> | undefined

  /** `timeoutMs` is the deadline of unary calls that name none. */
  constructor(target: string, credentials: ChannelCredentials, options: ClientOptions, timeoutMs: number) {
    this.#client = new GrpcClient(target, credentials, options)
    this.#timeoutMs = timeoutMs
  }

  /** Rejects with ItemCacheError only. */
  async unary<I extends DescMessage, O extends DescMessage>(
    method: DescMethodUnary<I, O>,
    request: MessageInitShape<I>,
    { timeoutMs = this.#timeoutMs, signal, metadata }: CallOptions = {},
  ): Promise<MessageShape<O>> {
    this.#check(signal)
    const bytes = encode(method.input, request)
    const { promise, resolve, reject } = Promise.withResolvers<MessageShape<O>>()
    const call: ClientUnaryCall = this.#client.makeUnaryRequest(
      pathOf(method),
      identity,
      (answer: Buffer) => fromBinary(method.output, answer),
      bytes,
      metadataOf(metadata),
      { deadline: deadlineIn(timeoutMs) },
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

  /** The messages of a server stream until the consumer breaks off; a slow consumer slows the server down. */
  async *serverStream<I extends DescMessage, O extends DescMessage>(
    method: DescMethodServerStreaming<I, O>,
    request: MessageInitShape<I>,
    { timeoutMs, signal, metadata }: CallOptions = {},
  ): AsyncGenerator<MessageShape<O>, void, undefined> {
    this.#check(signal)
    const options: GrpcCallOptions = timeoutMs === undefined ? {} : { deadline: deadlineIn(timeoutMs) }
    const call: ClientReadableStream<MessageShape<O>> = this.#client.makeServerStreamRequest(
      pathOf(method),
      identity,
      (answer: Buffer) => fromBinary(method.output, answer),
      encode(method.input, request),
      metadataOf(metadata),
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

  /** Takes no more calls, ends streams, and resolves when the calls under way are over. */
  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close(): Promise<void> {
    for (const stream of this.#streams) stream.cancel()
    await Promise.allSettled(this.#underWay)
    this.#client.close()
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  #check(signal: AbortSignal | undefined): void {
    if (this.#closing !== undefined) throw new CancelledError('the client is closed')
    if (signal?.aborted) throw new CancelledError('the call was cancelled', { cause: signal.reason })
  }
}

const identity = (bytes: Buffer): Buffer => bytes

function pathOf(method: DescMethodUnary | DescMethodServerStreaming): string {
  return `/${method.parent.typeName}/${method.name}`
}

function encode<I extends DescMessage>(input: I, request: MessageInitShape<I>): Buffer {
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
  for (const [key, value] of Object.entries(entries)) {
    try {
      metadata.set(key, value)
    } catch (cause) {
      throw new InvalidArgumentError((cause as Error).message, { reason: 'INVALID_METADATA', cause })
    }
  }
  return metadata
}

function deadlineIn(timeoutMs: number): number {
  if (!(timeoutMs > 0)) {
    throw new InvalidArgumentError(`timeoutMs must be more than 0, got ${timeoutMs}`, {
      reason: 'INVALID_TIMEOUT',
    })
  }
  return Date.now() + Math.min(timeoutMs, MAX_TIMEOUT_MS)
}

function reasonOf(signal: AbortSignal | undefined): unknown {
  return signal?.aborted ? signal.reason : undefined
}

function isServiceError(error: unknown): error is ServiceError {
  return error instanceof Error && 'code' in error && typeof error.code === 'number'
}
