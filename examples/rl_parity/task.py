"""
The task: running sums, written out step by step, whose last one is checked.

    prompt    a7b3c9>            (after two solved examples, the same in every prompt)
    answer    a7:7,b3:0;c9:9.9   each item, the sum so far without its tens, a separator; then the sum

A demonstration slips as people do: where a sum passes ten it is one too large with probability `SLIP`, an item is left out with
probability `SKIP`, and the separator is any of three. A model trained on such demonstrations slips as often, so that its
distributions are as a language model's: most tokens nearly certain, some open, and an answer that is right by chance. What
reinforcement learning has to find is that slips do not pay. Reward: 1 where the answer is right and has ended, else 0.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz:>,; .|"
PAD, EOS, VOCAB = 62, 63, 64  # some tokens of the vocabulary are never used
_TOKEN = {character: i for i, character in enumerate(_CHARACTERS)}
SEPARATORS = ",; "
ITEMS = (8, 12)  # least and most
MOST_TOKENS = 72  # of an answer: 5 an item, the end, and room to ramble
EXAMPLES = "n7p4q9>n7:7,p4:1;q9:0.0|r2s5t8>r2:2 s5:7,t8:5.5|"
SLIP, SKIP = 0.3, 0.04


def encode(text: str) -> list[int]:
    return [_TOKEN[character] for character in text]


def decode(tokens: list[int]) -> str:
    return "".join(_CHARACTERS[token] if token < len(_CHARACTERS) else "<eos>" if token == EOS else "?" for token in tokens)


@dataclass(frozen=True)
class Problem:
    """Digits to be summed."""

    digits: tuple[int, ...]

    @property
    def prompt(self) -> list[int]:
        """Token ids."""
        return encode(EXAMPLES + "".join(f"{chr(97 + i)}{digit}" for i, digit in enumerate(self.digits)) + ">")

    def reward(self, answer: list[int]) -> float:
        """answer: the sampled tokens, with the end token where the model ended."""
        if not answer or answer[-1] != EOS:
            return 0.0
        return float(decode(answer[:-1]).endswith(f".{sum(self.digits) % 10}"))

    def demonstration(self, rng: random.Random) -> list[int]:
        """An answer with slips, and its end token."""
        total, parts = 0, []
        for i, digit in enumerate(self.digits):
            if rng.random() < SKIP:
                continue
            slips = total + digit >= 10 and rng.random() < SLIP
            total = (total + digit + slips) % 10
            parts.append(f"{chr(97 + i)}{digit}:{total}" + rng.choice(SEPARATORS))
        return [*encode("".join(parts)[:-1] + f".{total}"), EOS]


def problem(rng: random.Random) -> Problem:
    return Problem(tuple(rng.randrange(10) for _ in range(rng.randint(*ITEMS))))
