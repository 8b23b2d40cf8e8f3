/**
 * Measures what a copy takes in memory: the constants of src/tiers/memory.ts.
 *
 *     node --expose-gc bench/micro/copy-cost.ts
 */
import { execFileSync } from 'node:child_process'
import { setTimeout as sleep } from 'node:timers/promises'
import { MemoryTier } from '../../src/tiers/memory.ts'
import { median } from '../report.ts'

const ITEM_BYTES = 320

const [count, bytes, tags] = process.argv.slice(2).map(Number)
if (count === undefined || bytes === undefined || tags === undefined) costs()
else await costOf(count, bytes, tags)

/** The slope between two sizes, so that what a process takes anyway does not count. */
function costs(): void {
  const [few, many] = [100_000, 400_000]
  const perEntry = (bytes: number, tags: number): number => {
    const taken = [few, many].map((count) => {
      const args = ['--expose-gc', import.meta.filename, `${count}`, `${bytes}`, `${tags}`]
      const inProcess = () => execFileSync(process.execPath, args, { encoding: 'utf8' })
      return median([1, 2, 3].map(() => JSON.parse(inProcess()).taken))
    })
    return ((taken[1] ?? 0) - (taken[0] ?? 0)) / (many - few)
  }
  const absent = perEntry(-1, 0)
  const present = perEntry(ITEM_BYTES, 0)
  const [tagged, manyTags] = [perEntry(ITEM_BYTES, 1), perEntry(ITEM_BYTES, 4)]
  console.log(
    `node ${process.version}, ${process.arch}: resident bytes per copy besides its item, key and the text of its tags`,
  )
  console.table({
    'a copy': Math.round(absent),
    'more for an item': Math.round(present - absent),
    'more for a list of one tag': Math.round(tagged - present),
    'more for a list of four': Math.round(manyTags - present),
  })
}

/** Fills a tier and prints what that took besides the payload that `costOf` counts by itself. */
async function costOf(count: number, bytes: number, tags: number): Promise<void> {
  const tier = (entries: number) =>
    new MemoryTier({
      maxEntries: entries,
      maxBytes: 1e12,
      maxStaleMs: 3_600_000,
      now: () => performance.now(),
    })
  fill(tier(1_000), 20_000, bytes, tags)
  const memory = tier(count)
  await settle()
  const before = process.memoryUsage.rss()
  fill(memory, count, bytes, tags)
  await settle()
  const payload =
    count * (Math.max(bytes, 0) + 'default'.length + flatId(0).length + tags * flatTag(0, 0).length)
  console.log(
    JSON.stringify({ taken: process.memoryUsage.rss() - before - payload, entries: memory.stats().entries }),
  )
}

function fill(memory: MemoryTier, count: number, bytes: number, tags: number): void {
  for (let index = 0; index < count; index += 1) {
    const revision = 2 ** 40 + index
    memory.set('default', {
      id: flatId(index),
      asOf: revision,
      bytes: bytes < 0 ? undefined : new Uint8Array(bytes).fill(1),
      revision,
      tags: Array.from({ length: tags }, (_, tag) => flatTag(tag, index)),
      verifiedAtMs: performance.now(),
      freshUntilMs: performance.now() + 30_000,
    })
  }
}

/** Strings as a decoder makes them: flat, and not shared. */
function flatId(index: number): string {
  return Buffer.from(`item-${String(index).padStart(7, '0')}`).toString()
}

function flatTag(tag: number, index: number): string {
  return Buffer.from(`tag-${tag}-${String(index).padStart(7, '0')}`).toString()
}

async function settle(): Promise<void> {
  for (let round = 0; round < 5; round += 1) {
    globalThis.gc?.()
    await sleep(20)
  }
}
