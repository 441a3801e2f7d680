"""Labels on disk: the append-only ledger, buying under a budget, and what was bought as a table."""
