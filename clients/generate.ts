/** `npm run generate:clients`: the generated code of the Go and the Python client, where their toolchains are. */
import { generate, languages, NotHere, ROOT } from './toolchains.ts'

for (const language of languages) {
  try {
    language.prepare()
    generate(language, ROOT)
  } catch (error) {
    if (!(error instanceof NotHere)) throw error
    process.stderr.write(`clients/${language.name}: not generated: ${error.message}\n`)
    process.exitCode = 1
  }
}
