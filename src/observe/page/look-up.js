/** The look-up of one item: what InspectItem tells, as cards. */
import { byId, element } from './elements.js'
import { bytes, count, NAMES, span } from './format.js'

/**
 * The JSON form of InspectItemResponse.
 * @typedef {{ readonly tier: string, readonly present: boolean, readonly negative: boolean, readonly current: boolean,
 *   readonly asOf: string, readonly age?: string, readonly remainingTtl?: string, readonly sizeBytes: string,
 *   readonly skipped: string, readonly servedByOrigin: boolean, readonly breaker: string }} InspectedTier
 * @typedef {{ readonly tenantFloor: string, readonly keyFloor: string, readonly removedFloor: string,
 *   readonly tagFloors: readonly { readonly tag: string, readonly floor: string }[] }} Floors
 */

/** @type {Readonly<Record<string, import('../live-message.ts').PartName>>} */
const TIERS = { TIER_MEMORY: 'memory', TIER_REDIS: 'redis', TIER_POSTGRES: 'postgres', TIER_ORIGIN: 'origin' }

/** @type {Readonly<Record<string, string>>} */
const SKIPPED = {
  SKIP_REASON_OFF: 'is off',
  SKIP_REASON_DOWN: 'is down',
  SKIP_REASON_TIMEOUT: 'did not answer in time',
}

/** @param {InspectedTier} tier */
function verdict({ tier, present, negative, current, skipped, servedByOrigin }) {
  const why = SKIPPED[skipped]
  if (why !== undefined) return { level: 'off', text: why }
  if (tier === 'TIER_ORIGIN')
    return { level: 'off', text: servedByOrigin ? 'may know it; is not asked' : 'cannot know it' }
  if (!present) return { level: 'off', text: 'does not hold it' }
  const held = negative ? 'knows that it is absent' : 'holds it'
  return current
    ? { level: 'well', text: `${held}; current` }
    : { level: 'poor', text: `${held}; not current` }
}

/** @param {string | undefined} duration as in `1.5s` */
const ago = (duration) => duration && span(Number.parseFloat(duration) * 1000)

/** @param {InspectedTier} found */
function card(found) {
  const { level, text } = verdict(found)
  const facts = [
    ['As of revision', found.present && found.asOf !== '0' ? found.asOf : undefined],
    ['Verified', found.present && found.age ? `${ago(found.age)} ago` : undefined],
    ['Dropped in', found.present ? ago(found.remainingTtl) : undefined],
    ['Size', found.present ? bytes(Number(found.sizeBytes)) : undefined],
    [
      'Breaker',
      found.breaker.replace('BREAKER_STATE_', '').replace('UNSPECIFIED', '').toLowerCase().replace('_', '-'),
    ],
  ]
  return element(
    'li',
    { 'data-level': level },
    element('span', { class: 'mark', 'aria-hidden': 'true' }),
    element('strong', {}, NAMES[TIERS[found.tier] ?? 'memory']),
    element('span', { class: 'state' }, text),
    element(
      'dl',
      {},
      ...facts.flatMap(([name = '', value]) =>
        value ? [element('dt', {}, name), element('dd', {}, value)] : [],
      ),
    ),
  )
}

/** @param {Floors} floors */
function floorsList({ tenantFloor, keyFloor, removedFloor, tagFloors }) {
  const floors = [
    ['all items', tenantFloor],
    ['this item', keyFloor],
    ['removed', removedFloor],
    ...tagFloors.map(({ tag, floor }) => [`tag ${tag}`, floor]),
  ].filter(([, floor]) => floor !== '0')
  return element(
    'p',
    { class: 'quiet' },
    floors.length === 0
      ? 'No invalidation is known that concerns it.'
      : `A copy is current when its revision is at least that of every floor: ${floors.map(([name, floor]) => `${name} ${floor}`).join(', ')}.`,
  )
}

export function startLookUp() {
  const answer = byId('look-up-answer')
  const form = byId('look-up')
  let asked = 0
  /** @param {string} text */
  const say = (text) => answer.replaceChildren(element('p', { class: 'said' }, text))
  form.addEventListener('submit', async (event) => {
    event.preventDefault()
    const mine = ++asked
    const tenant = /** @type {HTMLInputElement} */ (byId('look-up-tenant')).value
    const id = /** @type {HTMLInputElement} */ (byId('look-up-id')).value
    answer.setAttribute('aria-busy', 'true')
    try {
      const response = await fetch(`inspect?${new URLSearchParams({ tenant, id })}`)
      const found = await response.json()
      if (mine !== asked) return
      if (!response.ok) return say(`The service says: ${found.error}`)
      const tiers = /** @type {readonly InspectedTier[]} */ (found.tiers)
      const holders = tiers.filter(({ present }) => present).length
      answer.replaceChildren(
        element('h3', {}, 'Item ', element('code', {}, id), ' of tenant ', element('code', {}, tenant)),
        element(
          'p',
          { class: 'quiet' },
          holders === 0 ? 'No tier holds it.' : `${count(holders)} of the tiers hold it.`,
        ),
        element('ul', { class: 'parts' }, ...tiers.map(card)),
        floorsList(found.floors),
      )
    } catch {
      if (mine === asked) say('The service could not be reached.')
    } finally {
      if (mine === asked) answer.removeAttribute('aria-busy')
    }
  })
}
