"""Ranks that train together over gloo, as real processes. Whatever is sharded, the numbers are those of one process.
After a kill or a stop at any moment, the result is bitwise equal to an uninterrupted run.
"""

import json
import random
import re
import shutil
import signal
import socket
import time

import pytest
import torch
from choices import few
from programs import parity
from programs.forked import Forked
from runs import folder_bytes

from distill.core.errors import EXIT_FAILED, EXIT_INPUT, EXIT_PEER, EXIT_STOPPED
from distill.training import checkpoint_files

pytestmark = pytest.mark.process
ZERO = ("none", "0", "1", "2", "3")
RECIPES = ("one", "copy", "two", "heads")
QUICK = ("none", "2")  # without DeepSpeed, and with it; the other stages run in `make test-all`
COVERED = ("one-", "heads-", "copy-none-fp32-divide")  # by "two", and by the same with DeepSpeed: long
STEPS = parity.STEPS
LOST = "lost contact with another rank, which has exited or hangs"


def start(out, *cases, procs=2, minutes=2.0):
    """The ranks, each with what it says in OUT/rank-N.log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    out.mkdir(exist_ok=True)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(procs), "DS_ACCELERATOR": "cpu"}
    return [
        Forked(
            parity.main, str(out), minutes, *cases,
            log=out / f"rank-{rank}.log", env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(procs)
    ]  # fmt: skip


def train(out, *cases, procs=2):
    ranks = start(out, *cases, procs=procs)
    limit = max(300, 20 * len(cases))  # seconds
    assert [rank.end(limit) for rank in ranks] == [0] * procs, ranks[0].said[-3000:] + ranks[-1].said[-3000:]
    return out


def losses(out, case):
    """Of every step since the last start, the critic's among them."""
    steps = json.loads((out / f"{case}.json").read_text())
    return [step[name] for step in steps for name in sorted(step) if name.endswith(("loss", "memory"))]


def checkpoint(out, case, step):
    return out / case / "checkpoints" / f"step-{step:08d}"


def newest(out, case):
    """Step of the newest checkpoint; 0 before the first."""
    found = (out / case / "checkpoints").glob("step-*")
    return max((int(path.name[5:]) for path in found if re.fullmatch(r"step-\d+", path.name)), default=0)


def tensors(folder):
    found = checkpoint_files.verified(folder)
    groups = {checkpoint_files.group_of(name) for name in found.meta.files}
    return {f"{group}/{name}": tensor for group in groups for name, tensor in found.tensors(group).items()}


def bits(folder):
    """Weights, moments, averages, the recipe's memory: byte for byte."""
    files = folder_bytes(folder)
    assert files.pop("meta.json")
    return files


def same_end(ours, theirs, tolerance=1e-4):
    """Weights, moments, averages and copies, whatever they were divided among: to rounding."""
    found, expected = tensors(ours), tensors(theirs)
    assert found.keys() == expected.keys() and any(name.startswith("ema.student.64.0") for name in found)
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= tolerance * tensor.norm() + 1e-12, name


def close(found, expected, tolerance):
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert abs(ours - theirs) <= tolerance * max(1, abs(theirs))


# --- the same numbers ---


def options(recipe, zero):
    """A matrix is tried out with all that goes with it."""
    return {"one": "once" if zero == "none" else "once-masters", "copy": "once-memory", "two": "once", "heads": "once"}[
        recipe
    ]


def quick(case):
    """Whether `make test` trains a case, or those of a stage."""
    return re.search(r"(?:^|-)(none|\d)(?:-|$)", case)[1] in QUICK and not case.startswith(COVERED)


def each(cases):
    """Parameters of a test; those that are not quick are long."""
    return [case if quick(case) else pytest.param(case, marks=pytest.mark.long) for case in cases]


def trained(request, cases):
    """These cases; only the quick ones if no long test runs."""
    here = [item for item in request.session.items if item.path == request.path]
    return cases if any(item.get_closest_marker("long") for item in here) else [case for case in cases if quick(case)]


