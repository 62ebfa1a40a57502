"""The papers' claims: all are listed, their runs are valid at each scale and shared, and mistakes get one line."""

import numpy as np
import pytest
from scipy import stats

from experiments import claims, exits
from experiments.claims import CLAIMS, SCALES
from experiments.paper import __main__ as paper
from experiments.paper import finished
from experiments.sweep import command, study
from switchmoe.data import pairs, tasks, vocabulary
from switchmoe.parallel import sharding
from switchmoe.runs import kinds, task_data
from switchmoe.settings import DataSettings, TaskSettings
from switchmoe.training import optimizers

LISTED = {
    "table1", "table2", "table3", "table4", "table6", "table7", "table8", "table10", "table11", "figure1", "figure4",
    "figure5", "figure6", "figure7", "figure9", "figure12", "dropped_tokens", "alpha", "no_token_left_behind", "z_loss", "routed_law", "dropless",
    "stability", "eval_capacity", "frozen_subsets", "dropped_fine_tuning", "twins", "upcycling", "effective_speed_up",
    "flan_settings", "flan_ablation",
}  # fmt: skip


@pytest.fixture
def here(monkeypatch, one_device):
    """The survey in this very process, of one device."""
    monkeypatch.setattr(command, "_apart", lambda function, *arguments: function(*arguments))


def whole(scale, workdir="runs/none", *more):
    """The sweep of all claims."""
    return study.read(["paper", f"--config={SCALES[scale].config}", f"--workdir={workdir}", *more], "A doc.")


def test_all_claims_of_the_papers_are_listed_and_those_that_wait_say_for_what(capsys):
    assert set(CLAIMS) == LISTED
    assert paper.main(["paper", "--list"]) == 0
    out = capsys.readouterr().out
    for name, claim in CLAIMS.items():
        assert f"{name} " in out and claim.says in out and claim.not_run in out
    assert out.count("no matter of training runs: ") == 1


def test_a_claim_has_runs_and_a_criterion_or_a_reason():
    for claim in CLAIMS.values():
        assert not claim.not_run or not any(claims.why_not(claim, scale) == "" for scale in SCALES)
        for name, scale in SCALES.items():
            arms, checks = claim.arms(scale), claim.checks(scale)
            assert bool(arms) == bool(checks) == (not claim.not_run), claim.name
            assert (claim in claims.tried(name)) == (not claims.why_not(claim, name))
            assert {arm for check in checks for arm in check.arms} <= set(arms), claim.name
            assert claim.not_run or claim.expected


@pytest.mark.parametrize("scale", SCALES)
def test_runs_are_valid_and_named_apart(scale):
    found = whole(scale)
    assert len({run.name for run in found.runs}) == len(found.runs) > (12 if SCALES[scale].mixture else 60)
    for settings in {run.settings for run in found.runs if run.settings.train.seed == 0}:
        sharding.check(settings, kinds.of(settings).lengths(settings), dict.fromkeys(sharding.AXES, 1))


@pytest.mark.parametrize("scale", SCALES)
def test_arms_of_equal_settings_are_one_run(scale):
    """Whatever names them: of two runs of the sweep no two have the same settings, and the tables share the plain Switch model."""
    found = whole(scale)
    assert len({run.settings for run in found.runs}) == len(found.runs)
    plain = {"moe.num_experts": SCALES[scale].experts, "train.seed": 0}
    for name in ("table11", "alpha", "z_loss", "eval_capacity", "twins"):
        assert plain in claims.runs(CLAIMS[name], scale), name


@pytest.mark.parametrize("scale", SCALES)
def test_every_run_learns_until_its_last_step(scale):
    """No rate is 0, though `init.optimizer` begins at the place in the schedule at which the run before it ended."""
    found = whole(scale)
    steps = {run.name: run.settings.train.num_steps for run in found.whole}
    for run in found.runs:
        settings = run.settings
        begun = steps[run.parents["init.checkpoint"]] if settings.init.optimizer else 0
        rate = optimizers.schedule(settings.optimizer, settings.train.num_steps)
        assert rate(begun) > 0 and rate(begun + settings.train.num_steps - 1) > 0, run.name


@pytest.fixture(scope="module")
def packaged():
    """The packaged texts, of which 400 pieces and 16,000 are as long as those of the scales' own vocabularies."""
    topics = tasks.find(TaskSettings(names="topic"), DataSettings())[0]
    return [example.inputs for example in topics.examples("train")]


@pytest.mark.parametrize("scale, texts", [("tiny", 1500), ("small", 7000)])
def test_what_fine_tuned_models_read_and_write_is_whole(scale, texts, packaged):
    """Of each task that a claim's runs learn or are judged by, but few examples are cut; a solved one before them counts, too."""
    found, cut = whole(scale), {}
    file = vocabulary.train(packaged[:texts], found.base.data.vocab_size)
    pieces = vocabulary.Vocabulary.from_bytes(file, scale)
    tuned = (run.settings for run in found.runs if run.settings.task.names)
    for settings in {(one.task, one.data): one for one in tuned}.values():
        encoder = pairs.Encoder(settings.data, settings.stacks, pieces)
        for task in task_data.find_tasks(settings)[1]:
            examples = pairs.spread(task.examples("validation"), 100)
            shares = np.mean([encoder.is_cut(example) for example in examples], axis=0)
            cut[task.name, settings.data.input_length] = float(shares.max())
    assert len(cut) > 25 and {key: share for key, share in cut.items() if share > 0.05} == {}


