/** Which keys go through the caches while a team introduces them. */

/**
 * Whether a key is in the share of `percent` (0 to 100) of all keys. The same key gets the same answer on every instance
 * and after every start, and a key that is in a share is in every larger one.
 */
export function isInShare(tenant: string, id: string, percent: number): boolean {
  if (percent >= 100) return true
  // The length keeps every pair apart, whatever characters either has.
  return (hashOf(`${tenant.length}:${tenant}${id}`) / 2 ** 32) * 100 < percent
}

/** FNV-1a over UTF-16 code units, mixed at the end so that keys which differ in their last digit do not stay together. */
function hashOf(text: string): number {
  let hash = 0x811c9dc5
  for (let at = 0; at < text.length; at += 1) hash = Math.imul(hash ^ text.charCodeAt(at), 0x01000193)
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b)
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35)
  return (hash ^ (hash >>> 16)) >>> 0
}
