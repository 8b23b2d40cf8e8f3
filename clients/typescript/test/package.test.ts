/** The package as others get it: packed, installed in a new project, compiled strictly, and used. */
import { execFile, spawn } from 'node:child_process'
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { expect, test } from 'vitest'
import { NPM_INSTALL } from '../../../test/support/npm-install.ts'
import { build } from '../build.ts'
import { startTwoServers } from './two-servers.ts'

const run = promisify(execFile)
const ROOT = join(import.meta.dirname, '..', '..', '..')

const PROGRAM = `
import { type CacheStatus, cached, connect, type Item, NotFoundError } from '@itemcache/client'

class Pages {
  made = 0
  @cached({ client: () => client })
  async page(id: string): Promise<string> {
    this.made++
    const { item } = await client.get(id)
    return \`<\${item?.title}>\`
  }
}

await using client = connect(process.argv.slice(2), { timeoutMs: 10_000, nearCache: { maxEntries: 10 } })
const { revision } = await client.create({ id: 'a', title: 'A' })
const got: { item: Item | undefined; cache: CacheStatus | undefined } = await client.get('a')
console.log('get', got.item?.title)
await client.get('absent').catch((error: unknown) => {
  if (!(error instanceof NotFoundError)) throw error
  console.log('absent', error.code)
})
while (!(await client.get('a')).near) await new Promise((resolve) => setTimeout(resolve, 20))
console.log('near')
const pages = new Pages()
console.log(await pages.page('a'))
for (let made = 0; made < pages.made; ) {
  made = pages.made
  await pages.page('a')
}
console.log('kept')
let expected = revision
for await (const message of client.watch({ resumeAfter: revision })) {
  if (message.kind === 'started') console.log('watching')
  if (message.kind === 'gap') throw new Error('a gap')
  if (message.kind !== 'event') continue
  expected += 1n
  if (message.revision !== expected) throw new Error(\`\${message.revision} instead of \${expected}\`)
  console.log('event', message.ids.join())
  if (message.ids.includes('last')) break
}
`

test('a new project installs it, compiles strictly, reads, keeps near, and watches over a restart', {
  timeout: 240_000,
}, async () => {
  const directory = await mkdtemp(join(tmpdir(), 'itemcache-package-'))
  try {
    const dist = await build(join(directory, 'dist'))
    const npm = { cwd: directory, env: process.env, maxBuffer: 1e8 }
    const { stdout } = await run('npm', ['pack', dist, '--silent', '--pack-destination', directory], npm)
    const project = join(directory, 'project')
    await mkdir(join(project, 'src'), { recursive: true })
    await writeFile(
      join(project, 'package.json'),
      JSON.stringify({
        type: 'module',
        dependencies: { '@itemcache/client': `file:../${stdout.trim().split('\n').at(-1)}` },
        devDependencies: { '@types/node': '^26.0.0' },
      }),
    )
    await writeFile(
      join(project, 'tsconfig.json'),
      JSON.stringify({
        compilerOptions: {
          strict: true,
          skipLibCheck: false,
          target: 'es2022',
          lib: ['esnext'],
          module: 'nodenext',
          types: ['node'],
          outDir: 'out',
          rootDir: 'src',
        },
        include: ['src'],
      }),
    )
    await writeFile(join(project, 'src', 'main.ts'), PROGRAM)
    await run('npm', [...NPM_INSTALL, '--prefer-offline'], { ...npm, cwd: project })
    const tsc = join(ROOT, 'node_modules', 'typescript', 'bin', 'tsc')
    const compiled = await run(process.execPath, [tsc, '-p', project], npm).catch((error: unknown) => error)
    expect(compiled).toMatchObject({ stdout: '' })

    await using two = await startTwoServers()
    const main = join(project, 'out', 'main.js')
    const child = spawn(process.execPath, [main, ...two.targets], { stdio: ['ignore', 'pipe', 'inherit'] })
    const ended = new Promise<number | null>((resolve) => child.once('exit', resolve))
    let out = ''
    const said = async (text: string) => {
      while (!out.includes(text)) {
        if (child.exitCode !== null) throw new Error(`it has ended, having said: ${out}`)
        await new Promise((resolve) => setTimeout(resolve, 20))
      }
    }
    child.stdout.on('data', (bytes) => {
      out += bytes
    })
    const { connect } = await import('../src/index.ts')
    await using writer = connect(two.targets, { timeoutMs: 10_000 })
    await said('watching')
    await writer.create({ id: 'first' })
    await said('event first')
    for (const server of two.servers) {
      await server.kill()
      await writer.create({ id: `without ${server.name}` })
      await said(`event without ${server.name}`)
      await server.start()
      // Whoever was connected to it must be able to come back before the other one goes.
      await writer.create({ id: `with ${server.name}` })
      await said(`event with ${server.name}`)
      await new Promise((resolve) => setTimeout(resolve, 1500))
    }
    await writer.create({ id: 'last' })
    expect(await ended).toBe(0)
    expect(out).toMatch(/^get A\nabsent NOT_FOUND\nnear\n<A>\nkept\nwatching\n/)
  } finally {
    await rm(directory, { recursive: true, force: true })
  }
})