MATRIX = [f"{recipe}-{zero}-fp32-{options(recipe, zero)}" for zero in ZERO for recipe in RECIPES]
COPIES = [case for case in MATRIX if case.startswith("copy")]
BF16 = [f"copy-{zero}-bf16-masters" if zero != "none" else "copy-none-bf16" for zero in ZERO]
SPECIAL = ["copy-2-fp32-divide-recompute", "copy-3-fp32-divide-recompute", "copy-none-fp32-divide"]
SPECIAL += ["copy-3-fp32-persist"]
SLOPES = ["slope-none-fp32-short", *(f"slope-{zero}-bf16-short" for zero in ZERO)]
ADAPTERS = [f"adapter-{zero}-fp32-once-memory" for zero in ZERO]
PATIENT = [f"patient-{zero}-fp32-short" for zero in ZERO]
PATIENT += ["half-none-fp32-short"]  # both turns together reach all weights


@pytest.fixture(scope="module")
def alone(request, tmp_path_factory):
    """One process, without DeepSpeed; it takes the micro-batches of two ranks one after the other."""
    cases = [case for case in MATRIX if "-none-" in case] + ["adapter-none-fp32"]
    return train(tmp_path_factory.mktemp("alone"), *trained(request, cases), procs=1)


@pytest.fixture(scope="module")
def together(request, tmp_path_factory):
    """Two processes, one start for all cases."""
    cases = [*MATRIX, *BF16, *SPECIAL, *SLOPES, *ADAPTERS, *PATIENT]
    return train(tmp_path_factory.mktemp("together"), *trained(request, cases))


