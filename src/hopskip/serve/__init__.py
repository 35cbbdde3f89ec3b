"""An OpenAI-compatible server around the engine (extra `serve`): `hopskip serve`, or `app.create_app` in your own."""
