"""People who label: a durable queue of duels (`queue`) and the page that shows them (`app`)."""
