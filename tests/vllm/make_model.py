"""Write a tiny random Qwen3 checkpoint that vLLM can load without a network: run inside the environment of vLLM.

The tokenizer has one token for each printable ASCII character, so every sampled token is visible text and a prompt of
n characters is n tokens.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

LAYERS, WIDTH, HEADS, KV_HEADS, FFN_WIDTH, CONTEXT_TOKENS = 2, 64, 2, 1, 128, 2_048
HEAD_WIDTH = 64  # vLLM's attention on the CPU wants a multiple of 32
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
START, END = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> Tokenizer:
    """One token per character; what is not ASCII becomes a question mark."""
    words = {character: index for index, character in enumerate(CHARACTERS)}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(START, special=True), AddedToken(END, special=True)])
    return made


def weights(vocabulary: int) -> dict[str, torch.Tensor]:
    """Random weights under the names of the Qwen3 checkpoint, always the same ones."""
    draw = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=draw) / columns**0.5

    queries, keys = HEADS * HEAD_WIDTH, KV_HEADS * HEAD_WIDTH
    tensors = {
        "model.embed_tokens.weight": matrix(vocabulary, WIDTH),
        "model.norm.weight": torch.ones(WIDTH),
        "lm_head.weight": matrix(vocabulary, WIDTH),
    }
    for layer in range(LAYERS):
        block = {
            "input_layernorm": torch.ones(WIDTH),
            "post_attention_layernorm": torch.ones(WIDTH),
            "self_attn.q_proj": matrix(queries, WIDTH),
            "self_attn.k_proj": matrix(keys, WIDTH),
            "self_attn.v_proj": matrix(keys, WIDTH),
            "self_attn.o_proj": matrix(WIDTH, queries),
            "self_attn.q_norm": torch.ones(HEAD_WIDTH),
            "self_attn.k_norm": torch.ones(HEAD_WIDTH),
            "mlp.gate_proj": matrix(FFN_WIDTH, WIDTH),
            "mlp.up_proj": matrix(FFN_WIDTH, WIDTH),
            "mlp.down_proj": matrix(WIDTH, FFN_WIDTH),
        }
        tensors |= {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in block.items()}
    silence(tensors, controls=[vocabulary - 2, vocabulary - 1])
    return tensors


def silence(tensors: dict[str, torch.Tensor], controls: list[int]) -> None:
    """Never sample a control token: they render as nothing and one of them ends the reply.

    The first channel of the residual stream is kept constant and its weight in the head forbids them.
    """
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[0, :] = 0.0
    tensors["model.embed_tokens.weight"][:, 0] = 1.0
    tensors["lm_head.weight"][:, 0] = 0.0
    tensors["lm_head.weight"][controls, :] = 0.0
    tensors["lm_head.weight"][controls, 0] = -1_000.0


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made = tokenizer()
    end = made.token_to_id(END)
    vocabulary = made.get_vocab_size()
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": LAYERS,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_WIDTH,
        "intermediate_size": FFN_WIDTH,
        "max_position_embeddings": CONTEXT_TOKENS,
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": end,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "model_max_length": CONTEXT_TOKENS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1))
    made.save(str(folder / "tokenizer.json"))
    save_file(weights(vocabulary), str(folder / "model.safetensors"), metadata={"format": "pt"})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
