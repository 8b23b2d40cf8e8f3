/** What is measured, and what it is held against. A case is one run and may give several rows. */
import type { Measured } from './report.ts'

/** What a row's figure, or its ratio to the peer's, may be. */
export interface Bound {
  readonly of: 'ratio' | 'ours'
  readonly least?: number
  readonly most?: number
}

export interface Row {
  readonly id: string
  readonly work: string
  readonly unit: string
  /** Whose figure it is compared with; `''` where there is nobody. */
  readonly peer: string
  readonly target: string
  /** Undefined: the row is there to be seen. */
  readonly bound: Bound | undefined
}

/** How a case is to be run. */
export interface Run {
  /** The whole of it instead of what fits into a representative run. */
  readonly full: boolean
  progress(line: string): void
}

export interface Case {
  readonly name: string
  readonly rows: readonly Row[]
  /** Programs that it cannot do without. */
  readonly needs: readonly ('h2load' | 'ghz')[]
  /** False: too long for the representative run; it runs when it is named. */
  readonly representative: boolean
  load(): Promise<{ readonly run: (run: Run) => Promise<readonly Measured[]> }>
}

const most = (limit: number): Bound => ({ of: 'ratio', most: limit })
const least = (limit: number): Bound => ({ of: 'ratio', least: limit })
const atMost = (limit: number): Bound => ({ of: 'ours', most: limit })
const BARE = 'bare grpc-js unary handler'

