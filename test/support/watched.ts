/** A watcher of `Subscriptions` as a stream of its messages. */
import type { Subscriptions, WatchMessage, WatchRequest } from '../../src/invalidation/subscriptions.ts'

export async function* watched(
  subscriptions: Subscriptions,
  request: WatchRequest,
  gone: AbortSignal,
  draining: AbortSignal,
): AsyncGenerator<WatchMessage> {
  let woken = Promise.withResolvers<void>()
  const wake = () => woken.resolve()
  using watcher = await subscriptions.watch(request, { gone, draining, wake })
  for (const signal of [gone, draining]) signal.addEventListener('abort', wake)
  for (;;) {
    woken = Promise.withResolvers<void>()
    const message = watcher.next()
    if (message !== undefined) yield message
    else await woken.promise
    if (!draining.aborted) gone.throwIfAborted()
  }
}
