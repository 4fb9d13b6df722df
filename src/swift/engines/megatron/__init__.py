"""The engine over megatron-core from PyPI, unchanged. Others import this package by name, when they need it.

megatron-core settles devices and compiler while it is imported: what it has to find is put in place here.
"""

from swift.engines.megatron.cpu import make_ready

make_ready()
