"""A sweep without what runs it: its space, its points, its folder, its table. No Ray, no torch."""

from raysft.offered import callable_too

callable_too(__name__)
