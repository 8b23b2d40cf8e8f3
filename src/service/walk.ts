/** How a call of a tier shows in traces: as one span in each trace that waits for it. */
import type { TierOperation, Trace } from '../observe/tracing.ts'
import type { TierSpan } from '../tiers/tier.ts'

/** A flight, a write, or whatever else may belong to a trace. */
export interface Traced {
  readonly trace?: Trace | undefined
}

/** Traces that one call of a tier shows in; it may be done for the flights of more callers. */
const MAX_TRACES = 32

/** A call of a tier that somebody traces. */
export class Walk implements Disposable {
  readonly #spans: readonly Trace[]

  constructor(spans: readonly Trace[]) {
    this.#spans = spans
  }

  /** What passes the context on; of several traces the first's. */
  get span(): TierSpan | undefined {
    return this.#spans[0]
  }

  /** Of a cache: how many keys it had a good copy of, and how many not. */
  found(hits: number, misses: number, skipped?: string): void {
    for (const span of this.#spans) {
      if (skipped !== undefined) span.event('skipped', { 'itemcache.skip_reason': skipped })
      else {
        if (hits > 0) span.event('hit', { 'itemcache.keys': hits })
        if (misses > 0) span.event('miss', { 'itemcache.keys': misses })
      }
    }
  }

  fail(error: unknown): void {
    for (const span of this.#spans) span.fail(error)
  }

  [Symbol.dispose](): void {
    for (const span of this.#spans) span.end()
  }
}

/** A call of a tier begins that is made for all of these; `undefined`: nobody traces it. */
export function walk(operation: TierOperation, traced: readonly Traced[], keys: number): Walk | undefined {
  let traces: Set<Trace> | undefined
  for (const { trace } of traced) {
    if (trace === undefined) continue
    traces ??= new Set()
    if (traces.size < MAX_TRACES) traces.add(trace)
  }
  return traces && new Walk([...traces].map((trace) => trace.tier(operation, keys)))
}

/** Makes a call of a tier within its span. */
export async function walked<T>(
  operation: TierOperation,
  traced: Traced,
  call: (span: TierSpan | undefined) => Promise<T>,
  keys = 1,
): Promise<T> {
  if (traced.trace === undefined) return call(undefined)
  using span = traced.trace.tier(operation, keys)
  try {
    return await call(span)
  } catch (error) {
    span.fail(error)
    throw error
  }
}
