# SPDX-License-Identifier: LGPL-2.1-or-later
"""The TLS of one listener whose connections move: prepares an author's SSLContext for it."""

from __future__ import annotations

import hashlib
import resource
import ssl
import weakref
from contextvars import ContextVar
from typing import Any, cast

from upgrader.errors import DeclarationError
from upgrader.protocol.secret_memory import kind
from upgrader.tls.key_log import KeyLog
from upgrader.tls.moved import Moved
from upgrader.tls.tapped import Tapped


class Arrival:
    """A connection that a task hands to a loop: `moved` if it has moved here, and `early`: what has been
    read from its socket before TLS was there."""

    def __init__(self, moved: Moved | None) -> None:
        self.moved = moved
        self.early = b""
        self._taken = False

    def expect(self) -> None:
        """The loop asks the context for an SSLObject in a callback that has a copy of this task's
        context: it is this connection's."""
        _arriving.set(self)

    def take(self) -> bool:
        """Whether it is not taken yet: what its application begins has a copy as well."""
        taken, self._taken = self._taken, True
        return not taken


_arriving: ContextVar[Arrival] = ContextVar("upgrader.tls.arriving")
_NOBODY = "nobody is asked for a certificate"


class TlsListener:
    """What the connections of one listener have in common."""

    def __init__(self, context: ssl.SSLContext) -> None:
        """Have the connections of a context be tapped from now on. No process that holds their secrets
        leaves a core dump from here on. Raises DeclarationError for a context that has a key log or an
        SSLObject class of its own."""
        if context.sslobject_class is not ssl.SSLObject:
            made: Any = context.sslobject_class
            if not isinstance(made, _SslObjects) or not made.are_of(context):
                raise DeclarationError("UPGRADER_TLS", "the SSLContext has its own sslobject_class")
        else:
            # It is asked for one thing only, and need not be a class.
            context.sslobject_class = cast(Any, _SslObjects(context))
        self.context = context
        self.memory = kind()  #: in which secrets cross; found before there is a pause
        _, hard = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (0, hard))

    @property
    def trust(self) -> str:
        """What decides which client certificates are taken; empty if that cannot be compared with
        another process's: with a directory of authorities, a revocation list, or a trusted certificate
        that is none of an authority."""
        context = self.context
        if context.verify_mode is ssl.CERT_NONE:
            return _NOBODY
        stats = context.cert_store_stats()
        authorities = sorted(context.get_ca_certs(binary_form=True))
        if not authorities or stats["crl"] or stats["x509"] != len(authorities):
            return ""
        found = hashlib.sha256(f"{context.verify_mode} {context.verify_flags}".encode())
        for authority in authorities:
            found.update(hashlib.sha256(authority).digest())
        return found.hexdigest()


class _SslObjects:
    """Makes the SSLObjects of a context, in the place of its class."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = weakref.ref(context)  # which refers to this
        self._log = KeyLog(context)

    def are_of(self, context: ssl.SSLContext) -> bool:
        """Whether they were made for this context, and not for one that this is a copy of."""
        return self._context() is context

    def _create(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        *,
        context: ssl.SSLContext,
        **options: Any,
    ) -> ssl.SSLObject:
        """What `SSLContext.wrap_bio` calls."""
        arrival = _arriving.get(None)
        early = b""
        if arrival is not None and arrival.take():
            early = arrival.early
            if arrival.moved:
                arrival.moved.attach(context, incoming, outgoing, early)
                return arrival.moved
        return Tapped.begin(self._log, context, incoming, outgoing, early, **options)
