/**
 * 200 callers at once with the standard load generator, and then calls at half of the rate that these got, of ours and of a bare
 * server in turns: what of the latency is the machine's, the generator's and grpc-js's is in both.
 */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { create, type DescFile, toBinary } from '@bufbuild/protobuf'
import { type FileDescriptorProto, FileDescriptorSetSchema } from '@bufbuild/protobuf/wkt'
import { file_itemcache_v1_item_cache } from '../../src/gen/itemcache/v1/item_cache_pb.ts'
import type { Measured } from '../report.ts'
import type { Run } from '../rows.ts'
import { getItemRequest, idOf, startHot, targetOf, warm } from '../rpc/hot.ts'
import { compare, startBare } from '../rpc/unary.ts'
import { machineStalls } from '../stalls.ts'
import { failures, ghz, percentileOf } from './ghz.ts'

const CALLERS = 200
const CONNECTIONS = 20
const ITEMS = 1000
const ITEM = 7
/** Of calls at the fixed rate, that do not count: ghz opens its connections meanwhile, and stops for a moment. */
const FIRST_S = 1

export async function run({ full, progress }: Run): Promise<readonly Measured[]> {
  const seconds = full ? 60 : 10
  const [rounds, secondsEach] = full ? [5, 20] : [3, 3]
  const stalls = await machineStalls()
  await using hot = await startHot(ITEMS)
  await warm(hot.instance, 0, ITEMS)
  const { answer } = await targetOf(hot.instance, 'getItem', getItemRequest(ITEM))
  const bare = await startBare(answer)
  await using _bare = bare.process
  using described = describedFiles()
  const call = [
    ...['--protoset', described.file],
    ...['--call', 'itemcache.v1.ItemCacheService.GetItem', '-d', JSON.stringify({ id: idOf(ITEM) })],
    ...['--connections', `${CONNECTIONS}`],
  ]
  const crowd = ['-c', `${CALLERS}`, ...call]
  await ghz(hot.instance.address, [...crowd, '-n', '20000'])
  progress(`${CALLERS} callers, ${seconds} s`)
  const full200 = await ghz(hot.instance.address, [...crowd, '-z', `${seconds}s`, '--duration-stop', 'wait'])
  let lost = failures(full200)
  const rate = Math.round(full200.rps / 2)
  progress(`${Math.round(full200.rps)} calls/s; now ${rate} calls/s, open loop, p99 in ms`)
  const p99 = async (address: string): Promise<number> => {
    const half = await ghz(address, [
      ...['--async', ...crowd, '--rps', `${rate}`],
      ...['-n', `${rate * (FIRST_S + secondsEach)}`, '--skipFirst', `${rate * FIRST_S}`],
    ])
    if (address === hot.instance.address) lost += failures(half)
    return percentileOf(half, 99)
  }
  const compared = await compare(
    rounds,
    () => p99(hot.instance.address),
    () => p99(bare.target.address),
    progress,
  )
  return [
    {
      row: 'callers-failed',
      ours: lost,
      note: `${seconds} s, ${full200.count.toLocaleString('en')} calls, p99 ${percentileOf(full200, 99).toFixed(1)} ms at full speed`,
    },
    {
      row: 'callers-p99',
      ...compared,
      note: `${rate.toLocaleString('en')} calls/s, open loop; ${stalls}`,
    },
  ]
}

/** What ghz reads of the methods, in a file: it would ask the reflection service, and a bare server has none. */
function describedFiles(): Disposable & { readonly file: string } {
  const files = new Map<string, FileDescriptorProto>()
  const add = ({ proto, dependencies }: DescFile) => {
    for (const dependency of dependencies) add(dependency)
    files.set(proto.name, proto)
  }
  add(file_itemcache_v1_item_cache)
  const folder = mkdtempSync(join(tmpdir(), 'itemcache-bench-'))
  const file = join(folder, 'itemcache.binpb')
  writeFileSync(
    file,
    toBinary(FileDescriptorSetSchema, create(FileDescriptorSetSchema, { file: [...files.values()] })),
  )
  return { file, [Symbol.dispose]: () => rmSync(folder, { recursive: true }) }
}
