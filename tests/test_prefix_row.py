"""Texts in one row: each token sees what stands before it in its own text, in order, and nothing else."""

from hypothesis import example, given
from hypothesis import strategies as st

from loadstone.serve.prefix_row import Row, row_of

SYSTEM, QUERY, OTHER = list(range(100, 130)), list(range(200, 212)), list(range(300, 315))


def seen(row: Row) -> dict[int, list[int]]:
    """For each token of the row those that it attends to, as the attention is computed."""
    return {
        token: [
            other
            for begin, end in (*block.shared, (block.begin, block.end))
            for other in range(begin, end)
            if row.sees(token, other)
        ]
        for block in row.blocks
        for token in range(block.begin, block.end)
    }


def check(texts: list[list[int]]) -> Row:
    row = row_of(texts)
    attended = seen(row)
    assert sorted(attended) == list(range(len(row.ids))), "each token once"
    for text, last in zip(texts, row.lasts, strict=True):
        assert [row.ids[token] for token in attended[last]] == text
        for place, token in enumerate(attended[last]):
            assert row.positions[token] == place
            assert attended[token] == attended[last][: place + 1]
    assert len(set(row.lasts)) == len(texts), "a last token of its own"
    return row


texts = st.lists(
    st.builds(
        lambda root, head, own: root + head + own,
        st.sampled_from([SYSTEM, SYSTEM[:9], SYSTEM[:3], []]),
        st.sampled_from([QUERY, OTHER, QUERY[:4], []]),
        st.lists(st.integers(0, 2), min_size=1, max_size=30) | st.just([7] * 300),
    ),
    min_size=1,
    max_size=12,
)


@given(texts)
@example([[1]])
@example([[1], [1]])
@example([SYSTEM, SYSTEM, SYSTEM[:9]])
@example([SYSTEM + [7] * 300 + [at] for at in range(5)])
@example([SYSTEM + QUERY + [at] * 300 for at in range(5)])
def test_each_text_is_seen_as_if_it_were_alone(given_texts: list[list[int]]) -> None:
    check(given_texts)


def test_what_texts_begin_with_stands_once() -> None:
    documents = [[place] * 10 for place in range(8)]
    row = check([SYSTEM + head + document for document in documents for head in (QUERY, OTHER)])
    assert len(row.ids) == len(SYSTEM) + len(QUERY) + len(OTHER) + 2 * 8 * 10
    assert len(row.blocks) == 5, "what all share, each query, and its documents together"


def test_groups_within_groups_share_what_they_can() -> None:
    tasks = [list(range(400, 410)), list(range(500, 510))]
    documents = [[place] * 10 for place in range(4)]
    row = check(
        [SYSTEM + task + head + document for task in tasks for head in (QUERY, OTHER) for document in documents]
    )
    assert len(row.ids) == 30 + 2 * 10 + 2 * (12 + 15) + 4 * 4 * 10


def test_texts_that_share_nothing_go_together() -> None:
    row = check([[place] * 10 for place in range(20)])
    assert (len(row.ids), len(row.blocks)) == (200, 1)


def test_a_block_is_bounded_but_for_a_long_text() -> None:
    row = check([SYSTEM + [place] * 200 for place in range(6)] + [SYSTEM + [7] * 1000])
    assert [block.end - block.begin for block in row.blocks] == [30, 400, 400, 400, 1000]
