"""Concepts that a token of a story may stand for, told by rules: of its context, and of what the model will say next.

Context concepts look at tokens up to and including the position; prediction concepts at the model's own distribution
over the next token. Word lists are those of the shipped vocabulary, in which most words are one token; a list may name
words that a vocabulary lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LEAST = 20  # samples of which a concept must be true, and false

# fmt: off
BOYS = "Tim Timmy Max Tom Tommy Sam Sammy Bob Benny Ben Jack Billy John Spot Bobo Buddy Blue"
GIRLS = "Lily Sue Lucy Amy Mia Sally Daisy Sarah Kitty"
OTHERS = "Tweety Tweetie Fluffy Mittens Ducky Spot Fin"
WORDS = {
    "boy's name": BOYS,
    "girl's name": GIRLS,
    "he, him, his": "he him his himself He His",
    "she, her": "she her herself She Her",
    "they, them, their": "they them their They",
    "I, me, my": "I me my My",
    "you, your": "you your You",
    "we, our, us": "we our us We Let",
    "it, its": "it its It",
    "animal": "bird dog cat fish bear bunny rabbit frog squirrel duck mouse monkey puppy horse butterfly spider snake "
              "fox chicken crab dragon dinosaur bug animal birds animals bugs",
    "emotion": "happy sad scared excited angry proud surprised sorry glad lonely worried tired upset curious brave "
               "grateful amazed confused ashamed afraid shy relieved hungry",
    "person": "girl boy man lady friend friends teacher doctor princess fairy child children kids people owner "
              "parents clown painter",
    "family": "mom mommy dad daddy brother mother grandma family parents Mom Mommy baby",
    "food": "cake cookies cookie candy apple apples carrot carrots cheese bread pie juice soup spaghetti pasta milk "
            "popcorn fruit chocolate blueberries snack treats melon cream sugar tea dinner food picnic",
    "place": "park forest house garden store room home kitchen beach pond yard backyard school farm town woods river "
             "castle jungle hospital zoo street market shop sea hill cave field cabin",
    "toy or thing": "toy toys ball doll dolls car box boat truck balloon book kite hat blocks puzzle bike train slide "
                    "swings block rocket guitar key bag chair bowl cup picture coin basket blanket pillow",
    "nature": "tree trees flower flowers sun sky rain grass rock rocks cloud clouds snow leaf leaves wind rainbow moon "
              "water mud ground star sand",
    "color": "red blue green pink purple brown black white orange gray colorful color colors",
    "size": "big little small tiny huge long tall high deep",
    "quality": "good nice pretty special beautiful shiny funny great best important new magic magical kind soft yummy "
               "delicious bad scary strong old broken dirty cold warm perfect fun safe careful loud different brave",
    "past-tense verb": "was were said saw went loved had wanted did asked played felt could smiled told started put "
                       "looked came learned thought got took decided gave knew made ran picked tried replied showed "
                       "walked became laughed thanked lived realized liked remembered happened broke ate hugged flew "
                       "climbed heard jumped continued shared helped agreed finished kept cried nodded fell called "
                       "brought needed watched listened met enjoyed reached clapped pushed stopped closed searched "
                       "wished hid turned worked shouted pulled bought talked waited swam arrived noticed dropped "
                       "opened forgot fixed grabbed blew cleaned caught pretended found sat",
    "plain verb": "play help find see make put know show learn get take eat share feel worry walk hug climb run let "
                  "try listen clean need come jump cook cry love look buy keep happen read draw give fly wait catch "
                  "rest fix stay explore reach leave sing tell build ask sleep watch stop talk swim join bring protect "
                  "move sit visit work carry dance believe pretend enjoy be have go do say",
    "-ing form": "playing helping going walking doing being flying crying feeling coming having sharing looking "
                 "sitting running making eating building shining trying getting drawing laughing talking taking "
                 "finding singing hiding happening painting",
    "said, asked, …": "said asked replied told shouted say tell ask",
    "was, is, …": "was were is are be been am 's 'm 're",
    "can, will, …": "can could will would should might must 'll couldn wouldn cannot",
    "not": "not 't no never didn couldn wouldn wasn don No Don",
    "and": "and And",
    "but, so, because": "but so because But So while if as As While",
    "the": "the The",
    "a": "a an A",
    "to": "to",
    "in, on, with, …": "in on with at for of from by under over inside around into near behind up down out",
    "very, so, too": "very so too really much",
    "all, many, …": "all many some lots lot every both more other each another few two any",
    "what, why, …": "what why how where who when What Why When",
    "then, suddenly, …": "then Then suddenly Suddenly After after Later when When Finally while While until soon now",
    "greeting or thanks": "Hi Hello Thank thank Okay Yes Sure Wow Oh Hey Hell hank goodbye bye welcome please",
    "moral": "important learned lesson moral remember always",
}
NOUNS = ("animal", "person", "family", "food", "place", "toy or thing", "nature")
ADJECTIVES = ("emotion", "color", "size", "quality")
PLURALS = ("friends toys things animals flowers birds cookies cars pictures clothes colors blocks swings dolls shoes "
           "hands pieces woods leaves eyes books carrots rocks clouds bugs balls trees apples balloons treats coins "
           "drawings boats trucks snacks blueberries kids children people parents words crayons adventures")
ENDS = (".", "!", "?", '."', '!"', '?"')
CLOSING = ('."', '!"', '?"', ',"')
# fmt: on


@dataclass
class Concepts:
    """Named concepts, the family of each, and the samples (window by window, position by position) they are true of."""

    names: list[str]
    families: list[str]
    truth: Bool[Tensor, "n m"]

    def of(self, family: str) -> list[int]:
        """The numbers of a family's concepts."""
        return [number for number, name in enumerate(self.families) if name == family]

    def select(self, keep: list[int]) -> "Concepts":
        """Some of the concepts."""
        return Concepts([self.names[i] for i in keep], [self.families[i] for i in keep], self.truth[:, keep])


