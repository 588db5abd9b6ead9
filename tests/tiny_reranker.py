"""A tiny random Qwen3-Reranker, and what its authors' own computation gives for it.

Run in an environment with torch and transformers: ``python tiny_reranker.py FOLDER`` writes the checkpoint and prints
the scores of the pairs on standard input, ``[[instruction, query, document], …]``, as JSON.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CONTEXT_TOKENS = 1024
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PLAIN = ("<think>", "</think>")
PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
BODY = "<Instruct>: {}\n<Query>: {}\n<Document>: {}"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


def tokenizer() -> Tokenizer:
    """Byte-level, with whole words for the prompt: about as many tokens for it as in the real one."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([PREFIX, BODY.format(INSTRUCTION, "", ""), "yes no"] * 8, trainer)
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROL])
    made.add_tokens([AddedToken(text, normalized=False) for text in PLAIN])
    return made


def make_reranker(folder: Path) -> None:
    """Write the checkpoint, always the same."""
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), eos_token=CONTROL[2], pad_token=CONTROL[0])
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(made),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # vLLM's attention on the CPU wants a multiple of 32
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        initializer_range=0.2,  # or all scores would be close to 0.5
        eos_token_id=made.eos_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    made.save_pretrained(folder)


def make_converted(folder: Path, into: Path) -> None:
    """The same model as a classifier with one label, as it is also published."""
    import torch
    from transformers import AutoTokenizer, Qwen3ForCausalLM, Qwen3ForSequenceClassification

    words = AutoTokenizer.from_pretrained(folder)
    no, yes = words.convert_tokens_to_ids(["no", "yes"])
    head = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).lm_head.weight.detach()
    classifier = Qwen3ForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    classifier.score.weight = torch.nn.Parameter((head[yes] - head[no]).unsqueeze(0).clone())
    classifier.save_pretrained(into)
    words.save_pretrained(into)


def official_scores(folder: Path, pairs: Sequence[Sequence[str]]) -> list[float]:
    """Each (instruction, query, document) by itself, over the whole vocabulary, as the model's authors compute it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    no, yes = words.convert_tokens_to_ids(["no", "yes"])
    scores = []
    for pair in pairs:
        texts = (PREFIX, BODY.format(*pair), SUFFIX)
        ids = [token for text in texts for token in words.encode(text, add_special_tokens=False)]
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1, [no, yes]]
        scores.append(float(torch.log_softmax(logits, dim=0)[1].exp()))
    return scores


def main() -> None:
    folder = Path(sys.argv[1])
    make_reranker(folder)
    print(json.dumps(official_scores(folder, json.load(sys.stdin))))


if __name__ == "__main__":
    main()
