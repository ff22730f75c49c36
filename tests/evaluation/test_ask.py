"""An evaluation: every configuration asked once, resumed, compared, written down."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trio_deploy import (
    Pipeline,
    Request,
    RuntimeOptions,
    Schedule,
    TrioError,
    evaluate,
    export_model,
)
from trio_deploy.checkpoint.resolve import load_recipe
from trio_deploy.checkpoint.safetensors import Checkpoint
from trio_deploy.cli import eval as eval_command
from trio_deploy.cli.main import main, parser
from trio_deploy.config.recipe import recipe_folder
from trio_deploy.evaluation import configurations
from trio_deploy.evaluation import evaluate as evaluation
from trio_deploy.evaluation.ask import Answer, AnswerLog, AskOptions, Measured, checksums
from trio_deploy.evaluation.configurations import (
    Bundles,
    Configuration,
    Source,
    as_exported,
    blind,
    grid,
    named,
    unpruned,
    used,
)
from trio_deploy.evaluation.questions import Question, scene_questions
from trio_deploy.evaluation.results import Results, collect
from trio_deploy.evaluation.scorers import pope
from trio_deploy.report.charts import retention_chart

ONE_THREAD = RuntimeOptions(threads=1)


@pytest.fixture(scope="module")
def source() -> Source:
    return Source.open("tiny")


@pytest.fixture(scope="module")
def questions():
    return scene_questions(2, split="tuning", each=6)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def results(source, questions, out) -> Results:
    mixed = named(source, "mixed=0:44:divprune,6:19")
    others, _ = grid(source, ["divprune@0"], [mixed.budget])
    return run(source, questions, [mixed, *others, blind(source)], out)


def run(source, questions, configurations, out, **more) -> Results:
    asking = {key: more.pop(key) for key in ("runtime", "dtype", "batch") if key in more}
    options = AskOptions(**{"runtime": ONE_THREAD, **asking}, max_new_tokens=8, progress=False)
    return evaluate(source, questions, configurations, out, options, **{"data": "scenes", **more})


def asked(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Requests that reach a pipeline from now on."""
    seen: list[Request] = []
    generate = Pipeline.generate_batch

    def recording(self, requests):
        seen.extend(requests)
        return generate(self, requests)

    monkeypatch.setattr(Pipeline, "generate_batch", recording)
    return seen


def test_results_are_those_of_the_pipeline(results, questions, source, tmp_path):
    mixed = next(one for one in results.results if one.name == "mixed")
    bundle = export_model("tiny", tmp_path / "b", schedule=mixed.schedule, progress=False)
    answers = Pipeline.open(bundle, threads=1).generate_batch(
        [Request(q.prompt, list(q.images), max_new_tokens=8) for q in questions]
    )
    right = [a.text.strip() == q.reference for a, q in zip(answers, questions, strict=True)]
    assert mixed.overall.accuracy.value == pytest.approx(np.mean(right))
    assert sum(kind.questions for kind in mixed.kinds.values()) == len(questions)


def test_the_unpruned_model_is_what_everything_is_compared_with(results):
    whole, mixed, other, without = results.results
    assert (whole.name, whole.share, whole.agreement.value) == ("unpruned", 1.0, 1.0)
    assert whole.overall.kl == pytest.approx(0, abs=1e-4)
    assert whole.overall.retention.value == 1.0
    assert mixed.behind is None and other.behind is not None  # the first of its budget
    assert (mixed.against, other.against, without.against) == (None, "mixed", None)
    assert other.behind.value == pytest.approx(
        mixed.overall.retention.value - other.overall.retention.value
    )
    assert 0.1 < mixed.share < 0.112 and mixed.overall.kl < without.overall.kl
    assert without.overall.accuracy.value < 0.7  # it cannot see


def test_a_rerun_asks_nothing_and_finds_the_same(results, source, questions, out, monkeypatch):
    seen = asked(monkeypatch)
    configurations = [named(source, "mixed=0:44:divprune,6:19")]
    again = run(source, questions, configurations, out)
    assert seen == [] and again.results[1] == results.results[1]


def test_more_questions_are_added_to_what_was_asked(results, source, questions, out, monkeypatch):
    seen = asked(monkeypatch)
    more = [*questions, *scene_questions(1, split="tuning", each=6, first=10_002)]
    run(source, more, [named(source, "mixed=0:44:divprune,6:19")], out)
    assert len(seen) == 2 * 6  # the new scene's, by the unpruned model and by the mixed one


