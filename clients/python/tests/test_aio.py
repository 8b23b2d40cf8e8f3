from __future__ import annotations

import asyncio
import time
import unittest

import itemcache
from itemcache import Item, Tls, aio
from itemcache.v1.item_cache_pb2 import ListItemsRequest
from tests.servers import servers
from tests.test_client import PATIENCE, Following, nobody_answered


def setUpModule() -> None:
    # Here, since they take longer than an event loop should be kept waiting.
    servers()


class AsyncClientTest(unittest.IsolatedAsyncioTestCase):
    def connect(self) -> aio.Client:
        client = aio.connect(servers().targets, tenant=self.id(), timeout=PATIENCE)
        self.addAsyncCleanup(client.close)
        return client

    async def write(self, client: aio.Client, title: str) -> int:
        """Change an item until that has succeeded, and return the revision of it."""
        end = time.monotonic() + 60
        while True:
            try:
                item = Item(id="x", title=title)
                return (await client.update(item, allow_missing=True, request_id=f"write-{title}")).revision
            except itemcache.ItemCacheError as error:
                if not nobody_answered(error) or time.monotonic() > end:
                    raise
                await asyncio.sleep(0.05)

    async def test_a_client_reads_what_it_writes(self) -> None:
        client = self.connect()
        await client.create(Item(id="lamp", title="Lamp"))
        updated = await client.update(Item(id="lamp", title="Brass lamp"), fields=["title"])
        read = await client.get("lamp", min_revision=updated.revision)
        assert read.item is not None
        self.assertEqual(read.item.title, "Brass lamp")
        self.assertGreaterEqual(read.cache.as_of, updated.revision)
        await client.invalidate(ids=["lamp"])
        revision = await client.delete("lamp")
        with self.assertRaises(itemcache.NotFoundError) as absent:
            await client.get("lamp", min_revision=revision)
        self.assertEqual((absent.exception.id, absent.exception.reason), ("lamp", "ITEM_NOT_FOUND"))
        page = await client.call(client.stub.ListItems, ListItemsRequest())
        self.assertEqual(len(page.items), 0)

    async def test_get_many_answers_any_number_of_ids_in_their_order(self) -> None:
        client = self.connect()
        revision = (await client.create(Item(id="one", title="One"))).revision
        ids = [*(f"absent-{i}" for i in range(2200)), "one"]
        results = await client.get_many(ids, min_revision=revision)
        self.assertEqual(list(results), ids)
        self.assertEqual(results["one"].item.title if results["one"].item else None, "One")
        self.assertIsInstance(results["absent-0"].error, itemcache.NotFoundError)
        with self.assertRaises(itemcache.InvalidArgumentError):
            await client.get_many([*ids, ""])

    async def test_tls_and_a_token_open_the_way_to_the_tokens_tenant(self) -> None:
        secure = servers().secure

        async def token() -> str:
            return secure["writer"]

        tls = Tls(ca=secure["ca"].encode())
        async with aio.connect(secure["target"], tls=tls, token=token, timeout=PATIENCE) as client:
            await client.create(Item(id="mine-async"))
        async with aio.connect(secure["target"], tls=tls, token="wrong", timeout=PATIENCE) as client:
            with self.assertRaises(itemcache.UnauthenticatedError):
                await client.get("mine-async")

    async def test_a_watch_survives_the_death_of_its_servers_in_order_and_each_revision_once(self) -> None:
        client = self.connect()
        following = Following(self, iter(()))
        watch = client.watch(heartbeat=0.1)

        async def until(revision: int) -> None:
            while following.last < revision:
                following.take(await watch.__anext__())

        async def do(command: str) -> None:
            await asyncio.get_running_loop().run_in_executor(None, servers().do, command)

        while following.last == 0:
            following.take(await watch.__anext__())
        await until(await self.write(client, "both live"))
        await do("kill 0")
        await until(await self.write(client, "only the second lives"))
        await do("start 0")
        await do("kill 1")
        await until(await self.write(client, "only the first lives"))
        self.assertGreater(following.resumed, 0)
        await do("start 1")
        # Whatever is written while nobody reads comes when somebody does.
        for i in range(20):
            await self.write(client, f"number {i}")
        await until(await self.write(client, "the last"))

    async def test_a_watch_ends_with_its_task_or_its_client(self) -> None:
        client = self.connect()
        started = asyncio.Event()

        async def follow() -> None:
            async for message in client.watch(heartbeat=60):
                if isinstance(message, itemcache.Started):
                    started.set()

        task = asyncio.create_task(follow())
        await started.wait()
        task.cancel()
        with self.assertRaises(asyncio.CancelledError):
            await task
        started.clear()
        task = asyncio.create_task(follow())
        await started.wait()
        await client.close()
        with self.assertRaises(itemcache.CancelledError):
            await task
        with self.assertRaises(itemcache.CancelledError):
            await client.get("x")
        with self.assertRaises(itemcache.OutOfRangeError):
            async for _ in self.connect().watch(resume_after=1 << 60):
                pass
