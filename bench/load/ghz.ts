/** Runs ghz, with one of its configuration files or with options, and reads its report. */
import { join } from 'node:path'
import { runTool } from '../tools.ts'

const ROOT = join(import.meta.dirname, '..', '..')

/** What is read of ghz's JSON report. Times are nanoseconds. */
export interface GhzReport {
  readonly count: number
  readonly rps: number
  readonly average: number
  readonly slowest: number
  readonly latencyDistribution: readonly { readonly percentage: number; readonly latency: number }[] | null
  readonly statusCodeDistribution: Readonly<Record<string, number>>
  readonly errorDistribution: Readonly<Record<string, number>> | null
}

export async function ghz(address: string, options: readonly string[]): Promise<GhzReport> {
  const proto = join(ROOT, 'proto')
  return JSON.parse(
    await runTool('ghz', [
      ...['--insecure', '--format', 'json', '--import-paths', proto],
      ...['--proto', join(proto, 'itemcache', 'v1', 'item_cache.proto')],
      ...options,
      address,
    ]),
  )
}

/** Of all calls, in milliseconds. */
export function percentileOf({ latencyDistribution }: GhzReport, percentage: number): number {
  const found = latencyDistribution?.find((each) => each.percentage === percentage)
  return (found?.latency ?? Number.NaN) / 1e6
}

/** Calls that did not end with one of these statuses, which are ghz's names for them. */
export function failures(
  { count, statusCodeDistribution }: GhzReport,
  fine: readonly string[] = ['OK'],
): number {
  return count - fine.reduce((sum, status) => sum + (statusCodeDistribution[status] ?? 0), 0)
}
