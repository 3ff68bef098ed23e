"""Runs inside Heretic's own environment, on Heretic as it is installed.

`search FOLDER`: its main program, in a folder with its config.toml. On the side the directions that
it edits with are kept (`directions.pt`). `dump FOLDER`: its finished trials as JSON. `export FOLDER
TRIAL OUT`: a trial's merged model, made with those directions by its own `Model.abliterate`.
"""

import json
import os
import sys
from pathlib import Path

DIRECTIONS = "directions.pt"


def search(folder):
    """Its main program, unchanged."""
    os.chdir(folder)
    sys.argv = ["heretic"]
    import torch
    from heretic import main, model

    abliterate = model.Model.abliterate

    def abliterate_and_keep(self, refusal_directions, *rest, **more):
        if not Path(DIRECTIONS).exists():
            torch.save(refusal_directions.cpu(), "directions.part")
            os.replace("directions.part", DIRECTIONS)
        return abliterate(self, refusal_directions, *rest, **more)

    model.Model.abliterate = abliterate_and_keep
    main.main()


def finished_trials(folder):
    """Complete trials of every journal in its folder."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trials = []
    for file in sorted((Path(folder) / "ckpt").glob("*.jsonl")):
        storage = JournalStorage(JournalFileBackend(str(file)))
        for name in optuna.get_all_study_names(storage):
            study = optuna.load_study(study_name=name, storage=storage)
            trials += [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    return trials


def dump(folder):
    """Print its finished trials, one JSON list."""
    names = {"refusals": "refusals", "kl": "kl_divergence", "n_harmful": "n_bad_prompts"}
    rows = []
    for trial in finished_trials(folder):
        row = {name: trial.user_attrs[attribute] for name, attribute in names.items()}
        row["number"] = trial.number
        row["start"] = trial.datetime_start.timestamp()
        row["complete"] = trial.datetime_complete.timestamp()
        rows.append(row)
    print("\n" + json.dumps(rows))


def export(folder, number, out):
    """Save a trial's merged model."""
    out = str(Path(out).resolve())
    os.chdir(folder)
    sys.argv = ["heretic"]
    import torch
    from heretic.config import Settings
    from heretic.model import AbliterationParameters, Model

    trial = next(t for t in finished_trials(".") if t.number == int(number))
    kernels = trial.user_attrs["parameters"]
    kernels = {name: AbliterationParameters(**kernel) for name, kernel in kernels.items()}
    model = Model(Settings())
    model.reset_model()
    with torch.no_grad():
        directions = torch.load(DIRECTIONS)
        model.abliterate(directions, trial.user_attrs["direction_index"], kernels)
    model.get_merged_model().save_pretrained(out)
    model.tokenizer.save_pretrained(out)


if __name__ == "__main__":
    {"search": search, "dump": dump, "export": export}[sys.argv[1]](*sys.argv[2:])
