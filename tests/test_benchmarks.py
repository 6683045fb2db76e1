"""The benchmarks: what they refuse, what they count and what they leave. No time is asserted."""

import dataclasses
import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import activation, common, exhaustive, memory, report, sweep, train_step, verify
from benchmarks.common import (
    RESULTS,
    Batch,
    Contestant,
    Goal,
    Timings,
    WrongResultError,
    pick_device,
    race,
    random_batches,
    slug,
    time_together,
)
from hf_gem import EGEM
from tests import oracle
from tests.helpers import needs_compiler

CPU = torch.device("cpu")


class Clock:
    """A clock that runs only while something is called, on a machine that slows down with every call."""

    def __init__(self) -> None:
        self.now, self.drift = 0.0, 1.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float):
        def call() -> None:
            self.drift *= 1.001
            self.now += seconds * self.drift

        return call


def test_ratios_are_of_rounds_so_that_drift_cancels():
    clock = Clock()
    timings = time_together(
        {"slow": clock.takes(3.0), "fast": clock.takes(1.0)}, CPU, rounds=101, seconds=0.0, clock=clock
    )
    first, *_, last = timings.seconds["slow"]
    assert last > 1.15 * first  # the machine did slow down
    ratio = timings.ratio("slow", "fast")
    # One call lies between the two, before or after: 0.1 %.
    assert 3.0 * 0.998 < ratio["low"] <= ratio["median"] <= ratio["high"] < 3.0 * 1.002


def test_a_ratio_is_the_median_with_quartiles():
    timings = Timings({"a": [1.0, 2.0, 3.0, 4.0, 50.0], "b": [1.0] * 5})
    assert timings.ratio("a", "b") == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert timings.summary(["b", "absent"])["ratios"].keys() == {"b"}


@pytest.mark.parametrize(
    ("goal", "verdict"),
    [
        (Goal("", 0.5, 0.6), "pass"),
        (Goal("", 0.6, 0.6), "pass"),
        (Goal("", 0.66, 0.6), "fail by 10.0%"),
        (Goal("", 0.95, 0.9, at_least=True), "pass"),
        (Goal("", 0.45, 0.9, at_least=True), "fail by 50.0%"),
        (Goal("", 0.0, 0.0), "pass"),
        (Goal("", 4.0, 0.0), "fail by 4"),
        (Goal("", float("nan"), 1.0), "fail: not a number"),
    ],
)
def test_verdicts_say_by_how_much(goal, verdict):
    assert goal.verdict == verdict


class OffBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad * (ctx.saved_tensors[0] > 0)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: F.relu(x) + 1e-3, "the value is off by 0.001, the exact result"),
        (OffBackward.apply, "the gradient is off by"),
        (lambda x: F.relu(x) * float("nan"), "nan"),
        (lambda x: F.relu(x).double(), "float64"),
    ],
)
def test_nothing_is_timed_beside_a_wrong_contestant(function, message):
    def clock() -> float:
        raise AssertionError("something was timed")

    contestants = {"right": Contestant(F.relu, F.relu), "wrong": Contestant(function, F.relu)}
    with pytest.raises(WrongResultError, match=message) as error:
        race(contestants, random_batches((64, 32), torch.float32, CPU), CPU, clock=clock)
    assert str(error.value).startswith("wrong ")


def test_rounding_to_a_half_type_is_allowed_once_unless_more_is_announced():
    batches = random_batches((64, 32), torch.bfloat16, CPU)
    in_steps = Contestant(lambda x: 3 * (x + 1) - 3, lambda x: 3 * x)
    with pytest.raises(WrongResultError, match="the tolerance is"):
        race({"in steps": in_steps}, batches, CPU, rounds=1)
    race({"in steps": dataclasses.replace(in_steps, num_roundings=4)}, batches, CPU, rounds=1)


def test_a_backward_pass_may_write_into_its_inputs():
    class Overwrites(torch.autograd.Function):  # as Liger's do
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.relu()

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return x.copy_(grad * (x > 0))

    batches = random_batches((64, 32), torch.float32, CPU)
    before = batches[0].inputs[0].clone()
    race({"overwrites": Contestant(Overwrites.apply, F.relu), "relu": Contestant(F.relu, F.relu)}, batches, CPU, 2)
    assert torch.equal(batches[0].inputs[0], before)


def test_a_training_step_with_a_wrong_gradient_is_refused():
    size = train_step.QUICK_SIZES["gpt2"]
    plain = train_step.Objective(train_step.build("gpt2", "gem_n2", size), autocast=False)
    data = train_step.random_data("gpt2", size, CPU)
    train_step.require_right("right", plain, plain, data)
    off = [lambda *data: 1.01 * plain(*data), lambda *data: plain(*data) + 0.2 * (z := plain(*data)) - 0.2 * z.detach()]
    for objective in off:
        with pytest.raises(WrongResultError, match="not timed"):
            train_step.require_right("wrong", objective, plain, data)


