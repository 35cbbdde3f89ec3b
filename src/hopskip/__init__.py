"""hopskip: a language model as its own draft model."""
