"""The engine over megatron-core from PyPI, unchanged. Nothing above the engines imports this package but by name.

megatron-core fixes its devices and its compiler while it is imported, so what it has to find is put in place here.
"""

from swift.engines.megatron.cpu import make_ready

make_ready()
