/** Milliseconds and `google.protobuf.Duration`: the message has nanoseconds, and latencies need them. */
import { create } from '@bufbuild/protobuf'
import { type Duration, DurationSchema } from '@bufbuild/protobuf/wkt'

/** The message for `ms`, rounded to nanoseconds. Throws RangeError for NaN and infinity. */
export function toDuration(ms: number): Duration {
  const seconds = Math.trunc(ms / 1000)
  const nanos = Math.round((ms - seconds * 1000) * 1e6)
  const carry = Math.trunc(nanos / 1e9)
  return create(DurationSchema, { seconds: BigInt(seconds + carry), nanos: nanos - carry * 1e9 })
}

/** Milliseconds, with fractions; `undefined` for an unset message. */
export function toMs(duration: Duration): number
export function toMs(duration: Duration | undefined): number | undefined
export function toMs(duration: Duration | undefined): number | undefined {
  return duration && Number(duration.seconds) * 1000 + duration.nanos / 1e6
}
