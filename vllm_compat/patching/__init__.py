"""The machinery: declares, checks, puts in and takes out replacements. Knows Python, not vLLM."""
