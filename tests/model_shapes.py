"""Models whose sizes are known."""

from pathlib import Path

from rayalign.env import make_world
from rayalign.estimate.shape import ModelShape

# A Llama of 2 layers, width 128, MLP 256, 4 heads of 32, 73 words, head and embedding apart.
TINY = Path(make_world("rayalign/TinyWorld-v0").default_policy())
# per layer: 4 projections of 128 x 128, 3 of 128 x 256, 2 norms; twice 73 x 128 and the last norm
TINY_PARAMETERS = 2 * (4 * 128 * 128 + 3 * 128 * 256 + 2 * 128) + 2 * 73 * 128 + 128
BIG = ModelShape(
    parameters=1_000_000,
    adapted=((100, 100), (100, 300)),
    layers=4,
    hidden=100,
    intermediate=300,
    heads=10,
    kv_heads=2,
    head_dim=10,
    vocabulary=1000,
)
