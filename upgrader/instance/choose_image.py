# SPDX-License-Identifier: LGPL-2.1-or-later
"""Choose which of the images that PID 1 has kept is loaded, and what becomes of the others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import count, takewhile

from upgrader.errors import ForeignError, RefusedError
from upgrader.instance import image_in_fd_store
from upgrader.instance.image_in_fd_store import SpreadImage
from upgrader.protocol.channel import ParkedChannel
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import identify
from upgrader.protocol.parameters import Parameters
from upgrader.protocol.status_text import Origin, Status
from upgrader.systemd.fdstore import FdStore, Stored, StoreName
from upgrader.systemd.listen_fds import Passed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from upgrader.instance.commit import LoadedInstance
    from upgrader.instance.interfaces import Closeable

_log = logging.getLogger("upgrader")


class ParkedImages:
    """All images that were passed to this process. `status` is that of an instance which loads none
    of them."""

    def __init__(
        self,
        parameters: Parameters,
        store: FdStore,
        channels: Sequence[Passed],
        stored: dict[StoreName, Fd],
        loaded: LoadedInstance,
        opened: list[Closeable],
    ) -> None:
        """`loaded` gets what is no image of ours, `opened` whatever must be closed should the instance
        refuse to load."""
        self._parameters = parameters
        self._store = store
        self._channels = channels
        self._stored = stored
        self._loaded = loaded
        self._opened = opened
        self.status = Status(1, Origin.COLD)

    def choose(self) -> ParkedChannel | SpreadImage | None:
        """The image to load, if any; raises RefusedError or ChannelBusy if it is not an image."""
        newest = self._newest()
        if newest and (reason := self._hopeless(newest)):
            self._set_aside(newest, reason)
            return None
        return newest

    def _newest(self) -> ParkedChannel | SpreadImage | None:
        """The newest image that is not spent; spent ones leave the store, older ones go aside."""
        waiting: list[ParkedChannel | SpreadImage] = [*image_in_fd_store.find(self._stored)]
        self._opened += waiting
        throw_away = not self._parameters.enabled or self._parameters.discard == "all"
        for item in self._channels:
            try:
                channel = ParkedChannel(item.fd.socket(), item.name)
            except OSError:
                self._set_foreign_aside(item.name, item.fd, f"it is {identify(item.fd)}")
                continue
            self._opened.append(channel)
            try:
                if channel.open():
                    self._add_further(channel)
                    waiting.append(channel)
                    continue
            except ForeignError as error:
                self._set_foreign_aside(item.name, channel.detach(), error.message)
                continue
            except RefusedError as error:
                if not throw_away:
                    raise
                _log.error("%s is thrown away: %s", item.name, error)
            channel.close()
            self._store.remove(item.name)
        # Of one generation, what was parked is newer than what was only insured.
        waiting.sort(key=lambda channel: (channel.generation, origin(channel) is Origin.RESTART))
        for older in waiting[:-1]:
            if origin(older) is Origin.INSURANCE:
                self._store.remove(older.name)
                older.spend()
            else:
                self._set_aside(older, f"generation {waiting[-1].generation} is newer")
        return waiting[-1] if waiting else None

    def _set_foreign_aside(self, text: str, fd: Fd, why: str) -> None:
        name = StoreName.parse(text)
        assert name
        self._opened.append(fd)
        self._loaded.set_aside(name, fd, why)

    def _add_further(self, channel: ParkedChannel) -> None:
        """Add the channels that go on where it is full."""
        first = StoreName.parse(channel.name)
        assert first
        names = map(first.further, count(1))
        for name in takewhile(self._stored.__contains__, names):
            channel.go_on(str(name), self._stored.pop(name))

    def _hopeless(self, channel: ParkedChannel | SpreadImage) -> str:
        """Why an image is not even tried; empty if it is."""
        if not self._parameters.enabled:
            return "UPGRADER=off"
        if self._parameters.discard in ("all", str(channel.generation)):
            return "UPGRADER_DISCARD is set"
        attempts = channel.count_attempt()
        if attempts >= self._parameters.load_attempts:
            return f"{attempts} attempts to load it have failed"
        return ""

    def _set_aside(self, channel: ParkedChannel | SpreadImage, reason: str) -> None:
        """Keep the image (state, not FDs) in the store under a name that says so."""
        aside = StoreName(Stored.ASIDE, str(channel.generation))
        for old in [n for n in self._stored if n.what is Stored.ASIDE and n.item.isdecimal()]:
            self._store.remove(old)
            del self._stored[old]
        # PID 1 stores no open file twice, under whatever name: this is the same memfd opened anew.
        with channel.image.reopen() as again:
            self._store.push(aside, again)
        self._store.remove(channel.name, *channel.others)
        channel.spend()
        _log.error(
            "image of generation %d is not loaded: %s; its connections are closed,"
            " its state is kept in the FD store as %s", channel.generation, reason, aside,
        )  # fmt: skip
        generation = max(self.status.generation, channel.generation + 1)
        self.status = Status(generation, Origin.COLD, set_aside=channel.generation)


def origin(image: ParkedChannel | SpreadImage) -> Origin:
    """Where an instance that loads it has got everything from."""
    name = StoreName.parse(image.name)
    insured = name is not None and name.what is Stored.INSURANCE
    return Origin.INSURANCE if insured else Origin.RESTART
