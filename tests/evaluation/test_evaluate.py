"""``cheaper evaluate`` from the command line to the results."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from cheaper import cli
from cheaper.errors import UserError
from cheaper.evaluation import evaluate, evaluator
from cheaper.evaluation.benchmarks import at_size, catalogue, find_benchmarks, index, load_tasks, runs_code
from cheaper.evaluation.harness import CheaperLM
from cheaper.evaluation.local_data import LocalDataset
from cheaper.evaluation.results import Result, results_of, save
from tests.conftest import REPOSITORY
from tests.evaluation.conftest import arc_row, sentence, write
from tests.evaluation.test_programs import HUMANEVAL, MBPP, packed


def told(capsys, *arguments):
    """The one line that says what is wrong."""
    assert cli.main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_command_writes_table_and_file(model_folder, data_dir, tmp_path, capsys):
    output = tmp_path / "evaluation.json"
    common = ["--model_path", str(model_folder), "--data_dir", str(data_dir), "--output", str(output), "--limit", "4"]
    assert cli.main(["evaluate", *common, "--benchmarks", "arc_easy,gsm8k", "--max_new_tokens", "4"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["benchmark", "metric", "shots", "n", "score", "expected", "published"]
    rows = [line.split()[:4] for line in shown[1:3]]
    assert rows == [["arc_easy", "acc", "0", "4"], ["gsm8k", "math_verify", "8", "4"]]
    assert cli.main(["evaluate", *common, "--benchmarks", "hellaswag,arc_easy"]) == 0
    record = json.loads(output.read_text())
    assert [row["benchmark"] for row in record["results"]] == ["gsm8k", "hellaswag", "arc_easy"]
    assert {row["model"] for row in record["results"]} == {str(model_folder)}
    assert record["results"][0].keys() == {"model", *(field.name for field in dataclasses.fields(Result))}
    answers = {"chat": False, "draws": None, "temperature": 0.0, "max_new_tokens": 4}
    assert record["results"][0]["settings"] == {"limit": 4, "seed": 1234, **answers}
    assert record["results"][1]["settings"] == {"limit": 4, "seed": 1234, "chat": False}
    assert {"date", "versions"} < record.keys()


def test_results_replace_those_of_the_same_model_and_settings(tmp_path, monkeypatch):
    def scored(benchmark, score, **settings):
        return Result(benchmark, "acc", 0, 8, score, settings={"limit": None, **settings})

    file, ten = tmp_path / "run" / "evaluation.json", tmp_path / "run" / "step-10.pt"
    file.parent.mkdir()
    save(file, ten, [scored("a", 0.5), scored("b", 0.5)])
    save(file, tmp_path / "run" / "step-20.pt", [scored("a", 0.75)])
    save(file, "/hub/other", [scored("a", 0.125)])
    save(file, ten, [scored("a", 0.0, limit=5), scored("b", 0.625, temperature=0.6)])
    monkeypatch.chdir(tmp_path)
    save(Path("run/evaluation.json"), "run/step-10.pt", [scored("a", 0.25)])
    rows = [(row["model"], row["benchmark"], row["score"]) for row in json.loads(file.read_text())["results"]]
    others = [("step-20.pt", "a", 0.75), ("/hub/other", "a", 0.125)]
    ours = [("step-10.pt", "a", 0.0), ("step-10.pt", "b", 0.625), ("step-10.pt", "a", 0.25)]
    assert rows == [("step-10.pt", "b", 0.5), *others, *ours]
    file.parent.rename("moved")
    found = results_of(Path("moved/evaluation.json"), Path("moved/step-10.pt"))
    assert {row["benchmark"]: row["score"] for row in found} == {"a": 0.25, "b": 0.625}
    assert results_of(Path("nowhere.json"), ten) == []
    Path("else.json").write_text("[]")
    with pytest.raises(UserError, match=r"else\.json: holds no results of an evaluation"):
        results_of(Path("else.json"), ten)


def test_scores_to_compare_with_are_those_of_the_model_s_size():
    (gsm8k,) = find_benchmarks(["gsm8k"])
    assert (at_size(gsm8k.expected, 949_685_760), at_size(gsm8k.published, 949_685_760)) == (0.25, 0.616)
    assert (at_size(gsm8k.expected, 140_248_512), at_size(gsm8k.published, 140_248_512)) == (None, 0.163)
    assert at_size(gsm8k.published, 2_000_000) is None


def test_data_parallel_gives_the_same_results(model_folder, data_dir, tmp_path):
    names = "arc_easy,gsm8k"
    command = [str(REPOSITORY / "scripts" / "evaluate.py"), "--model_path", str(model_folder), "--benchmarks", names]
    command += ["--data_dir", str(data_dir), "--limit", "21", "--max_new_tokens", "4"]
    command += ["--output", str(tmp_path / "two.json")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("benchmark ") == 1
    one = evaluate(str(model_folder), names.split(","), data_dir=data_dir, limit=21, max_new_tokens=4)
    rows = [{"model": str(model_folder), **dataclasses.asdict(result)} for result in one]
    assert json.loads((tmp_path / "two.json").read_text())["results"] == rows


def test_suites_and_averages_name_benchmarks_that_are_there():
    kinds = catalogue()
    for name in (*kinds["suites"], *kinds["averages"]):
        for benchmark in find_benchmarks([name]):
            assert benchmark.task in index(benchmark.folder).all_tasks


def test_the_average_of_commonsense(model_folder, tmp_path):
    rng = random.Random(0)
    rows = {
        "allenai/ai2_arc/ARC-Easy/{}": arc_row(rng),
        "allenai/ai2_arc/ARC-Challenge/{}": arc_row(rng),
        "aps/super_glue/boolq/{}": {"question": "is it", "passage": sentence(rng), "idx": 0, "label": 1},
        "baber/piqa/{}": {"goal": sentence(rng), "sol1": "a", "sol2": "b", "label": 0},
        "lighteval/siqa/{}": {
            **{"context": "a b", "question": "why", "answerA": "a", "answerB": "b", "answerC": "c"},
            "label": "2",
        },
        "allenai/openbookqa/main/{}": {**arc_row(rng), "question_stem": sentence(rng)},
        "allenai/winogrande/winogrande_xl/{}": {
            **{"sentence": "the cat sat on _ all day", "option1": "mat", "option2": "hat", "answer": "1"}
        },
        "Rowan/hellaswag/{}": {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": "1"},
    }
    for place, row in rows.items():
        for split in ("train", "validation", "test"):
            write(tmp_path / place.format(split), [row] * 2)
    results = evaluate(str(model_folder), ["commonsense"], data_dir=tmp_path)
    *parts, average = results
    assert len(parts) == 8
    assert (average.benchmark, average.samples) == ("commonsense", 16)
    assert average.score == pytest.approx(sum(part.score for part in parts) / 8)


def write_livecodebench(folder, rows):
    """The hub's six files, each with its share of the rows."""
    for place, number in enumerate(("", 2, 3, 4, 5, 6)):
        write(folder / f"livecodebench/code_generation_lite/test{number}", rows[place::6])


