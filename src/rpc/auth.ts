/**
 * Who calls, and what they may: from the metadata of a call to a tenant and a role, before anything of the request is
 * looked at. docs/security.md tells operators the same.
 *
 * What is checked on every call is synchronous: a token is one hash and one look-up, and a JWT that was verified is
 * known by its hash. Tokens themselves are kept nowhere.
 */
import { createHash, hash, randomBytes, timingSafeEqual } from 'node:crypto'
import { readFileSync } from 'node:fs'
import {
  createLocalJWKSet,
  createRemoteJWKSet,
  errors,
  type JSONWebKeySet,
  type JWTPayload,
  type JWTVerifyGetKey,
  jwtVerify,
} from 'jose'
import type { AuthScheme } from '../config.ts'
import { ItemCacheError } from '../errors.ts'
import { ItemCacheService } from '../gen/itemcache/v1/item_cache_pb.ts'
import type { Logger } from '../observe/log.ts'
import { type Identity, isName, ROLES, type Role } from './identity.ts'
import { readTokenFile, type TokenEntry } from './token-file.ts'

/** The values of one key of a call's metadata. */
export interface CallMetadata {
  get(key: string): readonly (string | Buffer)[]
}

/** Tells who calls. Throws `unauthenticated`, or `unavailable` when that cannot be found out just now. */
export interface Authenticator {
  identify(metadata: CallMetadata): Identity | Promise<Identity>
  /** Reads its files again. What is wrong with them is logged, and the former content stays. */
  reload(): void
}

/** The least role for each method, by its full name. What is not in here is allowed to nobody. */
const NEEDED: ReadonlyMap<string, Role> = new Map(
  Object.entries({
    GetItem: 'reader',
    BatchGetItems: 'reader',
    StreamItems: 'reader',
    ListItems: 'reader',
    InspectItem: 'reader',
    WatchInvalidations: 'reader',
    CreateItem: 'writer',
    UpdateItem: 'writer',
    DeleteItem: 'writer',
    InvalidateItems: 'writer',
    // They count what the whole instance does, for every tenant.
    GetMetrics: 'admin',
    WatchMetrics: 'admin',
  } satisfies Record<string, Role>).map(([name, role]) => [`${ItemCacheService.typeName}/${name}`, role]),
)

/** Whether the method changes items. */
export const isWrite = (method: string): boolean => NEEDED.get(method) === 'writer'

/** Throws `forbidden` unless the role may call the method (`itemcache.v1.ItemCacheService/GetItem`). */
export function authorize(method: string, { role }: Identity): void {
  const needed = NEEDED.get(method)
  if (needed === undefined || role === undefined || ROLES.indexOf(role) < ROLES.indexOf(needed)) {
    throw new ItemCacheError('forbidden', 'the role of the credential does not allow this call', {
      reason: 'ROLE_NOT_ALLOWED',
    })
  }
}

/** What `startAuth` needs besides the scheme. */
export interface AuthOptions {
  readonly log: Logger
  /** Milliseconds since 1970. Default `Date.now`. */
  readonly wallNow?: () => number
  /** Most JSON Web Tokens that are remembered as verified. Default 10,000. */
  readonly maxVerified?: number
}

/** Throws `invalid`, with a sentence for the operator, when a file cannot be used. */
export function startAuth(scheme: AuthScheme, options: AuthOptions): Authenticator {
  switch (scheme.kind) {
    case 'none':
      return NOBODY_IS_ASKED
    case 'tokens':
      return new TokenAuthenticator(scheme.file, options)
    case 'jwt':
      return new JwtAuthenticator(scheme, options)
  }
}

/**
 * Without authentication the tenant is what the caller says it is: metadata `x-tenant-id`, else `default`. That is
 * allowed on loopback only (see `config.ts`).
 */
const NOBODY_IS_ASKED: Authenticator = {
  identify: (metadata) => ({
    tenant: single(metadata, 'x-tenant-id') ?? 'default',
    role: 'admin',
    expiresAtMs: Number.POSITIVE_INFINITY,
  }),
  reload: () => undefined,
}

/** The value of a metadata key that may come once: 1 to 128 printable ASCII characters. */
export function single(metadata: CallMetadata, key: string): string | undefined {
  const [value, ...more] = metadata.get(key)
  if (value === undefined) return undefined
  if (more.length === 0 && isName(value)) return value
  throw new ItemCacheError('invalid', `metadata ${key} is not valid`, {
    reason: 'INVALID_METADATA',
    violations: [{ field: key, description: 'must come once, as 1 to 128 printable ASCII characters' }],
  })
}

/** The one `authorization: Bearer <token>` of a call. */
function bearerToken(metadata: CallMetadata): string {
  const [value, ...more] = metadata.get('authorization')
  if (value === undefined) {
    throw new ItemCacheError('unauthenticated', 'the call carries no credential', {
      reason: 'CREDENTIAL_MISSING',
    })
  }
  const [, token] =
    (typeof value === 'string' && /^bearer ([\x21-\x2b\x2d-\x7e]{1,8192})$/i.exec(value)) || []
  if (token === undefined || more.length > 0) throw invalidCredential()
  return token
}

