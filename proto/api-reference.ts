/**
 * Writes docs/api.md from the proto and its comments. Run by `npm run generate`.
 *
 * The comments are the reference: this program only sorts them. First the RPCs in the order of the proto, each
 * with its request and response, then the messages and enums that several of them share.
 */
import { execFileSync } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import {
  createFileRegistry,
  type DescEnum,
  type DescField,
  type DescMessage,
  type DescMethod,
  type DescOneof,
  fromBinary,
  ScalarType,
} from '@bufbuild/protobuf'
import {
  type FileDescriptorProto,
  FileDescriptorSetSchema,
  MethodOptions_IdempotencyLevel,
} from '@bufbuild/protobuf/wkt'

const ROOT = join(import.meta.dirname, '..')
const FILE = 'itemcache/v1/item_cache.proto'
const TARGET = join(ROOT, 'docs', 'api.md')

/** Numbers of fields in descriptor.proto, of which the paths of comments are made. */
const AT = {
  messages: 4,
  enums: 5,
  services: 6,
  syntax: 12,
  messageFields: 2,
  messageOneofs: 8,
  enumValues: 2,
  methods: 2,
} as const

const set = fromBinary(
  FileDescriptorSetSchema,
  execFileSync(
    join(ROOT, 'node_modules', '.bin', 'buf'),
    ['build', 'proto', '--as-file-descriptor-set', '-o', '-'],
    {
      cwd: ROOT,
      maxBuffer: 2 ** 26,
    },
  ),
)
const file = createFileRegistry(set).getFile(FILE) ?? missing(FILE)
const [service = missing('the service')] = file.services
const comments = new Map(
  (file.proto.sourceCodeInfo?.location ?? []).map(({ path, leadingComments }) => [
    path.join('.'),
    leadingComments,
  ]),
)

/** The messages that belong to one RPC alone are shown with it. */
const ofOneMethod = new Set<DescMessage>()
for (const method of service.methods) {
  for (const message of [method.input, method.output]) ofOneMethod.add(message)
}
const shared = file.messages.filter((message) => !ofOneMethod.has(message))

writeFileSync(
  TARGET,
  [
    '<!-- Written by proto/api-reference.ts from the comments of the proto. Do not edit: run `npm run generate`. -->',
    '',
    '# API reference',
    '',
    `Package \`${file.proto.package}\`, service \`${service.typeName}\`, from [${FILE}](../proto/${FILE}).`,
    '',
    prose(commentAt([AT.syntax])),
    '',
    '## RPCs',
    '',
    prose(commentAt([AT.services, 0])),
    '',
    table(
      ['RPC', 'kind', 'safe to repeat'],
      service.methods.map((method) => [link(method.name), kindOf(method), repeatable(method)]),
    ),
    ...service.methods.flatMap((method, i) => ['', methodSection(method, i)]),
    '',
    '## Messages',
    ...shared.flatMap((message) => ['', messageSection(message, '###')]),
    '',
    '## Enums',
    ...file.enums.flatMap((one) => ['', enumSection(one)]),
    '',
  ].join('\n'),
)

function methodSection(method: DescMethod, index: number): string {
  const { methodKind, input, output } = method
  const stream = (side: 'client' | 'server') =>
    methodKind === 'bidi_streaming' || methodKind === `${side}_streaming` ? 'stream ' : ''
  const signature = `rpc ${method.name}(${stream('client')}${input.name}) returns (${stream('server')}${output.name})`
  return [
    `### ${method.name}`,
    '',
    '```proto',
    signature,
    '```',
    '',
    prose(commentAt([AT.services, 0, AT.methods, index])),
    '',
    messageSection(input, '####'),
    '',
    messageSection(output, '####'),
  ].join('\n')
}

