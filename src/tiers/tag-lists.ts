/** Lists of tags, each held once for all who have the same: most items of a catalogue share theirs with many. */

interface TagList {
  readonly tags: readonly string[]
  readonly key: string
  readonly number: number
  users: number
}

/** The list of no tags, which is always there. */
const NO_TAGS: TagList = { tags: [], key: '', number: 0, users: 0 }
/** A `Map` holds no more than this. A list beyond that is not shared. */
const MAX_SHARED = 2 ** 24 - 1

export class TagLists {
  readonly #byNumber: (TagList | undefined)[] = [NO_TAGS]
  readonly #byKey = new Map<string, TagList>()
  readonly #freeNumbers: number[] = []

  /** How many lists are held, without that of no tags. */
  get size(): number {
    return this.#byNumber.length - 1 - this.#freeNumbers.length
  }

  /** The number of these tags, which is theirs until as many have left as have joined. */
  join(tags: readonly string[]): number {
    if (tags.length === 0) return NO_TAGS.number
    let key = ''
    for (const tag of tags) key += `${tag.length}:${tag}`
    let list = this.#byKey.get(key)
    if (list === undefined) {
      // A copy, for who has brought them may change theirs.
      list = { tags: [...tags], key, number: this.#freeNumbers.pop() ?? this.#byNumber.length, users: 0 }
      this.#byNumber[list.number] = list
      if (this.#byKey.size < MAX_SHARED) this.#byKey.set(key, list)
    }
    list.users += 1
    return list.number
  }

  leave(number: number): void {
    if (number === NO_TAGS.number) return
    const list = this.#list(number)
    list.users -= 1
    if (list.users > 0) return
    this.#byNumber[number] = undefined
    this.#freeNumbers.push(number)
    if (this.#byKey.get(list.key) === list) this.#byKey.delete(list.key)
  }

  of(number: number): readonly string[] {
    return this.#list(number).tags
  }

  #list(number: number): TagList {
    const list = this.#byNumber[number]
    if (list === undefined) throw new Error(`nobody has the tags ${number}`)
    return list
  }
}
