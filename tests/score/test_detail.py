"""What a measurement tells beside its mean, against plain float64 and by its laws."""

import json

import pytest
import torch
from judge import log_rows, mean_of_means, token_rows

from heretic_kl.engine.teacher_forcing.batches import ForcedSequence
from heretic_kl.kl import KLTable, RowStatistics
from heretic_kl.model import thought_length
from heretic_kl.prompts import Prompt
from heretic_kl.score import Document, TeacherForcedKL, TextKL
from heretic_kl.score.detail import (
    ForcedInputs,
    PassNotes,
    signed_change,
    worst_positions,
    worst_prompts,
)
from heretic_kl.score.detail.refusals import find_openers
from heretic_kl.scoring import RefusalRule
from heretic_kl.testing import WORDS, load_tiny_model, save_tiny_model, tiny_llama

PROMPTS = ["make a cake", "tell me about Rome", "wait please", "how do I make a cake", "mix flour"]
DOCUMENTS = [Document(" ".join(WORDS * 2), "long"), Document(" ".join(WORDS[5:30]), "short")]
OPENERS = (5, 9, 20, 31)
CLOSE = {"rel": 1e-6, "abs": 1e-12}


@pytest.fixture(scope="module")
def kl(original):
    options = {"kl_tokens": 6, "dtype": "float32"}
    return TeacherForcedKL(original, prompts=PROMPTS, refusal_openers=OPENERS, **options)


class Capturing(PassNotes):
    """Keeps all logits of the pass, in float64, for the judge."""

    def __init__(self, reference, *options):
        super().__init__(reference, *options)
        shape = 2, reference.rows, reference.identity.vocabulary_size
        self.rows = torch.zeros(shape, dtype=torch.float64)

    def __call__(self, rows, reference, candidate):
        super().__call__(rows, reference, candidate)
        self.rows[:, rows] = torch.stack([reference, candidate]).double()


@pytest.fixture(scope="module")
def measured(kl, other):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("heretic_kl.score.comparison.PassNotes", Capturing)
        return kl.score(other)


@pytest.fixture
def judged(kl, measured):
    """Log-probabilities of both models at each prompt's positions, of the float32 logits."""
    lengths = [len(sequence.response) for sequence in kl.inputs.sequences]
    return [of_model.log_softmax(-1).split(lengths) for of_model in measured.notes.rows]


def test_the_judged_logits_are_those_of_plain_passes(kl, judged, original, other, load):
    for folder, rows in zip((original, other), judged, strict=True):
        plain = log_rows(load(folder), kl.inputs.sequences)
        assert torch.allclose(torch.cat(plain), torch.cat(rows), rtol=0.0, atol=1e-5)


class TestChange:
    def test_gain_and_loss_are_those_of_float64(self, kl, measured, judged):
        p, q = (token_rows(rows, kl.inputs.sequences) for rows in judged)
        moves = [b - a for a, b in zip(p, q, strict=True)]
        change = measured.change
        for estimate, values in (
            (change.gain, [move.clamp_min(0) for move in moves]),
            (change.loss, [(-move).clamp_min(0) for move in moves]),
            (change.net, moves),
        ):
            mean, error = mean_of_means(values)
            assert estimate.mean == pytest.approx(mean, **CLOSE)
            assert estimate.standard_error == pytest.approx(error, **CLOSE)
        assert change.gain.mean - change.loss.mean == pytest.approx(change.net.mean, **CLOSE)
        assert change.better == pytest.approx(mean_of_means([(m > 0).double() for m in moves])[0])
        assert change.better + change.worse == pytest.approx(1.0) and change.excluded == 0

    def test_buckets_are_by_the_reference_s_best_token(self, kl, measured, judged):
        p, q = (token_rows(rows, kl.inputs.sequences) for rows in judged)
        moved = [b.exp() - a.exp() for a, b in zip(p, q, strict=True)]
        divergence = [(a.exp() * (a - b)).sum(-1) for a, b in zip(*judged, strict=True)]
        sure = [rows.exp().amax(-1) for rows in judged[0]]
        buckets = measured.change.buckets
        assert sum(bucket.positions for bucket in buckets) == int(measured.table.mask.sum())
        for bucket in buckets:
            inside = [(s >= bucket.low) & (s < bucket.high) for s in sure]
            mean, error = mean_of_means(moved, inside)
            assert bucket.positions == sum(int(keep.sum()) for keep in inside)
            assert bucket.change == pytest.approx(mean, **CLOSE)
            assert (bucket.standard_error or 0) == pytest.approx(error or 0, **CLOSE)
            assert bucket.kl == pytest.approx(mean_of_means(divergence, inside)[0], **CLOSE)

    def test_over_text_it_is_the_fall_of_the_cross_entropy(self, original, other, load):
        text = TextKL(original, DOCUMENTS, context=16, stride=6, dtype="float32")
        measured = text.score(other)
        sequences = measured.inputs.sequences
        p, q = (token_rows(log_rows(load(f), sequences), sequences) for f in (original, other))
        moves = torch.nn.utils.rnn.pad_sequence([b - a for a, b in zip(p, q, strict=True)], True)
        clusters = measured.table.clusters
        of_clusters = [
            moves[clusters == c][measured.table.mask[clusters == c]].mean()
            for c in clusters.unique()
        ]
        expected = float(torch.stack(of_clusters).mean())
        assert measured.change.net.mean == pytest.approx(expected, **CLOSE)
        assert measured.change.gain.mean > 0 and measured.parts == () and measured.split is None

    def test_nothing_changes_against_itself(self, kl, original):
        change = kl.score(original).change
        assert change.gain.mean == change.loss.mean == change.better == change.worse == 0.0
        assert all(bucket.change == bucket.kl == 0.0 for bucket in change.buckets)

    def test_a_sure_reference_and_a_token_of_probability_0(self):
        table = made_table([[1.0, 0.5], [1.0, 0.25]], [[0.5, 0.0], [1.0, 0.5]])
        change = signed_change(table)
        assert change.excluded == 1  # its log-probability is -inf
        assert [(b.low, b.positions) for b in change.buckets] == [(0.25, 1), (0.99, 2)]
        assert change.loss.mean == pytest.approx(torch.log(torch.tensor(2.0)).item() / 2)


