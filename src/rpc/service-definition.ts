/** A grpc-js service definition made out of a protobuf-es service descriptor. */
import {
  type DescMessage,
  type DescService,
  fromBinary,
  type Message,
  type MessageShape,
  toBinary,
} from '@bufbuild/protobuf'
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

/** What a handler may answer: a message, or one that is encoded already. */
export type Reply = Message | Uint8Array | Framed

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

function serializer<Desc extends DescMessage>(desc: Desc) {
  return (reply: Reply): Buffer =>
    reply instanceof Framed
      ? reply.message
      : asBuffer(reply instanceof Uint8Array ? reply : toBinary(desc, reply as MessageShape<Desc>))
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
        requestSerialize: serializer(method.input),
        requestDeserialize: deserializer(method.input),
        responseSerialize: serializer(method.output),
        responseDeserialize: deserializer(method.output),
      },
    ]),
  )
}
