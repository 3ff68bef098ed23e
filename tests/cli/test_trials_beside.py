"""`heretic-kl trials A --beside B`: one table of several studies."""


def test_one_table_of_several_studies(searched, call, events):
    for name, tokens in (("shorter", "1"), ("longer", "5")):
        words = ("--study-name", name, "--study-dir", "swept", "--kl-tokens", tokens)
        assert call(*words, "--trials", "3")[0] == 0
    names = ("trials", "shorter", "--beside", "longer,gone", "--study-dir", "swept")
    code, out, errors = call(*names)
    assert code == 1 and not errors
    title, head, *rows = out.splitlines()[:5]
    assert title == "The trial that knee picks of each study"
    assert head.split()[:4] == ["study", "kl_tokens", "trials", "trial"]
    assert [row.split()[:3] for row in rows[:2]] == [["shorter", "1", "3"], ["longer", "5", "3"]]
    assert "there is no study 'gone'" in rows[2]
    assert "not comparable where that differs" in out
    code, lines = events("trials", "shorter", "--beside", "longer", "--study-dir", "swept")
    (content,) = [line["content"] for line in lines if line["event"] == "result"]
    assert code == 0 and [row["settings"] for row in content["rows"]] == [
        {"kl_tokens": 1},
        {"kl_tokens": 5},
    ]
    assert content["rows"][1]["test"].keys() >= {"teacher_forced_kl", "refusals"}


def test_a_rule_that_no_trial_of_a_study_meets(searched, call):
    words = ("trials", "mine", "--beside", "mine", "--pick")
    code, out, _ = call(*words, "max-teacher_forced_kl=-1")
    assert code == 0 and "no trial meets the rule" in out
    assert "no objective" in call(*words, "max-other=1")[2]
    few = ("--study-name", "unrefusing", "--scorers.refusals.role", "monitor", "--trials", "1")
    assert call(*few)[0] == 0
    code, out, errors = call("trials", "mine", "--beside", "unrefusing", "--pick", "max-refusals=1")
    rows = [line for line in out.splitlines() if line.split()[:1] in (["mine"], ["unrefusing"])]
    assert code == 1 and not errors and "no objective 'refusals'" in rows[1]
    assert "no objective" not in rows[0] and len(rows) == 2
    assert "name the first one too" in call("trials", "--beside", "mine")[2]
