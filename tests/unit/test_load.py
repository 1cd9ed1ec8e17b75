# SPDX-License-Identifier: LGPL-2.1-or-later
"""The load client against small services with one deliberate fault each: it must count exactly that fault."""

import asyncio
import contextlib
import sys
import time
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from upgrader.lab.demo.ledger import Ledger, RequestKind
from upgrader.lab.demo.load_client import Load
from upgrader.lab.demo.orders import (
    Begin,
    EndOrder,
    Fatal,
    OrderEvent,
    ReadyEvent,
    ResultEvent,
    Start,
    StopOrder,
    Window,
    event_decoder,
    line,
)
from upgrader.lab.demo.responses import BadResponseError, Chunk, Response, ResponseReader

#: Each run goes on until the service has counted so many requests.
ENOUGH = 80


@dataclass(eq=False)
class Session:
    """One connection, as the service sees it."""

    number: int
    writer: asyncio.StreamWriter
    requests: int = 0
    sequence: int = 0
    checksum: int = 0
    close: bool = False


@dataclass
class Service:
    """An honest service; a faulty one overrides one method and counts its faults."""

    version: str = "1"
    generation: int = 1
    requests: int = 0
    streamed: int = 0
    faults: int = 0
    port: int = 0
    sessions: list[Session] = field(default_factory=list)

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = Session(len(self.sessions), writer)
        self.sessions.append(session)
        with contextlib.suppress(
            asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError
        ):
            while not session.close:
                request = await reader.readuntil(b"\r\n\r\n")
                session.close = b"Connection: close" in request
                await self.handle(session, request.split()[1].decode())
                await writer.drain()
        writer.close()

    async def handle(self, session: Session, path: str) -> None:
        self.count(session)
        if path == "/stream":
            session.writer.write(self.head(session, "Transfer-Encoding: chunked"))
            await self.stream(session)
        else:
            body = f"You asked for {path} here.\n".encode()
            session.writer.write(self.answer(session, body))

    def count(self, session: Session) -> None:
        self.requests += 1
        session.requests += 1

    def head(self, session: Session, *more: str) -> bytes:
        lines = [
            "HTTP/1.1 200 OK",
            f"Service-Version: {self.version}",
            f"Service-Generation: {self.generation}",
            f"Service-Requests: {self.requests}",
            f"Connection-Requests: {session.requests}",
            *([f"Service-Streamed: {self.streamed}"] if self.version == "2" else []),
            *more,
        ]
        return "\r\n".join([*lines, "", ""]).encode()

    def answer(self, session: Session, body: bytes) -> bytes:
        sizes = f"Content-Length: {len(body)}", f"Body-Crc32: {zlib.crc32(body):08x}"
        return self.head(session, *sizes) + body

    async def stream(self, session: Session) -> None:
        while True:
            self.streamed += 1
            self.send(session, self.chunk(session))
            await session.writer.drain()
            await asyncio.sleep(0.01)

    def chunk(self, session: Session) -> bytes:
        session.sequence += 1
        text = b"%d %d\n" % (session.sequence, self.generation)
        session.checksum = zlib.crc32(text, session.checksum)
        return b"%s %08x\n" % (text.strip(), session.checksum)

    def send(self, session: Session, chunk: bytes) -> None:
        session.writer.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))

    def fault(self, wanted: bool, *, once: bool = True) -> bool:
        """Whether the fault is to be committed now."""
        if wanted and not (once and self.faults):
            self.faults += 1
            return True
        return False


@contextlib.asynccontextmanager
async def loaded(service: Service, **options: float) -> AsyncIterator[Load]:
    """The service with the load client running against it."""
    server = await asyncio.start_server(service.talk, "127.0.0.1", 0)
    service.port = server.sockets[0].getsockname()[1]
    sizes = {
        "rate": 200.0,
        "keepalive": 4,
        "keepalive_rate": 10.0,
        "streams": 3,
        "held": 8,
        "timeout": 20.0,
    }
    load = Load(Start(host="127.0.0.1", port=service.port, **(sizes | options)))  # type: ignore[arg-type]
    try:
        assert isinstance(await load.open(), ReadyEvent)
        yield load
    finally:
        for client in load._all():
            client.leave()
        server.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


