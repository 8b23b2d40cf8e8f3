/** Lists of tags, each held once for all who have the same: most items of a catalogue share theirs with many. */

interface TagList {
  readonly tags: readonly string[]
  readonly key: string
  readonly number: number
  users: number
}

/** The list of no tags, which is always there. */
const NO_TAGS: TagList = { tags: [], key: '[]', number: 0, users: 0 }

export class TagLists {
  #byNumber: (TagList | undefined)[] = [NO_TAGS]
  readonly #byKey = new Map<string, TagList>()
  #free: number[] = []

  /** How many different lists there are, without that of no tags. */
  get size(): number {
    return this.#byKey.size
  }

  /** The number of these tags, which is theirs until as many have left as have joined. */
  join(tags: readonly string[]): number {
    if (tags.length === 0) return NO_TAGS.number
    const key = JSON.stringify(tags)
    let list = this.#byKey.get(key)
    if (list === undefined) {
      // A copy, for who has brought them may change theirs.
      list = { tags: [...tags], key, number: this.#free.pop() ?? this.#byNumber.length, users: 0 }
      this.#byNumber[list.number] = list
      this.#byKey.set(key, list)
    }
    list.users += 1
    return list.number
  }

  leave(number: number): void {
    const list = this.#byNumber[number]
    if (list === undefined || list === NO_TAGS) return
    list.users -= 1
    if (list.users > 0) return
    this.#byNumber[number] = undefined
    this.#free.push(number)
    this.#byKey.delete(list.key)
  }

  of(number: number): readonly string[] {
    return this.#byNumber[number]?.tags ?? NO_TAGS.tags
  }

  clear(): void {
    this.#byNumber = [NO_TAGS]
    this.#free = []
    this.#byKey.clear()
  }
}
