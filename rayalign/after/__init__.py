"""After the run: export, replay, serve, answers for other benchmarks."""
