"""Predicts the memory of training, stage by stage, before a run starts."""

from distill.execution.preflight import Ready
from distill.networks.quantised import held_bytes
from distill.spec.model import TrainStage
from distill.training import memory
from distill.training.choice import choose_sharding


def estimate(ready: Ready) -> dict[str, dict[str, int]]:
    """Bytes of a process by stage and kind, on the device on which it trains. Activations are not included.

    The kinds are those of `memory.predict`, "teacher" if the recipe calls one, and "base": the weights that networks
    with adapters share, unless they are the teacher's. Networks of which only the weights are copied are on the CPU.
    Stages whose networks are not known yet are left out.
    """
    launch, found = ready.resolved.spec.launch, {}
    sharding = choose_sharding(launch)
    for name, built in ready.built.items():
        stage = ready.resolved.spec.stages[name]
        assert isinstance(stage, TrainStage)
        averages = len(stage.averages)
        found[name] = memory.predict(
            built.sizes, built.copies, averages, launch.world_size, sharding, built.still, built.moments
        )
        if built.teacher is not None and built.teacher.network is not None:
            whole = held_bytes(built.teacher.network.parameters())
            found[name]["teacher"] = whole // launch.world_size if sharding.divides_frozen else whole
        if built.base:
            found[name]["base"] = built.base
    return found
