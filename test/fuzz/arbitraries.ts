/** Hostile input that still looks enough like the real thing to come in deep. */
import { type DescField, type DescMessage, ScalarType } from '@bufbuild/protobuf'
import { BinaryWriter, WireType } from '@bufbuild/protobuf/wire'
import fc, { type Arbitrary } from 'fast-check'

/** Ids, tags and tenants: such as exist, and such as would do harm where they are taken for something else. */
const names = fc.constantFrom(
  ...[
    '1',
    '2',
    '20',
    'a',
    'b',
    '0',
    '01',
    '1e3',
    '-1',
    '4294967297',
    'a b',
    ' ',
    '',
    'constructor',
    '__proto__',
  ],
  ...[
    '*',
    '{x}',
    '../..',
    '@host',
    '%2e%2e',
    'a:b',
    'a%3Ab',
    '?x=1',
    '#',
    'a\r\nb',
    'a\0b',
    '\u2028',
    '\ufeff',
    '💡',
  ],
  ...['e\u0301', '\u00e9', 'x'.repeat(128), 'x'.repeat(129), 'é'.repeat(64), 'é'.repeat(65), 'W/"1"', '"2"'],
)
export const text: Arbitrary<string> = fc.oneof(names, fc.string({ unit: 'binary', maxLength: 140 }))

const bytes = fc.uint8Array({ maxLength: 40 })
const utf8 = (value: string) => new Uint8Array(Buffer.from(value))
const number = fc.oneof(
  fc.constantFrom(0n, 1n, -1n, 2n, 500n, 501n, 2n ** 31n, 2n ** 53n, 2n ** 63n - 1n, -(2n ** 63n)),
  fc.bigInt({ min: -(2n ** 63n), max: 2n ** 63n - 1n }),
)
const double = fc.oneof(fc.constantFrom(Number.NaN, Infinity, -Infinity, -0, 5e-324), fc.double())

/** Messages are not nested deeper; recursive types (Struct) are cut off there. */
const MAX_DEPTH = 5

/** The encoding of some message of a type, with any fields in any order and number, now and then with other content. */
export function encoded(desc: DescMessage): Arbitrary<Uint8Array> {
  return fc.oneof(
    { weight: 4, arbitrary: message(desc, 0) },
    { weight: 1, arbitrary: damaged(message(desc, 0)) },
  )
}

const known = new Map<string, Arbitrary<Uint8Array>>()

function message(desc: DescMessage, depth: number): Arbitrary<Uint8Array> {
  if (depth === MAX_DEPTH || desc.fields.length === 0) return fc.oneof(fc.constant(new Uint8Array()), bytes)
  const key = `${depth} ${desc.typeName}`
  let found = known.get(key)
  if (found === undefined) {
    const field = fc.oneof(...desc.fields.map((one) => fieldOf(one, depth)))
    const content = fc.oneof({ weight: 20, arbitrary: field }, { weight: 1, arbitrary: junk })
    found = fc.array(content, { maxLength: 6 }).map((parts) => new Uint8Array(Buffer.concat(parts)))
    known.set(key, found)
  }
  return found
}

/** A field with its tag. */
function fieldOf(field: DescField, depth: number): Arbitrary<Uint8Array> {
  const write = <T>(
    type: WireType,
    values: Arbitrary<T>,
    put: (writer: BinaryWriter, value: T) => BinaryWriter,
  ) => values.map((value) => put(new BinaryWriter().tag(field.number, type), value).finish())
  const delimited = (values: Arbitrary<Uint8Array>) =>
    write(WireType.LengthDelimited, values, (writer, value) => writer.bytes(value))

  if (field.fieldKind === 'map') {
    // An entry is a message with a key and a value.
    const entry = fc
      .tuple(text, fc.oneof(bytes, field.mapKind === 'message' ? message(field.message, depth + 1) : bytes))
      .map(([key, value]) =>
        new BinaryWriter()
          .tag(1, WireType.LengthDelimited)
          .bytes(utf8(key))
          .tag(2, WireType.LengthDelimited)
          .bytes(value)
          .finish(),
      )
    return delimited(entry)
  }
  if (field.message !== undefined) return delimited(message(field.message, depth + 1))
  switch (field.scalar) {
    case ScalarType.STRING:
      return delimited(fc.oneof({ weight: 9, arbitrary: text.map(utf8) }, { weight: 1, arbitrary: bytes }))
    case ScalarType.BYTES:
      return delimited(bytes)
    case ScalarType.DOUBLE:
      return write(WireType.Bit64, double, (writer, value) => writer.double(value))
    default:
      return write(WireType.Varint, number, (writer, value) => writer.int64(value))
  }
}

