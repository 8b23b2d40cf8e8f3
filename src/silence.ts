/** Waiting for others, who must not be blamed for what kept this process from looking. */

/** Calls back after so long, milliseconds, unless cleared; but what has arrived by then is read first. */
export function afterSilence(ms: number, then: () => void): NodeJS.Timeout {
  return setTimeout(() => setImmediate(then), ms)
}
