/** docs/runbook.md says of every alert what to do. */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { parse } from 'yaml'

const ROOT = join(import.meta.dirname, '../..')
const text = (file: string) => readFileSync(join(ROOT, file), 'utf8')

interface Rules {
  readonly groups: readonly {
    readonly rules: readonly {
      readonly alert?: string
      readonly annotations?: { readonly runbook_url?: string }
    }[]
  }[]
}

const alerts = (parse(text('deploy/prometheus/alerts.yaml')) as Rules).groups
  .flatMap(({ rules }) => rules)
  .flatMap(({ alert, annotations }) =>
    alert === undefined ? [] : [{ alert, url: annotations?.runbook_url }],
  )

const sections = new Map(
  text('docs/runbook.md')
    .split(/^## /m)
    .slice(1)
    .map((section) => {
      const [title = '', ...lines] = section.split('\n')
      // As GitHub makes an anchor of a heading.
      const anchor = title
        .toLowerCase()
        .replaceAll(/[^\w -]/g, '')
        .replaceAll(' ', '-')
      return [anchor, lines.join('\n')] as const
    }),
)

const kebab = (name: string) => name.replaceAll(/(?<=[a-z])(?=[A-Z])/g, '-').toLowerCase()

describe('the runbook', () => {
  test.each(alerts)('$alert: says what it means, what to look at and what to do', ({ alert, url }) => {
    expect(url).toBe(`docs/runbook.md#${kebab(alert)}`)
    const section = sections.get(kebab(alert)) ?? ''
    for (const part of ['**Means**', '**Look at**', '**Do**']) expect(section).toContain(part)
  })

  test('has no section for an alert that there is not', () => {
    const ofAlerts = [...sections].filter(([, section]) => section.includes('**Means**'))
    expect(ofAlerts.map(([anchor]) => anchor).toSorted()).toEqual(
      alerts.map(({ alert }) => kebab(alert)).toSorted(),
    )
  })
})