class TestSplit:
    def test_the_parts_are_those_of_float64(self, kl, measured, judged):
        first = [torch.stack([rows[0] for rows in of_model]).exp() for of_model in judged]
        p, q = (rows[:, list(OPENERS)].sum(-1) for rows in first)
        cells = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        lengths = [len(rows) for rows in judged[0]]
        of_prompts = [c / length for c, length in zip(cells[:, None], lengths, strict=True)]
        behaviour, error = mean_of_means(of_prompts)
        split = measured.split
        assert split.behaviour.mean == pytest.approx(behaviour, **CLOSE)
        assert split.behaviour.standard_error == pytest.approx(error, **CLOSE)
        assert split.reference_refuses == pytest.approx(float(p.mean()), **CLOSE)
        assert split.candidate_refuses == pytest.approx(float(q.mean()), **CLOSE)
        rest = [
            sum(float(a[s].sum()) * kl_within(a, b, s) for s in cells_of(len(a)))
            for a, b in zip(*first, strict=True)
        ]
        later = [(a.exp() * (a - b)).sum(-1)[1:].sum() for a, b in zip(*judged, strict=True)]
        whole = zip(rest, later, lengths, strict=True)
        expected = sum((r + float(x)) / length for r, x, length in whole) / len(rest)
        assert split.remainder.mean == pytest.approx(expected, **CLOSE)
        assert split.behaviour.mean + split.remainder.mean == pytest.approx(measured.kl, rel=1e-12)

    def test_a_stored_reference_knows_its_openers(self, kl, original, make_adapter, tmp_path):
        adapter = make_adapter(original, str(original))
        kl.save(tmp_path / "r.safetensors")
        stored = TeacherForcedKL.load(tmp_path / "r.safetensors").score(adapter)
        assert stored.split == kl.score(adapter).split and stored.split.behaviour.mean > 0

    def test_openers_come_from_refusals(self, original, load):
        lm = load_tiny_model(original)
        from heretic_kl.engine import MemoryLimits, Runner

        runner, told = Runner(lm, MemoryLimits(4), trees=False), []
        harmful, others = [Prompt(text) for text in PROMPTS[:3]], [Prompt("sorry")]
        refusing = lm.chat.decode(runner.responses([lm.chat.encode(harmful[0])], 32)[0].tokens)
        first = refusing.split()[0]
        rule = RefusalRule((first,))
        openers = find_openers(runner, lm.chat, harmful, others, told.append, rule)
        assert lm.chat.tokenizer.convert_tokens_to_ids(first) in openers and told == []
        never = RefusalRule(("no such word",))
        assert find_openers(runner, lm.chat, harmful, others, told.append, never) == ()
        assert told == ["the reference refuses none of 4 prompts: the KL is not split"]
        built = TeacherForcedKL(original, prompts=PROMPTS, kl_tokens=2, refusal_prompts=PROMPTS)
        assert built.refusal_openers == () and built.score(original).split is None


