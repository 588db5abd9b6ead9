"""A chat model on transformers' continuous batching: the engine of a replica without vLLM and without a GGUF file.

Theory of operation. The manager of transformers generates on a thread of its own and puts an output on one queue for
each token of each request; a second thread blocks on that queue and hands what it holds to the event loop, all at once.
The cache is reserved beforehand for ``max_num_seqs`` replies of full length, so that no reply is ever thrown out half
way to make room for another; what comes beyond waits inside the manager, in order. A manager that dies takes the
process with it: its supervisor starts another, and the reason stands in the log.
"""

import asyncio
import importlib
import importlib.util
import itertools
import math
import os
import signal
import sys
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

from loadstone.core.engine import EngineError
from loadstone.core.errors import UsageError
from loadstone.core.refusals import BadAskError
from loadstone.serve.chat_asks import Sampling
from loadstone.serve.engines.loading import loading
from loadstone.serve.engines.transformers_sampling import Nucleus, Temperature

_DEFAULT_MODEL_LEN = 4096
"""Where the model could do more: room for it is reserved for each of the replies that run at once."""
_PAGE_TOKENS = 64
_DEATH_WATCH_S = 0.5


@dataclass(frozen=True)
class Room:
    """How much is generated at once."""

    max_num_seqs: int = 4
    max_num_batched_tokens: int = 1024
    """Tokens of one step: those of prompts, and one for each reply under way."""
    max_model_len: int | None = None
    """Tokens of a prompt and its reply together; the model's own, at most 4096, where none is given."""

    def pages(self, max_model_len: int) -> int:
        """Pages of the cache."""
        return self.max_num_seqs * math.ceil(max_model_len / _PAGE_TOKENS)


