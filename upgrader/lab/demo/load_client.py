# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run the load client, a process of its own that reads orders on standard input and writes events to standard output.

It sends each request when it is due, checks what comes back, and says how long it took. It does not know how or when the
service is upgraded, except by orders.
"""

import asyncio
import contextlib
import gc
import itertools
import os
import resource
import sys
from collections.abc import Callable, Coroutine, Iterable

import msgspec

from upgrader.lab.demo.clients import (
    Client,
    HeldClient,
    KeepaliveClient,
    NewClient,
    SplitClient,
    StreamClient,
)
from upgrader.lab.demo.ledger import Ledger, Span, milliseconds
from upgrader.lab.demo.orders import (
    AnyOrder,
    Begin,
    EndOrder,
    Fatal,
    OrderEvent,
    Pause,
    Quiet,
    ReadyEvent,
    ResultEvent,
    Resume,
    Start,
    StopOrder,
    Window,
    line,
    order_decoder,
)

#: So many held connections are opened, or asked, at the same time.
BATCH = 50
#: Seconds that the first response of a new generation may take after the upgrade is said to be over.
NEW_CODE_WAIT = 5.0
#: Seconds between two looks at whether something has settled.
LOOK = 0.005


class Load:
    """All clients of one run."""

    def __init__(self, start: Start) -> None:
        self.start = start
        self.ledger = Ledger()
        self.loop = asyncio.get_running_loop()
        self.new: set[NewClient] = set()
        self.keepalive: list[KeepaliveClient] = []
        self.split: list[SplitClient] = []
        self.streams: list[StreamClient] = []
        self.held: list[HeldClient] = []
        self._numbers = itertools.count(1)
        self._turns = itertools.count()
        self._samples = 0
        self._running = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> ReadyEvent | Fatal:
        """Connect everything and start the load; return the answer to `Start`."""
        first = NewClient(self.ledger)
        first.ask(self._path(), self.loop.time())
        await self._connect([first])
        await self._settled([first])
        if self.ledger.losses:
            return Fatal(message=self.ledger.losses[0])
        self.held = [HeldClient(self.ledger) for _ in range(self.start.held)]
        for batch in _batches(self.held):
            await self._connect(batch)
            await self._ask_held(batch)
        self.keepalive = [KeepaliveClient(self.ledger) for _ in range(self.start.keepalive)]
        self.streams = [StreamClient(self.ledger) for _ in range(self.start.streams)]
        self.split = [SplitClient(self.ledger) for _ in range(self.start.split)]
        await self._connect([*self.keepalive, *self.split, *self.streams])
        for stream in self.streams:
            stream.ask("/stream", self.loop.time())
        await self._settled(self.streams)
        # With thousands of connections a collection takes tens of milliseconds, and would be seen as a stall.
        gc.freeze()
        gc.disable()
        self._running.set()
        self._spawn(self._every(self.start.rate, self._ask_new))
        self._spawn(
            self._every(self.start.keepalive * self.start.keepalive_rate, self._ask_keepalive)
        )
        self._spawn(self._watch())
        generation = self.ledger.generation
        version = self.ledger.versions[generation]
        return ReadyEvent(held=self.start.held, version=version, generation=generation)

    async def begin(self, order: Begin) -> None:
        """Begin a window: waits from `order.at` on belong to it."""
        self.ledger.span = Span(order.at, self.ledger.generation)
        self.split = [SplitClient(self.ledger) if client.lost else client for client in self.split]
        await self._connect(client for client in self.split if client.transport is None)
        for client in self.split:
            client.begin(self._path())

    async def end(self, order: EndOrder) -> Window:
        """Close the window once everything that was due in it is answered, and judge it."""
        span = self.ledger.span
        assert span is not None
        span.end = now = self.loop.time()
        if order.upgraded:
            await self._until(lambda: self.ledger.generation > span.generation, NEW_CODE_WAIT)
        for client in self.split:
            client.finish()
        await self._answered([*self.new, *self.keepalive], due=now)
        await self._settled(self.split)
        await self._chunk_after(now)
        await self._sample(order.sample)
        seen = [
            at for generation, at in self.ledger.first_seen.items() if generation > span.generation
        ]
        total = self._result()
        return Window(
            version=self.ledger.versions[self.ledger.generation],
            generation=self.ledger.generation,
            seconds=span.end - span.begin,
            stall_ms=milliseconds(span.stall),
            waits=span.waits,
            stream_gap_ms=milliseconds(span.gap),
            time_to_new_code_ms=milliseconds(min(seen) - span.begin) if seen else None,
            failed_requests=total.failed_requests,
            failed_keepalive=total.failed_keepalive,
            failed_split=total.failed_split,
            broken_streams=total.broken_streams,
            connections_lost=total.connections_lost,
            state_errors=total.state_errors,
        )

    async def pause(self) -> Quiet:
        """Ask nothing new until `resume`."""
        self._running.clear()
        await self._settled([*self.new, *self.keepalive])
        return Quiet()

    def resume(self) -> None:
        """Ask again; what was not asked meanwhile does not count as due."""
        self._running.set()

    async def stop(self) -> ResultEvent:
        """Ask every held connection once more, see every stream move once more, and close the books."""
        await self.pause()
        await self._sample(len(self.held))
        await self._chunk_after(self.loop.time())
        for task in self._tasks:
            task.cancel()
        self.ledger.close()
        return self._result()

    def _result(self) -> ResultEvent:
        return self.ledger.result(self.start.streams, self.start.held)

    def _path(self) -> str:
        return f"/{next(self._numbers)}"

    def _ask_new(self, due: float) -> None:
        client = NewClient(self.ledger)
        client.ask(self._path(), due)
        self.new.add(client)
        self._spawn(client.connect(self.start.host, self.start.port))

    def _ask_keepalive(self, due: float) -> None:
        turn = next(self._turns) % len(self.keepalive)
        if self.keepalive[turn].lost:
            self.keepalive[turn] = KeepaliveClient(self.ledger)
            self._spawn(self.keepalive[turn].connect(self.start.host, self.start.port))
        self.keepalive[turn].ask(self._path(), due)

    async def _ask_held(self, clients: Iterable[HeldClient]) -> None:
        asked = [client for client in clients if not client.lost]
        for client in asked:
            client.ask(self._path(), self.loop.time())
        await self._settled(asked)

    async def _sample(self, count: int) -> None:
        """Ask the next `count` held connections, in turn over all of them."""
        chosen = [
            self.held[(self._samples + i) % len(self.held)]
            for i in range(min(count, len(self.held)))
        ]
        self._samples += len(chosen)
        for batch in _batches(chosen):
            await self._ask_held(batch)

    async def _every(self, rate: float, ask: Callable[[float], None]) -> None:
        """Call `ask` with each moment at which a request is due, as soon as that moment has come."""
        if not rate:
            return
        due = self.loop.time()
        while True:
            if not self._running.is_set():
                await self._running.wait()
                due = self.loop.time()
            while due <= (now := self.loop.time()):
                self.ledger.lateness.append(now - due)
                ask(due)
                due += 1 / rate
            await asyncio.sleep(due - self.loop.time())

    async def _watch(self) -> None:
        """Give up on what is overdue, and forget the connections that are done."""
        while True:
            before = self.loop.time() - self.start.timeout
            for client in self._all():
                client.overdue(before)
            self.new = {client for client in self.new if not client.lost}
            await asyncio.sleep(min(0.25, self.start.timeout / 4))

    def _all(self) -> list[Client]:
        return [*self.new, *self.keepalive, *self.split, *self.streams, *self.held]

    async def _connect(self, clients: Iterable[Client]) -> None:
        await asyncio.gather(
            *(client.connect(self.start.host, self.start.port) for client in clients)
        )

    async def _settled(self, clients: Iterable[Client]) -> None:
        await self._answered(clients, due=self.loop.time())

    async def _answered(self, clients: Iterable[Client], due: float) -> None:
        """Wait until nothing that was due by then is outstanding; what takes too long is a loss."""
        waiting = list(clients)
        deadline = self.loop.time() + self.start.timeout
        while waiting := [c for c in waiting if c.outstanding and c.outstanding[0].due <= due]:
            if self.loop.time() > deadline:
                for client in waiting:
                    client.overdue(float("inf"))
            await asyncio.sleep(LOOK)

    async def _chunk_after(self, moment: float) -> None:
        """Wait until every stream has moved since; one that does not in time is broken."""
        await self._until(
            lambda: all(s.lost or s.track.chunk_at > moment for s in self.streams),
            self.start.timeout,
        )
        for stream in self.streams:
            stream.overdue(moment)

    async def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = self.loop.time() + seconds
        while not condition() and self.loop.time() < deadline:
            await asyncio.sleep(LOOK)

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _batches(items: list[HeldClient]) -> Iterable[list[HeldClient]]:
    return (items[i : i + BATCH] for i in range(0, len(items), BATCH))


async def follow(orders: asyncio.StreamReader, answer: Callable[[OrderEvent], None]) -> int:
    """Carry out one order after the other; returns the exit code."""
    load: Load | None = None
    while text := await orders.readline():
        order: AnyOrder = order_decoder.decode(text)
        match order, load:
            case Start(), None:
                load = Load(order)
                opened = await load.open()
                answer(opened)
                if isinstance(opened, Fatal):
                    return 1
            case Begin(), Load():
                await load.begin(order)
            case EndOrder(), Load():
                answer(await load.end(order))
            case Pause(), Load():
                answer(await load.pause())
            case Resume(), Load():
                load.resume()
            case StopOrder(), Load():
                answer(await load.stop())
                return 0
            case _:
                answer(Fatal(message=f"the order {type(order).__name__} makes no sense here"))
                return 1
    return 1


async def serve() -> int:
    """Read orders from standard input, write events to standard output."""
    orders = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)

    def answer(event: OrderEvent) -> None:
        sys.stdout.buffer.write(line(event))
        sys.stdout.buffer.flush()

    try:
        return await follow(orders, answer)
    except msgspec.MsgspecError as error:
        answer(Fatal(message=f"not an order: {error}"))
        return 1


def main() -> int:
    """Run the process."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Clients are elsewhere: what an upgrade takes of this machine's processors is for the service
    # to notice, not for who measures it.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    with contextlib.suppress(KeyboardInterrupt):
        return asyncio.run(serve())
    return 130


if __name__ == "__main__":
    sys.exit(main())
