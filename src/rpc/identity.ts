/** What a credential says of its bearer. */

/** From the least to the most powerful. Each may do what those before it may. */
export const ROLES = ['reader', 'writer', 'admin'] as const
export type Role = (typeof ROLES)[number]

export interface Identity {
  readonly tenant: string
  /** `undefined`: the credential is good and allows nothing. */
  readonly role: Role | undefined
  /** When the credential ends, in milliseconds since 1970; infinite when it does not. */
  readonly expiresAtMs: number
  /** Aborts when the credential is withdrawn. */
  readonly withdrawn?: AbortSignal
}

const NAME = /^[\x21-\x7e]{1,128}$/

/** Whether a text can name a tenant: 1 to 128 printable ASCII characters without spaces. */
export const isName = (text: unknown): text is string => typeof text === 'string' && NAME.test(text)
