/** The RPCs of `ItemCacheService`: check the request, call the service, encode the answer. */
import { createHash } from 'node:crypto'
import {
  create,
  type DescMessage,
  type JsonObject,
  type JsonValue,
  type MessageInitShape,
  type MessageShape,
  toBinary,
} from '@bufbuild/protobuf'
import type { UntypedServiceImplementation } from '@grpc/grpc-js'
import { ItemCacheError, itemNotFound } from '../errors.ts'
import {
  type CreateItemRequest,
  CreateItemRequestSchema,
  type DeleteItemRequest,
  DeleteItemRequestSchema,
  DeleteItemResponseSchema,
  type GetItemRequest,
  type GetMetricsRequest,
  GetMetricsResponseSchema,
  type InspectItemRequest,
  InspectItemResponseSchema,
  type InvalidateItemsRequest,
  InvalidateItemsRequestSchema,
  InvalidateItemsResponseSchema,
  InvalidationMode,
  type Item,
  ItemCacheService,
  type ListItemsRequest,
  type StreamItemsRequest,
  type UpdateItemRequest,
  UpdateItemRequestSchema,
  type WatchMetricsRequest,
  WatchMetricsResponseSchema,
} from '../gen/itemcache/v1/item_cache_pb.ts'
import type { Subscriptions } from '../invalidation/subscriptions.ts'
import { type Ending, untilAborted } from '../invalidation/tail.ts'
import { etagOf, LIMITS } from '../item.ts'
import type { InspectedParts } from '../service/inspect.ts'
import { readPage } from '../service/list.ts'
import type { Answer, Reader, ReadOptions } from '../service/read.ts'
import type { Write, Writer } from '../service/write.ts'
import type {
  InvalidationMode as DomainMode,
  InvalidationTarget,
  Snapshot,
  StoreTier,
} from '../tiers/tier.ts'
import type { BatchRequest } from './batch-request.ts'
import {
  type CallContext,
  type CallFrame,
  deadlinePassed,
  lookUpStream,
  type StreamHandler,
  serverStream,
  unary,
  wellFormed,
} from './call.ts'
import type { DirectMethod } from './direct-call.ts'
import {
  type BatchResult,
  cacheStatus,
  encodeBatch,
  encodeGetItem,
  encodeItemError,
  encodeList,
  encodePage,
  encodePlainHits,
  encodeStreamFailure,
  encodeStreamItem,
  encodeWritten,
  type GetItemResult,
  masked,
} from './encode.ts'
import { type ItemMask, merge, readOnlyFields, setFields, WHOLE } from './field-mask.ts'
import { inspectMessage } from './inspect-message.ts'
import { metricsMessage } from './metrics-message.ts'
import type { Reply } from './service-definition.ts'
import { toItemCacheError } from './status.ts'
import {
  checkDraft,
  checkId,
  checkIds,
  checkListSize,
  checkOptionalName,
  checkTag,
  durationMs,
  itemDraft,
  itemMask,
  readOptions,
  Violations,
} from './validate.ts'
import { watchInvalidations } from './watch.ts'

/** The service that the handlers call. */
export interface Services {
  readonly reader: Reader
  readonly writer: Writer
  readonly postgres: StoreTier
  readonly subscriptions: Subscriptions
  readonly inspected: InspectedParts
}

/** Full name of a method, as metrics and logs show it. */
export const methodName = (method: string): string => `${ItemCacheService.typeName}/${method}`

