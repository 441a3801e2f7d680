"""SEA on TinyWorld with its oracle elsewhere: each label is a request over HTTP.

Command     python tuned_examples/sea_http_tinyworld.py                   serves the world's hidden reward, too
            rayalign oracle world --env rayalign/TinyWorld-v0 --folder answers          or elsewhere, and then
            rayalign run tuned_examples/sea_http_tinyworld.py --set oracle.target=http://HOST:8710
            ray job submit --working-dir . -- python tuned_examples/sea_http_tinyworld.py
Hardware    2 CPU cores, 8 GiB
Result      held-out win rate 0.423 -> 0.698 ± 0.026, 0.65 after 833 labels; seed 0 alone, 2.4 minutes, service included
Compare     tuned_examples/sea_tinyworld.py: the oracle is the run's own

What is served may as well be a reward model, a judge, people, or a program of yours: `rayalign oracle --help`. Any host
but this machine wants a token, in RAYALIGN_ORACLE_TOKEN on both sides. The evaluation asks the world itself.
"""

from rayalign.env.tinyworld.build import backbone_dir

PORT = 8710
CONFIG = {
    "agent": "sea",
    "env": "rayalign/TinyWorld-v0",
    "budget": 2_000,
    "seed": 0,
    "max_staleness": 1,  # batches travel while the learner learns
    "oracle.kind": "http",
    "oracle.target": f"http://127.0.0.1:{PORT}",
    "evaluation.oracle.kind": "world",
    "agent.features.backbone": str(backbone_dir()),
    "agent.num_candidates": 20,
    "agent.exploration": "bai_ts",
    "agent.gamma_burn_in": 300,
    "agent.gamma_after": 0.5,
    "agent.synthetic_pairs": "extremes",
}

if __name__ == "__main__":
    import rayalign
    from rayalign.cli import run_example

    with rayalign.serve_oracle("world", env=CONFIG["env"], port=PORT, folder="runs/oracle-of-http-example"):
        run_example(CONFIG)
