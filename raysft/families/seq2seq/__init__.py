"""seq2seq: an encoder hears a clip, a decoder writes its text after tokens of language and task."""