/** Every RPC: what grpc-js calls, as it wants it, and how each call with one request message is handled, by their names in the proto. */
export function implementation(
  frame: CallFrame,
  services: Services,
): {
  readonly grpcJs: UntypedServiceImplementation
  readonly direct: Readonly<Record<string, DirectMethod['handle']>>
} {
  const { reader, writer, postgres, inspected, subscriptions } = services

  function getItem(request: GetItemRequest, context: CallContext): Reply | Promise<Reply> {
    const violations = new Violations()
    checkId(request.id, 'id', violations)
    const options = context.traced(readOptions(request.options, violations))
    const mask = itemMask(request.readMask, 'read_mask', violations)
    violations.throwIfAny()
    context.id = request.id
    const finish = (answer: Answer) => getItemReply(answer, request, mask, context)
    const hit = reader.hit(context.tenant, request.id, options)
    if (hit !== undefined) return finish(hit)
    return reader.load(context.tenant, request.id, options, context.ending).then(finish)
  }

  function getItemReply(
    answer: Answer,
    request: GetItemRequest,
    mask: ItemMask | undefined,
    context: CallContext,
  ): Reply {
    context.tier = answer.tier
    context.outcome = answer.outcome
    const result = resultOf(answer, request.ifNoneMatch, mask)
    if (result.kind !== 'not-found') return encodeGetItem(result, answer, reader.now())
    context.cache = cacheStatus(answer, reader.now())
    throw itemNotFound(request.id)
  }

  function resultOf(
    { copy }: Answer,
    ifNoneMatch: string,
    mask: ItemMask | undefined,
  ): GetItemResult | { readonly kind: 'not-found' } {
    if (copy === undefined) return { kind: 'none' }
    if (copy.bytes === undefined) return { kind: 'not-found' }
    if (ifNoneMatch !== '' && ifNoneMatch === etagOf(copy.revision)) return { kind: 'not-modified' }
    return { kind: 'item', bytes: masked(copy.bytes, mask) }
  }

  /** One look-up of a stream: whatever is wrong with it concerns no other. */
  function streamItem(
    request: StreamItemsRequest,
    context: CallContext,
    ending: () => Ending,
  ): Reply | Promise<Reply> {
    const { tenant } = context
    const { correlationId, id, ifNoneMatch } = request
    const refuse = (error: unknown) => {
      const known = toItemCacheError(error, (reference, err) => {
        frame.log.error({ reference, method: methodName('StreamItems'), err }, 'internal error')
      })
      frame.metrics.countFailure(known)
      return encodeStreamFailure(correlationId, known)
    }
    try {
      frame.rateLimit?.take(tenant)
      const violations = new Violations()
      checkId(id, 'id', violations)
      const options = context.traced(readOptions(request.options, violations))
      const mask = itemMask(request.readMask, 'read_mask', violations)
      violations.throwIfAny()
      const finish = (answer: Answer): Uint8Array =>
        encodeStreamItem(correlationId, resultOf(answer, ifNoneMatch, mask), answer, reader.now())
      const hit = reader.hit(tenant, id, options)
      if (hit !== undefined) return finish(hit)
      return reader.load(tenant, id, options, ending()).then(finish).catch(refuse)
    } catch (error) {
      return refuse(error)
    }
  }

  function batchGetItems(batch: BatchRequest, context: CallContext): Reply | Promise<Reply> {
    const { tenant } = context
    const plainIds = context.trace === undefined ? batch.asciiIds() : undefined
    const plain = plainIds && reader.plainHits(tenant, plainIds)
    if (plainIds !== undefined && plain?.length === plainIds.length) {
      context.outcome = `${plainIds.length} ids`
      return encodePlainHits(plainIds, plain, reader.now())
    }
    const request = wellFormed(batch.decoded())
    const { ids } = request
    const violations = new Violations()
    checkIds(ids, 'ids', violations)
    const options = context.traced(readOptions(request.options, violations))
    const mask = itemMask(request.readMask, 'read_mask', violations)
    violations.throwIfAny()
    context.outcome = `${ids.length} ids`
    const hits = reader.hits(tenant, ids, options, plain)
    if (!isWhole(hits)) return batchLoads(ids, hits, options, mask, context)
    return encodeBatch(ids, hits, mask, reader.now())
  }

  /** Loads what is missing, each id once. */
  async function batchLoads(
    ids: readonly string[],
    hits: readonly (Answer | undefined)[],
    options: ReadOptions,
    mask: ItemMask | undefined,
    context: CallContext,
  ): Promise<Reply> {
    const missing = new Set(ids.filter((_, i) => hits[i] === undefined))
    // Slow items are given up shortly before the caller does, so that the others still reach it.
    using patience = new Patience(context)
    const load = async (id: string) =>
      [id, await batchLoad(id, options, context.tenant, patience.signal)] as const
    const loaded = new Map(await Promise.all([...missing].map(load)))
    const results = ids.flatMap((id, i) => hits[i] ?? loaded.get(id) ?? [])
    return encodeBatch(ids, results, mask, reader.now())
  }

  async function batchLoad(
    id: string,
    options: ReadOptions,
    tenant: string,
    signal: AbortSignal,
  ): Promise<BatchResult> {
    try {
      return await reader.load(tenant, id, options, signal)
    } catch (error) {
      const known = toItemCacheError(error, (reference, err) => {
        frame.log.error({ reference, method: methodName('BatchGetItems'), err }, 'internal error')
      })
      if (known.code === 'cancelled') throw known
      return encodeItemError(known)
    }
  }

  async function listItems(request: ListItemsRequest, context: CallContext): Promise<Reply> {
    const violations = new Violations()
    const { pageToken, category, tag } = request
    const pageSize = request.pageSize === 0 ? 50 : request.pageSize
    violations.check(
      pageSize >= 1 && pageSize <= LIMITS.pageSize,
      'page_size',
      `must be 0 to ${LIMITS.pageSize}, got ${request.pageSize}`,
    )
    if (category !== '') checkTag(category, 'category', violations)
    if (tag !== '') checkTag(tag, 'tag', violations)
    violations.throwIfAny()
    const answer = await readPage(
      { reader, postgres },
      { tenant: context.tenant, pageSize, pageToken, category, tag },
      encodePage,
      context.signal,
      context.trace,
    )
    context.tier = answer.tier
    context.outcome = answer.outcome
    const { copy } = answer
    if (copy?.bytes === undefined) throw new ItemCacheError('internal', 'a list has no page')
    return encodeList(copy.bytes, answer, reader.now())
  }

  async function createItem(request: CreateItemRequest, context: CallContext): Promise<Reply> {
    const violations = new Violations()
    const item = itemOf(request, violations)
    const draft = itemDraft(item)
    checkDraft(draft, violations)
    checkOptionalName(request.requestId, 'request_id', LIMITS.requestIdBytes, violations)
    violations.throwIfAny()
    context.id = item.id
    const write = writeOf(context, CreateItemRequestSchema, request)
    const { snapshot, revision } = await writer.create(write, item.id, draft)
    return encodeWritten(bytesOf(snapshot), revision)
  }

  async function updateItem(request: UpdateItemRequest, context: CallContext): Promise<Reply> {
    const violations = new Violations()
    const item = itemOf(request, violations)
    const draft = itemDraft(item)
    const named = itemMask(request.updateMask, 'update_mask', violations)
    if (named !== undefined) {
      for (const field of readOnlyFields(named)) {
        violations.add('update_mask', `${field} is set by the server and cannot be changed`)
      }
    }
    const mask =
      request.updateMask === undefined || request.updateMask.paths.length === 0 ? setFields(draft) : named
    // What the mask does not name is not looked at, and a part of a price is judged with the current rest of it.
    checkDraft(merge(WHOLE, draft, mask), violations)
    checkOptionalName(request.requestId, 'request_id', LIMITS.requestIdBytes, violations)
    violations.throwIfAny()
    context.id = item.id
    const write = writeOf(context, UpdateItemRequestSchema, request)
    const precondition = { etag: item.etag, allowMissing: request.allowMissing }
    const { snapshot, revision } = await writer.update(write, item.id, precondition, (current) => {
      const merged = merge(current, draft, mask)
      const found = new Violations()
      checkDraft(merged, found)
      found.throwIfAny()
      return merged
    })
    return encodeWritten(bytesOf(snapshot), revision)
  }

  async function deleteItem(request: DeleteItemRequest, context: CallContext): Promise<Reply> {
    const violations = new Violations()
    checkId(request.id, 'id', violations)
    checkOptionalName(request.requestId, 'request_id', LIMITS.requestIdBytes, violations)
    violations.throwIfAny()
    context.id = request.id
    const write = writeOf(context, DeleteItemRequestSchema, request)
    const precondition = { etag: request.etag, allowMissing: request.allowMissing }
    const { revision } = await writer.delete(write, request.id, precondition)
    return encoded(DeleteItemResponseSchema, { revision: BigInt(revision) })
  }

  async function invalidateItems(request: InvalidateItemsRequest, context: CallContext): Promise<Reply> {
    const violations = new Violations()
    const target = targetOf(request, violations)
    violations.check(request.mode in MODES, 'mode', `has the unknown value ${request.mode}`)
    checkOptionalName(request.requestId, 'request_id', LIMITS.requestIdBytes, violations)
    if (request.refreshOrigin) {
      const few = target?.kind === 'ids' && target.ids.length <= MAX_REFETCH
      violations.check(few, 'refresh_origin', `may only be set with 1 to ${MAX_REFETCH} ids`)
    }
    violations.throwIfAny()
    if (target === undefined) throw new ItemCacheError('internal', 'a target was checked and is missing')
    const write = writeOf(context, InvalidateItemsRequestSchema, request)
    const revision = await writer.invalidate(
      write,
      target,
      MODES[request.mode] ?? 'EXPIRE',
      request.refreshOrigin,
    )
    return encoded(InvalidateItemsResponseSchema, { revision: BigInt(revision) })
  }

  async function inspect(request: InspectItemRequest, context: CallContext): Promise<Reply> {
    const violations = new Violations()
    checkId(request.id, 'id', violations)
    violations.throwIfAny()
    context.id = request.id
    const inspecting = inspectMessage(inspected, frame.metrics, context.tenant, request.id)
    const found = await untilAborted(inspecting, context.signal)
    return toBinary(InspectItemResponseSchema, found)
  }

  const metrics = ({ includeBuckets }: GetMetricsRequest | WatchMetricsRequest) =>
    metricsMessage(frame.metrics.snapshot(includeBuckets))

  const watchMetrics: StreamHandler<WatchMetricsRequest> = (request, _, { draining, wake }) => {
    const violations = new Violations()
    const intervalMs =
      request.interval === undefined ? 1000 : durationMs(request.interval, 'interval', violations)
    violations.check(intervalMs >= 100 && intervalMs <= 3_600_000, 'interval', 'must be 100 ms to 1 h')
    violations.throwIfAny()
    let isDue = true
    let timer: NodeJS.Timeout | undefined
    const due = () => {
      isDue = true
      timer = undefined
      wake()
    }
    return {
      next() {
        draining.throwIfAborted()
        if (!isDue) {
          timer ??= setTimeout(due, intervalMs)
          return undefined
        }
        isDue = false
        return encoded(WatchMetricsResponseSchema, { snapshot: metrics(request) })
      },
      [Symbol.dispose]: () => clearTimeout(timer),
    }
  }

  const on = <Request>(
    method: string,
    handler: (request: Request, context: CallContext) => Reply | Promise<Reply>,
  ) => unary(frame, methodName(method), handler)

  return {
    direct: {
      GetItem: on('GetItem', getItem),
      BatchGetItems: on('BatchGetItems', batchGetItems),
      ListItems: on('ListItems', listItems),
      CreateItem: on('CreateItem', createItem),
      UpdateItem: on('UpdateItem', updateItem),
      DeleteItem: on('DeleteItem', deleteItem),
      InvalidateItems: on('InvalidateItems', invalidateItems),
      InspectItem: on('InspectItem', inspect),
      GetMetrics: on('GetMetrics', (request: GetMetricsRequest) =>
        encoded(GetMetricsResponseSchema, { snapshot: metrics(request) }),
      ),
      WatchMetrics: serverStream(frame, methodName('WatchMetrics'), watchMetrics),
      WatchInvalidations: serverStream(
        frame,
        methodName('WatchInvalidations'),
        watchInvalidations(subscriptions, reader, frame.unsent.maxBytes / 4),
      ),
    },
    grpcJs: {
      StreamItems: lookUpStream(frame, methodName('StreamItems'), streamItem),
    },
  }
}

