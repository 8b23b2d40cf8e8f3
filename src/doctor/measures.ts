/** What the checks of all dependencies have in common: clocks, round trips, certificates, sizes. */
import type { Report } from './report.ts'

const DAY_MS = 86_400_000
const CERTIFICATE_SOON_MS = 14 * DAY_MS
const DRIFT_WARNING_MS = 1_000
const DRIFT_FAULT_MS = 30_000
const ROUND_TRIPS = 9

/** The median time of a call, in milliseconds. */
export async function roundTripMs(call: () => Promise<unknown>): Promise<number> {
  const times: number[] = []
  for (let i = 0; i < ROUND_TRIPS; i++) {
    const startMs = performance.now()
    await call()
    times.push(performance.now() - startMs)
  }
  return times.toSorted((a, b) => a - b)[Math.floor(ROUND_TRIPS / 2)] ?? 0
}

/** How far another clock is ahead of this machine's, in milliseconds, give or take half the time that asking took. */
export async function clockAheadMs(ask: () => Promise<number>): Promise<number> {
  const sentMs = Date.now()
  const theirs = await ask()
  return theirs - (sentMs + Date.now()) / 2
}

export function checkClock(report: Report, check: string, whose: string, aheadMs: number): void {
  const text = `${whose} clock is ${seconds(Math.abs(aheadMs))} ${aheadMs < 0 ? 'behind' : 'ahead of'} this machine's`
  const mend =
    'Synchronise both machines by NTP (chrony, systemd-timesyncd). No copy is served longer for it, but tokens and certificates end, and logs are dated, by these clocks.'
  if (Math.abs(aheadMs) > DRIFT_FAULT_MS) report.fault(check, text, mend)
  else if (Math.abs(aheadMs) > DRIFT_WARNING_MS) report.warning(check, text, mend)
  else report.ok(check, text)
}

/** When a certificate ends, from what OpenSSL writes as `valid_to`. */
export function checkExpiry(report: Report, check: string, whose: string, validTo: string): void {
  const leftMs = Date.parse(validTo) - Date.now()
  const days = Math.floor(Math.abs(leftMs) / DAY_MS)
  const mend = 'Renew it; the service takes new files of its own without a restart.'
  if (leftMs < 0) report.fault(check, `${whose} certificate ended ${days} days ago`, mend)
  else if (leftMs < CERTIFICATE_SOON_MS)
    report.warning(check, `${whose} certificate ends in ${days} days`, mend)
  else report.ok(check, `${whose} certificate is good for ${days} more days`)
}

export function seconds(ms: number): string {
  return ms < 1_000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1_000).toFixed(1)} s`
}

export function megabytes(bytes: number): string {
  const mebibytes = bytes / 2 ** 20
  return mebibytes < 1_024 ? `${Math.round(mebibytes)} MiB` : `${(mebibytes / 1_024).toFixed(1)} GiB`
}

/** What a driver says, without the passwords that may be in it. */
export function reasonOf(error: unknown): string {
  if (!(error instanceof Error)) return String(error)
  const { message, code, errors } = error as Error & { code?: string; errors?: readonly unknown[] }
  return message || (errors?.map(reasonOf).join(', ') ?? '') || (code ?? error.name)
}
