"""Concepts that a token may stand for, told by rules on words: what stands in the text, and what the model expects.

Rules see text and the places where tokens end, so they are the same for every tokenizer. A word counts at the token
that ends it; a state (inside quotation marks, a kind of text) at every token. What the model expects is the mass of its
next-token distribution on the tokens whose text begins a word of a list and is one.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rooms.smollm.model import KINDS, Captured, Windows
from rooms.stories.concepts import Concepts

WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?|\d+|[^\w\s]|_")
MASS = 0.25  # of a list in the next-token distribution, from which on it counts as expected

# fmt: off
LISTS = {
    "he, him, his": "he him his himself",
    "she, her": "she her herself",
    "they, them, their": "they them their themselves",
    "I, me, my": "i me my myself",
    "you, your": "you your",
    "we, us, our": "we us our",
    "it, its": "it its itself",
    "the": "the",
    "a, an": "a an",
    "this, that, these": "this that these those",
    "of": "of",
    "to": "to",
    "in, on, at": "in on at into upon within inside near under over",
    "for, with, by, from": "for with by from without through",
    "and": "and",
    "or": "or nor either",
    "but, though": "but though although however yet",
    "because, so, if": "because so if since unless therefore",
    "when, then": "when while then after before until once",
    "who, which": "who which whose whom",
    "what, how, why": "what how why where",
    "not, no": "not no never none nothing cannot without",
    "is, was, be": "is are was were be been being am",
    "has, have": "has have had having",
    "do, did": "do does did done doing",
    "can, will, must": "can could will would should may might must shall",
    "say": "say says said saying asked replied told called tell exclaimed",
    "all, many, some": "all many some any every each both few several most much",
    "more, very": "more most very too quite rather less least really",
    "as": "as like than",
    "number word": "one two three four five six seven eight nine ten hundred thousand first second third half",
    "time": "time day days year years night morning week month hour hours minute early today now ago soon century",
    "family": "mother father mom mommy dad daddy brother sister son daughter wife husband child children baby parents",
    "person": "man men woman women boy girl people person friend friends lady fellow hacker hackers user users writer",
    "animal": "animal animals dog cat bird birds horse fish bear rabbit monkey mouse ass cow pig tiger lion frog",
    "body": "head hand hands eye eyes face heart foot feet mouth hair body nose ear ears arm arms legs tail",
    "place": "park house home school garden room world country city place street forest church castle beach garden",
    "nature": "tree trees sun sky water sea river rock flower flowers grass rain snow wind earth ground moon",
    "feeling": "happy sad scared excited angry proud afraid love fear hate joy sorry surprised hope glad",
    "size, age": "big little small large great long short old new young huge tiny high",
    "computing": "computer computers program programs code software file files machine system systems unix hardware "
                 "network internet programming memory disk server bug bugs data user c web linux keyboard mail",
    "power, law": "king law government president officer war army power state court judge political public minister",
    "belief, death": "god church religion soul heaven death dead holy faith prayer devil saint divine spirit grave",
    "language": "word words language term terms name names meaning sense verb noun phrase text letter read write",
    "play, go": "play played go went come came run walk walked saw see look looked found find take took get got",
}
# fmt: on
MARKS = {
    "comma": ",",
    "period": ".",
    "colon, semicolon": ":;",
    "quotation mark": '"',
    "parenthesis": "()[]",
    "hyphen": "-",
    "question, exclamation": "?!",
}
ENDINGS = {
    "-ing": ("ing", 5),
    "-ed": ("ed", 5),
    "-ly": ("ly", 5),
    "-tion": ("tion", 6),
    "-s": ("s", 4),
    "-er": ("er", 5),
    "-al, -ous, -ive": (("al", "ous", "ive", "ful"), 5),
}
BEFORE = {"after the": "the", "after a": "a", "after to": "to", "after of": "of", "after and": "and", "after in": "in"}


def least(*parts: Concepts, times: int) -> list[int]:
    """The concepts that are true, and false, of at least so many samples in every part."""
    enough = [(part.truth.sum(0) >= times) & ((~part.truth).sum(0) >= times) for part in parts]
    return torch.stack(enough).all(0).nonzero()[:, 0].tolist()


def told_by_word(word: str) -> set[str]:
    """The concepts of a word or mark by itself."""
    small = word.lower()
    names = {name for name, listed in LISTS.items() if small in listed.split()}
    names |= {name for name, marks in MARKS.items() if word in marks}
    names |= {name for name, (end, least) in ENDINGS.items() if small.endswith(end) and len(small) >= least}
    names |= {"digits"} if word.isdigit() else set()
    names |= {"all capitals"} if len(word) > 1 and word.isalpha() and word.isupper() else set()
    return names | ({"long word"} if len(word) >= 10 else set())


def told_by_place(words: list[str], at: int) -> set[str]:
    """The concepts that a word has from those before it."""
    word, before = words[at], words[at - 1] if at else "."
    names = {name for name, other in BEFORE.items() if before.lower() == other and word.isalpha()}
    starts = before in ".!?" or (before == '"' and at > 1 and words[at - 2] in ".!?,:")
    names |= {"first word of a sentence"} if starts and word.isalpha() else set()
    names |= {"capital inside a sentence"} if not starts and word[0].isupper() and len(word) > 1 else set()
    long = len(word) >= 4
    names |= {"word seen before"} if long and word.lower() in [w.lower() for w in words[:at]] else set()
    return names | ({"new long word"} if long and len(word) >= 6 and word not in words[:at] else set())


def states(text: str, end: int) -> set[str]:
    """What holds at a place of a text, whatever token is there."""
    sofar = text[:end]
    names = {"inside quotation marks"} if sofar.count('"') % 2 else set()
    names |= {"inside parentheses"} if sofar.count("(") > sofar.count(")") else set()
    last = re.split(r"[.!?]", sofar)[-1]
    return names | ({"late in a long sentence"} if len(WORD.findall(last)) > 25 else set())


def context(windows: Windows) -> dict[str, Bool[Tensor, " n"]]:
    """The concepts of the text at every token, window by window."""
    everything = [*LISTS, *MARKS, *ENDINGS, "digits", "all capitals", "long word", *BEFORE, "first word of a sentence",
                  "capital inside a sentence", "word seen before", "new long word", "inside quotation marks",
                  "inside parentheses", "late in a long sentence", "inside a word"]  # fmt: skip
    sets: list[set[str]] = []
    for text, ends in zip(windows.texts, windows.ends.tolist(), strict=True):
        places = list(WORD.finditer(text))
        words = [match.group() for match in places]
        by_end = {match.end(): at for at, match in enumerate(places)}
        for end in ends:
            at = by_end.get(end)
            own = {"inside a word"} if at is None else told_by_word(words[at]) | told_by_place(words, at)
            sets.append(own | states(text, end))
    truth = {name: torch.tensor([name in one for one in sets]) for name in everything}
    kinds = [kind for kind in windows.kinds for _ in range(windows.tokens.shape[1])]
    return truth | {f"text: {kind}": torch.tensor([one == kind for one in kinds]) for kind in KINDS}


def vocabulary(tokenizer: Any) -> dict[str, Float[Tensor, " k"]]:
    """For every list, mark and ending the tokens that are one: weights of 0 or 1 over the vocabulary."""
    texts = [str(tokenizer.decode([token])) for token in range(len(tokenizer))]

    def members(test: Any) -> Tensor:
        return torch.tensor([float(bool(text) and test(text)) for text in texts])

    sets = {name: set(listed.split()) for name, listed in LISTS.items()}
    token_sets = {name: members(lambda text, of=of: text.strip().lower() in of) for name, of in sets.items()}
    token_sets |= {
        name: members(lambda text, marks=marks: text.strip()[:1] in set(marks)) for name, marks in MARKS.items()
    }
    for name, (end, least) in ENDINGS.items():
        token_sets[name] = members(lambda text, end=end, n=least: text.strip().endswith(end) and len(text.strip()) >= n)
    token_sets["a capital"] = members(lambda text: text.strip()[:1].isupper())
    token_sets["digits"] = members(lambda text: text.strip().isdigit())
    token_sets["more of the same word"] = members(lambda text: text[0].isalpha())
    return token_sets


def prediction(captured: Captured) -> dict[str, Bool[Tensor, " n"]]:
    """What the model expects at every token."""
    truth = {
        f"next: {name}": mass >= MASS for name, mass in captured.told.items() if name not in ("entropy", "largest")
    }
    return truth | {"next: certain": captured.told["largest"] >= 0.9, "next: undecided": captured.told["entropy"] >= 5}


def both(windows: Windows, captured: Captured) -> Concepts:
    """Both families, at every token."""
    families = {"context": context(windows), "prediction": prediction(captured)}
    names = [(family, name) for family, truths in families.items() for name in truths]
    truth = torch.stack([families[family][name] for family, name in names], 1)
    return Concepts([name for _, name in names], [family for family, _ in names], truth)