@pytest.mark.parametrize("scale", ["tiny", "laptop"])
def test_fine_tuning_of_few_steps_may_move_the_parameters(scale):
    """Adafactor's rate is a share of a parameter's size: 300 steps of 1e-3 are 0.3 of it, where pre-training has 15."""
    runs = [run.settings for run in whole(scale).runs if run.settings.train.seed != claims.RATES_SEED]
    tuned = [settings for settings in runs if settings.task.names]
    assert tuned and all(one.optimizer.learning_rate * one.train.num_steps >= 1 for one in tuned)


def test_what_counts_as_no_difference_in_fine_tuning_is_small_against_a_guess():
    """A guess by the classes' shares costs their entropy, in nats for each of the some 13 pieces of a class's name."""
    examples = tasks.find(TaskSettings(names="topic"), DataSettings())[0].examples("train")
    counts = np.unique([example.targets for example in examples], return_counts=True)[1]
    a_token = stats.entropy(counts) / 13
    for name in ("frozen_subsets", "dropped_fine_tuning"):
        arms, checks = CLAIMS[name].arms(SCALES["tiny"]), CLAIMS[name].checks(SCALES["tiny"])
        assert set(arms) == {arm for check in checks for arm in check.arms}, "every arm is in a check"
        assert all(check.below < a_token / 10 for check in checks if "within" in check.says)


@pytest.mark.parametrize("scale", [name for name in SCALES if not SCALES[name].mixture])
def test_the_student_of_table_8_differs_from_the_dense_model_by_its_teacher_alone(scale):
    """Both begin with the dense pre-trained weights: none of the student's are random, whatever blocks are sparse."""
    arms = CLAIMS["table8"].arms(SCALES[scale])
    alone, student = (claims.run_of(arms[name], 0, scale) for name in ("T5", "distilled"))
    assert "init.checkpoint" in student and student["distill.init"] is False
    assert {field for field in student if student[field] != alone.get(field)} == {
        "distill.teacher",
        "distill.init",
    }


def test_a_dense_run_does_not_depend_on_what_routers_do():
    assert claims.run_of({"moe.num_experts": 1, "moe.capacity_factor": 9.0}, 2, "tiny") == {
        "moe.num_experts": 1,
        "train.seed": 2,
    }


def test_a_run_that_is_done_is_kept_while_others_are_made(tmp_path, monkeypatch):
    """What hinders it then is no end of the sweep; in the end it is told."""
    wrong, kept = [OSError("full"), None, None], []

    def update(*arguments):
        if error := wrong.pop(0):
            raise error
        kept.append(arguments)

    def sweep(argv, doc, only, each):
        each()
        each()
        return 0

    monkeypatch.setattr(finished, "update", update)
    monkeypatch.setattr(command, "command", sweep)
    asked = paper.parse(["z_loss", f"--workdir={tmp_path / 'out'}", f"--kept={tmp_path / 'kept.jsonl'}"])
    assert paper._make(asked, [{}]) == (0, True)
    assert kept == [(tmp_path / "kept.jsonl", tmp_path / "out", "tiny")] * 2, (
        "at the second run, and in the end"
    )
    wrong[:] = [None, None, OSError("full")]
    with pytest.raises(OSError, match="full"):
        paper._make(asked, [{}])
    kept.clear()
    assert paper._make(asked._replace(rest=["--dry_run"]), [{}]) == (0, False) and not kept


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no claim; accepted are --list, all, power, rates, times, report, page, or names"),
        (["table5"], "table5: no such claim; accepted are all, power, rates, times, report, page, table1"),
        (["power", "table3"], "table3: accepted after power are options alone"),
        (["page", "--results=no"], "--results=no: no paper_SCALE/runs.jsonl; accepted is"),
        (["page", "--dry_run"], "--dry_run: accepted with page are --results="),
        (["times", "alpha"], "alpha: nothing about time; accepted are claims about it, or no name"),
        (["times", "--repeats=2"], "--repeats=2: accepted is an integer >= 3, with times"),
        (["figure7"], "figure7: tried at another scale: languages; accepted are all"),
        (["z_loss", "--scale=languages"], "z_loss: tried at another scale: tiny, laptop, small, base; accepted are all"),
        (["figure9"], "figure9: no matter of training runs: `pytest"),
        (["table3", "--scale=huge"], "--scale=huge: accepted is one of tiny, laptop, languages, small, base"),
        (["table3", "--config=configs/quickstart.py"], "the scale has its config; accepted is --scale="),
        (["table3", "--config.moe.num_expert=4"], "did you mean num_experts?"),
        (["table3", "--config.data.batch_size=-1"], "data.batch_size=-1"),
        (["table3", "--config.train.seed=4"], "accepted are fields that the sweep does not vary"),
        (["table3", "--dryrun"], "argument --dryrun (did you mean --dry_run?): accepted are"),
        (["report", "--config.train.num_steps=4"], "accepted with report are --scale=, --workdir=, --kept="),
        (["report", "--results=x"], "--results=x: accepted with report are --scale=, --workdir=, --kept="),
        (["table3", "--repeats=4"], "--repeats=4: accepted with claims are --scale=, --workdir=, --kept="),
        (["times", "--dry_run"], "--dry_run: accepted with times are --scale=, --workdir=, --kept=, --repeats="),
        (["page", "--kept=x"], "--kept=x: accepted with page are --results="),
        (["report"], "no runs; accepted is a directory of this command's"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("here")
def test_mistakes_get_one_line(tmp_path, capsys, arguments, message):
    where = [] if "page" in arguments else [f"--workdir={tmp_path / 'out'}"]
    assert paper.main(["paper", *arguments, *where]) == exits.EXIT_BAD_INPUT
    err = capsys.readouterr().err
    assert err.startswith("experiments.paper: ") and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()
