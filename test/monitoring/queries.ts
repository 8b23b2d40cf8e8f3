/** The rules and the dashboard in deploy/, as tests ask them. */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import type { Prometheus } from '../support/prometheus.ts'

const DEPLOY = join(import.meta.dirname, '../../deploy')

export const RULES_FILE = join(DEPLOY, 'prometheus/alerts.yaml')
export const RULES: string = readFileSync(RULES_FILE, 'utf8')

/** The rules with every minute become a second, so that nobody need wait for them. */
export function hurried(rules: string): string {
  const seconds = { m: 1, h: 60 }
  return rules.replace(
    /(\[|for: )(\d+)([mh])/g,
    (_, before, number, unit: 'm' | 'h') => `${before}${Number(number) * seconds[unit]}s`,
  )
}

/**
 * What an alert measures. Its own expression has a result only when there is something wrong: here thresholds say 0 or 1,
 * and the other alerts that make it unnecessary are left out.
 */
export function measured(query: string): string {
  const [own = ''] = query.split(/ unless /)
  return own.replace(/ (==|<=|>=|<|>) (?=\d)/g, ' $1 bool ')
}

interface Panel {
  readonly title: string
  readonly targets?: readonly { readonly expr: string }[]
  readonly panels?: readonly Panel[]
}

/** Every query of the dashboard with its variables filled in, under the title of its panel. */
export function dashboardQueries(range: string): readonly Query[] {
  const { panels } = JSON.parse(readFileSync(join(DEPLOY, 'grafana/itemcache.json'), 'utf8')) as {
    panels: readonly Panel[]
  }
  return panels
    .flatMap((panel) => [panel, ...(panel.panels ?? [])])
    .flatMap(({ title, targets = [] }) =>
      targets.map(({ expr }) => ({ title, query: filledIn(expr, range) })),
    )
}

function filledIn(query: string, range: string): string {
  const filled = query
    .replaceAll('$__rate_interval', range)
    .replaceAll('"$job"', '"itemcache"')
    .replaceAll('"$instance"', '".+"')
  if (filled.includes('$')) throw new Error(`there is another variable in ${query}`)
  return filled
}

interface Query {
  readonly title: string
  readonly query: string
}

/** Asks again and again what has not been answered yet, and says what is left: for machines where a scrape may come late. */
export function untilAnswered(
  prometheus: Prometheus,
  queries: readonly Query[],
): () => Promise<readonly string[]> {
  let left = queries
  return async () => {
    const whys = await Promise.all(left.map((query) => unanswered(prometheus, [query])))
    left = left.filter((_, i) => whys[i]?.length !== 0)
    return whys.flat()
  }
}

/** The queries that do not answer, or not with numbers, and why. */
export async function unanswered(
  prometheus: Prometheus,
  queries: readonly Query[],
): Promise<readonly string[]> {
  const found = await Promise.all(
    queries.map(async ({ title, query }) => {
      const result = await prometheus.query(query).catch((error: unknown) => `${error}`)
      if (typeof result === 'string') return `${title}: ${result}`
      if (result.length === 0) return `${title}: no data: ${query}`
      return result.some(({ value }) => Number.isNaN(value)) ? `${title}: not a number: ${query}` : undefined
    }),
  )
  return found.filter((why) => why !== undefined)
}
