/**
 * How a dated copy lies in Redis: its key, its value, and the script that stores it.
 *
 * Value, version 1, big-endian:
 *
 * | offset | type    | what                                                             |
 * |--------|---------|------------------------------------------------------------------|
 * | 0      | u8      | version                                                          |
 * | 1      | u8      | flags: bit 0 = the item was absent                               |
 * | 2      | u64     | as-of; the script below reads it here                            |
 * | 10     | u64     | revision of the item's last change                               |
 * | 18     | u32     | TTL given to Redis with the value, ms                            |
 * | 22     | f64     | age at write, ms                                                 |
 * | 30     | f64     | fresh time left at write, ms; negative when already stale        |
 * | 38     | u32     | CRC-32 of everything else                                        |
 * | 42     | u32     | number of tags, then each as u32 length and UTF-8                |
 * | …      | bytes   | the encoded item; nothing when absent                            |
 *
 * No wall clock takes part: the time since the write is the TTL at write less the TTL that Redis has left. A
 * write that Redis applies late makes a copy look younger by that delay; whether the copy is current does not
 * depend on it, as the as-of decides that.
 */
import { crc32 } from 'node:zlib'
import type { Copy } from './tier.ts'

/** Part of every key and the first byte of every value: two versions side by side never read each other's. */
export const FORMAT_VERSION = 1

const ABSENT = 1
const AS_OF_AT = 2
const REVISION_AT = 10
const TTL_AT = 18
const AGE_AT = 22
const FRESH_AT = 30
const CRC_AT = 38
const TAGS_AT = 42

/** The longest TTL that a value can state, in milliseconds: 49 days. */
export const MAX_TTL_MS = 0xffff_ffff

/**
 * The key of an item: `ic:<version>:<prefix>:<tenant>:<id>`, each part percent-encoded. The encoding leaves no
 * `:` in a part, so no two (tenant, id) share a key; no `{`, so that no caller chooses a cluster slot by a hash
 * tag and a tenant's items spread over all of them; and no control character, so keys are safe to print.
 * All strings must be well-formed UTF-16; throws `URIError` otherwise.
 */
export function redisKey(prefix: string, tenant: string, id: string): string {
  return `${redisKeyStart(prefix, tenant)}${encodeURIComponent(id)}`
}

/** What the keys of a tenant's items begin with: the rest is the id, encoded. */
export function redisKeyStart(prefix: string, tenant: string): string {
  return `ic:${FORMAT_VERSION}:${encodeURIComponent(prefix)}:${encodeURIComponent(tenant)}:`
}

/**
 * The milliseconds that each key has left, as PTTL says them, and its value; an empty value where there is none that could
 * be a copy's.
 */
export const READ_SCRIPT = `
local found = {}
for i, key in ipairs(KEYS) do
  found[2 * i - 1] = redis.call('PTTL', key)
  local value = redis.pcall('GET', key)
  found[2 * i] = type(value) == 'table' and '' or value
end
return found
`

/**
 * Stores a value for each key unless a copy with a greater as-of is there: as-of, value and TTL in milliseconds are three
 * arguments for each. The as-of is summed up byte by byte: Lua's doubles hold it exactly, whereas Lua compares strings
 * in the server's locale. Anything that is not such a copy, even a value of another type, is replaced.
 */
export const STORE_SCRIPT = `
for n, key in ipairs(KEYS) do
  local head = redis.pcall('GETRANGE', key, 0, ${REVISION_AT - 1})
  local stored = 0
  if type(head) == 'string' and #head == ${REVISION_AT} and head:byte(1) == ${FORMAT_VERSION} then
    for i = ${AS_OF_AT + 1}, ${REVISION_AT} do stored = stored * 256 + head:byte(i) end
  end
  if stored <= tonumber(ARGV[3 * n - 2]) or stored > ${Number.MAX_SAFE_INTEGER} then
    redis.call('SET', key, ARGV[3 * n - 1], 'PX', ARGV[3 * n])
  end
end
return #KEYS
`

/** The key of an item's lock: no copy's, since those have no `:` after the id. */
export function lockKey(prefix: string, tenant: string, id: string): string {
  return `${redisKey(prefix, tenant, id)}:lock`
}

/** In a lock's place after its holder failed. No token is like it. */
const OPEN = 'open'

/** In a lock's place for a while after its holder has loaded the key. */
const HANDED_ON = 'handed on'

/** What `LOCK_SCRIPT` answers besides the milliseconds that another holder's lock has left. */
export const LOCK_IS_OURS = 0
export const LOCK_IS_OPEN = -1
export const LOCK_IS_HANDED_ON = -2

/**
 * Takes a lock for the token ARGV[1] and ARGV[2] milliseconds, unless another token holds it. That it holds it itself
 * is fine: the reply of an earlier attempt was lost, or the command was sent twice. A lock without an end is nobody's.
 */
export const LOCK_SCRIPT = `
local holder = redis.call('GET', KEYS[1])
if holder == '${OPEN}' then return ${LOCK_IS_OPEN} end
if holder and holder ~= ARGV[1] and holder ~= '${HANDED_ON}' then
  local left = redis.call('PTTL', KEYS[1])
  if left >= 0 then return math.max(left, 1) end
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
if holder == '${HANDED_ON}' then return ${LOCK_IS_HANDED_ON} end
return ${LOCK_IS_OURS}
`

