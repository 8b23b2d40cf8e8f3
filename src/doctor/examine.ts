/** Examines everything that an environment names. */
import { type Config, ConfigError, loadConfig } from '../config.ts'
import { examineMachine, examineOrigin } from './machine.ts'
import { examinePostgres } from './postgres.ts'
import { examineRedis } from './redis.ts'
import { Report } from './report.ts'

export interface ExamineOptions {
  /** How many instances are to share PostgreSQL and Redis. */
  readonly instances: number
  /** Default: that of the process. */
  readonly env?: Readonly<NodeJS.ProcessEnv>
}

/** Connects as the service would, changes nothing, and resolves with what was found. */
export async function examine({ instances, env = process.env }: ExamineOptions): Promise<Report> {
  const report = new Report()
  let config: Config
  try {
    config = loadConfig(env)
    report.ok('configuration', 'every variable can be used')
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error
    for (const { variable, rule, value } of error.problems) {
      report.fault(
        'configuration',
        `${variable} ${rule}${value === undefined ? '' : `; got ${value}`}`,
        'docs/configuration.md has them all.',
      )
    }
    // What the service would not start with is not examined.
    return report
  }
  await examineMachine(report, config)
  await examinePostgres(report, config, instances)
  await examineRedis(report, config, instances)
  await examineOrigin(report, config)
  return report
}