export const CASES: readonly Case[] = [
  {
    name: 'get',
    needs: ['h2load'],
    representative: true,
    rows: [
      {
        id: 'get',
        work: 'GetItem, hot, item of 320 bytes: server CPU per call',
        unit: 'µs',
        peer: BARE,
        target: '≤ 1.10 ×',
        bound: most(1.1),
      },
    ],
    load: () => import('./rpc/get.ts'),
  },
  {
    name: 'stream',
    needs: ['h2load'],
    representative: true,
    rows: [
      {
        id: 'stream',
        work: 'StreamItems, hot: server CPU per look-up',
        unit: 'µs',
        peer: BARE,
        target: '≤ 0.35 ×',
        bound: most(0.35),
      },
    ],
    load: () => import('./rpc/stream.ts'),
  },
  {
    name: 'batch',
    needs: ['h2load'],
    representative: true,
    rows: [
      {
        id: 'batch',
        work: 'BatchGetItems of 100, hot: server CPU per item',
        unit: 'µs',
        peer: BARE,
        target: '≤ 0.03 ×',
        bound: most(0.03),
      },
    ],
    load: () => import('./rpc/batch.ts'),
  },
  {
    name: 'watch',
    needs: [],
    representative: true,
    rows: [
      {
        id: 'watch',
        work: 'WatchInvalidations, 1,000 subscribers: server CPU per delivery',
        unit: 'µs',
        peer: 'bare grpc-js stream write',
        target: '≤ 1.5 ×',
        bound: most(1.5),
      },
      {
        id: 'watch-cost',
        work: 'the same',
        unit: 'µs',
        peer: '',
        target: '≤ 5 µs',
        bound: atMost(5),
      },
    ],
    load: () => import('./rpc/watch.ts'),
  },
  {
    name: 'lru',
    needs: [],
    representative: true,
    rows: [
      {
        id: 'lru-cache',
        work: 'LRU, get or set, Zipf 0.99, 1,000,000 keys, capacity 100,000: accesses per CPU second',
        unit: 'M',
        peer: 'lru-cache',
        target: '≥ 1.2 ×',
        bound: least(1.2),
      },
      {
        id: 'lru-fastest',
        work: 'the same',
        unit: 'M',
        peer: 'the fastest of mnemonist, quick-lru, tiny-lru',
        target: '≥ 1.0 ×',
        bound: least(1),
      },
      {
        id: 'lru-bytes',
        work: 'LRU: bytes per entry besides key and value',
        unit: 'B',
        peer: 'lru-cache with TTL and size',
        target: '≤ 1 ×',
        bound: most(1),
      },
    ],
    load: () => import('./micro/lru.ts'),
  },
  {
    name: 'misses',
    needs: [],
    representative: true,
    rows: [
      {
        id: 'misses-sql',
        work: '500 GetItems of different ids at once, in PostgreSQL only: SQL statements',
        unit: '',
        peer: '',
        target: '≤ 2',
        bound: atMost(2),
      },
      {
        id: 'misses-redis',
        work: 'the same: round trips to Redis, the refill among them',
        unit: '',
        peer: '',
        target: '≤ 2',
        bound: atMost(2),
      },
    ],
    load: () => import('./load/misses.ts'),
  },
  {
    name: 'stampede',
    needs: [],
    representative: true,
    rows: [
      {
        id: 'stampede-origin',
        work: '10,000 callers of 3 instances, one cold id: requests to the origin',
        unit: '',
        peer: '',
        target: '1',
        bound: { of: 'ours', least: 1, most: 1 },
      },
      {
        id: 'stampede-sql',
        work: 'the same: SQL reads',
        unit: '',
        peer: '',
        target: '≤ 3',
        bound: atMost(3),
      },
      {
        id: 'stampede-rows',
        work: 'the same: rows inserted',
        unit: '',
        peer: '',
        target: '1',
        bound: { of: 'ours', least: 1, most: 1 },
      },
    ],
    load: () => import('./load/stampede.ts'),
  },
  {
    name: 'gc',
    needs: [],
    representative: true,
    rows: [
      {
        id: 'gc',
        work: 'GetItem, hot, memory full of items of 320 bytes: p99.9',
        unit: 'ms',
        peer: 'memory with 10,000 entries',
        target: '≤ 1.5 ×',
        bound: most(1.5),
      },
    ],
    load: () => import('./rpc/gc.ts'),
  },
  {
    name: 'zipf',
    needs: [],
    representative: true,
    rows: [
      {
        id: 'zipf-sql',
        work: 'Zipf 0.99, memory holds 10 %, Redis all, 5 % writes: SQL reads saved',
        unit: '%',
        peer: 'no cache',
        target: '≥ 99 %',
        bound: { of: 'ours', least: 99 },
      },
      ...(
        [
          ['no cache', 'PostgreSQL for every request', '≥ 5 ×', 5],
          ['Redis cache-aside', 'Redis cache-aside', '≥ 2 ×', 2],
          ['bentocache', 'bentocache behind a grpc-js edge', '≥ 1 ×', 1],
          ['cacheable', 'cacheable behind a grpc-js edge', '≥ 1 ×', 1],
          ['an answer at once', 'a grpc-js edge that looks nowhere and answers at once', '', undefined],
        ] as const
      ).map(([kind, peer, target, limit]) => ({
        id: `zipf-${kind}`,
        work: 'the same: reads per CPU second of the serving process',
        unit: '/s',
        peer,
        target,
        bound: limit === undefined ? undefined : least(limit),
      })),
    ],
    load: () => import('./peers/zipf.ts'),
  },
  {
    name: 'callers',
    needs: ['ghz'],
    representative: true,
    rows: [
      {
        id: 'callers-failed',
        work: '200 concurrent callers, ghz: calls that failed',
        unit: '',
        peer: '',
        target: '0',
        bound: atMost(0),
      },
      {
        id: 'callers-p99',
        work: 'the same at half of that rate: p99',
        unit: 'ms',
        peer: BARE,
        target: '≤ 10 ms',
        bound: atMost(10),
      },
    ],
    load: () => import('./load/callers.ts'),
  },
  {
    name: 'flat',
    needs: ['h2load'],
    representative: true,
    rows: [
      {
        id: 'flat-entries',
        work: 'GetItem, hot, any of many entries: server CPU per call',
        unit: 'µs',
        peer: 'of 1,000 entries',
        target: '0.9 to 1.1 ×',
        bound: { of: 'ratio', least: 0.9, most: 1.1 },
      },
      {
        id: 'flat-connections',
        work: 'GetItem, hot, 200 calls at a time on 200 connections: server CPU per call',
        unit: 'µs',
        peer: '200 on 1 connection',
        target: '0.9 to 1.1 ×',
        bound: { of: 'ratio', least: 0.9, most: 1.1 },
      },
      {
        id: 'flat-connections-one-each',
        work: 'the same',
        unit: 'µs',
        peer: '1 on 1 connection',
        target: '',
        bound: undefined,
      },
    ],
    load: () => import('./rpc/flat.ts'),
  },
  {
    name: 'peak',
    needs: [],
    representative: true,
    rows: [
      {
        id: 'cold',
        work: 'Cold start until hot, calls at a fixed rate: p99',
        unit: 'ms',
        peer: 'at the start',
        target: '',
        bound: undefined,
      },
      {
        id: 'peak',
        work: 'Double the usual peak, caches on: p99',
        unit: 'ms',
        peer: 'caches off',
        target: '',
        bound: undefined,
      },
    ],
    load: () => import('./peers/peak.ts'),
  },
]
