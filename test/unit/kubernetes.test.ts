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

/** As YAML has it. */
// biome-ignore lint/suspicious/noExplicitAny: what is in it is what the schemas are asked about
type Manifest = any

const read = (file: string): Manifest => parse(readFileSync(join(DIR, file), 'utf8'))
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
function mistakes(manifest: Manifest): readonly string[] {
  const validate = SCHEMAS[`${manifest.apiVersion} ${manifest.kind}`] as Schema | undefined
  if (validate === undefined) return [`${manifest.kind} is not known`]
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
const { template } = deployment.spec
const [container] = template.spec.containers
const dockerfile = readFileSync(join(ROOT, 'Dockerfile'), 'utf8')

describe('the manifests of deploy/kubernetes', () => {
  test.each(files)('%s is as Kubernetes wants it', (file) => {
    expect(mistakes(read(file))).toEqual([])
  })

  test.each<readonly [what: string, file: string, spoil: (manifest: Manifest) => void, found: string]>([
    [
      'a field that is misspelt',
      'deployment.yaml',
      (m) => (m.spec.template.spec.container = []),
      'not known',
    ],
    [
      'a misspelt field of a container',
      'deployment.yaml',
      (m) => (m.spec.template.spec.containers[0].securityContext.readOnlyRootFileSystem = true),
      'readOnlyRootFileSystem is not known',
    ],
    ['a field that is missing', 'deployment.yaml', (m) => delete m.spec.selector, '/spec '],
    ['a number that is a text', 'autoscaler.yaml', (m) => (m.spec.maxReplicas = 'ten'), '/spec/maxReplicas'],
    ['a number where a text must be', 'config.yaml', (m) => (m.data.ITEMCACHE_POSTGRES_POOL = 10), '/data/'],
    [
      'a kind of another version',
      'disruption-budget.yaml',
      (m) => (m.apiVersion = 'policy/v1beta1'),
      'not known',
    ],
  ])('%s is found', (_, file, spoil, found) => {
    const manifest = read(file)
    spoil(manifest)
    expect(mistakes(manifest).join('\n')).toContain(found)
  })

  test('are all in the kustomization', () => {
    expect(read(KUSTOMIZATION).resources.toSorted()).toEqual(files.toSorted())
  })

  test('select the pods that the deployment makes', () => {
    const labels = template.metadata.labels
    const selectors = [
      deployment.spec.selector.matchLabels,
      read('service.yaml').spec.selector,
      read('disruption-budget.yaml').spec.selector.matchLabels,
      read('network-policy.yaml').spec.podSelector.matchLabels,
      ...template.spec.topologySpreadConstraints.map((each: Manifest) => each.labelSelector.matchLabels),
    ]
    for (const selector of selectors) expect(selector).toEqual(labels)
    const { scaleTargetRef } = read('autoscaler.yaml').spec
    expect(scaleTargetRef).toMatchObject({ kind: 'Deployment', name: deployment.metadata.name })
  })

  test('are for the image that the Dockerfile makes: its user, its ports, a file system that nobody writes', () => {
    const [, user, group] = /^USER (\d+):(\d+)$/m.exec(dockerfile) ?? []
    expect(template.spec.securityContext).toMatchObject({
      runAsNonRoot: true,
      runAsUser: Number(user),
      runAsGroup: Number(group),
      seccompProfile: { type: 'RuntimeDefault' },
    })
    expect(container.securityContext).toEqual({
      allowPrivilegeEscalation: false,
      readOnlyRootFilesystem: true,
      capabilities: { drop: ['ALL'] },
    })
    const exposed = /^EXPOSE (.+)$/m.exec(dockerfile)?.[1]?.split(' ').map(Number)
    expect(container.ports.map((port: Manifest) => port.containerPort)).toEqual(exposed)
    const names = container.ports.map((port: Manifest) => port.name)
    expect(read('service.yaml').spec.ports.map((port: Manifest) => port.targetPort)).toEqual(names)
  })

  test('set what the program understands, secrets by reference, and a memory that holds its bounds', () => {
    const { data } = read('config.yaml')
    const secrets = container.env.map((variable: Manifest) => [
      variable.name,
      { DATABASE_URL: 'postgres://u:p@db/itemcache', REDIS_URL: 'rediss://u:p@redis' }[
        variable.name as string
      ],
    ])
    for (const { value, valueFrom } of container.env) {
      expect([value, valueFrom.secretKeyRef.name]).toEqual([undefined, 'itemcache'])
    }
    const config = parseConfig({ ...data, ...Object.fromEntries(secrets) })
    expect(config.database.kind).toBe('url')
    expect([config.tls?.cert, config.auth.kind]).toEqual([data.ITEMCACHE_TLS_CERT, 'tokens'])
    expect(container.resources.limits.memory).toBe('1Gi')
    const report = new Report()
    checkMemory(report, config, 2 ** 30)
    expect(report.findings).toMatchObject([{ verdict: 'ok' }])
    // Nobody is sent here any more, then the drain, then the stop, before the process is ended.
    const { preStop } = container.lifecycle
    const neededMs = preStop.sleep.seconds * 1_000 + config.timeouts.drainMs + 1_500
    expect(template.spec.terminationGracePeriodSeconds * 1_000).toBeGreaterThan(neededMs)
  })
})
