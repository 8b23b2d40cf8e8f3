/** Waiting for others, who must not be blamed for what kept this process from looking. */

/**
 * Calls back after so long, milliseconds, but what has arrived by then is read first. To clear the timer does not take back that
 * its time is over: who has stopped waiting meanwhile must bear the call.
 */
export function afterSilence(ms: number, then: () => void): NodeJS.Timeout {
  return setTimeout(() => setImmediate(then), ms)
}