def run(service: Service, **options: float) -> ResultEvent:
    """The result of a run in which the service had the chance to be faulty."""

    async def body() -> ResultEvent:
        async with loaded(service, **options) as load:
            await until(lambda: service.requests >= ENOUGH)
            return await load.stop()

    return asyncio.run(body())


def losses(result: ResultEvent) -> dict[str, int]:
    """What was lost: only the counts that are not 0."""
    counts = {
        "requests": result.failed_requests,
        "keepalive": result.failed_keepalive,
        "split": result.failed_split,
        "streams": result.broken_streams,
        "held": result.connections_lost,
        "state": result.state_errors,
    }
    return {name: count for name, count in counts.items() if count}


class TestHonest:
    def test_an_honest_service_loses_nothing(self) -> None:
        """Against a service without a fault every request is counted and every loss is 0."""
        service = Service()
        result = run(service)

        assert losses(result) == {}
        assert result.requests + result.keepalive_requests + 3 + 2 * 8 == service.requests
        assert result.requests > 0
        assert result.keepalive_requests > 0
        assert result.chunks > 3
        assert result.losses == []

    def test_a_new_generation_is_timed(self) -> None:
        """time_to_new_code runs from the moment given by the orchestrator to the first new response."""

        async def body() -> tuple[Window, float, ResultEvent]:
            service = Service()
            async with loaded(service) as load:
                await load.begin(Begin(at=time.monotonic()))
                asked = time.monotonic()
                await until(lambda: service.requests >= ENOUGH)
                service.generation, service.version, service.streamed = 2, "2", 0
                switched = time.monotonic()
                return await load.end(EndOrder(sample=4)), switched - asked, await load.stop()

        window, elapsed, result = asyncio.run(body())

        assert losses(result) == {}
        assert (window.version, window.generation) == ("2", 2)
        assert window.time_to_new_code_ms is not None
        assert window.time_to_new_code_ms >= elapsed * 1000 - 1

    def test_no_new_generation_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An upgrade after which the old generation answers has no time to new code."""
        monkeypatch.setattr("upgrader.lab.demo.load_client.NEW_CODE_WAIT", 0.05)

        async def body() -> Window:
            async with loaded(Service()) as load:
                await load.begin(Begin(at=time.monotonic()))
                return await load.end(EndOrder())

        assert asyncio.run(body()).time_to_new_code_ms is None


class ResetsNew(Service):
    async def handle(self, session: Session, path: str) -> None:
        if self.fault(session.close and session.number % 10 == 5, once=False):
            session.writer.transport.abort()
        else:
            await super().handle(session, path)


class ClosesShort(Service):
    async def handle(self, session: Session, path: str) -> None:
        if self.fault(session.close and session.number % 10 == 5, once=False):
            self.count(session)
            session.writer.write(
                self.answer(session, f"You asked for {path} here.\n".encode())[:-5]
            )
        else:
            await super().handle(session, path)


class FailsOnce(Service):
    def answer(self, session: Session, body: bytes) -> bytes:
        response = super().answer(session, body)
        if self.fault(session.close and self.requests >= 40):
            return self.spoil(response)
        return response

    def spoil(self, response: bytes) -> bytes:
        return response.replace(b"200 OK", b"500 Internal Server Error")


class AnswersAnother(FailsOnce):
    def answer(self, session: Session, body: bytes) -> bytes:
        wrong = self.fault(session.close and self.requests >= 40)
        return Service.answer(self, session, b"You asked for /else here.\n" if wrong else body)


class SpoilsBody(FailsOnce):
    def spoil(self, response: bytes) -> bytes:
        return response.replace(b"here.", b"hare.")


class LacksCounter(FailsOnce):
    def spoil(self, response: bytes) -> bytes:
        return response.replace(b"Service-Requests", b"X-Requests")


class NeverAnswers(Service):
    async def handle(self, session: Session, path: str) -> None:
        if self.fault(session.close and self.requests >= 40):
            session.close = False
        else:
            await super().handle(session, path)


@pytest.mark.parametrize(
    "service",
    [ResetsNew, ClosesShort, FailsOnce, AnswersAnother, SpoilsBody],
    ids=lambda kind: kind.__name__,
)
def test_failed_requests(service: type[Service]) -> None:
    """A reset, a short body, a wrong status, another's body and a wrong checksum are one failed request each."""
    faulty = service()
    result = run(faulty)

    assert faulty.faults > 0
    assert losses(result) == {"requests": faulty.faults}
    assert result.losses


