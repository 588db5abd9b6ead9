"""ChunkLog gives back exactly what was put in, whatever was packed on the way."""

from hypothesis import given
from hypothesis import strategies as st

from loadstone.core.chunk_log import ChunkLog

chunks = st.lists(st.tuples(st.integers(0, 2**62), st.binary(min_size=1, max_size=6000)), max_size=40)


@given(chunks, st.booleans())
def test_what_was_put_in_comes_out(put: list[tuple[int, bytes]], seal: bool) -> None:
    log = ChunkLog()
    for t_ns, data in put:
        log.append(t_ns, data)
    if seal:
        log.seal()
    assert list(log) == put
    assert len(log) == len(put)
    assert log.body() == b"".join(data for _, data in put)
    assert (log.first_ns(), log.last_ns()) == ((put[0][0], put[-1][0]) if put else (0, 0))
