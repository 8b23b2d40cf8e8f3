/** A catalogue as a process of its own, with a product for every id. Prints its URL; ends with its parent. */
import { startCatalogue } from '../../src/embedded/catalogue.ts'

const catalogue = await startCatalogue({
  intercept: (request, response) => {
    const [, id] = /^\/products\/(\d+)$/.exec(request.url ?? '') ?? []
    if (id === undefined) return false
    const product = { id: Number(id), title: `product ${id}`, price: 9.5, category: 'things' }
    response.setHeader('content-type', 'application/json')
    response.end(JSON.stringify(product))
    return true
  },
})
console.log(catalogue.url)
process.stdin.resume().on('end', () => process.exit())
