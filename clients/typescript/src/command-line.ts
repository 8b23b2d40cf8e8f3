/** The command line: `run` is the whole program but for the process. */
import { readFile } from 'node:fs/promises'
import { createRequire } from 'node:module'
import tab from '@bomb.sh/tab/commander'
import { create, type DescMessage, type MessageInitShape, toJsonString } from '@bufbuild/protobuf'
import { status } from '@grpc/grpc-js'
import { Command, CommanderError, InvalidArgumentError, Option } from 'commander'
import {
  append,
  CLEARABLE,
  describeItem,
  type ItemFlags,
  parseAttributes,
  parseDuration,
  parseFields,
  parseIds,
  parsePrice,
  parseRevision,
  parseSpan,
  parseTimeout,
  parseWhole,
} from './arguments.ts'
import { type Client, type ConnectOptions, connect, type Invalidation } from './client.ts'
import { type BenchFlags, bench } from './commands/bench.ts'
import { top } from './commands/top.ts'
import { type WarmFlags, warm } from './commands/warm.ts'
import { type WatchFlags, watch } from './commands/watch.ts'
import { toDuration } from './duration.ts'
import { DeadlineExceededError, ItemCacheError, NotFoundError, UnavailableError } from './errors.ts'
import { Ending, EXIT, exitCodeOf, worstExitCode } from './exit.ts'
import {
  CHANGE_HEADER,
  formatCache,
  formatChange,
  formatError,
  formatInspection,
  formatItem,
  formatItems,
  formatMetrics,
  formatTable,
  printable,
  type Style,
} from './format.ts'
import {
  BatchGetItemsResultSchema,
  CreateItemResponseSchema,
  DeleteItemResponseSchema,
  GetItemResponseSchema,
  InspectItemResponseSchema,
  InvalidateItemsResponseSchema,
  type Item,
  ItemErrorSchema,
  ItemSchema,
  type MetricsSnapshot,
  MetricsSnapshotSchema,
  UpdateItemResponseSchema,
} from './gen/itemcache/v1/item_cache_pb.ts'
import type { GetManyResult, ReadOptions } from './reads.ts'
import { type Io, styleOf } from './terminal.ts'

interface GlobalFlags {
  readonly target: string
  readonly tenant?: string
  readonly timeout: number
  readonly tls?: true
  readonly ca?: string
  readonly cert?: string
  readonly key?: string
  readonly serverName?: string
  readonly json?: true
}

interface ReadFlags {
  readonly fresh?: true
  readonly cacheOnly?: true
  readonly minRevision?: bigint
  readonly maxStaleness?: number
  readonly fields?: string[]
}

interface ListFlags {
  readonly category?: string
  readonly tag?: string
  readonly pageSize?: number
  readonly all?: true
}

interface WriteFlags extends ItemFlags {
  readonly jsonInput?: string
  readonly etag?: string
  readonly allowMissing?: true
}

interface InvalidateFlags {
  readonly tag?: string[]
  readonly all?: true
  readonly remove?: true
  readonly refreshOrigin?: true
}

/** Runs the program with its arguments (without node and script) and resolves with its exit code. */
export async function run(argv: readonly string[], io: Io): Promise<number> {
  const program = new Program(io)
  try {
    await program.commands().parseAsync(argv, { from: 'user' })
    return EXIT.ok
  } catch (error) {
    if (error instanceof Ending) return error.exitCode
    if (error instanceof InvalidArgumentError) {
      io.stderr.write(`itemcache: ${printable(error.message)}\n`)
      return EXIT.usage
    }
    // Commander has said what is wrong, or printed the help that was asked for.
    if (error instanceof CommanderError) return error.exitCode === 0 ? EXIT.ok : EXIT.usage
    io.stderr.write(`itemcache: ${explain(error, program.flags)}\n`)
    return exitCodeOf(error)
  }
}

