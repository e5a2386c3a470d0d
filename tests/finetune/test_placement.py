"""Where trained arrays are split: over the model axes as in inference, and over data on a further dim."""

import math

import pytest

from gptoss_jax.config import gpt_oss_20b, gpt_oss_120b
from gptoss_jax.finetune.placement import DATA, specs, trained_dims, trained_shapes, training_mesh
from gptoss_jax.sharding import make_mesh


def placed(config, **axes):
    mesh = training_mesh(make_mesh(**axes))
    dims, shapes = trained_dims(config, None), trained_shapes(config, None)
    return mesh, shapes, specs(dims, shapes, config, mesh)


@pytest.mark.parametrize("config", [gpt_oss_20b(), gpt_oss_120b()], ids=["20b", "120b"])
@pytest.mark.parametrize("axes", [{"data": 2, "expert": 4}, {"data": 8}, {"expert": 2, "tensor": 4}], ids=str)
def test_masters_of_the_published_models_are_split_evenly(config, axes):
    mesh, shapes, found = placed(config, **axes)
    whole = part = 0
    for path, shape in shapes.items():
        parts = 1
        for size, names in zip(shape, found[path], strict=True):
            names = () if names is None else (names,) if isinstance(names, str) else names
            count = math.prod(mesh.shape[name] for name in names)
            assert size % count == 0, path
            parts *= count
        whole += math.prod(shape)
        part += math.prod(shape) // parts
    assert part < whole / 8 * 1.01


def test_data_never_splits_the_dim_that_is_quantized():
    _, shapes, found = placed(gpt_oss_20b(), data=8)
    for path, spec in found.items():
        if ".experts." in path and len(shapes[path]) == 3:
            assert spec[2] is None
            assert DATA in spec