def test_an_answer_to_another_question_is_not_taken(results, source, questions, out, monkeypatch):
    seen = asked(monkeypatch)
    changed = scene_questions(1, split="tuning", each=6)
    changed[0] = type(changed[0])(**{**changed[0].__dict__, "prompt": "how many stars are there?"})
    run(source, changed, [], out)
    assert [request.prompt for request in seen] == ["how many stars are there?"]


def test_an_answer_to_another_picture_is_not_taken(tmp_path, source, monkeypatch):
    seen = asked(monkeypatch)
    picture = tmp_path / "x.png"
    scenes = [scene_questions(1, split="tuning", each=4, first=n) for n in (10_003, 10_004)]
    found = [Question("1", "how many stars are there?", (picture,), "x.png", "image")]

    def ask(number: int) -> int:
        scenes[number][0].images[0].save(picture)
        before = len(seen)
        run(source, found, [named(source, "0:44:divprune,6:19")], tmp_path / "out")
        return len(seen) - before

    assert [ask(0), ask(0), ask(1), ask(1)] == [2, 0, 2, 0]


def test_a_picture_that_is_gone_is_named(tmp_path):
    asked_of = Question("1", "?", (tmp_path / "gone.png",), "gone.png", "image")
    with pytest.raises(TrioError, match=r"the picture .*gone\.png cannot be read \(No such file"):
        checksums([asked_of])


