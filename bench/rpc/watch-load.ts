/** Many streams that are read and counted, and not decoded. */
import { type RawStreams, rawStreams } from '../bed.ts'
import { answer } from '../control.ts'

export interface Subscribers {
  readonly address: string
  readonly path?: string
  readonly streams: number
  readonly streamsPerConnection: number
}

const opened = new Map<string, { messages: number; bytes: number; readonly connections: RawStreams[] }>()

answer({
  open({ address, path, streams, streamsPerConnection }: Subscribers) {
    const group = { messages: 0, bytes: 0, connections: [] as RawStreams[] }
    opened.set(address, group)
    for (let n = 0; n < streams; n++) {
      if (n % streamsPerConnection === 0) group.connections.push(rawStreams(address, 'default', path))
      group.connections.at(-1)?.open({ heartbeatInterval: { seconds: 60n } }, (message) => {
        group.messages++
        group.bytes = message.byteLength
      })
    }
  },
  /** Messages so far, and the size of the latest. */
  seen: (address: string) => {
    const { messages = 0, bytes = 0 } = opened.get(address) ?? {}
    return { messages, bytes }
  },
})
