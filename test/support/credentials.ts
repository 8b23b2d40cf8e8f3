/** Tokens, keys and certificates, made when a test needs them. */
import { createHash, randomBytes } from 'node:crypto'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { exportJWK, generateKeyPair, type JWTPayload, SignJWT } from 'jose'
import { generate } from 'selfsigned'

/** A directory that goes when it is disposed. */
export function temporaryFiles(): Disposable & { write(name: string, text: string): string } {
  const directory = mkdtempSync(join(tmpdir(), 'itemcache-credentials-'))
  return {
    write(name, text) {
      const path = join(directory, name)
      writeFileSync(path, text)
      return path
    },
    [Symbol.dispose]: () => rmSync(directory, { recursive: true, force: true }),
  }
}

export const newToken = () => randomBytes(24).toString('base64url')

/** A line of a token file. */
export const tokenLine = (token: string, tenant: string, role: string, expiry = '') =>
  `${createHash('sha256').update(token).digest('hex')} ${tenant} ${role} ${expiry}\n`

export const bearing = (token: string) => ({ metadata: { authorization: `Bearer ${token}` } })

/** Whoever signs JSON Web Tokens, and shows the keys over HTTP. */
export async function startIssuer() {
  const { publicKey, privateKey } = await generateKeyPair('ES256')
  const jwk = { ...(await exportJWK(publicKey)), kid: 'one', alg: 'ES256' }
  const keySet = JSON.stringify({ keys: [jwk] })
  let answers = true
  const server = createServer((_, response) => {
    response.statusCode = answers ? 200 : 503
    response.end(answers ? keySet : '')
  })
  const listening = Promise.withResolvers<void>()
  server.listen(0, '127.0.0.1', listening.resolve)
  await listening.promise
  const jwks = `http://127.0.0.1:${(server.address() as AddressInfo).port}/keys`
  const issuer = 'https://issuer.example/'
  return {
    issuer,
    jwks,
    keySet,
    /** As `ITEMCACHE_AUTH`. */
    auth: `jwt:${issuer}?audience=shop&jwks=${jwks}`,
    set answers(value: boolean) {
      answers = value
    },
    sign(claims: JWTPayload = {}, header: { alg?: string; kid?: string } = {}, key = privateKey) {
      const exp = Math.floor(Date.now() / 1000) + 600
      const all = { iss: issuer, aud: 'shop', exp, tenant: 'acme', role: 'reader', ...claims }
      return new SignJWT(all).setProtectedHeader({ alg: 'ES256', kid: 'one', ...header }).sign(key)
    },
    async [Symbol.asyncDispose]() {
      server.closeAllConnections()
      const closed = Promise.withResolvers<void>()
      server.close(() => closed.resolve())
      await closed.promise
    },
  }
}

export type Issuer = Awaited<ReturnType<typeof startIssuer>>

/** A certificate and its key, as PEM. */
export interface Pair {
  readonly cert: string
  readonly key: string
}

/** An authority that signs certificates for `localhost` and 127.0.0.1. */
export async function newAuthority(name: string) {
  const common = { keyType: 'ec', algorithm: 'sha256' } as const
  const root = await generate([{ name: 'commonName', value: name }], {
    ...common,
    extensions: [
      { name: 'basicConstraints', cA: true, critical: true },
      { name: 'keyUsage', keyCertSign: true, critical: true },
    ],
  })
  return {
    cert: root.cert,
    async issue(subject: string): Promise<Pair> {
      const { cert, private: key } = await generate([{ name: 'commonName', value: subject }], {
        ...common,
        ca: { key: root.private, cert: root.cert },
        extensions: [
          {
            name: 'subjectAltName',
            altNames: [
              { type: 2, value: 'localhost' },
              { type: 7, ip: '127.0.0.1' },
            ],
          },
        ],
      })
      return { cert, key }
    },
  }
}
