"""`python -m swift.cli.megatron` is the command `megatron`: the module of that name is megatron-core's."""

from swift.cli.main import megatron_main

if __name__ == "__main__":
    megatron_main()
