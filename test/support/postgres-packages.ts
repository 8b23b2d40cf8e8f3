/** Where another PostgreSQL than the project's own is installed, if the tests are to run on that: `TEST_POSTGRES_PACKAGES`. */
export const postgresPackages: string | undefined = process.env['TEST_POSTGRES_PACKAGES'] || undefined
