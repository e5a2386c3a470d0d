"""The published widths, and choices of experts, for the tests on hardware."""

import numpy as np

D = F = 2880


def draw_ids(random: np.random.Generator, num_tokens: int, per_token: int, num_experts: int, choices: str):
    """Experts of each token, different ones but for "one expert"."""
    popularity = 1.5 * random.normal(size=num_experts) if choices == "skewed" else 0.0
    scores = random.gumbel(size=(num_tokens, num_experts)) + popularity
    ids = np.argsort(scores, axis=1)[:, :per_token].astype(np.int32)
    if choices == "one expert":
        ids[:] = num_experts - 1
    if choices == "elsewhere":
        ids = np.where(ids % 3 == 0, -1, np.where(ids % 3 == 1, num_experts + ids, ids))
    if choices == "nobody":
        ids[:] = num_experts
    return ids
