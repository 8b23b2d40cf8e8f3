/** Amounts of money as people write them: `19.99 USD`. */
import { create } from '@bufbuild/protobuf'
import { type Money, MoneySchema } from './gen/itemcache/v1/item_cache_pb.ts'

const FORM = /^(-?)(\d{1,18})(?:\.(\d{1,9}))? ?([A-Z]{3})$/

/** Reads `19.99 USD`: at most 9 decimals, an ISO 4217 code. Throws RangeError for anything else. */
export function parseMoney(text: string): Money {
  const [, sign, units = '', decimals = '', currencyCode = ''] = FORM.exec(text.trim()) ?? []
  if (sign === undefined)
    throw new RangeError(`an amount looks like "19.99 USD", got ${JSON.stringify(text)}`)
  const nanos = Number(decimals.padEnd(9, '0'))
  // `|| 0`: there is no negative zero on the wire.
  return create(MoneySchema, {
    currencyCode,
    units: sign === '-' ? -BigInt(units) : BigInt(units),
    nanos: sign === '-' ? -nanos || 0 : nanos,
  })
}

/** Writes `19.99 USD`: at least two decimals unless the amount is whole and `nanos` is 0. */
export function formatMoney({ units, nanos, currencyCode }: Money): string {
  const sign = units < 0n || nanos < 0 ? '-' : ''
  const whole = units < 0n ? -units : units
  const decimals = Math.abs(nanos)
    .toString()
    .padStart(9, '0')
    .replace(/0{1,7}$/, '')
  return `${sign}${whole}${nanos === 0 ? '' : `.${decimals}`} ${currencyCode}`
}
