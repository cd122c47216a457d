"""What a report shows of single positions: tokens that are only parts of characters, too."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from logitcask.cache_format import CacheReader
from logitcask.train.data.dataset import CachedDataset, HeldOut
from logitcask.train.evaluation.evaluate import examples
from logitcask.train.head.lm_head import LogitsHead


class HalfCharacters:
    """A tokenizer whose every token is the first byte of a Chinese character."""

    def decode(self, tokens, **options):
        return "\N{REPLACEMENT CHARACTER}" * len(tokens)

    def convert_ids_to_tokens(self, tokens):
        return ["ä"] * len(tokens)  # 0xE4 in byte-level BPE


def test_examples_show_bytes_and_no_replacement_characters(cache):
    reader = CacheReader(cache)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    head = LogitsHead(AutoModelForCausalLM.from_config(config))
    data = HeldOut([CachedDataset(reader, range(3))])
    shown = examples(head, data, HalfCharacters(), count=4)
    assert len(shown) == 4
    for each in shown:
        assert (each["context"], each["target"]) == ("", "\\xe4")
        assert {name for name, _ in each["teacher"] + each["student"]} == {"\\xe4"}
        assert sum(probability for _, probability in each["student"]) < 1
