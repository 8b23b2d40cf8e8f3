/**
 * The file of tokens: one a line, as `<SHA-256 of the token, 64 hex digits> <tenant> <role> [<expiry>]`, the expiry as
 * RFC 3339 in UTC (`2027-01-31T00:00:00Z`). Empty lines, and what follows a `#`, are ignored.
 */
import { readFileSync } from 'node:fs'
import { ItemCacheError } from '../errors.ts'
import { isName, ROLES, type Role } from './identity.ts'

/** One token. */
export interface TokenEntry {
  readonly digest: Buffer
  readonly tenant: string
  readonly role: Role
  /** Milliseconds since 1970; infinite without an expiry. */
  readonly expiresAtMs: number
}

const MAX_ENTRIES = 100_000
/** So many mistakes are reported at once. */
const MAX_PROBLEMS = 20

/** Throws `invalid` with a line for each mistake. What stands in the file is not repeated: it may be a secret. */
export function readTokenFile(file: string): readonly TokenEntry[] {
  let text: string
  try {
    text = readFileSync(file, 'utf8')
  } catch (error) {
    throw badFile([`the token file ${file} cannot be read: ${(error as NodeJS.ErrnoException).code}`])
  }
  const problems: string[] = []
  const entries: TokenEntry[] = []
  const lines = new Map<string, number>()
  for (const [i, line] of text.split('\n').entries()) {
    const fields = line.replace(/#.*/, '').trim().split(/\s+/)
    if (fields[0] === '') continue
    const parsed = parseEntry(fields)
    if (typeof parsed === 'string') {
      problems.push(`${file}:${i + 1}: ${parsed}`)
      continue
    }
    const digest = parsed.digest.toString('hex')
    const former = lines.get(digest)
    if (former !== undefined) problems.push(`${file}:${i + 1}: this token is on line ${former}, too`)
    lines.set(digest, i + 1)
    entries.push(parsed)
  }
  if (entries.length > MAX_ENTRIES) problems.push(`${file}: there may be ${MAX_ENTRIES} tokens at most`)
  if (entries.length === 0 && problems.length === 0) problems.push(`${file}: there is no token in it`)
  if (problems.length > 0) throw badFile(problems)
  return entries
}

/** The entry, or what is wrong with it. */
function parseEntry([digest = '', tenant, role, expiry, ...more]: readonly string[]): TokenEntry | string {
  if (!/^[0-9a-f]{64}$/i.test(digest))
    return 'a line must begin with the SHA-256 of a token, as 64 hex digits'
  if (!isName(tenant)) return 'the second word must be a tenant: 1 to 128 printable ASCII characters'
  const known = ROLES.find((each) => each === role)
  if (known === undefined) return `the third word must be a role: ${ROLES.join(', ')}`
  const isUtc = expiry === undefined || /^\d{4}-\d\d-\d\dT\d\d:\d\d(:\d\d(\.\d+)?)?Z$/.test(expiry)
  const expiresAtMs = expiry === undefined ? Number.POSITIVE_INFINITY : Date.parse(expiry)
  if (!isUtc || Number.isNaN(expiresAtMs))
    return 'the fourth word must be an expiry like 2027-01-31T00:00:00Z'
  if (more.length > 0) return 'there must be at most four words'
  return { digest: Buffer.from(digest, 'hex'), tenant, role: known, expiresAtMs }
}

function badFile(problems: readonly string[]): ItemCacheError {
  const shown = problems.slice(0, MAX_PROBLEMS)
  const more = problems.length - shown.length
  if (more > 0) shown.push(`and ${more} more mistakes`)
  return new ItemCacheError('invalid', shown.join('\n'), { reason: 'BAD_TOKEN_FILE' })
}
