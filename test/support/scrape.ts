/** Prometheus text, read. */

export interface ScrapedSample {
  /** The name of the metric; for the parts of a histogram that of the whole. */
  readonly metric: string
  /** The name of the series: `_bucket`, `_sum` and `_count` of a histogram included. */
  readonly name: string
  readonly labels: Readonly<Record<string, string>>
  readonly value: number
}

export interface Scrape {
  readonly types: ReadonlyMap<string, string>
  readonly samples: readonly ScrapedSample[]
  /** The value of the series with exactly these labels. */
  value(name: string, labels?: Readonly<Record<string, string>>): number | undefined
}

/** What the admin server at `host:port` shows. */
export async function metricsAt(admin: string): Promise<Scrape> {
  const response = await fetch(`http://${admin}/metrics`)
  if (!response.ok) throw new Error(`/metrics answers ${response.status}`)
  const types = new Map<string, string>()
  const samples: ScrapedSample[] = []
  for (const line of (await response.text()).split('\n')) {
    const [, subject = '', type] = /^# TYPE (\w+) (\w+)$/.exec(line) ?? []
    if (type !== undefined) types.set(subject, type)
    const [, name, braces = '', value] = /^(\w+)(?:\{(.*)\})? (\S+)$/.exec(line) ?? []
    if (name === undefined) continue
    const whole = name.replace(/_(bucket|sum|count)$/, '')
    const labels = [...braces.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, label = '', text = '']) => [
      label,
      text,
    ])
    samples.push({
      metric: types.get(whole) === 'histogram' ? whole : name,
      name,
      labels: Object.fromEntries(labels),
      value: Number(value),
    })
  }
  const keyOf = (name: string, labels: Readonly<Record<string, string>>) =>
    JSON.stringify([name, Object.entries(labels).toSorted(([a], [b]) => (a < b ? -1 : 1))])
  const byKey = new Map(samples.map((sample) => [keyOf(sample.name, sample.labels), sample.value]))
  return { types, samples, value: (name, labels = {}) => byKey.get(keyOf(name, labels)) }
}
