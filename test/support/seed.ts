import fc from 'fast-check'

/**
 * The seed of the property tests, printed so that a failure can be repeated. Fixed unless the environment variable
 * FC_SEED is a number, or `random` for a new one.
 */
export const seed = chosenSeed(process.env)
fc.configureGlobal({ seed })
console.info(`fast-check seed: FC_SEED=${seed}`)

function chosenSeed({ FC_SEED }: NodeJS.ProcessEnv): number {
  if (FC_SEED === undefined || FC_SEED === '') return 20_260_401
  if (FC_SEED === 'random') return Math.floor(Math.random() * 2 ** 31)
  const number = Number(FC_SEED)
  if (!Number.isInteger(number))
    throw new Error(`FC_SEED should be a whole number or "random", got ${FC_SEED}`)
  return number
}
