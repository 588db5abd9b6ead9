"""What a simulated server is like: one frozen ``Profile``, and a dict of named ones.

One engine step takes ``base_s + per_decode_seq_s·decodes + per_prefill_token_s·prefill + kv_token_s·resident``
seconds. With N ≥ 2 slots always full, P prompt and T output tokens, and nothing that caps the batch, a request lives
for T + 1 steps (it waits for the step under way, is read in one, and is decoded in T − 1), so throughput is
X = N / (a + b·N) with a = (T + 1)·base_s and b = (T − 1)·per_decode_seq_s + P·per_prefill_token_s.
"""

from dataclasses import dataclass, replace

from loadstone.core.errors import UsageError

MODEL = "loadstone-sim"
"""The name every simulated server serves its model under."""


@dataclass(frozen=True)
class Profile:
    """A simulated model server. Times in seconds, lengths in tokens; ``None`` means no bound."""

    name: str
    base_s: float
    per_decode_seq_s: float = 0.0
    per_prefill_token_s: float = 0.0
    kv_token_s: float = 0.0
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int = 16
    num_kv_blocks: int = 100_000
    max_waiting: int | None = None
    """Requests beyond ``max_num_seqs`` that may wait; one more is refused."""
    stream_interval: int = 1
    """Tokens merged into one streamed chunk after the first, as vLLM's ``--stream-interval``."""
    default_output_tokens: int = 128
    """Where a request names none; also the length that the profile's line is quoted for, with 512 prompt tokens."""
    step_cv: float = 0.0
    """Coefficient of variation of a lognormal factor of mean 1 on each step's time."""
    length_cv: float = 0.0
    """Above 0 (and below 1) replies end by themselves: a beta-distributed share, mean 1/2, of the tokens asked for."""
    pair_factor: float = 1.0
    """Step-time factor while exactly two requests run."""
    pace: tuple[tuple[float, float], ...] = ()
    """(seconds since the first request, step-time factor from then on), ascending: cold starts, changes of speed."""
    refuse_beyond: int | None = None
    """503 at once for a request that would be one more than this in flight."""
    hang_beyond: int | None = None
    """A request that would be one more than this being served is accepted and never answered."""
    error_rate: float = 0.0
    """Share of requests answered 500 at once."""
    hang_rate: float = 0.0
    """Share of requests accepted and never answered."""
    work_outlives_client: bool = False
    """A client that leaves cancels nothing: its work goes on and takes its place."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "num_kv_blocks", "stream_interval"):
            if getattr(self, name) < 1:
                raise UsageError(f"profile {self.name}: {name} must be at least 1, not {getattr(self, name)}")
        if self.base_s <= 0:
            raise UsageError(f"profile {self.name}: base_s must be above 0, not {self.base_s}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise UsageError(
                f"profile {self.name}: max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}), or a full batch could not decode one token each"
            )
        if not 0 <= self.length_cv < 1:
            raise UsageError(f"profile {self.name}: length_cv must lie in [0, 1), not {self.length_cv}")

    @property
    def quiet(self) -> bool:
        """Nothing in it is drawn at random."""
        return not (self.step_cv or self.length_cv or self.error_rate or self.hang_rate)

    def step_s(self, decodes: int, prefill_tokens: int, resident_tokens: int) -> float:
        """Mean time of one step, before the factors for pace, pairs and noise."""
        return (
            self.base_s
            + self.per_decode_seq_s * decodes
            + self.per_prefill_token_s * prefill_tokens
            + self.kv_token_s * resident_tokens
        )

    def with_overrides(self, **overrides: int | None) -> "Profile":
        """A copy with the given fields replaced; ``None`` keeps a field. Raises UsageError where they don't fit."""
        given = {name: value for name, value in overrides.items() if value is not None}
        return replace(self, **given)  # type: ignore[arg-type]


_SHARP = Profile("sharp-knee", base_s=0.020, max_num_seqs=32)
_SOFT = Profile("soft-knee", base_s=0.010, per_decode_seq_s=0.000_25, max_num_seqs=1024)
_TTFT = Profile("ttft-queue", base_s=0.080, max_num_seqs=60)

QUIET: tuple[Profile, ...] = (
    Profile("narrow", base_s=0.015, max_num_seqs=5),
    _SHARP,
    _SOFT,
    Profile("wide", base_s=0.008, per_decode_seq_s=0.000_03, max_num_seqs=2048),
    Profile("prefill-knee", base_s=0.008, per_decode_seq_s=0.000_05, per_prefill_token_s=0.000_03, max_num_seqs=512),
    _TTFT,
    Profile("kv-bound", base_s=0.020, per_decode_seq_s=0.000_1, num_kv_blocks=1_900),
    Profile("refusing", base_s=0.012, per_decode_seq_s=0.000_05, max_num_seqs=512, refuse_beyond=100),
    Profile("short-queue", base_s=0.010, per_decode_seq_s=0.000_02, max_num_seqs=150, max_waiting=5),
)
"""Nothing random: every search should land within its resolution."""

NOISY: tuple[Profile, ...] = (
    replace(_SHARP, name="noisy-sharp", step_cv=0.5, length_cv=0.5),
    replace(_SOFT, name="noisy-soft", step_cv=0.5, length_cv=0.5),
    replace(_TTFT, name="noisy-ttft", base_s=0.160, step_cv=0.5, length_cv=0.5),
)
"""Service times with a coefficient of variation of 0.5."""

MISBEHAVING: tuple[Profile, ...] = (
    replace(_SHARP, name="stray-errors", error_rate=0.02),
    replace(_SHARP, name="broken", error_rate=0.10),
    replace(_SHARP, name="hanging", hang_rate=0.001),
    Profile("hang-beyond", base_s=0.012, per_decode_seq_s=0.000_05, max_num_seqs=512, hang_beyond=40),
    replace(_SHARP, name="outliving", max_waiting=4, work_outlives_client=True),
    replace(_SHARP, name="cold-start", pace=((0.0, 8.0), (20.0, 1.0))),
    replace(_SOFT, name="dip-at-two", pair_factor=2.2),
    replace(_SOFT, name="slowing", pace=((0.0, 1.0), (300.0, 1.5))),
    Profile("preempting", base_s=0.015, per_decode_seq_s=0.000_05, num_kv_blocks=700, kv_token_s=2e-7),
)
"""What real servers do to a search."""

PROFILES: dict[str, Profile] = {profile.name: profile for profile in (*QUIET, *NOISY, *MISBEHAVING)}


def named(name: str) -> Profile:
    """The profile of that name. Raises UsageError, which lists them all."""
    if name not in PROFILES:
        raise UsageError(f"no profile is called {name!r}; there are {', '.join(PROFILES)}")
    return PROFILES[name]
