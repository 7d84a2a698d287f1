"""patch_lm: a causal LM that hears and speaks patches of speech, as Ming-UniAudio does."""
