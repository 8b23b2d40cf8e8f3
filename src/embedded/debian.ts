/**
 * Private copies of Debian's packages, on Debian and its like: unpacked for ItemCache alone, by any user. Nothing is
 * installed, no service is started, and the system stays as it is.
 */
import { execFile } from 'node:child_process'
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  realpathSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { dirname, join } from 'node:path'
import { promisify } from 'node:util'

/** Fetching a package may take this long. */
const FETCH_TIMEOUT_MS = 90_000

/** What an unpacked package holds: its files, and the directories of its libraries for `LD_LIBRARY_PATH`. */
export function contentOf(copy: string): {
  readonly files: readonly string[]
  readonly libraries: readonly string[]
} {
  const files = readdirSync(copy, { recursive: true, encoding: 'utf8' })
  const libraries = files.filter((file) => /\.so(\.|$)/.test(file)).map((file) => join(copy, dirname(file)))
  return { files, libraries: [...new Set(libraries)] }
}

/**
 * Unpacks the first of the packages that there is, and what it needs and this machine lacks, into `target`, if `isUsable`
 * resolves for it: with apt-get on lists, cache and status of its own. Throws an `Error` that says what is missing.
 */
export async function unpackPackage(
  target: string,
  names: readonly [string, ...string[]],
  isUsable: (copy: string) => Promise<unknown>,
): Promise<void> {
  const status = '/var/lib/dpkg/status'
  if (!existsSync(status)) throw new Error('this system has no apt-get')
  mkdirSync(dirname(target), { recursive: true })
  const work = realpathSync(mkdtempSync(`${target}-`))
  const signal = AbortSignal.timeout(FETCH_TIMEOUT_MS)
  const call = async (file: string, args: readonly string[], env = process.env) => {
    const options = {
      env: { ...env, LC_ALL: 'C', DEBIAN_FRONTEND: 'noninteractive' },
      signal,
      maxBuffer: 2 ** 24,
    }
    try {
      return (await promisify(execFile)(file, args, options)).stdout
    } catch (error) {
      if (signal.aborted) throw new Error(`it took longer than ${FETCH_TIMEOUT_MS / 1000} s`)
      const lines = `${(error as { stderr?: string }).stderr ?? ''}`.split('\n')
      throw new Error(
        lines.find((line) => line.startsWith('E:')) ?? (error as Error).message.split('\n', 1)[0],
      )
    }
  }
  try {
    for (const dir of ['lists/partial', 'cache/archives/partial', 'tree']) {
      mkdirSync(join(work, dir), { recursive: true })
    }
    copyFileSync(status, join(work, 'status'))
    // Of the system's settings only those about the network: others may run programs after an update.
    const network = (await call('apt-config', ['dump']))
      .split('\n')
      .filter((line) => line.startsWith('Acquire::'))
    const settings = [
      'Dir::Etc::main "/dev/null";',
      'Dir::Etc::parts "/dev/null";',
      `Dir::State "${work}";`,
      `Dir::State::lists "${work}/lists";`,
      `Dir::State::status "${work}/status";`,
      `Dir::Cache "${work}/cache";`,
      'APT::Install-Recommends "false";',
      'Acquire::Languages "none";',
      'Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";',
      'Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";',
      'Acquire::IndexTargets::deb-src::Sources::DefaultEnabled "false";',
      'Acquire::http::Timeout "10";',
      'Acquire::https::Timeout "10";',
      // As root, apt-get would fetch as a user that may not write here.
      ...(process.getuid?.() === 0 ? ['APT::Sandbox::User "root";'] : []),
    ]
    writeFileSync(join(work, 'apt.conf'), [...network, ...settings, ''].join('\n'))
    const env = { ...process.env, APT_CONFIG: join(work, 'apt.conf') }
    // A source that does not answer is no reason to give up: the others may do.
    const updated = await call('apt-get', ['update', '-q'], env).catch((error: Error) => error)
    const download = (name: string) => call('apt-get', ['install', '-y', '-q', '--download-only', name], env)
    const [first, ...others] = names
    let downloaded = download(first)
    for (const name of others) downloaded = downloaded.catch(() => download(name))
    await downloaded.catch((error) => {
      throw updated instanceof Error ? updated : error
    })
    const archives = join(work, 'cache', 'archives')
    for (const file of readdirSync(archives)) {
      // A C library of its own would not go with the system's loader.
      if (!file.endsWith('.deb') || file.startsWith('libc6_')) continue
      await call('dpkg-deb', ['-x', join(archives, file), join(work, 'tree')])
    }
    await isUsable(join(work, 'tree'))
    rmSync(target, { recursive: true, force: true })
    renameSync(join(work, 'tree'), target)
  } finally {
    rmSync(work, { recursive: true, force: true })
  }
}
