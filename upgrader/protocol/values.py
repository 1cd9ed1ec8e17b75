# SPDX-License-Identifier: LGPL-2.1-or-later
"""Frozen values for what takeover shares with the rest: `dataclasses` alone takes as long to import
as all that takeover needs from the standard library."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Self, dataclass_transform
else:

    def dataclass_transform(**_):
        """Mark, for type checkers."""
        return lambda cls: cls


@dataclass_transform(frozen_default=True)
class Value:
    """A class with fields by annotation, as a frozen dataclass has them: made by position or by
    name, with defaults, compared field by field. Raises TypeError for fields that there are not."""

    _fields: ClassVar[tuple[str, ...]] = ()
    _defaults: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        cls._fields = tuple(cls.__annotations__)
        cls._defaults = {name: vars(cls)[name] for name in cls._fields if name in vars(cls)}

    def __init__(self, *values: Any, **named: Any) -> None:
        first = dict(zip(self._fields, values, strict=False))
        given = {**self._defaults, **first, **named}
        if len(first) < len(values) or first.keys() & named.keys() or {*given} != {*self._fields}:
            raise TypeError(f"{type(self).__name__} has the fields {', '.join(self._fields)}")
        self.__dict__.update(given)

    def replace(self, **changes: Any) -> Self:
        """The same value with other fields."""
        return type(self)(**{**self.__dict__, **changes})

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.__dict__ == self.__dict__

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__[name] for name in self._fields))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={self.__dict__[name]!r}" for name in self._fields)
        return f"{type(self).__name__}({fields})"

    if not TYPE_CHECKING:  # a type checker knows that it is frozen

        def __setattr__(self, name, value):
            raise AttributeError(f"{type(self).__name__} is frozen")

        __delattr__ = __setattr__