def test_each_element_is_checked():
    def off_in_one(x):
        return torch.where(torch.arange(x.numel()).view_as(x) == x.numel() - 1, x + 1, x.relu())

    x = torch.ones(2**22 + 5)  # more than are compared at a time
    with pytest.raises(WrongResultError):
        race({"wrong": Contestant(off_in_one, F.relu)}, [Batch((x,), x)], CPU)


@needs_compiler
@pytest.mark.parametrize("group", [activation.FAMILY, activation.STOCK, activation.GATED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_contestants_are_right(group, dtype):
    num_inputs = 2 if group is activation.GATED else 1
    timings = race(group, random_batches((8, 16), dtype, CPU, num_inputs), CPU, rounds=1)
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in timings.seconds.values())


def test_forward_and_backward_are_timed_alone_too():
    batches = random_batches((8, 16), torch.float32, CPU)
    for what in ("forward", "backward"):
        assert race(activation.STOCK, batches, CPU, 2, what).seconds.keys() == activation.STOCK.keys()


class SlowlyLaunched:
    """A GPU whose kernels take 1 us, driven by Python that takes 300 us to launch one, at 2 GHz."""

    def __init__(self):
        self.host = self.done = 0.0

    def sleep(self, cycles):
        self.done = max(self.host, self.done) + cycles / 2e9

    def launch(self):
        self.host += 300e-6
        self.done = max(self.host, self.done) + 1e-6

    def synchronize(self, *_):
        self.host = max(self.host, self.done)

    def Event(self, enable_timing):  # noqa: N802
        gpu = self

        class Event:
            def record(self):
                self.at = max(gpu.host, gpu.done)

            def query(self):
                return gpu.host > self.at

            synchronize = gpu.synchronize

            def elapsed_time(self, end):
                return 1000 * (end.at - self.at)

        return Event()


def test_times_of_a_gpu_do_not_contain_launches_however_slow_they_are(monkeypatch):
    gpu = SlowlyLaunched()
    monkeypatch.setattr(torch.cuda, "Event", gpu.Event)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(common, "wait_on_device", gpu.sleep)
    for ahead, expected in ((True, 1e-6), (False, 301e-6)):
        (seconds,) = common.time_together({"a": gpu.launch}, torch.device("cuda"), 1, ahead=ahead).seconds["a"]
        assert seconds == pytest.approx(expected, rel=0.02)


def test_held_bytes_count_each_storage_once_and_leave_out_what_is_kept_anyway():
    x = torch.randn(8, 32)
    first, second = nn.Linear(32, 32), nn.Linear(32, 32)
    besides = [x, *first.parameters(), *second.parameters()]

    def count(act):
        return memory.held_bytes(lambda: second(act(first(x))), besides)

    size = 8 * 32 * 4
    assert count(nn.Identity()) == count(EGEM(save="output")) == count(nn.ReLU()) == size
    assert count(EGEM(save="input")) == count(nn.GELU()) == 2 * size
    assert memory.held_bytes(lambda: second(EGEM(save="input")(first(x)))) > 2 * size  # with x and the weights


def test_fake_tensors_hold_what_real_ones_hold():
    for name in ("gem_n2", "gelu_new"):
        assert memory.gpt2_held_bytes(name, 2, tiny=True) == memory.gpt2_held_bytes(name, 2, tiny=True, fake=False)


def test_errors_are_in_ulp_where_normal_and_absolute_below():
    errors = exhaustive.Errors()
    exact = torch.tensor([1.0, 2.0**-140, float("inf"), float("nan"), 2.0**-30], dtype=torch.float64)
    got = exact.float()
    got[0] += 2.0**-22  # 2 ulp
    got[1] += 2.0**-148
    errors.update(torch.arange(5.0), got, exact, exact.abs())
    found = errors.json()
    assert (found["max_ulp"], found["at"]) == (2.0, 0.0)
    assert (found["max_absolute_below"], found["at_below"]) == (2.0**-148, 1.0)
    assert found["wrong_infinities_and_nans"] == 0
    wrong = torch.tensor([1.0, 0.0, float("-inf"), 0.0, float("inf")])
    errors.update(torch.arange(5.0), wrong, exact, exact.abs())
    assert errors.json()["wrong_infinities_and_nans"] == 3


def test_the_parts_make_up_all_bit_patterns():
    patterns = [bits for part in range(3) for bits in exhaustive.bit_patterns(1000, 2**12, part, 3)]
    starts = sorted(bits.start for bits in patterns)
    assert starts == list(range(0, 2**32, 1000 * 2**12))
    assert sum(map(len, patterns)) == len(range(0, 2**32, 1000))


def test_rounding_once_is_that_of_exact_arithmetic():
    values = torch.cat([torch.randn(500, dtype=torch.float64) * 10.0**k for k in range(-9, 6)])
    ties = torch.tensor([65519.99, 65520.0, 1 + 2.0**-9, 1 + 3 * 2.0**-9, torch.inf, -0.0, 2.0**-25])
    values = torch.cat([values, ties])
    for dtype in (torch.float16, torch.bfloat16):
        expected = oracle.round_array(values.numpy(), dtype)
        assert torch.equal(verify.rounded(values, dtype), torch.from_numpy(expected))


def test_the_kinds_of_tests_are_there():
    paths = [verify.ROOT / path for paths in verify.TESTS.values() for path in paths]
    assert paths
    assert [path for path in paths if not path.exists()] == []


def test_what_is_wrong_counts_as_a_failure():
    """A function that is off, one that has a NaN, and one that falls, beside exact ones."""
    x = torch.tensor([-2.0, 0.5, 1.0, 3.0], dtype=torch.bfloat16)

    def function(call, slope=torch.ones_like):
        return [verify.Function("f", call, lambda x: x * 1.0, slope)]

    assert [row.failures for row in verify.compare(function(lambda x: x * 1.0), x, "f", "", True)] == [0, 0]
    value, slope = verify.compare(function(lambda x: x * 1.0078125), x, "f", "", True)
    assert (value.failures, slope.failures, slope.greatest) == (4, 4, 1.0)
    (value, _) = verify.compare(function(lambda x: torch.where(x > 2, torch.nan, x)), x, "f", "", False)
    assert (value.cases, value.failures) == (4, 1)
    cpu = torch.device("cpu")
    assert verify.edges(function(lambda x: x * 1.0), "f", cpu).failures == 0
    assert verify.edges(function(lambda x: x * x), "f", cpu).failures > 0
    assert next(row.failures for row in verify.order(function(lambda x: -x), "f", cpu, 10)) == 32638
    assert [row.failures for row in verify.order(function(lambda x: x), "f", cpu, 10)] == [0, 0, 0]


def test_the_slope_from_a_kept_output_has_a_row():
    """It is compared by itself, in the dtypes in which the output can be kept."""
    x = torch.tensor([-2.0, 0.5, 1.0, 3.0], dtype=torch.bfloat16)

    def rows(keeping, x):
        halves = {torch.bfloat16}
        function = verify.Function(
            "f", lambda x: x * 1.0, lambda x: x * 1.0, torch.ones_like, keeping, halves.__contains__
        )
        found = verify.slope_from_output([function], x, "f", "b")
        return [(row.check, row.cases, row.failures, row.greatest) for row in found]

    check = "b, slope from the output"
    assert rows(lambda x: x * 1.0, x) == [(check, 4, 0, 0.0)]
    assert rows(lambda x: x * 1.0078125, x) == [(check, 4, 0, 1.0)]
    assert rows(lambda x: x * torch.where(x > 2, torch.inf, 1.0), x) == [(check, 4, 1, 0.0)]
    assert rows(None, x) == rows(lambda x: x * 1.0, x.half()) == []


def test_machines_get_names_fit_for_folders():
    assert slug("Intel(R) Xeon(R) CPU @ 2.20GHz 8 threads") == "intel-xeon-8-threads"
    assert slug("AMD EPYC 7B13 64-Core Processor 2 threads") == "amd-epyc-7b13-64-core-2-threads"
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="--device=cpu"):
        pick_device("cuda")


