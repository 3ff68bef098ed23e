"""Wrong flags and commands: found before torch is imported."""

from wrong_inputs.case import BASE, Wrong

CASES = [
    Wrong(
        "no model",
        (),
        "no model given: name one with --model (a hub id, a local folder or a .gguf file), or try `heretic-kl demo`",
    ),
    Wrong("misspelt flag", ("--modle", "x"), "unknown flag --modle; did you mean --model?"),
    Wrong("misspelt command", ("dmo",), "unknown command 'dmo'; did you mean demo?"),
    Wrong(
        "command of an older version",
        ("run", "--model", "x"),
        "unknown command 'run'; it is now optimize",
    ),
    Wrong(
        "model without --model",
        ("org/model",),
        "unknown command 'org/model'; a model is given as --model org/model",
    ),
    Wrong(
        "flag that nothing resembles",
        ("--zzzz", "1"),
        "unknown flag --zzzz; `heretic-kl --help-all` lists every setting",
    ),
    Wrong(
        "word after the flags",
        ("--model", "model", "twice"),
        "unexpected argument 'twice'; a model is given as --model twice",
    ),
    Wrong(
        "flag without its value",
        ("--model", "model", "--trials"),
        "--trials needs a value (--trials=VALUE for one that begins with -)",
    ),
    Wrong(
        "word for a number",
        ("--model", "model", "--trials", "many"),
        "trials must be a whole number, 0 or more, got 'many' (--trials)",
    ),
    Wrong(
        "fraction of a whole number",
        ("--model", "model", "--trials", "1.5"),
        "trials must be a whole number, 0 or more, got '1.5' (--trials)",
    ),
    Wrong(
        "number below its range",
        ("--model", "model", "--trials=-1"),
        "trials must be a whole number, 0 or more, got '-1' (--trials)",
    ),
    Wrong(
        "number above its range",
        ("--model", "model", "--kl-tokens", "2000"),
        "kl_tokens must be a whole number from 1 to 1024, got '2000' (--kl-tokens)",
    ),
    Wrong(
        "no tokens for the KL",
        ("--model", "model", "--kl-tokens", "0"),
        "kl_tokens must be a whole number from 1 to 1024, got '0' (--kl-tokens)",
    ),
    Wrong(
        "number of 5,000 digits",
        ("--model", "model", "--seed", "9" * 5000),
        "seed must be a whole number from 0 to 4294967295, got '99999999999999999999[...]' (--seed)",
    ),
    Wrong(
        "seed beyond 32 bits",
        ("--model", "model", "--seed", "9" * 30),
        "seed must be a whole number from 0 to 4294967295, got '999999999999999999999999999999' (--seed)",
    ),
    Wrong(
        "NaN for a number",
        ("--model", "model", "--minutes", "nan"),
        "minutes must be a number above 0, got 'nan' (--minutes)",
    ),
    Wrong(
        "share above 1",
        ("--model", "model", "--target-refusals", "1.5"),
        "target_refusals must be a number from 0 to 1, got '1.5' (--target-refusals)",
    ),
    Wrong(
        "NaN share",
        ("--model", "model", "--target-refusals", "nan"),
        "target_refusals must be a number from 0 to 1, got 'nan' (--target-refusals)",
    ),
    Wrong(
        "unknown choice",
        ("--model", "model", "--dtype", "fp16"),
        "dtype must be one of auto, float32, bfloat16, float16, got 'fp16' (--dtype)",
    ),
    Wrong(
        "word for a switch",
        ("--model", "model", "--overwrite", "maybe"),
        "overwrite must be true or false, got 'maybe' (--overwrite)",
    ),
    Wrong(
        "value after --no-",
        ("--model", "model", "--no-refine", "true"),
        "--no-refine takes no value",
    ),
    Wrong(
        "empty folder name",
        ("--model", "model", "--save", ""),
        "save must be a path, got '' (--save)",
    ),
    Wrong("empty model name", ("--model", ""), "model must be text, not empty, got '' (--model)"),
    Wrong(
        "unknown component",
        ("--model", "model", "--edit.components", "attn"),
        "edit.components must be a list of attention, mlp, got 'attn' (--edit.components); did you mean attention?",
    ),
    Wrong(
        "number for a table",
        ("--model", "model", "--edit", "3"),
        "edit must be a table, as a JSON object, got '3' (--edit)",
    ),
    Wrong(
        "broken JSON for a scorer",
        ("--model", "model", "--scorers.refusals.settings.markers", "[1,"),
        "scorers.refusals.settings.markers must be valid JSON, got '[1,' (--scorers.refusals.settings.markers)",
    ),
    Wrong(
        "upper case in the name of a scorer",
        ("--model", "model", "--scorers.My-Scorer.use", "refusals"),
        "a scorer's name is lower-case letters, digits and _, beginning with a letter, got 'My_Scorer' (--scorers.My-Scorer.use)",
    ),
    Wrong(
        "too many candidates at once",
        ("--model", "model", "--parallel-candidates", "100"),
        "parallel_candidates must be a whole number from 1 to 64, got '100' (--parallel-candidates)",
    ),
    Wrong(
        "too many threads",
        ("--model", "model", "--threads", "1000000000"),
        "threads must be a whole number from 0 to 1024, got '1000000000' (--threads)",
    ),
    Wrong(
        "folders in the name of a study",
        ("--model", "model", *BASE, "--study-name", "../../escaped"),
        "study_name must be a name that a file could have, without folders, got '../../escaped' (--study-name)",
    ),
    Wrong(
        "NUL in the name of a study",
        ("--model", "model", *BASE, "--study-name", "a\0b"),
        "study_name must be Unicode text without control characters, got 'a\\x00b' (--study-name)",
    ),
    Wrong(
        "name of a study of 5,000 characters",
        ("--model", "model", *BASE, "--study-name", "a" * 5000),
        "study_name must be a name that a file could have, without folders, got 'aaaaaaaaaaaaaaaaaaaa[...]' (--study-name)",
    ),
    Wrong(
        "NUL in a path",
        ("--model", "model", *BASE, "--save", "a\0b", "--pick", "knee"),
        "save must be a path without NUL, its ~ that of a user, got 'a\\x00b' (--save)",
    ),
    Wrong(
        "NUL in a model",
        ("--model", "a\0b", *BASE),
        "model must be Unicode text without control characters, got 'a\\x00b' (--model)",
    ),
    Wrong(
        "bytes that are no text in a name",
        ("--model", "mo\udcffdel", *BASE),
        "model must be Unicode text without control characters, got 'mo\\udcffdel' (--model)",
    ),
    Wrong(
        "control characters in a name",
        ("--model", "./\x1b[2Jmodel", *BASE),
        "model must be Unicode text without control characters, got './\\x1b[2Jmodel' (--model)",
    ),
    Wrong(
        "home folder of nobody, to write to",
        ("--model", "model", *BASE, "--study-dir", "~nobodyhere/x"),
        "study_dir must be a path without NUL, its ~ that of a user, got '~nobodyhere/x' (--study-dir)",
    ),
    Wrong(
        "demo: another model",
        ("demo", "--model", "x"),
        "`heretic-kl demo` runs on the demo model; for another model leave out the word demo",
    ),
    Wrong(
        "config: a word too many",
        ("config", "x"),
        "unexpected argument 'x'; `heretic-kl config` takes none",
    ),
    Wrong(
        "score: no reference",
        ("score",),
        "no reference given: name the original with --reference (a hub id, a folder, a .gguf file, or what --save-reference wrote)",
    ),
    Wrong(
        "score: no candidate",
        ("score", "--reference", "model"),
        "no candidate given: name what is measured against it with --candidate",
    ),
    Wrong(
        "score: a chain of two models",
        ("score", "--chain", "a", "b"),
        "--chain takes at least three models; of two, use --reference, --candidate",
    ),
    Wrong(
        "score: a chain and a reference",
        ("score", "--chain", "a", "b", "c", "--reference", "x"),
        "--chain names all models: leave out --reference and --candidate",
    ),
    Wrong(
        "score: windows further apart than they are long",
        ("score", "-r", "model", "--candidate", "model", "--text", "a.txt", "--stride", "600"),
        "--stride 600 must be less than --context 512: what is scored needs text before it",
    ),
    Wrong(
        "score: a table that is no .safetensors",
        ("score", "-r", "model", "--candidate", "model", "--table", "a.txt"),
        "table must be a path that ends in .safetensors, got 'a.txt' (--table)",
    ),
    Wrong(
        "score: --store without --save-reference",
        ("score", "-r", "model", "--candidate", "model", "--store", "hidden"),
        "--store has no effect without --save-reference: pass both, or neither",
    ),
    Wrong(
        "score: a ranking of an unknown kind",
        ("score", "-r", "model", "--candidate", "model", "--ranking", "a.xls"),
        "--ranking a.xls: must end in .csv or .md",
    ),
    Wrong(
        "score: a temperature of 0",
        ("score", "-r", "model", "--candidate", "model", "--temperature", "0"),
        "temperature must be a number above 0, got '0' (--temperature)",
    ),
    Wrong(
        "score: an unknown response",
        ("score", "-r", "model", "--candidate", "model", "--response", "creative"),
        "response must be greedy or sampled(SEED), for instance sampled(0), got 'creative' (--response)",
    ),
    Wrong(
        "score: a seed that is no number",
        ("score", "-r", "model", "--candidate", "model", "--response", "sampled(x)"),
        "response must be greedy or sampled(SEED), for instance sampled(0), got 'sampled(x)' (--response)",
    ),
    Wrong(
        "score: a back end for .gguf without one",
        ("score", "-r", "model", "--candidate", "model", "--backend", "llama.cpp"),
        "--backend has no effect without a .gguf candidate",
    ),
    Wrong(
        "score: a negative weight of positions",
        ("score", "-r", "model", "--candidate", "model", "--position-decay", "-1"),
        "position_decay must be a number above 0, at most 1, got '-1' (--position-decay)",
    ),
    Wrong("save: no trial", ("save", "mine"), "say which trial: --trial NUMBER or --pick RULE"),
    Wrong(
        "save: two ways to say which trial",
        ("save", "mine", "--trial", "1", "--pick", "knee"),
        "--trial and --pick both name a trial: leave one out",
    ),
    Wrong("show: no trial", ("show", "mine"), "say which trial: --trial NUMBER or --pick RULE"),
    Wrong(
        "bench: no task",
        ("bench", "mine", "--trial", "1"),
        "no task given: name one with --task, as lm-eval does",
    ),
    Wrong(
        "scorer: no action",
        ("scorer",),
        "say what to do with which file: scorer new FILE, or scorer test FILE",
    ),
    Wrong(
        "scorer: an unknown action",
        ("scorer", "make", "x.py"),
        "action must be one of new, test, got 'make' (--action)",
    ),
    Wrong("storage: no action", ("storage",), "write `heretic-kl storage serve --storage URL`"),
    Wrong(
        "storage: an unknown action",
        ("storage", "stop"),
        "write `heretic-kl storage serve --storage URL`",
    ),
    Wrong(
        "storage: no database",
        ("storage", "serve"),
        "name the database to serve: --storage postgresql+psycopg://HOST/NAME",
    ),
    Wrong(
        "storage: a port that there cannot be",
        ("storage", "serve", "--storage", "sqlite:///x.db", "--port", "99999"),
        "port must be a whole number from 1 to 65535, got '99999' (--port)",
    ),
    Wrong(
        "inspect: no model",
        ("inspect",),
        "no model given; usage: heretic-kl inspect MODEL [--json FILE] [--SETTING VALUE ...]",
    ),
    Wrong(
        "evaluate: no edit",
        ("evaluate", "--model", "model"),
        "no edit given: name what is measured with --candidate",
    ),
    Wrong(
        "reproduce: no file",
        ("reproduce",),
        "no file given: name a reproduce.json, or the folder of a saved model",
    ),
    Wrong(
        "slurm: no hours",
        ("slurm", "--model", "model", "--workers", "2", "--hours", "0"),
        "hours must be a whole number, 1 or more, got '0' (--hours)",
    ),
    Wrong(
        "slurm: a line break in a name, to smuggle in an option",
        ("slurm", "--model", "model", "--workers", "2", "--partition", "a\n#SBATCH --uid=0"),
        "partition must be Unicode text without control characters, got 'a\\n#SBATCH --uid=0' (--partition)",
    ),
    Wrong(
        "worker: a misspelt flag",
        ("worker", "--trails", "1"),
        "unknown flag --trails; did you mean --trials?",
    ),
    Wrong(
        "events: a word too many",
        ("events", "x"),
        "unexpected argument 'x'; `heretic-kl events` takes none",
    ),
]
