"""What objectives learn from a teacher does not depend on how its vocabulary is cut."""

from pathlib import Path

import pytest

HOOK = f"{Path(__file__).parent}/megatron_teacher.py:compare"


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_teacher_in_parts_is_the_whole_one(world, megatron_workers):
    done = megatron_workers.run([], world, hook=HOOK, hook_arguments={"world": world})
    assert done.code == 0, done.stderr[-3000:]