def test_the_suites_ask_and_score(model_folder, tmp_path):
    mathematics = {"problem": "1 + 1?", "solution": "\\boxed{2}", "answer": "2"}
    write(tmp_path / "HuggingFaceH4/MATH-500/test", [mathematics] * 2)
    write(tmp_path / "openai/gsm8k/main/test", [{"question": "1 + 1?", "answer": "#### 2"}] * 2)
    write(tmp_path / "Maxwell-Jia/AIME_2024/train", [{"ID": "1", "Problem": "1 + 1?", "Answer": 2}] * 2)
    write(tmp_path / "math-ai/aime25/test", [mathematics] * 2)
    write(tmp_path / "openai/openai_humaneval/test", [HUMANEVAL] * 2)
    write(tmp_path / "google-research-datasets/mbpp/full/test", [MBPP] * 2)
    shots = [{**MBPP, "task_id": number} for number in range(1, 11)]
    write(tmp_path / "google-research-datasets/mbpp/full/prompt", shots)
    tests = [{"input": "1", "output": "2", "testtype": "stdin"}]
    doc = {"question_content": "Double.", "starter_code": "", "public_test_cases": json.dumps(tests)}
    doc |= {"private_test_cases": packed(tests), "metadata": "{}"}
    write_livecodebench(tmp_path, [doc] * 2)
    names = ["math500", "humaneval", "mbpp", "final"]
    few = {"data_dir": tmp_path, "max_new_tokens": 4, "samples": 3, "execute_code": True}
    results = {result.benchmark: result for result in evaluate(str(model_folder), names, **few)}
    assert results.keys() == {"math500", "humaneval", "mbpp", *catalogue()["suites"]["final"]}
    shots = {name: result.shots for name, result in results.items() if result.shots}
    assert shots == {"math500": 4, "mbpp": 3}
    assert all(result.samples == 2 and result.score == 0 for result in results.values())


