"""Users of the policy that is being trained, as the oracle: they chat, and now and then choose between two answers.

    http_guard -> app (chat, choices) -> desk -> the run's collector: pool and agent answer, `book` remembers -> reply

What a user sees and says is in the book before it is told; only a comparison whose user has chosen becomes a duel of
the ledger. Everything of a run is in its collector (`rayalign.loop.online`): the service that listens keeps no state.
"""