def common(*splits: Concepts, least: int = LEAST) -> list[Concepts]:
    """Each split with the concepts that are true, and false, of at least so many samples in every one."""
    enough = [(c.truth.sum(0) >= least) & ((~c.truth).sum(0) >= least) for c in splits]
    keep = torch.stack(enough).all(0).nonzero()[:, 0].tolist()
    return [c.select(keep) for c in splits]


class Vocabulary:
    """Sets of a tokenizer's tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.text = [str(tokenizer.decode([token])) for token in range(len(tokenizer))]
        self.end = int(tokenizer.eos_token_id or 0)  # type: ignore[arg-type]

    def tokens(self, test: Callable[[str], bool]) -> Bool[Tensor, " vocabulary"]:
        """The tokens whose text passes; the end token never does."""
        members = torch.tensor([test(text) for text in self.text])
        members[self.end] = False
        return members

    def words(self, *lists: str) -> Bool[Tensor, " vocabulary"]:
        """The tokens that are one of the words."""
        wanted = {word for words in lists for word in words.split()}
        return self.tokens(lambda text: text.strip() in wanted)

    @cached_property
    def sets(self) -> dict[str, Bool[Tensor, " vocabulary"]]:
        """Sets that both families ask about: the word lists, and some by spelling."""
        sets = {name: self.words(words) for name, words in WORDS.items()}
        sets["name"] = self.words(BOYS, GIRLS, OTHERS)
        sets["noun"] = self.words(*(WORDS[name] for name in NOUNS))
        sets["adjective"] = self.words(*(WORDS[name] for name in ADJECTIVES))
        sets["plural"] = self.words(PLURALS)
        sets["sentence end"] = self.tokens(lambda text: text in ENDS)
        sets["question mark"] = self.tokens(lambda text: text.startswith("?"))
        sets["exclamation mark"] = self.tokens(lambda text: text.startswith("!"))
        sets["comma"] = self.tokens(lambda text: text.startswith(","))
        sets["opening quotation mark"] = self.tokens(lambda text: text == ' "')
        sets["closing quotation mark"] = self.tokens(lambda text: text in CLOSING)
        sets["line break"] = self.tokens(lambda text: text == "\n")
        sets["'s"] = self.tokens(lambda text: text == "'s")
        return sets

    @cached_property
    def starts_word(self) -> Bool[Tensor, " vocabulary"]:
        return self.tokens(lambda text: text[:1] == " " and text[1:].isalpha())

    @cached_property
    def piece(self) -> Bool[Tensor, " vocabulary"]:
        """Letters without a space before them: the rest of a word, or the first word of a line or quotation."""
        return self.tokens(str.isalpha)


class Rules(Vocabulary):
    """The rules for one tokenizer.

    ``rules(tokens, logits)`` gives the concepts of every position of windows (n, positions), in the order in which a
    decomposition counts samples; ``logits`` are the model's on them.
    """

    def context(self, tokens: Int[Tensor, "n t"]) -> dict[str, Bool[Tensor, "n t"]]:
        """Concepts of the token and of what came before it in its window."""
        inside = self._inside(tokens)
        words = {name: members[tokens] for name, members in self.sets.items()}
        before = {name: shifted(words[name]) for name in ("name", "adjective", "a", "the", "very, so, too")}
        ended = shifted(words["sentence end"] | words["line break"] | (tokens == self.end))
        continued = self.piece[tokens] & shifted(self.piece[tokens] | self.starts_word[tokens])
        seen = earlier(tokens)
        first = (words["sentence end"].cumsum(1) == 0) & (tokens[:, :1] == self.end)
        return words | {
            "first sentence of the story": first,
            "start of a sentence": ended & ~words["line break"],
            "inside quotation marks": inside,
            "rest of a word": continued,
            "follows a name": before["name"],
            "follows an adjective": before["adjective"],
            "follows a or an": before["a"],
            "follows the": before["the"],
            "follows very, so, too": before["very, so, too"],
            "follows named": shifted(self.words("named")[tokens]),
            "follows Once upon a": self._follows(tokens, ["Once", " upon", " a"]),
            "follows One day": self._follows(tokens, ["One", " day"]) | self._follows(tokens, [" One", " day"]),
            "follows said, asked, …": shifted(words["said, asked, …"]),
            "follows wanted, loved, liked": shifted(self.words("wanted loved liked want like love")[tokens]),
            "a name that was mentioned before": words["name"] & seen,
            "a noun that was mentioned before": words["noun"] & seen,
        }

    def prediction(self, tokens: Int[Tensor, "n t"], p: Float[Tensor, "n t k"]) -> dict[str, Bool[Tensor, "n t"]]:
        """Concepts of the model's distribution over what comes next: where it puts half of it, or what it prefers."""
        mass = {name: p[..., members].sum(-1) for name, members in self.sets.items()}
        says = {f"says: {name}": value >= 0.5 for name, value in mass.items()}
        he, she = mass["he, him, his"], mass["she, her"]
        boy, girl = mass["boy's name"], mass["girl's name"]
        content = self.sets["noun"] | self.sets["adjective"] | self.sets["plain verb"]
        before, name_before = repeated(tokens, p, content, self.sets["name"])
        entropy = torch.special.entr(p).sum(-1)
        half = {
            "the rest of a word": p[..., self.piece].sum(-1) * (self.starts_word | self.piece)[tokens],
            "upon": p[..., self.words("upon")].sum(-1),
            "day or time": p[..., self.words("day time")].sum(-1),
            "named": p[..., self.words("named")].sum(-1),
            "a word that it said before": before,
            "a name that it said before": name_before,
            "a noun after an adjective": mass["noun"] * self.sets["adjective"][tokens],
            "end of the story": p[..., self.end],
        }
        return (
            says
            | {f"says: {name}": value >= 0.5 for name, value in half.items()}
            | {
                "she rather than he": (she > 2 * he) & (she > 0.1),
                "he rather than she": (he > 2 * she) & (he > 0.1),
                "a girl's name rather than a boy's": (girl > 2 * boy) & (girl > 0.1),
                "a boy's name rather than a girl's": (boy > 2 * girl) & (boy > 0.1),
                "an animal among others": mass["animal"] >= 0.2,
                "an emotion among others": mass["emotion"] >= 0.2,
                "a color among others": mass["color"] >= 0.1,
                "a place among others": mass["place"] >= 0.2,
                "food among others": mass["food"] >= 0.1,
                "certain (one token has 95%)": p.amax(-1) >= 0.95,
                "undecided (entropy above 4 nats)": entropy >= 4,
            }
        )

    def __call__(self, tokens: Int[Tensor, "n t"], logits: Float[Tensor, "n t k"]) -> Concepts:
        """Both families. Concepts that hold nowhere are kept; see :func:`common`."""
        families = {"context": self.context(tokens), "prediction": self.prediction(tokens, logits.softmax(-1))}
        names = [(family, name) for family, truths in families.items() for name in truths]
        truth = torch.stack([families[family][name].flatten() for family, name in names], 1)
        return Concepts([name for _, name in names], [family for family, _ in names], truth)

    # ---- rules

    def _inside(self, tokens: Int[Tensor, "n t"]) -> Bool[Tensor, "n t"]:
        """After an opening quotation mark and up to the closing one, both in the window."""
        opens, closes = self.sets["opening quotation mark"][tokens], self.sets["closing quotation mark"][tokens]
        state, rows = torch.zeros(len(tokens), dtype=torch.bool), []
        for t in range(tokens.shape[1]):
            rows.append(state & ~opens[:, t])
            state = (state | opens[:, t]) & ~closes[:, t]
        return torch.stack(rows, 1)

    def _follows(self, tokens: Int[Tensor, "n t"], words: list[str]) -> Bool[Tensor, "n t"]:
        """Whether these tokens come right before."""
        match = torch.ones_like(tokens, dtype=torch.bool)
        for back, word in enumerate(reversed(words), 1):
            match &= shifted(self.tokens(lambda text, word=word: text == word)[tokens], back)
        return match


def repeated(
    tokens: Int[Tensor, "n t"], p: Float[Tensor, "n t k"], *members: Bool[Tensor, " k"]
) -> list[Float[Tensor, "n t"]]:
    """For each set of tokens, the probability that the next one is in it and was in the window before."""
    known = torch.zeros_like(p, dtype=torch.bool)
    mass = [p.new_zeros(p.shape[:2]) for _ in members]
    for t in range(tokens.shape[1]):
        known[:, t] = known[:, t - 1] if t else False
        known[torch.arange(len(tokens)), t, tokens[:, t]] = True
        for total, wanted in zip(mass, members, strict=True):
            total[:, t] = (p[:, t] * (known[:, t] & wanted)).sum(-1)
    return mass


def shifted(on: Bool[Tensor, "n t"], by: int = 1) -> Bool[Tensor, "n t"]:
    """What was true ``by`` positions before; false where there is none."""
    moved = torch.zeros_like(on)
    moved[:, by:] = on[:, : on.shape[1] - by]
    return moved


def earlier(tokens: Int[Tensor, "n t"]) -> Bool[Tensor, "n t"]:
    """Whether the same token is in the window before."""
    same = tokens.unsqueeze(2) == tokens.unsqueeze(1)
    return same.tril(-1).any(2)
