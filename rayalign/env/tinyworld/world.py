"""`rayalign/TinyWorld-v0`: prompts, references and the exact hidden reward."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rayalign.env.tinyworld.annotators import CAREFUL_DEMONSTRATIONS, CAREFUL_REFERENCES, demonstrate, draw_listing
from rayalign.env.tinyworld.language import ITEMS, MAX_WORDS, Listing, parse_prompt, render_prompt, words
from rayalign.env.tinyworld.reward import WORD, best_places, hidden_weights, score
from rayalign.env.world import World
from rayalign.errors import ConfigError, DataError
from rayalign.types import Prompt

BACKBONE_WORLDS = range(10_000, 20_000)
"""Seeds set aside for the pre-training of the reward backbone. They are no `TinyWorld`."""
_TRAINING, _HELDOUT, _GIVEN = 1, 2, 3


def is_heldout(text: str) -> bool:
    """Whether a prompt text belongs to the evaluation prompts: one text in 16 does, in every world, by its hash."""
    return hashlib.blake2b(text.encode(), digest_size=1).digest()[0] % 16 == 0


def training_listing(rng: np.random.Generator) -> Listing:
    """A report that is not held out."""
    while is_heldout(render_prompt(listing := draw_listing(rng))):
        pass
    return listing


class TinyWorld(World):
    """A language task with a known truth, for claims about sample efficiency that a laptop can check.

    Prompt       `Report: rusty hinge, wet rope, loose bolt, bent axle. Summary:` lists 4 to 8 of 48 items, each
                 with one of 6 attributes. Drawn afresh for each index: endless.
    Response     the items that matter, in the order of the report, without separators: `hinge bolt`.
    Hidden       W[item, attribute], in [-1.5, 1.5]: what naming that item is worth. A seed is a world.
    Reward       sum of W over the named items, minus costs (see `reward`); read from the text alone. 'It stopped'
                 is read from the text too: a response of MAX_WORDS words or more did not, as end-of-sequence
                 takes one of the `rollout.max_tokens` = MAX_WORDS tokens.
    Labels       Bradley-Terry with reward_scale 1.5; three to four labels in five agree with the truth.
    Policy       a Llama of 0.35 M parameters that has learned to list items from noisy demonstrations, one in ten
                 of them written by an annotator who cares for W.
    References   every prompt carries the response of an annotator of whom every second one cares for W.
    Pairs        training prompts carry two different responses of annotators like those the policy has learned from.
    """

    id = "rayalign/TinyWorld-v0"

    def __init__(self, seed: int = 0) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0 or seed in BACKBONE_WORLDS:
            raise ConfigError(
                f"env.seed={seed!r} is not a TinyWorld; take an integer from 0 up, outside "
                f"{BACKBONE_WORLDS.start}-{BACKBONE_WORLDS.stop - 1}, on which the reward backbone was pre-trained."
            )
        self.seed = int(seed)

    def __repr__(self) -> str:
        return f"TinyWorld(seed={self.seed})"

    # -- prompts ---------------------------------------------------------------------------------------------
    def prompt(self, index: int) -> Prompt:
        """Training prompt number `index >= 0`: a function of the world's seed and the index alone."""
        if index < 0:
            raise ConfigError(f"prompt index={index} must not be negative.")
        listing = training_listing(np.random.default_rng([self.seed, _TRAINING, index]))
        rng = np.random.default_rng([self.seed, _GIVEN, index])
        weights = hidden_weights(self.seed)
        reference = " ".join(demonstrate(listing, weights, rng, CAREFUL_REFERENCES))
        first = second = " ".join(demonstrate(listing, weights, rng, CAREFUL_DEMONSTRATIONS))
        while second == first:
            second = " ".join(demonstrate(listing, weights, rng, CAREFUL_DEMONSTRATIONS))
        return Prompt(
            id=f"tinyworld-{self.seed}-{index}",
            text=render_prompt(listing),
            token_ids=(),
            reference=reference,
            pair=(first, second),
        )

    def heldout(self, n: int) -> Sequence[Prompt]:
        """`n` different evaluation prompts with a reference each; the first m of n are those of `heldout(m)`."""
        prompts: dict[str, Prompt] = {}
        draw = 0
        while len(prompts) < n:
            rng = np.random.default_rng([self.seed, _HELDOUT, draw])
            draw += 1
            while not is_heldout(text := render_prompt(listing := draw_listing(rng))):
                pass
            if text in prompts:
                continue
            reference = demonstrate(listing, hidden_weights(self.seed), rng, CAREFUL_REFERENCES)
            prompts[text] = Prompt(
                id=f"tinyworld-{self.seed}-heldout-{len(prompts)}",
                text=text,
                token_ids=(),
                reference=" ".join(reference),
            )
        return list(prompts.values())

    def find(self, text: str) -> Prompt | None:
        """Any report that parses is one of this world's; its reference, which its index decides, is not known."""
        try:
            parse_prompt(text)
        except DataError:
            return None
        digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        return Prompt(id=f"tinyworld-{self.seed}-{digest}", text=text, token_ids=())

    # -- truth -----------------------------------------------------------------------------------------------
    @property
    def has_truth(self) -> bool:
        """Always: the reward is a program."""
        return True

    @property
    def reward_scale(self) -> float:
        """`P(y > y') = sigmoid(1.5 * (r*(y) - r*(y')))`."""
        return 1.5

    def reward(self, prompt: Prompt, response: str) -> float:
        """`r*(x, y)` of any text; `rayalign.env.tinyworld.reward` has the formula.

        Raises `DataError` if the prompt is not one of TinyWorld's.
        """
        return score(hidden_weights(self.seed), parse_prompt(prompt.text), words(response))

    def best_reward(self, prompt: Prompt) -> float:
        """`max_y r*(x, y)`: the items worth more than a word costs."""
        weights, listing = hidden_weights(self.seed), parse_prompt(prompt.text)
        return float(sum(weights[listing[place]] - WORD for place in best_places(weights, listing)))

    def best_response(self, prompt: Prompt) -> str:
        """The shortest response with `best_reward`."""
        listing = parse_prompt(prompt.text)
        return " ".join(ITEMS[listing[place][0]] for place in best_places(hidden_weights(self.seed), listing))

    # -- what a run needs beside the prompts -------------------------------------------------------------------
    def default_policy(self) -> str:
        """Hugging Face directory of the initial policy of this world: shipped, or built (a minute) and cached."""
        from rayalign.env.tinyworld.build import policy_dir

        return str(policy_dir(self.seed))

    def backbone(self) -> str:
        """Hugging Face directory of a reward backbone for posteriors: the counterpart of the SEA paper's
        pre-trained 0.4B reward transformer, one for all worlds.

        It knows the family: it has seen the token rewards of 256 other worlds (`BACKBONE_WORLDS`), so what an
        invention or a repeat is, and that rewards are sums over named items. It has never seen this world's W.
        Recommended features: sum of the last hidden states over the response's tokens, end-of-sequence included.
        """
        from rayalign.env.tinyworld.build import backbone_dir

        return str(backbone_dir())

    def defaults(self) -> Mapping[str, Any]:
        """Settings that suit this world; the policy is so small that it wants a learning rate of its own."""
        return {
            "loop.batch_size": 32,
            "rollout.max_tokens": MAX_WORDS,
            "rollout.temperature": 0.7,
            "learner.learning_rate": 5e-4,
            "learner.schedule": "constant",
            "agent.beta": 0.1,
            "evaluation.num_prompts": 300,
            "evaluation.every": 256,
        }
