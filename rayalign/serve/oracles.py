"""Oracles without Ray: whoever can say which of two responses is better. `kinds.py` has the list of them.

    oracle_factory(config, world) -> a picklable function -> called once in each replica -> Oracle

`FunctionOracle` is here, the world's own truth in `rayalign.env.truth`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from rayalign.env.labels import Oracle
from rayalign.env.world import World
from rayalign.errors import ConfigError, OracleError, UnfinishedError
from rayalign.serve.config import OracleConfig
from rayalign.serve.kinds import OracleKind, check_target, import_attribute, oracle_kind
from rayalign.types import Duel, Verdict

ASYNC_CALLS_AT_ONCE = 64
"""Calls of an async function that are awaited together."""


class FunctionOracle:
    """A function of the user's: the reward of a response, or the probability that the first response is better.

    reward       `function(prompt, response) -> float`, any finite number; P = sigmoid(scale * (r_first - r_second))
    probability  `function(prompt, first, second) -> float` in [0, 1]

    All arguments are texts. A batched function takes lists of equal length instead and returns a list. Async
    functions are awaited in an event loop of their own, which lives as long as the oracle.
    """

    def __init__(
        self,
        function: Callable[..., Any] | str,
        *,
        returns: str = "reward",
        batched: bool = False,
        scale: float = 1.0,
        price: float = 0.0,
    ) -> None:
        self.function = import_attribute(function, "oracle.target") if isinstance(function, str) else function
        if not callable(self.function):
            raise ConfigError(f"oracle.target={function!r} is a {type(self.function).__name__}, not a function.")
        self.returns, self.batched, self.scale, self.price = returns, batched, scale, price
        self.name = function if isinstance(function, str) else _name_of(function)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def id(self) -> str:
        """`function:` and the function's import path."""
        return f"function:{self.name}"

    def judge(self, duels: Sequence[Duel]) -> list[Verdict]:
        """One verdict per duel.

        Raises `OracleError` that names the duel whose answer is not a number in range, or that the function broke at;
        an `UnfinishedError` if there are answers to others.
        """
        if not duels:
            return []
        if self.returns == "probability":
            rows: list[tuple[str, ...]] = [(d.prompt.text, d.first.text, d.second.text) for d in duels]
            values = self._call(rows, duels)
        else:
            rows = [(d.prompt.text, response.text) for d in duels for response in (d.first, d.second)]
            each = iter(self._call(rows, [d for d in duels for _ in range(2)]))
            values = list(zip(each, each, strict=True))
        verdicts, errors = [], []
        for duel, value in zip(duels, values, strict=True):
            try:
                verdicts.append(Verdict(duel_id=duel.id, probability=self._probability(value, duel), price=self.price))
            except OracleError as error:
                errors.append(error)
        if errors and verdicts:
            unfinished = UnfinishedError(*errors[0].args)
            unfinished.answered = verdicts
            raise unfinished from errors[0]
        if errors:
            raise errors[0]
        return verdicts

    def _probability(self, value: Any, duel: Duel) -> float:
        if self.returns == "probability":
            return self._in_range(value, duel)
        first, second = value
        return sigmoid(self.scale * (self._finite(first, duel) - self._finite(second, duel)))

    # -- calling --------------------------------------------------------------------------------------------------
    def _call(self, rows: Sequence[tuple[str, ...]], duels: Sequence[Duel]) -> list[Any]:
        """The function's value for each row of arguments, or the `OracleError` that it came to.

        `duels` names the rows in errors. After the first error nothing more is begun.
        """
        if self.batched:
            try:
                values = self._run(self.function(*map(list, zip(*rows, strict=True))))
            except Exception as error:
                raise self._raised(error, duels[0], f"a batch of {len(duels)} that begins with duel") from error
            values = values.tolist() if hasattr(values, "tolist") else list(values)
            if len(values) != len(rows):
                raise OracleError(
                    f"oracle {self.id} returned {len(values)} values for {len(rows)} rows: a batched function has to "
                    "return one number per row. Set oracle.batched=false if it takes one row at a time."
                )
            return values
        if inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(type(self.function).__call__):
            return self._run(self._gather(rows, duels))
        values = []
        for row, duel in zip(rows, duels, strict=True):
            try:
                values.append(self._run(self.function(*row)))
            except Exception as error:
                return values + [self._raised(error, duel)] * (len(rows) - len(values))
        return values

    async def _gather(self, rows: Sequence[tuple[str, ...]], duels: Sequence[Duel]) -> list[Any]:
        slots = asyncio.Semaphore(ASYNC_CALLS_AT_ONCE)
        broke: list[OracleError] = []

        async def one(row: tuple[str, ...], duel: Duel) -> Any:
            async with slots:
                if broke:
                    return broke[0]
                try:
                    return await self.function(*row)
                except Exception as error:
                    broke.append(self._raised(error, duel))
                    return broke[-1]

        # Who is under way is waited for: it is paid.
        return await asyncio.gather(*(one(row, duel) for row, duel in zip(rows, duels, strict=True)))

    def _run(self, value: Any) -> Any:
        """What `value` comes to: itself, or what it is awaited to."""
        if not inspect.iscoroutine(value):
            return value
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="oracle-function", daemon=True).start()
        coroutine: Coroutine[Any, Any, Any] = value
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loop": None}

    # -- checking -------------------------------------------------------------------------------------------------
    def _raised(self, error: Exception, duel: Duel, where: str = "duel") -> OracleError:
        raised = OracleError(f"oracle {self.id} raised {type(error).__name__} on {where} {duel.id}: {error}")
        raised.__cause__ = error
        return raised

    def _finite(self, value: Any, duel: Duel) -> float:
        number = _number(value)
        if not math.isfinite(number):
            raise OracleError(
                f"oracle {self.id} returned {value!r} as a reward in duel {duel.id} (prompt {duel.prompt.id}); "
                "a reward is a finite number."
            )
        return number

    def _in_range(self, value: Any, duel: Duel) -> float:
        number = _number(value)
        if not 0 <= number <= 1:
            raise OracleError(
                f"oracle {self.id} returned {value!r} for duel {duel.id} (prompt {duel.prompt.id}); a probability is "
                "a number in [0, 1]. Set oracle.returns=reward if the function scores single responses."
            )
        return number


