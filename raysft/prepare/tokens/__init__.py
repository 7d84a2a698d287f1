"""Methods of prepare.speech_tokens, a module each: rows of `raysft.config.listeners`."""
