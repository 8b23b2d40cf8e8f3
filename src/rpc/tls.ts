/** TLS for the gRPC server, from PEM files that may change while it runs. */
import { X509Certificate } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { createSecureContext, type SecureContextOptions } from 'node:tls'
import { ServerCredentials } from '@grpc/grpc-js'
import type { TlsFiles } from '../config.ts'
import { ItemCacheError } from '../errors.ts'
import type { Logger } from '../observe/log.ts'

/**
 * Credentials whose certificate can be exchanged: connections that are made afterwards get the new one. (The
 * certificate providers of grpc-js 1.14 refuse every connection once a new file is bad, and start without any.)
 */
export class TlsCredentials extends ServerCredentials {
  readonly #files: TlsFiles
  readonly #log: Logger
  /** What was read last, good or bad, so that one mistake is logged once. */
  #read: string
  #endsAtMs: number

  /** Throws `invalid`, with a sentence for the operator, when the files cannot be used. */
  constructor(files: TlsFiles, log: Logger) {
    const context = readContext(files)
    // A client without a certificate of the authorities is refused in the handshake.
    super({ requestCert: files.clientCa !== undefined, rejectUnauthorized: true }, context)
    this.#files = files
    this.#log = log
    this.#read = fingerprint(context)
    this.#endsAtMs = endOf(context)
  }

  /** When the certificate ends, in milliseconds since 1970. */
  get endsAtMs(): number {
    return this.#endsAtMs
  }

  /** Reads the files again, and takes what is in them if it can be used. */
  reload(): void {
    try {
      const context = readContext(this.#files, (read) => {
        const isNew = fingerprint(read) !== this.#read
        this.#read = fingerprint(read)
        return isNew
      })
      if (context === undefined) return
      this.updateSecureContextOptions(context)
      this.#endsAtMs = endOf(context)
      this.#log.info('the TLS certificate was exchanged')
    } catch (error) {
      this.#log.error({ err: error }, 'the new TLS files cannot be used: the former certificate stays')
    }
  }

  override _equals(other: ServerCredentials): boolean {
    return other === this
  }
}

/** The content of the files, if `isWanted` and usable. */
function readContext(files: TlsFiles): SecureContextOptions
function readContext(
  files: TlsFiles,
  isWanted: (read: SecureContextOptions) => boolean,
): SecureContextOptions | undefined
function readContext(
  { cert, key, clientCa }: TlsFiles,
  isWanted: (read: SecureContextOptions) => boolean = () => true,
): SecureContextOptions | undefined {
  const context: SecureContextOptions = {
    cert: readPem(cert),
    key: readPem(key),
    ...(clientCa !== undefined && { ca: readPem(clientCa) }),
    minVersion: 'TLSv1.2',
  }
  if (!isWanted(context)) return undefined
  try {
    createSecureContext(context)
  } catch (error) {
    // OpenSSL's words say what is wrong, and hold nothing of the key.
    const why = (error as Error).message
    const all = clientCa === undefined ? `${cert} and ${key}` : `${cert}, ${key} and ${clientCa}`
    throw unusable(`${all} cannot be used for TLS: ${why}`)
  }
  return context
}

function readPem(file: string): string {
  try {
    return readFileSync(file, 'utf8')
  } catch (error) {
    throw unusable(`${file} cannot be read: ${(error as NodeJS.ErrnoException).code}`)
  }
}

const endOf = ({ cert }: SecureContextOptions) => Date.parse(new X509Certificate(`${cert}`).validTo)

const fingerprint = ({ cert, key, ca }: SecureContextOptions) => JSON.stringify([cert, key, ca])

const unusable = (message: string) => new ItemCacheError('invalid', message, { reason: 'BAD_TLS_FILES' })