const encoded = <Desc extends DescMessage>(schema: Desc, answer: MessageInitShape<Desc>): Reply =>
  toBinary(schema, create(schema, answer))

/** More ids than this are not fetched from the origin in one call. */
const MAX_REFETCH = 100

const MODES: Readonly<Record<InvalidationMode, DomainMode>> = {
  [InvalidationMode.UNSPECIFIED]: 'EXPIRE',
  [InvalidationMode.EXPIRE]: 'EXPIRE',
  [InvalidationMode.REMOVE]: 'REMOVE',
}

/** Whether there is nothing that has to be loaded. */
function isWhole(answers: readonly (Answer | undefined)[]): answers is readonly Answer[] {
  return !answers.includes(undefined)
}

function itemOf(request: { item?: Item | undefined }, violations: Violations): Item {
  const { item } = request
  violations.check(item !== undefined, 'item', 'is required')
  if (item === undefined) {
    violations.throwIfAny()
    throw new ItemCacheError('internal', 'unreachable: the check above has thrown')
  }
  checkId(item.id, 'item.id', violations)
  return item
}

function bytesOf(snapshot: Snapshot): Uint8Array {
  if (snapshot.bytes === undefined) throw new ItemCacheError('internal', 'a write returned no item')
  return snapshot.bytes
}

