/**
 * Requests to the origin that are under way. Who asks for the same item meanwhile shares the answer, whatever route or
 * tenant asks: it is inserted into PostgreSQL and read back from there, so that it is dated after all of them began.
 */
import { untilAborted } from '../invalidation/tail.ts'
import type { ItemDraft } from '../item.ts'
import type { Trace } from '../observe/tracing.ts'

/** Asks the origin for one item; `undefined`: it has none. */
export type AskOrigin = (
  id: string,
  signal: AbortSignal,
  trace: Trace | undefined,
) => Promise<ItemDraft | undefined>

interface UnderWay {
  readonly answer: Promise<ItemDraft | undefined>
  readonly controller: AbortController
  readonly trace: Trace | undefined
  waiting: number
}

export class OriginRequests {
  readonly #ask: AskOrigin
  readonly #underWay = new Map<string, UnderWay>()

  constructor(ask: AskOrigin) {
    this.#ask = ask
  }

  /** Throws what the origin throws, and the signal's reason. A request that nobody waits for any more is cancelled. */
  async fetch(id: string, signal: AbortSignal, trace?: Trace): Promise<ItemDraft | undefined> {
    const underWay = this.#underWay.get(id)
    if (underWay !== undefined) trace?.coalesced(underWay.trace)
    const request = underWay ?? this.#begin(id, trace)
    request.waiting++
    try {
      return await untilAborted(request.answer, signal)
    } finally {
      request.waiting--
      if (request.waiting === 0) {
        this.#forget(id, request)
        request.controller.abort(signal.reason)
      }
    }
  }

  #begin(id: string, trace: Trace | undefined): UnderWay {
    const controller = new AbortController()
    const answer = this.#ask(id, controller.signal, trace)
    const request: UnderWay = { answer, controller, trace, waiting: 0 }
    this.#underWay.set(id, request)
    const forget = () => this.#forget(id, request)
    request.answer.then(forget, forget)
    return request
  }

  #forget(id: string, request: UnderWay): void {
    if (this.#underWay.get(id) === request) this.#underWay.delete(id)
  }
}