function explain(error: unknown, flags: GlobalFlags): string {
  if (!(error instanceof ItemCacheError))
    return printable(error instanceof Error ? error.message : String(error))
  if (exitCodeOf(error) === EXIT.usage) return formatError(error)
  const target = printable(flags.target)
  if (error instanceof UnavailableError && error.reason === undefined) {
    // grpc-js tells what the last attempt failed with, as a wrong certificate.
    const [, why = 'ECONNREFUSED'] =
      /.*Last error: (.+?)(?:\. Resolution note: .*)?$/s.exec(error.message) ?? []
    return why.includes('ECONNREFUSED')
      ? `cannot reach ${target}: is the service running? (npm start)`
      : `cannot reach ${target}: ${printable(tlsFailure(why))}`
  }
  if (error instanceof DeadlineExceededError && error.reason === undefined) {
    return `no answer from ${target} within ${flags.timeout / 1000} s (--timeout)`
  }
  if (error instanceof NotFoundError) {
    const from = error.cache === undefined ? '' : ` (${formatCache(error.cache)})`
    return `item ${printable(error.id ?? '')} was not found${from}`
  }
  return error.reason === undefined
    ? `${error.code}: ${formatError(error)}`
    : `${error.reason}: ${formatError(error)}`
}

/** What OpenSSL says ends with the place in its source: `…:SSL routines:FUNCTION:wrong version number:FILE:LINE:`. */
function tlsFailure(why: string): string {
  const [, what] = /:SSL routines:[^:]*:([^:]+):/.exec(why) ?? []
  if (what === undefined) return why
  const hint =
    what === 'wrong version number' || what === 'packet length too long' ? ': does it speak TLS?' : ''
  return `TLS: ${what}${hint}`
}

class Program {
  readonly #io: Io
  readonly #style: Style
  /** The flags that every command has, as they were given. */
  flags: GlobalFlags

  constructor(io: Io) {
    this.#io = io
    const { stdout, env } = io
    this.#style = styleOf(stdout, env)
    // As in the service's configuration, an empty variable counts as unset.
    const tenant = env['ITEMCACHE_TENANT'] || undefined
    this.flags = {
      target: env['ITEMCACHE_TARGET'] || '127.0.0.1:50051',
      timeout: 5000,
      ...(tenant !== undefined && { tenant }),
    }
  }

