/**
 * Elements, made of text only: whatever a name holds, it is shown and never read as HTML.
 *
 * @typedef {Node | string | undefined | false} Child
 */

/**
 * @template {keyof HTMLElementTagNameMap} Name
 * @param {Name} name
 * @param {Readonly<Record<string, string>>} attributes
 * @param {...Child} children
 * @returns {HTMLElementTagNameMap[Name]}
 */
export function element(name, attributes, ...children) {
  const made = document.createElement(name)
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value)
  for (const child of children) if (child !== undefined && child !== false) made.append(child)
  return made
}

/**
 * The element of index.html with this id.
 * @param {string} id
 */
export function byId(id) {
  const found = document.getElementById(id)
  if (found === null) throw new Error(`there is no #${id}`)
  return found
}

/**
 * Changes a text only when it is another, so that nothing is announced or laid out again for nothing.
 * @param {Element} target
 * @param {string} text
 */
export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text
}

/**
 * Makes the rows of a table those given, cell by cell: a text that stays is left alone. A cell is a text, or several that
 * become a line each; `class` says how it looks.
 *
 * @typedef {{ readonly text: string | readonly string[], readonly class?: string, readonly title?: string, readonly share?: number }} Cell
 * @param {HTMLElement} body
 * @param {readonly (readonly Cell[])[]} rows
 * @param {string} none what to say when there are none
 * @param {number} columns
 */
export function setRows(body, rows, none, columns) {
  const shown = rows.length > 0 ? rows : [[{ text: none, class: 'quiet' }]]
  shown.forEach((cells, at) => {
    let row = body.children[at]
    if (row === undefined) {
      row = element('tr', {})
      body.append(row)
    }
    if (row.children.length !== cells.length) row.replaceChildren(...cells.map(() => element('td', {})))
    cells.forEach((cell, column) => {
      const target = /** @type {HTMLTableCellElement} */ (row.children[column])
      const span = cells.length === 1 ? columns : 1
      if (target.colSpan !== span) target.colSpan = span
      if (target.className !== (cell.class ?? '')) target.className = cell.class ?? ''
      fill(target, cell)
    })
  })
  while (body.children.length > shown.length) body.lastElementChild?.remove()
}

/**
 * @param {HTMLTableCellElement} target
 * @param {Cell} cell
 */
function fill(target, { text, share }) {
  if (share !== undefined) {
    let bar = target.querySelector('span')
    if (bar === null) {
      bar = element('span', { class: 'bar', 'aria-hidden': 'true' }, element('span', { class: 'fill' }))
      target.replaceChildren(bar, element('span', {}))
    }
    const inner = /** @type {HTMLElement} */ (bar.firstElementChild)
    inner.style.width = `${Math.min(100, share * 100)}%`
    inner.dataset['level'] = share >= 0.95 ? 'high' : 'well'
    setText(
      /** @type {Element} */ (target.lastElementChild),
      typeof text === 'string' ? text : text.join(' '),
    )
  } else if (typeof text === 'string') setText(target, text)
  else {
    const lines = text.map((line, i) => element(i === 0 ? 'span' : 'small', { class: 'line' }, line))
    const before = [...target.children].map((child) => child.textContent)
    if (before.length !== lines.length || lines.some((line, i) => line.textContent !== before[i])) {
      target.replaceChildren(...lines)
    }
  }
}