/** Always the same, so that nobody learns how close a guess was. The cause is for nobody but the debugger. */
const invalidCredential = (cause?: unknown) =>
  new ItemCacheError('unauthenticated', 'the credential is not valid', {
    reason: 'CREDENTIAL_INVALID',
    cause,
  })

const expiredCredential = () =>
  new ItemCacheError('unauthenticated', 'the credential has expired', { reason: 'CREDENTIAL_EXPIRED' })

/** The longest time that a timer of Node can wait. */
const MAX_TIMER_MS = 2 ** 31 - 1

/** Tells once when the credential expires or is withdrawn, also when that is already so. Returns how to stop. */
export function whenCredentialEnds(identity: Identity, tell: (why: ItemCacheError) => void): () => void {
  const { expiresAtMs, withdrawn } = identity
  let timer: NodeJS.Timeout | undefined
  const check = () => {
    const leftMs = expiresAtMs - Date.now()
    if (leftMs <= 0) tell(expiredCredential())
    else timer = setTimeout(check, Math.min(leftMs, MAX_TIMER_MS))
  }
  if (expiresAtMs !== Number.POSITIVE_INFINITY) check()
  const end = () => tell(invalidCredential())
  withdrawn?.addEventListener('abort', end, { once: true })
  if (withdrawn?.aborted) end()
  return () => {
    clearTimeout(timer)
    withdrawn?.removeEventListener('abort', end)
  }
}

/** A token of the file, and the switch that ends its streams. */
interface KnownToken {
  readonly digest: Buffer
  readonly identity: Identity
  readonly controller: AbortController
}

/**
 * Tokens from a file of their SHA-256 digests. A digest is found by a hash that is keyed by a secret of this process,
 * so that the time of the look-up tells nothing of the digests, and is then compared in constant time.
 */
class TokenAuthenticator implements Authenticator {
  readonly #file: string
  readonly #log: Logger
  readonly #wallNow: () => number
  readonly #secret = randomBytes(32).toString('hex')
  #known: ReadonlyMap<string, KnownToken>

  constructor(file: string, { log, wallNow = Date.now }: AuthOptions) {
    this.#file = file
    this.#log = log
    this.#wallNow = wallNow
    this.#known = this.#index(readTokenFile(file))
  }

