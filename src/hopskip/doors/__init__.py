"""hopskip inside other programs: models for the command `llm`, and for lm-eval."""