def sigmoid(x: float) -> float:
    """`1 / (1 + exp(-x))`, without overflow.

    >>> sigmoid(0.0), sigmoid(-1000.0), round(sigmoid(1.0), 4)
    (0.5, 0.0, 0.7311)
    """
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _number(value: Any) -> float:
    if isinstance(value, OracleError):
        raise value
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _name_of(function: Any) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


# -- kinds ----------------------------------------------------------------------------------------------------------
def _make_world(config: OracleConfig, world: World | None) -> Oracle:
    from rayalign.env.truth import TruthOracle

    assert world is not None, "checked before"
    return TruthOracle(world, price=config.price)


def _check_world(config: OracleConfig, world: World | None) -> None:
    if world is None or not world.has_truth:
        name = world.id or type(world).__name__ if world is not None else "no world"
        raise ConfigError(
            f"oracle.kind='world' asks the environment for its hidden reward, but {name} has none; "
            "set oracle.kind=reward_model with oracle.target, or give a function: run(..., oracle=function)."
        )


def _make_function(config: OracleConfig, world: World | None) -> Oracle:
    return _of_function(config.target, config)


def _check_function(config: OracleConfig, world: World | None) -> None:
    check_target(config)
    if ":" not in config.target:
        raise ConfigError(f"oracle.target={config.target!r} must be an import path like 'package.module:attribute'.")


WORLD = OracleKind(make=_make_world, check=_check_world)
FUNCTION = OracleKind(make=_make_function, check=_check_function)


def oracle_factory(
    config: OracleConfig, world: World | None = None, custom: Oracle | Callable[..., Any] | None = None
) -> Callable[[], Oracle]:
    """A picklable function that makes the oracle in the process where it is called.

    `custom` is an `Oracle`, or a function (see `FunctionOracle`), and stands in for the kinds `world` and `function`.
    Raises `ConfigError` for what can be seen to be wrong without loading anything.
    """
    if custom is None:
        kind = oracle_kind(config.kind)
        kind.check(config, world)
        return functools.partial(kind.make, config, world)
    if config.kind not in ("world", "function"):
        raise ConfigError(f"oracle.kind={config.kind!r} is set, and an oracle was given by hand, too: choose one.")
    if hasattr(custom, "judge") and hasattr(custom, "id"):
        return functools.partial(_same, custom)
    return functools.partial(_of_function, custom, config)


def _of_function(function: Callable[..., Any] | str, config: OracleConfig) -> Oracle:
    return FunctionOracle(
        function, returns=config.returns, batched=config.batched, scale=config.scale, price=config.price
    )


def _same(oracle: Oracle) -> Oracle:
    return oracle
