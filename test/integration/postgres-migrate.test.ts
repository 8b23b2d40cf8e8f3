import { Client } from 'pg'
import { expect, test } from 'vitest'
import { knownMigrations, migrate } from '../../src/tiers/migrate.ts'
import { connectPostgres } from '../../src/tiers/postgres.ts'
import { freshDatabase } from '../support/servers.ts'
import { connectSql } from './postgres-fixture.ts'

async function connectedTo(url: string) {
  const client = new Client({ connectionString: url })
  await client.connect()
  return Object.assign(client, { [Symbol.asyncDispose]: () => client.end() })
}

test('instances that start at the same time on an empty database all come up', async () => {
  await using database = await freshDatabase()
  await using started = new AsyncDisposableStack()
  const starts = await Promise.allSettled(
    Array.from({ length: 4 }, () => connectPostgres({ url: database.url })),
  )
  for (const start of starts) if (start.status === 'fulfilled') started.use(start.value)
  expect(starts.map((start) => start.status)).toEqual(Array(4).fill('fulfilled'))
  await using sql = await connectSql(database.url)
  const applied = await sql('SELECT version FROM itemcache_migrations ORDER BY version')
  expect(applied).toEqual((await knownMigrations()).map(({ version }) => ({ version })))
})

test('a second start changes nothing and keeps what is there', async () => {
  await using database = await freshDatabase()
  await using client = await connectedTo(database.url)
  expect(await migrate(client)).toBe((await knownMigrations()).length)
  await client.query(`INSERT INTO items (tenant, id) VALUES ('t', 'a')`)
  expect(await migrate(client)).toBe(0)
  expect((await client.query('SELECT id FROM items')).rows).toEqual([{ id: 'a' }])
})

test('a database of a newer release is refused, in words that say what to do', async () => {
  await using database = await freshDatabase()
  await using client = await connectedTo(database.url)
  const known = await knownMigrations()
  const next = { version: known.length + 1, name: 'next', sql: 'SELECT 1' }
  await migrate(client, [...known, next])
  await expect(connectPostgres({ url: database.url })).rejects.toMatchObject({
    reason: 'SCHEMA_TOO_NEW',
    message: expect.stringMatching(`schema version ${next.version}.*start a newer release`),
  })
})

test('a database whose migrations were other ones is refused', async () => {
  await using database = await freshDatabase()
  await using client = await connectedTo(database.url)
  const known = await knownMigrations()
  await migrate(client, known.with(0, { version: 1, name: 'tables', sql: `${known[0]?.sql} -- edited` }))
  await expect(migrate(client)).rejects.toMatchObject({ reason: 'SCHEMA_CHANGED' })
})

test('a migration that fails leaves the database as it was', async () => {
  await using database = await freshDatabase()
  await using client = await connectedTo(database.url)
  const known = await knownMigrations()
  const broken = { version: known.length + 1, name: 'broken', sql: 'SELECT nothing_of_that_name' }
  await expect(migrate(client, [...known, broken])).rejects.toThrow('nothing_of_that_name')
  const { rows } = await client.query(
    `SELECT count(*)::integer AS tables FROM pg_tables WHERE schemaname = 'public'`,
  )
  expect(rows).toEqual([{ tables: 0 }])
  expect(await migrate(client)).toBe(known.length)
})

test('a database with another encoding is refused', async () => {
  await using database = await freshDatabase()
  await using client = await connectedTo(database.superuserUrl)
  const name = `${new URL(database.url).pathname.slice(1)}_latin`
  await client.query(`CREATE DATABASE ${name} TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'`)
  try {
    const url = new URL(database.superuserUrl)
    url.pathname = name
    await expect(connectPostgres({ url: url.href })).rejects.toMatchObject({
      reason: 'POSTGRES_UNSUITABLE',
      message: expect.stringContaining('UTF8'),
    })
  } finally {
    await client.query(`DROP DATABASE ${name} WITH (FORCE)`)
  }
})

test('the schema may be any that the connection finds first', async () => {
  await using database = await freshDatabase()
  await using sql = await connectSql(database.url)
  await sql('CREATE SCHEMA shop')
  const url = new URL(database.url)
  url.searchParams.set('options', '-c search_path=shop')
  await using _tier = await connectPostgres({ url: url.href })
  await sql(`INSERT INTO shop.items (tenant, id) VALUES ('t', 'a')`)
  expect(await sql('SELECT ids FROM shop.invalidations')).toEqual([{ ids: ['a'] }])
})
