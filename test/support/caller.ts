/** Callers of a running service that have a tenant to themselves, so that tests on one service cannot meet. */
import type { TestClient, TestService } from './service.ts'

export interface Caller {
  readonly tenant: string
  readonly call: TestClient['call']
  readonly failure: TestClient['failure']
}

let tenants = 0

export function newCaller(service: TestService): Caller {
  return callerAs(service, `caller-${++tenants}`)
}

/** A caller with a tenant's name, on any instance. */
export function callerAs({ client }: Pick<TestService, 'client'>, tenant: string): Caller {
  const withTenant = (options: Parameters<TestClient['call']>[2] = {}) => ({
    ...options,
    metadata: { 'x-tenant-id': tenant, ...options.metadata },
  })
  return {
    tenant,
    call: (name, request, options) => client.call(name, request, withTenant(options)),
    failure: (name, request, options) => client.failure(name, request, withTenant(options)),
  }
}
