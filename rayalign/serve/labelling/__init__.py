"""People who label: a durable queue of duels (`queue`), the page that shows them (`app`), the judge (`oracle`)."""
