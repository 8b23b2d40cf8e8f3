/** A grpc-js service definition made out of a protobuf-es service descriptor. */
import { type DescMessage, type DescService, fromBinary, type MessageShape } from '@bufbuild/protobuf'
import type { ServiceDefinition } from '@grpc/grpc-js'
import { Framed } from './wire.ts'

/**
 * A request that could not be decoded. grpc-js would answer INTERNAL if the deserialiser threw, so the handler
 * gets this in place of the message and answers INVALID_ARGUMENT.
 */
export class Malformed {
  readonly cause: unknown
  constructor(cause: unknown) {
    this.cause = cause
  }
}

/** What a handler answers: a message, encoded. */
export type Reply = Uint8Array | Framed

/** How many bytes a request among many of a stream took, framing left out, for the metrics. */
export const wireBytes = (request: unknown): number => (request as Sized)[WIRE_BYTES] ?? 0

const WIRE_BYTES = Symbol('wire bytes')
interface Sized {
  [WIRE_BYTES]?: number
}

const asBuffer = (bytes: Uint8Array): Buffer => Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength)

function deserializer<Desc extends DescMessage>(desc: Desc) {
  return (bytes: Buffer): MessageShape<Desc> | Malformed => {
    try {
      // Unknown fields are of no use to us, and keeping them would let callers make us hold garbage.
      return fromBinary(desc, bytes, { readUnknownFields: false })
    } catch (error) {
      return new Malformed(error)
    }
  }
}

const serialize = (reply: Reply): Buffer => (reply instanceof Framed ? reply.message : asBuffer(reply))

function sized<Request extends object>(deserialize: (bytes: Buffer) => Request) {
  return (bytes: Buffer): Request => {
    const request: Request & Sized = deserialize(bytes)
    request[WIRE_BYTES] = bytes.length
    return request
  }
}

/** The definition, its methods keyed by their names in the proto. */
export function grpcDefinition(service: DescService): ServiceDefinition {
  return Object.fromEntries(
    service.methods.map((method) => [
      method.name,
      {
        path: `/${service.typeName}/${method.name}`,
        requestStream: method.methodKind === 'client_streaming' || method.methodKind === 'bidi_streaming',
        responseStream: method.methodKind === 'server_streaming' || method.methodKind === 'bidi_streaming',
        requestSerialize: asBuffer,
        requestDeserialize:
          method.methodKind === 'bidi_streaming'
            ? sized(deserializer(method.input))
            : deserializer(method.input),
        responseSerialize: serialize,
        responseDeserialize: deserializer(method.output),
      },
    ]),
  )
}
