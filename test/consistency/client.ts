/** A gRPC client of one address that shows what a server sends. */
import {
  create,
  type DescMethod,
  fromBinary,
  type MessageInitShape,
  type MessageShape,
  toBinary,
} from '@bufbuild/protobuf'
import { anyUnpack } from '@bufbuild/protobuf/wkt'
import {
  Client,
  type ClientOptions,
  type ClientReadableStream,
  credentials,
  Metadata,
  type ServiceError,
} from '@grpc/grpc-js'
import { ErrorInfoSchema, RetryInfoSchema } from '../../src/gen/google/rpc/error_details_pb.ts'
import { StatusSchema } from '../../src/gen/google/rpc/status_pb.ts'
import {
  type CacheStatus,
  CacheStatusSchema,
  ItemCacheService,
  type WatchInvalidationsResponse,
} from '../../src/gen/itemcache/v1/item_cache_pb.ts'

const { method } = ItemCacheService

type Unary =
  | 'getItem'
  | 'batchGetItems'
  | 'listItems'
  | 'createItem'
  | 'updateItem'
  | 'deleteItem'
  | 'invalidateItems'
  | 'inspectItem'
  | 'getMetrics'

/** Why a call failed. `text`: "<code> <reason>". */
export interface Failed {
  readonly code: number
  readonly text: string
  /** The server says when a retry makes sense. */
  readonly hasRetryInfo: boolean
  readonly cache: CacheStatus | undefined
}

export class Caller {
  readonly #client: Client

  constructor(address: string, options: ClientOptions = {}) {
    this.#client = new Client(address, credentials.createInsecure(), {
      ...options,
      'grpc.initial_reconnect_backoff_ms': 100,
      'grpc.max_reconnect_backoff_ms': 300,
    })
  }

  call<Name extends Unary>(
    name: Name,
    request: MessageInitShape<(typeof method)[Name]['input']>,
    options: { readonly metadata: Readonly<Record<string, string>>; readonly timeoutMs: number },
  ): Promise<MessageShape<(typeof method)[Name]['output']> | Failed> {
    const { input, output } = method[name] as DescMethod
    const { promise, resolve } = Promise.withResolvers<
      MessageShape<(typeof method)[Name]['output']> | Failed
    >()
    this.#client.makeUnaryRequest(
      `/${ItemCacheService.typeName}/${method[name].name}`,
      (bytes: Buffer) => bytes,
      (bytes: Buffer) => bytes,
      Buffer.from(toBinary(input, create(input, request))),
      metadataOf(options.metadata),
      { deadline: Date.now() + options.timeoutMs },
      (error, answer) => {
        if (error !== null || answer === undefined) resolve(failed(error as ServiceError))
        else resolve(fromBinary(output, answer) as MessageShape<(typeof method)[Name]['output']>)
      },
    )
    return promise
  }

  watch(
    request: MessageInitShape<(typeof method)['watchInvalidations']['input']>,
    metadata: Readonly<Record<string, string>>,
  ): ClientReadableStream<WatchInvalidationsResponse> {
    const { input, output, name } = method.watchInvalidations
    return this.#client.makeServerStreamRequest(
      `/${ItemCacheService.typeName}/${name}`,
      (bytes: Buffer) => bytes,
      (bytes: Buffer) => fromBinary(output, bytes),
      Buffer.from(toBinary(input, create(input, request))),
      metadataOf(metadata),
    )
  }

  close(): void {
    this.#client.close()
  }
}

export function isFailed(answer: object): answer is Failed {
  return 'text' in answer
}

export function failed(error: ServiceError): Failed {
  const [encoded] = error.metadata?.get('grpc-status-details-bin') ?? []
  const details = encoded instanceof Buffer ? fromBinary(StatusSchema, encoded).details : []
  const info = details.map((any) => anyUnpack(any, ErrorInfoSchema)).find(Boolean)
  return {
    code: error.code,
    text: `${error.code} ${info?.reason ?? error.details}`,
    hasRetryInfo: details.some((any) => anyUnpack(any, RetryInfoSchema) !== undefined),
    cache: details.map((any) => anyUnpack(any, CacheStatusSchema)).find(Boolean),
  }
}

function metadataOf(entries: Readonly<Record<string, string>>): Metadata {
  const metadata = new Metadata()
  for (const [name, value] of Object.entries(entries)) metadata.set(name, value)
  return metadata
}
