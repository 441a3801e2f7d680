"""The contextual dueling bandit as Gymnasium environments, single and vector, over a `World` and a `Labeler`.

One step: a pair of responses per prompt -> one call of the labeler -> one bit per pair, and the next prompts.
"""

from __future__ import annotations

import importlib
import inspect
import string
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from rayalign.config import check
from rayalign.env.labels import LABEL_MODES, DirectLabeler, Labeler
from rayalign.env.truth import TruthOracle, regrets
from rayalign.env.world import World
from rayalign.errors import ConfigError, did_you_mean
from rayalign.types import Candidate, Duel, Preference, Prompt

MAX_TEXT = 1 << 20
"""Longest text of the spaces, in characters."""
_SAMPLE_TEXT = 64

Action = Duel | tuple[str, str]
"""A pair of responses (first, second), or a duel that holds them with token ids, log-probabilities and an id."""


class AnyText(spaces.Text):
    """All strings of at most `max_length` characters. Samples are short and of printable ASCII."""

    def __init__(self, max_length: int = MAX_TEXT, *, seed: int | np.random.Generator | None = None) -> None:
        super().__init__(max_length, min_length=0, charset=string.printable, seed=seed)

    def contains(self, x: Any) -> bool:
        """Whether `x` is a string that is not too long; every character will do."""
        return isinstance(x, str) and len(x) <= self.max_length

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """A random string of at most 64 characters; `mask` as in `gymnasium.spaces.Text`."""
        if mask is None and probability is None:
            mask = (int(self.np_random.integers(0, min(_SAMPLE_TEXT, self.max_length) + 1)), None)
        return super().sample(mask, probability)

    def __repr__(self) -> str:
        return f"AnyText({self.max_length})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AnyText) and self.max_length == other.max_length


class _Table:
    """What both environments share: the prompts on the table, and what is true of a pair of responses."""

    def __init__(self, world: World, size: int, labeler: Labeler | None, labels: str) -> None:
        self.world, self.size, self.labels = world, size, labels
        self.own_labeler = labeler is None
        self.labeler = labeler
        self.index = 0
        self.prompts: list[Prompt] = []

    def lay(self, seed: int | None, rng: np.random.Generator, options: Mapping[str, Any] | None) -> None:
        """Begin at prompt `options["index"]`, 0 by default; `seed` decides the labels, if the labeler is our own."""
        options = dict(options or {})
        index = options.pop("index", 0)
        for name in options:
            raise ConfigError(f"reset option {name!r} is unknown. {did_you_mean(name, ['index'])}")
        if isinstance(index, bool) or not isinstance(index, int | np.integer) or index < 0:
            raise ConfigError(f"reset option index={index!r} must be an integer from 0 up: a position in the prompts.")
        if self.own_labeler and self.world.has_truth and (seed is not None or self.labeler is None):
            label_seed = int(rng.integers(2**31)) if seed is None else seed
            self.labeler = DirectLabeler(TruthOracle(self.world), mode=self.labels, seed=label_seed)
        self._deal(int(index))

    def next(self) -> None:
        """Replace every prompt on the table by the ones that follow."""
        self._deal(self.index + self.size)

    def _deal(self, index: int) -> None:
        self.prompts = [self.world.prompt(index + slot) for slot in range(self.size)]
        self.index = index

    def duel(self, action: Action, slot: int) -> Duel:
        """The action in `slot` as a duel. `ConfigError` if it is none, or about a prompt that is not on the table."""
        if isinstance(action, Duel):
            if all(action.prompt.id != prompt.id for prompt in self.prompts):
                raise ConfigError(
                    f"action {slot} is a duel about prompt {action.prompt.id!r}, which is not on the table. Take "
                    "prompts from info['prompts'] of the last reset or step."
                )
            return action
        if not (
            isinstance(action, tuple | list) and len(action) == 2 and all(isinstance(text, str) for text in action)
        ):
            raise ConfigError(
                f"action {slot} is {action!r:.100}; it must be a Duel, a (first, second) pair of texts, or None."
            )
        first, second = (
            Candidate(text=text, token_ids=(), logprobs=(), policy_version=-1, source="data") for text in action
        )
        prompt, position = self.prompts[slot], self.index + slot
        run = self.world.id or type(self.world).__name__
        name = Duel.make_id(run, position, 0, prompt, first, second)
        return Duel(id=name, batch=position, prompt=prompt, first=first, second=second)

    def label(self, duels: Sequence[Duel]) -> list[Preference | None]:
        """Ask the labeler once for all of them."""
        if self.labeler is None:
            raise ConfigError(
                f"{self.world.id or type(self.world).__name__} does not know which response is better, and nobody "
                "was given to ask. Pass `labeler=` (see rayalign.env.labels.DirectLabeler)."
            )
        return self.labeler.label(duels) if duels else []


