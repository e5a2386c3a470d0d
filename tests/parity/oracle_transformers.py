"""Oracle: logits of transformers' GptOssForCausalLM in float32, from a checkpoint in the Hugging Face layout.

    python oracle_transformers.py CHECKPOINT PROMPTS.npz OUT.npz [--greedy N [--only-greedy]]
        [--without PART=NAME ...] [--adapter DIR]

Runs in the environment of make_environment.sh and imports nothing of this repository. tests/parity/recipes.py says
what PROMPTS.npz and OUT.npz hold.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoConfig, GptOssForCausalLM, Mxfp4Config


def load(checkpoint: Path) -> GptOssForCausalLM:
    """The model in float32, experts dequantized, every part in its plain eager form."""
    config = AutoConfig.from_pretrained(checkpoint)
    config.pad_token_id = None  # 199999 is outside a small vocabulary, and nn.Embedding refuses that
    return GptOssForCausalLM.from_pretrained(
        checkpoint,
        config=config,
        dtype=torch.float32,
        quantization_config=Mxfp4Config(dequantize=True) if hasattr(config, "quantization_config") else None,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()


def remove(model: GptOssForCausalLM, part: str) -> None:
    """Break one part of the model, to see whether the prompts would notice."""
    layers = model.model.layers
    rotary = model.model.rotary_emb
    dims = torch.arange(0, model.config.head_dim, 2, dtype=torch.float32) / model.config.head_dim
    match part:
        case "sinks":
            for layer in layers:
                layer.self_attn.sinks.fill_(-1e9)
        case "window":
            model.config.sliding_window = 1 << 20
        case "window-by-one":
            model.config.sliding_window += 1
        case "window-parity":
            model.config.layer_types = model.config.layer_types[1:] + model.config.layer_types[:1]
        case "yarn":
            rotary.inv_freq = model.config.rope_parameters["rope_theta"] ** -dims
        case "yarn-concentration":
            rotary.attention_scaling = 1.0
        case "yarn-truncation":
            model.config.rope_parameters["truncate"] = True
            rotary.inv_freq, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](model.config)
        case "past-original-context":
            last = model.config.rope_parameters["original_max_position_embeddings"] - 1
            forward = rotary.forward
            rotary.forward = lambda x, position_ids: forward(x, position_ids.clamp(max=last))
        case "clamp":
            for layer in layers:
                layer.mlp.experts.limit = 1e9
        case "attention-biases":
            for layer in layers:
                for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                    getattr(layer.self_attn, name).bias.zero_()
        case "router-bias":
            for layer in layers:
                layer.mlp.router.bias.zero_()
        case "expert-biases":
            for layer in layers:
                layer.mlp.experts.gate_up_proj_bias.zero_()
                layer.mlp.experts.down_proj_bias.zero_()
        case "last-expert":
            for layer in layers:
                layer.mlp.router.top_k -= 1
        case _:
            raise SystemExit(f"oracle_transformers: unknown part {part!r}")


def alone(model: GptOssForCausalLM, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Logits of each row run by itself; zero past a row's length."""
    logits = np.zeros((*tokens.shape, model.config.vocab_size), np.float32)
    for row, length in enumerate(lengths):
        ids = torch.from_numpy(tokens[row : row + 1, :length]).long()
        logits[row, :length] = model(ids, use_cache=False).logits[0].numpy()
    return logits


def padded(model: GptOssForCausalLM, tokens: np.ndarray, lengths: np.ndarray, *, side: str) -> np.ndarray:
    """Logits of all rows in one batch padded on the `side`; moved back to start at 0, zero past a row's length."""
    num_rows, width = tokens.shape
    shift = [width - length if side == "left" else 0 for length in lengths]
    ids = torch.zeros((num_rows, width), dtype=torch.long)
    mask = torch.zeros((num_rows, width), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, shift[row] : shift[row] + length] = torch.from_numpy(tokens[row, :length])
        mask[row, shift[row] : shift[row] + length] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits.numpy()
    logits = np.zeros_like(out)
    for row, length in enumerate(lengths):
        logits[row, :length] = out[row, shift[row] : shift[row] + length]
    return logits


def residuals(model: GptOssForCausalLM, tokens: np.ndarray) -> np.ndarray:
    """The residual stream of one prompt [L + 1, T, D]: the embedding, then after each layer, before the last norm."""
    seen: list[torch.Tensor] = [model.model.embed_tokens(torch.from_numpy(tokens[:1]).long())[0]]
    hooks = [
        layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0]))
        for layer in model.model.layers
    ]
    model(torch.from_numpy(tokens[:1]).long(), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen).numpy()


def greedy(
    model: GptOssForCausalLM, tokens: np.ndarray, lengths: np.ndarray, *, num_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Each row continued greedily by transformers' own cached generation, and each token's margin [B, num_tokens]."""
    model.generation_config.update(eos_token_id=None, bos_token_id=None, pad_token_id=None, do_sample=False)
    model.generation_config.update(return_dict_in_generate=True, output_logits=True)
    rows, margins = [], []
    for row, length in enumerate(lengths):
        ids = torch.from_numpy(tokens[row : row + 1, :length]).long()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens)
        rows.append(out.sequences[0, length:].int().numpy())
        best = torch.stack([logits[0].topk(2).values for logits in out.logits])
        margins.append((best[:, 0] - best[:, 1]).numpy())
    return np.stack(rows), np.stack(margins)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--greedy", type=int, default=0, metavar="N", help="also continue each prompt by N tokens")
    parser.add_argument(
        "--without", nargs="*", default=[], metavar="PART=NAME", help="also run the prompt NAME with PART broken"
    )
    parser.add_argument("--only-greedy", action="store_true", help="leave out what has logits of every position")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="load a PEFT adapter onto the model")
    options = parser.parse_args()

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    versions = {name.__name__: name.__version__ for name in (torch, transformers, np)}
    out: dict[str, np.ndarray] = {"versions": np.array(json.dumps(versions))}
    prompts = dict(np.load(options.prompts))
    names = [key.removesuffix(".tokens") for key in prompts if key.endswith(".tokens")]
    with torch.no_grad():
        model = load(options.checkpoint)
        if options.adapter:
            from peft import PeftModel  # here, since it takes seconds

            PeftModel.from_pretrained(model, options.adapter)  # changes the model itself
        for name in names:
            tokens, lengths = prompts[f"{name}.tokens"], prompts[f"{name}.lengths"]
            if options.greedy:
                out[f"{name}.greedy"], out[f"{name}.margins"] = greedy(
                    model, tokens, lengths, num_tokens=options.greedy
                )
            if options.only_greedy:
                continue
            out[f"{name}.logits"] = alone(model, tokens, lengths)
            if len(tokens) == 1:
                out[f"{name}.residuals"] = residuals(model, tokens)
            else:
                for side in ("left", "right"):
                    out[f"{name}.padded_{side}"] = padded(model, tokens, lengths, side=side)
            print(f"transformers: {name}: {tokens.shape}", flush=True)
        for part, name in (each.split("=") for each in options.without):
            broken = load(options.checkpoint)
            remove(broken, part)
            out[f"{name}.without.{part}"] = alone(broken, prompts[f"{name}.tokens"], prompts[f"{name}.lengths"])
            print(f"transformers: {name} without {part}", flush=True)
    np.savez(options.out, **out)


if __name__ == "__main__":
    main()
