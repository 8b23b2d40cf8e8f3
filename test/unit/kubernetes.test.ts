/** The manifests of deploy/kubernetes: by the schemas of Kubernetes, and in keeping with the image and the program. */
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { validate as deploymentSchema } from 'kubernetes-models/_schemas/IoK8sApiAppsV1Deployment'
import { validate as autoscalerSchema } from 'kubernetes-models/_schemas/IoK8sApiAutoscalingV2HorizontalPodAutoscaler'
import { validate as configMapSchema } from 'kubernetes-models/_schemas/IoK8sApiCoreV1ConfigMap'
import { validate as namespaceSchema } from 'kubernetes-models/_schemas/IoK8sApiCoreV1Namespace'
import { validate as serviceSchema } from 'kubernetes-models/_schemas/IoK8sApiCoreV1Service'
import { validate as serviceAccountSchema } from 'kubernetes-models/_schemas/IoK8sApiCoreV1ServiceAccount'
import { validate as networkPolicySchema } from 'kubernetes-models/_schemas/IoK8sApiNetworkingV1NetworkPolicy'
import { validate as disruptionBudgetSchema } from 'kubernetes-models/_schemas/IoK8sApiPolicyV1PodDisruptionBudget'
import { describe, expect, test } from 'vitest'
import { parse } from 'yaml'
import { parseConfig } from '../../src/config.ts'
import { checkMemory } from '../../src/doctor/machine.ts'
import { Report } from '../../src/doctor/report.ts'

const ROOT = join(import.meta.dirname, '../..')
const DIR = join(ROOT, 'deploy/kubernetes')

/** A manifest as it is written. */
const read = (file: string): Record<string, unknown> => parse(readFileSync(join(DIR, file), 'utf8'))

/** What a manifest has at a path as `spec.template.spec`; `undefined`: nothing. */
function at(manifest: unknown, path: string): unknown {
  return path
    .split('.')
    .reduce((value: unknown, key) => (value as Record<string, unknown> | undefined)?.[key], manifest)
}

const list = (manifest: unknown, path: string) => at(manifest, path) as readonly unknown[]

/** Puts a value in a place; `undefined`: takes what is there away. */
function put(manifest: unknown, path: string, value: unknown): void {
  const end = path.lastIndexOf('.')
  const [holder, key] = end < 0 ? [manifest, path] : [at(manifest, path.slice(0, end)), path.slice(end + 1)]
  if (value === undefined) Reflect.deleteProperty(holder as object, key)
  else Reflect.set(holder as object, key, value)
}

const KUSTOMIZATION = 'kustomization.yaml'
const files = readdirSync(DIR).filter((file) => file !== KUSTOMIZATION)

interface Schema {
  (data: unknown): boolean
  errors?:
    | readonly { readonly instancePath: string; readonly message?: string; readonly params: object }[]
    | null
}

const SCHEMAS: Readonly<Record<string, unknown>> = {
  'v1 Namespace': namespaceSchema,
  'v1 ServiceAccount': serviceAccountSchema,
  'v1 ConfigMap': configMapSchema,
  'v1 Service': serviceSchema,
  'apps/v1 Deployment': deploymentSchema,
  'policy/v1 PodDisruptionBudget': disruptionBudgetSchema,
  'autoscaling/v2 HorizontalPodAutoscaler': autoscalerSchema,
  'networking.k8s.io/v1 NetworkPolicy': networkPolicySchema,
}

/**
 * What is wrong with a manifest. The schemas say which fields must be there and of what type they are, and pass over fields
 * that they do not know: those are the ones that nobody has looked at.
 */
function mistakes(manifest: Readonly<Record<string, unknown>>): readonly string[] {
  const validate = SCHEMAS[`${manifest['apiVersion']} ${manifest['kind']}`] as Schema | undefined
  if (validate === undefined) return [`${manifest['kind']} is not known`]
  const unseen = new Set<string>()
  const watched = (value: unknown, path: string): unknown => {
    if (typeof value !== 'object' || value === null) return value
    for (const key of Object.keys(value)) unseen.add(`${path}/${key}`)
    return new Proxy(value, {
      get: (target, key) => {
        const found: unknown = Reflect.get(target, key)
        if (typeof key !== 'string' || !Object.hasOwn(target, key) || key === 'length') return found
        unseen.delete(`${path}/${key}`)
        return watched(found, `${path}/${key}`)
      },
    })
  }
  if (!validate(watched(manifest, ''))) {
    return (validate.errors ?? []).map(
      ({ instancePath, message, params }) => `${instancePath} ${message ?? JSON.stringify(params)}`,
    )
  }
  return [...unseen].map((path) => `${path} is not known`)
}

const deployment = read('deployment.yaml')
const POD = 'spec.template.spec'
const CONTAINER = `${POD}.containers.0`
const SELECTOR = 'matchLabels'
const dockerfile = readFileSync(join(ROOT, 'Dockerfile'), 'utf8')

