"""What trains when, at which rate, and what the loss is made of."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import TrainerCallback

from hf_transfer.depth import parameter_depths
from hf_transfer.errors import ConfigurationError
from hf_transfer.objectives import L2SP
from hf_transfer.schedules import GradualUnfreeze, SlantedTriangular, TopLevels
from hf_transfer.training.rates import LearningRateBands
from hf_transfer.training.trainer import TransferTrainer
from tests.objectives import Critic, SoftTargets
from tests.tiny import arguments, collate, text_rows, tiny_bert, tiny_llama

LAYERS, HEAD = 3, 4


def make(folder, model=None, *, changes=None, **options):
    return TransferTrainer(
        model or tiny_bert(layers=LAYERS),
        arguments(folder, **(changes or {})),
        data_collator=collate,
        train_dataset=text_rows(),
        eval_dataset=text_rows(10, seed=1),
        **options,
    )


class Watch(TrainerCallback):
    """After every optimizer step: which depths moved, which modules are in training mode."""

    def __init__(self) -> None:
        self.moved: list[set[int]] = []
        self.training: list[set[str]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.before = {name: value.detach().clone() for name, value in model.named_parameters()}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.training.append({name for name, module in model.named_modules() if module.training})

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        depths = parameter_depths(model)
        moved = {depths[name] for name, value in model.named_parameters() if not torch.equal(value, self.before[name])}
        self.moved.append(moved)
        self.on_train_begin(args, state, control, model=model)


def test_levels_open_when_the_schedule_says_and_then_really_move(tmp_path):
    """The trap: a layer whose flag is flipped after the optimizer was made never moves."""
    watch = Watch()
    changes = {"num_train_epochs": LAYERS + 2, "weight_decay": 0.1}
    make(tmp_path, changes=changes, unfreeze=GradualUnfreeze(), callbacks=[watch]).train()
    expected = [set(range(HEAD - epoch, HEAD + 1)) for epoch in range(LAYERS + 2) for _ in range(4)]
    assert watch.moved == expected


def test_frozen_prefix_is_in_eval_mode_and_what_is_open_is_not(tmp_path):
    watch = Watch()
    make(tmp_path, unfreeze=TopLevels(1), callbacks=[watch]).train()
    assert "bert.encoder.layer.2.output.dropout" in watch.training[0]
    assert "bert.encoder.layer.1.output.dropout" not in watch.training[0]
    assert "bert.embeddings.dropout" not in watch.training[0]


def test_everything_is_open_again_after_training(tmp_path):
    trainer = make(tmp_path, unfreeze=TopLevels(0))
    trainer.train()
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_after_an_interrupted_run_everything_is_open_when_ddp_wraps_again(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    trainer = make(tmp_path, unfreeze=TopLevels(0), callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.create_optimizer()
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_layer_decay_reaches_every_parameter(tmp_path):
    trainer = make(tmp_path, layer_decay=0.5)
    groups = trainer.create_optimizer().param_groups
    rate_of = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    depths = parameter_depths(trainer.model)
    for name, parameter in trainer.model.named_parameters():
        assert rate_of[id(parameter)] == pytest.approx(1e-2 * 0.5 ** (HEAD - depths[name])), name
    assert sum(len(group["params"]) for group in groups) == len(depths)


def test_bands_and_base_ratio(tmp_path):
    def rates(**options):
        return {row.depth: row.learning_rate for row in make(tmp_path, **options).plan()}

    bands = LearningRateBands(head=1e-3, upper=1e-4, lower=1e-5)
    assert rates(bands=bands) == {4: 1e-3, 3: 1e-4, 2: 1e-4, 1: 1e-5, 0: 1e-5}
    assert rates(base_ratio=0.1) == pytest.approx({4: 1e-2, 3: 1e-3, 2: 1e-3, 1: 1e-3, 0: 1e-3})


def test_weight_decay_is_split_as_plain_trainer_splits_it(tmp_path):
    trainer = make(tmp_path, layer_decay=0.5, changes={"weight_decay": 0.1})
    plain = set(trainer.get_decay_parameter_names(trainer.model))
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    decayed = {
        names[id(parameter)]
        for group in trainer.create_optimizer().param_groups
        if group["weight_decay"]
        for parameter in group["params"]
    }
    assert decayed == plain


def test_slanted_triangular_drives_every_group(tmp_path):
    seen = []

    class Rates(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            seen.append([group["lr"] / group["initial_lr"] for group in optimizer.param_groups])

    make(
        tmp_path,
        changes={"max_steps": 10},
        layer_decay=0.5,
        learning_rate_schedule=SlantedTriangular(),
        callbacks=[Rates()],
    ).train()
    for step, factors in enumerate(seen):
        assert factors == pytest.approx([SlantedTriangular()(step / 10)] * len(factors))


def test_plan_is_printed_before_training(tmp_path, capsys):
    make(tmp_path, changes={"num_train_epochs": 2}, unfreeze=GradualUnfreeze(), layer_decay=0.5).train()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["depth", "parameters", "learning", "rate", "opens", "at", "epoch", "modules"]
    assert lines[1].split() == ["4", "51", "1.00e-02", "0.00", "classifier"]
    assert lines[2].split()[3:] == ["1.00", "bert.encoder.layer.2,", "bert.pooler"]
    assert lines[3].split()[3] == "never"


def test_the_sum_of_terms_is_the_loss(tmp_path):
    """Logged terms, weighted, add up to the logged loss; evaluation reports the task alone."""
    trainer = make(tmp_path, objectives=[Critic(weight=0.3), SoftTargets(weight=0.5)], task_weight=0.25)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4
    for entry in logged:
        total = 0.25 * entry["task_loss"] + 0.3 * entry["critic_loss"] + 0.5 * entry["soft_targets_loss"]
        assert entry["loss"] == pytest.approx(total, abs=1e-3)
    plain = make(tmp_path)
    plain.model.load_state_dict(trainer.model.state_dict())
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_an_objectives_weights_learn_and_do_not_ship(tmp_path):
    trainer = make(tmp_path, objectives=[Critic()], changes={"num_train_epochs": 20, "learning_rate": 0.03})
    before = trainer.scaffold.objectives[0].probe.weight.clone()
    trainer.train()
    losses = [entry["critic_loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert not torch.equal(before, trainer.scaffold.objectives[0].probe.weight)
    trainer.save_model(str(tmp_path / "shipped"))
    assert sorted(path.name for path in (tmp_path / "shipped").iterdir()) == [
        "config.json",
        "model.safetensors",
        "training_args.bin",
    ]


def test_l2sp_is_half_the_squared_distance_from_the_start(tmp_path):
    model = tiny_bert()
    objective = L2SP()
    objective.prepare(model)
    assert objective(model, {}, None, 0.0).item() == 0.0
    start = {name: value.detach().double() for name, value in model.named_parameters()}
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter += 0.01 * (index + 1)
    expected = sum(
        0.5 * (value.detach().double() - start[name]).square().sum()
        for name, value in model.named_parameters()
        if not name.startswith("classifier")
    )
    assert objective(model, {}, None, 0.0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_base_weight_open_under_an_adapter_is_refused(tmp_path):
    model = get_peft_model(tiny_bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    make(tmp_path, model).train()
    model.base_model.model.bert.encoder.layer[1].output.dense.weight.requires_grad_(True)
    with pytest.raises(ConfigurationError, match="bert.encoder.layer.1.output.dense.weight.*modules_to_save"):
        make(tmp_path, model).train()


def test_lora_opens_from_the_top(tmp_path):
    model = get_peft_model(tiny_bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    watch = Watch()
    changes = {"num_train_epochs": 4}
    make(tmp_path, model, unfreeze=GradualUnfreeze(), changes=changes, callbacks=[watch]).train()
    assert watch.moved == [set(range(HEAD - epoch, HEAD + 1)) for epoch in range(4) for _ in range(4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_decay": 0.9, "base_ratio": 0.1}, "layer_decay and base_ratio each set the rate"),
        ({"layer_decay": 1.5}, "layer_decay must be in"),
        ({"objectives": [L2SP(), L2SP()]}, "more than one term is called 'l2sp'"),
        ({"changes": {"ddp_find_unused_parameters": False}, "unfreeze": GradualUnfreeze()}, "ddp_find_unused"),
    ],
)
def test_contradictions_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigurationError, match=message):
        make(tmp_path, **options)


def test_given_optimizer_excludes_rates_by_depth(tmp_path):
    model = tiny_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match="do not pass 'optimizers'"):
        make(tmp_path, model, layer_decay=0.5, optimizers=(optimizer, None))


def test_model_init_is_rebuilt_for_every_run(tmp_path):
    trainer = TransferTrainer(
        args=arguments(tmp_path, max_steps=2),
        model_init=lambda: tiny_bert(),
        data_collator=collate,
        train_dataset=text_rows(),
        layer_decay=0.5,
        unfreeze=GradualUnfreeze(),
    )
    trainer.train()
    first = trainer.model.classifier.weight.clone()
    trainer.train()
    assert torch.equal(first, trainer.model.classifier.weight)


def test_columns_of_objectives_survive_and_never_reach_the_model(tmp_path):
    """``remove_unused_columns`` would drop ``domain``; the model would not accept it."""
    trainer = make(tmp_path, objectives=[Critic()])
    batch = next(iter(trainer.get_train_dataloader()))
    assert "domain" in batch
    assert "domain" not in next(iter(make(tmp_path).get_train_dataloader()))


def test_a_frozen_teacher_inside_an_objective_is_not_saved_with_it(tmp_path):
    """Most language models tie weights, which safetensors refuses, and a teacher is given, not learnt."""

    class FromTiedTeacher(Critic):
        def prepare(self, model):
            super().prepare(model)
            self.teacher = tiny_llama(tie_word_embeddings=True).requires_grad_(False)

    options = {"objectives": [FromTiedTeacher()], "changes": {"save_strategy": "steps", "save_steps": 2}}
    make(tmp_path, **options).train()
    with safe_open(tmp_path / "checkpoint-2" / "scaffold.safetensors", "pt") as state:
        assert sorted(state.keys()) == ["0.probe.bias", "0.probe.weight"]
    make(tmp_path, **options).train(resume_from_checkpoint=True)


def test_plateau_scheduler_drives_an_objectives_weights_too(tmp_path):
    changes = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch", "metric_for_best_model": "loss"}
    trainer = make(tmp_path, objectives=[Critic()], changes=changes)
    before = trainer.scaffold.objectives[0].probe.weight.clone()
    trainer.train()
    assert not torch.equal(before, trainer.scaffold.objectives[0].probe.weight)


def test_unfreezing_by_epochs_needs_a_length(tmp_path):
    rows = text_rows().to_iterable_dataset()
    changes = {"max_steps": 8}

    def train(schedule):
        watch = Watch()
        options = {"unfreeze": schedule, "data_collator": collate, "callbacks": [watch]}
        TransferTrainer(tiny_bert(), arguments(tmp_path, **changes), train_dataset=rows, **options).train()
        return watch.moved

    with pytest.raises(ConfigurationError, match="no epochs to count by"):
        train(GradualUnfreeze())
    assert train(GradualUnfreeze(until=0.5))[-1] == set(range(HEAD + 1))


def test_plan_before_training_counts_epochs_from_max_steps(tmp_path):
    rows = make(tmp_path, changes={"max_steps": 12}, unfreeze=GradualUnfreeze()).plan()
    assert [row.opens_at_epoch for row in rows] == pytest.approx([0, 1, 2, float("inf"), float("inf")])


def test_a_micro_batch_without_labels_counts_for_nothing(tmp_path):
    """Its mean over no labels is not a number; the step's gradient is that of the other micro-batches."""
    rows = text_rows(8).map(lambda row, index: {"labels": -100 if index < 4 else row["labels"]}, with_indices=True)
    logs = []
    for batch, accumulate in ((8, 1), (4, 2)):
        changes = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulate,
            "train_sampling_strategy": "sequential",
            "logging_nan_inf_filter": False,
        }
        trainer = TransferTrainer(
            tiny_bert(), arguments(tmp_path, **changes), train_dataset=rows, data_collator=collate
        )
        trainer.train()
        logs.append(next(entry for entry in trainer.state.log_history if "loss" in entry))
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-5)
    assert logs[0]["grad_norm"] == pytest.approx(logs[1]["grad_norm"], rel=1e-5)


def test_weights_lost_by_transformers_own_adapters_are_refused(tmp_path):
    model = tiny_bert()
    model.add_adapter(LoraConfig(target_modules=["query"]))
    model.classifier.requires_grad_(True)
    with pytest.raises(ConfigurationError, match="classifier"):
        make(tmp_path, model).train()
