"""A run that was stopped and goes on gives the same bits and the same rows as one that was not."""

import signal
from functools import partial

import pytest

from lorica.config import TrainSettings
from lorica.errors import CheckpointError, ConfigError, Interrupted
from lorica.records.read import read_manifest
from lorica.train import evaluations, loop
from train import runs
from train.runs import SETTINGS, outcome, rows, stop_after
from train.words import examples

run = partial(runs.run, seed=6)  # it has what the first test asks for


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    report = run(folder)
    return folder, report


def test_the_run_has_what_a_resumption_could_lose(whole):
    """Else the tests below would prove little: a best that is not the last, evaluations without
    gain, an adapter that ends before the other."""
    _, report = whole
    assert any(report.best_step[n] < report.steps[n] for n in ("a", "b"))
    assert report.steps == {"a": 10, "b": 8}
    assert all(report.stopped.values())
    assert len(rows(whole[0])) == 12


@pytest.mark.parametrize("step", range(1, 11))
def test_stopped_after_any_step(whole, tmp_path, monkeypatch, step):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(Interrupted) as caught:
            run(folder)
    assert caught.value.exit_code == 130
    assert read_manifest(folder / "run.json")["status"] == "interrupted"
    assert (folder / f"checkpoints/step-{step:08d}").is_dir()
    run(folder, resume=True)
    files, counters, lines = outcome(folder)
    assert (files, lines) == outcome(whole[0])[::2]
    if step < whole[1].steps["a"]:  # else the checkpoint is of before the last evaluation
        assert counters == outcome(whole[0])[1]
    assert read_manifest(folder / "run.json")["status"] == "finished"


def test_stopped_in_every_other_step(whole, tmp_path, monkeypatch):
    folder, resume = tmp_path / "run", False
    for step in range(1, max(whole[1].steps.values()), 2):
        with monkeypatch.context() as patch:
            stop_after(patch, step, signal.SIGTERM)
            with pytest.raises(Interrupted) as caught:
                run(folder, resume=resume)
        assert caught.value.exit_code == 143
        resume = True
    run(folder, resume=True)
    assert outcome(folder) == outcome(whole[0])


@pytest.mark.parametrize("batch", range(1, 5))
def test_stopped_in_the_middle_of_an_evaluation(whole, tmp_path, monkeypatch, batch):
    """A stop does not wait for the evaluation: it is made again on resumption, its row once."""
    folder, calls = tmp_path / "run", []

    def interrupting(original):
        def interrupted(*arguments, between, **how):
            def counted():
                calls.append(None)
                if len(calls) == batch:
                    signal.raise_signal(signal.SIGINT)
                between()

            return original(*arguments, between=counted, **how)

        return interrupted

    with monkeypatch.context() as patch:
        for name in ("mean_loss", "losses_of"):  # of one adapter, of several
            patch.setattr(evaluations, name, interrupting(getattr(evaluations, name)))
        with pytest.raises(Interrupted):
            run(folder)
    assert len(calls) == batch
    run(folder, resume=True)
    assert outcome(folder) == outcome(whole[0])


def test_dropout_of_the_base_goes_on_too(tmp_path, monkeypatch):
    run(tmp_path / "whole", architecture="gpt2", max_steps=4)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            run(tmp_path / "run", architecture="gpt2", max_steps=4)
    run(tmp_path / "run", architecture="gpt2", max_steps=4, resume=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_finished_run_goes_on_to_the_same_end(whole, tmp_path):
    folder = tmp_path / "run"
    run(folder, max_steps=4)
    before = outcome(folder)
    report = run(folder, max_steps=4, resume=True)
    assert outcome(folder) == before
    assert report.steps == {"a": 4, "b": 4}
    assert all(loss > 0 for loss in report.loss.values())
    assert report.seconds > 0


def test_a_run_that_ended_early_does_not_go_on_training(tmp_path):
    changes = {"learning_rate": 0.9, "early_stopping_patience": 1, "eval_steps": 1, "max_steps": 9}
    first = run(tmp_path / "run", **changes)
    assert all(first.stopped.values())
    again = run(tmp_path / "run", resume=True, **changes)
    assert again.steps == first.steps
    assert again.stopped == first.stopped
    assert again.eval_loss == first.eval_loss


def test_without_a_checkpoint_it_starts_from_the_beginning(tmp_path, monkeypatch):
    def broken(self, trainees, work):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Engine, "step", broken)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", max_steps=4)
    assert read_manifest(tmp_path / "run/run.json")["status"] == "interrupted"
    run(tmp_path / "run", max_steps=4, resume=True)
    run(tmp_path / "whole", max_steps=4)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_where_there_is_no_run_nothing_goes_on(tmp_path):
    with pytest.raises(ConfigError, match="no run to go on with"):
        run(tmp_path / "none", resume=True)


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interrupted):
            run(tmp_path / "run")
    return tmp_path / "run"


