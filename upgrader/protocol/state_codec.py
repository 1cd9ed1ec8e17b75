# SPDX-License-Identifier: LGPL-2.1-or-later
"""Save and load states: their fields as bytes and back, by the versions that their classes declare."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from upgrader.errors import UnreadableState, UnsavableState
from upgrader.protocol.later import later
from upgrader.protocol.state import StateVersions, describe

if TYPE_CHECKING:
    import msgspec

    from upgrader.protocol import saved_state, state_shape, state_trial, table
    from upgrader.protocol.saved_state import SavedState
else:
    msgspec = later("msgspec", loading=True)
    saved_state = later("upgrader.protocol.saved_state", loading=True)
    state_shape = later("upgrader.protocol.state_shape", loading=True)
    state_trial = later("upgrader.protocol.state_trial")
    table = later("upgrader.protocol.table", loading=True)

T = TypeVar("T")
_CONVERTED = 0  # in place of the mark of a shape


def save(value: object) -> SavedState:
    """Encode a state; raises UnsavableState for a field that msgspec cannot encode."""
    d = describe(type(value))
    try:
        data = msgspec.msgpack.encode(value)
    except Exception as error:
        raise UnsavableState(d.item, state_trial.blame(value) or str(error)) from error
    return saved_state.SavedState(d.name, d.version, d.readable_from, data, shape=d.shape.mark)


def encode(value: object | None) -> bytes:
    """The fields of a state; nothing for None. Raises UnsavableState like `save`."""
    if value is None:
        return b""
    _described(type(value))
    try:
        return _encoder()(value)
    except Exception:
        return save(value).data  # which says why not


#: Thousands may be of one class, and clients wait.
_described: Callable[[type], StateVersions] = functools.cache(describe)


@functools.cache
def _encoder() -> Callable[[object], bytes]:
    """Looked up once: thousands of states may be encoded while clients wait."""
    return msgspec.msgpack.Encoder().encode


def convert_for(cls: type, saved: SavedState, reader: int | None) -> SavedState:
    """A state that `cls` has saved, as version `reader` of it wants it; if nobody knows who will
    read it (None), with all earlier forms beside.

    Raises UnsavableState for a converter that fails.
    """
    d = describe(cls)
    wanted = [v for v in sorted(d.backward, reverse=True) if reader is None or v >= reader]
    if not wanted:
        return saved
    forms: dict[int, bytes] = {}
    fields = msgspec.msgpack.decode(saved.data)
    for version in wanted:
        try:
            fields = d.backward[version](fields)
            if not isinstance(fields, dict):
                raise TypeError(f"returned {type(fields).__name__}, not a dict")
            forms[version] = msgspec.msgpack.encode(fields)
        except Exception as error:  # the author's converters raise what they like
            why = f"cannot be converted back to version {version}: {type(error).__name__}: {error}"
            raise UnsavableState(d.item, why) from error
    if reader is None:
        return msgspec.structs.replace(saved, earlier=forms)
    return saved_state.SavedState(
        d.name, wanted[-1], d.readable_from, forms[wanted[-1]], shape=_CONVERTED
    )


def header(cls: type) -> SavedState:
    """Name and versions of a state class, without data."""
    d = describe(cls)
    return saved_state.SavedState(d.name, d.version, d.readable_from, b"", shape=d.shape.mark)


def load(
    cls: type[T], saved: SavedState, fill: Callable[[T], tuple[str, ...]] | None = None
) -> tuple[T, tuple[str, ...]]:
    """Decode a saved state into `cls`; also returns the fields, at every depth, that `cls` does not
    know. `fill` puts tables into it that came apart, and returns such fields of those.

    Raises IncompatibleState where the versions cannot meet, UnreadableState where it is another
    state, where the fields do not decode, and where one is missing that no `since` explains; and what
    `fill` raises.
    """
    d = describe(cls)
    if saved.name != d.name:
        raise UnreadableState(d.item, f"the image has state {saved.name!r} in its place")
    d.check_readable(saved.version, saved.readable_from)
    version, data = _form_for(d, saved)
    unknown: tuple[str, ...] = ()
    with _readable(d, saved):
        if version < d.version:
            data = _to_version(d, version, data)
        value = d.decode(data)
        found = None
        if not (data is saved.data and saved.shape == d.shape.mark):
            found = d.shape.compare(data)
            unknown = found.unknown
            if found.missing:
                d.shape.complete(value)
    if found:
        old = saved.shape is msgspec.UNSET
        require_explained(d, saved.version, found.missing, version, old=old)
    if d.tables:
        if fill:
            unknown += fill(value)
        table.make(value, d.tables)
        with _readable(d, saved):
            table.finish(value, cls)
    return value, unknown


@contextlib.contextmanager
def _readable(d: StateVersions, saved: SavedState) -> Iterator[None]:
    """Raise UnreadableState for whatever is raised: the author's converters and `__post_init__` raise what
    they like."""
    try:
        yield
    except Exception as error:
        name = "" if isinstance(error, msgspec.MsgspecError) else f"{type(error).__name__}: "
        why = f"version {saved.version} does not decode: {name}{error}"
        raise UnreadableState(d.item, why) from error


def require_explained(
    d: StateVersions,
    saved: int,
    missing: Iterable[tuple[str, int | None]],
    version: int | None = None,
    *,
    old: bool = False,
) -> None:
    """Raise UnreadableState for fields, with the version since which each is there, that are missing
    in what version `saved` has saved, unless a `since` explains that. `version`: of what was made of
    it, if converters have run; `old`: version 0.1.0 of the library wrote it."""
    version = saved if version is None else version
    if unexplained := [path for path, first in missing if not _explained(d, version, first, old)]:
        raise UnreadableState(
            d.item,
            f"version {saved} has saved no {state_shape.name_some(unexplained)}, and version"
            f" {d.version} does not say why",
            remedy=_remedy(d, saved),
        )


def decoder(cls: type[T], header: SavedState) -> Callable[[bytes], T] | None:
    """What decodes many states that this very version of `cls` has saved, as `header` says of all of
    them; None for any other, which `load` must look at. `load` says why, if it raises."""
    d = describe(cls)
    mine = header.name, header.version, header.shape, header.earlier
    if mine != (d.name, d.version, d.shape.mark, msgspec.UNSET):
        return None
    return d.decode


def _form_for(d: StateVersions, saved: SavedState) -> tuple[int, bytes]:
    """The form of a saved state that is the next to what this program has, and its version."""
    if saved.version > d.version and saved.earlier:
        version = min((v for v in saved.earlier if d.version <= v), default=saved.version)
        if version < saved.version:
            return version, saved.earlier[version]
    return saved.version, saved.data


def _to_version(d: StateVersions, version: int, data: bytes) -> bytes:
    """The fields of a saved state after all converters that lie in between."""
    converters = {v: d.converters[v] for v in sorted(d.converters) if version <= v < d.version}
    if not converters:
        return data
    fields = msgspec.msgpack.decode(data, type=dict[str, Any])
    for v, converter in converters.items():
        fields = converter(fields)
        if not isinstance(fields, dict):
            raise TypeError(
                f"the converter from {v} has returned {type(fields).__name__}, not a dict"
            )
    # Back to bytes: only msgpack's own decoder turns each of them into what the class declares.
    return msgspec.msgpack.encode(fields)


def _explained(d: StateVersions, version: int, first: int | None, old: bool) -> bool:
    """Whether a field of `first` may be missing in what `version` has saved.

    `old`: version 0.1.0 of the library wrote it, and did not save a field at its default in a state
    that had been loaded without it.
    """
    if old:
        return first is not None or version == d.version
    return first is not None and version < first


def _remedy(d: StateVersions, version: int) -> str:
    """What makes a state with a missing field readable."""
    if version > d.version:
        return f"that version needs @upgrader.convert_back(..., {d.version}), or no readable_from="
    if version == d.version:
        return "raise its version, and declare a new field with upgrader.since()"
    return (
        f"declare a new field with upgrader.since({d.version}, default=...),"
        f" and what became of an old one with @upgrader.convert(..., {d.version - 1})"
    )
