"""What a model speaks, heard again: by an ASR run, and held against the real clips. Without Ray."""
