import csv
import json

import pytest
from conftest import CONFIGS, train_cartpole

from lightning_distill.cli import main


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_every_stage_hands_a_path_to_the_next(accelerator, tmp_path):
    """The shipped CartPole configs from teacher to report, shortened by flags."""
    teacher, dataset = tmp_path / "teacher", tmp_path / "dataset"
    student, tuned = tmp_path / "student", tmp_path / "tuned"

    def run(command, config, **flags):
        flags |= {"trainer.accelerator": accelerator} if command == "fit" else {}
        file = CONFIGS / "cartpole" / f"{config}.yaml"
        arguments = [str(part) for key, value in flags.items() for part in (f"--{key}", value)]
        main([command, "--config", str(file), *arguments])

    train_cartpole(teacher, "--trainer.accelerator", accelerator)
    run("collect", "collect", teacher=teacher / "policy/last", out=dataset, steps=2048)
    data = {"data.init_args.path": dataset, "data.init_args.batch_size": 64}
    run(
        "fit",
        "distill_low",
        **data,
        **{"trainer.default_root_dir": student, "trainer.max_epochs": 2},
    )
    policy = student / "policy/last"
    run(
        "fit",
        "finetune",
        **{
            "model.init_args.init_from": policy,
            "model.init_args.critic_warmup_steps": 256,
            "data.init_args.teacher.init_args.path": policy,
            "data.init_args.total_steps": 512,
            "evaluation.episodes": 0,
            "trainer.default_root_dir": tuned,
        },
    )
    for name in (teacher, student, tuned):
        out = ["--out", str(name), "--episodes", "4"]
        main(["evaluate", "--policy", str(name / "policy/last"), *out])
    main(["report", str(tmp_path), "--out", str(tmp_path / "report")])

    with (tmp_path / "report" / "report.csv").open(newline="") as file:
        rows = {row["stage"]: row for row in csv.DictReader(file)}
    assert {stage: row["parameters"] for stage, row in rows.items()} == {
        "teacher": "4675",
        "distilled": "131",
        "fine-tuned": "131",
    }
    for stage, run_folder in (("teacher", teacher), ("distilled", student), ("fine-tuned", tuned)):
        record = json.loads((run_folder / "evaluation.json").read_text())
        assert float(rows[stage]["return_mean"]) == record["return_mean"]
    # The student knows its teacher, the fine-tuned policy its student.
    taught = json.loads((policy / "config.json").read_text())["provenance"]
    started = json.loads((tuned / "policy/last/config.json").read_text())["provenance"]
    assert taught["teacher"]["path"] == str(teacher / "policy/last")
    assert started["init_from"]["provenance"] == taught
