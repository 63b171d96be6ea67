"""The output head: a model's logits from hidden states that were computed without it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from medlit.model.families import body, causal_lm
from medlit.unsloth_first import stock_class


def head_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits after the body's output: hidden states (n, D) -> logits (n, V), float32.

    What stands before and after the head's product, such as a scale or a soft cap, is the `forward` of transformers,
    called with these hidden states in place of the body's output: Unsloth's rounds logits to 16 bits.
    """
    inner = causal_lm(model)
    forward = stock_class(type(inner)).forward
    ids = torch.zeros(1, len(hidden), dtype=torch.long)
    logits: Tensor = forward(_HeadOnly(inner, hidden[None]), input_ids=ids, use_cache=False).logits
    return logits[0].float()


class _Output(BaseModelOutputWithPast):
    """A body's output whose further fields, such as a router's logits, are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Body:
    """A body, or a part of one, that returns given hidden states; its numbers and weights are those of the model."""

    def __init__(self, part: Any, hidden: Tensor) -> None:  # noqa: ANN401
        self._part, self._hidden = part, hidden

    def __call__(self, *_: object, **__: object) -> _Output:
        return _Output(last_hidden_state=self._hidden)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        value = getattr(self._part, name)
        return _Body(value, self._hidden) if callable(value) else value


class _HeadOnly:
    """A causal language model as its `forward` sees it, with a body that returns given hidden states, (1, n, D)."""

    def __init__(self, inner: Any, hidden: Tensor) -> None:  # noqa: ANN401
        names, head = {part: name for name, part in inner.named_children()}, inner.get_output_embeddings()
        vars(self).update({"_inner": inner, names[body(inner)]: _Body(body(inner), hidden), names[head]: _Head(head)})

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._inner, name)


class _Head:
    """An output head whose product is float32: in bfloat16 logits of two digits are multiples of 1/16 and often tie."""

    def __init__(self, head: nn.Module) -> None:
        self._head = head

    def __call__(self, hidden: Tensor) -> Tensor:
        weight: Any = self._head.weight
        plain = not torch.is_grad_enabled() and type(self._head) is nn.Linear and self._head.bias is None
        if plain and weight.dtype in (torch.bfloat16, torch.float16):
            if hidden.is_cuda:
                return torch.mm(hidden[0].to(weight.dtype), weight.t(), out_dtype=torch.float32)[None]
            # A CPU has no such product, and a copy of a whole head in float32 takes gigabytes.
            return torch.cat([hidden[0].float() @ part.float().t() for part in weight.split(4096)], dim=1)[None]
        if weight.is_floating_point():  # not quantised
            hidden = hidden.to(weight.dtype)
        return self._head(hidden).float()  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._head, name)
