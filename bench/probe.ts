/** Loaded before a measured process's own module: tells what the process has used so far. */
import { answer, cpuUs } from './control.ts'

if (process.send !== undefined) {
  answer({
    cpu: () => cpuUs(),
    memory: () => process.memoryUsage(),
  })
}
