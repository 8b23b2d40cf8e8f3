/** The command line: `run` is the whole program but for the process. */
import { readFile } from 'node:fs/promises'
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
  parsePageSize,
  parsePrice,
  parseRevision,
  parseTimeout,
} from './arguments.ts'
import { type Client, connect, type GetManyResult, type Invalidation, type ReadOptions } from './client.ts'
import { toDuration } from './duration.ts'
import { DeadlineExceededError, ItemCacheError, NotFoundError, UnavailableError } from './errors.ts'
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

/** What the program exits with. */
export const EXIT = { ok: 0, error: 1, usage: 2, notFound: 3, unavailable: 4 } as const

/** A place to write to. */
export interface Output {
  write(text: string): unknown
  readonly isTTY?: boolean
  readonly columns?: number
}

/** What the program gets from its process. */
export interface Io {
  readonly stdout: Output
  readonly stderr: Output
  readonly stdin: AsyncIterable<Uint8Array | string>
  readonly env: Readonly<Record<string, string | undefined>>
}

interface GlobalFlags {
  readonly target: string
  readonly tenant?: string
  readonly timeout: number
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

/** Ends the program with a code other than 0 after everything was said. */
class Ending extends Error {
  readonly exitCode: number
  constructor(exitCode: number) {
    super()
    this.exitCode = exitCode
  }
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

function exitCodeOf(error: unknown): number {
  if (error instanceof NotFoundError) return EXIT.notFound
  if (error instanceof UnavailableError || error instanceof DeadlineExceededError) return EXIT.unavailable
  return EXIT.error
}

function explain(error: unknown, flags: GlobalFlags): string {
  if (!(error instanceof ItemCacheError))
    return printable(error instanceof Error ? error.message : String(error))
  const target = printable(flags.target)
  if (error instanceof UnavailableError && error.reason === undefined) {
    return `cannot reach ${target}: is the service running? (npm start)`
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

class Program {
  readonly #io: Io
  readonly #style: Style
  /** The flags that every command has, as they were given. */
  flags: GlobalFlags

  constructor(io: Io) {
    this.#io = io
    const { stdout, env } = io
    const terminal = stdout.isTTY === true
    this.#style = {
      color: terminal && (env['NO_COLOR'] ?? '') === '' && env['TERM'] !== 'dumb',
      columns: terminal ? (stdout.columns ?? 80) : Number.POSITIVE_INFINITY,
    }
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
      .description('Reads, writes and inspects the items of an ItemCache service.')
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
        new Option('--page-size <n>', 'items per page, 1 to 500 (default: 50)').argParser(parsePageSize),
      )
      .option('--all', 'all pages')
      .action((flags: ListFlags) => this.#list(flags))
    describing(program.command('create').description('Create an item.').argument('<id>')).action(
      (id: string, flags: WriteFlags) => this.#create(id, flags),
    )
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
          .argParser(parseDuration)
          .default(1000, '1s'),
      )
      .action((flags: { watch?: true; interval: number }) => this.#metrics(flags))
    return program
  }

  async #get(id: string, flags: ReadFlags): Promise<void> {
    await using client = this.#connect()
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
    await using client = this.#connect()
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
    const codes = errors.map(exitCodeOf)
    for (const code of [EXIT.error, EXIT.unavailable, EXIT.notFound])
      if (codes.includes(code)) throw new Ending(code)
    if (results.some(({ item }) => item === undefined)) throw new Ending(EXIT.notFound)
  }

  async #list({ category, tag, pageSize, all }: ListFlags): Promise<void> {
    await using client = this.#connect()
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
    await using client = this.#connect()
    this.#written(CreateItemResponseSchema, await client.create(item))
  }

  async #update(id: string, flags: WriteFlags, command: Command): Promise<void> {
    const { item, fields } = describeItem(id, flags, await this.#jsonInput(flags))
    if (fields.length === 0 && !flags.allowMissing)
      command.error('error: nothing to change: name a field (--help)')
    const current = { ...item, ...(flags.etag !== undefined && { etag: flags.etag }) }
    await using client = this.#connect()
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
    await using client = this.#connect()
    const { revision } = await client.delete(id, { etag, allowMissing })
    if (this.flags.json) this.#json(DeleteItemResponseSchema, { revision })
    else this.#say(`deleted item ${printable(id)}, revision ${revision}\n`)
  }

  async #invalidate(ids: readonly string[], flags: InvalidateFlags, command: Command): Promise<void> {
    const what = invalidationOf(ids, flags, command)
    await using client = this.#connect()
    const { revision } = await client.invalidate(what)
    if (this.flags.json) this.#json(InvalidateItemsResponseSchema, { revision })
    else this.#say(`invalidated, revision ${revision}\n`)
  }

  async #inspect(id: string): Promise<void> {
    await using client = this.#connect()
    const inspection = await client.inspect(id)
    if (this.flags.json) this.#json(InspectItemResponseSchema, inspection)
    else this.#say(formatInspection(id, inspection, this.#style))
  }

  async #metrics({ watch, interval }: { watch?: true; interval: number }): Promise<void> {
    await using client = this.#connect()
    if (watch) return await this.#watchMetrics(client, interval)
    const snapshot = await client.metrics()
    if (this.flags.json) this.#json(MetricsSnapshotSchema, snapshot)
    else this.#say(formatMetrics(snapshot, this.#style))
  }

  async #watchMetrics(client: Client, intervalMs: number): Promise<void> {
    let before: MetricsSnapshot | undefined
    for await (const snapshot of client.watchMetrics({ intervalMs })) {
      if (this.flags.json) this.#json(MetricsSnapshotSchema, snapshot)
      else this.#say(before === undefined ? CHANGE_HEADER : formatChange(before, snapshot))
      before = snapshot
    }
  }

  #connect(): Client {
    const { target, tenant, timeout } = this.flags
    return connect(target, { tenant, timeoutMs: timeout, clientId: 'itemcache-cli' })
  }

  /** What `--json-input` names: a file, or `-` for stdin. */
  async #jsonInput({ jsonInput }: WriteFlags): Promise<string | undefined> {
    if (jsonInput === undefined) return undefined
    if (jsonInput !== '-') return await readFile(jsonInput, 'utf8')
    const chunks: Uint8Array[] = []
    for await (const chunk of this.#io.stdin) chunks.push(Buffer.from(chunk as Uint8Array))
    return Buffer.concat(chunks).toString()
  }

  #say(text: string): void {
    this.#io.stdout.write(text)
  }

  #json<Desc extends DescMessage>(schema: Desc, message: MessageInitShape<Desc>): void {
    this.#say(`${toJsonString(schema, create(schema, message))}\n`)
  }
}

const HELP = `
Exit codes: 0 done, 1 error, 2 wrong usage (nothing was sent), 3 not found, 4 unreachable or too slow.

Examples:
  itemcache get 1
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