def test_an_answer_without_its_number_has_failed() -> None:
    """A response without the service's counter has failed; that the number is missing is not a second loss."""
    assert losses(run(LacksCounter())) == {"requests": 1}


def test_silence_is_a_failure() -> None:
    """A request that is never answered has failed once its time is over."""
    assert losses(run(NeverAnswers(), timeout=0.5)) == {"requests": 1}


def test_refused_connections_fail() -> None:
    """While nobody listens every new connection is a failed request, and the connections there are go on."""

    async def body() -> tuple[int, ResultEvent]:
        service = Service()
        async with loaded(service) as load:
            load.start = Start(host="127.0.0.1", port=1)
            before = load.ledger.asked[RequestKind.NEW]
            await until(lambda: load.ledger.failed[RequestKind.NEW] >= 5)
            load.start = Start(host="127.0.0.1", port=service.port, held=8)
            result = await load.stop()
            return before, result

    _, result = asyncio.run(body())

    assert set(losses(result)) == {"requests"}
    assert "could not connect" in result.losses[0]


class ClosesKeepalive(Service):
    def is_keepalive(self, session: Session) -> bool:
        return not session.close and session.number > 8 and session.requests == 1

    async def handle(self, session: Session, path: str) -> None:
        await super().handle(session, path)
        if self.fault(self.is_keepalive(session)):
            session.close = True


class ResetsKeepalive(ClosesKeepalive):
    async def handle(self, session: Session, path: str) -> None:
        if self.fault(self.is_keepalive(session)):
            session.writer.transport.abort()
        else:
            await Service.handle(self, session, path)


@pytest.mark.parametrize(
    "service", [ClosesKeepalive, ResetsKeepalive], ids=lambda kind: kind.__name__
)
def test_keepalive_is_one_connection(service: type[Service]) -> None:
    """A keep-alive connection that has to be opened again is a failure, whether or not it was idle."""
    result = run(service(), keepalive_rate=5.0)

    assert losses(result) == {"keepalive": 1}


def upgraded(service: Service) -> ResultEvent:
    """The result of a run with one upgrade in it."""

    async def body() -> ResultEvent:
        async with loaded(service) as load:
            await load.begin(Begin(at=time.monotonic()))
            await until(lambda: service.requests >= ENOUGH)
            service.generation += 1
            await load.end(EndOrder())
            return await load.stop()

    return asyncio.run(body())


class ClosesHalf(Service):
    def count(self, session: Session) -> None:
        super().count(session)
        if self.requests == ENOUGH - 5:
            # The only old connections of which nothing whole has come are those with half a request.
            next(old for old in self.sessions[:20] if not old.requests).writer.close()


def test_split_requests() -> None:
    """A request of which half is sent before an upgrade and half after is answered once, or has failed."""
    assert losses(upgraded(ClosesHalf())) == {"split": 1}

    result = upgraded(Service())
    assert losses(result) == {}
    assert result.split_requests == 4


class RepeatsChunk(Service):
    def send(self, session: Session, chunk: bytes) -> None:
        super().send(session, chunk)
        if self.fault(session.sequence == 3):
            super().send(session, chunk)


class SkipsChunk(Service):
    def send(self, session: Session, chunk: bytes) -> None:
        if not self.fault(session.sequence == 3):
            super().send(session, chunk)


class ForgetsChecksum(Service):
    def chunk(self, session: Session) -> bytes:
        if self.fault(session.sequence == 3):
            session.checksum = 0
        return super().chunk(session)