def test_right_answers_score(model_folder, tmp_path, monkeypatch):
    write(tmp_path / "math-ai/aime25/test", [{"problem": "1 + 1?", "answer": "2"}] * 2)
    answers = iter(["\\boxed{2}", "3", "\\boxed{2}", "4"] * 2)
    asked = []

    def answer(self, contexts, settings, seed):
        asked.append((contexts[0], settings))
        return [next(answers) for _ in contexts]

    monkeypatch.setattr("cheaper.evaluation.harness.CheaperLM._continue", answer)
    (result,) = evaluate(str(model_folder), ["aime25"], data_dir=tmp_path, samples=4)
    assert (result.score, result.samples) == (0.5, 2)
    context, settings = asked[0]
    how = "Please reason step by step, and put your final answer within \\boxed{}."
    assert context == f"<s>system: {how}</s>user: 1 + 1?</s>assistant: "
    assert (settings["do_sample"], settings["temperature"], settings["max_gen_toks"]) == (True, 0.6, 30_000)


def test_the_final_suite_draws_as_the_paper_does():
    found = {one.name: (one.samples, one.temperature, one.top_p) for one in find_benchmarks(["final"])}
    once, aime = (None, 0.6, 0.95), (64, 0.6, 0.95)
    mathematics = {"math500_chat": once, "gsm8k_chat": once, "aime24": aime, "aime25": aime}
    assert found == mathematics | {"livecodebench": (16, 0.6, 0.95)}


def test_programs_score_a_mean_over_draws(model_folder, tmp_path, monkeypatch):
    tests = [{"input": "1", "output": "2", "testtype": "stdin"}]
    doc = {"question_content": "Double.", "starter_code": "", "public_test_cases": json.dumps(tests)}
    doc |= {"private_test_cases": "[]", "metadata": "{}"}
    write_livecodebench(tmp_path, [doc])
    answers = iter(["```python\nprint(2)\n```", "```python\nprint(3)\n```"] * 2)
    monkeypatch.setattr(
        "cheaper.evaluation.harness.CheaperLM._continue", lambda self, contexts, *_: [next(answers) for _ in contexts]
    )
    (result,) = evaluate(str(model_folder), ["livecodebench"], data_dir=tmp_path, samples=4, execute_code=True)
    assert (result.score, result.samples, result.settings["draws"]) == (0.5, 1, 4)


def test_shots_are_worked_examples(data_dir, tmp_path):
    write(tmp_path / "HuggingFaceH4/MATH-500/test", [{"problem": "1 + 1?", "solution": "", "answer": "2"}])
    (math500,) = find_benchmarks(["math500"])
    (task,) = load_tasks(math500, tmp_path, seed=0)["tasks"].values()
    task.build_all_requests()
    prompt = task.instances[0].args[0]
    assert prompt.count("Problem:\n") == prompt.count("Solution:") == 5
    assert prompt.count("Final Answer: The final answer is") == 4
    assert prompt.endswith("Problem:\n1 + 1?\n\nSolution:")