class DuelingBandit(gym.Env[str, Action]):
    """One prompt at a time, two responses to it, one bit of preference.

    Description   A contextual dueling bandit. The context is a prompt, an action is a pair of responses, and the only
                  feedback is which of the two is preferred. It is a bandit: a step has no influence on the next prompt.
    Observation   `AnyText`: the prompt as a person reads it. As an object, with id and references: `info["prompt"]`.
    Action        `Tuple(AnyText, AnyText)`: first and second response. A `Duel` is accepted as well.
    Reward        1.0 if the first is preferred, 0.0 if the second is, 0.5 for a tie; 0.0 without a verdict.
    Episode end   Never; a wrapper (`LabelBudget`) truncates. Calling step without a new prompt is not possible.
    Info keys     reset: `prompt`. step: `prompt` (the next one), and of the pair that was judged: `prompt_id`,
                  `labelled` (False where the oracle failed: nothing was charged), `label` (None then), `probability`
                  (that the first is preferred, None where the oracle gives none), `preference` (the `Preference` or
                  None), and where the truth is known `regret_reward` and `regret_preference`, see `truth.regrets`.
    Arguments     world; labeler: who is asked, by default the world's own truth by Bradley-Terry, with labels drawn
                  ("bernoulli", seeded by reset) or the likelier response ("deterministic") by `labels`.
    Reset         `options={"index": i}` begins at prompt i of the world's stream; without, at 0. The prompts depend on
                  the world alone, the seed decides labels only.

    Version history: v0, the first.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (Gymnasium's own annotation)

    def __init__(
        self,
        world: World | str,
        labeler: Labeler | None = None,
        labels: str = "bernoulli",
        render_mode: None = None,
        **world_kwargs: Any,
    ) -> None:
        self.world = build_world(world, world_kwargs)
        self.observation_space = AnyText()
        self.action_space = spaces.Tuple((AnyText(), AnyText()))  # type: ignore[assignment]  # or a Duel
        self.render_mode = render_mode
        self._table = _Table(self.world, 1, labeler, _checked(labels))

    @property
    def index(self) -> int:
        """Position of the prompt on the table: `reset(options={"index": env.index})` shows the same one again."""
        return self._table.index

    @property
    def labeler(self) -> Labeler | None:
        """Who is asked."""
        return self._table.labeler

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin at prompt `options["index"]`, by default 0."""
        super().reset(seed=seed)
        self._table.lay(seed, self.np_random, options)
        prompt = self._table.prompts[0]
        return prompt.text, {"prompt": prompt}

    def step(self, action: Action) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Ask which of the two is preferred; deal the next prompt."""
        if not self._table.prompts:
            raise gym.error.ResetNeeded("call reset before step: there is no prompt on the table.")
        duel = self._table.duel(action, 0)
        (preference,) = self._table.label([duel])
        info: dict[str, Any] = {
            "prompt_id": duel.prompt.id,
            "labelled": preference is not None,
            "label": preference and preference.label,
            "probability": preference and preference.probability,
            "preference": preference,
        }
        if self.world.has_truth:
            info["regret_reward"], info["regret_preference"] = regrets(
                self.world, duel.prompt, duel.first.text, duel.second.text
            )
        self._table.next()
        prompt = self._table.prompts[0]
        info["prompt"] = prompt
        return prompt.text, preference.label if preference else 0.0, False, False, info


class DuelingBanditVector(gym.vector.VectorEnv[tuple[str, ...], Sequence[Action | None], np.ndarray]):
    """`num_envs` prompts on the table at once, and all labels of a step bought in one call.

    Description   As `DuelingBandit`, n prompts at a time: slot i is the single environment reset at position
                  `index + i`. After a step all n prompts are replaced by the n that follow.
    Observation   `Tuple(AnyText, ...)`: n prompts; as objects in `info["prompts"]`.
    Action        `Tuple` of n pairs (first, second). `step` takes any sequence of at most n of: a pair, judged for the
                  prompt of its slot; a `Duel` about any prompt on the table, several about one prompt if you like;
                  None: pass, nothing is asked. What is missing at the end is None. Duels may be more than n.
    Reward        Array of n: per action 1.0, 0.5, 0.0 as in `DuelingBandit`; 0.0 for None and for a failed verdict.
                  Duels beyond n have theirs in `info["label"]`.
    Episode end   Never; a wrapper (`LabelBudgetVector`) truncates all n at once.
    Info keys     `prompts` (list of n, of the next table; also from reset) and, per action, arrays of n, or of as many
                  as there are duels: `labelled` (bool), `probability`, `label` (NaN where there is none),
                  `regret_reward` and `regret_preference` where the truth is known (NaN for None), and `preferences`
                  (list of `Preference` or None).
    Arguments     As `DuelingBandit`, and num_envs.
    Reset         As `DuelingBandit`.

    Version history: v0, the first.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012

    def __init__(
        self,
        world: World | str,
        num_envs: int = 1,
        labeler: Labeler | None = None,
        labels: str = "bernoulli",
        render_mode: None = None,
        **world_kwargs: Any,
    ) -> None:
        if num_envs < 1:
            raise ConfigError(f"num_envs={num_envs} must be at least 1.")
        self.world, self.num_envs = build_world(world, world_kwargs), num_envs
        self.single_observation_space = AnyText()
        self.single_action_space = spaces.Tuple((AnyText(), AnyText()))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        # pair by pair, where Gymnasium's own batching would make it a pair of n-tuples
        self.action_space = spaces.Tuple([spaces.Tuple((AnyText(), AnyText())) for _ in range(num_envs)])
        self.render_mode = render_mode
        self._table = _Table(self.world, num_envs, labeler, _checked(labels))

    @property
    def index(self) -> int:
        """Position of the first prompt on the table: `reset(options={"index": env.index})` lays it again."""
        return self._table.index

    @property
    def labeler(self) -> Labeler | None:
        """Who is asked."""
        return self._table.labeler

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Lay the table, from prompt `options["index"]` on, by default 0."""
        super().reset(seed=seed)
        self._table.lay(seed, self.np_random, options)
        return self._observation(), {"prompts": list(self._table.prompts)}

    def step(
        self, actions: Sequence[Action | None]
    ) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Buy a label for each action that is not None, in one call; lay the next table."""
        if not self._table.prompts:
            raise gym.error.ResetNeeded("call reset before step: there are no prompts on the table.")
        if any(not isinstance(action, Duel | None) for action in actions[self.num_envs :]):
            raise ConfigError(
                f"{len(actions)} actions for num_envs={self.num_envs}; only duels, which name their prompt, may be "
                "more than the prompts on the table. Make the environment larger."
            )
        duels = {i: self._table.duel(action, i) for i, action in enumerate(actions) if action is not None}
        preferences: list[Preference | None] = [None] * max(self.num_envs, len(actions))
        for i, preference in zip(duels, self._table.label(list(duels.values())), strict=True):
            preferences[i] = preference
        info: dict[str, Any] = {
            "preferences": preferences,
            "labelled": np.array([p is not None for p in preferences]),
            "label": np.array([np.nan if p is None else p.label for p in preferences]),
            "probability": np.array(
                [np.nan if p is None or p.probability is None else p.probability for p in preferences]
            ),
        }
        if self.world.has_truth:
            both = np.full((2, len(preferences)), np.nan)
            for i, duel in duels.items():
                both[:, i] = regrets(self.world, duel.prompt, duel.first.text, duel.second.text)
            info["regret_reward"], info["regret_preference"] = both[0].copy(), both[1].copy()
        self._table.next()
        info["prompts"] = list(self._table.prompts)
        ended = np.zeros(self.num_envs, dtype=bool)
        rewards = np.nan_to_num(info["label"][: self.num_envs], nan=0.0)
        return self._observation(), rewards, ended, ended.copy(), info

    def _observation(self) -> tuple[str, ...]:
        return tuple(prompt.text for prompt in self._table.prompts)


def build_world(world: World | str, kwargs: Mapping[str, Any]) -> World:
    """The world itself, or the one that `package.module:Class` names, built with `kwargs`; texts are read by the types
    of its keywords, as everything is a text that was typed on a command line.
    """
    if isinstance(world, World):
        if kwargs:
            raise ConfigError(f"{next(iter(kwargs))!r} can't be given to a world that is already built.")
        return world
    module, _, name = world.partition(":")
    kind = getattr(importlib.import_module(module), name)
    known = inspect.signature(kind, eval_str=True).parameters
    for argument in kwargs:
        if argument not in known:
            raise ConfigError(f"env.{argument} is not a setting of {name}. {did_you_mean(argument, known)}")
    return kind(**{name: _typed(name, value, known[name].annotation) for name, value in kwargs.items()})


def _typed(name: str, value: Any, annotation: Any) -> Any:
    return value if annotation is inspect.Parameter.empty else check(f"env.{name}", value, annotation)


def _checked(labels: str) -> str:
    if labels not in LABEL_MODES:
        raise ConfigError(f"labels={labels!r} is unknown. {did_you_mean(labels, LABEL_MODES)}")
    return labels
