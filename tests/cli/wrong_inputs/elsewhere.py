"""Plug-ins, servers and the hub, and what is asked where there is no terminal."""

from wrong_inputs.case import BASE, Wrong

RUN = ("--model", "model", *BASE)
HEAD = "from heretic_kl.scoring import Scorer, ScorerSettings\n"
MINE = f"{HEAD}class Mine(Scorer[ScorerSettings]):\n    "
WHOLE = f"{MINE}def requests(self): return []\n    def score(self, results): return None\n    "
NOBODY = "127.0.0.1:9"
JUDGE = ("--scorers.judge.enabled", "true", "--scorers.judge.settings.model", "m")


def plug_in(what, use, line, text=None):
    """A scorer of a file."""
    files = {} if text is None else {"mine.py": text}
    return Wrong(what, (*RUN, "--scorers.mine.use", use), line, files=files)


CASES = [
    plug_in(
        "plug-in that is not there", "mine.py:Mine", "scorer 'mine.py:Mine': no such file 'mine.py'"
    ),
    plug_in(
        "plug-in without its class",
        "mine.py:Gone",
        "scorer 'mine.py:Gone': [...]mine.py does not define class 'Gone'",
        "X = 1\n",
    ),
    plug_in(
        "plug-in whose class is no scorer",
        "mine.py:Mine",
        "scorer 'mine.py:Mine': [...]mine.py does not define class 'Mine'",
        "class Mine:\n    pass\n",
    ),
    plug_in(
        "plug-in that imports what is not installed",
        "mine.py",
        "scorer 'mine.py': [...]mine.py cannot be imported: ModuleNotFoundError: No module named 'no_such_module'",
        "import no_such_module\n",
    ),
    plug_in(
        "plug-in that is no Python",
        "mine.py",
        "scorer 'mine.py': [...]mine.py cannot be imported: SyntaxError: [...]",
        "def (:\n",
    ),
    plug_in(
        "plug-in without its methods",
        "mine.py:Mine",
        "scorer 'mine.py:Mine': Mine does not define requests, score",
        f"{MINE}pass\n",
    ),
    plug_in(
        "plug-in built with other arguments",
        "mine.py:Mine",
        "scorer 'mine.py:Mine': Mine.__init__ must take (self, name, settings)",
        f"{WHOLE}def __init__(self, a, b, c): pass\n",
    ),
    plug_in(
        "plug-in prepared with other arguments",
        "mine.py:Mine",
        "scorer 'mine.py:Mine': Mine.prepare must take (self, context)",
        f"{WHOLE}def prepare(self): pass\n",
    ),
    plug_in(
        "plug-in that scores with other arguments",
        "mine.py:Mine",
        "scorer 'mine.py:Mine': Mine.score must take (self, results)",
        f"{MINE}def requests(self): return []\n    def score(self): return None\n",
    ),
    Wrong(
        "judge that cannot be reached",
        (*RUN, *JUDGE, "--scorers.judge.settings.endpoint", f"http://{NOBODY}/v1"),
        f"judge m at http://{NOBODY}/v1 does not judge: no connection (ConnectError)",
    ),
    Wrong(
        "database that cannot be reached",
        (*RUN, "--storage", f"postgresql+psycopg://me:secret@{NOBODY}/x"),
        f"cannot open storage 'postgresql+psycopg://me:***@{NOBODY}/x': (psycopg.OperationalError) [...]",
    ),
    Wrong(
        "model of the hub, offline",
        ("--model", "org/nothing", *BASE),
        "cannot load the tokenizer of 'org/nothing': [...]",
        1,
    ),
    Wrong(
        "prompts of the hub, offline",
        (*RUN, "--prompts.harmful.train.source", "org/nothing"),
        "org/nothing: [...]",
    ),
    Wrong(
        "served model without its name",
        ("score", "-r", "model", "--candidate", f"http://{NOBODY}/v1"),
        f"candidate = 'http://{NOBODY}/v1' names no model: write http://{NOBODY}/v1#MODEL",
    ),
    Wrong(
        "--save without --pick, no terminal and a width of 0",
        (*RUN, "--save", "out", "--scorers.refusals.role", "monitor"),
        "--save without a terminal needs --pick, for instance --pick knee",
        environment={"COLUMNS": "0"},
    ),
    Wrong(
        "save without a trial and without a terminal",
        ("save", "mine", "--study-dir", "studies", "--save", "out"),
        "say which trial: --trial NUMBER or --pick RULE",
    ),
    Wrong(
        "narrow terminal",
        (*RUN, "--trials", "many"),
        "trials must be a whole number, 0 or more, got 'many' (--trials)",
        environment={"COLUMNS": "3", "TERM": "dumb"},
    ),
]
