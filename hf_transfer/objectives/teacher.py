"""A frozen model that objectives ask about a micro-batch, and that answers all of them with one forward pass."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import find_labels

from hf_transfer.errors import ConfigurationError
from hf_transfer.losses import transformer_in, with_decoder_inputs
from hf_transfer.objectives.base import Objective
from hf_transfer.vocabularies import token_count, within_vocabulary


class Teacher:
    """A model that teaches: frozen, in evaluation mode, asked about the batch that the student is learning from.

    It is no module, so an objective that holds one neither trains it nor saves it with its checkpoints. It stays where
    it was loaded and in the precision it was loaded in, quantised or not: inputs go to its device and answers come
    back to the batch's; autocast does not reach it. It is given those columns of the batch that its forward method
    names, without labels, so that a DistilBERT can teach a BERT.

    The answer is kept until every objective served has asked for it, or until the batch is gone, or until the next
    batch; it is never given for other tensors, nor for the same ones after they were written to.

    Args:
        model: A transformers model, bare or inside a PEFT model. Its parameters stop requiring gradients.

    Raises:
        ConfigurationError: ``model`` is no transformers model and wraps none, or DeepSpeed ZeRO-3 has sharded it.

    Example:
        >>> teacher = Teacher.of(model)
        >>> teacher(batch).logits
    """

    _of_model: weakref.WeakValueDictionary[int, Teacher] = weakref.WeakValueDictionary()

    _answer: list[ModelOutput]
    _key: dict[str, tuple[int, int]]
    _guards: list[weakref.ref[Tensor]]
    _due: int

    def __init__(self, model: nn.Module) -> None:
        core = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        if core is None:
            raise ConfigurationError(f"teacher: expected a transformers model, found {type(model).__name__}.")
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise ConfigurationError(
                "teacher: DeepSpeed ZeRO-3 cut its weights into shards as it was loaded, and nothing puts them "
                "together again. Load it before the training arguments, take stage 2, or run it once: TeacherStore."
            )
        self.model = model.eval().requires_grad_(False)
        self.core: Any = core
        named = inspect.signature(core.forward).parameters
        self.inputs = named.keys() - set(find_labels(type(core)))
        """The columns it reads beside labels, which the student need not know."""
        self._options = {"use_cache": False} if "use_cache" in named else {}
        self._tokens: int | None = None  # where the student has more
        self._served: weakref.WeakSet[Objective] = weakref.WeakSet()
        self._forget()

    @classmethod
    def of(cls, model: nn.Module | Teacher) -> Teacher:
        """The one teacher that ``model`` is, so that objectives made apart from each other share its answers.

        Raises:
            ConfigurationError: As for ``Teacher(model)``.
        """
        if isinstance(model, Teacher):
            return model
        teacher = cls._of_model.get(id(model))  # a teacher holds its model, so no other model can have that id
        if teacher is None:
            teacher = cls._of_model[id(model)] = cls(model)
        return teacher

    def serve(self, objective: Objective, student: nn.Module) -> None:
        """Answer ``objective`` from now on, with hidden states and attentions if it reads them.

        Args:
            objective: The term that will ask, once per micro-batch.
            student: The model that is trained.

        Raises:
            ConfigurationError: Teacher and student share weights: the target would move with the student.
        """
        own = {id(parameter) for parameter in self.model.parameters()}
        shared = next((name for name, parameter in student.named_parameters() if id(parameter) in own), None)
        if shared is not None:
            raise ConfigurationError(
                f"{objective.name}: the student's '{shared}' is the teacher's too. Expected two models: load the "
                "teacher a second time, or copy.deepcopy it."
            )
        ours, theirs = (token_count(each) for each in (transformer_in(student), self.core))
        if ours is not None and theirs is not None and ours > theirs:
            self._tokens = theirs
        self._served.add(objective)
        self._forget()

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        """The teacher's ``ModelOutput`` for ``batch``, on the device of the batch, without gradients.

        Args:
            batch: A collated micro-batch; teaching columns and labels may be among it. An encoder-decoder that is
                given no ``decoder_input_ids`` gets the labels, shifted.
        """
        tensors = {name: batch[name] for name in (*self.inputs, "labels") if isinstance(batch.get(name), Tensor)}
        key = {name: (id(tensor), tensor._version) for name, tensor in tensors.items()}
        if not self._answer or key != self._key:  # while there is an answer its tensors live, and ids are theirs
            self._forget()
            self._answer.append(self._ask(batch))
            self._key, self._due = key, len(self._served)
            self._guards = [weakref.ref(tensor, self._forgetting()) for tensor in tensors.values()]
        answer = self._answer[0]
        self._due -= 1
        if self._due <= 0:
            self._forget()
        return answer

    @torch.no_grad()
    def _ask(self, batch: Mapping[str, Any]) -> ModelOutput:
        if self.model.training:
            self.model.eval()
        device = next(value.device for value in batch.values() if isinstance(value, Tensor))
        inputs = within_vocabulary(send_to_device(self._inputs_of(batch), self.core.device), self._tokens)
        inputs = {
            name: value.to(self.core.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }
        for wanted in ("hidden_states", "attentions"):
            if any(getattr(objective, wanted) for objective in self._served):
                inputs[f"output_{wanted}"] = True
        with torch.autocast(self.core.device.type, enabled=False):
            answer = self.model(**inputs, **self._options)
        return answer if device == self.core.device else send_to_device(answer, device)

    def _inputs_of(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        inputs = {name: value for name, value in batch.items() if name in self.inputs}
        return with_decoder_inputs(self.core, inputs, batch.get("labels"), self.inputs)

    def _forget(self) -> None:
        self._answer = []
        self._key = {}
        self._guards = []
        self._due = 0

    def _forgetting(self) -> Callable[[Any], None]:
        """A callback that drops the present answer and holds nothing else, this teacher least of all."""
        kept = self._answer
        return lambda _: kept.clear()