@pytest.fixture
def quick_run(tmp_path):
    def run(script, *flags):
        script.main(["--quick", "--rounds=2", "--device=cpu", f"--results={tmp_path}", *flags])
        return [json.loads(path.read_text()) for path in tmp_path.glob(f"*/{script.__name__.rpartition('.')[2]}*.json")]

    return run


SCRIPTS = {
    "activation": (activation, ()),
    "memory": (memory, ()),
    "sweep": (sweep, ()),
    "exhaustive": (exhaustive, ("--name", "egem", "segem")),
    "train_step": (train_step, ("--models", "gpt2", "bert", "--modes", "eager")),
    "verify": (verify, ()),
}


def check_stamp(record, name):
    assert record["benchmark"] == name
    assert record["environment"]["command"].startswith(f"python -m benchmarks.{name} --quick")
    assert record["environment"]["versions"].keys() >= {"python", "torch", "hf-gem"}
    assert record["environment"]["hardware"]["torch_threads"] == torch.get_num_threads()
    assert record["environment"].keys() >= {"commit", "dirty"}
    assert record["quick"] is True
    assert all(goal["verdict"] for goal in record["goals"])


@needs_compiler
def test_the_scripts_leave_records_and_a_report_is_made_of_them(quick_run, tmp_path, capsys):
    for name, (script, flags) in SCRIPTS.items():
        records = quick_run(script, *flags)
        for record in records:
            check_stamp(record, name)
        if name == "exhaustive":
            found = [record["results"] for record in records]
            assert {f["name"] for f in found} == {"egem", "segem"}
            assert all(count == 0 for f in found for count in f["differing_bits"].values())
            assert all(q["max_ulp"] < 16 for f in found for q in f["kernels"].values())
        else:
            assert len(records) == 1
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- end of results -->\nafter\n")
    capsys.readouterr()
    report.main([f"--results={tmp_path}", f"--readme={readme}"])
    printed, goals = capsys.readouterr().out, readme.read_text()
    assert goals.startswith("before\n")
    assert goals.endswith("<!-- end of results -->\nafter\n")
    assert "old" not in goals
    assert "more goals are counts that must be 0, and all of them are" in goals
    (page,) = re.findall(r"\[All tables of .*\]\((.*)\)", goals)
    page = tmp_path / page
    text = page.read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
        *("Activations alone", "Memory", "Training steps", "By size", "All float32 inputs", "How exact")
    ]
    assert "Quick runs, whose figures mean nothing" in text
    assert "graph breaks in gem_n2" in text
    (picture,) = re.findall(r"!\[.*\]\((.*)\)", text)
    assert (page.parent / picture).stat().st_size > 10_000
    assert "extra bytes" in text
    assert "graph breaks in gem_n2" in printed
    # The one shape of a quick run, with a ratio and its quartiles, and 1 for the baseline itself.
    row = r"\| 8 x 16 float32 \| both \| {} \| [\d,.]+ \| {} \|"
    assert re.search(row.format("gem_n2", r"[\d.]+ \([\d.]+ to [\d.]+\)"), text)
    assert re.search(row.format("gelu", "1"), text)


