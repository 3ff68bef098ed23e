"""Settings that are wrong for this machine or for the scorers: found before a model is loaded."""

from wrong_inputs.case import BASE, Wrong

CASES = [
    Wrong(
        "unknown device",
        ("--model", "model", "--device", "gpu9"),
        "device 'gpu9' cannot be used: [...]; use auto, cpu, cuda, cuda:1 or mps",
    ),
    Wrong(
        "device that is absent",
        ("--model", "model", "--device", "cuda:7"),
        "device 'cuda:7' cannot be used: [...]; use auto, cpu, cuda, cuda:1 or mps",
    ),
    Wrong(
        "device without values",
        ("--model", "model", "--device", "meta"),
        "device 'meta' cannot be used: [...]; use auto, cpu, cuda, cuda:1 or mps",
    ),
    Wrong(
        "unknown device map",
        ("--model", "model", *BASE, "--device-map", "everywhere"),
        "cannot load the model of 'model': When passing device_map as a string, the value needs to be a device name (e.g. cpu, cuda:0) or 'auto', 'balanced', 'balanced_low_0', 'sequential' but found everywhere.",
        1,
    ),
    Wrong(
        "path of 5,000 characters",
        ("--model", "model", *BASE, "--save", "a" * 5000, "--pick", "knee"),
        "cannot save to 'aaaaaaaaaaaaaaaaaaaa[...]': File name too long",
    ),
    Wrong(
        "home folder of nobody",
        (
            "--model",
            "~nobodyhere/model",
            *BASE,
        ),
        "no model at '~nobodyhere/model': give a folder, a .gguf file or a hub id",
        1,
    ),
    Wrong(
        "unknown pick rule",
        ("--model", "model", *BASE, "--pick", "best"),
        "unknown pick rule 'best': use knee, trial=NUMBER, max-SCORER=VALUE, likely-SCORER=VALUE or min-SCORER=VALUE (for instance max-refusals=0.05)",
    ),
    Wrong(
        "pick rule without its number",
        ("--model", "model", *BASE, "--pick", "trial="),
        "pick rule 'trial=': '' is not a trial number",
    ),
    Wrong(
        "pick rule with a word for a number",
        ("--model", "model", *BASE, "--pick", "trial=first"),
        "pick rule 'trial=first': 'first' is not a trial number",
    ),
    Wrong(
        "pick rule of an unknown scorer",
        ("--model", "model", *BASE, "--pick", "max-niceness=1"),
        "pick rule 'max-niceness=1': no objective 'niceness'; there are refusals, teacher_forced_kl",
    ),
    Wrong(
        "--save without --pick and without a terminal",
        ("--model", "model", *BASE, "--save", "out", "--scorers.refusals.enabled", "false"),
        "--save without a terminal needs --pick, for instance --pick knee",
    ),
    Wrong(
        "no scorer to search for",
        (
            "--model",
            "model",
            *BASE,
            "--scorers.refusals.role",
            "monitor",
            "--scorers.teacher_forced_kl.role",
            "monitor",
        ),
        "no scorer has the role minimize or maximize: nothing to search for",
    ),
    Wrong(
        "missing chat template",
        ("--model", "model", *BASE, "--chat-template", "gone.jinja"),
        "chat template file 'gone.jinja' does not exist (use model, none or a Jinja file)",
    ),
]