function targetOf(request: InvalidateItemsRequest, violations: Violations): InvalidationTarget | undefined {
  const { target } = request
  switch (target.case) {
    case 'ids': {
      const { ids } = target.value
      checkIds(ids, 'ids.ids', violations)
      return { kind: 'ids', ids: [...new Set(ids)] }
    }
    case 'tags': {
      const { tags } = target.value
      checkListSize(tags.length, [1, LIMITS.tagsPerItem], 'tags.tags', violations)
      for (const [i, tag] of tags.slice(0, LIMITS.tagsPerItem).entries()) {
        checkTag(tag, `tags.tags[${i}]`, violations)
      }
      return { kind: 'tags', tags: [...new Set(tags)] }
    }
    case 'all':
      violations.check(target.value, 'all', 'must be true')
      return { kind: 'all' }
    default:
      violations.add('target', 'one of ids, tags and all is required')
      return undefined
  }
}

function writeOf<Desc extends DescMessage>(
  context: CallContext,
  schema: Desc,
  request: MessageShape<Desc> & { requestId: string; item?: Item | undefined },
): Write {
  const { tenant, clientId, signal, trace } = context
  const { requestId } = request
  const fingerprint = requestId === '' ? '' : digest(schema, request)
  return { tenant, requestId, fingerprint, clientId, signal, trace }
}

