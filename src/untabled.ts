/**
 * A text in a string of its own. V8 makes every string that a `Map` or a `Set` was asked for a reference to one in its table of strings, which
 * stays there for as long as anybody holds either, and walks through all of that table in the pause of each full collection
 * (docs/performance.md#what-garbage-collection-costs).
 */
export function untabled(text: string): string {
  return Buffer.from(text).toString()
}
