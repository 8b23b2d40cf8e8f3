/**
 * What an item takes and costs in three encodings, on items as catalogues have them.
 *
 *     node bench/micro/codec.ts
 */
import { Packr } from 'msgpackr'
import { Bench } from 'tinybench'
import { decodeItem, encodeItem } from '../../src/codec.ts'
import products from '../../src/embedded/products.json' with { type: 'json' }
import type { ItemRecord } from '../../src/item.ts'
import { cpuUs } from '../control.ts'

const items = products.map(
  ({ id, title, description, category, image, price, rating }): ItemRecord => ({
    id: `${id}`,
    title,
    description,
    category,
    imageUri: image,
    price: { currencyCode: 'USD', units: BigInt(Math.trunc(price)), nanos: Math.round((price % 1) * 1e9) },
    rating: { rate: rating.rate, count: BigInt(rating.count) },
    tags: ['new', category],
    attributes: { colour: 'green', weight_g: 840, fragile: true },
    source: 'ORIGIN',
    revision: 2 ** 40 + id,
    createTimeMs: 1_795_000_000_000 + id,
    updateTimeMs: 1_795_000_100_000 + id,
  }),
)
/** JSON has no 64-bit integers. */
const plain = items.map((item) => ({
  ...item,
  price: item.price && { ...item.price, units: `${item.price.units}` },
  rating: item.rating && { ...item.rating, count: Number(item.rating.count) },
}))
const packr = new Packr({ useRecords: false })
/** Its extension: the names of fields are sent once, and both sides must remember them. */
const recordPackr = new Packr({ structures: [] })

interface Codec {
  readonly name: string
  readonly encode: (n: number) => Uint8Array
  readonly decode: (bytes: Uint8Array) => unknown
}

const codecs: readonly Codec[] = [
  {
    name: 'protobuf',
    encode: (n) => encodeItem(items[n] as ItemRecord),
    decode: decodeItem,
  },
  { name: 'msgpackr', encode: (n) => packr.pack(plain[n]), decode: (bytes) => packr.unpack(bytes) },
  {
    name: 'msgpackr, records',
    encode: (n) => recordPackr.pack(plain[n]),
    decode: (bytes) => recordPackr.unpack(bytes),
  },
  {
    name: 'JSON',
    encode: (n) => Buffer.from(JSON.stringify(plain[n])),
    decode: (bytes) => JSON.parse(Buffer.from(bytes).toString()),
  },
]

const bench = new Bench({ now: () => cpuUs() / 1000, time: 1000, warmupTime: 300 })
const ROUNDS = 50
for (const { name, encode, decode } of codecs) {
  const encoded = items.map((_, n) => Uint8Array.from(encode(n)))
  bench.add(`${name}: encode`, () => {
    for (let round = 0; round < ROUNDS; round++) for (let n = 0; n < items.length; n++) encode(n)
  })
  bench.add(`${name}: decode`, () => {
    for (let round = 0; round < ROUNDS; round++) for (const bytes of encoded) decode(bytes)
  })
  // What a hit does with what is encoded already: it goes into the answer as it is.
  if (name === 'protobuf') {
    const answer = Buffer.alloc(1024)
    bench.add('protobuf: copy into an answer', () => {
      for (let round = 0; round < ROUNDS; round++) for (const bytes of encoded) answer.set(bytes)
    })
  }
}
await bench.run()
const bytes = (codec: Codec) =>
  items.reduce((sum, _, n) => sum + codec.encode(n).byteLength, 0) / items.length
console.table(codecs.map((codec) => ({ codec: codec.name, 'bytes/item': Math.round(bytes(codec)) })))
console.table(
  bench.tasks.map(({ name, result }) => ({
    what: name,
    'CPU µs/item':
      result.state === 'completed'
        ? ((result.latency.mean * 1000) / (ROUNDS * items.length)).toFixed(3)
        : result.state,
  })),
)
