"""Rouge-L for text of any script.

rouge_score's own tokenizer finds only words of ``a-z`` and ``0-9``, so two equal answers in Chinese
or Arabic score 0. ``Words`` finds the same words in English text, and also those of every other
script.
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
"""Scripts whose words are not set apart, by Unicode's Script_Extensions."""
_LETTER = r"[\p{L}\p{N}]"
# One letter of these scripts with its marks; in other scripts a run of letters, digits and marks,
# which may contain joiners (Persian, Hindi).
_WORD = regex.compile(
    rf"[{_LETTER}&&[{_UNSPACED}]]\p{{M}}*|"
    rf"[{_LETTER}--[{_UNSPACED}]][[\p{{L}}\p{{N}}\p{{M}}\u200c\u200d]--[{_UNSPACED}]]*",
    regex.V1,
)


class Words(Tokenizer):  # type: ignore[misc]
    """Words of any script, in lower case, with compatible characters (full width, ligatures) in
    their plain forms.

    Scripts without spaces between words (Han, kana, Thai, Lao, Khmer, Burmese and similar ones)
    give one word per character. Words of ASCII letters are stemmed as in rouge_score, so ASCII text
    has the same words as there.
    """

    def __init__(self) -> None:
        self._stemmer = PorterStemmer()

    def tokenize(self, text: str) -> list[str]:
        """The words, in order; empty without letters and digits."""
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
