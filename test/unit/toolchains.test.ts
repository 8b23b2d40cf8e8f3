import { describe, expect, test } from 'vitest'
import { unreachable } from '../../clients/toolchains.ts'

describe('CI takes what Go and pip print', () => {
  test.each([
    'dial tcp: lookup proxy.golang.org: no such host',
    'reading https://proxy.golang.org/google.golang.org/grpc/@v/v1.0.0.mod: 403 Forbidden',
    "WARNING: Retrying after connection broken by 'NewConnectionError: Failed to establish a new connection'",
    'ERROR: Could not find a version that satisfies the requirement grpcio==1.76.0 (from versions: none)',
  ])('for no network: %s', (line) => {
    expect(unreachable(`it begins\n${line}\nit ends`)).toBe(line)
  })

  test.each([
    'reading https://proxy.golang.org/google.golang.org/grpc/@v/v9.9.9.info: 404 Not Found',
    'ERROR: Could not find a version that satisfies the requirement grpcio==99 (from versions: 1.75.0, 1.76.0)',
    'ERROR: No matching distribution found for grpcio==99',
    'go: updates to go.mod needed',
  ])('for a dependency that is wrong: %s', (line) => {
    expect(unreachable(line)).toBeUndefined()
  })
})
