"""flow_decoder: speech tokens in, a mel spectrogram out."""
