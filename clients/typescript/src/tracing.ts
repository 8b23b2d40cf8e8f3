/** The trace context of a call, where the process has OpenTelemetry. Without it nothing is loaded and nothing is sent. */
import { createRequire } from 'node:module'
import type * as OpenTelemetry from '@opentelemetry/api'

type Api = Pick<typeof OpenTelemetry, 'context' | 'propagation'>

// The package is an optional peer: whoever has set tracing up has it. A `require` tells at once whether it is there.
let api: Api | undefined
try {
  api = createRequire(import.meta.url)('@opentelemetry/api') as Api
} catch {
  api = undefined
}

const NONE: Readonly<Record<string, string>> = {}

/** What the registered propagator says of the active context, such as `traceparent`; nothing when there is none. */
export function traceHeaders(): Readonly<Record<string, string>> {
  if (api === undefined) return NONE
  const headers: Record<string, string> = {}
  api.propagation.inject(api.context.active(), headers)
  return headers
}