/** The same for equal requests, in whatever order a client has encoded the entries of their maps. */
function digest<Desc extends DescMessage>(
  schema: Desc,
  request: MessageShape<Desc> & { item?: Item | undefined },
): string {
  const { item } = request
  const ordered =
    item?.attributes === undefined
      ? request
      : { ...request, item: { ...item, attributes: inOrder(item.attributes) as JsonObject } }
  return createHash('sha256').update(schema.typeName).update(toBinary(schema, ordered)).digest('base64url')
}

/** The value with the keys of every object sorted. */
function inOrder(value: JsonValue): JsonValue {
  if (value === null || typeof value !== 'object') return value
  if (Array.isArray(value)) return value.map(inOrder)
  const entries = Object.entries(value).map(([key, one]) => [key, inOrder(one)] as const)
  return Object.fromEntries(entries.sort(([a], [b]) => (a < b ? -1 : 1)))
}

/** Ends shortly before the caller's own time does, or with it. The signal is made when first asked for. */
class Patience implements Disposable {
  readonly #context: CallContext
  #signal: AbortSignal | undefined
  #timer: NodeJS.Timeout | undefined

  constructor(context: CallContext) {
    this.#context = context
  }

  get signal(): AbortSignal {
    if (this.#signal === undefined) {
      const over = new AbortController()
      this.#timer = setTimeout(() => over.abort(deadlinePassed()), this.#context.remainingMs * 0.95)
      this.#signal = AbortSignal.any([this.#context.signal, over.signal])
    }
    return this.#signal
  }

  [Symbol.dispose](): void {
    clearTimeout(this.#timer)
  }
}
