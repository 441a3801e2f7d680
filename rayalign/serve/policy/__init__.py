"""An aligned policy behind an OpenAI-compatible endpoint.

    http_guard -> app (openai: what a request may say) -> Answerer: engine, best-of-n -> app -> reply

`app` knows no engine and no Ray: whoever implements `answerer.Answerer` is served by it. `deployment` puts the app and
an engine into each replica of a Ray Serve application.
"""
