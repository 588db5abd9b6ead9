"""From flags to a workload that the server is known to take."""

from dataclasses import dataclass

from loadstone.core.api.endpoint import BodyOptions, Endpoint
from loadstone.measure.calibrate import calibrate
from loadstone.measure.pictures import PictureTexts
from loadstone.measure.probe import Fetch, ProbeResult, Send, probe
from loadstone.measure.tokens import Tokenizer, texts_for
from loadstone.measure.workload import CustomWorkload, RandomWorkload, Workload, WorkloadSettings, load_rows


@dataclass(frozen=True)
class Prepared:
    workload: Workload
    probe: ProbeResult
    notes: tuple[str, ...]
    """Sentences that a person should read before the figures."""


async def prepare(
    send: Send,
    fetch: Fetch,
    endpoint: Endpoint,
    path: str,
    options: BodyOptions,
    settings: WorkloadSettings,
    *,
    base_url: str,
    tokenizer: Tokenizer | None = None,
    used_rows: int = 0,
) -> Prepared:
    """Read the data set, probe the server, calibrate the lengths.

    Raises UsageError before the server is asked anything, then what :func:`~loadstone.measure.probe.probe` raises.
    ``used_rows``: lines of a custom file that a resumed run has sent already.
    """
    rows = load_rows(settings.dataset_path or "", endpoint) if settings.dataset_name == "custom" else []
    probed = await probe(send, fetch, endpoint, path, options, base_url)
    if settings.dataset_name == "custom":
        custom = CustomWorkload(settings, rows, endpoint, path, probed.options, used_rows)
        return Prepared(custom, probed, probed.notes)
    if endpoint.name == "embed_image":
        pictures = PictureTexts(settings.seed)
        return Prepared(RandomWorkload(settings, pictures, endpoint, path, probed.options), probed, probed.notes)
    if tokenizer is not None:
        texts = texts_for(tokenizer, settings.seed, settings.prefix_len)
        return Prepared(RandomWorkload(settings, texts, endpoint, path, probed.options), probed, probed.notes)
    sized = await calibrate(
        send, endpoint, path, probed.options, settings.seed, settings.input_len, settings.prefix_len
    )
    workload = RandomWorkload(settings, sized.texts, endpoint, path, probed.options)
    return Prepared(workload, probed, (*probed.notes, *sized.notes))
