import { execFile } from 'node:child_process'
import { promisify } from 'node:util'
import { expect, test } from 'vitest'

/**
 * Stores copies, twice, under ids that a `Map` was asked for, and counts the ids that V8's table of strings refers to then, and one
 * other string that has to be there.
 */
const SCRIPT = `
  import { getHeapSnapshot } from 'node:v8'
  import { json } from 'node:stream/consumers'
  import { MemoryTier } from './src/tiers/memory.ts'

  const tier = new MemoryTier({ maxEntries: 1000, maxBytes: 2 ** 20, maxStaleMs: 1000, now: () => 0 })
  const asked = new Map()
  const store = (n) => {
    const id = ['id', 'é', 'И'][n % 3] + '-of-an-item-' + n
    asked.get(id)
    tier.set('t', { id, asOf: n, bytes: Buffer.from([n]), revision: n, tags: [], verifiedAtMs: 0, freshUntilMs: 1000 })
  }
  for (let round = 0; round < 2; round++) for (let n = 0; n < 500; n++) store(n)
  tier.get('t', 'another')
  globalThis.control = Buffer.from('asked-for-and-held').toString()
  asked.get(globalThis.control)
  const { snapshot: { meta }, nodes, edges, strings } = await json(getHeapSnapshot())
  const [name, count] = ['name', 'edge_count'].map((field) => meta.node_fields.indexOf(field))
  const target = meta.edge_fields.indexOf('to_node')
  const isId = (node) => /^(id|é|И)-of-an-item-[0-9]+$/.test(strings[nodes[node + name]])
  let [held, inTable, controls, edge] = [0, 0, 0, 0]
  for (let node = 0; node < nodes.length; node += meta.node_fields.length) {
    if (isId(node)) held++
    const isTable = strings[nodes[node + name]] === '(Internalized strings)'
    for (let left = nodes[node + count]; left > 0; left--, edge += meta.edge_fields.length) {
      if (isTable && isId(edges[edge + target])) inTable++
      if (isTable && strings[nodes[edges[edge + target] + name]] === globalThis.control) controls++
    }
  }
  console.log(JSON.stringify({ entries: tier.stats().entries, held, inTable, controls }))
`

test('full collections have no string more to walk through in their pause, however many ids memory holds', async () => {
  const { stdout } = await promisify(execFile)(process.execPath, ['--input-type=module', '-e', SCRIPT])
  expect(JSON.parse(stdout)).toEqual({ entries: 500, held: 500, inTable: 0, controls: 1 })
})
