import { defineConfig } from 'vitest/config'

export default defineConfig({
  test: {
    pool: 'forks',
    maxWorkers: 2,
    testTimeout: 60_000,
    // What must come in the end comes late on a busy machine.
    expect: { poll: { timeout: 20_000 } },
    hookTimeout: 120_000,
    coverage: {
      provider: 'v8',
      include: ['src/**/*.ts', 'clients/typescript/src/**/*.ts'],
      exclude: ['**/gen/**'],
      reporter: ['text-summary', 'html'],
      reportsDirectory: 'coverage',
    },
    // Unit tests need no servers, so they run at once when they run alone.
    projects: [
      {
        extends: true,
        test: { name: 'unit', include: ['test/unit/**/*.test.ts'], setupFiles: ['test/support/seed.ts'] },
      },
      {
        extends: true,
        test: {
          name: 'servers',
          include: ['test/**/*.test.ts', 'clients/typescript/test/**/*.test.ts'],
          exclude: ['test/unit/**', '**/node_modules/**'],
          globalSetup: ['test/support/global-setup.ts'],
        },
      },
    ],
  },
})
