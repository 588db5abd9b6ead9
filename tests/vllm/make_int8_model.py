"""Write the tiny random Qwen3 as an INT8 (W8A8) checkpoint of compressed-tensors: run inside the environment of vLLM.

Weights are symmetric with a scale for each row; activations are quantised token by token as they come.
"""

import json
import sys
from pathlib import Path

import torch
from make_model import main as write_model
from safetensors.torch import load_file, save_file

_EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_EIGHT_BITS, "strategy": "channel", "dynamic": False},
            "input_activations": {**_EIGHT_BITS, "strategy": "token", "dynamic": True},
        }
    },
}


def quantised(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The projections of the layers as int8 with their scales; all else as it is."""
    written: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            written[name] = tensor
            continue
        scale = tensor.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / 127
        written[name] = (tensor / scale).round().to(torch.int8)
        written[f"{name}_scale"] = scale
    return written


def main(folder: Path) -> None:
    write_model(folder)
    weights = folder / "model.safetensors"
    save_file(quantised(load_file(weights)), str(weights), metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
