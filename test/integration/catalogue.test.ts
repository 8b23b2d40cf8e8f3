import { expect, test } from 'vitest'
import { startCatalogue } from '../../src/embedded/catalogue.ts'

interface Product {
  readonly id: number
  readonly title: string
  readonly price: number
  readonly category: string
}

async function get<T>(url: string): Promise<T> {
  const response = await fetch(url)
  expect(response.status).toBe(200)
  expect(response.headers.get('content-type')).toMatch(/^application\/json/)
  return (await response.json()) as T
}

test('the bundled catalogue has twenty complete products in four categories', async () => {
  await using catalogue = await startCatalogue()
  const products = await get<Product[]>(`${catalogue.url}/products`)
  expect(products.map(({ id }) => id)).toEqual(Array.from({ length: 20 }, (_, index) => index + 1))
  for (const product of products) {
    expect(product).toEqual({
      id: product.id,
      title: expect.stringMatching(/./),
      price: expect.any(Number),
      description: expect.stringMatching(/./),
      category: expect.stringMatching(/./),
      image: expect.stringMatching(/^https:\/\//),
      rating: { rate: expect.any(Number), count: expect.any(Number) },
    })
    expect(await get(`${catalogue.url}/products/${product.id}`)).toEqual(product)
  }
  const categories = await get<string[]>(`${catalogue.url}/products/categories`)
  expect(categories).toHaveLength(4)
  for (const category of categories) {
    const some = await get<Product[]>(`${catalogue.url}/products/category/${encodeURIComponent(category)}`)
    expect(some).toEqual(products.filter((product) => product.category === category))
  }
})

test('a list can be cut and turned around', async () => {
  await using catalogue = await startCatalogue()
  const ids = async (query: string) =>
    (await get<Product[]>(`${catalogue.url}/products?${query}`)).map(({ id }) => id)
  expect(await ids('limit=3')).toEqual([1, 2, 3])
  expect(await ids('limit=2&sort=desc')).toEqual([20, 19])
  expect(await ids('limit=nonsense')).toHaveLength(20)
})

test('a product that is not there is status 200 and null, as at FakeStore', async () => {
  await using catalogue = await startCatalogue()
  for (const id of ['21', '0', '01', 'x', '%zz', 'constructor']) {
    expect(await get(`${catalogue.url}/products/${id}`), id).toBeNull()
  }
  expect(await get(`${catalogue.url}/products/category/none`)).toEqual([])
})

test('other paths and methods are refused', async () => {
  await using catalogue = await startCatalogue()
  expect((await fetch(`${catalogue.url}/carts`)).status).toBe(404)
  expect((await fetch(`${catalogue.url}/products/1/2`)).status).toBe(404)
  expect((await fetch(`${catalogue.url}/products`, { method: 'POST', body: '{}' })).status).toBe(405)
})

test('requests are counted by path', async () => {
  await using catalogue = await startCatalogue()
  await get(`${catalogue.url}/products/1`)
  await get(`${catalogue.url}/products/1?again`)
  await get(`${catalogue.url}/products/2`)
  expect(Object.fromEntries(catalogue.requests)).toEqual({ '/products/1': 2, '/products/2': 1 })
})

test('a port that is taken is an error, not a crash', async () => {
  await using catalogue = await startCatalogue()
  const port = Number(new URL(catalogue.url).port)
  await expect(startCatalogue({ port })).rejects.toThrow('EADDRINUSE')
})
