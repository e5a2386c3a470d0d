"""Oracle: bfloat16 logits of the reference torch model (PyPI package gpt-oss), from a checkpoint in `original/` layout.

    python oracle_reference.py CHECKPOINT PROMPTS.npz OUT.npz

Runs in the environment of make_environment.sh and imports nothing of this repository. tests/parity/recipes.py says
what PROMPTS.npz and OUT.npz hold. The reference takes one sequence at a time, so every row runs alone.
"""

import argparse
import importlib.metadata
import json
from pathlib import Path

import numpy as np
import torch
from gpt_oss.torch.model import Transformer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()

    versions = {name: importlib.metadata.version(name) for name in ("torch", "gpt-oss", "numpy")}
    out: dict[str, np.ndarray] = {"versions": np.array(json.dumps(versions))}
    prompts = dict(np.load(options.prompts))
    names = [key.removesuffix(".tokens") for key in prompts if key.endswith(".tokens")]
    with torch.inference_mode():
        model = Transformer.from_checkpoint(str(options.checkpoint), device="cpu")
        vocab_size = model.unembedding.weight.shape[0]
        seen: list[torch.Tensor] = []
        for block in model.block:
            block.register_forward_hook(lambda _module, _inputs, output: seen.append(output.float()))
        for name in names:
            tokens, lengths = prompts[f"{name}.tokens"], prompts[f"{name}.lengths"]
            logits = np.zeros((*tokens.shape, vocab_size), np.float32)
            for row, length in enumerate(lengths):
                seen.clear()
                ids = torch.from_numpy(tokens[row, :length]).int()
                logits[row, :length] = model(ids).float().numpy()
            out[f"{name}.logits"] = logits
            if len(tokens) == 1:
                embedded = model.embedding(torch.from_numpy(tokens[0]).int()).float()
                out[f"{name}.residuals"] = torch.stack([embedded, *seen]).numpy()
            print(f"gpt-oss: {name}: {tokens.shape}", flush=True)
    np.savez(options.out, **out)


if __name__ == "__main__":
    main()
