/** Loaded before a measured process's own module: tells what the process has used so far. */
import { PerformanceObserver } from 'node:perf_hooks'
import { answer, cpuUs } from './control.ts'

/** One stop of the process for its garbage collector. */
export interface Pause {
  readonly kind: number
  readonly ms: number
}

const pauses: Pause[] = []
const observer = new PerformanceObserver((list) => {
  for (const { detail, duration } of list.getEntries()) {
    pauses.push({ kind: (detail as { readonly kind: number }).kind, ms: duration })
  }
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
