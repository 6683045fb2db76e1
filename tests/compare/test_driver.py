"""What a driver runs, in which order, and when it stops; the runs take place in this process, or are made up."""

import json
import re
import signal
import threading
from unittest import mock

import pytest
from filelock import FileLock
from tqdm.auto import tqdm

from hf_gem import cli
from hf_gem.compare import driver as driver_module
from hf_gem.compare import progress
from hf_gem.compare.driver import Driver
from hf_gem.compare.executors import Ended
from hf_gem.compare.plan import PlanError, Run
from hf_gem.compare.report import write_report
from hf_gem.compare.study import StudyError
from hf_gem.training.environment import environment
from hf_gem.training.errors import Interrupted
from tests.compare.toy import TWO_ARMS, InThisProcess, recipes_of, run, started, until


def test_from_plan_to_report(study):
    toy = study()
    run(toy)
    assert len(started(toy)) == 4 * 3 * 2 + 3 * 8  # four activations, three rates, two seeds; then three arms
    assert toy.choices() == {"relu": ("relu", 0.01), "gem": ("gem_n2", 0.01), "silu": ("silu", 0.01)}
    assert not list(toy.folder.glob("runs/*/*.safetensors"))
    assert {path.stem for path in toy.folder.glob("runs/*.txt")} == set(started(toy))  # a log for each
    page = write_report(toy).read_text()
    results = json.loads((toy.folder / "results.json").read_text())
    verdicts = {c["arm"]: c["verdict"] for c in results["comparisons"]}
    assert verdicts == {"gem": "better", "silu": "equivalent"}
    report = (toy.folder / "report.md").read_text()
    assert "of `gem` was 0.0" in report
    assert "below that of `relu`" in report
    assert "the same initial weights" in report
    assert page.count("data:image/svg+xml;base64,") == 4  # forest, curves, learning rates, n
    assert not re.search(r'(src|href)="(?!data:)', page)
    for name in re.findall(r"\]\((\w+\.png)\)", report):
        assert (toy.folder / name).exists()


def test_nothing_is_run_twice_and_the_report_is_the_same(study, capsys):
    toy = study()
    run(toy)
    first = {name: (write_report(toy).parent / name).read_bytes() for name in ("report.md", "report.html")}
    count = len(started(toy))
    run(study())
    assert len(started(toy)) == count
    cli.main(["report", str(toy.folder)])
    assert "report.html" in capsys.readouterr().out
    assert {name: (toy.folder / name).read_bytes() for name in first} == first


def test_a_run_that_failed_stops_the_study_and_can_be_repeated(study):
    name = "gem-lr0.01-seed100"
    toy = study(flags={"breaks": name})
    with pytest.raises(StudyError, match=rf"the run {name} exited with status 1: .*out of memory.*output is in"):
        run(toy)
    assert started(toy)[-1] == name
    done = set(started(toy)) - {name}
    run(toy)
    assert all(started(toy).count(other) == 1 for other in done)
    assert started(toy).count(name) == 2


def test_a_record_of_an_earlier_attempt_is_not_taken_for_this_one(study):
    toy = study(flags={"breaks": "gem-lr0.01-seed100"})
    folder = toy.folder / "runs" / "gem-lr0.01-seed100"
    folder.mkdir()
    (folder / "record.json").write_text(json.dumps({"status": "interrupted"}))
    with pytest.raises(StudyError, match="out of memory"):
        run(toy)


