"""Ray imports this in each process of an embedded Ray, before its first task: see `preload`."""

from importlib import import_module

from raysft.preload import modules

for _name in modules():
    import_module(_name)