def test_without_consent_no_code_is_run(model_folder, data_dir, capsys):
    error = told(capsys, "--model_path", str(model_folder), "--benchmarks", "humaneval,mbpp")
    assert error == "error: --benchmarks humaneval, mbpp: runs generated code; add --execute_code to allow that"
    results = evaluate(str(model_folder), ["humaneval", "arc_easy"], data_dir=data_dir, limit=2)
    assert [result.benchmark for result in results] == ["arc_easy"]
    assert capsys.readouterr().err.splitlines()[0] == "left out, for want of --execute_code: humaneval"


def test_mistakes_are_told_in_one_line(model_folder, data_dir, tmp_path, capsys):
    model = ["--model_path", str(model_folder)]
    error = told(capsys, *model, "--benchmarks", "arc_esy")
    assert error == "error: --benchmarks arc_esy: no such benchmark; did you mean arc_easy or arc_es or arc_eu_easy?"
    error = told(capsys, *model, "--benchmarks", "piqa", "--data_dir", str(data_dir))
    wanted = f"{data_dir}/baber/piqa/<split>.jsonl or .parquet"
    assert error == f"error: --data_dir: there is no {wanted}, a copy of the data set"
    write(tmp_path / "baber/piqa/train", [{"goal": "a", "sol1": "a", "sol2": "b", "label": 0}])
    error = told(capsys, *model, "--benchmarks", "piqa", "--data_dir", str(tmp_path))
    wanted = f"{tmp_path}/baber/piqa/validation.jsonl or .parquet"
    assert error == f"error: --data_dir: there is no {wanted}, a split of the data set"
    (tmp_path / "baber/piqa/validation.jsonl").write_text("{")
    assert f"{tmp_path}/baber/piqa/validation.jsonl cannot be read" in told(
        capsys, *model, "--benchmarks", "piqa", "--data_dir", str(tmp_path)
    )
    assert "--data_dir nowhere: no such folder" in told(capsys, *model, "--data_dir", "nowhere")
    assert "--limit 0: expected 1 or more" in told(capsys, *model, "--limit", "0")


