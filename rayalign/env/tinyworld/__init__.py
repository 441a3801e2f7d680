"""TinyWorld: a language task small enough to know the truth about. See `world.TinyWorld`."""

from rayalign.env.tinyworld.world import TinyWorld

__all__ = ["TinyWorld"]
