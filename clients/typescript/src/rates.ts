/** What happened between two snapshots of an instance's metrics. */
import { timestampMs } from '@bufbuild/protobuf/wkt'
import type { Latency, MetricsSnapshot } from './gen/itemcache/v1/item_cache_pb.ts'

/** How long an instance has been counting, in milliseconds. */
export function uptimeMs({ startTime, time }: MetricsSnapshot): number {
  return startTime === undefined || time === undefined ? 0 : timestampMs(time) - timestampMs(startTime)
}

/** Whether two snapshots count from the same moment: of one instance that was not restarted in between. */
export function isSameRun(one: MetricsSnapshot, other: MetricsSnapshot): boolean {
  const [a, b] = [one.startTime, other.startTime]
  return a?.seconds === b?.seconds && a?.nanos === b?.nanos
}

/** The time between two snapshots. After a restart, and without `before`, it began with the instance. */
export class Span {
  readonly seconds: number
  readonly #before: MetricsSnapshot | undefined
  readonly #after: MetricsSnapshot

  constructor(before: MetricsSnapshot | undefined, after: MetricsSnapshot) {
    this.#before =
      before !== undefined && isSameRun(before, after) && uptimeMs(after) > uptimeMs(before)
        ? before
        : undefined
    this.#after = after
    this.seconds = (uptimeMs(after) - (this.#before === undefined ? 0 : uptimeMs(this.#before))) / 1000
  }

  /** How much a counter has grown. */
  grown(of: (snapshot: MetricsSnapshot) => bigint | undefined): number {
    return Number((of(this.#after) ?? 0n) - ((this.#before && of(this.#before)) ?? 0n))
  }

  /** The same, per second. */
  rate(of: (snapshot: MetricsSnapshot) => bigint | undefined): number {
    return this.seconds > 0 ? this.grown(of) / this.seconds : 0
  }

  /** How many milliseconds this share of the durations took at most, to a tenth; `undefined` when there were none. */
  percentile(
    share: number,
    of: (snapshot: MetricsSnapshot) => readonly (Latency | undefined)[],
  ): number | undefined {
    const counts: number[] = []
    const add = (latencies: readonly (Latency | undefined)[], sign: 1 | -1) => {
      for (const latency of latencies) {
        for (const [i, count] of (latency?.buckets ?? []).entries()) {
          counts[i] = (counts[i] ?? 0) + sign * Number(count)
        }
      }
    }
    add(of(this.#after), 1)
    if (this.#before !== undefined) add(of(this.#before), -1)
    const rank = Math.ceil(share * counts.reduce((sum, count) => sum + count, 0))
    if (rank <= 0) return undefined
    let sum = 0
    const bucket = counts.findIndex((count) => {
      sum += count
      return sum >= rank
    })
    // The middle of a bucket that ends at 2^(bucket/4) µs.
    return 2 ** ((bucket - 0.5) / 4) / 1000
  }
}
