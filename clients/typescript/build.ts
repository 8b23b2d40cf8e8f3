/**
 * Builds the package that is published: `dist/`, with JavaScript, declarations and a package.json of its own, since in the
 * repository the sources run as they are. The rule and the LRU are the service's own files: they end up in the bundle.
 */
import { execFileSync } from 'node:child_process'
import { chmodSync, copyFileSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { rolldown } from 'rolldown'

const HERE = import.meta.dirname
const ROOT = join(HERE, '..', '..')
const {
  bin: _bin,
  private: _private,
  scripts: _scripts,
  exports: _exports,
  devDependencies: _devDependencies,
  ...manifest
} = JSON.parse(readFileSync(join(HERE, 'package.json'), 'utf8')) as Record<string, unknown>

/** Writes the package to `directory`; returns that. */
export async function build(directory = join(HERE, 'dist')): Promise<string> {
  rmSync(directory, { recursive: true, force: true })
  mkdirSync(directory, { recursive: true })
  const bundle = await rolldown({
    input: { index: join(HERE, 'src', 'index.ts'), cli: join(HERE, 'src', 'cli.ts') },
    platform: 'node',
    external: (id) => !id.startsWith('.') && !id.startsWith('/'),
  })
  await bundle.write({ dir: directory, format: 'esm', chunkFileNames: '[name]-[hash].js', sourcemap: true })
  await bundle.close()
  chmodSync(join(directory, 'cli.js'), 0o755)
  execFileSync(
    process.execPath,
    [
      join(ROOT, 'node_modules', 'typescript', 'bin', 'tsc'),
      '-p',
      join(HERE, 'tsconfig.build.json'),
      '--outDir',
      join(directory, 'types'),
    ],
    { stdio: 'inherit' },
  )
  const types = './types/clients/typescript/src/index.d.ts'
  const published = {
    ...manifest,
    bin: { itemcache: './cli.js' },
    exports: { '.': { types, default: './index.js' }, './package.json': './package.json' },
    types,
    files: ['*.js', '*.js.map', 'types'],
  }
  writeFileSync(join(directory, 'package.json'), `${JSON.stringify(published, undefined, 2)}\n`)
  copyFileSync(join(HERE, 'README.md'), join(directory, 'README.md'))
  copyFileSync(join(ROOT, 'LICENSE'), join(directory, 'LICENSE'))
  return directory
}

if (import.meta.main) console.log(await build())
