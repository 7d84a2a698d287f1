"""pair: a language model of speech tokens and the flow decoder that sounds them, in one step."""
