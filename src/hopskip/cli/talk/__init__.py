"""The parts of `hopskip chat`. What is said and set (`conversation`, `settings`, `saved`) and what typed text means
(`typed`) know no terminal; `reading`, `prompt` and `session` are the terminal."""