def test_mistakes_are_told_before_the_model_is_asked(model_folder, data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(CheaperLM, "_loglikelihood_tokens", lambda *_, **__: pytest.fail("asked"))
    model = ["--model_path", str(model_folder), "--data_dir", str(data_dir), "--limit", "1"]
    assert "baber/piqa/<split>" in told(capsys, *model, "--benchmarks", "arc_easy,piqa")
    (tmp_path / "else.json").write_text("[]")
    error = told(capsys, *model, "--benchmarks", "arc_easy", "--output", str(tmp_path / "else.json"))
    assert error == f"error: --output {tmp_path}/else.json: is there already, and holds no results"
    monkeypatch.setattr(os, "access", lambda *_: False)
    error = told(capsys, *model, "--benchmarks", "arc_easy", "--output", str(tmp_path / "new.json"))
    assert error == f"error: --output {tmp_path}/new.json: {tmp_path} cannot be written to; choose another folder"


def test_broken_models_are_told_in_one_line(model_folder, tmp_path, capsys):
    assert "model /nowhere" in told(capsys, "--model_path", "/nowhere", "--benchmarks", "arc_easy")
    speechless = shutil.copytree(model_folder, tmp_path / "speechless")
    (speechless / "tokenizer.json").unlink()
    error = told(capsys, "--model_path", str(speechless), "--benchmarks", "arc_easy")
    assert error == f"error: model {speechless}: has no tokenizer.json; name a tokenizer with --tokenizer"
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    error = told(capsys, "--model_path", str(broken), "--benchmarks", "arc_easy")
    assert f"{weights}: not a whole safetensors file" in error


def test_code_of_the_harness_is_never_run():
    assert runs_code(*find_benchmarks(["humaneval"]))
    assert not runs_code(*find_benchmarks(["mmlu"]))
    with pytest.raises(UserError, match="humaneval_plus: refused, the harness would run generated code without"):
        runs_code(*find_benchmarks(["humaneval_plus"]))


def test_the_harness_s_own_tasks_run_no_code(model_folder, data_dir, tmp_path, monkeypatch):
    allowed, ask = [], evaluator.evaluator.evaluate

    def recorded(*args, confirm_run_unsafe_code, **options):
        allowed.append(confirm_run_unsafe_code)
        return ask(*args, confirm_run_unsafe_code=confirm_run_unsafe_code, **options)

    monkeypatch.setattr(evaluator.evaluator, "evaluate", recorded)
    evaluate(str(model_folder), ["arc_easy", "gsm8k"], data_dir=data_dir, limit=1, max_new_tokens=1)
    assert allowed == [False, True]


def test_no_network_is_told_in_one_line(model_folder, monkeypatch, capsys):
    def unreachable(**_):
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    error = told(capsys, "--model_path", str(model_folder), "--benchmarks", "arc_easy")
    assert error.endswith("name local copies with --data_dir")
    assert "data set allenai/ai2_arc: not from the hub (Couldn't reach" in error


def test_parquet_copies_are_read(model_folder, tmp_path):
    rows = [{"goal": "a", "sol1": "a", "sol2": "b", "label": 0}] * 3
    (tmp_path / "baber/piqa").mkdir(parents=True)
    for split in ("train", "validation"):
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"baber/piqa/{split}.parquet")
    (result,) = evaluate(str(model_folder), ["piqa"], data_dir=tmp_path)
    assert result.samples == 3


def test_parts_are_one_split(tmp_path):
    for number in range(2):
        rows = pa.Table.from_pylist([{"number": number}])
        parquet.write_table(rows, tmp_path / f"test-{number:05}-of-00002.parquet")
    assert LocalDataset.read(tmp_path)["test"]["number"][:] == [0, 1]
    (tmp_path / "test-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match=r"has 1 files of test; expected 2"):
        LocalDataset.read(tmp_path)


@pytest.mark.parametrize("line", ['{"label": "b"}', "[1]"])
def test_rows_unlike_each_other_are_told_in_one_line(tmp_path, line):
    (tmp_path / "test.jsonl").write_text('{"label": 1}\n' + line)
    with pytest.raises(UserError, match=r"--data_dir: .*/test\.jsonl cannot be read"):
        LocalDataset.read(tmp_path)


def test_livecodebench_is_all_six_files(tmp_path, monkeypatch):
    (benchmark,) = find_benchmarks(["livecodebench"])
    many = {"starter_code": "", "private_test_cases": "x" * 12_000_000}  # more than what is parsed at once
    write_livecodebench(tmp_path, [{"question_content": str(number), **many} for number in range(6)])
    (task,) = load_tasks(benchmark, tmp_path, seed=0)["tasks"].values()
    assert [doc["question_content"] for doc in task.test_docs()] == list("012345")
    load = datasets.load_dataset

    def from_here(path, data_files, **options):
        files = [file.replace("hf://datasets", str(tmp_path)) for file in data_files["test"]]
        return load(path, data_files={"test": files}, cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", from_here)
    (task,) = load_tasks(benchmark, None, seed=0)["tasks"].values()
    assert [doc["question_content"] for doc in task.test_docs()] == list("012345")
    (tmp_path / "livecodebench/code_generation_lite/test6.jsonl").unlink()
    with pytest.raises(UserError, match=r"code_generation_lite/test6\.jsonl cannot be read .*No such file"):
        load_tasks(benchmark, tmp_path, seed=0)
