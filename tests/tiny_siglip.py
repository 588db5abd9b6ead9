"""A tiny random SigLIP2, and pictures for it. For environments with torch and transformers."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Siglip2Config, Siglip2ImageProcessorPil, Siglip2Model, Siglip2Tokenizer

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def make_siglip(folder: Path, **tokenizer: Any) -> str:
    """Write the checkpoint, always the same, with a letter a token, as the published ones are saved."""
    torch.manual_seed(0)
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS, *(f"<0x{byte:02X}>" for byte in range(256))]
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    text = {**size, **special, "vocab_size": len(words), "projection_size": 32}
    Siglip2Model(Siglip2Config(text_config=text, vision_config=size)).save_pretrained(folder)
    vocabulary = {word: at for at, word in enumerate(words)}
    Siglip2Tokenizer(vocab=vocabulary, merges=[], **tokenizer).save_pretrained(folder)
    Siglip2ImageProcessorPil().save_pretrained(folder)
    return str(folder)


def picture(width: int, height: int, seed: int = 0) -> bytes:
    """Noise, as PNG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return png(Image.fromarray(pixels))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
