# SPDX-License-Identifier: LGPL-2.1-or-later
"""A state as it travels in an image."""

import msgspec


class SavedState(msgspec.Struct, frozen=True):
    """One state as it travels in an image: `data` is a msgpack map of the fields.

    `earlier`: the fields as earlier versions had them, by version, where those are others.
    `tables`: for each table that is apart, the checksums of its pieces, in their order; in `data`, it
    is empty. `shape`: `Shape.mark` of the class that saved it, 0 for converted fields. Version 0.1.0 of the
    library wrote neither.
    """

    name: str
    version: int
    readable_from: int
    data: bytes
    earlier: dict[int, bytes] | msgspec.UnsetType = msgspec.UNSET
    shape: int | msgspec.UnsetType = msgspec.UNSET
    tables: dict[str, list[int]] | msgspec.UnsetType = msgspec.UNSET
