"""`slurm/sweep.sbatch` and `slurm/training-loss.sbatch` on a real SLURM: one result at the end."""

import json

from heretic_kl.testing import save_tiny_model, tiny_llama

SEARCH = ["--config", "config.toml", "--trials", "3", "--no-scorers.slow.enabled"]
REFINED = "--refine --refinement.steps 2 --no-screening"


def test_a_sweep_ends_with_one_table(cluster):
    settings = ["--kl-tokens 1", f"{REFINED} --refinement.beta-kl 3"]
    settings.append(f"{REFINED} --refinement.kl-temperature 2")
    script = cluster.script("sweep.sbatch", SETTINGS=settings, SEARCH=SEARCH, STUDY_DIR="studies")
    array, last = cluster.call("bash", script).split()
    cluster.wait_for_end(array)
    cluster.wait_for_end(last)
    table = (cluster.folder / "studies" / "table.txt").read_text()
    head, *rows = table.splitlines()[1:5]
    for setting in ("kl_tokens", "refinement.beta_kl", "refinement.kl_temperature"):
        assert setting in head.split()
    assert [row.split()[0] for row in rows] == ["sweep-0", "sweep-1", "sweep-2"]
    assert "not comparable where that differs" in table
    cluster.call("scontrol", "requeue", f"{array}_0")  # as after a node that died at the very end
    cluster.wait(lambda: cluster.jobs(array)["0"][1] == 1, "not queued again")
    cluster.wait_for_end(array)


def test_a_sweep_of_which_one_study_fails_shows_the_others(cluster):
    settings = ["--kl-tokens 1", "--model gone"]
    script = cluster.script("sweep.sbatch", SETTINGS=settings, SEARCH=SEARCH, STUDY_DIR="studies")
    _, last = cluster.call("bash", script).split()
    cluster.wait_for_end(last, "FAILED")
    table = (cluster.folder / "studies" / "table.txt").read_text()
    assert "there is no study 'sweep-1'" in table and "sweep-0" in table


def test_the_training_loss_is_checked_by_a_script(cluster):
    save_tiny_model(cluster.folder / "base", tiny_llama(), seed=1)
    flags = ["--limit", "8", "--model", "model", "--base", "base"]
    script = cluster.script("training-loss.sbatch", STEPS="16", FLAGS=flags, FOLDER="out")
    (cluster.folder / "benchmarks").symlink_to(cluster.root / "benchmarks")
    array, last = cluster.call("bash", script).split()
    cluster.wait_for_end(array)
    cluster.wait_for_end(last)
    met = json.loads((cluster.folder / "out" / "checks.json").read_text())
    assert len(met) == 9 and all(met.values())
    one = cluster.folder / "out" / "0.5.json"
    wrong = json.loads(one.read_text())
    one.write_text(json.dumps({**wrong, "benign_objective": 99.0}))
    cluster.wait_for_end(cluster.sbatch("--array=5", script), "FAILED")
    assert "NOT MET: the held-out KL falls as beta rises" in cluster.logs()
