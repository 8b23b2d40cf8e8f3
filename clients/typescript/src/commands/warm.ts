/** `warm`: reads items so that the caches hold them. */
import { setTimeout as sleep } from 'node:timers/promises'
import type { Client } from '../client.ts'
import { CancelledError, ItemCacheError, NotFoundError } from '../errors.ts'
import { Ending, EXIT, exitCodeOf, worstExitCode } from '../exit.ts'
import { count, formatDuration, formatError, rate, tierName } from '../format.ts'
import type { GetManyResult } from '../reads.ts'
import { changingLine, type Io } from '../terminal.ts'

/** Small enough that the service's queue to its origin holds several. */
const BATCH_IDS = 100
/** Failures that may be over soon are tried again, so often. */
const ROUNDS = 3
const PAUSE_MS = 500
const AGAIN = ['UNAVAILABLE', 'DEADLINE_EXCEEDED', 'RESOURCE_EXHAUSTED']

export interface WarmFlags {
  /** Calls under way at once. */
  readonly concurrency: number
  readonly json?: true
}

/** Says how many there were. An absent item is warm, too: its absence is cached. */
export async function warm(
  client: Client,
  ids: ReadonlySet<string>,
  flags: WarmFlags,
  io: Io,
): Promise<void> {
  const signal = io.interruption?.()
  const began = performance.now()
  const tiers = new Map<string, number>()
  const failed = new Map<string, ItemCacheError>()
  let items = 0
  let absent = 0
  const took = () => (performance.now() - began) / 1000
  using line = changingLine(io.stderr)
  const show = () => line.show(progress(items + absent, ids.size, took()))

  const answered = ({ id, item, error, cache }: GetManyResult) => {
    if (error !== undefined && !(error instanceof NotFoundError)) {
      failed.set(id, error)
      return
    }
    failed.delete(id)
    if (item === undefined) absent++
    else items++
    const tier = tierName(cache)
    tiers.set(tier, (tiers.get(tier) ?? 0) + 1)
  }
  const round = async (wanted: readonly string[]) => {
    let next = 0
    const work = async () => {
      while (next < wanted.length && !signal?.aborted) {
        const batch = wanted.slice(next, next + BATCH_IDS)
        next += BATCH_IDS
        try {
          for (const result of (await client.getMany(batch, { signal })).values()) answered(result)
        } catch (error) {
          if (!(error instanceof ItemCacheError)) throw error
          // The first failure of a service that has never answered is the whole answer.
          if (items + absent === 0 && failed.size === 0) throw error
          if (!(error instanceof CancelledError)) for (const id of batch) failed.set(id, error)
        }
        show()
      }
    }
    await Promise.all(Array.from({ length: flags.concurrency }, work))
  }

  show()
  let wanted = [...ids]
  for (let i = 0; i < ROUNDS && wanted.length > 0 && !signal?.aborted; i++) {
    if (i > 0) await sleep(PAUSE_MS * i, undefined, { signal }).catch(() => {})
    await round(wanted).catch((error) => {
      if (!(error instanceof CancelledError && signal?.aborted)) throw error
    })
    wanted = [...failed].flatMap(([id, { code }]) => (AGAIN.includes(code) ? [id] : []))
  }
  line[Symbol.dispose]()
  const seconds = took()
  const done = items + absent
  const reasons = new Map<string, number>()
  for (const { reason, code } of failed.values()) {
    reasons.set(reason ?? code, (reasons.get(reason ?? code) ?? 0) + 1)
  }
  if (flags.json) {
    const perSecond = done / seconds
    const failures = Object.fromEntries(reasons)
    const report = { ids: ids.size, items, absent, failed: failed.size, seconds, perSecond }
    io.stdout.write(`${JSON.stringify({ ...report, tiers: Object.fromEntries(tiers), failures })}\n`)
  } else {
    const from = [...tiers].map(([tier, times]) => `${tier} ${count(times)}`).join(', ')
    const outcome = `${count(items)} items, ${count(absent)} absent, ${count(failed.size)} failed`
    io.stdout.write(
      `${count(done)} of ${count(ids.size)} ids in ${formatDuration(seconds * 1000)} (${rate(done / seconds)}/s): ${outcome}\n`,
    )
    if (from !== '') io.stdout.write(`they came from: ${from}\n`)
  }
  const [example] = failed.values()
  if (example !== undefined) {
    const why = [...reasons].map(([reason, times]) => `${reason} ${count(times)}`).join(', ')
    io.stderr.write(`itemcache: ${why}, as: ${formatError(example)}\n`)
  }
  if (signal?.aborted) throw new Ending(EXIT.interrupted)
  if (failed.size > 0) throw new Ending(worstExitCode([...failed.values()].map(exitCodeOf)))
}

/** `████████░░░░░░░░ 50 %  500/1,000  250/s  2 s left` */
function progress(done: number, all: number, seconds: number): string {
  const width = 24
  const filled = all === 0 ? width : Math.floor((done / all) * width)
  const perSecond = seconds > 0 ? done / seconds : 0
  const left = perSecond > 0 ? `  ${formatDuration(((all - done) / perSecond) * 1000)} left` : ''
  const percent = `${all === 0 ? 100 : Math.floor((done / all) * 100)} %`.padStart(5)
  return `${'█'.repeat(filled)}${'░'.repeat(width - filled)} ${percent}  ${count(done)}/${count(all)}  ${rate(perSecond)}/s${left}`
}