/** A field that nobody knows, or a wire type that does not fit. */
const junk = fc
  .tuple(
    fc.oneof(fc.integer({ min: 0, max: 20 }), fc.constantFrom(2 ** 29 - 1)),
    fc.integer({ min: 0, max: 7 }),
    bytes,
  )
  .map(
    ([no, type, rest]) =>
      new Uint8Array([...new BinaryWriter().uint32(((no << 3) | type) >>> 0).finish(), ...rest]),
  )

/** The same, cut off, overwritten, doubled, or with something in between. */
export function damaged(whole: Arbitrary<Uint8Array>): Arbitrary<Uint8Array> {
  const harm = fc.record({
    at: fc.double({ min: 0, max: 1, noNaN: true }),
    byte: fc.nat(255),
    kind: fc.nat(3),
  })
  return fc.tuple(whole, fc.array(harm, { minLength: 1, maxLength: 4 })).map(([bytes, harms]) => {
    let result = Buffer.from(bytes)
    for (const { at, byte, kind } of harms) {
      const place = Math.floor(at * result.length)
      const [before, after] = [result.subarray(0, place), result.subarray(place)]
      if (kind === 0) result = Buffer.from(before)
      else if (kind === 1) result = Buffer.concat([before, Buffer.of(byte), after])
      else if (kind === 2) result = Buffer.concat([before, Buffer.of(byte), after.subarray(1)])
      else result = Buffer.concat([before, after, after])
    }
    return new Uint8Array(result)
  })
}

/** Mostly what is right, so that what is wrong elsewhere is reached. */
const mostly = (right: Arbitrary<unknown>, wrong: Arbitrary<unknown>) =>
  fc.oneof({ weight: 9, arbitrary: right }, { weight: 1, arbitrary: wrong })

const price = mostly(fc.constantFrom(0, -0, 1e-9, 109.95, 2 ** 53 - 1), fc.oneof(fc.double(), fc.jsonValue()))
const rating = mostly(
  fc.record({ rate: fc.double({ min: 0, max: 5, noNaN: true }), count: fc.nat() }),
  fc.oneof(fc.record({ rate: fc.double(), count: fc.double() }), fc.jsonValue()),
)

/** What a catalogue may say of product 1: a product, nearly one, or anything. */
export const catalogueAnswer: Arbitrary<Uint8Array> = fc.oneof(
  fc
    .record(
      {
        id: mostly(fc.constantFrom(1, '1'), fc.jsonValue()),
        title: mostly(text, fc.jsonValue()),
        description: mostly(text, fc.jsonValue()),
        category: text,
        image: text,
        price,
        rating,
        ['__proto__']: fc.anything(),
      },
      { requiredKeys: ['id', 'title', 'price'] },
    )
    .map((value) => utf8(stringified(value))),
  damaged(
    fc
      .record({ id: fc.constant(1), title: text, price, category: text })
      .map((value) => utf8(stringified(value))),
  ),
  fc.json().map(utf8),
  bytes,
)

function stringified(value: unknown): string {
  try {
    return JSON.stringify(value, (_, inner) => (typeof inner === 'bigint' ? `${inner}` : inner)) ?? ''
  } catch {
    return ''
  }
}
