"""SigLIP2: texts and images into one space.

The text tower was trained on 64 tokens, padding included, and reads the last of them whatever it is: a text is always
padded to that length, on the tokenizer's own side. An image is cut into at most ``max_num_patches`` patches of its own
shape (NaFlex) and padded to that number, so that every image costs the same.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, AutoTokenizer, Siglip2ImageProcessorPil

from loadstone.core.engine import EngineError
from loadstone.core.errors import UsageError
from loadstone.serve.embed_asks import ImageItem, Item, TextItem
from loadstone.serve.embed_vectors import Embedding, embeddings
from loadstone.serve.engines.loading import loading, quantize, text_limit
from loadstone.serve.engines.text_tokens import TextTokens, TokenisedText, padded
from loadstone.serve.images import ImageBounds, decode

_SAMPLE_TEXT = TextItem("a photo of nothing", "")


@dataclass(frozen=True, slots=True)
class Patches:
    """An image as the model takes it."""

    tensors: dict[str, torch.Tensor]
    """What the image processor makes of one image, each (1, …)."""
    param: str
    tokens: int
    truncated: bool = False


class SiglipEngine:
    """``core.engine.Engine`` from texts and images to embeddings, on the GPU where there is one; loaded and warm when
    made.

    ``max_model_len`` is the longest text in tokens, None the model's own limit. Raises UsageError.
    """

    takes_images = True
    pads = True

    def __init__(
        self, model: str, bounds: ImageBounds, *, quantization: str = "none", max_model_len: int | None = None
    ) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with loading(model):
            self._model = AutoModel.from_pretrained(model).to(self._device).eval()
            self._processor = Siglip2ImageProcessorPil.from_pretrained(model)
            tokenizer = AutoTokenizer.from_pretrained(model)
        if self._model.config.model_type != "siglip2":
            raise UsageError(
                f"--model {model} is a {self._model.config.model_type} model; --engine siglip runs siglip2"
            )
        quantize(self._model, quantization)
        text = self._model.config.text_config
        self._length: int = text.max_position_embeddings
        self.max_tokens = text_limit(model, self._length, max_model_len)
        self._bounds = bounds
        self._padding, self._side = int(tokenizer.pad_token_id or 0), tokenizer.padding_side
        self._masked = "attention_mask" in tokenizer.model_input_names
        self._tokens = TextTokens(tokenizer, self.max_tokens, text.vocab_size)
        self.dim = self._warm_up(model)

    def _warm_up(self, model: str) -> int:
        """Gives the length of the vectors."""
        text, image = self.run([self.prepare(_SAMPLE_TEXT), self.prepare(ImageItem(_sample_png(), ""))])
        if isinstance(text, EngineError) or isinstance(image, EngineError):
            raise UsageError(f"--model {model} gives vectors with NaN in them: its weights are damaged")
        return text.vector.size

    def prepare(self, item: Item) -> TokenisedText | Patches:
        if isinstance(item, TextItem):
            return self._tokens.tokenise(item)
        image = decode(item.data, self._bounds, item.param)
        features = self._processor(images=[image], return_tensors="pt")
        return Patches(dict(features), item.param, features["pixel_values"].shape[1])

    def tokens(self, prepared: TokenisedText | Patches) -> int:
        return prepared.tokens if isinstance(prepared, Patches) else self._length

    def run(self, batch: Sequence[TokenisedText | Patches]) -> list[Embedding | EngineError]:
        texts = [item for item in batch if isinstance(item, TokenisedText)]
        images = [item for item in batch if isinstance(item, Patches)]
        with torch.inference_mode():
            of_texts = iter(embeddings(_vectors(self._of_texts(texts)), texts) if texts else ())
            of_images = iter(embeddings(_vectors(self._of_images(images)), images) if images else ())
        return [next(of_texts if isinstance(item, TokenisedText) else of_images) for item in batch]

    def _of_texts(self, texts: Sequence[TokenisedText]) -> Any:
        ids, mask = padded([text.ids for text in texts], self._padding, self._side, self._length)
        features = {"input_ids": ids, "attention_mask": mask} if self._masked else {"input_ids": ids}
        there = {name: torch.from_numpy(array).to(self._device) for name, array in features.items()}
        return self._model.get_text_features(**there)

    def _of_images(self, images: Sequence[Patches]) -> Any:
        there = {
            name: torch.cat([image.tensors[name] for image in images]).to(self._device) for name in images[0].tensors
        }
        return self._model.get_image_features(**there)

    def __repr__(self) -> str:
        return f"<SiglipEngine on {self._device}, {self.dim} dimensions>"


def _vectors(output: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    vectors: np.ndarray[Any, np.dtype[np.float32]] = output.pooler_output.float().cpu().numpy()
    return vectors


def _sample_png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "white").save(file, "PNG")
    return file.getvalue()
