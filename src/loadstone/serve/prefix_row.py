"""Texts side by side in one row, in which what several of them begin with stands once. Pure.

Theory of operation. No token of a causal model depends on what follows it, so a beginning that texts share has the same
hidden states in each of them. Rerank's prompts share much: all of them the system's words, most the instruction, those
of one request the query as well. So texts are put into groups that begin alike, and these into groups that do so for
longer, as far as that is worth it; a token attends to what stands before it in its own text, wherever that is.

Attention is computed block by block: a shared beginning is one, and texts of a group that share no more are together in
one, masked from each other, because many small computations take longer than a larger one of which some is masked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

_WORTH_SHARING = 8
"""Tokens from which on a beginning is put apart."""
_BLOCK_TOKENS = 512
"""No text is added to a block that would be longer then."""

Tokens = list[int]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Block:
    """The tokens from ``begin`` up to ``end``, which attend to each other and to those in ``shared`` ranges."""

    begin: int
    end: int
    shared: tuple[Span, ...]
    """All before ``begin``, in the order of the text."""


@dataclass(slots=True)
class Row:
    """Some texts."""

    ids: Tokens = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    """Of each token in its text."""
    owners: list[int] = field(default_factory=list)
    """For each token the text that it belongs to, counted from 1, or 0: all that attend to its block."""
    blocks: list[Block] = field(default_factory=list)
    """Of all tokens, in their order."""
    lasts: list[int] = field(default_factory=list)
    """Where the last token of each text stands."""

    def add(self, ids: Tokens, first_position: int, owner: int) -> None:
        """Put tokens at the end."""
        self.ids += ids
        self.positions += range(first_position, first_position + len(ids))
        self.owners += [owner] * len(ids)

    def close_block(self, begin: int, shared: tuple[Span, ...]) -> None:
        """All from ``begin`` on is one."""
        self.blocks.append(Block(begin, len(self.ids), shared))

    def sees(self, token: int, other: int) -> bool:
        """Of two tokens that one block brings together: whether ``token`` attends to ``other``."""
        return other <= token and self.owners[other] in (0, self.owners[token])


@dataclass(frozen=True, slots=True)
class _Group:
    """Texts, in order, whose first ``begun`` tokens are in the row already, at ``shared``."""

    texts: list[int]
    begun: int
    shared: tuple[Span, ...]


def row_of(texts: Sequence[Tokens]) -> Row:
    """One row of these texts, each of at least one token."""
    row = Row(lasts=[0] * len(texts))
    groups = [_Group(sorted(range(len(texts)), key=texts.__getitem__), 0, ())]
    while groups:
        group = _with_beginning(row, texts, groups.pop())
        alone = []
        for members in _alike(texts, group):
            if len(members) > 1:
                groups.append(_Group(members, group.begun, group.shared))
            else:
                alone += members
        _add_rest(row, texts, _Group(alone, group.begun, group.shared))
    return row


def _with_beginning(row: Row, texts: Sequence[Tokens], group: _Group) -> _Group:
    """With what all of them go on with put into the row, where that is worth it."""
    head = _common(texts[group.texts[0]], texts[group.texts[-1]], group.begun) if len(group.texts) > 1 else 0
    if head < group.begun + _WORTH_SHARING:
        return group
    begin = len(row.ids)
    row.add(texts[group.texts[0]][group.begun : head], group.begun, 0)
    row.close_block(begin, group.shared)
    return _Group(group.texts, head, (*group.shared, (begin, len(row.ids))))


def _alike(texts: Sequence[Tokens], group: _Group) -> Iterator[list[int]]:
    """Those that go on alike, part by part."""
    part, number = [0], 0
    for one, other in pairwise(group.texts):
        number += _common(texts[one], texts[other], group.begun) < group.begun + _WORTH_SHARING
        part.append(number)
    for _, members in groupby(zip(part, group.texts, strict=True), key=lambda member: member[0]):
        yield [text for _, text in members]


def _add_rest(row: Row, texts: Sequence[Tokens], group: _Group) -> None:
    """What each text has for itself."""
    begin = len(row.ids)
    for text in group.texts:
        own = texts[text][group.begun :]
        if begin < len(row.ids) and len(row.ids) - begin + len(own) > _BLOCK_TOKENS:
            row.close_block(begin, group.shared)
            begin = len(row.ids)
        row.add(own, group.begun, text + 1)
        row.lasts[text] = len(row.ids) - 1
    if begin < len(row.ids):
        row.close_block(begin, group.shared)


def _common(one: Tokens, other: Tokens, begun: int) -> int:
    """With how many tokens both begin, of which ``begun`` are known; less than either has, as each keeps its last."""
    longest = min(len(one), len(other)) - 1
    return next((place for place in range(begun, longest) if one[place] != other[place]), longest)
