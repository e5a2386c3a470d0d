"""Bytes of one device: of arrays from their shapes and shardings, of a compiled program from the compiler."""

import dataclasses
import math
from typing import Any

import jax


def shard_bytes(tree: Any) -> int:
    """What one device holds of a pytree of shapes with shardings, without any padding.

    Example:
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> from gptoss_jax.sharding import make_mesh
        >>> rows = NamedSharding(make_mesh(data=1), PartitionSpec("data"))
        >>> shard_bytes([jax.ShapeDtypeStruct((4, 8), "float32", sharding=rows)])
        128
    """
    return sum(_bytes(leaf, ()) for leaf in jax.tree.leaves(tree))


def argument_bytes(tree: Any, formats: Any) -> int:
    """What one device holds of the pytree as a compiled program takes it: TPUs fill arrays up to whole tiles.

    `formats` is the same tree of the program's `input_formats`.
    """
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(formats), strict=True)
    return sum(_bytes(leaf, placed.layout) for leaf, placed in pairs)


def _bytes(leaf: jax.ShapeDtypeStruct, layout: Any) -> int:
    assert leaf.sharding is not None
    sizes = list(leaf.sharding.shard_shape(leaf.shape))
    if layout and layout.tiling and sizes:
        sizes = [sizes[dim] for dim in layout.major_to_minor]
        outermost = layout.tiling[0]  # further tiles are within these
        for place, tile in enumerate(outermost, len(sizes) - len(outermost)):
            sizes[place] = -(-sizes[place] // tile) * tile
    return math.prod(sizes) * leaf.dtype.itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """What one device must have for a program to run, as the compiler says."""

    weights: int
    cache: int
    other_arguments: int
    temporaries: int
    results: int
    """That are in no argument's place, as the cache's are."""
    code: int
    """The program itself; 0 where the compiler does not count it."""

    @classmethod
    def of(cls, program: jax.stages.Compiled, model: Any, cache: Any) -> "Usage":
        """Read from a compiled `prefill` or `decode` of abstract model and cache."""
        statistics = program.memory_analysis()
        assert statistics is not None, "every compiler here says what memory a program takes"
        model_formats, cache_formats = program.input_formats[0][:2]
        weights, held = argument_bytes(model, model_formats), argument_bytes(cache, cache_formats)
        return cls(
            weights=weights,
            cache=held,
            other_arguments=statistics.argument_size_in_bytes - weights - held,
            temporaries=statistics.temp_size_in_bytes,
            results=statistics.output_size_in_bytes - statistics.alias_size_in_bytes,
            code=statistics.generated_code_size_in_bytes,
        )

    @property
    def arguments(self) -> int:
        """All that the program is called with."""
        return self.weights + self.cache + self.other_arguments

    @property
    def passing(self) -> int:
        """What is there while the program runs and not before: all but weights, cache and code."""
        return self.other_arguments + self.temporaries + self.results
