/**
 * Look-ups over one `StreamItems` call per connection. Requests are sent as long as the connection takes them and wait
 * here otherwise; each has its own deadline and signal. When a stream breaks, the look-ups that it has not answered are
 * sent again on the next one, at most three times: a look-up changes nothing.
 */
import type { MessageInitShape, MessageShape } from '@bufbuild/protobuf'
import type { ClientDuplexStream } from '@grpc/grpc-js'
import {
  CancelledError,
  DeadlineExceededError,
  fromServiceError,
  ItemCacheError,
  ResourceExhaustedError,
  UnavailableError,
} from './errors.ts'
import {
  ItemCacheService,
  StreamItemsRequestSchema,
  type StreamItemsResponse,
} from './gen/itemcache/v1/item_cache_pb.ts'
import { type CallOptions, checkedTimeout, encode, isServiceError, type Transport } from './transport.ts'

export type LookUp = Omit<MessageInitShape<typeof StreamItemsRequestSchema>, 'correlationId' | '$typeName'>

const MAX_ATTEMPTS = 4
const FIRST_BACKOFF_MS = 50
/** Look-ups of one connection that may wait for answers or for room. */
const MAX_WAITING = 100_000

interface Waiting {
  readonly bytes: Buffer
  readonly resolve: (answer: StreamItemsResponse) => void
  readonly reject: (error: ItemCacheError) => void
  readonly forget: () => void
  attempts: number
}

export class Pipeline {
  readonly #lanes: readonly Lane[]
  readonly #timeoutMs: number
  #turn = 0

  constructor(transport: Transport, metadata: Readonly<Record<string, string>>) {
    this.#timeoutMs = transport.timeoutMs
    this.#lanes = Array.from({ length: transport.connections }, (_, i) => new Lane(transport, i, metadata))
  }

