"""SEA with online users on TinyWorld: they chat with the policy, and now and then choose between two of its answers.

Command     python tuned_examples/sea_online_tinyworld.py                 eight simulated users come along
            python tuned_examples/sea_online_tinyworld.py --budget 200
            rayalign run tuned_examples/sea_online_tinyworld.py           waits for yours, at 127.0.0.1:8701
            ray job submit --working-dir . -- python tuned_examples/sea_online_tinyworld.py
Hardware    2 CPU cores, 8 GiB
Result      one run of 2 minutes: held-out win rate from 0.42 to 0.61 with 600 labels; 3,452 questions answered, with a
            cumulative regret of 3,487, that is 1.01 a question
Compare     --set agent.exploration=passive --set agent.gamma_after=1.0 --set agent.posterior.updates=0
            no posterior that picks answers: 0.57, and a regret of 1.89 a question (one run; users ask as fast as they
            are answered, so that the numbers of questions differ)
"""

import threading

import httpx
import numpy as np

from rayalign.env.tinyworld.build import backbone_dir

PORT = 8701
CONFIG = {
    "agent": "sea",
    "env": "rayalign/TinyWorld-v0",
    "budget": 600,
    "seed": 0,
    "oracle.kind": "users",
    "oracle.users.port": PORT,
    "oracle.users.choose_within_s": 20.0,
    # ee_ts shows answers that may be good, where bai_ts shows those that teach most: here every answer counts.
    "agent.exploration": "ee_ts",
    "agent.features.backbone": str(backbone_dir()),
    "agent.num_candidates": 10,
    "agent.gamma_burn_in": 300,
    "agent.gamma_after": 0.5,
    "agent.synthetic_pairs": "extremes",
}
LEAVES, SKIPS = 0.1, 0.1
"""Shares of the comparisons that a simulated user walks away from, or skips."""


def chat(number: int, stop: threading.Event) -> None:
    """A simulated user: asks about reports of the world, and chooses as Bradley-Terry has it."""
    import openai

    from rayalign.env import make_world
    from rayalign.env.truth import preference_probability

    world, rng = make_world(CONFIG["env"]), np.random.default_rng(number)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", max_retries=0, timeout=120)
    while not stop.is_set():
        prompt = world.prompt(int(rng.integers(1 << 31)))
        try:
            reply = client.chat.completions.create(model="policy", messages=[{"role": "user", "content": prompt.text}])
            comparison = (reply.model_extra or {}).get("comparison")
            if comparison is None or (mood := rng.random()) < LEAVES:
                continue
            first, second = (world.reward(prompt, choice.message.content) for choice in reply.choices)
            wins = rng.random() < preference_probability(world, first, second)
            choice = "skip" if mood < LEAVES + SKIPS else "first" if wins else "second"
            client.post(f"/comparisons/{comparison['id']}", body={"choice": choice}, cast_to=httpx.Response)
        except openai.OpenAIError:  # nobody is there yet, or any more
            stop.wait(0.5)


if __name__ == "__main__":
    from rayalign.cli import run_example

    stop = threading.Event()
    users = [threading.Thread(target=chat, args=(number, stop), daemon=True) for number in range(8)]
    for user in users:
        user.start()
    try:
        run_example(CONFIG)
    finally:
        stop.set()
