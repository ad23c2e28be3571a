"""Batches that the student wrote itself: what generalised knowledge distillation learns from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel

from hf_transfer.cuts import evaluating
from hf_transfer.losses import transformer_in
from hf_transfer.objectives.distillation import ON_POLICY
from hf_transfer.tasks import IGNORED


def sampled_batch(
    model: PreTrainedModel | PeftModel,
    batch: Mapping[str, Any],
    *,
    seed: int,
    max_new_tokens: int | None = None,
    **generation: Any,
) -> dict[str, Any]:
    """``batch`` with what the model itself writes in place of what stood there (Agarwal et al. 2024, GKD).

    A decoder-only model goes on from each example's prompt, which is what precedes the first label that is not -100
    (one token at least: where nothing is masked, the model writes freely). An encoder-decoder writes its output for
    the same inputs. Labels are the tokens written, up to and including the end of text; rows are padded on the right.
    Columns with one value per example stay; others that follow tokens go, for they no longer do.

    Args:
        model: A transformers model that generates, bare or inside a PEFT model; its modules keep their modes.
        batch: A collated micro-batch with ``input_ids`` and ``labels``.
        seed: Of the tokens drawn; the random state is left as it was, for what else is drawn from it.
        max_new_tokens: At most so many are written; by default until a row is as long as the batch's longest.
        **generation: Options of ``GenerationConfig``; by default tokens are drawn from the model's own distribution,
            whatever the checkpoint's ``generation_config`` says.
    """
    core, generate = transformer_in(model), cast(Callable[..., Tensor], model.generate)
    labels = batch["labels"]
    if core.config.is_encoder_decoder:
        room, prompts = [labels.shape[1]] * len(labels), None
    else:
        prompts = _prompts(batch)
        longest = int(_real(batch).sum(1).max())
        room = [max(1, longest - len(prompt)) for prompt in prompts]
    if max_new_tokens is not None:
        room = [max_new_tokens] * len(labels)
    config = _generation_config(core, max(room), generation)
    device = [core.device] if core.device.type == "cuda" else []
    with evaluating(model), _generating_by(core, config), torch.random.fork_rng(device):
        torch.manual_seed(seed)
        if prompts is None:
            inputs = {name: batch[name] for name in (core.main_input_name, "attention_mask") if name in batch}
            written = generate(**inputs)[:, 1:]
        else:
            width = max(map(len, prompts))
            padded, real = (
                torch.stack([torch.cat([value.new_zeros(width - len(value)), value]) for value in values])
                for values in (prompts, [torch.ones_like(prompt) for prompt in prompts])
            )
            written = generate(input_ids=padded, attention_mask=real)[:, width:]
    targets = [_until_the_end(row[:most], config.eos_token_id) for row, most in zip(written, room, strict=True)]
    kept = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim() == 1}
    on_policy = {ON_POLICY: torch.ones((), dtype=torch.bool, device=labels.device)}
    if prompts is None:
        source = {name: batch[name] for name in (core.main_input_name, "attention_mask") if name in batch}
        return {**kept, **source, "labels": _padded(targets, IGNORED), **on_policy}
    rows = [torch.cat(pair) for pair in zip(prompts, targets, strict=True)]
    scored = [
        torch.cat([torch.full_like(prompt, IGNORED), target]) for prompt, target in zip(prompts, targets, strict=True)
    ]
    return {
        **kept,
        "input_ids": _padded(rows, 0),
        "attention_mask": _padded([torch.ones_like(row) for row in rows], 0),
        "labels": _padded(scored, IGNORED),
        **on_policy,
    }


def _prompts(batch: Mapping[str, Any]) -> list[Tensor]:
    """What each row of a decoder's batch goes on from, padding left out on either side."""
    prompts = []
    for ids, labels, real in zip(batch["input_ids"], batch["labels"], _real(batch), strict=True):
        scored, places = (labels != IGNORED).nonzero(), real.nonzero()
        first = int(places[0]) if len(places) else 0
        end = max(first + 1, int(scored[0]) if len(scored) else len(ids))
        prompts.append(ids[first:end][real[first:end]] if len(places) else ids[:1])
    return prompts


def _real(batch: Mapping[str, Any]) -> Tensor:
    """(B, T), True at tokens that are not padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


@contextmanager
def _generating_by(core: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Let ``generate`` follow ``config`` alone: what it leaves open would come from the checkpoint's."""
    own, core.generation_config = core.generation_config, config
    try:
        yield
    finally:
        core.generation_config = own


def _generation_config(core: PreTrainedModel, max_new_tokens: int, options: Mapping[str, Any]) -> GenerationConfig:
    own = core.generation_config
    eos, pad = (getattr(own, name, None) for name in ("eos_token_id", "pad_token_id"))
    first = eos[0] if isinstance(eos, list) else eos
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        pad_token_id=next((token for token in (pad, first) if token is not None), 0),
        bos_token_id=getattr(own, "bos_token_id", None),
        decoder_start_token_id=getattr(own, "decoder_start_token_id", None),
        **(sampling | dict(options)),
    )


def _until_the_end(tokens: Tensor, ends: int | list[int] | None) -> Tensor:
    """The tokens up to the first that ends a text, which is kept: what follows it is padding."""
    if ends is None:
        return tokens
    stops = torch.isin(tokens, torch.tensor(ends, device=tokens.device)).nonzero()
    return tokens[: int(stops[0]) + 1] if len(stops) else tokens


def _padded(rows: list[Tensor], value: int) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value)
