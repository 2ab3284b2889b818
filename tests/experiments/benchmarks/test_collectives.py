import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from experiments.benchmarks.collectives import collectives

# As XLA prints it for a GPU: started and awaited apart, results of a start after its operands, several arrays at once.
HLO = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %all-gather-start.1 = ((bf16[8,4]{1,0}, f32[2]{0}), (bf16[16,4]{1,0}, /*index=1*/f32[4]{0})) all-gather-start(%x, %y)
  %all-gather-done.1 = (bf16[16,4]{1,0}, f32[4]{0}) all-gather-done(%all-gather-start.1)
  %permute = (bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[], u32[]) collective-permute-start(%z)
}

%condition (p: (s32[], bf16[8,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[256]) -> f32[256] {
  %while.1 = (s32[], bf16[8,4]{1,0}) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"24"}}
  %all-reduce-start = (f32[256]{0}, f32[8]{0}) all-reduce-start(%a, %b), to_apply=%add
  ROOT %all-reduce-done = (f32[256]{0}, f32[8]{0}) all-reduce-done(%all-reduce-start)
}
"""  # noqa: E501


def test_counts_loops_and_results_of_started_collectives():
    found = collectives(HLO)
    assert found == {
        "all-reduce": {"program": 1, "runs": 1, "mb": 4 * 264 / 2**20},
        "all-gather": {"program": 1, "runs": 24, "mb": 24 * (2 * 64 + 4 * 4) / 2**20},
        "collective-permute": {"program": 1, "runs": 24, "mb": 24 * 2 * 32 / 2**20},
    }


@pytest.mark.multidevice
def test_a_compiled_program():
    mesh = Mesh(np.array(jax.devices()[:4]), ("d",))

    def local(x):
        x, _ = lax.scan(lambda x, _: (lax.ppermute(x, "d", [(i, (i + 1) % 4) for i in range(4)]), None), x, length=5)
        return lax.all_gather(x, "d"), lax.psum(x, "d")

    function = jax.shard_map(local, mesh=mesh, in_specs=P("d"), out_specs=(P("d"), P()), check_vma=False)
    found = collectives(jax.jit(function).lower(jnp.ones((16, 64))).compile().as_text())
    assert found["collective-permute"] == {"program": 1, "runs": 5, "mb": 5 * 4 * 64 * 4 / 2**20}
    assert found["all-gather"]["mb"] == 16 * 64 * 4 / 2**20
    assert found["all-reduce"] == {"program": 1, "runs": 1, "mb": 4 * 64 * 4 / 2**20}