def test_another_run_is_refused_with_every_difference(stopped):
    with pytest.raises(CheckpointError) as caught:
        run(
            stopped,
            resume=True,
            learning_rate=1e-3,
            batch_size=2,
            data={"a": examples(1, 18), "b": examples(2, 11)},
        )
    told = str(caught.value)
    assert "settings.learning_rate: the checkpoint has 0.03, this run 0.001" in told
    assert "records per step of a: the checkpoint has 6, this run 4" in told
    assert "data of a: the checkpoint has 17 examples" in told
    assert "data of b" not in told
    assert "seed" not in told


def test_another_base_is_refused(stopped):
    with pytest.raises(CheckpointError, match="base: the checkpoint has"):
        run(stopped, resume=True, architecture="qwen3")


@pytest.mark.parametrize("edit", ["reorder", "token", "append", "duplicate"])
def test_other_records_are_refused(stopped, edit):
    own = examples(1, 17)
    if edit == "reorder":
        own[3], own[4] = own[4], own[3]
    elif edit == "token":
        own[7].input_ids[0] += 1
    elif edit == "append":
        own.append(own[0])
    else:
        own[1] = own[0]
    with pytest.raises(CheckpointError, match="data of a"):
        run(stopped, resume=True, data={"a": own, "b": examples(2, 11)})


def test_what_is_only_written_may_change(stopped, whole):
    run(stopped, resume=True, logging_steps=1, save_steps=1, save_total_limit=5)
    assert (
        outcome(stopped)[0].items()
        >= {k: v for k, v in outcome(whole[0])[0].items() if k.startswith("adapters/")}.items()
    )
    assert len(list(stopped.glob("checkpoints/step-*"))) == 5


def test_every_setting_has_a_class():
    """A new setting is part of the identity unless somebody decides otherwise here."""
    assert loop.identity.__globals__["COSMETIC"] == {
        "logging_steps",
        "save_steps",
        "save_total_limit",
    }
    assert SETTINGS.keys() <= TrainSettings.model_fields.keys()


@pytest.mark.parametrize("damage", ["delete", "cut", "flip", "manifest"])
def test_a_damaged_checkpoint_is_set_aside_and_the_older_one_used(stopped, whole, damage):
    newest = max(stopped.glob("checkpoints/step-*"))
    assert newest.name == "step-00000005"
    victim = newest / "MANIFEST.json" if damage == "manifest" else newest / "best/b.safetensors"
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 4
    if damage == "delete":
        victim.unlink()
    else:
        victim.write_bytes(raw[:-1] if damage == "cut" else raw)
    run(stopped, resume=True)
    assert outcome(stopped) == outcome(whole[0])
    events = (stopped / "events.jsonl").read_text()
    assert "step-00000005 is damaged" in events
    assert "going on from step 4" in events
    assert len(list(stopped.glob("checkpoints/.bad-step-00000005-*"))) == 1


def test_another_number_of_threads_is_told(stopped, monkeypatch):
    own = loop.circumstances
    other = {"number of threads": "7"}
    monkeypatch.setattr(loop, "circumstances", lambda *of: {**own(*of), **other})
    run(stopped, resume=True)
    assert (
        "another number of threads (1 before, 7 now): the result will not be"
        in (stopped / "events.jsonl").read_text()
    )