def test_an_answer_of_other_weights_is_not_taken_nor_a_bundle_of_them(tmp_path, monkeypatch):
    folder = shutil.copytree(load_recipe("tiny").checkpoint, tmp_path / "model")
    questions = scene_questions(1, split="tuning", each=4)
    seen = asked(monkeypatch)

    def ask() -> list[str]:
        del seen[:]
        opened = Source.open(folder)
        run(opened, questions, [named(opened, "0:44:divprune,6:19")], tmp_path / "out")
        return [request.prompt for request in seen]

    assert len(ask()) == 8 and ask() == []
    weights = folder / "model.safetensors"
    before = weights.read_bytes()
    weights.unlink()  # bundles may be linked to it
    weights.write_bytes(before[: len(before) // 2] + bytes(len(before) - len(before) // 2))
    assert len(ask()) == 8
    assert len(list((tmp_path / "out" / "bundles").iterdir())) == 4
    weights.unlink()
    weights.write_bytes(before)
    assert ask() == []


def test_a_model_is_known_by_its_content_wherever_it_lies(tmp_path, monkeypatch):
    folder = shutil.copytree(load_recipe("tiny").checkpoint, tmp_path / "a")
    moved = shutil.copytree(folder, tmp_path / "b")
    weights = folder / "model.safetensors"
    by_size = sorted(
        Checkpoint.from_path(folder).tensors.values(), key=lambda tensor: tensor.nbytes
    )
    for limit in (configurations._READ_WHOLE, 0):  # read as a whole, and by samples
        monkeypatch.setattr(configurations, "_READ_WHOLE", limit)
        known = Source.open(folder).fingerprint
        assert Source.open(moved).fingerprint == known
        for tensor in (by_size[0], by_size[-1]):
            with weights.open("r+b") as stream:
                stream.seek(tensor.offset)
                first = stream.read(1)
                stream.seek(tensor.offset)
                stream.write(bytes([first[0] ^ 1]))
            assert Source.open(folder).fingerprint != known
            with weights.open("r+b") as stream:
                stream.seek(tensor.offset)
                stream.write(first)
        assert Source.open(folder).fingerprint == known
    (folder / "tokenizer.json").write_text("{}")
    assert configurations.fingerprint(folder.iterdir()) != configurations.fingerprint(
        moved.iterdir()
    )
    bundle = export_model("tiny", tmp_path / "bundle", schedule="0:0.2", progress=False)
    shutil.copytree(bundle.path, tmp_path / "copy")
    assert (
        Source.open(bundle.path).fingerprint == Source.open(tmp_path / "copy").fingerprint != known
    )


def test_a_recipe_is_known_by_its_content_wherever_it_lies(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(recipe_folder() / "tiny.yaml", tmp_path / name / "tiny.yaml")
    known = Source.open("tiny").fingerprint
    assert Source.open(str(tmp_path / "a" / "tiny.yaml")).fingerprint == known
    file = tmp_path / "b" / "tiny.yaml"
    text = file.read_text(encoding="utf-8").replace("threshold: 0.8", "threshold: 0.7")
    file.write_text(text, encoding="utf-8")
    assert Source.open(str(file)).fingerprint != known


def test_engines_of_a_bundle_are_found_by_their_target_without_its_file(tmp_path):
    path = export_model("tiny", tmp_path / "bundle", schedule="0:0.2", progress=False).path
    (path / "engines" / "mine").mkdir(parents=True)
    opened = Source.open(path)

    def identity(target: str | None) -> str:
        bundles = Bundles(opened, tmp_path, RuntimeOptions(target=target))
        return bundles.identity(unpruned(opened))

    assert identity("mine") != identity(None) == identity("cpu")
    with pytest.raises(TrioError, match="no target called 'other'"):
        identity("other")


def test_what_answers_is_named_by_model_target_runtime_and_schedule(source, tmp_path):
    one = named(source, "0:44:divprune,6:19")

    def identity(
        model: Source = source, what: Configuration = one, dtype: str | None = None, **options: str
    ) -> str:
        return Bundles(model, tmp_path, RuntimeOptions(**options), dtype).identity(what)

    target = tmp_path / "mine.yaml"
    text = (Path(__file__).parents[2] / "engines" / "cpu.yaml").read_text(encoding="utf-8")
    target.write_text(text, encoding="utf-8")
    mine = identity(target=str(target))
    target.write_text(text.replace("float32", "float16"), encoding="utf-8")
    others = [
        identity(replace(source, fingerprint="another")),
        identity(what=named(source, "0:44:divprune,6:20")),
        identity(dtype="float16"),
        identity(runtime="openvino"),
        identity(runtime="openvino", precision="bfloat16"),
        identity(target="cpu-openvino"),
        mine,
        identity(target=str(target)),
    ]
    assert len({identity(), *others}) == 1 + len(others)


def test_a_line_that_was_cut_short_is_asked_again(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text('{"id": "a"}\n{"id": "b"}\n{"id": ', encoding="utf-8")
    log = AnswerLog(file)
    assert [entry["id"] for entry in log.entries] == ["a", "b"]
    with log:
        log.add({"id": "c"})
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == ["a", "b", "c"]


def test_results_are_written_read_and_drawn(results, out, tmp_path):
    assert Results.load(out / "results.json").model == "tiny"
    results.save(tmp_path)
    assert Results.load(tmp_path / "results.json") == results
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| mixed | 0:44:divprune, 6:19 |" in text and "| plate |" in text.replace(" | ", " | ")
    assert retention_chart(results).startswith("<svg")
    (tmp_path / "results.json").write_text('{"schema": 99}')
    with pytest.raises(TrioError, match="another version"):
        Results.load(tmp_path / "results.json")


def test_questions_without_answers_are_scored_by_agreement(source, questions, out, tmp_path):
    unlabelled = [type(q)(**{**q.__dict__, "reference": None}) for q in questions]
    found = run(source, unlabelled, [named(source, "mixed=0:44:divprune,6:19")], out)
    assert found.results[1].overall.accuracy is None and found.results[1].behind is None
    assert 0.5 < found.results[1].agreement.value <= 1
    assert "nan" not in retention_chart(found)
    assert "Agreement by kind" in found.to_text()


def test_questions_that_have_an_answer_are_scored_and_counted(source, questions, out):
    some = [
        type(q)(**{**q.__dict__, "reference": None}) if n % 3 == 0 else q
        for n, q in enumerate(questions)
    ]
    others = [named(source, "mixed=0:44:divprune,6:19"), named(source, "b=0:40:divprune,6:20")]
    found = run(source, some, others, out)
    known = [q for q in some if q.reference is not None]
    whole = run(source, known, others, out)
    assert found.scored == len(known) < found.questions
    for one, other in zip(found.results, whole.results, strict=True):
        assert one.overall.accuracy == other.overall.accuracy
        assert one.overall.retention == other.overall.retention
        assert (one.behind is None) == (other.behind is None)
        if one.behind is not None:
            assert one.behind.value == other.behind.value
    assert f"{len(known)} of them with an answer and scored by `exact`" in found.to_text()


def test_a_reference_that_does_not_fit_is_refused_before_anything_is_asked(
    source, questions, tmp_path, monkeypatch
):
    seen = asked(monkeypatch)
    wrong = [*questions[:-1], replace(questions[-1], reference=["yes"] * 9)]
    unlabelled = [replace(q, reference=None) for q in wrong[:-1]]
    with pytest.raises(TrioError, match=f"question {wrong[-1].id}: textvqa takes 10"):
        run(source, [*unlabelled, wrong[-1]], [], tmp_path / "out", scorer="textvqa")
    assert seen == [] and not (tmp_path / "out").exists()


def test_schedules_are_compared_with_the_first_within_half_a_point_of_budget(
    source, questions, out
):
    texts = ["a=0:44:divprune,6:19", "b=0:0.111:divprune", "c=0:0.222:divprune"]
    found = run(source, questions, [named(source, text) for text in texts], out)
    budgets = [one.budget for one in found.results[1:]]
    assert budgets[0] != budgets[1] and budgets == pytest.approx([0.111, 0.111, 0.222], abs=0.004)
    assert [one.against for one in found.results] == [None, None, "a", None]
    assert found.results[2].behind.value == pytest.approx(
        found.results[1].overall.retention.value - found.results[2].overall.retention.value
    )


def test_results_of_the_first_schema_lose_their_intervals(results, tmp_path):
    raw = {**results.to_json(), "schema": 1}
    del raw["scored"], raw["bundle"]
    for one in raw["results"]:
        del one["against"]
        one["extra"] = {"f1": 0.5}
        one["agreement"].update(low=1.0, high=1.0)
    (tmp_path / "old.json").write_text(json.dumps(raw))
    old = Results.load(tmp_path / "old.json")
    assert old.scored == old.questions and old.results[0].extra == {"all": {"f1": 0.5}}
    assert not any(one.agreement.known for one in old.results)
    assert [one.agreement.value for one in old.results] == [
        one.agreement.value for one in results.results
    ]


def test_pope_is_reported_by_category_and_over_all_seeds(source, tmp_path):
    asked_of = [("random", "yes"), ("random", "no"), ("popular", "yes"), ("popular", "no")]
    questions = [
        Question(str(n), "?", (), f"p{n}", kind, label) for n, (kind, label) in enumerate(asked_of)
    ]

    def measured(configuration: Configuration, *runs: str) -> Measured:
        return Measured(
            configuration,
            [[Answer(text, pope(text, q.reference), 0.0, True)
              for text, q in zip(run.split(), questions, strict=True)] for run in runs],
            0.0,
        )  # fmt: skip

    found = collect(
        source,
        questions,
        [
            measured(unpruned(source), "yes no yes no"),
            measured(named(source, "0:0.2:random"), "yes yes no no", "yes no no no"),
        ],
        data="",
        scorer="pope",
        machine={},
    )
    perfect, random = (one.extra for one in found.results)
    assert list(perfect) == ["popular", "random", "mean"] and perfect["mean"]["f1"] == 1
    assert random["random"]["f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert random["random"]["yes_ratio"] == pytest.approx((1 + 0.5) / 2)
    assert random["popular"]["f1"] == 0
    assert random["mean"]["f1"] == pytest.approx((2 / 3 + 1) / 4)
    assert "| 0:0.2:random | 20.0% | mean |" in found.to_text().replace("19.9%", "20.0%")


def test_a_model_that_is_never_right_is_scored_by_agreement(source, questions, out, tmp_path):
    wrong = [type(q)(**{**q.__dict__, "reference": "a unicorn"}) for q in questions]
    two = [named(source, "a=0:44:divprune,6:19"), named(source, "b=0:44:divprune,6:19")]
    found = run(source, wrong, two, out)
    for one in found.results:
        assert one.overall.accuracy.value == 0
        assert one.overall.retention is None and one.behind is None
    assert "nan" not in retention_chart(found)
    assert "nan" not in found.to_text().lower()


def test_a_bundle_is_measured_at_any_budget(tmp_path, questions):
    bundle = export_model("tiny", tmp_path / "b", schedule="0:0.2:divprune,6:0.1", progress=False)
    opened = Source.open(bundle.path)
    configurations, _ = grid(opened, [], [0.111, 0.5])
    found = run(opened, questions, configurations, tmp_path / "out")
    assert [one.budget for one in found.results] == [1.0, 0.111, 0.5]
    assert not (tmp_path / "out" / "bundles").exists()
    pipeline = Pipeline.open(bundle, threads=1)
    for one in found.results:
        assert one.schedule is not None
        answer = pipeline.generate(Request("?", list(questions[0].images), budget=one.budget))
        kept = one.schedule.resolve(answer.visual_tokens)
        assert list(kept) == answer.keep_counts[: len(kept)]
        assert one.share == one.schedule.average(256, 16) / 256
        assert f"| {one.schedule} |" in found.to_text()
    assert found.results[1].schedule.layers == (0, 6)
    reached, refused = grid(opened, [], [0.5, 2.0])
    assert [one.budget for one in reached] == [0.5]
    assert [sentence.split(" is left out")[0] for sentence in refused] == ["200.0%"]
    recipe = export_model("tiny", tmp_path / "r", graphs_only=True, progress=False)
    (known,), _ = grid(Source.open(recipe.path), [], [0.222])
    assert used(Source.open(recipe.path), known) == load_recipe("tiny").schedules["0.222"]
    with pytest.raises(TrioError, match="a bundle has its methods"):
        grid(opened, ["trio"], [0.111])
    with pytest.raises(TrioError, match="a bundle has its schedule"):
        named(opened, "0:0.1")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "b"
    export_model("tiny", folder, schedule="0:0.2:divprune,8:0.1", graphs_only=True, progress=False)
    return folder


def chosen(model: Path | str, options: str) -> list[Configuration]:
    arguments = f"eval {model} --out out {options}".split()
    return eval_command.configurations_of(parser().parse_args(arguments), Source.open(model))


@pytest.mark.parametrize(
    ("options", "budgets"),
    [
        ("", ["own", 0.111, 0.222, 0.333]),
        ("--budgets own", ["own"]),
        ("--budgets 0.3,own", ["own", 0.3]),
        ("--budgets 0.3", [0.3]),
    ],
)
def test_a_bundle_is_measured_in_its_own_schedule_first(options, budgets, bundle):
    source = Source.open(bundle)
    found = chosen(bundle, options)
    assert source.bundle is not None
    own = [one for one in found if used(source, one) == source.bundle.schedule]
    assert [one.budget for one in found if one not in own] == [b for b in budgets if b != "own"]
    assert own == found[: len(own)] and len(own) == budgets.count("own")


def test_a_bundles_own_schedule_is_asked_as_it_was_exported(tmp_path, questions):
    bundle = export_model("tiny", tmp_path / "b", schedule="0:0.2:divprune,8:0.1", progress=False)
    opened = Source.open(bundle.path)
    found = run(opened, questions, [as_exported(opened)], tmp_path / "out").results[1]
    answers = Pipeline.open(bundle, threads=1).generate_batch(
        [Request(q.prompt, list(q.images), max_new_tokens=8) for q in questions]
    )
    right = [a.text.strip() == q.reference for a, q in zip(answers, questions, strict=True)]
    assert found.schedule == bundle.schedule
    assert found.overall.accuracy.value == pytest.approx(np.mean(right))


def test_own_is_no_budget_of_a_model():
    with pytest.raises(TrioError, match="--budgets own is a bundle's own schedule: pass a bundle"):
        chosen("tiny", "--budgets own")


def test_a_bundle_in_a_recipes_schedule_is_asked_once_at_that_budget(tmp_path):
    bundle = export_model("tiny", tmp_path / "b", graphs_only=True, progress=False)
    found = chosen(bundle.path, "")
    assert found[0].schedule == bundle.schedule
    assert [one.budget for one in found[1:]] == [0.222, 0.333]


def stored(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    """`trio eval` finds these results, whatever it is asked."""

    def evaluate(source, questions, configurations, out, options, **_):
        results.save(out)
        return results

    monkeypatch.setattr(evaluation, "evaluate", evaluate)


def test_without_a_plot_everything_else_is_written(results, tmp_path, capsys, monkeypatch):
    stored(results, monkeypatch)
    assert main(f"eval tiny --out {tmp_path} --scenes 1 --no-plot --json".split()) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["questions"] == results.questions
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "results.md"}


def test_a_plot_that_cannot_be_written_loses_no_results(results, tmp_path, capsys, monkeypatch):
    stored(results, monkeypatch)
    (tmp_path / "retention.svg").mkdir()  # no file can take its place
    assert main(f"eval tiny --out {tmp_path} --scenes 1 --json".split()) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["scored"] == results.scored
    assert "cannot write" in captured.err and "retention.svg" in captured.err
    assert "wrote results.json, results.md to" in captured.err


def test_methods_go_into_schedules(source):
    found, refused = grid(
        source,
        ["recipe", "fastv", "dart@0", "fastv@2", "dart@recipe", "random@1+4"],
        [0.111],
        seeds=(0, 1, 2),
    )
    by_name = {one.name: one for one in found}
    assert by_name["recipe"].schedule == source.recipe_schedules["0.111"]
    assert set(by_name["fastv"].schedule.methods) == {"fastv"}
    assert by_name["dart@recipe"].schedule == by_name["recipe"].schedule.with_method("dart")
    assert by_name["dart@0"].schedule == Schedule.parse("0:0.111:dart")
    assert by_name["random@1+4"].schedule.layers == (1, 4)
    assert by_name["random@1+4"].seeds == (0, 1, 2) and by_name["fastv"].seeds == (0,)
    assert "fastv@2" not in by_name and "fastv@2 at 11.1% is left out" in refused[0]
    options, _ = grid(source, ["trio"], [0.222], thresholds=[0.7, 0.8], probes=["last", "shifted"])
    assert len({one.key for one in options}) == 4 == len({one.name for one in options})
    with pytest.raises(TrioError, match="unknown method 'best'"):
        grid(source, ["best"], [0.111])
    with pytest.raises(TrioError, match="METHOD@LAYER"):
        grid(source, ["trio@x"], [0.111])


def test_bundles_share_one_copy_of_the_weights(source, tmp_path):
    bundles = Bundles(source, tmp_path, ONE_THREAD)
    paths = [
        bundles.bundle(Configuration(text, Schedule.parse(text), 0.1)).path
        for text in ("0:0.2", "1:0.1", "0:0.2")
    ]
    assert paths[0] == paths[2] != paths[1]
    nodes = [{file.stat().st_ino for file in (p / "weights").iterdir()} for p in paths[:2]]
    assert nodes[0] == nodes[1]


def test_random_selections_are_averaged_over_seeds(source, questions, tmp_path):
    configurations, _ = grid(source, ["random@0"], [0.1], seeds=(0, 1))
    found = run(source, questions, configurations, tmp_path)
    files = sorted((tmp_path / "answers").iterdir())
    assert len(files) == 3  # unpruned, and two seeds
    texts = [[e["text"] for e in AnswerLog(f).entries] for f in files if "-1" in f.name]
    assert len(texts) == 1 and found.results[1].overall.accuracy.value < 1


def test_the_command_evaluates_and_says_what_it_wrote(tmp_path, capsys):
    status = main(
        f"eval tiny --out {tmp_path} --scenes 1 --threads 1 --split tuning --batch 16 --schedule "
        "mixed=0:44:divprune,6:19 --methods fastv@2 --budgets 0.111".split()
    )
    captured = capsys.readouterr()
    assert status == 0 and "| mixed |" in captured.out
    assert "fastv@2 at 11.1% is left out" in captured.err
    assert {"results.json", "results.md", "retention.svg"} <= {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--images .", "--images belongs to --questions"),
        ("--append x --limit 3 --scorer pope", "--append and --limit and --scorer belong to --que"),
        (
            "--questions q --scenes 3 --split test",
            "--scenes and --split belong to generated scenes",
        ),
        ("--scorer foo", "unknown scorer 'foo'"),
        ("--max-new-tokens 0", "--max-new-tokens must be 1 or more"),
        ("--seeds 0", "--seeds must be 1 or more"),
        ("--scenes 0", "0 scenes hold no question"),
        ("--first 99999", "no scenes 99999 to 100062 of the test split"),
        ("--methods fastv@2 --budgets 0.111", "nothing is left to measure"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_anything_is_written(
    options, words, tmp_path, capsys
):
    assert main(f"eval tiny --out {tmp_path / 'out'} {options}".split()) == 1
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == ""
    assert not (tmp_path / "out").exists()


def test_what_is_no_result_is_named_with_what_to_pass(tmp_path):
    with pytest.raises(TrioError, match=r"gone\.json .*\(No such file.*\): pass the results\.json"):
        Results.load(tmp_path / "gone.json")
    (tmp_path / "manifest.json").write_text('{"schema": 1}')
    with pytest.raises(TrioError, match=r"manifest\.json .*\(it is something else\)"):
        Results.load(tmp_path / "manifest.json")