class EndsStream(Service):
    def send(self, session: Session, chunk: bytes) -> None:
        super().send(session, b"" if self.fault(session.sequence == 3) else chunk)


class ResetsStream(Service):
    def send(self, session: Session, chunk: bytes) -> None:
        if self.fault(session.sequence == 3):
            session.writer.transport.abort()
        else:
            super().send(session, chunk)


class FallsSilent(Service):
    async def stream(self, session: Session) -> None:
        if self.fault(wanted=True):
            self.send(session, self.chunk(session))
            await asyncio.Event().wait()
        await super().stream(session)


@pytest.mark.parametrize(
    "service",
    [RepeatsChunk, SkipsChunk, ForgetsChecksum, EndsStream, ResetsStream, FallsSilent],
    ids=lambda kind: kind.__name__,
)
def test_broken_streams(service: type[Service]) -> None:
    """A repeat, a gap, a lost checksum, an end, a reset and silence break exactly the stream they happen to."""
    assert losses(run(service(), timeout=2.0)) == {"streams": 1}


class ClosesHeld(Service):
    def count(self, session: Session) -> None:
        super().count(session)
        if self.requests == 40:
            for idle in self.sessions[2:4]:
                idle.writer.close()


class ForgetsHeld(Service):
    async def handle(self, session: Session, path: str) -> None:
        if not self.fault(session.number == 5 and session.requests == 1):
            await super().handle(session, path)


def test_held_connections_are_watched() -> None:
    """Held connections that the service closes are lost, each once, though nothing was asked of them."""
    assert losses(run(ClosesHeld())) == {"held": 2}


def test_held_connections_must_answer() -> None:
    """A held connection that is open and does not answer is lost."""
    assert losses(run(ForgetsHeld(), timeout=1.0)) == {"held": 1}


class CountsTwice(Service):
    def count(self, session: Session) -> None:
        super().count(session)
        self.requests += self.fault(self.requests == 40)


class ForgetsOne(Service):
    def count(self, session: Session) -> None:
        super().count(session)
        self.requests -= self.fault(self.requests == 40)


class ForgetsSession(Service):
    def count(self, session: Session) -> None:
        if self.fault(session.number == 5 and session.requests == 1):
            session.requests = 0
        super().count(session)


class SaysTwoVersions(Service):
    def head(self, session: Session, *more: str) -> bytes:
        head = super().head(session, *more)
        return (
            head.replace(b"Version: 1", b"Version: 0") if self.fault(self.requests == 40) else head
        )


class CarriesNewField(Service):
    def head(self, session: Session, *more: str) -> bytes:
        if self.fault(self.requests == 40):
            more = "Service-Streamed: 7", *more
        return super().head(session, *more)


@pytest.mark.parametrize(
    "service",
    [CountsTwice, ForgetsOne, ForgetsSession, SaysTwoVersions, CarriesNewField],
    ids=lambda kind: kind.__name__,
)
def test_state_errors(service: type[Service]) -> None:
    """A counter that jumps or stands, a forgotten session, two versions at once, a field of the other version: one each."""
    assert losses(run(service())) == {"state": 1}


