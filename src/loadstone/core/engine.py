"""What a model service asks of an engine: prepare an item (tokenise, decode), then run prepared items in batches."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

Item_contra = TypeVar("Item_contra", contravariant=True)
Prepared = TypeVar("Prepared")
Result_co = TypeVar("Result_co", covariant=True)


class EngineError(Exception):
    """The engine failed on an item that was well-formed: a crash in the model, NaN in its output. ``param`` names the
    field of the request that it came from, where that is known."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Engine(Protocol[Item_contra, Prepared, Result_co]):
    """A model that computes a batch at once. Batches run one at a time, all of them on the same thread."""

    def prepare(self, item: Item_contra) -> Prepared:
        """Tokenise or decode one item; called on several threads at once. Raises BadAskError for what cannot be
        used, which then concerns this item alone."""
        ...

    def tokens(self, prepared: Prepared) -> int:
        """The length of a prepared item in tokens (patches, for an image), at least 1: a batch is padded to its
        longest."""
        ...

    def run(self, batch: Sequence[Prepared]) -> Sequence[Result_co | EngineError]:
        """Results in the order of ``batch``; an EngineError in the place of one that has none, such as a vector with
        NaN in it. An exception fails the whole batch."""
        ...
