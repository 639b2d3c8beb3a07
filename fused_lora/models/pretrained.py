"""Methods of Transformers' models that would lose an adapter: they say so, while the model has adapters."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from torch import nn

from ..switching import adapted_modules


def settle_pretrained(model: nn.Module) -> None:
    """Guard these methods of every Transformers model in ``model`` that has adapters, and of no other."""
    for part in model.modules():
        if not hasattr(type(part), "resize_token_embeddings") or not hasattr(type(part), "save_pretrained"):
            continue
        has_adapters = any(len(module.adapters) for _, module in adapted_modules(part))
        for name, guard in _GUARDS.items():
            if has_adapters:
                vars(part)[name] = functools.partial(guard, part)
            else:
                vars(part).pop(name, None)


def _save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
    warnings.warn(
        "save_pretrained of a model with adapters writes its base and adapters.* keys, which from_pretrained drops; "
        "save_adapter writes the adapter",
        stacklevel=2,
    )
    return type(model).save_pretrained(model, *args, **kwargs)


def _resize_token_embeddings(model: Any, *args: Any, **kwargs: Any) -> Any:
    ends = [module for end in ("input", "output") if (module := getattr(model, f"get_{end}_embeddings")()) is not None]
    adapted = [path for path, module in adapted_modules(model) if any(module is end for end in ends)]
    if adapted:
        raise ValueError(
            f"resize_token_embeddings must come before adapters on the embeddings, got {adapted}; "
            "delete_adapter or merge_and_unload first"
        )
    return type(model).resize_token_embeddings(model, *args, **kwargs)


_GUARDS = {"save_pretrained": _save_pretrained, "resize_token_embeddings": _resize_token_embeddings}
