"""What a record of ours says, as a dictionary: classes with slots, compiled or not, are compared by identity."""

from typing import Any, TypeVar

T = TypeVar("T")


def fields(record: object) -> dict[str, Any]:
    """By the names of its slots."""
    names = getattr(type(record), "__mypyc_attrs__", None) or getattr(type(record), "__slots__", ())
    return {name: getattr(record, name) for name in names}


def plain(value: Any) -> Any:
    """The same with all records in it."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return {name: plain(item) for name, item in fields(value).items()} or value


def but(record: T, **changes: object) -> T:
    """A copy, for a class whose constructor takes what its slots are called."""
    return type(record)(**(fields(record) | changes))
