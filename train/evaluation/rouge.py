"""Rouge-L for text of any script.

The tokenizer of rouge_score finds only words of ``a-z`` and ``0-9``, so two equal answers in
Chinese or Arabic score 0. ``Words`` finds the same words in English text, and the words of every
other script.
"""

from __future__ import annotations

import unicodedata

import regex
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

_UNSPACED = (
    r"\p{scx=Hani}\p{scx=Hira}\p{scx=Kana}\p{scx=Bopo}\p{scx=Yiii}\p{scx=Thai}\p{scx=Laoo}\p{scx=Khmr}\p{scx=Mymr}"
    r"\p{scx=Lana}\p{scx=Tale}\p{scx=Talu}\p{scx=Tavt}\p{scx=Java}\p{scx=Bali}"
)
"""Scripts without spaces between words, by Unicode's Script_Extensions."""
_LETTER = r"[\p{L}\p{N}]"
# In these scripts a word is one letter with its marks. In other scripts it is a run of letters,
# digits and marks, which may contain joiners (Persian, Hindi).
_WORD = regex.compile(
    rf"[{_LETTER}&&[{_UNSPACED}]]\p{{M}}*|"
    rf"[{_LETTER}--[{_UNSPACED}]][[\p{{L}}\p{{N}}\p{{M}}\u200c\u200d]--[{_UNSPACED}]]*",
    regex.V1,
)


class Words(Tokenizer):  # type: ignore[misc]
    """A tokenizer for any script: words in lower case, full-width characters and ligatures in their
    plain forms.

    In scripts without spaces between words (Han, kana, Thai, Lao, Khmer, Burmese and similar ones)
    each character is a word. ASCII words are stemmed as in rouge_score, so ASCII text gives the
    same words as rouge_score's tokenizer.
    """

    def __init__(self) -> None:
        self._stemmer = PorterStemmer()

    def tokenize(self, text: str) -> list[str]:
        """The words in order; an empty list for text without letters and digits."""
        words = _WORD.findall(unicodedata.normalize("NFKC", text).lower())
        return [
            self._stemmer.stem(word) if len(word) > 3 and word.isascii() else word for word in words
        ]


class RougeL:
    """F1 of the longest common subsequence of the ``Words`` of two texts, 0 to 1."""

    def __init__(self) -> None:
        self._words = Words()
        self._scorer = RougeScorer(["rougeL"], tokenizer=self._words)

    def __call__(self, reference: str, text: str) -> float | None:
        """The score; None for a reference without words."""
        if not self._words.tokenize(reference):
            return None
        return float(self._scorer.score(reference, text)["rougeL"].fmeasure)
