/** Runs ghz, with one of its configuration files or with options, and reads its report. */
import { runTool } from '../tools.ts'

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
  // What the methods take, ghz asks the service's reflection: its own parser does not know `optional` in proto3.
  return JSON.parse(await runTool('ghz', ['--insecure', '--format', 'json', ...options, address]))
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
