"""What the parity tests compare on: seeded checkpoints and prompts, and how both sides exchange them.

Everything goes through files, as the oracles run in an environment of their own:

    CHECKPOINT/hf, CHECKPOINT/original    one random model in both published layouts, no byte different
    PROMPTS.npz    NAME.tokens   int32 [B, T], padded on the right with 0      NAME.lengths   int32 [B]
    OUT.npz        versions      JSON, of the packages that made it
                   NAME.logits   float32 [B, T, V], every row run alone, zero past its length
                   NAME.residuals              float32 [L + 1, T, D] (prompts of one row): see the oracles
                   NAME.padded_left, _right    float32 [B, T, V] (prompts of several rows; transformers)
                   NAME.greedy                 int32 [B, N], the rows' greedy continuation (transformers)
                   NAME.margins                float32 [B, N], how far its logits are above the second
                   NAME.without.PART           float32 [B, T, V], with one part of the model broken (transformers)
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from convert.synthetic import write_checkpoint
from gptoss_jax.config import ModelConfig
from tests.tiny import TINY

WIDE = ModelConfig(
    num_layers=3,
    hidden_size=96,
    num_heads=64,
    num_kv_heads=8,
    head_dim=16,
    intermediate_size=96,
    num_experts=4,
    experts_per_token=3,
    vocab_size=150,
    layer_kinds=("sliding_attention", "full_attention", "sliding_attention"),
    sliding_window=20,
    max_context=8192,
    original_context=1024,
    rope_theta=50000.0,
    rope_factor=8.0,
    rope_beta_fast=16.0,
    rope_beta_slow=2.0,
    rms_norm_eps=1e-5,
    swiglu_alpha=1.702,
    swiglu_limit=5.0,
)
"""The published head layout (8 kv heads of 8) and square experts, which hide swapped dims; every constant that
`original/config.json` can say differs from the published one."""

BROKEN = {
    "sinks": "short",
    "window": "short",
    "window-by-one": "short",
    "window-parity": "short",
    "yarn": "long",
    "yarn-concentration": "short",
    "yarn-truncation": "long",
    "past-original-context": "long",
    "clamp": "short",
    "attention-biases": "short",
    "router-bias": "short",
    "expert-biases": "short",
    "last-expert": "short",
}
"""What oracle_transformers.py can break, and the prompt that must notice it."""

# convert.synthetic draws every tensor near its usual size at initialisation, where attention is nearly uniform and
# nothing reaches the clamp. Here, by the end of a tensor's name in either layout: what to add to E8M0 exponents, and
# the power of two to multiply bfloat16 by (in qkv the query rows alone).
_ADD = {
    "experts.gate_up_proj_scales": 2,
    "mlp1_weight.scales": 2,
    "experts.down_proj_scales": -4,
    "mlp2_weight.scales": -4,
}
_MULTIPLY = {
    "attn.q_proj.weight": 2,
    "attn.qkv.weight": 2,
    "attn.sinks": 4,
    "mlp.router.weight": 2,
    "mlp.gate.weight": 2,
    "mlp.router.bias": 4,
    "mlp.gate.bias": 4,
    "lm_head.weight": 0.25,
    "unembedding.weight": 0.25,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One checkpoint and the prompts run through it."""

    name: str
    config: ModelConfig
    seed: int
    lengths: dict[str, tuple[int, ...]]
    """The row lengths of each prompt; several rows are a ragged batch."""

    def write_checkpoints(self, folder: Path) -> None:
        """Write the model in both layouts, as `folder`/hf and `folder`/original."""
        for layout in ("hf", "original"):
            write_checkpoint(folder / layout, self.config, seed=self.seed, layout=layout, num_shards=2)
            for path in sorted((folder / layout).glob("*.safetensors")):
                _sharpen(path, query_rows=self.config.num_heads * self.config.head_dim)

    def prompts(self) -> dict[str, np.ndarray]:
        """The arrays of PROMPTS.npz."""
        arrays = {}
        generator = np.random.default_rng(self.seed)
        for name, lengths in self.lengths.items():
            tokens = generator.integers(0, self.config.vocab_size, (len(lengths), max(lengths)), np.int32)
            tokens[np.arange(max(lengths)) >= np.array(lengths)[:, None]] = 0
            arrays |= {f"{name}.tokens": tokens, f"{name}.lengths": np.array(lengths, np.int32)}
        return arrays


TINY_CASE = Case("tiny", TINY, seed=11, lengths={"short": (41,), "ragged": (29, 1, 7, 8, 18), "long": (4300,)})
WIDE_CASE = Case("wide", WIDE, seed=12, lengths={"short": (61,), "ragged": (45, 20, 21, 3), "long": (1200,)})
CASES = (TINY_CASE, WIDE_CASE)


def checksum(folder: Path) -> str:
    """One sha256 over every tensor's name, dtype, shape and bytes, whatever file each is in."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        header, data = _open(path, mode="r")
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            content = hashlib.sha256(data[start:end]).hexdigest()
            tensors[name] = f"{name} {entry['dtype']} {entry['shape']} {content}"
    return hashlib.sha256("\n".join(tensors[name] for name in sorted(tensors)).encode()).hexdigest()


def _sharpen(path: Path, *, query_rows: int) -> None:
    header, data = _open(path, mode="r+")
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        for suffix, exponents in _ADD.items():
            if name.endswith(suffix):
                data[start:end] += np.uint8(exponents % 256)
        for suffix, factor in _MULTIPLY.items():
            if name.endswith(suffix):
                rows = query_rows if suffix == "attn.qkv.weight" else entry["shape"][0]
                values = data[start:end].view(ml_dtypes.bfloat16).reshape(entry["shape"])
                values[:rows] *= ml_dtypes.bfloat16(factor)
    data.flush()


def _open(path: Path, *, mode: Literal["r", "r+"]) -> tuple[dict[str, dict], np.memmap]:
    """The header of a safetensors file, and its data as bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, np.memmap(path, np.uint8, mode=mode, offset=8 + length)
