"""The shortest way from a run, or a folder of a model, to answers: one process, without Ray."""

from raysft.offered import callable_too

callable_too(__name__)  # `from raysft import transcribe`: the function of the library