@pytest.mark.parametrize(("streamed", "errors"), [(0, {}), (1000, {"state": 1})])
def test_the_new_field_starts_anew(streamed: int, errors: dict[str, int]) -> None:
    """The field that version 2 adds counts from the upgrade on; a value from elsewhere is a state error."""

    async def body() -> ResultEvent:
        service = Service()
        async with loaded(service) as load:
            await until(lambda: service.requests >= ENOUGH // 2)
            service.generation, service.version, service.streamed = 2, "2", streamed
            await until(lambda: service.requests >= ENOUGH)
            return await load.stop()

    assert losses(asyncio.run(body())) == errors


def test_generations_go_forward() -> None:
    """An answer by an older generation than before, on one connection, is a state error."""

    class Returns(Service):
        def count(self, session: Session) -> None:
            super().count(session)
            self.generation = 1 if self.fault(session.number == 5 and session.requests == 2) else 2

    assert losses(run(Returns())) == {"state": 1}


class Stalls(Service):
    """Nobody is answered while the gate is closed, though everything is taken."""

    gate: asyncio.Event

    async def handle(self, session: Session, path: str) -> None:
        await self.gate.wait()
        await super().handle(session, path)

    def send(self, session: Session, chunk: bytes) -> None:
        if self.gate.is_set():
            super().send(session, chunk)


def test_a_stall_is_as_long_as_it_was() -> None:
    """The stall counts from when a request was due, and belongs to the upgrade in which it happened."""

    async def body() -> tuple[float, Window, Window, ResultEvent]:
        service = Stalls()
        service.gate = asyncio.Event()
        service.gate.set()
        async with loaded(service, streams=0) as load:
            await until(lambda: service.requests >= ENOUGH)
            await load.begin(Begin(at=time.monotonic()))
            service.gate.clear()
            closed = time.monotonic()
            asked = load.ledger.asked[RequestKind.NEW]
            await until(lambda: load.ledger.asked[RequestKind.NEW] >= asked + 60)
            elapsed = time.monotonic() - closed
            service.gate.set()
            service.generation = 2
            first = await load.end(EndOrder())
            await load.begin(Begin(at=time.monotonic()))
            service.generation = 3
            second = await load.end(EndOrder())
            return elapsed * 1000, first, second, await load.stop()

    elapsed, first, second, result = asyncio.run(body())

    assert losses(result) == {}
    assert elapsed >= 200
    assert first.stall_ms >= elapsed - 60
    assert second.stall_ms < first.stall_ms


def test_as_a_process() -> None:
    """The process takes orders and gives events as lines of JSON, and ends with the result."""

    async def body() -> tuple[list[OrderEvent], int]:
        service = Service()
        server = await asyncio.start_server(service.talk, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "upgrader.lab.demo.load_client",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(line(Start(host="127.0.0.1", port=port, rate=100, streams=2, held=3)))
        events: list[OrderEvent] = [event_decoder.decode(await process.stdout.readline())]
        await until(lambda: service.requests >= ENOUGH)
        process.stdin.write(line(StopOrder()))
        events.append(event_decoder.decode(await process.stdout.readline()))
        code = await process.wait()
        server.close()
        return events, code

    (ready, result), code = asyncio.run(body())

    assert code == 0
    assert ready == ReadyEvent(held=3, version="1", generation=1)
    assert isinstance(result, ResultEvent)
    assert losses(result) == {}
    assert result.requests > 0


def test_nobody_there_is_said_at_once() -> None:
    """A load client that cannot reach the service says so and does not pretend to run."""

    async def body() -> OrderEvent:
        return await Load(Start(host="127.0.0.1", port=1)).open()

    answer = asyncio.run(body())

    assert isinstance(answer, Fatal)
    assert "could not connect" in answer.message


class TestResponses:
    def test_any_portions(self) -> None:
        """The same responses come out in whatever portions the bytes arrive."""
        data = b"HTTP/1.1 200 OK\r\nA: b\r\nContent-Length: 3\r\n\r\nabc"
        data += b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nx y\r\n0\r\n\r\n"
        reader = ResponseReader()
        events = [event for byte in data for event in reader.feed(bytes([byte]))]

        assert events == list(ResponseReader().feed(data))
        assert [type(event) for event in events] == [Response, Response, Chunk, Chunk]

    @pytest.mark.parametrize(
        "data",
        [
            b"SSH-2.0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nx\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n\r\n",
            b"a" * 20_000,
        ],
    )
    def test_what_is_no_response_is_refused(self, data: bytes) -> None:
        """Bytes that are not a response with a length are refused, and never waited out."""
        with pytest.raises(BadResponseError):
            list(ResponseReader().feed(data))

    def test_an_end_in_the_middle_is_refused(self) -> None:
        """A connection that ends within a response is a short response."""
        reader = ResponseReader()
        list(reader.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab"))
        with pytest.raises(BadResponseError, match="into a response"):
            reader.feed_eof()


def test_an_empty_ledger_has_a_result() -> None:
    """Nothing asked is nothing lost."""
    assert losses(Ledger().result(streams=0, held=0)) == {}
