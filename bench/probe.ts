/** Loaded before a measured process's own module: tells what the process has used so far. */
import { type PerformanceEntry, PerformanceObserver } from 'node:perf_hooks'
import { answer, cpuUs } from './control.ts'

/** One stop of the process for its garbage collector. */
export interface Pause {
  readonly kind: number
  readonly ms: number
}

type GcEntry = PerformanceEntry & { readonly detail: { readonly kind: number } }

const pauses: Pause[] = []
const observer = new PerformanceObserver((list) => {
  for (const { duration, detail } of list.getEntries() as GcEntry[])
    pauses.push({ kind: detail.kind, ms: duration })
})

if (process.send !== undefined) {
  answer({
    cpu: () => cpuUs(),
    memory: () => process.memoryUsage(),
    /** From the first time it is asked: the pauses since the last time. */
    pauses: () => {
      observer.observe({ entryTypes: ['gc'] })
      return pauses.splice(0)
    },
  })
}
