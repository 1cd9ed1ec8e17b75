# SPDX-License-Identifier: LGPL-2.1-or-later
"""What may be in a `Table`: nothing that can be changed in place, because nobody would see that."""

from msgspec import inspect

_NEVER_CHANGE = (
    inspect.NoneType,
    inspect.BoolType,
    inspect.IntType,
    inspect.FloatType,
    inspect.StrType,
    inspect.BytesType,
    inspect.DateTimeType,
    inspect.DateType,
    inspect.TimeType,
    inspect.TimeDeltaType,
    inspect.DecimalType,
    inspect.UUIDType,
    inspect.EnumType,
    inspect.LiteralType,
)


def find_changeable(info: inspect.Type, path: str) -> str:
    """What in a type, which is at `path`, can be changed in place, in words; empty if nothing can."""
    return _find(info, path, set())


def _find(info: inspect.Type, path: str, seen: set[type]) -> str:
    below: list[tuple[str, inspect.Type]]
    match info:
        case inspect.Metadata(type=inner):
            below = [("", inner)]
        case inspect.UnionType(types=types):
            below = [("", each) for each in types]
        case inspect.FrozenSetType(item_type=item) | inspect.VarTupleType(item_type=item):
            below = [("[...]", item)]
        case inspect.TupleType(item_types=items):
            below = [(f"[{place}]", item) for place, item in enumerate(items)]
        case inspect.NamedTupleType(fields=fields):
            below = [(f".{field.name}", field.type) for field in fields]
        case inspect.StructType() | inspect.DataclassType():
            cls = getattr(info.cls, "__origin__", info.cls)
            if not _is_frozen(cls):
                return f"{path} is a {cls.__qualname__}, which is not frozen"
            if cls in seen:  # it may hold itself
                return ""
            seen.add(cls)
            below = [(f".{field.name}", field.type) for field in info.fields]
        case _ if isinstance(info, _NEVER_CHANGE):
            return ""
        case _:
            kind = type(info).__name__.removesuffix("Type").lower()
            return f"{path} is a {kind}, which can be changed in place"
    return next((why for step, part in below if (why := _find(part, path + step, seen))), "")


def _is_frozen(cls: type) -> bool:
    config = getattr(cls, "__struct_config__", None) or getattr(cls, "__dataclass_params__", None)
    return bool(getattr(config, "frozen", False))
