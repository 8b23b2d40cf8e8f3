/** What the doctor finds, and how it is shown. */

/** `unknown`: it could not be looked at, and nothing is wrong with that. */
export type Verdict = 'ok' | 'unknown' | 'warning' | 'fault'

/** The answer to one question about the set-up. */
export interface Finding {
  /** What was looked at, as `redis.maxmemory`; it stays the same from release to release. */
  readonly check: string
  /** Where, when there are several: a node of a cluster. `''`: there is only one. */
  readonly where: string
  readonly verdict: Verdict
  /** What was found. Holds no secrets. */
  readonly text: string
  /** What to do about it; `''` when nothing is to be done. */
  readonly mend: string
}

/** Collects findings. */
export class Report {
  readonly findings: Finding[] = []
  readonly #where: string

  constructor(where = '', findings: Finding[] = []) {
    this.#where = where
    this.findings = findings
  }

  /** The same report, for what is found there. */
  at(where: string): Report {
    return new Report(where, this.findings)
  }

  ok(check: string, text: string): void {
    this.#add(check, 'ok', text, '')
  }

  unknown(check: string, text: string, mend = ''): void {
    this.#add(check, 'unknown', text, mend)
  }

  warning(check: string, text: string, mend: string): void {
    this.#add(check, 'warning', text, mend)
  }

  fault(check: string, text: string, mend: string): void {
    this.#add(check, 'fault', text, mend)
  }

  #add(check: string, verdict: Verdict, text: string, mend: string): void {
    this.findings.push({ check, where: this.#where, verdict, text, mend })
  }
}

const SIGNS: Readonly<Record<Verdict, string>> = {
  ok: 'ok     ',
  unknown: '?      ',
  warning: 'WARNING',
  fault: 'FAULT  ',
}

/** For people: a line each, and how to mend what is wrong below it. The last line counts. */
export function formatReport(findings: readonly Finding[]): string {
  const lines = findings.flatMap(({ check, where, verdict, text, mend }) => [
    `${SIGNS[verdict]}  ${check}${where === '' ? '' : ` [${where}]`}: ${text}`,
    ...(mend === '' ? [] : [`         → ${mend}`]),
  ])
  const count = (verdict: Verdict) => findings.filter((finding) => finding.verdict === verdict).length
  const unknown = count('unknown') === 0 ? '' : `, ${count('unknown')} not known`
  return `${[...lines, '', `${count('fault')} faults, ${count('warning')} warnings, ${count('ok')} ok${unknown}`].join('\n')}\n`
}

/** 1 when something must be mended, else 0. */
export function exitCodeOf(findings: readonly Finding[], { strict }: { readonly strict: boolean }): 0 | 1 {
  const isBad = ({ verdict }: Finding) => verdict === 'fault' || (strict && verdict === 'warning')
  return findings.some(isBad) ? 1 : 0
}

/** For programs: one document. */
export function reportJson(findings: readonly Finding[]): string {
  return `${JSON.stringify({ healthy: !findings.some(({ verdict }) => verdict === 'fault'), findings })}\n`
}