/** Makes a lock last for ARGV[2] milliseconds from now if the token ARGV[1] holds it. */
export const RENEW_SCRIPT = `
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
`

/**
 * Gives up a lock if the token ARGV[1] holds it: for ARGV[3] milliseconds it says that it was handed on or, if ARGV[2] is
 * not 0, for so many that it is open.
 */
export const RELEASE_SCRIPT = `
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[2] == '0' then
  redis.call('SET', KEYS[1], '${HANDED_ON}', 'PX', ARGV[3])
else
  redis.call('SET', KEYS[1], '${OPEN}', 'PX', ARGV[2])
end
return 1
`

/** The value for a copy that is written at `nowMs` with a TTL of `ttlMs` (whole, 1 to `MAX_TTL_MS`). */
export function encodeCopy(copy: Copy, nowMs: number, ttlMs: number): Buffer {
  const tags = copy.tags.map((tag) => Buffer.from(tag))
  const itemAt = tags.reduce((offset, tag) => offset + 4 + tag.length, TAGS_AT + 4)
  const value = Buffer.allocUnsafe(itemAt + (copy.bytes?.length ?? 0))
  value[0] = FORMAT_VERSION
  value[1] = copy.bytes === undefined ? ABSENT : 0
  value.writeBigUInt64BE(BigInt(copy.asOf), AS_OF_AT)
  value.writeBigUInt64BE(BigInt(copy.revision), REVISION_AT)
  value.writeUInt32BE(ttlMs, TTL_AT)
  value.writeDoubleBE(Math.max(0, nowMs - copy.verifiedAtMs), AGE_AT)
  value.writeDoubleBE(copy.freshUntilMs - nowMs, FRESH_AT)
  let offset = value.writeUInt32BE(tags.length, TAGS_AT)
  for (const tag of tags) {
    offset = value.writeUInt32BE(tag.length, offset)
    offset += tag.copy(value, offset)
  }
  if (copy.bytes !== undefined) value.set(copy.bytes, itemAt)
  value.writeUInt32BE(checksum(value), CRC_AT)
  return value
}

/**
 * The copy that a value holds, on this process's clock, or `undefined` when the value is of another version,
 * damaged, or without a TTL to date it by. Never throws. `leftMs` is what PTTL answered, asked before the value
 * was; `sentAtMs` is when it was asked.
 */
export function decodeCopy(id: string, value: Buffer, leftMs: number, sentAtMs: number): Copy | undefined {
  if (value.length < TAGS_AT + 4 || value[0] !== FORMAT_VERSION) return undefined
  if (value.readUInt32BE(CRC_AT) !== checksum(value)) return undefined
  const flags = value.readUInt8(1)
  const asOf = readUint64(value, AS_OF_AT)
  const revision = readUint64(value, REVISION_AT)
  const ageMs = value.readDoubleBE(AGE_AT)
  const freshMs = value.readDoubleBE(FRESH_AT)
  if ((flags & ~ABSENT) !== 0 || !Number.isSafeInteger(asOf) || !Number.isSafeInteger(revision))
    return undefined
  if (!Number.isFinite(ageMs) || ageMs < 0 || Number.isNaN(freshMs)) return undefined

  const tags: string[] = []
  let offset = TAGS_AT + 4
  for (let left = value.readUInt32BE(TAGS_AT); left > 0; left -= 1) {
    const start = offset + 4
    if (start > value.length) return undefined
    offset = start + value.readUInt32BE(offset)
    if (offset > value.length) return undefined
    tags.push(value.toString('utf8', start, offset))
  }
  const absent = flags === ABSENT
  if (absent && offset !== value.length) return undefined

  const elapsedMs = sinceWrite(value.readUInt32BE(TTL_AT), leftMs)
  if (elapsedMs === undefined) return undefined
  return {
    id,
    asOf,
    // The driver's buffers are views of whole socket reads: a copy keeps those from living as long as an item.
    bytes: absent ? undefined : new Uint8Array(value.subarray(offset)),
    revision,
    tags,
    verifiedAtMs: sentAtMs - elapsedMs - ageMs,
    freshUntilMs: sentAtMs - elapsedMs + freshMs,
  }
}

/**
 * Milliseconds since a value was written with `ttlMs`, by what PTTL answered just before the value was read. A
 * value that came in between is new, so its age is overestimated or, where that would be negative, 0. PTTL says
 * -2 for "no such key", so the value came in between; -1 for "no TTL", so its age is unknown.
 */
function sinceWrite(ttlMs: number, leftMs: number): number | undefined {
  if (leftMs === -2) return 0
  return leftMs < 0 ? undefined : Math.max(0, ttlMs - leftMs)
}

/** Exact up to `Number.MAX_SAFE_INTEGER`, and above it greater than that. */
function readUint64(value: Buffer, at: number): number {
  return value.readUInt32BE(at) * 2 ** 32 + value.readUInt32BE(at + 4)
}

function checksum(value: Buffer): number {
  return crc32(value.subarray(CRC_AT + 4), crc32(value.subarray(0, CRC_AT)))
}
