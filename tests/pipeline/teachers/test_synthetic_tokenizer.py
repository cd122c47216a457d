"""The synthetic teacher's tokenizer: bytes, offsets, chats."""

from __future__ import annotations

from logitcask.pipeline.config import TeacherConfig
from logitcask.pipeline.teachers.open import open_tokenizer
from logitcask.pipeline.teachers.synthetic_tokenizer import SyntheticTokenizer

TEXT = (
    "def wurzel(größe: float) -> float:\n    return größe ** 0.5  # √größe\n\n"
    "東京は日本の首都です。 Москва — столица России. 🗼🧪 e\u0301 naïve café\n"
    "The quick brown fox jumps over the lazy dog, and the lazy dog does not mind at all.\n"
)


def test_synthetic_tokenizer_round_trip_and_offsets() -> None:
    tokenizer = SyntheticTokenizer()
    text = f"<|im_start|>user\n{TEXT}<|im_end|>\n"
    one = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    many = tokenizer([text, "", "x"], return_offsets_mapping=True)
    assert tokenizer.decode(one["input_ids"]) == text
    assert tokenizer.decode(one["input_ids"], skip_special_tokens=True) == f"user\n{TEXT}\n"
    assert many["input_ids"] == [[256, *one["input_ids"]], [256], [256, ord("x")]]
    assert many["offset_mapping"][0][1:] == one["offset_mapping"]
    assert one["input_ids"].count(256) == one["input_ids"].count(257) == 1
    assert len(one["input_ids"]) == len(text.encode()) - len("<|im_start|><|im_end|>") + 2
    for index, (start, end) in zip(one["input_ids"], one["offset_mapping"], strict=True):
        if index < 256:
            assert end == start + 1
            assert index in text[start].encode()
        else:
            assert text[start:end] == tokenizer.convert_ids_to_tokens([index])[0]
    assert tokenizer.decode([72, 105, 300]) == "Hi<300>"
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_synthetic_tokenizer_renders_chats() -> None:
    tokenizer = open_tokenizer(TeacherConfig(model="synthetic"))
    chat = [{"role": "user", "content": "Größe?"}, {"role": "assistant", "content": "42"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<|im_start|>user\nGröße?<|im_end|>\n<|im_start|>assistant\n42<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert tokenizer.decode(tokenizer.apply_chat_template(chat)) == text
    template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    assert (
        tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
        == "Größe?<|im_end|>42<|im_end|>"
    )
