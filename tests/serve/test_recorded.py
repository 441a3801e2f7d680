"""The oracle that knows what the data says."""

import pytest

from rayalign.env.prompt_data import Columns, to_prompt
from rayalign.errors import OracleError
from rayalign.serve.config import OracleConfig
from rayalign.serve.oracles import oracle_factory
from rayalign.types import Candidate, Duel


def duel(prompt, first, second):
    one, two = (Candidate(text=t, token_ids=(), logprobs=(), policy_version=-1) for t in (first, second))
    return Duel(id="d", batch=0, prompt=prompt, first=one, second=two)


def test_the_recorded_winner_wins_in_either_order_at_the_price_of_a_label():
    oracle = oracle_factory(OracleConfig(kind="data", price=0.25))()
    chosen = to_prompt({"prompt": "q", "chosen": "yes", "rejected": "no"}, Columns(), "row 1")
    second = to_prompt({"prompt": "q", "responses": ["no", "yes"], "preferred": 1}, Columns(), "row 1")
    for prompt in (chosen, second):
        verdicts = oracle.judge([duel(prompt, "yes", "no"), duel(prompt, "no", "yes")])
        assert [(v.probability, v.price) for v in verdicts] == [(1.0, 0.25), (0.0, 0.25)]


def test_what_the_data_does_not_say_is_an_error_that_says_what_to_do():
    oracle = oracle_factory(OracleConfig(kind="data"))()
    known = to_prompt({"prompt": "q", "chosen": "yes", "rejected": "no"}, Columns(), "row 1")
    unlabelled = to_prompt({"prompt": "q", "responses": ["yes", "no"]}, Columns(), "row 1")
    for prompt, first in ((known, "perhaps"), (unlabelled, "yes"), (to_prompt({"prompt": "q"}, Columns(), "r"), "yes")):
        with pytest.raises(OracleError, match=r"oracle\.kind='data' only knows the pairs of the data.*ae_dpo, us_dpo"):
            oracle.judge([duel(prompt, first, "no")])
