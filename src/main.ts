/** The process: environment in, banner out, signals to a drain. */
import { constants } from 'node:os'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { banner, startApp } from './app.ts'
import { ConfigError, helpText, loadConfig, VERSION } from './config.ts'
import { registerRunning } from './embedded/processes.ts'
import { ItemCacheError } from './errors.ts'
import { createLogger, toggleDebug } from './observe/log.ts'

const EXIT_FAILED = 1
const EXIT_USAGE = 2
/** A process that is ended by a signal has this code and the signal's number. */
const EXIT_BY_SIGNAL = 128

/**
 * Under npm, which passes signals on, another one within this time after the first is the same key press that came by
 * two ways.
 */
const SAME_SIGNAL_MS = process.env['npm_lifecycle_event'] === undefined ? 0 : 500
/** What a stop may take besides the drain. What has not ended by then is left behind. */
const STOP_PATIENCE_MS = 1500

async function main(): Promise<void> {
  const wanted = readArguments()
  if (wanted.help) return print(helpText())
  if (wanted.version) return print(`${VERSION}\n`)
  const config = loadConfig()
  const log = createLogger({ level: config.logLevel, version: config.version })

  const stop = Promise.withResolvers<NodeJS.Signals>()
  let stoppedAtMs: number | undefined
  const onSignal = (signal: NodeJS.Signals) => {
    if (stoppedAtMs === undefined) {
      stoppedAtMs = performance.now()
      stop.resolve(signal)
    } else if (performance.now() - stoppedAtMs >= SAME_SIGNAL_MS) {
      process.exit(EXIT_BY_SIGNAL + constants.signals[signal])
    }
  }
  let reload = config.auth.kind === 'none' && config.tls === undefined ? undefined : () => {}
  for (const signal of ['SIGTERM', 'SIGINT'] as const) process.on(signal, onSignal)
  // A terminal that is closed stops the service, unless there are files that a SIGHUP is wanted for.
  process.on('SIGHUP', (signal) => (reload === undefined ? onSignal(signal) : reload()))
  process.on('SIGUSR2', () => toggleDebug(log, config.logLevel))
  process.on('unhandledRejection', (error) => log.error({ err: error }, 'a promise was rejected unheard'))
  process.on('uncaughtException', (error) => {
    log.fatal({ err: error }, 'uncaught exception')
    process.exitCode = EXIT_FAILED
    onSignal('SIGTERM')
  })

  using _registered = registerRunning(fileURLToPath(new URL('..', import.meta.url)))
  const stopping = new AbortController()
  void stop.promise.then((signal) => {
    log.info({ signal }, 'stopping')
    stopping.abort()
    setTimeout(() => {
      log.fatal('the stop took too long: what is left is cut off')
      process.exit(EXIT_FAILED)
    }, config.timeouts.drainMs + STOP_PATIENCE_MS).unref()
  })
  await using app = await startApp(config, {
    log,
    progress: (line) => process.stderr.write(`${line}\n`),
    signal: stopping.signal,
  })
  reload &&= app.reload
  log.info({ grpc: app.address, admin: app.admin, tiers: app.tiers }, 'started')
  process.stdout.write(banner(app))
  await stop.promise
}

function readArguments(): { help?: boolean; version?: boolean } {
  try {
    return parseArgs({
      options: { help: { type: 'boolean', short: 'h' }, version: { type: 'boolean', short: 'v' } },
    }).values
  } catch (error) {
    throw new ConfigError([{ variable: error instanceof Error ? error.message : '', rule: 'See --help.' }])
  }
}

function print(text: string): void {
  process.stdout.write(text)
}

try {
  await main()
  process.exit()
} catch (error) {
  const known = error instanceof ConfigError || error instanceof ItemCacheError
  process.stderr.write(`${known ? error.message : (error as Error).stack}\n`)
  process.exit(error instanceof ConfigError ? EXIT_USAGE : EXIT_FAILED)
}
