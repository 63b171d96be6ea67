"""A language model's size, worked out from its configuration before or after anything is loaded."""

from __future__ import annotations

from typing import Any, NamedTuple


class ModelDimensions(NamedTuple):
    """Widths of a decoder with gated MLPs, in numbers a token.

    Attributes:
        layers: decoder layers.
        hidden: the residual stream's.
        queries: all heads' queries together.
        keys: all heads' keys together, and as many values.
        inner: the MLP's.
        vocabulary: tokens that there are.
    """

    layers: int
    hidden: int
    queries: int
    keys: int
    inner: int
    vocabulary: int

    @property
    def linear(self) -> int:
        """Weights of all layers' projections."""
        return self.layers * self.hidden * (2 * self.queries + 2 * self.keys + 3 * self.inner)

    @property
    def table(self) -> int:
        """Weights of the embedding, or of the head."""
        return self.vocabulary * self.hidden


def model_dimensions(config: Any) -> ModelDimensions:  # noqa: ANN401 - transformers' configurations share no typed base for these
    """Read a configuration of transformers."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelDimensions(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        queries=config.num_attention_heads * width,
        keys=config.num_key_value_heads * width,
        inner=config.intermediate_size,
        vocabulary=config.vocab_size,
    )


def flops_per_token(shape: ModelDimensions) -> int:
    """Useful arithmetic of training an adapter on one token: 30 GFLOP for an 8B Llama.

    Two operations a weight forward and two for the activations' gradients; frozen weights have none of their own. The
    head counts as if every token needed it, computing activations again does not count: what is compared is the speed
    of the same result.
    """
    return 4 * (shape.linear + shape.table)
