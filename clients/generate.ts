/** `npm run generate:clients`: the generated code of the Go and the Python client, where their toolchains are. */
import { generate, languages, MINUTES_10, NotHere, ROOT } from './toolchains.ts'

for (const language of languages) {
  try {
    language.prepare(MINUTES_10)
    language.preparePlugins(MINUTES_10)
    generate(language, ROOT)
  } catch (error) {
    if (!(error instanceof NotHere)) throw error
    process.stderr.write(`clients/${language.name}: not generated: ${error.message}\n`)
    process.exitCode = 1
  }
}