def test_two_drivers_share_a_study(study):
    one, two = study(), study()
    threads = [threading.Thread(target=run, args=[each]) for each in (one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = started(one)
    assert len(names) == len(set(names)) == 48


@pytest.mark.parametrize("key", ["init_hash", "order_hash", "samples_hash"])
def test_what_is_not_paired_stops_the_study(study, key):
    toy = study(flags={"unpaired": key}, **TWO_ARMS)
    with pytest.raises(StudyError, match=rf"the runs are not paired: the arms of seed 0 differ in {key}"):
        run(toy)
    assert len(started(toy)) == 2  # and not after all final runs
    write_report(toy)
    assert f"**Not paired:** seed 0: the arms differ in {key}" in (toy.folder / "report.md").read_text()


def test_what_is_not_paired_stops_the_tuning(study):
    toy = study(arms={"relu": ["relu"], "gem": ["gem unpaired=init_hash"]})
    with pytest.raises(StudyError, match="the runs are not paired: the arms of seed 100 differ in init_hash"):
        run(toy)
    assert started(toy)[-1] == "gem-unpaired-init_hash-lr0.005-seed100"  # the first run of the second arm


def test_records_of_other_code_are_not_mixed_in(study):
    toy = study()
    run(toy)
    path = toy.folder / "records" / "silu-lr0.01-seed7.json"
    record = json.loads(path.read_text())
    record["sessions"][0]["commit"] = "another"
    path.write_text(json.dumps(record))
    with pytest.raises(
        StudyError, match=r"commit: None in gem-.* and \d+ more, another in silu-lr0.01-seed7\. .*--allow_mixed"
    ):
        run(study())
    run(toy, allow_mixed=True)
    write_report(study())
    assert "**Mixed:** commit: None in" in (toy.folder / "report.md").read_text()


def test_records_of_other_settings_of_the_launcher_are_not_mixed_in(study):
    """Arms of which one was compiled by the launcher differ in more than the activation."""
    toy = study()
    run(toy)
    records = {path: json.loads(path.read_text()) for path in (toy.folder / "records").glob("*-lr*.json")}
    chosen = [{"compiled by": "none", "distributed": "NO"}, {"compiled by": "backend=INDUCTOR", "distributed": "NO"}]
    for place, (path, record) in enumerate(records.items()):
        record["sessions"][0]["launcher"] = chosen[place == 0]
        path.write_text(json.dumps(record))
    with pytest.raises(StudyError, match=r"launcher, compiled by: (backend=INDUCTOR in|none in .*, backend=INDUCTOR)"):
        run(study())


def test_code_that_differs_is_refused_before_it_runs(study, monkeypatch):
    toy = study()
    run(toy)
    (toy.folder / "records" / "silu-lr0.01-seed7.json").unlink()
    here = environment(recipes_of(toy))
    monkeypatch.setattr(driver_module, "environment", lambda folder: here | {"commit": "another"})
    count = len(started(toy))
    with pytest.raises(StudyError, match="another in this process"):
        run(toy)
    assert len(started(toy)) == count


def test_a_recipe_that_is_none(study):
    with pytest.raises(PlanError, match=r"no recipe 'top'\. It has toy\."):
        run(study(recipe="top"))


def test_a_run_that_outlives_its_driver_is_waited_for(study):
    toy = study(**TWO_ARMS, final_seeds=[0, 1])
    folder = toy.folder / "runs" / toy.missing()[0].name
    folder.mkdir()
    orphan = FileLock(folder / ".lock", thread_local=False)  # which it has until it has saved
    orphan.acquire()
    driver = threading.Thread(target=run, args=[toy])
    driver.start()
    until(lambda: len(toy.missing()) == 1)
    assert folder.name not in started(toy)
    orphan.release()
    driver.join()
    assert not toy.missing()


def test_a_metric_that_the_recipe_does_not_have_is_told_at_the_first_run(study):
    toy = study(metric="validation_accuracy")
    with pytest.raises(PlanError, match=r"toy has no validation_accuracy\. It has validation_loss"):
        run(toy)
    assert len(started(toy)) == 1


def test_flags_are_words_that_recipes_take(study):
    toy = study(flags={"mixed_precision": False, "own_gain": True}, tuning_flags={"data": "held-out"})
    driver = Driver(toy, recipes_of(toy))
    command = driver.command(Run("relu", 1e-5, 3))
    assert {"--mixed_precision=no", "--own_gain=yes", "--learning_rate=1e-05"} <= set(command)
    assert {"--report_to=none", "--project=toy"} <= set(command)  # one view of all runs, where a plan asks for one
    assert "--data=held-out" not in command
    assert "--data=held-out" in driver.command(Run("relu", 1e-5, 100))


class MadeUp:
    """Commands that end when a test says so.

    Args:
        happens: Called each time the driver waits, with what is under way, by the names of the runs.
    """

    class Child(Ended):
        """One that has not ended; asked to stop, it takes its time."""

        def __init__(self):
            super().__init__(None)
            self.asked = 0

        def terminate(self):
            self.asked += 1

    def __init__(self, happens):
        self.happens, self.children, self.waits = happens, {}, 0

    def start(self, command, log, env):
        self.children[log.stem] = self.Child()
        return self.children[log.stem]

    def wait(self, children, seconds):
        self.waits += 1
        under_way = {name: child for name, child in self.children.items() if child.exitcode is None}
        assert list(under_way.values()) == list(children)
        self.happens(under_way)


def record_of(study, name, status="finished"):
    """What a run leaves."""
    seed = name.rpartition("-seed")[2]
    folder = study.folder / "runs" / name
    folder.mkdir(exist_ok=True)
    session = environment(recipes_of(study)) | {"seconds": 3.0}
    hashes = dict.fromkeys(("init_hash", "order_hash", "samples_hash"), seed)
    record = {"status": status, "result": {"validation_loss": 3.0}, "sessions": [session], "data": {"hash": ""}}
    record |= {"config": {}, "curves": {}}
    (folder / "record.json").write_text(json.dumps(record | hashes))


def test_a_run_that_failed_is_told_while_others_are_waited_for(study, capsys):
    toy = study(**TWO_ARMS)

    def happens(under_way):
        if len(under_way) == 2:
            under_way["relu-lr0.01-seed0"].exitcode = 1
        else:
            assert "Waiting for the other active runs to finish" in capsys.readouterr().err
            record_of(toy, "gem-lr0.01-seed0")
            under_way["gem-lr0.01-seed0"].exitcode = 0

    made_up = MadeUp(happens)
    with pytest.raises(
        StudyError, match=r"the run relu-lr0.01-seed0 exited with status 1: it printed nothing\. Its output"
    ):
        Driver(toy, recipes_of(toy), jobs=2, executor=made_up).run()
    assert [child.asked for child in made_up.children.values()] == [0, 0]
    assert toy.record(Run("gem", 0.01, 0))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_runs_and_waits_until_they_have_saved(study, number):
    toy = study(**TWO_ARMS)

    def happens(under_way):
        if made_up.waits == 3:
            signal.raise_signal(number)
        if made_up.waits > 5:
            assert [child.asked for child in under_way.values()] == [1] * len(under_way)
            next(iter(under_way.values())).exitcode = 128 + number

    made_up = MadeUp(happens)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="stopped; run the same command again to continue") as error:
        Driver(toy, recipes_of(toy), jobs=2, executor=made_up).run()
    assert error.value.exit_code == 128 + number
    assert (len(made_up.children), made_up.waits) == (2, 7)
    assert signal.getsignal(number) is before
    run(toy)  # nothing is locked
    assert not toy.missing()


def test_a_run_that_somebody_else_has_stopped_stops_the_study(study):
    toy = study(**TWO_ARMS)

    def happens(under_way):
        (child,) = under_way.values()
        child.exitcode = -signal.SIGTERM

    with pytest.raises(Interrupted, match=r"relu-lr0\.01-seed0 was stopped; run the same command again to continue"):
        Driver(toy, recipes_of(toy), executor=MadeUp(happens)).run()


def test_a_signal_that_reaches_a_run_first_is_no_failure(study, monkeypatch):
    """As one to the whole group may: the process from which runs are forked has ended before this one knows."""
    toy = study(**TWO_ARMS)

    class Broken(MadeUp):
        def start(self, command, log, env):
            threading.Timer(0.01, signal.pthread_kill, [threading.main_thread().ident, signal.SIGTERM]).start()
            raise EOFError

    with pytest.raises(Interrupted):
        Driver(toy, recipes_of(toy), executor=Broken(None)).run()
    monkeypatch.setattr(Broken, "start", mock.Mock(side_effect=EOFError("no process")))
    with pytest.raises(EOFError, match="no process"):
        Driver(toy, recipes_of(toy), executor=Broken(None)).run()
    run(toy)


def test_a_signal_within_the_progress_bar_leaves_its_lock_free(study, monkeypatch):
    toy = study(**TWO_ARMS)
    display, held = tqdm.display, []

    def signalled(self, *arguments, **more):
        if self.n >= 2 and not held:
            assert not another_thread_can_draw()
            held.append(True)
            signal.raise_signal(signal.SIGINT)
        return display(self, *arguments, **more)

    monkeypatch.setattr(tqdm, "display", signalled)
    monkeypatch.setattr(tqdm, "monitor_interval", 0)
    monkeypatch.setattr(progress, "bar_width", lambda: 100)
    with pytest.raises(Interrupted):
        Driver(toy, recipes_of(toy), executor=InThisProcess()).run()
    assert held
    assert another_thread_can_draw()


def another_thread_can_draw():
    found, lock = [], tqdm.get_lock().th_lock

    def look():
        found.append(lock.acquire(blocking=False))
        if found[0]:
            lock.release()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found[0]
