"""The oracle over HTTP: a service that other programs ask, and the oracle that is such a program.

service     where it listens, whom it answers, how much at once
schema      what is said: pydantic models, which are the published OpenAPI schema
app         http_guard -> FastAPI -> one function that judges
deployment  the app in each replica of an oracle under Ray Serve
config, client    `oracle.kind=http`: an oracle that asks such a service
"""
