"""Where a prompt becomes candidates: engines, the pool of actors that runs them, and the weights they run."""
