"""Pooled features: of which module, at which tokens, without a second forward pass."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from hf_transfer.errors import ConfigurationError
from hf_transfer.pooling import PooledFeatures, pool
from tests.tiny import collate, text_rows, tiny_bert, tiny_llama

BATCH = collate(list(text_rows(6).select_columns(["input_ids", "attention_mask"])))


def features_of(model, pooling="head", batch=BATCH):
    model.train()
    place = PooledFeatures(model, pooling)
    model(**batch)
    features = place.take(batch)
    assert features.shape == (len(next(iter(batch.values()))), place.size)
    return features


def test_pooling_by_hand_with_padding_on_either_side():
    hidden = torch.arange(24.0).view(3, 4, 2)
    real = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]]).bool()
    assert pool(hidden, real, "cls").tolist() == [[0, 1], [12, 13], [16, 17]]
    assert pool(hidden, real, "last").tolist() == [[4, 5], [14, 15], [16, 17]]
    assert pool(hidden, real, "mean").tolist() == [[2, 3], [13, 14], [0, 0]]
    hidden[:, 3], hidden[1, :2] = torch.nan, torch.nan
    assert torch.isfinite(pool(hidden[:1], real[:1], "mean")).all()


def test_the_head_reads_it():
    model = tiny_bert()
    features = features_of(model)
    torch.testing.assert_close(model.classifier(features), model(**BATCH).logits)


def test_the_last_linear_layer_of_a_deeper_head():
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = RobertaForSequenceClassification(config)
    torch.testing.assert_close(model.classifier.out_proj(features_of(model)), model(**BATCH).logits)


def test_under_lora_the_trained_copy_of_the_head():
    model = get_peft_model(tiny_bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    copy = model.base_model.model.classifier.modules_to_save["default"]
    torch.testing.assert_close(copy(features_of(model)), model(**BATCH).logits)


def test_lora_on_the_head_itself():
    model = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query", "classifier"], r=4))
    layer = model.base_model.model.classifier
    torch.testing.assert_close(layer(features_of(model)), model(**BATCH).logits)


def test_hooks_go_with_their_owner():
    model = tiny_bert()
    place = PooledFeatures(model)
    assert model.classifier._forward_hooks
    place.listens = False
    model(**BATCH)
    copy.deepcopy(model)
    del place
    gc.collect()
    assert not model.classifier._forward_hooks


def test_a_decoders_last_and_mean_tokens():
    model = tiny_llama()
    hidden = model.model(**BATCH).last_hidden_state
    lengths = BATCH["attention_mask"].sum(1)
    means = torch.stack([row[:length].mean(0) for row, length in zip(hidden, lengths, strict=True)])
    torch.testing.assert_close(features_of(model), means)
    last = torch.stack([row[length - 1] for row, length in zip(hidden, lengths, strict=True)])
    torch.testing.assert_close(features_of(model, "last"), last)


@pytest.mark.parametrize("name", ["bert.encoder.layer.1", "bert.encoder.layer.1.output"])
def test_a_named_module(name):
    model = tiny_bert()
    states = model.bert(**BATCH, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(features_of(model, name), pool(states, BATCH["attention_mask"].bool(), "mean"))


def test_images_and_sound():
    torch.manual_seed(0)
    vit = ViTForImageClassification(
        ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8,
            patch_size=4, num_channels=1,
        )
    )  # fmt: skip
    images = {"pixel_values": torch.randn(3, 1, 8, 8)}
    torch.testing.assert_close(vit.classifier(features_of(vit, batch=images)), vit(**images).logits)
    sound = Wav2Vec2ForSequenceClassification(
        Wav2Vec2Config(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8),
            conv_stride=(4, 4), conv_kernel=(8, 8), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
            classifier_proj_size=8, feat_extract_norm="layer", hidden_dropout=0.0,
            attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, layerdrop=0.0,
            apply_spec_augment=False,
        )
    )  # fmt: skip
    waves = {"input_values": torch.randn(2, 400), "attention_mask": torch.ones(2, 400, dtype=torch.long)}
    waves["attention_mask"][1, 200:] = 0
    torch.testing.assert_close(sound.classifier(features_of(sound, batch=waves)), sound(**waves).logits)
    short = {name: value[1:, :200] for name, value in waves.items()}
    torch.testing.assert_close(
        features_of(sound, "mean", waves)[1:], features_of(sound, "mean", short), rtol=1e-3, atol=1e-3
    )


def test_nothing_is_kept_after_it_was_taken():
    model = tiny_bert()
    place = PooledFeatures(model)
    with pytest.raises(ConfigurationError, match="expected one row per example, found NoneType"):
        place.take(BATCH)
    model(**BATCH)
    place.take(BATCH)
    with pytest.raises(ConfigurationError, match="found NoneType"):
        place.take(BATCH)


def test_what_is_not_there_is_named():
    with pytest.raises(ConfigurationError, match="has no such module. Did you mean 'bert.encoder.layer.1'"):
        PooledFeatures(tiny_bert(), "bert.encoder.layers.1")
    config = T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(ConfigurationError, match="T5ForConditionalGeneration is an encoder and a decoder"):
        PooledFeatures(T5ForConditionalGeneration(config))


def test_virtual_tokens_are_not_taken_for_real_ones():
    model = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    place = PooledFeatures(model, "last")
    model(**BATCH)
    with pytest.raises(ConfigurationError, match="virtual tokens"):
        place.take(BATCH)
