"""audio_lm: audio and text in, text out."""
