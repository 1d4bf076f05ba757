"""Models people use: BERT, ViT and GPT-2 from configs go through swap, training and back."""

from __future__ import annotations

import pytest
import torch

import sparsekern as sk

from .test_sparsify import FORCED, no_tuned_entries, train  # noqa: F401

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


def bert():
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config), torch.randint(100, (4, 16))


def vit():
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config), torch.randn(2, 3, 32, 32)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=100, n_embd=64, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config), torch.randint(100, (2, 16))


@pytest.mark.parametrize(("make", "at_least"), [(bert, 12), (vit, 12), (gpt2, 8)])
def test_swap_train_and_back(make, at_least):
    torch.manual_seed(0)
    model, x = make()
    original, _ = make()
    plan = sk.sparsify_(model, sk.SparsityConfig(sparsity=0.8, block=8, **FORCED), example_input=x)
    assert plan.totals()["sparse"] >= at_least
    heads = [layer for layer in plan.layers if layer.name.rpartition(".")[2] in ("classifier", "lm_head")]
    assert heads
    assert all(layer.state == "dense" for layer in heads)
    before = sk.dense_state_dict(model)
    train(model, x, lr=0.01)
    state = sk.dense_state_dict(model)
    assert any(not torch.equal(before[key], state[key]) for key in state if key.endswith("weight"))
    assert set(state) == set(original.state_dict())
    original.load_state_dict(state)
    model.eval(), original.eval()
    torch.testing.assert_close(model(x).logits, original(x).logits, rtol=1e-3, atol=1e-4)
    sk.densify_(model)
    assert {type(m).__name__ for m in model.modules()} == {type(m).__name__ for m in original.modules()}
    torch.testing.assert_close(model(x).logits, original(x).logits, rtol=1e-3, atol=1e-4)


def test_encoder_layer_of_torch_keeps_working():
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
    model = torch.nn.Sequential(layer)
    x = torch.randn(2, 5, 64)
    sk.sparsify_(model, sk.SparsityConfig(sparsity=0.5, block=8, **FORCED, overrides={"0.linear2": 0.5}))
    trained = model(x)
    model.eval()
    with torch.no_grad():  # the inference fast path reads raw weights
        torch.testing.assert_close(model(x), trained, rtol=1e-3, atol=1e-4)
