"""The training loss once more, in the plainest float32: dense weights, one conversation at a time, every expert run."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.config import ModelConfig
from gptoss_jax.finetune.adapters import LoRA
from gptoss_jax.model.rope import rotations
from pallas_kernels.mxfp4 import MXFP4, dequantize


def dense(parameters):
    """Every parameter in float32, an expert matrix as one `weight`."""
    found = {}
    for path, value in parameters.items():
        if path.endswith("blocks"):
            scales = parameters[path.removesuffix("blocks") + "scales"]
            found[path.removesuffix("blocks") + "weight"] = dequantize(MXFP4(jnp.asarray(value), jnp.asarray(scales)))
        elif not path.endswith("scales"):
            found[path] = jnp.asarray(value, jnp.float32)
    return found


def merged(weights, adapters, lora: LoRA):
    """The dense weights with the adapters added."""
    changed = dict(weights)
    for path in adapters:
        if not path.endswith("lora_a"):
            continue
        name = path.removesuffix(".lora_a")
        a, b = adapters[path], adapters[f"{name}.lora_b"]
        target = name if name in weights else f"{name}.weight"
        if ".experts." in name:
            delta = jnp.einsum("enr,erk->enk", b, a)
        elif "output" in name:
            delta = jnp.einsum("dr,rnh->dnh", b, a)
        else:
            delta = jnp.einsum("...r,rd->...d", b, a)
        changed[target] = weights[target] + lora.scale * delta
    return changed


def logits(weights, tokens, config: ModelConfig):
    """The logits after each token of one conversation, [T, V]."""
    x = weights["embedding.weight"][tokens]
    length = len(tokens)
    cos, sin = (table[0] for table in rotations(jnp.arange(length)[None], config))
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    for index, kind in enumerate(config.layer_kinds):
        w = {path.removeprefix(f"layers.{index}."): value for path, value in weights.items()}
        normed = _norm(x, w["attention_norm.scale"], config)
        q, k, v = (
            jnp.einsum("td,nhd->tnh", normed, w[f"attention.{name}.weight"]) + w[f"attention.{name}.bias"]
            for name in ("query", "key", "value")
        )
        group = config.num_heads // config.num_kv_heads
        k, v = (jnp.repeat(part, group, axis=1) for part in (_rotate(k, cos, sin), v))
        scores = jnp.einsum("tnh,snh->nts", _rotate(q, cos, sin), k) / math.sqrt(config.head_dim)
        seen = (distance >= 0) & ((distance < config.sliding_window) | (kind == "full_attention"))
        scores = jnp.where(seen, scores, -jnp.inf)
        sinks = jnp.broadcast_to(w["attention.sinks"][:, None, None], (config.num_heads, length, 1))
        shares = jax.nn.softmax(jnp.concatenate([scores, sinks], axis=-1), axis=-1)[..., :-1]
        attended = jnp.einsum("nts,snh->tnh", shares, v)
        x = x + jnp.einsum("tnh,dnh->td", attended, w["attention.output.weight"]) + w["attention.output.bias"]
        x = x + _experts(_norm(x, w["experts_norm.scale"], config), w, config)
    return _norm(x, weights["norm.scale"], config) @ weights["unembedding.weight"].T


def loss_sum(weights, conversations, config: ModelConfig, *, absent_rows: int = 0):
    """The negative log-probabilities of the trained targets, summed over (tokens, targets, weights) triples."""
    total = 0.0
    for tokens, targets, trained in conversations:
        found = logits(weights, tokens, config)
        whole = jnp.logaddexp(jax.nn.logsumexp(found, axis=-1), jnp.log(float(absent_rows)))  # -inf for none
        total = total + ((whole - found[np.arange(len(tokens)), targets]) * trained).sum()
    return total


def _experts(normed, w, config: ModelConfig):
    scores = normed @ w["router.weight"].T + w["router.bias"]
    chosen, ids = jax.lax.top_k(scores, config.experts_per_token)
    shares = jnp.zeros_like(scores).at[np.arange(len(normed))[:, None], ids].set(jax.nn.softmax(chosen, axis=-1))
    hidden = jnp.einsum("td,efd->tef", normed, w["experts.gate_up.weight"]) + w["experts.gate_up.bias"]
    gate = jnp.minimum(hidden[..., 0::2], config.swiglu_limit)
    up = jnp.clip(hidden[..., 1::2], -config.swiglu_limit, config.swiglu_limit)
    activated = gate * jax.nn.sigmoid(config.swiglu_alpha * gate) * (up + 1)
    answers = jnp.einsum("tef,edf->ted", activated, w["experts.down.weight"]) + w["experts.down.bias"]
    return jnp.einsum("ted,te->td", answers, shares)


def _norm(x, scale, config: ModelConfig):
    return x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + config.rms_norm_eps) * scale


def _rotate(heads, cos, sin):
    one, two = jnp.split(heads, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)