  identify(metadata: CallMetadata): Identity {
    const digest = hash('sha256', bearerToken(metadata), 'buffer')
    const known = this.#known.get(this.#keyOf(digest))
    if (!timingSafeEqual(known?.digest ?? NO_DIGEST, digest) || known === undefined) throw invalidCredential()
    if (known.identity.expiresAtMs <= this.#wallNow()) throw expiredCredential()
    return known.identity
  }

  reload(): void {
    let entries: readonly TokenEntry[]
    try {
      entries = readTokenFile(this.#file)
    } catch (error) {
      this.#log.error({ err: error }, 'the new token file cannot be used: the former tokens stay')
      return
    }
    const former = this.#known
    this.#known = this.#index(entries)
    for (const [key, token] of former) if (this.#known.get(key) !== token) token.controller.abort()
    this.#log.info({ entries: entries.length }, 'the token file was read again')
  }

  /** Entries that did not change are kept, and with them the streams that they opened. */
  #index(entries: readonly TokenEntry[]): ReadonlyMap<string, KnownToken> {
    const index = new Map<string, KnownToken>()
    for (const { digest, tenant, role, expiresAtMs } of entries) {
      const key = this.#keyOf(digest)
      const former = this.#known?.get(key)
      const same =
        former?.identity.tenant === tenant &&
        former.identity.role === role &&
        former.identity.expiresAtMs === expiresAtMs
      const controller = new AbortController()
      const identity = { tenant, role, expiresAtMs, withdrawn: controller.signal }
      index.set(key, same ? former : { digest, identity, controller })
    }
    return index
  }

  #keyOf(digest: Buffer): string {
    return hash('sha256', this.#secret + digest.toString('hex'), 'base64')
  }
}

const NO_DIGEST = createHash('sha256').digest()

/** Asymmetric ones: a shared secret would let every verifier sign. */
const ALGORITHMS = [
  'RS256',
  'RS384',
  'RS512',
  'PS256',
  'PS384',
  'PS512',
  'ES256',
  'ES384',
  'ES512',
  'EdDSA',
  'Ed25519',
]
/** How far the issuer's clock may be ahead of or behind ours. */
const CLOCK_TOLERANCE_S = 5
/** After this time a token is verified again, so that a key that was withdrawn is noticed. */
const VERIFIED_FOR_MS = 300_000
const MAX_VERIFIED = 10_000
const JWKS_TIMEOUT_MS = 2_000

/** What of a key set's failures the caller is to blame for. Everything else means that there are no keys just now. */
const CALLERS_FAULTS = [errors.JWKSNoMatchingKey, errors.JWKSMultipleMatchingKeys, errors.JOSENotSupported]

/** JSON Web Tokens of one issuer, for one audience. */
class JwtAuthenticator implements Authenticator {
  readonly #scheme: AuthScheme & { kind: 'jwt' }
  readonly #log: Logger
  readonly #wallNow: () => number
  readonly #maxVerified: number
  #keys: JWTVerifyGetKey
  /** By the SHA-256 of the token, the oldest first. */
  readonly #verified = new Map<string, { readonly identity: Identity; readonly untilMs: number }>()

  constructor(
    scheme: AuthScheme & { kind: 'jwt' },
    { log, wallNow = Date.now, maxVerified = MAX_VERIFIED }: AuthOptions,
  ) {
    this.#scheme = scheme
    this.#maxVerified = maxVerified
    this.#log = log
    this.#wallNow = wallNow
    this.#keys = keysOf(scheme)
  }

  identify(metadata: CallMetadata): Identity | Promise<Identity> {
    const token = bearerToken(metadata)
    const key = hash('sha256', token, 'base64')
    const known = this.#verified.get(key)
    if (known !== undefined && this.#wallNow() < known.untilMs) return known.identity
    return this.#verify(token, key)
  }

  reload(): void {
    try {
      this.#keys = keysOf(this.#scheme)
    } catch (error) {
      this.#log.error({ err: error }, 'the new key set cannot be used: the former keys stay')
      return
    }
    this.#verified.clear()
    this.#log.info('the keys of the issuer will be asked for again')
  }

  async #verify(token: string, key: string): Promise<Identity> {
    const { issuer, audience } = this.#scheme
    const keys = this.#keys
    const nowMs = this.#wallNow()
    let payload: JWTPayload
    try {
      const verified = await jwtVerify(token, keys, {
        issuer,
        audience,
        algorithms: ALGORITHMS,
        requiredClaims: ['exp'],
        clockTolerance: CLOCK_TOLERANCE_S,
        currentDate: new Date(nowMs),
      })
      payload = verified.payload
    } catch (error) {
      if (error instanceof ItemCacheError) {
        this.#log.warn({ err: error.cause }, 'the keys of the issuer cannot be had')
        throw error
      }
      if (error instanceof errors.JWTExpired) throw expiredCredential()
      throw invalidCredential(error)
    }
    const identity = this.#identityOf(payload)
    if (this.#keys === keys) this.#remember(key, identity, nowMs)
    return identity
  }

  #identityOf(payload: JWTPayload): Identity {
    const tenant = payload[this.#scheme.tenantClaim]
    if (!isName(tenant)) throw invalidCredential()
    const claimed = [payload[this.#scheme.roleClaim]].flat()
    const role = ROLES.findLast((each) => claimed.includes(each))
    return { tenant, role, expiresAtMs: ((payload.exp ?? 0) + CLOCK_TOLERANCE_S) * 1000 }
  }

  #remember(key: string, identity: Identity, nowMs: number): void {
    this.#verified.delete(key)
    this.#verified.set(key, { identity, untilMs: Math.min(identity.expiresAtMs, nowMs + VERIFIED_FOR_MS) })
    if (this.#verified.size <= this.#maxVerified) return
    for (const oldest of this.#verified.keys()) {
      this.#verified.delete(oldest)
      break
    }
  }
}

function keysOf({ jwks }: AuthScheme & { kind: 'jwt' }): JWTVerifyGetKey {
  return jwks.kind === 'file' ? readKeySet(jwks.file) : fetchedKeySet(jwks.url)
}

/** Fetched when it is needed. While that fails, the last keys go on: an issuer that is down locks nobody out. */
function fetchedKeySet(url: string): JWTVerifyGetKey {
  const keySet = createRemoteJWKSet(new URL(url), { timeoutDuration: JWKS_TIMEOUT_MS })
  return async (header, jws) => {
    try {
      return await keySet(header, jws)
    } catch (error) {
      if (CALLERS_FAULTS.some((fault) => error instanceof fault)) throw error
      const last = keySet.jwks()
      if (last !== undefined) return createLocalJWKSet(last)(header, jws)
      throw new ItemCacheError('unavailable', 'credentials cannot be checked at the moment', {
        reason: 'KEYS_UNAVAILABLE',
        cause: error,
      })
    }
  }
}

function readKeySet(file: string): JWTVerifyGetKey {
  try {
    return createLocalJWKSet(JSON.parse(readFileSync(file, 'utf8')) as JSONWebKeySet)
  } catch (error) {
    const why = error instanceof Error && 'code' in error ? error.code : 'it is not valid JSON'
    throw new ItemCacheError('invalid', `the key set ${file} cannot be used: ${why}`, {
      reason: 'BAD_KEY_SET',
    })
  }
}