  /** The answer to one look-up. Rejects with ItemCacheError only. */
  lookUp(request: LookUp, { timeoutMs, signal }: CallOptions = {}): Promise<StreamItemsResponse> {
    const lane = this.#lanes[this.#turn++ % this.#lanes.length]
    if (lane === undefined) throw new RangeError('a pipeline has a lane')
    return lane.lookUp(request, checkedTimeout(timeoutMs ?? this.#timeoutMs), signal)
  }

  /** Refuses further look-ups, and ends the streams when all that are under way have been answered. */
  close(): Promise<unknown> {
    return Promise.all(this.#lanes.map((lane) => lane.close()))
  }
}

/** One connection's stream. */
class Lane {
  readonly #transport: Transport
  readonly #connection: number
  readonly #metadata: Readonly<Record<string, string>>
  /** All that is not answered, by correlation id, in the order in which it came. */
  readonly #waiting = new Map<bigint, Waiting>()
  /** Those of them that are not sent. */
  readonly #unsent = new Set<bigint>()
  #nextId = 1n
  #call:
    | ClientDuplexStream<Buffer, MessageShape<typeof ItemCacheService.method.streamItems.output>>
    | undefined
  #opening = false
  #full = false
  #failures = 0
  #closed: PromiseWithResolvers<void> | undefined

  constructor(transport: Transport, connection: number, metadata: Readonly<Record<string, string>>) {
    this.#transport = transport
    this.#connection = connection
    this.#metadata = metadata
  }

  lookUp(request: LookUp, timeoutMs: number, signal: AbortSignal | undefined): Promise<StreamItemsResponse> {
    const { promise, resolve, reject } = Promise.withResolvers<StreamItemsResponse>()
    if (this.#closed !== undefined) throw new CancelledError('the client is closed')
    if (signal?.aborted) throw new CancelledError('the call was cancelled', { cause: signal.reason })
    if (this.#waiting.size >= MAX_WAITING) {
      throw new ResourceExhaustedError(`${MAX_WAITING} look-ups are waiting`, { reason: 'PIPELINE_FULL' })
    }
    const id = this.#nextId++
    const bytes = encode(StreamItemsRequestSchema, { ...request, correlationId: id })
    const cancel = () => {
      this.#take(id)?.reject(new CancelledError('the call was cancelled', { cause: signal?.reason }))
    }
    const timer = setTimeout(() => {
      this.#take(id)?.reject(new DeadlineExceededError('the deadline has passed', { id: request.id }))
    }, timeoutMs)
    const forget = () => {
      clearTimeout(timer)
      signal?.removeEventListener('abort', cancel)
    }
    signal?.addEventListener('abort', cancel, { once: true })
    this.#waiting.set(id, { bytes, resolve, reject, forget, attempts: 0 })
    this.#unsent.add(id)
    this.#send()
    return promise
  }

  close(): Promise<void> {
    this.#closed ??= Promise.withResolvers<void>()
    this.#endIfDone()
    return this.#closed.promise
  }

  #endIfDone(): void {
    if (this.#closed === undefined || this.#waiting.size > 0) return
    this.#call?.end()
    this.#closed.resolve()
  }

  /** Removes a look-up that is settled one way or another. */
  #take(id: bigint): Waiting | undefined {
    const waiting = this.#waiting.get(id)
    if (waiting === undefined) return undefined
    this.#waiting.delete(id)
    this.#unsent.delete(id)
    waiting.forget()
    this.#endIfDone()
    return waiting
  }

  #send(): void {
    if (this.#call === undefined) {
      if (!this.#opening && this.#unsent.size > 0) void this.#open(0)
      return
    }
    for (const id of this.#unsent) {
      if (this.#full) return
      this.#unsent.delete(id)
      const waiting = this.#waiting.get(id)
      if (waiting === undefined) continue
      waiting.attempts++
      this.#full = !this.#call.write(waiting.bytes)
    }
  }

  async #open(delayMs: number): Promise<void> {
    this.#opening = true
    try {
      if (delayMs > 0) await new Promise((resolve) => setTimeout(resolve, delayMs).unref())
      const { streamItems } = ItemCacheService.method
      const call = await this.#transport.bidiStream(streamItems, this.#connection, this.#metadata)
      this.#call = call
      this.#full = false
      let ended = false
      const end = (error: ItemCacheError) => {
        if (ended) return
        ended = true
        this.#call = undefined
        this.#broken(error)
      }
      call.on('data', (answer: StreamItemsResponse) => {
        this.#failures = 0
        this.#take(answer.correlationId)?.resolve(answer)
      })
      call.on('drain', () => {
        this.#full = false
        this.#send()
      })
      call.on('error', (error: Error) => {
        end(
          isServiceError(error)
            ? fromServiceError(error)
            : new UnavailableError(error.message, { cause: error }),
        )
      })
      call.on('end', () => end(new UnavailableError('the stream has ended')))
      this.#opening = false
      this.#send()
    } catch (error) {
      this.#opening = false
      this.#broken(
        error instanceof ItemCacheError ? error : new UnavailableError('no connection', { cause: error }),
      )
    }
  }

  /** What was sent and not answered is to be sent again, unless a retry is of no use. */
  #broken(error: ItemCacheError): void {
    const lost = error.code === 'UNAVAILABLE' || (error.code === 'INTERNAL' && error.reason === undefined)
    for (const [id, waiting] of this.#waiting) {
      // One that waited for a connection in vain has used up an attempt, too.
      if (this.#unsent.has(id)) waiting.attempts++
      if (!lost || waiting.attempts >= MAX_ATTEMPTS) this.#take(id)?.reject(error)
      else this.#unsent.add(id)
    }
    if (this.#unsent.size === 0 || this.#opening) return
    const backoffMs = FIRST_BACKOFF_MS * 2 ** Math.min(this.#failures++, 4)
    void this.#open(Math.random() * backoffMs)
  }
}
