/** A well-behaved client, who must not notice what others do to the service. */
import { setTimeout as sleep } from 'node:timers/promises'
import type { ServiceError } from '@grpc/grpc-js'
import { TestClient } from './service.ts'

export interface Bystander extends AsyncDisposable {
  readonly reads: number
  /** What its reads failed with. */
  readonly errors: string[]
}

/** Reads one warm item all the time until it is disposed, on a connection of its own. */
export async function startBystander(address: string): Promise<Bystander> {
  const client = new TestClient(address)
  const read = () => client.call('getItem', { id: '1' }, { timeoutMs: 60_000 })
  // The first read may have to wait for a busy machine.
  for (let attempt = 1; ; attempt++) {
    try {
      await read()
      break
    } catch (error) {
      if (attempt === 20) throw error
      await sleep(500)
    }
  }
  let reads = 0
  const errors: string[] = []
  const stop = new AbortController()
  const ended = (async () => {
    while (!stop.signal.aborted) {
      try {
        await read()
        reads++
      } catch (error) {
        errors.push((error as ServiceError).message)
      }
      await sleep(2)
    }
  })()
  return {
    get reads() {
      return reads
    },
    errors,
    async [Symbol.asyncDispose]() {
      stop.abort()
      await ended
      client[Symbol.dispose]()
    },
  }
}
