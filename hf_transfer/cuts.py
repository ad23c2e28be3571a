"""A model as a line of blocks that can be cut: what crosses the cut, and forward passes that start there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_transfer.activations import Activations
from hf_transfer.depth import block_names, embedding_names
from hf_transfer.errors import ConfigurationError
from hf_transfer.pooling import pool, real_tokens

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Tap:
    """What is kept of a forward pass of the base.

    Args:
        source: A depth, for the input of the block above it, or the name of a field of the base's output.
        positions: The real tokens, one of them or their mean; ``"vector"`` for a field of one vector per example.
    """

    source: int | str
    positions: Literal["tokens", "first", "last", "mean", "vector"] = "tokens"

    def pack(self, hidden: Tensor, real: Tensor) -> Activations:
        """The rows of ``hidden``, (B, T, D) or (B, D), that are kept; ``real`` (B, T) is True at real tokens."""
        if self.positions == "mean":
            hidden = pool(hidden.float(), real, "mean")
        return Activations.pack(hidden if hidden.dim() == 3 else hidden.unsqueeze(1), self.select(real))

    def select(self, real: Tensor) -> Tensor:
        """(B, T), True where a row is kept; (B, 1) where one vector is kept per example."""
        match self.positions:
            case "tokens":
                return real
            case "first":
                return real & (real.cumsum(1) == 1)
            case "last":
                return real & (real.flip(1).cumsum(1).flip(1) == 1)
        return torch.ones_like(real[:, :1])


class CutModel:
    """A transformers model, bare, with a head or inside a PEFT model, as embeddings, blocks, base and head.

    Raises:
        ConfigurationError: There is no single line of blocks, or virtual tokens are put before every input.
    """

    def __init__(self, model: nn.Module) -> None:
        if any(adapter.is_prompt_learning for adapter in getattr(model, "peft_config", {}).values()):
            raise ConfigurationError("Virtual tokens (prompt or prefix tuning) reach past any cut of the model.")
        self.model = model
        self.blocks = [model.get_submodule(name) for name in block_names(model)]
        self.embeddings = [model.get_submodule(name) for name in embedding_names(model)]
        self.core = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
        self.base: Any = self.core.base_model
        generates = "use_cache" in inspect.signature(self.base.forward).parameters
        self._options = {"use_cache": False} if generates else {}

    def outputs(self, batch: Batch) -> ModelOutput:
        """The base's output, without the keys and values that only generation reads."""
        return self.base(**batch, **self._options)

    def run(self, batch: Batch, taps: Sequence[Tap]) -> list[Activations]:
        """One forward pass of the base; returns what each tap keeps of it.

        Raises:
            ConfigurationError: A hidden state does not have the batch's examples and tokens as its first two axes.
        """
        crossing: dict[int | str, Any] = {}

        def note(depth: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            crossing[depth] = args[0] if args else kwargs["hidden_states"]

        with ExitStack() as stack:
            for tap in taps:
                if isinstance(tap.source, int):
                    hook = partial(note, tap.source)
                    stack.callback(self.blocks[tap.source].register_forward_pre_hook(hook, with_kwargs=True).remove)
            crossing.update(self.outputs(batch))
        return [tap.pack(crossing[tap.source], self._real_tokens_of(batch, crossing[tap.source])) for tap in taps]

    def _real_tokens_of(self, batch: Batch, hidden: Tensor) -> Tensor:
        real = real_tokens(self.core, batch, width=hidden.shape[1])
        if hidden.shape[:2] != real.shape and hidden.dim() != 2 or len(hidden) != len(real):
            raise ConfigurationError(
                f"{type(self.core).__name__}: hidden states of shape {tuple(hidden.shape)} where the batch has "
                f"{tuple(real.shape)} tokens: expected (examples, tokens, size)."
            )
        return real

    def head_tap(self, probe: Batch) -> Tap:
        """What the head reads of the base's output: the least that leaves the logits alone when all else is NaN.

        Args:
            probe: A few examples of different lengths.

        Raises:
            ConfigurationError: There is no head, or it reads padding or more than one field.
        """
        if self.base is self.core:
            raise ConfigurationError(f"{type(self.core).__name__} has no head: choose another pooling or cut.")
        outputs = self.outputs(probe)
        expected = self.core(**probe)[0]
        for tap in _candidates(outputs):
            hidden = outputs[tap.source]
            real = self._real_tokens_of(probe, hidden)
            if tap.positions != "vector":
                unread = ~tap.select(real).unsqueeze(-1)
                hidden = hidden.masked_fill(unread, 0 if tap.positions == "tokens" else torch.nan)
            with forward_as(self.base, partial(_ignoring_inputs, _outputs_with(tap.source, outputs, hidden))):
                found = self.core(**probe)[0]
            judged = real if expected.shape[:2] == real.shape else ...
            if torch.allclose(found[judged], expected[judged], rtol=1e-3):
                return tap
        raise ConfigurationError(
            f"The head of {type(self.core).__name__} reads more than one field of its base's output, or padding: it "
            "cannot be run without the base."
        )


class Replay:
    """Forward passes of a model that start at a cut, from hidden states that are given instead of computed.

    Below the cut, embeddings and blocks return what crosses the cut at once, whatever they are asked; the block above
    takes that as its input, which is exact as long as blocks hand on hidden states and nothing else. At the top cut
    the base itself is passed over. Every depth is tried out on ``probe`` first.

    Args:
        model: In evaluation mode while this is made.
        probe: A few examples of different lengths.
        depths: Where the model will be cut: 0 (above the embeddings) to n (below the head).

    Raises:
        ConfigurationError: The model is not such a line of blocks, for instance an encoder and a decoder.
    """

    def __init__(self, model: CutModel, probe: Batch, depths: Sequence[int]) -> None:
        if model.core.config.is_encoder_decoder:
            raise ConfigurationError(
                f"{type(model.core).__name__} is an encoder and a decoder, and all its upper blocks read the encoder: "
                "it cannot be cut."
            )
        self._model = model
        self._hidden: Tensor | None = None
        self._installed = ExitStack()
        self._answers: dict[nn.Module, Callable[[Tensor], Any]] = {}
        self.taps = {depth: Tap(depth) for depth in depths if depth < len(model.blocks)}
        if self.taps:
            self._learn_answers(probe)
            self._try_out(probe)
        if len(model.blocks) in depths:
            tap = self.taps[len(model.blocks)] = model.head_tap(probe)
            self._answers[model.base] = partial(_outputs_with, tap.source, model.outputs(probe))

    def install(self, depth: int) -> None:
        """Put the cut above ``depth``; passes outside ``feed`` stay ordinary."""
        self.uninstall()
        self._tap = self.taps[depth]
        blocks, base = self._model.blocks, self._model.base
        below = [*self._model.embeddings, *blocks[:depth]]
        if depth < len(blocks):
            self._installed.callback(blocks[depth].register_forward_pre_hook(self._inject, with_kwargs=True).remove)
        else:
            below = [base]
        for module in below:
            if module in self._answers:
                self._installed.enter_context(forward_as(module, partial(self._answer, module, module.forward)))
        refuse = self._model.model.register_forward_pre_hook(self._refuse_lower_layers, with_kwargs=True)
        self._installed.callback(refuse.remove)

    def uninstall(self) -> None:
        """Give every module its own forward method back."""
        self._installed.close()

    @contextmanager
    def feed(self, boundary: Activations, examples: Tensor, batch: Batch) -> Iterator[None]:
        """Forward passes of ``batch``, which is the rows ``examples`` (B,) of ``boundary``, start at the cut."""
        real = real_tokens(self._model.core, batch, width=int(boundary.lengths[examples].max()))
        hidden = boundary.padded(examples, self._tap.select(real).cpu())
        if self._tap.positions == "vector":
            hidden = hidden.squeeze(1)
        self._hidden = hidden.to(device=self._model.core.device, dtype=self._model.core.dtype)
        try:
            yield
        finally:
            self._hidden = None

    def _answer(self, module: nn.Module, ordinary: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return ordinary(*args, **kwargs) if self._hidden is None else self._answers[module](self._hidden)

    def _inject(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._hidden is None:
            return None
        return ((self._hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": self._hidden})

    def _refuse_lower_layers(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name in ("output_hidden_states", "output_attentions"):
            if self._hidden is not None and kwargs.get(name):
                raise ConfigurationError(f"{name}: below the cut nothing is computed. Train without the prefix cache.")

    def _learn_answers(self, probe: Batch) -> None:
        """Note in which form embeddings and blocks return hidden states, to answer in that form."""
        embeddings, blocks = self._model.embeddings, self._model.blocks
        returned: dict[nn.Module, list[Any]] = {module: [] for module in (*embeddings, *blocks)}
        with ExitStack() as stack:
            for module in returned:
                hook = module.register_forward_hook(lambda module, _, output: returned[module].append(output))
                stack.callback(hook.remove)
            self._model.outputs(probe)
        shapes = {_hidden_of(output).shape for block in blocks for output in returned[block]}
        if len(shapes) != 1 or any(len(returned[block]) != 1 for block in blocks):
            raise ConfigurationError(
                f"{type(self._model.core).__name__} cannot be cut between blocks: expected blocks that run once each, "
                f"with hidden states of one shape. Found: {', '.join(str(tuple(shape)) for shape in shapes)}."
            )
        for block in blocks:
            output = returned[block][0]
            self._answers[block] = partial(_padded_tuple, len(output)) if isinstance(output, tuple) else unchanged
        for embedding in embeddings:
            if [getattr(output, "shape", None) for output in returned[embedding]] == list(shapes):
                self._answers[embedding] = unchanged

    def _try_out(self, probe: Batch) -> None:
        """Replay ``probe`` at every cut between blocks and compare with an ordinary pass."""
        expected = self._model.outputs(probe)[0]
        real = real_tokens(self._model.core, probe, width=expected.shape[1])
        tolerance = torch.finfo(expected.dtype).eps ** 0.5
        depths = list(self.taps)
        for depth, boundary in zip(depths, self._model.run(probe, list(self.taps.values())), strict=True):
            self.install(depth)
            with self.feed(boundary, torch.arange(len(boundary)), probe):
                found = self._model.outputs(probe)[0]
            self.uninstall()
            error = (found - expected)[real].abs().max()
            if not error <= tolerance * expected[real].abs().max():
                raise ConfigurationError(
                    f"{type(self._model.core).__name__} cannot be cut above depth {depth}: replayed from there, its "
                    f"output is {float(error):.2g} off. Its blocks pass on more than hidden states."
                )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def skipping_zero_layers(model: nn.Module) -> Iterator[None]:
    """Linear layers of zeros answer without a product: the block of ``add_mean_pooling`` is mostly made of them.

    So are LoRA's second factors before training.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if type(module) is nn.Linear and not any(parameter.any() for parameter in module.parameters()):
                stack.enter_context(forward_as(module, partial(_zeros, module.out_features)))
        yield


@contextmanager
def forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let ``forward`` answer in the module's place."""
    own = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]


def _candidates(outputs: ModelOutput) -> list[Tap]:
    """What a head might read, the least first."""
    vectors = [name for name, value in outputs.items() if isinstance(value, Tensor) and value.dim() == 2]
    states = [name for name, value in outputs.items() if isinstance(value, Tensor) and value.dim() == 3]
    return [Tap(name, "vector") for name in vectors] + [
        Tap(name, positions) for positions in ("first", "last", "tokens") for name in states
    ]


def _outputs_with(field: int | str, template: ModelOutput, hidden: Tensor) -> ModelOutput:
    """The base's output with ``hidden`` as its ``field``; all else is NaN, so that to read it would show."""
    unread = {
        name: value.new_full((), torch.nan).expand(len(hidden), *value.shape[1:])
        for name, value in template.items()
        if isinstance(value, Tensor)
    }
    return type(template)(**{**unread, str(field): hidden})


def _hidden_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _ignoring_inputs(answer: ModelOutput, *_: Any, **__: Any) -> ModelOutput:
    return answer


def _zeros(size: int, hidden: Tensor) -> Tensor:
    return hidden.new_zeros(*hidden.shape[:-1], size)


def unchanged(hidden: Tensor) -> Tensor:
    """The answer of a layer that is passed over."""
    return hidden


def _padded_tuple(length: int, hidden: Tensor) -> tuple[Tensor | None, ...]:
    return (hidden, *[None] * (length - 1))