function messageSection(message: DescMessage, heading: string): string {
  const index = indexIn(file.proto.messageType, message)
  const rows: string[][] = []
  const shown = new Set<DescOneof>()
  for (const field of message.fields) {
    const { oneof } = field
    if (oneof !== undefined && !shown.has(oneof)) {
      shown.add(oneof)
      const nth = message.proto.oneofDecl.indexOf(oneof.proto)
      rows.push([`\`${oneof.name}\``, 'one of', cell([AT.messages, index, AT.messageOneofs, nth])])
    }
    const nth = message.proto.field.indexOf(field.proto)
    rows.push([
      `${oneof === undefined ? '' : '– '}\`${field.name}\``,
      typeOf(field),
      cell([AT.messages, index, AT.messageFields, nth]),
    ])
  }
  const lines = [`${heading} ${message.name}`, '', prose(commentAt([AT.messages, index]))]
  if (rows.length > 0) lines.push('', table(['field', 'type', 'meaning'], rows))
  return lines.join('\n')
}

function enumSection(one: DescEnum): string {
  const index = indexIn(file.proto.enumType, one)
  const rows = one.values.map((value, nth) => [
    `\`${value.name}\``,
    `${value.number}`,
    cell([AT.enums, index, AT.enumValues, nth]),
  ])
  return [
    `### ${one.name}`,
    '',
    prose(commentAt([AT.enums, index])),
    '',
    table(['value', 'number', 'meaning'], rows),
  ].join('\n')
}

function typeOf(field: DescField): string {
  switch (field.fieldKind) {
    case 'list':
      return `repeated ${elementOf(field)}`
    case 'map':
      return `map of ${ScalarType[field.mapKey].toLowerCase()} to ${elementOf(field)}`
    default:
      return `${field.proto.proto3Optional ? 'optional ' : ''}${elementOf(field)}`
  }
}

function elementOf({ scalar, message, enum: one }: DescField): string {
  if (scalar !== undefined) return ScalarType[scalar].toLowerCase()
  const type = message ?? one ?? missing('a type')
  return type.file === file ? link(type.name) : `\`${type.typeName}\``
}

function kindOf({ methodKind }: DescMethod): string {
  return {
    unary: 'unary',
    server_streaming: 'server stream',
    client_streaming: 'client stream',
    bidi_streaming: 'streams both ways',
  }[methodKind]
}

function repeatable({ idempotency }: DescMethod): string {
  if (idempotency === MethodOptions_IdempotencyLevel.NO_SIDE_EFFECTS) return 'yes: it changes nothing'
  return idempotency === MethodOptions_IdempotencyLevel.IDEMPOTENT ? 'yes' : 'with a `request_id`'
}

function link(name: string): string {
  return `[${name}](#${name.toLowerCase()})`
}

function table(header: readonly string[], rows: readonly (readonly string[])[]): string {
  const line = (cells: readonly string[]) => `| ${cells.join(' | ')} |`
  return [line(header), `|${'---|'.repeat(header.length)}`, ...rows.map(line)].join('\n')
}

function commentAt(path: readonly number[]): string {
  const comment = comments.get(path.join('.')) ?? missing(`the comment at ${path.join('.')}`)
  return comment.replace(/^ /gm, '').trim()
}

function cell(path: readonly number[]): string {
  return commentAt(path).replace(/\s+/g, ' ').replaceAll('|', '\\|')
}

/** A comment as Markdown: its indented lines `NAME   meaning` become a table. */
function prose(comment: string): string {
  return comment.replace(/(?:^ {2}[A-Z_]+ {2,}.*\n?)+/gm, (block) => {
    const rows = block
      .trimEnd()
      .split('\n')
      .map((line) => /^ {2}(\S+) +(.*)$/.exec(line)?.slice(1) ?? missing(line))
      .map(([name = '', meaning = '']) => [`\`${name}\``, meaning])
    return `${table(['code', 'when'], rows)}\n`
  })
}

function indexIn(
  list: FileDescriptorProto['messageType'] | FileDescriptorProto['enumType'],
  desc: DescMessage | DescEnum,
): number {
  return (list as readonly unknown[]).indexOf(desc.proto)
}

function missing(what: string): never {
  throw new Error(`${FILE} lacks ${what}`)
}