  commands(): Command {
    const { stdout, stderr } = this.#io
    const program = new Command('itemcache')
      .description('Reads, writes and watches the items of an ItemCache service, and shows what it does.')
      .version(VERSION, '--version', 'print the version of this program')
      .exitOverride()
      .configureOutput({
        writeOut: (text) => void stdout.write(text),
        writeErr: (text) => void stderr.write(text),
        outputError: (text, write) => write(text.replace(/^error: /, 'itemcache: ')),
      })
      .configureHelp({ showGlobalOptions: true })
      .addOption(
        new Option('--target <address>', 'where the service is (env: ITEMCACHE_TARGET)').default(
          this.flags.target,
        ),
      )
      .addOption(
        new Option('--tenant <name>', 'whose items (env: ITEMCACHE_TENANT)').default(this.flags.tenant),
      )
      .addOption(
        new Option('--timeout <duration>', 'how long to wait for an answer')
          .argParser(parseTimeout)
          .default(this.flags.timeout, '5s'),
      )
      .option('--tls', 'use TLS; so do --ca, --cert and --server-name')
      .option('--ca <file>', 'whom to trust, PEM (default: what Node trusts)')
      .option('--cert <file>', 'the own certificate, PEM, for mTLS; with --key')
      .option('--key <file>', 'the key of --cert, PEM')
      .option('--server-name <name>', "the name in the service's certificate (default: the target's host)")
      .option('--json', 'print JSON, one document per line')
      .hook('preAction', (_program, action) => {
        this.flags = action.optsWithGlobals<GlobalFlags>()
      })
      .addHelpText('after', HELP)

    reading(
      program.command('get').description('Show one item and which tier it came from.').argument('<id>'),
    ).action((id: string, flags: ReadFlags) => this.#get(id, flags))
    reading(program.command('get-many').description('Show several items.').argument('<ids...>')).action(
      (ids: string[], flags: ReadFlags) => this.#getMany(ids, flags),
    )
    program
      .command('list')
      .description('List the items that the database holds: one page, or all.')
      .option('--category <name>', 'only items of this category')
      .option('--tag <tag>', 'only items with this tag')
      .addOption(
        new Option('--page-size <n>', 'items per page, 1 to 500 (default: 50)').argParser(parseWhole(1, 500)),
      )
      .option('--all', 'all pages')
      .action((flags: ListFlags) => this.#list(flags))
    describing(program.command('create').description('Create an item.').argument('<id>')).action(
      (id: string, flags: WriteFlags) => this.#create(id, flags),
    )
    describing(
      program
        .command('put')
        .description(
          'Store an item as it is described, whether or not it existed: fields that are left out are unset. ' +
            'Without flags that describe it, it is read as JSON from stdin.',
        )
        .argument('[id]', "default: the JSON's"),
    )
      .option('--etag <etag>', 'fail unless this is still the current version')
      .action((id: string | undefined, flags: WriteFlags, command: Command) => this.#put(id, flags, command))
    describing(program.command('update').description('Change the named fields of an item.').argument('<id>'))
      .addOption(
        new Option('--clear <field>', 'unset a field (repeatable)').argParser(
          (name, before?: readonly string[]) => {
            if (CLEARABLE.includes(name)) return append(name, before)
            throw new InvalidArgumentError(`It must be one of ${CLEARABLE.join(', ')}.`)
          },
        ),
      )
      .option('--etag <etag>', 'fail unless this is still the current version')
      .option('--allow-missing', 'create the item when it is absent')
      .action((id: string, flags: WriteFlags, command: Command) => this.#update(id, flags, command))
    program
      .command('delete')
      .description('Delete an item.')
      .argument('<id>')
      .option('--etag <etag>', 'fail unless this is still the current version')
      .option('--allow-missing', 'succeed when the item is absent')
      .action((id: string, flags: { etag?: string; allowMissing?: true }) => this.#delete(id, flags))
    program
      .command('invalidate')
      .description('Make every cache distrust its copies of items: of these ids, with a tag, or all.')
      .argument('[ids...]')
      .addOption(new Option('--tag <tag>', 'items with this tag or category (repeatable)').argParser(append))
      .option('--all', 'every item of the tenant')
      .option('--remove', 'the old copies may not be served at all, not even as stale')
      .option('--refresh-origin', 'also fetch the items from the origin again (ids only)')
      .action((ids: string[], flags: InvalidateFlags, command: Command) =>
        this.#invalidate(ids, flags, command),
      )
    program
      .command('inspect')
      .description('Show what each tier holds of an item. Loads nothing.')
      .argument('<id>')
      .action((id: string) => this.#inspect(id))
    program
      .command('metrics')
      .description('Show the counters and latencies of the instance that answers.')
      .option('--watch', 'go on: one line per interval with what has changed')
      .addOption(
        new Option('--interval <duration>', 'with --watch: 100ms to 1h')
          .argParser(parseSpan(100, 3_600_000))
          .default(1000, '1s'),
      )
      .action((flags: { watch?: true; interval: number }) => this.#metrics(flags))
    program
      .command('watch')
      .description('Show changes and invalidations as they happen: all, or of these ids and tags.')
      .argument('[ids...]')
      .addOption(new Option('--tag <tag>', 'items with this tag or category (repeatable)').argParser(append))
      .addOption(
        new Option('--resume-after <revision>', 'go on exactly after it (default: begin now)').argParser(
          parseRevision,
        ),
      )
      .option('--items', 'with --json: also the items themselves')
      .addOption(new Option('--count <n>', 'end after so many').argParser(parseWhole(1)))
      .action((ids: string[], flags: WatchFlags) => this.#watch(ids, flags))
    program
      .command('top')
      .description(
        'Show live what the instance that answers does; q or Ctrl-C ends it. ' +
          'Without a terminal: one line per interval.',
      )
      .addOption(
        new Option('--interval <duration>', 'between two updates: 100ms to 1h')
          .argParser(parseSpan(100, 3_600_000))
          .default(1000, '1s'),
      )
      .addOption(new Option('--count <n>', 'end after so many updates').argParser(parseWhole(1)))
      .action((flags: { interval: number; count?: number }) => this.#top(flags))
    program
      .command('warm')
      .description('Read items so that the caches hold them.')
      .argument('[ids...]')
      .option('--file <file>', 'an id per line; -: from stdin')
      .addOption(
        new Option('--concurrency <n>', 'calls of 100 ids under way at once, 1 to 64')
          .argParser(parseWhole(1, 64))
          .default(4),
      )
      .action((ids: string[], flags: WarmFlags & { file?: string }, command: Command) =>
        this.#warm(ids, flags, command),
      )
    program
      .command('bench')
      .description('Read items for some seconds and show how fast that was. Writes nothing.')
      .argument('[ids...]', 'what to read, by chance (default: the first page of list)')
      .addOption(
        new Option('--duration <duration>', '100ms to 1m')
          .argParser(parseSpan(100, 60_000))
          .default(3000, '3s'),
      )
      .addOption(
        new Option('--concurrency <n>', 'callers, each with one call under way, 1 to 1000')
          .argParser(parseWhole(1, 1000))
          .default(16),
      )
      .addOption(new Option('--connections <n>', '1 to 64').argParser(parseWhole(1, 64)).default(1))
      .addOption(
        new Option('--batch <n>', 'ids per call of BatchGetItems, 1 to 500 (default: GetItem)')
          .argParser(parseWhole(1, 500))
          .conflicts('pipeline'),
      )
      .option('--pipeline', 'look-ups over one stream per connection')
      .action((ids: string[], flags: BenchFlags) => this.#bench(ids, flags))
    program
      .command('serve')
      .description(
        'Start the service; its settings are variables of the environment. Only in the repository.',
      )
      .argument('[args...]', 'of the service, after --: `itemcache serve -- --help`')
      .action((args: string[]) => this.#serve(args))
    program
      .command('doctor')
      .description(
        'Examine what the service is to use, and say what is wrong and how to mend it: it reads the same ' +
          'variables of the environment. Only in the repository.',
      )
      .argument('[args...]', 'of the doctor, after --: `itemcache doctor -- --help`')
      .action((args: string[]) => this.#doctor(args))
    // `completion SHELL`, and the hidden `complete` that the shells then call.
    tab(program, { completionCommandName: 'completion' })
    return program
  }

  async #get(id: string, flags: ReadFlags): Promise<void> {
    await using client = await this.#connect()
    const { item, cache, revision } = await client.get(id, readOptions(flags))
    if (this.flags.json) {
      const result = item === undefined ? { case: undefined } : ({ case: 'item', value: item } as const)
      this.#json(GetItemResponseSchema, { result, cache, revision })
    } else if (item !== undefined) {
      this.#say(`${formatItem(item, this.#style)}\n${formatCache(cache, revision)}\n`)
    } else {
      this.#say(`no cache holds item ${printable(id)}: ${formatCache(cache, revision)}\n`)
    }
    if (item === undefined) throw new Ending(EXIT.notFound)
  }

  async #getMany(ids: readonly string[], flags: ReadFlags): Promise<void> {
    await using client = await this.#connect()
    const results = [...(await client.getMany(ids, readOptions(flags))).values()]
    if (this.flags.json) {
      for (const result of results) this.#json(BatchGetItemsResultSchema, batchResult(result))
    } else {
      const rows = results.map(({ id, item, error, cache }) => [
        id,
        item?.title ?? '',
        error === undefined ? formatCache(cache) : `${error.reason ?? error.code}: ${formatError(error)}`,
      ])
      this.#say(formatTable(['id', 'title', 'answer'], rows, this.#style))
    }
    const errors = results.flatMap(({ error }) => error ?? [])
    const code = worstExitCode(errors.map(exitCodeOf))
    if (code !== EXIT.ok) throw new Ending(code)
    if (results.some(({ item }) => item === undefined)) throw new Ending(EXIT.notFound)
  }

  async #list({ category, tag, pageSize, all }: ListFlags): Promise<void> {
    await using client = await this.#connect()
    const size = pageSize ?? (all ? 500 : undefined)
    let more = false
    for await (const page of client.list({ category, tag, pageSize: size }).pages()) {
      if (this.flags.json) for (const item of page.items) this.#json(ItemSchema, item)
      else if (page.items.length > 0) this.#say(formatItems(page.items, this.#style))
      more = page.nextPageToken !== ''
      if (!all) break
    }
    if (more && !all) this.#io.stderr.write('itemcache: there are more items (--all)\n')
  }

  async #create(id: string, flags: WriteFlags): Promise<void> {
    const { item } = describeItem(id, flags, await this.#jsonInput(flags))
    await using client = await this.#connect()
    this.#written(CreateItemResponseSchema, await client.create(item))
  }

  async #put(id: string | undefined, flags: WriteFlags, command: Command): Promise<void> {
    const isDescribed = ITEM_FLAGS.some((name) => name in flags)
    if (!isDescribed && this.#io.stdin.isTTY === true)
      command.error('error: describe the item with flags, or give it as JSON on stdin (--help)')
    const json = await this.#jsonInput(isDescribed ? flags : { ...flags, jsonInput: '-' })
    const { item } = describeItem(id, flags, json)
    const current = { ...item, ...(flags.etag !== undefined && { etag: flags.etag }) }
    await using client = await this.#connect()
    const options = { fields: ['*'], allowMissing: true }
    this.#written(UpdateItemResponseSchema, await client.update(current, options))
  }

  async #update(id: string, flags: WriteFlags, command: Command): Promise<void> {
    const { item, fields } = describeItem(id, flags, await this.#jsonInput(flags))
    if (fields.length === 0 && !flags.allowMissing)
      command.error('error: nothing to change: name a field (--help)')
    const current = { ...item, ...(flags.etag !== undefined && { etag: flags.etag }) }
    await using client = await this.#connect()
    this.#written(
      UpdateItemResponseSchema,
      await client.update(current, { fields, allowMissing: flags.allowMissing ?? false }),
    )
  }

  #written(
    schema: typeof CreateItemResponseSchema | typeof UpdateItemResponseSchema,
    { item, revision }: { item: Item; revision: bigint },
  ): void {
    if (this.flags.json) this.#json(schema, { item, revision })
    else this.#say(formatItem(item, this.#style))
  }

  async #delete(id: string, { etag, allowMissing }: { etag?: string; allowMissing?: true }): Promise<void> {
    await using client = await this.#connect()
    const { revision } = await client.delete(id, { etag, allowMissing })
    if (this.flags.json) this.#json(DeleteItemResponseSchema, { revision })
    else this.#say(`deleted item ${printable(id)}, revision ${revision}\n`)
  }

  async #invalidate(ids: readonly string[], flags: InvalidateFlags, command: Command): Promise<void> {
    const what = invalidationOf(ids, flags, command)
    await using client = await this.#connect()
    const { revision } = await client.invalidate(what)
    if (this.flags.json) this.#json(InvalidateItemsResponseSchema, { revision })
    else this.#say(`invalidated, revision ${revision}\n`)
  }

  async #inspect(id: string): Promise<void> {
    await using client = await this.#connect()
    const inspection = await client.inspect(id)
    if (this.flags.json) this.#json(InspectItemResponseSchema, inspection)
    else this.#say(formatInspection(id, inspection, this.#style))
  }

  async #metrics({ watch, interval }: { watch?: true; interval: number }): Promise<void> {
    await using client = await this.#connect()
    if (watch) return await this.#watchMetrics(client, interval)
    const snapshot = await client.metrics()
    if (this.flags.json) this.#json(MetricsSnapshotSchema, snapshot)
    else this.#say(formatMetrics(snapshot, this.#style))
  }

  async #watchMetrics(client: Client, intervalMs: number): Promise<void> {
    let before: MetricsSnapshot | undefined
    for await (const snapshot of client.watchMetrics({ intervalMs, buckets: true })) {
      if (this.flags.json) this.#json(MetricsSnapshotSchema, snapshot)
      else this.#say(before === undefined ? CHANGE_HEADER : formatChange(before, snapshot))
      before = snapshot
    }
  }

  async #watch(ids: readonly string[], flags: WatchFlags): Promise<void> {
    await using client = await this.#connect()
    await watch(client, ids, { ...flags, ...this.#asJson() }, this.#io, this.#style)
  }

  async #top(flags: { interval: number; count?: number }): Promise<void> {
    await using client = await this.#connect()
    await top(client, { ...flags, target: this.flags.target, ...this.#asJson() }, this.#io)
  }

  async #warm(ids: readonly string[], flags: WarmFlags & { file?: string }, command: Command): Promise<void> {
    const { file } = flags
    const all = new Set(file === undefined ? ids : [...ids, ...parseIds(await this.#read(file, '--file'))])
    if (all.size === 0) command.error('error: name ids, or a file with --file')
    await using client = await this.#connect()
    await warm(client, all, { ...flags, ...this.#asJson() }, this.#io)
  }

  async #bench(ids: readonly string[], flags: BenchFlags): Promise<void> {
    const { connections, pipeline = false } = flags
    await using client = await this.#connect({ connections, pipeline })
    let read = [...new Set(ids)]
    if (read.length === 0) {
      const { value: page } = await client.list({ pageSize: 500 }).pages().next()
      read = page?.items.map(({ id }) => id) ?? []
    }
    if (read.length === 0) {
      this.#io.stderr.write('itemcache: there are no items to read: name ids, or warm some first\n')
      throw new Ending(EXIT.notFound)
    }
    await bench(client, read, { ...flags, ...this.#asJson() }, this.#io)
  }

  #serve(args: readonly string[]): void {
    if (this.#io.serve !== undefined) this.#io.serve(args)
    this.#io.stderr.write(
      'itemcache: this package is the client, without the service: get the repository of ItemCache and run npm start there\n',
    )
    throw new Ending(EXIT.error)
  }

  #doctor(args: readonly string[]): void {
    const flags = this.flags.json && !args.includes('--json') ? ['--json', ...args] : args
    if (this.#io.doctor !== undefined) this.#io.doctor(flags)
    this.#io.stderr.write(
      'itemcache: this package is the client, without the service: get the repository of ItemCache and run npm run doctor there\n',
    )
    throw new Ending(EXIT.error)
  }

  #asJson(): { json?: true } {
    return this.flags.json ? { json: true } : {}
  }

  async #connect(options: ConnectOptions = {}): Promise<Client> {
    const { target, tenant, timeout } = this.flags
    const token = this.#io.env['ITEMCACHE_TOKEN'] || undefined
    const tls = await this.#tls()
    return connect(target, { tenant, timeoutMs: timeout, clientId: 'itemcache-cli', token, tls, ...options })
  }

  async #tls(): Promise<ConnectOptions['tls']> {
    const { tls = false, ca, cert, key, serverName, target } = this.flags
    if ((cert === undefined) !== (key === undefined)) {
      throw new InvalidArgumentError('--cert and --key go together')
    }
    const isTls = tls || [ca, cert, serverName].some((flag) => flag !== undefined)
    if (isTls && serverName === undefined && IP_TARGET.test(target)) {
      throw new InvalidArgumentError('TLS to an IP address needs --server-name, as the certificate has it')
    }
    if (ca === undefined && cert === undefined && serverName === undefined) return tls
    return {
      ca: ca && (await this.#read(ca, '--ca')),
      cert: cert && (await this.#read(cert, '--cert')),
      key: key && (await this.#read(key, '--key')),
      serverName,
    }
  }

  /** What `--json-input` names: a file, or `-` for stdin. */
  async #jsonInput({ jsonInput }: WriteFlags): Promise<string | undefined> {
    return jsonInput === undefined ? undefined : await this.#read(jsonInput, '--json-input')
  }

  /** The text of a file, or of stdin for `-`. */
  async #read(file: string, flag: string): Promise<string> {
    if (file === '-') {
      const chunks: Uint8Array[] = []
      for await (const chunk of this.#io.stdin) chunks.push(Buffer.from(chunk as Uint8Array))
      return Buffer.concat(chunks).toString()
    }
    try {
      return await readFile(file, 'utf8')
    } catch (cause) {
      throw new InvalidArgumentError(
        `${flag}: cannot read ${file} (${(cause as NodeJS.ErrnoException).code})`,
      )
    }
  }

  #say(text: string): void {
    this.#io.stdout.write(text)
  }

  #json<Desc extends DescMessage>(schema: Desc, message: MessageInitShape<Desc>): void {
    this.#say(`${toJsonString(schema, create(schema, message))}\n`)
  }
}

/** That of the package: the sources and what is built of them have it under the same name. */
const VERSION: string = createRequire(import.meta.url)('@itemcache/client/package.json').version

/** The name that TLS asks for must not be an IP address. */
const IP_TARGET = /^(?:ipv[46]:|dns:(?:\/\/\/)?)?(?:[\d.]+|\[[\da-f:]+\])(?::\d+)?(?:,|$)/i

/** What makes `put` not read stdin. */
const ITEM_FLAGS = [
  'title',
  'description',
  'category',
  'price',
  'tag',
  'image',
  'attributes',
  'jsonInput',
] as const satisfies readonly (keyof WriteFlags)[]

const HELP = `
Environment: ITEMCACHE_TARGET, ITEMCACHE_TENANT, ITEMCACHE_TOKEN (sent as a bearer token), NO_COLOR.

Exit codes: 0 done, 1 error, 2 wrong usage (nothing was sent), 3 not found, 4 unreachable or too slow,
130 interrupted before the end.

Examples:
  itemcache get 1
  itemcache put lamp-1 --title 'Desk lamp' --price '19.99 EUR'
  itemcache update 1 --price '17.50 EUR' --tag sale
  itemcache get 1 --json | jq '.item | .title += "!"' | itemcache update 1 --json-input -`

/** The flags of reads. */
function reading(command: Command): Command {
  return command
    .addOption(new Option('--fresh', 'ask the database, whatever the caches hold').conflicts('cacheOnly'))
    .option('--cache-only', 'ask memory and Redis only')
    .addOption(
      new Option('--min-revision <n>', 'the state at this revision or a later one').argParser(parseRevision),
    )
    .addOption(
      new Option('--max-staleness <duration>', 'reload copies checked longer ago than this').argParser(
        parseDuration,
      ),
    )
    .addOption(new Option('--fields <names>', 'only these, as title,price').argParser(parseFields))
}

function readOptions({ fresh, cacheOnly, minRevision, maxStaleness, fields }: ReadFlags): ReadOptions {
  return {
    freshness: fresh ? 'fresh' : cacheOnly ? 'cache-only' : 'default',
    minRevision,
    maxStalenessMs: maxStaleness,
    fields,
  }
}

/** The flags that describe an item. */
function describing(command: Command): Command {
  return command
    .option('--title <text>')
    .option('--description <text>')
    .option('--category <name>')
    .addOption(new Option('--price <amount>', 'as "19.99 USD"').argParser(parsePrice))
    .addOption(new Option('--tag <tag>', '(repeatable)').argParser(append))
    .option('--image <uri>')
    .addOption(new Option('--attributes <json>', 'a JSON object').argParser(parseAttributes))
    .option('--json-input <file>', 'the item as JSON; -: from stdin. Other flags win over it')
}

function invalidationOf(ids: readonly string[], flags: InvalidateFlags, command: Command): Invalidation {
  const { tag: tags = [], all = false, refreshOrigin } = flags
  const mode = flags.remove ? 'remove' : 'expire'
  const kinds = Number(ids.length > 0) + Number(tags.length > 0) + Number(all)
  if (kinds !== 1) command.error('error: name either ids, or --tag, or --all')
  if (refreshOrigin && ids.length === 0) command.error('error: --refresh-origin goes with ids only')
  if (all) return { all, mode }
  return tags.length > 0 ? { tags, mode } : { ids, mode, refreshOrigin }
}

function batchResult({
  id,
  item,
  error,
  cache,
}: GetManyResult): MessageInitShape<typeof BatchGetItemsResultSchema> {
  if (item !== undefined) return { id, result: { case: 'item', value: item }, cache }
  if (error === undefined) return { id, cache }
  const { reason = '', message, retryAfterMs } = error
  const retryDelay = retryAfterMs === undefined ? undefined : toDuration(retryAfterMs)
  const value = create(ItemErrorSchema, { code: status[error.code], reason, message, retryDelay })
  return { id, result: { case: 'error', value }, cache }
}
