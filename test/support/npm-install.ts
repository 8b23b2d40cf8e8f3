/**
 * The arguments of an `npm install` that a test waits for. A request that the registry leaves without an answer is made
 * again: by itself npm would wait for it for five minutes.
 */
export const NPM_INSTALL: readonly string[] = [
  'install',
  '--ignore-scripts',
  '--no-audit',
  '--no-fund',
  '--fetch-timeout=15000',
  '--fetch-retries=5',
  '--fetch-retry-mintimeout=500',
]