@pytest.mark.parametrize("case", each(MATRIX))
def test_two_ranks_train_as_one_process(alone, together, case):
    recipe = case.split("-")[0]
    reference = f"{recipe}-none-fp32-{options(recipe, 'none')}"
    close(losses(together, case), losses(alone, reference), 1e-5)
    assert len(json.loads((together / f"{case}.json").read_text())) == STEPS
    ours, theirs = (tensors(checkpoint(*where, 1)) for where in ((together, case), (alone, reference)))
    assert ours.keys() == theirs.keys(), "a checkpoint says nothing of who trained"
    gradients = [name for name in theirs if name.endswith("/exp_avg")]  # after one step: a tenth of the gradient
    assert len(gradients) > 4
    for name in gradients:
        assert (ours[name] - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name
    same_end(checkpoint(together, case, STEPS), checkpoint(alone, reference, STEPS))


@pytest.mark.parametrize("case", each(SPECIAL))
def test_divided_teachers_and_activations_computed_again_change_nothing(alone, together, case):
    close(losses(together, case), losses(alone, "copy-none-fp32-once-memory"), 1e-5)


@pytest.mark.parametrize("case", each(BF16))
def test_two_ranks_train_in_bf16(alone, together, case):
    found, expected = losses(together, case), losses(alone, "copy-none-fp32-once-memory")
    close(found, expected, 3e-2)
    assert found != expected
    weights = tensors(checkpoint(together, case, STEPS))
    assert {tensor.dtype for name, tensor in weights.items() if name.startswith(("network", "ema"))} == {torch.float32}
    student = {name: tensor for name, tensor in weights.items() if name.startswith("network.student")}
    rounded = sum(torch.equal(tensor, tensor.bfloat16().float()) for tensor in student.values())
    assert rounded < len(student) / 2, "weights are not what was sent"
    slow = {name.replace("slow", "student"): t for name, t in weights.items() if name.startswith("network.slow")}
    rounded = sum(torch.equal(slow[name], slow[name].bfloat16().float()) for name in student)
    assert rounded < len(student) / 2


@pytest.mark.parametrize("zero", few(ZERO, "2"))
def test_the_precision_of_a_derivative_is_the_recipes(together, zero):
    """DeepSpeed would turn autocast on again inside it: a difference in bf16 is noise."""
    names = ("slope-none-fp32-short", f"slope-{zero}-bf16-short")
    exact, found = (json.loads((together / f"{name}.json").read_text())[0] for name in names)
    assert found["slope"] == pytest.approx(exact["slope"], rel=1e-5)
    assert found["loss"] == pytest.approx(exact["loss"], rel=1e-2)
    assert found["loss"] != exact["loss"]


@pytest.mark.parametrize("zero", few(ZERO, "2"))
def test_weights_that_the_first_turns_do_not_reach_are_refused_by_name(together, tmp_path, zero):
    # "half", which one rank's second turn reaches: DeepSpeed needs the same gradients on all ranks.
    assert all((together / f"{case}.json").exists() for case in (f"patient-{zero}-fp32-short", "half-none-fp32-short"))
    ranks = start(tmp_path, f"deaf-{zero}-fp32-often")
    assert [rank.end(60) for rank in ranks] == [EXIT_INPUT, EXIT_INPUT]
    for rank in ranks:
        assert re.search(
            r"^network 'student': in its first 2 turns no backward pass reached 2 of its \d+ trained parameters: "
            r"head\.weight, head\.bias\. In the recipe, set requires_grad=False where",
            rank.said,
            re.MULTILINE,
        )
    assert newest(tmp_path, f"deaf-{zero}-fp32-often") == 1


@pytest.mark.parametrize("case", each(COPIES))
def test_a_target_copy_is_the_average_of_the_weights(together, case):
    """After one step from equal weights w0: 0.9 w0 + 0.1 w1; later it is what no other step would give."""
    student, copy = (
        {name.removeprefix(f"network.{who}/"): t for name, t in tensors(folder).items() if f"network.{who}/" in name}
        for folder, who in ((checkpoint(together, case, 1), "student"), (checkpoint(together, case, 1), "slow"))
    )
    fresh = dict(parity.Init().velocity_field().named_parameters())
    assert student.keys() == copy.keys() >= fresh.keys()
    for name, start_ in fresh.items():
        assert torch.equal(copy[name], torch.lerp(start_.detach(), student[name], 0.1)), name


@pytest.mark.parametrize("case", each(COPIES))
def test_memory_is_predicted_from_shapes(together, case):
    """Parameters, gradients, optimizer and EMA, within 10 % of the bytes of the live tensors, on each rank."""
    for rank in range(2):
        found = json.loads((together / f"{case}.memory-{rank}.json").read_text())
        predicted, counted = found["predicted"], found["counted"]
        assert sum(predicted.values()) == pytest.approx(sum(counted.values()), rel=0.1)
        for kind in predicted:  # small networks have parameters that lie in one part alone: gradients may be skewed
            assert predicted[kind] == pytest.approx(counted[kind], rel=0.3 if kind == "gradients" else 0.01), kind
        assert found["activations"] > 10 * 4 * parity.MICRO * 32 * 64, "more than ten layers' worth"
        assert found["process"] > sum(counted.values())
        files = checkpoint(together, case, STEPS).glob(f"*.{rank:05d}-of-00002.safetensors")
        assert found["saving"] == pytest.approx(sum(path.stat().st_size for path in files), rel=0.1)


@pytest.mark.parametrize("zero", few(ZERO, "2"))
def test_adapters_are_trained_by_two_ranks_as_by_one_process(alone, together, zero):
    case, reference = f"adapter-{zero}-fp32-once-memory", "adapter-none-fp32"
    close(losses(together, case), losses(alone, reference), 1e-5)
    same_end(checkpoint(together, case, STEPS), checkpoint(alone, reference, STEPS))
    found = json.loads((together / f"{case}.memory-0.json").read_text())
    for kind in ("parameters", "optimizer", "ema"):  # gradients of so few weights are skewed
        assert found["predicted"][kind] == pytest.approx(found["counted"][kind], rel=0.01), kind
    saved = checkpoint_files.verified(checkpoint(together, case, STEPS)).tensors("network.student")
    still = {name.replace(".base_layer", ""): tensor for name, tensor in saved.items()}
    for name, tensor in parity.Init().velocity_field().named_parameters():
        assert torch.equal(still[name], tensor), name
    assert all(saved[key].any() for key in saved if "lora_B" in key)


@pytest.mark.long
def test_offloaded_optimizer_states_change_nothing(alone, tmp_path):
    for case in ("two-2-fp32-offload", "two-3-fp32-offload"):
        train(tmp_path, case, procs=1)
        close(losses(tmp_path, case), losses(alone, "two-none-fp32-once"), 1e-5)
    train(tmp_path, "two-1-fp32-offload")
    close(losses(tmp_path, "two-1-fp32-offload"), losses(alone, "two-none-fp32-once"), 1e-5)


# --- going on elsewhere ---

MOVES = {"3": ("none", 1), "none": ("2", 2), "1": ("3", 2), "2": ("0", 1), "0": ("1", 2)}


@pytest.mark.parametrize(
    "before", [pytest.param(zero, marks=[] if zero == "none" else pytest.mark.long) for zero in MOVES]
)
def test_a_checkpoint_fits_any_number_of_ranks_and_any_stage(request, alone, tmp_path, before):
    """From one process to two that divide their networks, and back and across."""
    after, procs = MOVES[before]
    where = alone if before == "none" else request.getfixturevalue("together")
    case, whole = f"two-{after}-fp32", checkpoint(alone, "two-none-fp32-once", STEPS)
    shutil.copytree(checkpoint(where, f"two-{before}-fp32-once", 10), checkpoint(tmp_path, case, 10))
    train(tmp_path, case, procs=procs)
    expected = losses(alone, "two-none-fp32-once")
    close(losses(tmp_path, case), expected[len(expected) // 2 :], 1e-5)
    same_end(checkpoint(tmp_path, case, STEPS), whole)
    said = (tmp_path / "rank-0.log").read_text()
    assert f"zero_stage: {json.dumps(before if before == 'none' else int(before))} -> " in said
    assert "will not be bit-identical" in said


@pytest.mark.parametrize("piece", ["network.critic", "optimizer.student", "ema.student.64.0", "recipe", "network.slow"])
def test_a_missing_piece_is_named(alone, tmp_path, piece):
    recipe = "copy" if piece == "network.slow" else "two"
    case = f"{recipe}-none-fp32"
    ours = checkpoint(tmp_path, case, 10)
    shutil.copytree(checkpoint(alone, f"{recipe}-none-fp32-{options(recipe, 'none')}", 10), ours)
    (ours / f"{piece}.safetensors").unlink()
    (rank,) = start(tmp_path, case, procs=1)
    assert rank.end() == EXIT_FAILED
    assert f"step-00000010: {piece}.safetensors: No such file or directory" in rank.said


# --- kills and signals ---


@pytest.mark.parametrize("zero", few(ZERO, "2"))
def test_kills_at_random_moments_change_no_bit(together, tmp_path, zero):
    """One rank, the other, both; in a step or while a checkpoint is gathered or written."""
    case, chance = f"two-{zero}-fp32-often", random.Random(zero)
    folder = tmp_path / case / "checkpoints"
    for victims in ((1,), (0,), (0, 1)):
        ranks = start(tmp_path, case)
        target = newest(tmp_path, case) + chance.randint(1, 4)
        ranks[0].wait_until(lambda target=target: newest(tmp_path, case) >= target)
        if victims == (0, 1):
            ranks[0].wait_until(lambda: any(".tmp-" in path.name for path in folder.iterdir()))  # while saving
        else:
            time.sleep(chance.uniform(0, 0.2))
        for victim in victims:
            ranks[victim].send(signal.SIGKILL)
        began = time.monotonic()
        codes = [rank.end(30) for rank in ranks]
        assert time.monotonic() - began < 30
        assert codes == [-signal.SIGKILL if rank in victims else EXIT_PEER for rank in range(2)]
        for rank, survivor in enumerate(ranks):
            if rank not in victims:
                training = r"step \d+, (turn [01], network '\w+'|reading its batch)"
                saving = r"(after )?saving step \d+|after step \d+.*|(after )?waiting for .*"
                place = rf"rank {rank}, ({training}|{saving})"
                assert re.search(rf"^{place}: {LOST} \(", survivor.said, re.MULTILINE)
    assert newest(tmp_path, case) < STEPS
    train(tmp_path, case)
    assert not [path for path in folder.iterdir() if ".tmp-" in path.name]
    undisturbed = checkpoint(together, f"two-{zero}-fp32-once", STEPS)
    assert bits(checkpoint(tmp_path, case, STEPS)) == bits(undisturbed)


@pytest.mark.parametrize("zero", few(ZERO, "none"))
def test_a_signal_to_one_rank_stops_all_at_the_same_step(together, tmp_path, zero):
    case = f"copy-{zero}-fp32-often"
    ranks = start(tmp_path, case)
    ranks[0].wait_until(lambda: newest(tmp_path, case) >= 3)
    ranks[1].send(signal.SIGUSR1)
    before = newest(tmp_path, case)
    assert [rank.end(30) for rank in ranks] == [EXIT_STOPPED, EXIT_STOPPED]
    assert newest(tmp_path, case) <= before + 2, "within one step"
    said = [rank.said.splitlines()[-1] for rank in ranks]
    assert said[0].startswith("stopped by a signal to another rank; saved: ")
    assert said[1] == said[0].replace("a signal to another rank", "SIGUSR1")
    train(tmp_path, case)
    undisturbed = checkpoint(together, f"copy-{zero}-fp32-once-memory", STEPS)
    assert bits(checkpoint(tmp_path, case, STEPS)) == bits(undisturbed)


# --- ranks that do not follow ---


@pytest.mark.parametrize("zero", each(ZERO))
def test_a_gradient_that_is_no_number_stops_all_before_weights_are_saved(together, tmp_path, zero):
    case = f"faulty-{zero}-fp32-often"
    ranks = start(tmp_path, case)
    assert [rank.end(60) for rank in ranks] == [EXIT_FAILED, EXIT_FAILED]
    last = checkpoint(tmp_path, case, 3)
    for rank in ranks:
        assert re.fullmatch(
            r"step 3, turn 0, network 'student': non-finite loss \([\d.]+\) or gradient norm \((nan|inf)\); no "
            rf"weights were saved after it\. Last good checkpoint: {last}; lower the learning rate, or use precision: "
            "fp32",
            rank.said.splitlines()[-1],
        )
    assert newest(tmp_path, case) == 3


@pytest.mark.parametrize("zero", each(ZERO))
def test_a_save_that_fails_ends_all_and_names_the_last_good_one(tmp_path, zero):
    case = f"one-{zero}-fp32-often"
    ranks = start(tmp_path, case)
    ranks[0].wait_until(lambda: newest(tmp_path, case) >= 1)
    last, next_ = checkpoint(tmp_path, case, 9), checkpoint(tmp_path, case, 10)
    next_.write_text("in the way")
    assert [rank.end(60) for rank in ranks] == [EXIT_FAILED, EXIT_PEER]
    said = f"cannot save checkpoint {next_}: Not a directory; last good checkpoint: {last}"
    assert ranks[0].said.splitlines()[-1] == said
    assert re.match(r"rank 1[,:] ", ranks[1].said.splitlines()[-1])


def test_a_rank_that_takes_another_branch_is_told_at_once(tmp_path):
    ranks = start(tmp_path, "astray-none-fp32")
    assert [rank.end(30) for rank in ranks] == [EXIT_FAILED, EXIT_FAILED]
    for rank in ranks:
        assert rank.said.splitlines()[-1] == (
            "the ranks are at different places of the program: rank 0 is at step 3, turn 0, network 'critic'; "
            "rank 1 is at step 3, turn 0, network 'student'; a recipe must yield the same turns on every rank"
        )


@pytest.mark.long
@pytest.mark.parametrize("zero", ZERO)
def test_a_rank_that_hangs_is_given_up_and_says_itself_where_it_is(tmp_path, zero):
    ranks = start(tmp_path, f"hung-{zero}-fp32", minutes=0.2)  # less could be too short for a busy machine to start
    assert ranks[0].end(60) == EXIT_PEER
    lost = rf"^rank 0, step 3, turn 0, network 'student': {LOST} \(.*[Tt]imed out.*\)$"
    assert re.search(lost, ranks[0].said, re.MULTILINE)
    assert ranks[1].end(60) == EXIT_PEER
    *_, last = ranks[1].said.splitlines()
    assert last.startswith(
        "rank 1 has made no progress for 15 s at: step 3, turn 0, network 'student'; its stack is printed above;"
    )
    assert re.search(r'File ".*parity\.py", line \d+ in regress', ranks[1].said)


def test_a_rank_that_is_held_is_given_up(tmp_path):
    ranks = start(tmp_path, "one-none-fp32-often", minutes=0.2)
    ranks[0].wait_until(lambda: newest(tmp_path, "one-none-fp32-often") >= 3)
    ranks[1].send(signal.SIGSTOP)
    assert ranks[0].end(60) == EXIT_PEER
    assert re.search(
        rf"^rank 0, (.*step \d+.*|(after )?waiting for the last save): {LOST}", ranks[0].said, re.MULTILINE
    )
    ranks[1].send(signal.SIGKILL)
    ranks[1].end()
