"""``keep_layers`` gives the model with the other layers taken out, for every family, or says why
it cannot.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import logitcask.train.model.layers
from logitcask.cache_format.errors import ConfigError, UserError
from logitcask.train.config import StudentConfig
from logitcask.train.model.layers import _place, from_layers
from logitcask.train.model.student import build_student

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
SMALL |= {
    "num_hidden_layers": 6,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
}
SMALL |= {"eos_token_id": 2, "pad_token_id": 0}
MOE = SMALL | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "num_local_experts": 4,
}
DEEPSEEK = SMALL | {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
DEEPSEEK |= {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
DEEPSEEK |= {"first_k_dense_replace": 2}
SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "image_size": 28,
}
SIGLIP |= {"patch_size": 14, "model_type": "siglip_vision_model"}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 3}
PER_LAYER = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "num_kv_shared_layers": 2,
    "head_dim": 16,
}
GEMMA3N = {
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.5] * 2 + [0.0] * 4,
    "intermediate_size": [48] * 6,
}
GPT_NEO = {
    "hidden_size": 32,
    "num_layers": 6,
    "num_heads": 2,
    "vocab_size": 64,
    "window_size": 3,
    "initializer_range": 0.2,
}
FAMILIES = {
    "llama": SMALL | {"tie_word_embeddings": True},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 6,
        "n_head": 2,
        "n_positions": 64,
        "vocab_size": 64,
        "initializer_range": 0.2,
    },
    "gpt_neo": GPT_NEO
    | {"attention_types": [[["global", "local"], 3]], "max_position_embeddings": 64},
    "gpt_neox": SMALL,
    "mixtral": MOE,
    "qwen3_moe": MOE | {"head_dim": 16, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    "olmoe": MOE,
    "gpt_oss": MOE | WINDOWS | {"head_dim": 16},
    "deepseek_v3": DEEPSEEK,
    "ernie4_5_moe": SMALL
    | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1},
    "llama4_text": SMALL
    | {
        "head_dim": 16,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "attention_chunk_size": 8,
    },
    "qwen2": SMALL | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    "gemma2": SMALL | {"head_dim": 16, "sliding_window": 4},
    "gemma3": {
        "text_config": SMALL | WINDOWS | {"head_dim": 16, "model_type": "gemma3_text"},
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 4,
        "image_token_index": 63,
    },
    "gemma3n_text": SMALL | WINDOWS | PER_LAYER | GEMMA3N,
}
IDS = torch.arange(3, 23)[None]
ENDS = [2, 5, 6, 7, 8, 9]  # as many as there are layers


@pytest.fixture
def saved(tmp_path):
    """``saved(family)``: the folder of a random model of six layers in several files, with six
    end tokens.
    """

    def make(family, **changes):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(family, **FAMILIES[family], **changes)
            )
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.data += 0.1 * torch.randn(parameter.shape)
        model.generation_config.eos_token_id = ENDS
        model.save_pretrained(tmp_path / family, max_shard_size="40KB")
        assert len(list((tmp_path / family).glob("model-*.safetensors"))) > 1
        return tmp_path / family

    return make


def taken_out(folder, keep):
    """The whole model with its other layers taken out of it by hand."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    place = _place(model, 6)
    layers = model.get_submodule(place)
    model.set_submodule(place, nn.ModuleList(layers[old] for old in keep))
    text = model.config.get_text_config(decoder=True)
    if hasattr(text, "layer_types"):
        text.__dict__["layer_types"] = [text.layer_types[old] for old in keep]
    text.__dict__[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(keep)
    if hasattr(model.base_model, "embed_tokens_per_layer"):
        size = text.hidden_size_per_layer_input
        columns = torch.cat([torch.arange(old * size, (old + 1) * size) for old in keep])
        embedding, projection = (
            model.base_model.embed_tokens_per_layer,
            model.base_model.per_layer_model_projection,
        )
        embedding.weight.data = embedding.weight.data[:, columns]
        projection.weight.data = projection.weight.data[columns]
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_student_is_the_model_without_its_other_layers(saved, tmp_path, family):
    folder, keep = saved(family), [0, 2, 3]
    student = from_layers(folder, keep, torch.float32).eval()
    with torch.no_grad():
        logits = student(IDS, use_cache=False).logits
        torch.testing.assert_close(
            logits, taken_out(folder, keep)(IDS, use_cache=False).logits, atol=1e-5, rtol=1e-5
        )
        assert logits.std() > 0.05
        student.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
        torch.testing.assert_close(again(IDS, use_cache=False).logits, logits, atol=1e-5, rtol=1e-5)
    assert again.config.get_text_config(decoder=True).num_hidden_layers == 3
    assert again.generation_config.eos_token_id == ENDS


@pytest.mark.parametrize(
    ("family", "keep", "changes", "reason"),
    [
        (
            "deepseek_v3",
            [4, 0],
            {},
            "layer 4 has mlp class 'DeepseekV3MoE', and as layer 0 of 2 .* 'DeepseekV3MLP'",
        ),
        ("gpt2", [0, 2], {"scale_attn_by_inverse_layer_idx": True}, "layer 2 has attn scaling"),
        ("gemma3n_text", [1, 5], {}, "layer 1 has self_attn store_full_length_kv"),
        ("llama", [6], {}, "expected distinct numbers from 0 to 5"),
        ("llama", [1, 1], {}, "expected distinct numbers from 0 to 5"),
    ],
)
def test_layers_that_no_config_describes_are_refused(saved, family, keep, changes, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        from_layers(saved(family, **changes), keep, torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3"])
def test_other_layers_are_never_read(saved, monkeypatch, family):
    folder, read = saved(family), []

    class Spy:
        def __init__(self, *arguments, **options):
            self.file = safe_open(*arguments, **options)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def get_slice(self, name):
            read.append(name)
            return self.file.get_slice(name)

    safe_open = logitcask.train.model.layers.safe_open
    monkeypatch.setattr(logitcask.train.model.layers, "safe_open", Spy)
    from_layers(folder, [1, 4], torch.float32)
    decoder = [name for name in read if "vision" not in name and ".layers." in name]
    assert {int(name.partition(".layers.")[2].partition(".")[0]) for name in decoder} == {1, 4}
    vision = {
        name.partition(".layers.")[2].partition(".")[0]
        for name in read
        if "vision" in name and ".layers." in name
    }
    assert len(vision) == (6 if family == "gemma3" else 0)


def test_weights_that_are_missing_are_named(saved):
    folder = saved("llama")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.3.mlp.up_proj.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert from_layers(folder, [0, 2], torch.float32).config.num_hidden_layers == 2
    with pytest.raises(
        UserError,
        match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight \(1 missing in all\)",
    ):
        from_layers(folder, [0, 3], torch.float32)


def test_a_folder_without_a_language_model_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="no config of a causal language model: ") as caught:
        from_layers(tmp_path, [0], torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("origin", [{"model": "own"}, {"init_from": "own", "keep_layers": [0]}])
def test_a_model_with_code_of_its_own_is_refused_without_a_question(tmp_path, monkeypatch, origin):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    fields = {
        "model_type": "unheard",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (tmp_path / "own" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="needs code of its own"):
        build_student(StudentConfig(**origin), seed=0)


@pytest.mark.parametrize("asked", [False, True])
def test_the_loss_that_balances_experts_is_said_to_be_left_out(caplog, asked):
    fields = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    fields |= {
        "num_key_value_heads": 1,
        "vocab_size": 32,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    }
    config = StudentConfig(
        config={"model_type": "mixtral", **fields, "output_router_logits": asked}
    )
    build_student(config, seed=0)
    assert ("keeps its experts evenly used" in caplog.text) == asked