def test_a_report_says_which_goals_are_missed(tmp_path, capsys):
    goals = [Goal("met", 0.5, 0.6), Goal.of("missed", {"median": 1.2, "low": 1.1, "high": 1.3}, 1.0)]
    record = {
        "benchmark": "memory",
        "device": "cpu",
        "quick": False,
        "environment": {
            "command": "python -m benchmarks.memory",
            "commit": "0123456789abcdef",
            "dirty": False,
            "versions": {"python": "3.11", "torch": "2.14"},
            "hardware": {"cpu": "Abacus", "torch_threads": 2, "gpus": []},
        },
        "goals": [{**vars(goal), "verdict": goal.verdict} for goal in goals],
        "skipped": ["the peak needs a GPU"],
        "results": {
            "extra_bytes_per_element": {"float32": {"egem": 0.0}},
            "batch": 8,
            "gpt2_held_bytes": {"gem_n2": 2**30},
            "gpt2_peak_bytes": {},
        },
    }
    folder = tmp_path / "results" / "abacus-2-threads"
    folder.mkdir(parents=True)
    (folder / "memory.json").write_text(json.dumps(record))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results -->\n<!-- end of results -->")
    arguments = [f"--results={tmp_path / 'results'}", f"--readme={readme}"]
    with pytest.raises(SystemExit) as ended:
        report.main([*arguments, "--check"])
    assert ended.value.code == 1
    text, page = readme.read_text(), (folder / "README.md").read_text()
    assert "## abacus-2-threads\n\nAbacus, 2 threads; python 3.11; torch 2.14; commit 0123456789\n" in text
    assert "| met | 0.500 |  | ≤ 0.6 | pass |" in text
    assert "| missed | 1.200 | 1.100 to 1.300 | ≤ 1 | **fail by 20.0%** |" in text
    assert "Skipped: the peak needs a GPU." in page
    assert "| gem_n2 | 1,024 | - | - |" in page
    assert "All float32 inputs" not in page
    report.main(arguments)
    assert readme.read_text() == text  # a second time changes nothing
    assert "1 goals missed" in capsys.readouterr().out


def test_a_readme_without_markers_is_left_alone(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("text")
    with pytest.raises(ValueError, match="end of results"):
        report.report(tmp_path, readme)
    assert readme.read_text() == "text"


def test_the_readme_shows_what_the_records_say():
    tables = report.README.read_text().split(report.START)[1].split(report.END)[0]
    machines = report.load(RESULTS)
    assert tables == report.render(machines, "results"), "run python -m benchmarks.report"
    for machine, records in machines.items():
        page = (RESULTS / machine / "README.md").read_text()
        assert page == report.page(machine, records), "run python -m benchmarks.report"
        for picture in re.findall(r"!\[.*\]\((.*)\)", page):
            assert (RESULTS / machine / picture).exists()