describe('the manifests of deploy/kubernetes', () => {
  test.each(files)('%s is as Kubernetes wants it', (file) => {
    expect(mistakes(read(file))).toEqual([])
  })

  test.each<readonly [what: string, file: string, path: string, value: unknown, found: string]>([
    ['a field that is misspelt', 'deployment.yaml', `${POD}.container`, [], 'container is not known'],
    [
      'a misspelt field of a container',
      'deployment.yaml',
      `${CONTAINER}.securityContext.readOnlyRootFileSystem`,
      true,
      'readOnlyRootFileSystem is not known',
    ],
    ['a field that is missing', 'deployment.yaml', 'spec.selector', undefined, '/spec '],
    ['a number that is a text', 'autoscaler.yaml', 'spec.maxReplicas', 'ten', '/spec/maxReplicas'],
    ['a number where a text must be', 'config.yaml', 'data.ITEMCACHE_POSTGRES_POOL', 10, '/data/'],
    ['a kind of another version', 'disruption-budget.yaml', 'apiVersion', 'policy/v1beta1', 'not known'],
  ])('%s is found', (_, file, path, value, found) => {
    const manifest = read(file)
    put(manifest, path, value)
    expect(mistakes(manifest).join('\n')).toContain(found)
  })

  test('are all in the kustomization', () => {
    expect(list(read(KUSTOMIZATION), 'resources').toSorted()).toEqual(files.toSorted())
  })

  test('select the pods that the deployment makes', () => {
    const selectors = [
      at(deployment, `spec.selector.${SELECTOR}`),
      at(read('service.yaml'), 'spec.selector'),
      at(read('disruption-budget.yaml'), `spec.selector.${SELECTOR}`),
      at(read('network-policy.yaml'), `spec.podSelector.${SELECTOR}`),
      ...list(deployment, `${POD}.topologySpreadConstraints`).map((each) =>
        at(each, `labelSelector.${SELECTOR}`),
      ),
    ]
    for (const selector of selectors)
      expect(selector).toEqual(at(deployment, 'spec.template.metadata.labels'))
    expect(at(read('autoscaler.yaml'), 'spec.scaleTargetRef')).toMatchObject({
      kind: 'Deployment',
      name: at(deployment, 'metadata.name'),
    })
  })

  test('are for the image that the Dockerfile makes: its user, its ports, a file system that nobody writes', () => {
    const [, user, group] = /^USER (\d+):(\d+)$/m.exec(dockerfile) ?? []
    expect(at(deployment, `${POD}.securityContext`)).toMatchObject({
      runAsNonRoot: true,
      runAsUser: Number(user),
      runAsGroup: Number(group),
      seccompProfile: { type: 'RuntimeDefault' },
    })
    expect(at(deployment, `${CONTAINER}.securityContext`)).toEqual({
      allowPrivilegeEscalation: false,
      readOnlyRootFilesystem: true,
      capabilities: { drop: ['ALL'] },
    })
    const exposed = /^EXPOSE (.+)$/m.exec(dockerfile)?.[1]?.split(' ').map(Number)
    const ports = list(deployment, `${CONTAINER}.ports`)
    expect(ports.map((port) => at(port, 'containerPort'))).toEqual(exposed)
    expect(list(read('service.yaml'), 'spec.ports').map((port) => at(port, 'targetPort'))).toEqual(
      ports.map((port) => at(port, 'name')),
    )
  })

  test('set what the program understands, secrets by reference, and a memory that holds its bounds', () => {
    const data = at(read('config.yaml'), 'data') as Record<string, string>
    const secrets: Record<string, string> = {
      DATABASE_URL: 'postgres://u:p@db/itemcache',
      REDIS_URL: 'rediss://u:p@redis',
    }
    const variables = list(deployment, `${CONTAINER}.env`)
    expect(variables).toEqual(
      Object.keys(secrets).map((name) => ({
        name,
        valueFrom: { secretKeyRef: { name: 'itemcache', key: name } },
      })),
    )
    const config = parseConfig({ ...data, ...secrets })
    expect(config.database.kind).toBe('url')
    expect([config.tls?.cert, config.auth.kind]).toEqual([data['ITEMCACHE_TLS_CERT'], 'tokens'])
    expect(at(deployment, `${CONTAINER}.resources.limits.memory`)).toBe('1Gi')
    const report = new Report()
    checkMemory(report, config, 2 ** 30)
    expect(report.findings).toMatchObject([{ verdict: 'ok' }])
    // Nobody is sent here any more, then the drain, then the stop, before the process is ended.
    const preStopSeconds = Number(at(deployment, `${CONTAINER}.lifecycle.preStop.sleep.seconds`))
    const neededMs = preStopSeconds * 1_000 + config.timeouts.drainMs + 1_500
    expect(Number(at(deployment, `${POD}.terminationGracePeriodSeconds`)) * 1_000).toBeGreaterThan(neededMs)
  })

  test('have their selectors from nobody else: a network policy names others, too', () => {
    const kustomization = read('kustomization.yaml')
    expect([at(kustomization, 'labels'), at(kustomization, 'commonLabels')]).toEqual([undefined, undefined])
  })
})