class TestWorst:
    def test_prompts_and_positions_by_name(self, kl, measured, judged):
        divergence = [(a.exp() * (a - b)).sum(-1) for a, b in zip(*judged, strict=True)]
        means = [float(values.mean()) for values in divergence]
        worst = measured.worst_prompts(2)
        order = sorted(range(len(PROMPTS)), key=lambda place: -means[place])
        assert [place.text for place in worst] == [PROMPTS[place] for place in order[:2]]
        assert worst[0].kl == pytest.approx(max(means), **CLOSE)
        position = measured.worst_positions(1)[0]
        values = divergence[position.prompt - 1]
        assert position.kl == pytest.approx(float(torch.cat(divergence).max()), **CLOSE)
        at = position.position - 1
        assert values[at] == torch.cat(divergence).max()
        decode = kl.inputs.tokenizer.decode
        sequence = kl.inputs.sequences[position.prompt - 1]
        assert position.token == decode([sequence.response[at]])
        assert position.candidate_token == decode(
            [int(judged[1][position.prompt - 1][at].argmax())]
        )
        assert position.before.endswith(decode([*sequence.prompt, *sequence.response[:at]][-1:]))

    def test_infinite_positions_are_worst_and_in_no_mean(self):
        table = made_table([[0.5, 0.5], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]])
        table.values[:] = torch.tensor([[3.0, 1.0], [2.0, torch.inf]])
        table.infinite[1, 1] = True
        inputs = ForcedInputs((ForcedSequence((1,), (2, 3)), ForcedSequence((4,), (5, 6))))
        positions = worst_positions(table, inputs, torch.zeros(2, 2, dtype=torch.int64), 9)
        assert [(p.prompt, p.position) for p in positions] == [(2, 2), (1, 1), (2, 1), (1, 2)]
        assert positions[0].token == "6" and positions[0].before == "4 5"  # no tokenizer
        assert [(p.prompt, p.kl) for p in worst_prompts(table, inputs, 9)] == [(1, 2.0), (2, 2.0)]

    def test_they_travel_as_json(self, measured):
        plain = json.loads(json.dumps(measured.to_dict(worst=3), allow_nan=False))
        assert len(plain["worst_prompts"]) == len(plain["worst_positions"]) == 3
        assert "worst_prompts" not in measured.to_dict()


class TestThoughts:
    @pytest.mark.parametrize(
        ("prompt", "response", "length"),
        [
            ("user hi assistant", "<think>so</think>yes", 17),
            ("assistant <think>\n", "so</think>yes", 10),
            ("assistant <think>\n\n</think>\n", "yes", 0),
            ("assistant", "so [THINK]", 0),
            ("assistant", " [THINK]so", 10),
        ],
    )
    def test_where_a_thought_ends(self, prompt, response, length):
        assert thought_length(prompt, response) == length

    def test_thoughts_and_answers_apart(self, tmp_path, load):
        folders = [save_tiny_model(tmp_path / n, tiny_llama(), seed=s) for s, n in enumerate("ab")]
        for folder in folders:  # "need", which it says, closes a thought that the template opens
            file, template = folder / "tokenizer.json", folder / "chat_template.jinja"
            text = file.read_text().replace('"first"', '"<think>"')
            file.write_text(text.replace('"need"', '"</think>"'))
            template.write_text(template.read_text().replace("> assistant ", "> assistant <think>"))
        options = {"response": "sampled(1)", "dtype": "float32"}
        kl = TeacherForcedKL(folders[0], prompts=PROMPTS, kl_tokens=24, **options)
        measured, sequences = kl.score(folders[1]), kl.inputs.sequences
        closing = kl.inputs.tokenizer.convert_tokens_to_ids("</think>")
        inside = [
            torch.arange(len(s.response))
            <= (s.response.index(closing) if closing in s.response else len(s.response))
            for s in sequences
        ]
        assert any(bool((~keep).any()) for keep in inside)
        p, q = (log_rows(load(folder), sequences) for folder in folders)
        divergence = [(a.exp() * (a - b)).sum(-1) for a, b in zip(p, q, strict=True)]
        moves = [
            b - a for a, b in zip(token_rows(p, sequences), token_rows(q, sequences), strict=True)
        ]
        for part, keep in zip(measured.parts, (inside, [~k for k in inside]), strict=True):
            assert part.kl == pytest.approx(mean_of_means(divergence, keep)[0], **CLOSE)
            assert part.gain - part.loss == pytest.approx(mean_of_means(moves, keep)[0], **CLOSE)
            assert part.positions == sum(int(k.sum()) for k in keep)
        assert [part.name for part in measured.parts] == ["thinking", "answer"]


def made_table(reference, candidate):
    """A table of these probabilities of the reference tokens, the reference's best ones."""
    p, q = (torch.tensor(rows, dtype=torch.float64) for rows in (reference, candidate))
    flags = torch.zeros(p.shape, dtype=torch.bool)
    columns = RowStatistics(p * 0, flags.clone(), p, q, p, p, flags)
    return KLTable(mask=~flags, **columns._asdict())


def cells_of(width):
    inside = torch.zeros(width, dtype=torch.bool)
    inside[list(OPENERS)] = True
    return inside, ~inside


def kl_within(p, q, cell):
    a, b = p[cell] / p[cell].sum(), q[cell] / q[cell].sum()
    return float((a * (a / b).log()).sum())
