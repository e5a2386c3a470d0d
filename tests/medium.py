"""An architecture of 150 MB, for measuring memory: large enough to show, small enough to wait for."""

import dataclasses

from gptoss_jax.parameters import parameters
from tests.tiny import TINY

MEDIUM = dataclasses.replace(
    TINY,
    num_layers=2,
    layer_kinds=TINY.layer_kinds[:2],
    hidden_size=512,
    intermediate_size=512,
    num_experts=32,
    vocab_size=65536,
)

MEDIUM_MB = sum(parameter.num_bytes for parameter in parameters(MEDIUM).values()) / 1e6
