/** Where to connect: the address forms of gRPC, and several addresses as one target. */
import { type ChannelOptions, experimental } from '@grpc/grpc-js'
import { InvalidArgumentError } from './errors.ts'

type Uri = experimental.GrpcUri
type Listener = experimental.ResolverListener
type Endpoints = experimental.StatusOr<experimental.Endpoint[]>

/** Not an address form for users: the targets of a list, each encoded, with commas between. */
const SCHEME = 'itemcache-several'

/** All addresses of all targets. While some of them resolve, those that do not are left out. */
class SeveralTargets implements experimental.Resolver {
  readonly #resolvers: readonly experimental.Resolver[]
  readonly #found: (Endpoints | undefined)[]

  constructor(target: Uri, listener: Listener, options: ChannelOptions) {
    const targets = target.path.split(',').map((part) => uriOf(decodeURIComponent(part)))
    this.#found = targets.map(() => undefined)
    this.#resolvers = targets.map((one, i) =>
      experimental.createResolver(
        one,
        (endpoints) => {
          this.#found[i] = endpoints
          const known = this.#found.filter((found) => found !== undefined)
          const good = known.flatMap((found) => (found.ok ? found.value : []))
          // The first answer may be an error while others are on their way.
          if (good.length === 0 && known.length < targets.length) return true
          return listener(
            good.length > 0 ? experimental.statusOrFromValue(good) : endpoints,
            {},
            null,
            'one of several targets',
          )
        },
        options,
      ),
    )
  }

  updateResolution(): void {
    for (const resolver of this.#resolvers) resolver.updateResolution()
  }

  destroy(): void {
    for (const resolver of this.#resolvers) resolver.destroy()
  }

  /** The host of the first target: the name that all of them must have in their certificates, unless one is given. */
  static getDefaultAuthority({ path }: Uri): string {
    const [first = ''] = path.split(',')
    const uri = uriOf(decodeURIComponent(first))
    return uri.scheme.startsWith('unix') ? 'localhost' : uri.path
  }
}

experimental.registerResolver(SCHEME, SeveralTargets)

const SCHEMES = /^(dns|ipv4|ipv6|unix|unix-abstract):(?:\/\/([^/]*)\/)?(.+)$/

function uriOf(target: string): Uri & { readonly scheme: string } {
  const [, scheme, authority, path] = SCHEMES.exec(target) ?? []
  if (scheme === undefined || path === undefined) return { scheme: 'dns', path: target }
  return { scheme, path, ...(authority !== undefined && { authority }) }
}

/** One target for grpc-js out of one or several. Throws InvalidArgumentError for an empty list or address. */
export function targetOf(target: string | readonly string[]): string {
  const targets = typeof target === 'string' ? [target] : target
  if (targets.length === 0 || targets.includes('')) {
    throw new InvalidArgumentError('a target must not be empty', { reason: 'INVALID_TARGET' })
  }
  const [only] = targets
  return targets.length === 1 && only !== undefined
    ? only
    : `${SCHEME}:${targets.map(encodeURIComponent).join(',')}`
}

/** Whether what is sent there stays on this machine. */
export function isLocal(target: string | readonly string[]): boolean {
  return [target].flat().every((one) => isLoopback(one) || /^unix(?:-abstract)?:/.test(one))
}

function isLoopback(target: string): boolean {
  return /^(?:dns:(?:\/\/\/)?|ipv4:|ipv6:)?(?:(?:localhost|127\.[\d.]+|\[::1\])(?::\d+)?,?)+$/.test(target)
}