def load_engine(model: str, room: Room, *, int8: bool) -> "TransformersChat":
    """Load a checkpoint onto the GPU where there is one, else the CPU. Raises UsageError where it cannot be had."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"quantization_config": _int8(device), "device_map": device} if int8 else {}
    with loading(model):
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto", **options)
    if not int8:
        loaded = loaded.to(device)
    return TransformersChat(loaded, tokenizer, room)


def _int8(device: str) -> object:
    """Weights in 8 bits: bitsandbytes' on a GPU, torchao's on the CPU. Raises UsageError where that is missing.

    Activations stay as they are: quantised as well, a CPU takes the prompt in faster but says each token more slowly.
    """
    package = "bitsandbytes" if device == "cuda" else "torchao"
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"--quantization int8 needs the {package} package here: pip install {package}")
    if device == "cuda":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    torchao = importlib.import_module("torchao.quantization")
    return transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())


class TransformersChat:
    """``serve.chat.TextEngine`` over one model."""

    def __init__(self, model: Any, tokenizer: Any, room: Room) -> None:
        """Raises UsageError where ``room`` does not fit the model or the memory."""
        self._model = model
        self._tokenizer = tokenizer
        self._room = room
        self.max_model_len = _model_len(model, room)
        own = model.generation_config
        self.default_sampling = Sampling(_or(own.temperature, 1.0), _or(own.top_p, 1.0))
        self.end_tokens = _end_tokens(own, tokenizer)
        self._manager = self._make_manager(own.top_k)
        self._open: dict[str, asyncio.Queue[Any]] = {}
        self._generated = 0
        self._names = map(str, itertools.count())
        self._reader = threading.Thread(target=self._read, name="outputs", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = False

    def _make_manager(self, top_k: int | None) -> Any:
        # Temperature and nucleus of each request need processors of the batch, which are made for values that do
        # something only; then ours take the place of them.
        generation = GenerationConfig(do_sample=True, temperature=0.5, top_p=0.5, eos_token_id=[*self.end_tokens])
        room = ContinuousBatchingConfig(
            page_size=_PAGE_TOKENS,
            num_blocks=self._room.pages(self.max_model_len),
            max_batch_tokens=self._room.max_num_batched_tokens,
            max_requests_per_batch=self._room.max_num_seqs,
            per_request_processors=True,
            safety_margin=0.0,
        )
        manager = self._model.init_continuous_batching(generation_config=generation, continuous_batching_config=room)
        processors = manager.logit_processor.logits_processor
        likeliest = [transformers.TopKLogitsWarper(top_k)] if top_k else []
        processors[:] = [Temperature(processors[0]), *likeliest, Nucleus(processors[1])]
        try:
            manager.warmup()
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise UsageError(
                f"{self._room.max_num_seqs} replies of {self.max_model_len} tokens do not fit into the memory; "
                "lower --max-num-seqs or --max-model-len"
            ) from error
        return manager

    async def start(self) -> None:
        """Begin to generate; on the event loop that asks for replies."""
        self._loop = asyncio.get_running_loop()
        self._manager.start()
        self._reader.start()

    async def stop(self) -> None:
        """End the threads; what is under way fails."""
        self._stopping = True
        await asyncio.to_thread(self._manager.stop, block=True, hard_stop=True)
        await asyncio.to_thread(self._reader.join)

    def tokens_of(self, prompt: Any, template_options: Mapping[str, Any]) -> list[int]:
        """Tokenise a prompt. Raises BadAskError."""
        if isinstance(prompt, str):
            tokens: list[int] = self._tokenizer(prompt)["input_ids"]
        elif isinstance(prompt[0], dict):
            tokens = self._chat_tokens(prompt, template_options)
        else:
            tokens = prompt
            if not all(0 <= token < self._model.config.get_text_config().vocab_size for token in tokens):
                raise BadAskError("prompt holds a token id that this model does not have", "prompt")
        if not tokens:
            raise BadAskError("prompt holds no token", "prompt")
        return tokens

    def _chat_tokens(self, messages: list[dict[str, str]], options: Mapping[str, Any]) -> list[int]:
        if self._tokenizer.chat_template is None:
            raise BadAskError("this model has no chat template; /v1/completions takes plain text", "messages")
        try:
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
        except (jinja2.TemplateError, TypeError) as error:
            raise BadAskError(f"the model's chat template refuses the messages: {error}", "messages") from error
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, without that of special tokens."""
        text: str = self._tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    async def generate(
        self, prompt: list[int], max_tokens: int, sampling: Sampling, ignore_eos: bool
    ) -> AsyncGenerator[list[int]]:
        """New tokens, as they come. Closing it frees its place. Raises EngineError."""
        name = next(self._names)
        outputs = self._open[name] = asyncio.Queue()
        told, finished = 0, False
        try:
            taken = self._manager.add_request(
                prompt,
                request_id=name,
                max_new_tokens=max_tokens,
                streaming=True,
                eos_token_id=-1 if ignore_eos else [*self.end_tokens],
                temperature=sampling.temperature,
                top_p=sampling.top_p,
            )
            if taken is None:
                raise EngineError(self.failure() or "it is being stopped")
            while not finished:
                output = await outputs.get()
                finished = output.is_finished()
                if output.error is not None:
                    raise EngineError(output.error)
                tokens, told = output.generated_tokens[told:], len(output.generated_tokens)
                yield tokens
        finally:
            del self._open[name]
            if not finished:
                self._manager.cancel_request(name)

    def failure(self) -> str | None:
        """Why nothing can be generated any more, or None."""
        return None if self._manager.is_running() else "the thread that generates has ended; see the log"

    def health(self) -> dict[str, Any]:
        """The settings in force and the requests under way."""
        return {
            "engine": "transformers",
            "device": str(self._model.device),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "quantization": _quantization(self._model),
            "max_num_seqs": self._room.max_num_seqs,
            "max_num_batched_tokens": self._room.max_num_batched_tokens,
            "max_model_len": self.max_model_len,
            "torch_threads": torch.get_num_threads(),
            "requests": len(self._open),
            "generated_tokens": self._generated,
        }

    def _read(self) -> None:
        """Hand outputs to the event loop until the manager has ended and told all."""
        alive = True
        while alive:
            alive = self._manager.is_running()
            output = self._manager.get_result(timeout=_DEATH_WATCH_S)
            while output is not None:
                outputs = [output]
                while (output := self._manager.get_result(timeout=0)) is not None:
                    outputs.append(output)
                self._hand_over(outputs)
        if not self._stopping:
            print("loadstone: the thread that generates has ended; so does this replica", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)

    def _hand_over(self, outputs: Sequence[Any]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._deliver, outputs)

    def _deliver(self, outputs: Sequence[Any]) -> None:
        self._generated += len(outputs)
        for output in outputs:
            waiting = self._open.get(output.request_id)
            if waiting is not None:
                waiting.put_nowait(output)

    def __repr__(self) -> str:
        return f"<TransformersChat {len(self._open)} requests, {self._room.max_num_seqs} at once>"


def _model_len(model: Any, room: Room) -> int:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room.max_model_len is None:
        return min(limit or _DEFAULT_MODEL_LEN, _DEFAULT_MODEL_LEN)
    if limit is not None and room.max_model_len > limit:
        raise UsageError(f"--max-model-len {room.max_model_len}: this model was made for {limit} tokens; lower it")
    return room.max_model_len


def _end_tokens(generation: Any, tokenizer: Any) -> frozenset[int]:
    told = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
    if told is None:
        return frozenset()
    return frozenset([told] if isinstance(told, int) else told)


def _quantization(model: Any) -> str | None:
    config = getattr(model.config, "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
